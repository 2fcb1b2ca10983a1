"""Files of PyTorch weights, read as data.

A file is data here and never code. ``.safetensors`` files hold nothing else. A ``.pt`` file is read by PyTorch's
weights-only unpickler, which runs nothing; the few NumPy names that the benchmark's ``attack_result.pt`` needs besides
the weights are mapped to a stand-in that accepts anything and does nothing.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backdoor_jax.errors import UserError, first_line
from backdoor_jax.interop.file_kinds import kind_of

BOUNDS = "bounds"


def unwrap(tree: Any, where: str, key: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict in what was read, without a prefix that all names share, and the bounds stored with it.

    Args:
        tree: a state dict, or a mapping that holds one or more.
        where: what errors call it.
        key: which of several to take.

    Raises:
        UserError: where there is no state dict, several and no key, or none under the key.
    """
    bounds: dict[str, Any] = {}
    if isinstance(tree, Mapping) and (key is not None or not _is_state(tree)):
        known = {str(name): value for name, value in tree.items() if name != BOUNDS and _is_state(value)}
        if key is not None and key not in known:
            there = f"there are {', '.join(known)}" if known else "the file is one state dict, so leave the key out"
            raise UserError(f"{where}: holds no state dict {key!r}; {there}")
        if key is None and len(known) > 1:
            raise UserError(
                f"{where}: holds several models, {', '.join(known)}; choose one by key (--key {next(iter(known))})"
            )
        if known:
            bounds = dict(tree.get(BOUNDS) or {})
            tree = known[key] if key is not None else next(iter(known.values()))
    if not isinstance(tree, Mapping) or not all(isinstance(name, str) for name in tree):
        raise UserError(
            f"{where}: expected a state dict, or a dictionary that holds one, got {type(tree).__name__}; save "
            "model.state_dict()"
        )
    state = dict(tree)
    for name in [name for name in state if name.startswith(f"{BOUNDS}.")]:
        bounds[name.removeprefix(f"{BOUNDS}.")] = state.pop(name)
    prefix = shared_prefix(state)
    return {name.removeprefix(prefix): value for name, value in state.items()}, bounds


def _is_state(value: Any) -> bool:
    """Whether a value is a mapping of names to tensors, with at least one tensor of some axes."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    tensors = [each for each in value.values() if hasattr(each, "shape")]
    return len(tensors) == len(value) and any(len(each.shape) for each in tensors)


def shared_prefix(names: Iterable[str]) -> str:
    """The levels that all names share, as data-parallel training, compilation and wrappers add them.

    Example:
        >>> shared_prefix(["module.net.fc.weight", "module.net.conv.weight"]), shared_prefix(["a.weight", "b.bias"])
        ('module.net.', '')
    """
    levels = [name.split(".")[:-1] for name in names]
    shared = 0
    while levels and all(len(level) > shared and level[shared] == levels[0][shared] for level in levels):
        shared += 1
    return "".join(f"{level}." for level in levels[0][:shared]) if levels else ""


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
    if kind_of(path) != "safetensors":
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
