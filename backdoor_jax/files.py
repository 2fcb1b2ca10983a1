"""The one way to write: new beside old, then renamed; and locks of files and folders that several processes write to.

What is being written is called ``.NAME.backdoor_jax-HOST-PID-RANDOM.partial``, and an old folder that is being
replaced the same with ``.old``. A killed process leaves them behind; they are recognized by their whole name, which
nobody types, and by the number of a process that no longer runs here. Those of another host or container stay, except
that an old folder is put back where there is no other.
"""

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
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
    """A temporary file to write to, which replaces ``path`` at the end of the block.

    After an error ``path`` is as it was. The file is as accessible as the user's umask says, whatever writes it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("new")
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('a.txt', 'new')]
    """
    path = behind_link(path)
    settle(path)
    partial = beside(path, "partial", path.suffix)
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write to, which replaces ``path`` at the end of the block.

    Until then, and after an error, ``path`` is as it was. What an old folder holds besides the new one's files is kept.
    One that has none of them stays itself, with its owner, its mode and whoever works in it; the files are moved into
    it, those in folders first, so that a description comes last.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for text in ("old", "new"):
        ...         with atomic_folder(Path(folder) / "model") as temporary:
        ...             _ = (temporary / "a.txt").write_text(text)
        ...     [file.name for file in Path(folder).iterdir()], (Path(folder) / "model" / "a.txt").read_text()
        (['model'], 'new')
    """
    path = behind_link(path)
    settle(path)
    partial, old = beside(path, "partial"), beside(path, "old")
    partial.mkdir()
    try:
        yield partial
        new = sorted(partial.iterdir(), key=Path.is_file)
        if path.is_dir() and not any(os.path.lexists(path / inner.name) for inner in new):
            for inner in new:
                os.replace(inner, path / inner.name)
            return
        if path.is_dir():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _settle_old(old, path)


def behind_link(path: Path) -> Path:
    """The file or folder that a link or ``.`` stands for, which is replaced; other paths as they are."""
    return Path(os.path.realpath(path)) if path.is_symlink() or not path.name else path


_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.backdoor_jax-(?P<host>[0-9a-f]{8})-(?P<process>[0-9]{1,10})-[0-9a-f]{8}\.(?P<kind>partial|old)(\.[^.]+)?"
)


def beside(path: Path, kind: str, suffix: str = "", process: int | None = None) -> Path:
    """A new path in the same folder, by which `settle` recognizes what a process left behind.

    Args:
        path: what is to be written or replaced.
        kind: ``partial`` or ``old``.
        suffix: of the new path, for writers that go by it.
        process: the number of the process that writes; this one by default.

    Example:
        >>> is_leftover(beside(Path("model"), "partial"))  # This process runs.
        False
    """
    owner = f"backdoor_jax-{_host()}-{process or os.getpid()}-{secrets.token_hex(4)}"
    return path.parent / f".{path.name}.{owner}.{kind}{suffix}"  # The root has no name to replace.


def _host() -> str:
    """What tells apart machines, and containers with processes of their own."""
    namespace = 0
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def settle(path: Path) -> None:
    """Removes what killed processes left beside a path, and puts back an old folder where they moved it away."""
    with contextlib.suppress(OSError):
        for leftover in path.parent.iterdir():
            if (found := _LEFTOVER.fullmatch(leftover.name)) and found["name"] == path.name:
                _clear(leftover, found)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left anywhere in a folder, and puts back old folders."""
    for leftover in sorted(folder.rglob("*"), reverse=True):
        if found := _LEFTOVER.fullmatch(leftover.name):
            _clear(leftover, found)


def is_leftover(path: Path) -> bool:
    """Whether a killed process of this machine left a file or folder behind while it wrote another one."""
    found = _LEFTOVER.fullmatch(path.name)
    return found is not None and found["host"] == _host() and not _runs(int(found["process"]))


def _clear(leftover: Path, found: re.Match[str]) -> None:
    """Clears away a leftover of a process that has ended; of another host's, an old folder is put back if it is all."""
    path = leftover.with_name(found["name"])
    if found["host"] != _host():
        if found["kind"] == "old" and not os.path.lexists(path):
            os.replace(leftover, path)
    elif _runs(int(found["process"])):
        pass
    elif found["kind"] == "old":
        _settle_old(leftover, path)
    elif leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def _settle_old(old: Path, new: Path) -> None:
    """Puts an old folder back where there is no new one, or moves into the new one what that lacks."""
    if not old.is_dir():
        return
    if not new.exists():
        os.replace(old, new)
        return
    for inner in old.iterdir():
        if not (new / inner.name).exists():
            os.replace(inner, new / inner.name)
    shutil.rmtree(old, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether a process of this machine runs."""
    if os.name == "nt":  # There `os.kill` would end it.
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


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


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """A folder that no other process has locked in this way during the block; nothing is written for it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held(folder: Path, parts: Sequence[str]) -> Iterator[None]:
    """Parts of a folder that no other process holds during the block; a killed process gives them up.

    Args:
        folder: the folder.
        parts: what to hold, such as ``seed-0``.

    Raises:
        UserError: where another process holds one, with the number of the process.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, held(Path(folder), ["seed-0"]):
        ...     with held(Path(folder), ["seed-1"]):
        ...         sorted(path.name for path in Path(folder).iterdir())
        ['.seed-0.lock', '.seed-1.lock']
    """
    with contextlib.ExitStack() as holding:
        for part in parts:
            holding.enter_context(_held(folder / f".{part}.lock", part))
        yield


@contextmanager
def _held(path: Path, part: str) -> Iterator[None]:
    while True:
        if fcntl is None and path.exists():
            raise UserError(_in_use(path, part))
        with path.open("a+") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(_in_use(path, part)) from None
                try:
                    current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
                except FileNotFoundError:
                    current = False
                if not current:  # Its holder removed it meanwhile.
                    continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _in_use(path: Path, part: str) -> str:
    with contextlib.suppress(OSError):
        holder = path.read_text().strip()
        return (
            f"{path.parent} is in use by process {holder or 'unknown'} ({part.replace('-', ' ')}); wait for it, or "
            "give other seeds or another --out"
        )
    return f"{path.parent} was in use a moment ago; try again"
