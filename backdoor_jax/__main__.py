"""``python -m backdoor_jax`` is the command ``backdoor-jax``."""

import sys

from backdoor_jax_command import main

if __name__ == "__main__":
    sys.exit(main())
