"""Configurations: frozen, validated on construction, and pytrees.

A configuration is equal and hashable by value. As a pytree its float fields and nested configurations are children,
so they are traced: compiled code takes another learning rate without compiling again, and `jax.vmap` over stacked
configurations is a sweep. Every other field is static and part of what a program is compiled for.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Example(Config):
    ...     rate: Positive = 0.5
    ...     steps: Count = 10
    >>> jax.tree.leaves(Example(rate=2)), jax.tree.map(lambda rate: rate / 4, Example(rate=2))
    ([2.0], Example(rate=0.5, steps=10))
    >>> Example(rate=-1.0)
    Traceback (most recent call last):
    ...
    backdoor_jax.errors.UserError: Example.rate is -1.0, expected a value greater than 0
"""

import dataclasses
import functools
import math
import typing
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from annotated_types import Ge, Gt, Le, Lt

from backdoor_jax.errors import UserError

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
"""A share in (0, 1]."""
Fraction = Annotated[float, Ge(0), Le(1)]
"""A share in [0, 1]."""
Count = Annotated[int, Ge(1), Le(10**9)]
Whole = Annotated[int, Ge(0), Le(10**9)]
"""A whole number from 0."""
MOST_CLASSES = 2**16
"""The largest public sets have 22,000."""
Classes = Annotated[int, Ge(2), Le(MOST_CLASSES)]
Width = Annotated[int, Ge(1), Le(2**12)]
"""A network's width; the published one is 64 everywhere."""
Seed = Annotated[int, Ge(0), Lt(2**32)]
LearningRate = Annotated[float, Gt(0), Le(100)]
"""A learning rate; the largest published one is 2.5."""
Decay = Annotated[float, Ge(0), Le(1)]
"""Weight decay."""
Momentum = Annotated[float, Ge(0), Lt(1)]


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and 10.0 are none.

    Example:
        >>> is_whole(np.int64(3)), is_whole(True), is_whole(10.0)
        (True, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, also one on the device; True is none.

    Example:
        >>> is_number(0.5), is_number(math.nan), is_number("1"), is_number(True)
        (True, False, False, False)
    """
    if isinstance(value, jax.Array | np.generic) and not value.shape and jnp.issubdtype(value.dtype, jnp.number):
        return bool(jnp.isrealobj(value) and np.isfinite(value))
    if isinstance(value, int):  # Also one that no float holds.
        return not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configurations; see the module.

    A subclass is a frozen dataclass whose fields have defaults and types that say what is allowed, such as `Positive`.
    They are checked on construction. Checks across fields go into ``__post_init__``, through `require`. A float field
    also takes an array, for sweeps inside compiled code; arrays are not checked.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, functools.partial(_unflatten, cls), _flatten)

    def __post_init__(self) -> None:
        """Checks every field against its type.

        Raises:
            UserError: for a field of the wrong type or out of range, naming it and what it should be.
        """
        for name, adapter in self._adapters().items():
            value = getattr(self, name)
            if isinstance(value, jax.Array):
                continue
            try:
                checked = adapter.validate_python(value.item() if isinstance(value, np.generic) else value, strict=True)
            except pydantic.ValidationError as errors:
                self.require(False, name, expected_of(errors))
            self.require(not isinstance(checked, float) or math.isfinite(checked), name, "a finite number")
            object.__setattr__(self, name, checked)

    def require(self, holds: bool, field: str, expected: str) -> None:
        """Raises a `UserError` naming the field where a condition does not hold."""
        if not holds:
            raise UserError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}, expected {expected}")

    @classmethod
    @functools.cache
    def _adapters(cls) -> dict[str, pydantic.TypeAdapter[Any]]:
        """The check of each field."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return {field.name: pydantic.TypeAdapter(hints[field.name]) for field in dataclasses.fields(cls)}

    @classmethod
    @functools.cache
    def _split(cls) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the traced fields and of the static ones."""
        hints = typing.get_type_hints(cls)

        def traced(name: str) -> bool:
            kind = hints[name]
            return kind is float or (isinstance(kind, type) and issubclass(kind, Config))

        names = [field.name for field in dataclasses.fields(cls)]
        return tuple(filter(traced, names)), tuple(name for name in names if not traced(name))


def expected_of(errors: pydantic.ValidationError) -> str:
    """What pydantic says a value should be, as the end of a sentence."""
    expected = errors.errors()[0]["msg"].removeprefix("Input should be ")
    return f"a value {expected}" if expected.startswith(("greater", "less")) else expected


def _flatten(config: Config) -> tuple[list[Any], tuple[Any, ...]]:
    traced, static = config._split()
    return [getattr(config, name) for name in traced], tuple(getattr(config, name) for name in static)


def _flatten_with_keys(config: Config) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    children, static = _flatten(config)
    keys = map(jax.tree_util.GetAttrKey, config._split()[0])
    return list(zip(keys, children, strict=True)), static


def _unflatten(cls: type[Config], static_values: tuple[Any, ...], children: Any) -> Config:
    """A configuration without its checks: JAX unflattens with tracers and with placeholders."""
    config = object.__new__(cls)
    traced, static = cls._split()
    for name, value in (*zip(traced, children, strict=True), *zip(static, static_values, strict=True)):
        object.__setattr__(config, name, value)
    return config
