"""Output for any terminal and locale, for a closed pipe and a full disk."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from backdoor_jax.errors import LONGEST, printable

if TYPE_CHECKING:
    from rich.table import Table


def fail(message: str, code: int = 2) -> int:
    """Prints a line on stderr and returns the exit code."""
    with contextlib.suppress(OSError):
        print(printable(f"backdoor-jax: {message}", LONGEST), file=sys.stderr, flush=True)
    return code


def print_wide(table: "Table") -> None:
    """Prints a table, wider than the terminal if necessary, so that no number is truncated."""
    from rich.console import Console

    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=500)).maximum
    Console(width=max(console.width, needed)).print(table)


class _Quiet:
    """A stream that drops what cannot be written, as where its reader is gone: results are saved, whoever reads it.

    Attributes:
        refused: what the system said where the reader is not gone, such as that a disk is full.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.refused: list[OSError] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, or drops, a text."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.refused.append(error)
            # What is buffered is written again later, at the latest when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def safe_output() -> Iterator[list[OSError]]:
    """Lets any text be printed in any locale, and a closed pipe or stream pass unnoticed.

    At its end the list holds why text on stdout could not be written, where that is not for want of a reader.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    refused: list[OSError] = []
    for name, stream in streams.items():
        if stream is None:  # It was closed before the command began.
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            setattr(sys, name, _Quiet(stream))
    try:
        yield refused
    finally:
        for name, stream in streams.items():
            safe = getattr(sys, name)
            safe.flush()
            if name == "stdout":
                refused += getattr(safe, "refused", [])
            setattr(sys, name, stream)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the notes that libraries write for their own developers from the user's terminal."""
    logger = logging.getLogger("absl")  # Of Orbax and TensorFlow Datasets too.
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for library in ("orbax", "flax", "tensorflow_datasets", "jaxopt"):
                warnings.filterwarnings("ignore", module=rf"{library}\b")
            yield
    finally:
        logger.setLevel(level)
