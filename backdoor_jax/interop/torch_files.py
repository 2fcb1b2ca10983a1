"""Files of PyTorch weights, read as data and without PyTorch.

A file is data here and never code. ``.safetensors`` files hold nothing else. A ``.pt`` file is a pickle and the bytes
of its tensors, in a zip file or, before PyTorch 1.6, one after another. `PlainUnpickler` reads it and calls nothing;
the names that stand for tensors are mapped to functions here, which make NumPy arrays. Whatever else the benchmark's
``attack_result.pt`` holds besides weights becomes an object that holds nothing.
"""

import io
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backdoor_jax.array_files import read_safetensors
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.interop.file_kinds import kind_of
from backdoor_jax.models.torch_module import EXTRA_STATE
from backdoor_jax.pickles import PickledArray, PickledCode, PlainUnpickler, Skipped
from backdoor_jax.reading import element_count, file_size, require_budget, require_names, zip_members

BOUNDS = "bounds"


def unwrap(tree: Any, where: str, key: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict in what was read, without a prefix that all names share, and the bounds stored with it.

    Args:
        tree: a state dict, or a mapping that holds one or more.
        where: what errors call it.
        key: which of several to take; or a level of names, such as ``encoder`` of ``encoder.fc.weight``, below which
            the model is.

    Raises:
        UserError: where there is no state dict, several and no key, or none under the key.
    """
    bounds: Any = {}
    level, there = "", "the file is one state dict, so leave the key out"
    if isinstance(tree, Mapping) and (key is not None or not _is_state(tree)):
        others = (BOUNDS, *(name for name in tree if str(name).endswith(EXTRA_STATE)))
        known = {str(name): value for name, value in tree.items() if name not in others and _is_state(value)}
        require_names(list(known), where)
        if key is not None and key not in known:
            level = f"{key}."
            there = f"there are {', '.join(known)}" if known else there
        if len(known) > 1 and (key is None or level):
            if level:
                raise UserError(f"{where}: holds no state dict {key!r}; {there}")
            raise UserError(
                f"{where}: holds several models, {', '.join(known)}; choose one by key (--key {next(iter(known))})"
            )
        if not known and not any(hasattr(value, "shape") for value in tree.values()):
            held = ", ".join(f"{name} ({_kind(value)})" for name, value in list(tree.items())[:3])
            raise UserError(
                f"{where}: holds no tensors by name{', but ' if held else ''}{held}; save model.state_dict()"
            )
        if known:
            bounds = tree.get(BOUNDS) or {}
            tree = known[key] if key in known else next(iter(known.values()))
    for part, kind in ((tree, "a state dict"), (bounds, "bounds by name")):
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise UserError(
                f"{where}: expected {kind}, or a dictionary that holds one, got {_kind(part)}; save model.state_dict()"
            )
    state, bounds = dict(tree), dict(bounds)
    require_names([*state, *bounds], where)
    for name in [name for name in state if name.startswith(f"{BOUNDS}.")]:
        bounds[name.removeprefix(f"{BOUNDS}.")] = state.pop(name)
    prefix = shared_prefix(state)
    state = _below(prefix, state)
    if level:
        state = _below(level.removeprefix(prefix), state)
        if not state:
            raise UserError(f"{where}: holds no state dict {key!r}; {there}")
        state = _below(shared_prefix(state), state)
    return state, bounds


def _below(level: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors below a level of names, without it."""
    return {name.removeprefix(level): value for name, value in state.items() if name.startswith(level)}


def _is_state(value: Any) -> bool:
    """Whether a value is a mapping of names to tensors, with at least one tensor of some axes, besides extra states."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    values = [each for name, each in value.items() if not name.endswith(EXTRA_STATE)]
    tensors = [each for each in values if hasattr(each, "shape")]
    return len(tensors) == len(values) and any(len(each.shape) for each in tensors)


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


def require_no_level(names: Iterable[str], state: Collection[str], model: str, where: str) -> None:
    """Refuses a state dict that has all of a model's names, but below one of its levels and beside others.

    Raises:
        UserError: with the key to choose them by.

    Example:
        >>> require_no_level(["fc.weight"], ["net.fc.weight", "loss.weight"], "resnet18", "model.pt")
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: model.pt: holds resnet18 under net, beside others; choose it by key (--key net)
    """
    ends = [f".{name}" for name in names]
    levels = [name.removesuffix(end) for name in state for end in ends[:1] if name.endswith(end)]
    levels = sorted(level for level in levels if all(f"{level}{end}" in state for end in ends))
    if levels:
        raise UserError(
            f"{where}: holds {model} under {' and '.join(levels)}, beside others; choose it by key (--key {levels[0]})"
        )


def as_array(value: Any, name: str, where: str) -> np.ndarray:
    """A tensor or array as a NumPy array, in float32 or float64.

    Raises:
        UserError: where it is no such tensor, or holds values that are not finite.
    """
    if hasattr(value, "detach"):
        try:
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
            value = value.numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:  # Sparse, quantized, without storage.
            raise UserError(
                f"{where}: {name} is no plain tensor ({first_line(error)}); save dense weights in floating point"
            ) from error
    if not hasattr(value, "shape"):
        raise UserError(f"{where}: {name} is a {_kind(value)}, expected a tensor; save model.state_dict()")
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{where}: {name} holds {array.dtype}, expected floating point; dequantize the model first")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32), copy=False)


def read(path: Path) -> Any:
    """What a ``.pt``, ``.pth`` or ``.safetensors`` file holds."""
    size = file_size(path, "give a state dict as .pt, .pth or .safetensors")
    if kind_of(path) == "safetensors":
        return read_safetensors(path)[1]
    try:
        return _read_zip(path, size) if zipfile.is_zipfile(path) else _read_legacy(path, size)
    except UserError:
        raise
    except PickledCode as error:
        if error.name in NO_PLAIN_TENSORS:
            raise UserError(
                f"{path}: holds tensors that are {NO_PLAIN_TENSORS[error.name]}; save model.state_dict() with dense "
                "weights in float32"
            ) from error
        raise UserError(
            f"{path}: holds more than weights, {error.name}, which was not run; if you trust it, load it and "
            "save model.state_dict() alone, or safetensors"
        ) from error
    except Exception as error:  # A damaged file raises many kinds.
        raise UserError(
            f"{path}: not a complete file of weights written by torch.save ({first_line(error)}); copy it, or save "
            "model.state_dict(), again"
        ) from error


def import_torch(path: Path) -> Any:
    """The module `torch`, or an error that names the file that needs it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: writing it needs PyTorch, which is not installed; run pip install 'backdoor_jax[torch]', or use "
            "a .safetensors file"
        ) from error
    return torch


