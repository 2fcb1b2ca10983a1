"""The one way to stop: a command ends at the next safe point after Ctrl-C or SIGTERM, and a second one ends it at once.

A safe point is between two units of work, where everything done is saved: `stop_if_asked`. In a program that uses the
package as a library nothing is installed, and Python's own `KeyboardInterrupt` applies.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

_asked: list[int] = []
"""The signal that asked this process to stop, where one did."""


class Stopped(BaseException):
    """The command ends at a safe point.

    Attributes:
        code: the exit code, 128 and the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


def stop_if_asked() -> None:
    """A safe point.

    Raises:
        Stopped: where a signal has asked for it.
    """
    if _asked:
        raise Stopped(_asked[0])


@contextlib.contextmanager
def stopping_at_safe_points() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the block at its next safe point, or at its end."""

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if _asked:
            os._exit(128 + number)
        _asked.append(number)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        line = f"backdoor-jax: {name}: stopping at the next safe point, where all results are saved; again to stop now"
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())

    _asked.clear()
    try:
        earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Not the main thread, which alone receives signals.
        yield
        return
    try:
        yield
        stop_if_asked()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        _asked.clear()
