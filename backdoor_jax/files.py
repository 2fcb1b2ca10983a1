"""Files that are complete or absent, and files that several processes append to."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

from backdoor_jax.errors import UserError

LOCK_SECONDS = 60
"""How long `locked` waits for a lock file, which a killed process leaves behind."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces ``path`` at the end of the block.

    After an error ``path`` is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("new")
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('a.txt', 'new')]
    """
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder) / "a.txt", "new")
        ...     (Path(folder) / "a.txt").read_text()
        'new'
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """A file open for reading and appending, which no other process has open in this way during the block.

    The lock is the operating system's where there is one (`fcntl.flock`), which a killed process gives up; elsewhere it
    is a file beside ``path``.

    Raises:
        UserError: where a lock file does not go away.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for line in (b"one", b"two"):
        ...         with locked(Path(folder) / "a.txt") as file:
        ...             _ = file.write(line + b"\\n")
        ...     (Path(folder) / "a.txt").read_text().split()
        ['one', 'two']
    """
    with path.open("a+b") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        else:
            with _lock_file(path.with_name(f"{path.name}.lock")):
                yield file
                file.flush()


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """A file that exists during the block, and was created by no other process."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            if time.monotonic() > end:
                raise UserError(f"{path} is in the way; remove it if no other run is in progress") from None
            time.sleep(0.01)
    try:
        yield
    finally:
        path.unlink()
