"""Arrays in ``.npy``, ``.npz`` and ``.safetensors`` files, read as plain bytes of plain numeric types.

Nothing here asks a library to make an array from a description in the file: the shape, the type and the number of bytes
are compared with each other and with a budget first (`reading.require_budget`), and then the bytes become the array.
"""

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from backdoor_jax.reading import (
    element_count,
    file_size,
    parse_json,
    parsing,
    require_budget,
    require_names,
    zip_members,
)

SAFETENSORS_TYPES = {
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"<{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
}
"""The types of a safetensors file that are read."""


def read_npz(path: Path, holding: str) -> dict[str, np.ndarray]:
    """The arrays of a plain ``.npz``.

    Args:
        path: the file.
        holding: what it should hold, for errors.

    Raises:
        UserError: where there is no such file, or it is not a plain ``.npz`` within the budget.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder) / "a.npz", labels=np.arange(3))
        ...     read_npz(Path(folder) / "a.npz", "labels")
        {'labels': array([0, 1, 2])}
    """
    size = file_size(path, f"give a .npz with {holding}")
    with (
        parsing(path, "cannot be read as a plain .npz", "write it with numpy.savez"),
        zipfile.ZipFile(path) as archive,
    ):
        arrays = {}
        for member in zip_members(archive, path, size):
            with archive.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = _read_array(file, member.file_size)
        return arrays


def read_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file.

    Raises:
        UserError: where there is no such file, or it is not a plain ``.npy``.
    """
    size = file_size(path, "give an array written with numpy.save")
    with parsing(path, "cannot be read as an array", "write it with numpy.save"), path.open("rb") as file:
        return _read_array(file, size)


def _read_array(file: Any, size: int) -> np.ndarray:
    """The array of a ``.npy`` of this many bytes."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its format {version} holds no plain numbers")
    shape, fortran_order, dtype = readers[version](file, max_header_size=10_000)
    if dtype.kind not in "biufSU":
        raise ValueError(f"it holds {dtype}, expected plain numbers or text")
    needed, found = element_count(shape) * dtype.itemsize, size - file.tell()
    if (needed if 0 not in shape else 0) != found:
        raise ValueError(f"an array of shape {shape} has {needed} bytes, the file holds {found}")
    array = np.frombuffer(file.read(found), dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a ``.safetensors`` file.

    The format is 8 bytes with the length of the header, the header as JSON, and the bytes of all tensors without gaps.

    Raises:
        UserError: where there is no such file, or it is not a complete one.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": np.ones(2, np.float32)}, Path(folder) / "a.safetensors", {"format": "pt"})
        ...     read_safetensors(Path(folder) / "a.safetensors")
        ({'format': 'pt'}, {'a': array([1., 1.], dtype=float32)})
    """
    size = file_size(path, "give a .safetensors file")
    with (
        parsing(path, "not a complete safetensors file", "copy or save it again"),
        path.open("rb") as file,
    ):
        header = _safetensors_header(file, size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        require_names(list(header), path)
        arrays, start = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, end) = SAFETENSORS_TYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
            if dtype is None:
                raise ValueError(f"{name} holds {entry['dtype']}, expected one of {', '.join(SAFETENSORS_TYPES)}")
            needed = element_count(shape) * dtype.itemsize
            require_budget(needed, size, path)
            if begin != start or end - begin != (0 if 0 in shape else needed):
                raise ValueError(f"{name} of shape {shape} lies at {begin} to {end}")
            data = file.read(end - begin)
            if len(data) != end - begin:
                raise ValueError(f"it ends within {name}")
            arrays[name] = np.frombuffer(data, dtype).reshape(shape)
            start = end
        if file.read(1):
            raise ValueError("something follows its tensors")
        return metadata, arrays


def _safetensors_header(file: BinaryIO, size: int) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header holds no names")
    return header
