"""What a model file is, by its content: people name the same file ``.pt``, ``.pth.tar``, ``.bin`` or ``.ckpt``."""

import zipfile
from pathlib import Path
from typing import Literal

from backdoor_jax.errors import UserError, printable
from backdoor_jax.reading import file_size, parsing

Kind = Literal["torch", "safetensors", "msgpack"]

FOREIGN = {
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", "convert the Keras model to PyTorch or Flax"),
    b"\x08": ("perhaps an ONNX file", "save the state dict of the PyTorch model instead"),
    b"\x1f\x8b": ("compressed with gzip", "decompress it"),
    b"\x93NUMPY": ("a NumPy array", "give a model as --checkpoint and images as --data"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself with git lfs pull"),
    b"{": ("a JSON file, perhaps the index of several files of weights", "give the weights, all of them in one file"),
    b"<": ("a page of HTML or XML", "download the file itself"),
}
"""Other files that people take for models, by their first bytes, and what to do."""


def kind_of(path: Path) -> Kind:
    """What kind of model file a file is.

    Raises:
        UserError: for anything else, naming what it is where that is known, and what to run.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": np.ones(2)}, Path(folder) / "model.bin")
        ...     kind_of(Path(folder) / "model.bin")
        'safetensors'
    """
    if not file_size(path, "give a model file"):
        complete = "safetensors file" if path.suffix == ".safetensors" else "file of weights"
        raise UserError(f"{path}: not a complete {complete}, it is empty; copy it again")
    with parsing(path, "cannot be read", "give a model file"), path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK"):
        return _kind_of_archive(path)
    if len(start) > 8 and start[8:9] == b"{":
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"  # A pickle, as torch.save wrote them before PyTorch 1.6.
    for signature, (what, fix) in FOREIGN.items():
        if start.startswith(signature):
            raise UserError(f"{path}: is {what}, not a model's weights; {fix}")
    if start and (start[0] & 0xF0 == 0x80 or start[0] in (0xDE, 0xDF)):
        return "msgpack"
    # Whatever else it is, the reader of its suffix says what is wrong with it.
    return "safetensors" if path.suffix == ".safetensors" else "torch"


def _kind_of_archive(path: Path) -> Kind:
    """The kind of a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except Exception:  # A damaged archive raises many kinds; the reader says what is wrong.
        return "torch"
    if "constants.pkl" in names:
        raise UserError(
            f"{path}: is TorchScript, which contains code and was not run; if you trust it, run "
            "torch.save(torch.jit.load(FILE).state_dict(), 'model.pt')"
        )
    if any(name.endswith(".npy") for name in names):
        raise UserError(f"{path}: is a .npz with arrays, not a model; give it as --data")
    if "archive_format" in names:
        raise UserError(
            f"{path}: is an exported program of torch.export, which was not run; run "
            "torch.save(torch.export.load(FILE).state_dict, 'model.pt')"
        )
    if "data.pkl" not in names:
        held = ", ".join(printable(name, 40) for name in names[:3]) or "nothing"
        raise UserError(f"{path}: is a zip archive of {held}, and no model; unpack it and give the model in it")
    return "torch"
