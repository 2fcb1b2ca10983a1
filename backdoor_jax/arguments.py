"""The door for arguments that need no network: what public functions check by the names and types of their parameters.

    @typed
    def clean_indices(key: jax.Array, labels: np.ndarray, ratio: Share, num_classes: Classes) -> np.ndarray: ...

Names mean the same everywhere in the package: ``key`` is a random key, ``path`` and ``source`` are paths, and the names
in `ARRAYS` are arrays of one kind, where ``labels`` and ``predictions`` are classes of the ``num_classes`` or the
``label_map`` that are given with them. Every other parameter is checked against its type, where that is a number, text,
a choice, a class or a function. `backdoor_jax.validation.checked` adds classifiers, variables and data sets. Functions
that run inside compiled code, such as losses, are not decorated; those that run inside and outside it, such as
augmentations, check nothing inside.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from backdoor_jax.compiling import standard_rules
from backdoor_jax.config import expected_of, is_number, is_whole
from backdoor_jax.errors import NonFiniteError, UserError, printable
from backdoor_jax.reading import as_path

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

ARRAYS: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("labels", "predictions"), ("class", 1)),
    "candidates": ("whole", 1),
    **dict.fromkeys(("margins", "scores", "change", "members", "others"), ("finite", 1)),
    "values": ("real", 1),
    **dict.fromkeys(("latent", "latents"), ("finite", 2)),
    "angles": ("finite", 1),
    "images": ("uint8", 4),
}
"""Names of arrays: what they hold, and their number of axes; class numbers are from 0, real ones may be infinite."""
AXES = {1: "(N,)", 2: "(N, D)", 4: "(N, height, width, channels)"}


def typed(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which checks its arguments first and computes under JAX's standard rules.

    Raises:
        UserError: for an argument that cannot be used, naming the function, the argument and what was expected.
        NonFiniteError: for numbers that are not finite.

    Example:
        >>> @typed
        ... def half(count: int):
        ...     return count // 2
        >>> half(True)
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: half: count is True, expected a whole number
    """
    return door(function, _check)


def typed_outside(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which checks its arguments as `typed` does, but nothing inside compiled code.

    Example:
        >>> @typed_outside
        ... def mirror(images: jax.Array) -> jax.Array:
        ...     return images[:, :, ::-1]
        >>> mirror(3)
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: mirror: images are a int, expected an array of uint8 (N, height, width, channels)
    """
    checked = typed(function)

    @functools.wraps(function)
    def checked_outside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        inside = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        return (function if inside else checked)(*args, **kwargs)

    return checked_outside


def _check(function: str, given: Mapping[str, Any], signature: inspect.Signature) -> None:
    for name, value in given.items():
        if name in signature.parameters:
            require_typed(name, value, signature.parameters[name], f"{function}: {name}")
    number = given.get("num_classes", getattr(given.get("label_map"), "num_classes", None))
    for name in ("labels", "predictions"):
        if number is not None and isinstance(given.get(name), np.ndarray | jax.Array):
            largest = int(given[name].max())
            if largest >= number:
                raise UserError(f"{function}: {name} run to {largest}, expected 0 to {number - 1}; relabel them")


def door(
    function: Callable[Arguments, Result], check: Callable[[str, Mapping[str, Any], inspect.Signature], None]
) -> Callable[Arguments, Result]:
    """The function behind a check of its name, its arguments and its signature."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        name = str(getattr(bound.arguments.get("self"), "name", function.__name__))
        if "variables" in bound.arguments:
            bound.arguments["variables"] = as_dictionaries(bound.arguments["variables"])
        with standard_rules():
            given = dict(bound.arguments)
            _require_usable(name, given)
            check(name, given, signature)
            return function(*bound.args, **bound.kwargs)

    return checked


def as_dictionaries(tree: Any) -> Any:
    """A tree whose mappings are dictionaries, where some are not, such as Flax's `FrozenDict`.

    Example:
        >>> from flax.core import freeze
        >>> type(as_dictionaries({"params": freeze({"kernel": 1})})["params"]).__name__
        'dict'
    """
    if not isinstance(tree, Mapping):
        return tree
    inner = {name: as_dictionaries(value) for name, value in tree.items()}
    same = type(tree) is dict and all(inner[name] is value for name, value in tree.items())
    return tree if same else inner


def _require_usable(function: str, given: Mapping[str, Any]) -> None:
    """Refuses arrays inside compiled code, and those whose memory a compiled program has taken over."""
    for name, value in given.items():
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.core.Tracer):
                raise UserError(f"{function} runs compiled programs itself; call it outside jit, vmap and grad")
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise UserError(
                    f"{function}: {name} holds an array that was deleted, such as one donated to a compiled program; "
                    "make it again, or donate a copy"
                )


def require_typed(name: str, value: Any, parameter: inspect.Parameter, where: str) -> None:
    """Refuses what a parameter of this name and type does not take.

    Raises:
        UserError: for another value.
        NonFiniteError: for numbers that are not finite.
    """
    kind, default = parameter.annotation, parameter.default
    if value is default or (type(value) is type(default) is float and math.isnan(value) and math.isnan(default)):
        return  # None, or NaN where it stands for what is not known.
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        for each in value:
            require_typed(name, each, parameter.replace(kind=inspect.Parameter.POSITIONAL_ONLY), where)
    elif name == "key" and kind is jax.Array:
        require_key(value, where)
    elif name in ("path", "source") and kind in (str, Path, Path | str):
        as_path(value, where)
    elif name in ARRAYS and {kind, *typing.get_args(kind)} & {np.ndarray, jax.Array}:
        require_array(value, *ARRAYS[name], where)
    elif kind is not inspect.Parameter.empty:
        require_plain(value, kind, where)


