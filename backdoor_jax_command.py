"""The command's entry: it is ready for Ctrl-C and SIGTERM before the package is imported, which takes seconds.

It is no part of the package, because the import of any part imports the whole.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs the command of `backdoor_jax.cli`; a signal before or after it ends the process at once with one line."""
    prepare()
    from backdoor_jax.cli import main

    return main()


def prepare() -> None:
    """Gets ready for signals and for closed streams, and imports JAX, which refuses wrong variables of the environment.

    Raises:
        SystemExit: for such a variable, after one line.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # Closed; the next file that is opened would take its place, and receive what is printed.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    os.environ["MPLBACKEND"] = "agg"  # Figures are written and never shown, whatever the user's own are drawn with.
    # XLA writes of slow compilation amid the progress, which names compilation itself.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import jax  # noqa: F401
    except ValueError as error:
        os.write(2, f"backdoor-jax: {error}; correct or unset this variable of the environment\n".encode())
        raise SystemExit(2) from error


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    try:
        os.write(2, f"backdoor-jax: stopped by {name}\n".encode())
    finally:
        os._exit(128 + number)  # An exception could end up in some import's `except`.


if __name__ == "__main__":
    sys.exit(main())
