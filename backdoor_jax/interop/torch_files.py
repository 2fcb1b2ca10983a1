"""Files of PyTorch weights, read as data.

A file is data here and never code. ``.safetensors`` files hold nothing else. A ``.pt`` file is read by PyTorch's
weights-only unpickler, which runs nothing; the few NumPy names that the benchmark's ``attack_result.pt`` needs besides
the weights are mapped to a stand-in that accepts anything and does nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backdoor_jax.errors import UserError, first_line

PREFIXES = ("module.", "_orig_mod.")
"""The prefixes that data-parallel training and compilation add to every name."""
HOLDERS = ("model", "state_dict")
"""The entries under which larger checkpoints have the weights."""
BOUNDS = "bounds"


def unwrap(tree: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict in what was read, without prefixes, and the bounds stored with it."""
    bounds: dict[str, Any] = {}
    for holder in HOLDERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(holder), Mapping):
            bounds = dict(tree.get(BOUNDS) or {})
            tree = tree[holder]
            break
    if not isinstance(tree, Mapping) or not all(isinstance(name, str) for name in tree):
        raise UserError(
            f"{where}: expected a state dict, or one under {' or '.join(HOLDERS)}, got {type(tree).__name__}; "
            "save model.state_dict()"
        )
    state = dict(tree)
    while state and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    for name in [name for name in state if name.startswith(f"{BOUNDS}.")]:
        bounds[name.removeprefix(f"{BOUNDS}.")] = state.pop(name)
    return state, bounds


def as_array(value: Any, name: str, where: str) -> np.ndarray:
    """A tensor or array as a NumPy array, in float32 or float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    if not hasattr(value, "shape"):
        raise UserError(f"{where}: {name} is a {type(value).__name__}, expected a tensor; save model.state_dict()")
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{where}: {name} holds {array.dtype}, expected floating point; dequantize the model first")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32), copy=False)


def read(path: Path) -> Any:
    """What a ``.pt``, ``.pth`` or ``.safetensors`` file holds."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a state dict as .pt, .pth or .safetensors")
    if path.suffix != ".safetensors":
        return _read_pickle(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a complete safetensors file ({first_line(error)}); save or copy it again"
        ) from error


def import_torch(path: Path) -> Any:
    """The module `torch`, or an error that names the file that needs it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: this needs PyTorch, which is not installed; run pip install 'backdoor_jax[torch]', or use a "
            ".safetensors file"
        ) from error
    return torch


class Ignored:
    """Stands in for NumPy's objects in a checkpoint: accepts anything, holds nothing, does nothing."""

    def __new__(cls, *args: Any) -> "Ignored":
        """Makes an object from any arguments."""
        del args
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        del state


NUMPY_NAMES = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)
"""What pickled NumPy arrays and scalars are made of: the only names allowed, and only as `Ignored`."""


def _read_pickle(path: Path) -> Any:
    torch = import_torch(path)
    try:
        with torch.serialization.safe_globals([(Ignored, name) for name in NUMPY_NAMES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds for a damaged file.
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds more than weights, {code.group(1)}, which was not run; if you trust it, load it and "
                "save model.state_dict() alone, or safetensors"
            ) from error
        # PyTorch's own advice, to load it with weights_only=False, is not passed on.
        reason = "no plain tensors" if "Weights only" in str(error) else first_line(error).partition(". ")[0]
        raise UserError(
            f"{path}: not a complete file of weights written by torch.save ({reason}); copy it, or save "
            "model.state_dict(), again"
        ) from error
