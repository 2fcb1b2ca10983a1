"""The one door for files: what is read from them is data, its size is known first, and every error is one line.

A file is read only if it is a regular one (a pipe would block, a device never ends). What it says about itself is
compared with a budget before memory is allocated, and whatever a parser raises becomes one `UserError` that names the
file and the fix. Arrays are in `array_files`, pickles in `pickles`.
"""

import contextlib
import io
import json
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backdoor_jax.errors import UserError, first_line

EXPANSION = 100
"""How many times larger than the file its contents may be; images of natural scenes stay below 10."""
SMALL = 64 << 20
"""Contents of this many bytes are read from a file of any size."""
LONGEST_NAME = 500
"""Characters of a name inside a file."""
MOST_NAMES = 100_000
"""Names inside a file: arrays of a model, members of an archive."""
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF", "GIF")
"""Pillow's names of the formats that are read; others hold images larger than they say, or run programs."""
ANIMATED = "it is animated; save one frame as a picture of its own"
"""Why a file of several frames is refused: one of them would be chosen in silence."""
DEEPEST = 32
"""Levels of a tree inside a file."""


def as_path(path: object, where: str) -> Path:
    """A path, or refuses what is none.

    Raises:
        UserError: for anything but text and paths, and for empty text.

    Example:
        >>> as_path("", "--data")
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: --data is '', expected the path of a file or folder
    """
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        found = repr(path) if path is None or isinstance(path, str | int | float) else f"a {type(path).__name__}"
        raise UserError(f"{where} is {found}, expected the path of a file or folder")
    return Path(path)


