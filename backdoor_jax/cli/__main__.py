"""``python -m backdoor_jax.cli`` is the command without its preparation for signals."""

import sys

from backdoor_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