STORAGES = {
    **{f"{name}Storage": np.dtype(kind) for name, kind in (("Double", "<f8"), ("Float", "<f4"), ("Half", "<f2"))},
    **{f"{name}Storage": np.dtype(kind) for name, kind in (("Long", "<i8"), ("Int", "<i4"), ("Short", "<i2"))},
    **{f"{name}Storage": np.dtype(kind) for name, kind in (("Char", "i1"), ("Byte", "u1"), ("Bool", "?"))},
    "BFloat16Storage": np.dtype(jnp.bfloat16),
}
"""The types of tensors, by the name of their storage."""


class _Storage:
    """The bytes of tensors, read when the first of them is made."""

    def __init__(self, dtype: np.dtype, load: Callable[[], bytes]) -> None:
        self.dtype, self._load = dtype, load
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        if self._values is None:
            self._values = np.frombuffer(self._load(), self.dtype)
        return self._values


class _Tensor:
    """A tensor in a pickle; its array is made once all storages are known."""

    def __init__(self, storage: object, offset: object, shape: Any, strides: Any, *more: Any) -> None:
        if not isinstance(storage, _Storage) or not isinstance(offset, int):
            raise pickle.UnpicklingError("a tensor has no storage")
        if any(more[2:]):  # After requires_grad and hooks: whether its elements are conjugate or negated.
            raise pickle.UnpicklingError("a tensor is a view with other values, resolve_conj() or resolve_neg() first")
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    @property
    def nbytes(self) -> int:
        return element_count(self.shape) * self.storage.dtype.itemsize

    def array(self) -> np.ndarray:
        """A copy of the tensor's elements."""
        values = self.storage.values
        if len(self.strides) != len(self.shape) or not all(type(step) is int and step >= 0 for step in self.strides):
            raise ValueError("a tensor has strides of another shape")
        if 0 in self.shape:
            return np.empty(self.shape, values.dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if not 0 <= self.offset <= last < len(values):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [step * values.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False).copy()


def _skipped(*_: object) -> Skipped:
    return Skipped()


def _of_new_type(storage: object, offset: object, shape: Any, strides: Any, *more: Any) -> None:
    """Refuses a tensor of a type that PyTorch had not before its files named types instead of storages."""
    found = more[2] if len(more) > 2 else None
    raise PickledCode(found.name if isinstance(found, _NewType) else "torch._utils._rebuild_tensor_v3")


def _first(value: object, *_: object) -> object:
    return value


def _ordered_dict(*_: object) -> dict[Any, Any]:
    return {}


class _StorageType:
    """Stands for a class of storages; it is never called."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype


NEW_TYPES = (
    *(f"float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")),
    *("float4_e2m1fn_x2", "uint16", "uint32", "uint64"),
)
"""The types of tensors that have no storage of their own."""


class _NewType:
    """Stands for one of these types; it is never called."""

    def __init__(self, name: str) -> None:
        self.name = name


NO_PLAIN_TENSORS = {
    **{name: name for name in NEW_TYPES},
    "torch._utils._rebuild_tensor_v3": "of a new type",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values (meta)",
    "torch._utils._rebuild_wrapper_subclass": "of a subclass",
    **{f"torch.{name}Storage": "complex" for name in ("ComplexFloat", "ComplexDouble")},
    **{f"torch.{name}Storage": "quantized" for name in ("QInt8", "QUInt8", "QInt32")},
}
"""What tensors are for which a file has one of these names."""

NAMES: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_tensor_v3": _of_new_type,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": _first,
    "torch.device": _skipped,
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.{name}": _NewType(name) for name in NEW_TYPES},
    "torch.storage.UntypedStorage": _StorageType(np.dtype("u1")),
}
"""What stands for the names in a file of weights."""


def _with_arrays(tree: Any, path: Path, size: int) -> Any:
    """What a pickle holds, with arrays for the tensors that `unwrap` may find."""
    if not isinstance(tree, dict):
        return tree
    inner = {name: level for name, level in tree.items() if isinstance(level, dict)}
    levels = (tree, *inner.values())
    tensors = [value for level in levels for value in level.values() if isinstance(value, _Tensor)]
    require_budget(sum(tensor.nbytes for tensor in tensors), size, path)

    def arrays(level: dict[Any, Any]) -> dict[Any, Any]:
        return {name: value.array() if isinstance(value, _Tensor) else value for name, value in level.items()}

    return arrays(tree) | {name: arrays(level) for name, level in inner.items()}


def _read_zip(path: Path, size: int) -> Any:
    """The contents of a file as PyTorch has written them since 1.6."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in zip_members(archive, path, size)}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
        storages: dict[str, _Storage] = {}

        def persistent(pid: Any) -> _Storage:
            _, kind, key, _, count = pid
            dtype = kind.dtype.newbyteorder("<" if order == b"little" else ">")
            if not isinstance(key, str) or members[f"{root}data/{key}"].file_size != count * dtype.itemsize:
                raise ValueError("a storage has another size")
            return storages.setdefault(key, _Storage(dtype, lambda: archive.read(f"{root}data/{key}")))

        tree = PlainUnpickler(archive.read(pickles[0]), NAMES, persistent).load()
        return _with_arrays(tree, path, size)


def _kind(value: object) -> str:
    """The usual name of what a file holds."""
    names = {PickledArray: "NumPy array", _Tensor: "tensor"}
    return names.get(type(value), type(value).__name__)


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What files of PyTorch before 1.6 begin with."""


def _read_legacy(path: Path, size: int) -> Any:
    """The contents of a file as PyTorch wrote them before 1.6: pickles, then the storages in the order of a list."""
    data = io.BytesIO(path.read_bytes())

    def unpickled() -> Any:
        return PlainUnpickler(data, NAMES, persistent).load()

    contents: dict[str, bytes] = {}
    storages: dict[str, tuple[_Storage, int]] = {}

    def persistent(pid: Any) -> _Storage:
        _, kind, key, _, count, view = pid
        if view is not None or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("a storage is a view of another")
        made = _Storage(kind.dtype.newbyteorder("<"), lambda: contents[key])
        return storages.setdefault(key, (made, count))[0]

    first = unpickled()
    if first != MAGIC and not isinstance(first, int):
        raise UserError(
            f"{path}: is a plain pickle, which holds a {_kind(first)}, and no file of torch.save; if you trust it, run "
            "torch.save(pickle.load(open(FILE, 'rb')), 'model.pt') on a state dict"
        )
    if first != MAGIC or unpickled() != PROTOCOL or not unpickled().get("little_endian", False):
        raise ValueError("it does not begin as one")
    tree, keys = unpickled(), unpickled()
    for key in keys:
        storage, count = storages[key]
        found = int.from_bytes(data.read(8), "little")
        contents[key] = data.read(count * storage.dtype.itemsize)
        if found != count or len(contents[key]) != count * storage.dtype.itemsize:
            raise ValueError("it ends within a storage")
    return _with_arrays(tree, path, size)