def file_size(path: Path | str, fix: str) -> int:
    """The size in bytes of a regular file.

    Args:
        path: the file; a link to one will do.
        fix: the end of the error, after the reason.

    Raises:
        UserError: where there is no such file, or something else is there.

    Example:
        >>> file_size("/dev/null", "give a file")
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: /dev/null: is not a regular file; give a file
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path.
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"{path}: {reason}; {fix}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "is a folder" if stat.S_ISDIR(found.st_mode) else "is not a regular file"
        raise UserError(f"{path}: {kind}; {fix}")
    return found.st_size


@contextlib.contextmanager
def parsing(path: Path | str, problem: str, fix: str) -> Iterator[None]:
    """Turns whatever a parser raises inside the block into one `UserError`.

    Example:
        >>> with parsing("model.json", "not JSON", "save it again"):
        ...     json.loads("{")
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: model.json: not JSON (Expecting property name ...); save it again
    """
    try:
        yield
    except Exception as error:  # Parsers raise many kinds: RecursionError, MemoryError, zlib.error, OverflowError, ...
        if isinstance(error, UserError) and str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {problem} ({first_line(error)}); {fix}") from error


def require_budget(needed: int, size: int, path: Path | str) -> None:
    """Refuses contents that are much larger than their file, before any memory is allocated for them.

    Args:
        needed: bytes of the contents, as the file declares them.
        size: bytes of the file.
        path: the file, for the error.

    Raises:
        UserError: with both figures.

    Example:
        >>> require_budget(5 * 10**9, 5 * 10**6, "images.npz")
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: images.npz: declares 5000.0 MB of contents in a file of 5.0 MB, at most
        500.0 MB are read; write it without such compression
    """
    allowed = max(SMALL, EXPANSION * size)
    if needed > allowed:
        raise UserError(
            f"{path}: declares {_megabytes(needed)} MB of contents in a file of {_megabytes(size)} MB, at most "
            f"{_megabytes(allowed)} MB are read; write it without such compression"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}" if count < 10**15 else "over 10^9"


def zip_members(archive: zipfile.ZipFile, path: Path | str, size: int) -> list[zipfile.ZipInfo]:
    """The members of a zip file, stored or deflated as in those of NumPy and PyTorch, within the budget.

    Others name in a few bytes how much memory their decoder allocates.

    Args:
        archive: the zip file.
        path: where it is, for errors.
        size: its bytes.

    Raises:
        ValueError: for another compression.
        UserError: for contents beyond the budget, and too many or too long names.
    """
    members = archive.infolist()
    require_names([member.filename for member in members], path)
    require_budget(sum(member.file_size for member in members), size, path)
    require_deflated(archive)
    return members


def require_deflated(archive: zipfile.ZipFile) -> None:
    """Refuses a zip file with members that are neither stored nor deflated.

    Raises:
        ValueError: for another compression.
    """
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename} is compressed by method {member.compress_type}, expected deflate")


def require_names(names: Sequence[str], path: Path | str) -> None:
    """Refuses too many or too long names inside a file.

    Raises:
        UserError: with the figure.
    """
    longest = max(map(len, names), default=0)
    if len(names) > MOST_NAMES or longest > LONGEST_NAME:
        raise UserError(
            f"{path}: holds {len(names)} names of up to {longest} characters, expected at most {MOST_NAMES} of "
            f"{LONGEST_NAME}; it is no file of this package's"
        )


def element_count(shape: Sequence[int]) -> int:
    """The elements of an array of a shape; an axis of length 0 counts as 1, so that no other length is hidden by it.

    Raises:
        ValueError: for a shape that no array has.

    Example:
        >>> element_count((2, 3)), element_count((1, 10**9, 0))
        (6, 1000000000)
    """
    if len(shape) > DEEPEST or not all(type(length) is int and length >= 0 for length in shape):
        # What is no length may be nested tuples that share parts, whose text is exponentially long.
        lengths = ", ".join(str(length) if type(length) is int else type(length).__name__ for length in shape[:DEEPEST])
        raise ValueError(f"({lengths}) is no shape")
    count = 1
    for length in shape:
        count *= max(length, 1)
    return count


def read_text(path: Path, fix: str) -> str:
    """The text of a small UTF-8 file.

    Raises:
        UserError: where it is no regular file, larger than 64 MiB, or not UTF-8.
    """
    size = file_size(path, fix)
    if size > SMALL:
        raise UserError(f"{path}: has {_megabytes(size)} MB, at most {_megabytes(SMALL)} MB are read; {fix}")
    with parsing(path, "cannot be read", fix):
        return path.read_text(encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """A JSON value in which every number is finite.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_json("[NaN]")
        Traceback (most recent call last):
        ValueError: NaN is no number
    """

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if abs(value) < float("inf") else refused(digits[:20])

    return json.loads(text, parse_constant=refused, parse_float=finite)


class Picture(NamedTuple):
    """A decoded image file.

    Attributes:
        pixels: Pillow's image.
        mode: Pillow's mode of the file, before it was converted.
    """

    pixels: Any
    mode: str


def image_pixels(file: Any, path: Path | str, mode: str, size: int) -> Picture:
    """The pixels of an image file, whose dimensions are compared with the budget before it is decoded.

    Channels of 16 bits are scaled to 8. Of a GIF only its one frame is given to Pillow, see `_still_gif`.

    Args:
        file: a path, or an open binary file.
        path: what errors call it.
        mode: Pillow's, ``RGB`` or ``L``, to which it is converted.
        size: bytes of the file.

    Raises:
        UserError: where it is no image of `IMAGE_FORMATS`, whatever its name, has pixels of 32 bits or several frames,
            or decodes to more than the budget.
    """
    import warnings

    import numpy as np
    from PIL import Image

    with contextlib.ExitStack() as stack:
        stack.enter_context(parsing(path, "cannot be read as an image", "remove it"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        stream = stack.enter_context(open(file, "rb")) if isinstance(file, str | Path) else file
        start = stream.tell()
        if stream.read(6) in (b"GIF87a", b"GIF89a"):
            if size > SMALL:
                raise ValueError(f"a GIF of {_megabytes(size)} MB, at most {_megabytes(SMALL)} MB are read")
            stream.seek(start)
            stream = io.BytesIO(_still_gif(stream.read()))
        else:
            stream.seek(start)
        with Image.open(stream, formats=IMAGE_FORMATS) as image:
            require_budget(4 * image.width * image.height, size, path)
            if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                raise ValueError(ANIMATED)
            if image.mode in ("I", "F"):
                raise ValueError(f"its mode {image.mode!r} has 32 bits a channel, expected 8 or 16")
            if image.mode.startswith("I;16"):  # Pillow clips them when it converts.
                scaled = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
                return Picture(scaled.convert(mode), image.mode)
            return Picture(image.convert(mode), image.mode)


def _still_gif(content: bytes) -> bytes:
    """A GIF with its size, colors, transparency and one frame, and nothing else.

    Pillow allocates what a frame and its disposal say when it opens a file, and skips blocks by rules of its own.

    Raises:
        ValueError: for several frames or none, or a frame that reaches beyond the image.
    """
    stream, kept = io.BytesIO(content), io.BytesIO()

    def take(count: int) -> bytes:
        found = stream.read(count)
        if len(found) < count:
            raise ValueError("it ends within a block")
        return found

    def blocks() -> bytes:
        """A block's parts, each after its length, up to the empty one."""
        parts = []
        while length := take(1)[0]:
            parts.append(bytes([length]) + take(length))
        return b"".join(parts)

    def colors(flags: int) -> bytes:
        return take(6 << (flags & 7)) if flags & 128 else b""

    header = take(13)
    width, height, flags = struct.unpack("<HHB", header[6:11])
    kept.write(header + colors(flags))
    transparency, frames = b"", 0
    while (kind := stream.read(1)) not in (b"", b";"):
        if kind == b"!":
            control, block = take(1)[0] == 249, blocks()
            if control and len(block) == 5 and block[1] & 1:
                transparency = b"!\xf9\x04\x01\0\0" + block[4:] + b"\0"
        elif kind == b",":
            frames += 1
            if frames > 1:
                raise ValueError(ANIMATED)
            place = take(9)
            left, top, columns, rows, flags = struct.unpack("<HHHHB", place)
            if left + columns > width or top + rows > height:
                raise ValueError("its frame reaches beyond the image")
            kept.write(transparency + kind + place + colors(flags) + take(1) + blocks() + b"\0")
        elif kind != b"\0":
            raise ValueError(f"it has a block of the unknown kind {kind[0]}")
    if not frames:
        raise ValueError("it has no frame")
    return kept.getvalue() + b";"