def require_plain(value: object, kind: Any, where: str) -> None:
    """Refuses what is not of a plain type: a number, text, a choice, tuples of these, an instance or a function.

    Args:
        value: what was given.
        kind: the type in the signature; others than these are not checked.
        where: what errors call it.

    Raises:
        UserError: for another value; True is no number.

    Example:
        >>> require_plain("1", float, "scan: margin")
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: scan: margin is '1', expected a finite number
    """
    holds, expected = _judge(value, kind)
    if not holds:
        shown = repr(value) if isinstance(value, str | int | float | tuple | list | None) else f"a {kind_of(value)}"
        raise UserError(f"{where} is {printable(shown, 100)}, expected {expected}")


def _judge(value: Any, kind: Any) -> tuple[bool, str]:
    """Whether a value is of a type, and what that is in words."""
    if isinstance(value, np.generic):
        value = value.item()
    if kind is float:
        return is_number(value), "a finite number"
    if kind is int:
        return is_whole(value), "a whole number"
    if kind == tuple[int, int, int]:
        sides = isinstance(value, Sequence) and len(value) == 3 and all(is_whole(side) and side > 0 for side in value)
        return sides, "height, width, channels"
    if _is_plain(kind):
        if is_number(value) and isinstance(value, jax.Array):
            value = value.item()
        try:
            _adapter(kind).validate_python(value, strict=True)
        except pydantic.ValidationError as errors:
            return False, expected_of(errors)
        return not isinstance(value, float) or np.isfinite(value).item(), "a finite number"
    if typing.get_origin(kind) in (typing.Union, UnionType):
        found = [_judge(value, each) for each in typing.get_args(kind)]
        return any(holds for holds, _ in found), " or ".join(dict.fromkeys(expected for _, expected in found))
    if typing.get_origin(kind) is Callable or getattr(kind, "_is_protocol", False):
        return callable(value), "a function"
    if kind is NoneType:
        return value is None, "None"
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, Mapping), "a mapping"
    if typing.get_origin(kind) is Sequence and typing.get_args(kind) == (float,):
        flat = isinstance(value, Sequence) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 1)
        return flat and all(map(is_number, value)), "a sequence of finite numbers"
    if typing.get_origin(kind) is Sequence:
        return isinstance(value, Sequence | np.ndarray | jax.Array) and not isinstance(value, str), "a sequence"
    if isinstance(kind, type) and typing.get_origin(kind) is None and kind not in (jax.Array, np.ndarray, object, Any):
        return isinstance(value, kind), f"a {kind.__name__}"
    return True, "anything"


def _is_plain(kind: Any) -> bool:
    """Whether a type is one of numbers, text and choices, or of tuples of these."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return True
    if origin is typing.Annotated:
        return _is_plain(inner[0])
    if origin in (typing.Union, UnionType, tuple):
        return all(_is_plain(each) for each in inner)
    return kind in (int, float, bool, str, NoneType, ...)


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def kind_of(value: object) -> str:
    """The name of a value's type."""
    return type(value).__name__


def require_array(value: object, holding: str, axes: int, where: str) -> None:
    """Refuses anything but an array of class, whole, finite, real or uint8 numbers with this many axes.

    Raises:
        UserError: for another value, and for an empty array, but of whole numbers.
        NonFiniteError: for numbers that are not finite.

    Example:
        >>> require_array([0.5], "whole", 1, "success_rates: labels")
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: success_rates: labels are a list, expected an array of whole numbers (N,)
    """
    numbers = f"{holding}{'' if holding == 'uint8' else ' numbers'} {AXES[axes]}"
    if not isinstance(value, np.ndarray | jax.Array):
        raise UserError(f"{where} are a {kind_of(value)}, expected an array of {numbers}")
    kinds: tuple[Any, ...] = (jnp.integer, jnp.floating)
    if holding in ("class", "whole", "uint8"):
        kinds = (jnp.uint8 if holding == "uint8" else jnp.integer,)
    if value.ndim != axes or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise UserError(f"{where} are {value.dtype} {value.shape}, expected an array of {numbers}")
    if not value.size and holding != "whole":
        raise UserError(f"{where} are empty {value.shape}, expected an array of {numbers}")
    if holding == "uint8":
        return
    numeric = np.asarray(value, np.float64)
    if holding == "class" and numeric.min() < 0:
        raise UserError(f"{where} run from {numeric.min():g}, expected an array of {numbers} from 0")
    if np.isnan(numeric).any() or (holding == "finite" and np.isinf(numeric).any()):
        raise NonFiniteError(f"{where} are not finite, expected an array of {numbers}")


def require_key(key: object, where: str) -> None:
    """Refuses anything but a single random key.

    Raises:
        UserError: for another value.
    """
    if key_shape(key) != ():
        raise UserError(f"{where} is a {kind_of(key)}, expected a single key; give jax.random.key(0)")


def require_keys(keys: object, where: str) -> None:
    """Refuses anything but random keys along one axis, or in a sequence.

    Raises:
        UserError: for another value.
    """
    shapes = [key_shape(key) for key in keys] if isinstance(keys, Sequence) else [(key_shape(keys) or (0, 0))[1:]]
    if not shapes or any(shape != () for shape in shapes):
        raise UserError(
            f"{where} are a {kind_of(keys)}, expected one key for each run; give jax.random.split(key, runs)"
        )


def key_shape(key: object) -> tuple[int, ...] | None:
    """The shape of an array of random keys; None for anything else."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape
    return key.shape[:-1] if isinstance(key, jax.Array) and key.dtype == np.uint32 and key.shape[-1:] == (2,) else None
