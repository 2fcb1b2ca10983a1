"""Frozen, validated configurations, and the split between what is compiled in and what is traced."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import jax.numpy as jnp

from backdoor_jax.errors import UserError

Kind = TypeVar("Kind", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configurations: frozen, hashable, equal by value, and never a pytree.

    A subclass declares typed fields with defaults and checks them in ``__post_init__`` through `require`. Fields of
    type float are what one would sweep: `numbers` hands them to compiled code as traced arrays.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Checks the fields that take one of a few names."""
        for field in dataclasses.fields(self):
            kinds = [kind for kind in (field.type, *typing.get_args(field.type)) if typing.get_origin(kind) is Literal]
            names = [name for kind in kinds for name in typing.get_args(kind)]
            value = getattr(self, field.name)
            if names and (isinstance(value, str) or field.type in kinds):
                self.require(value in names, field.name, f"one of {', '.join(map(repr, names))}")

    def require(self, holds: bool, field: str, expected: str) -> None:
        """Raises a `UserError` naming the field where a condition does not hold."""
        if not holds:
            raise UserError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}, expected {expected}")


def from_preset(
    kind: type[Kind], method: str, presets: Mapping[str, Mapping[str, Any]], name: str, changes: Mapping[str, Any]
) -> Kind:
    """A configuration with the settings of a preset, and changes to them.

    Raises:
        UserError: for an unknown name, naming the method and the presets that it has.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Example(Config):
        ...     rate: float = 0.5
        ...     steps: int = 10
        >>> from_preset(Example, "example", {"fast": {"rate": 2.0}}, "fast", {"steps": 3})
        Example(rate=2.0, steps=3)
    """
    if name not in presets:
        raise UserError(f"unknown {method} preset {name!r}; known are {', '.join(presets)}")
    return kind(**{**presets[name], **changes})


def numbers(config: Config) -> dict[str, Any]:
    """The float fields of a configuration as traced scalars, weakly typed: they take the precision of what they meet.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Example(Config):
        ...     rate: float = 0.5
        ...     steps: int = 10
        >>> numbers(Example())
        {'rate': Array(0.5, dtype=float32, weak_type=True)}
    """
    return {
        field.name: jnp.asarray(float(getattr(config, field.name)))
        for field in dataclasses.fields(config)
        if field.type is float
    }
