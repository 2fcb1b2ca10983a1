"""Frozen, validated configurations, and the split between what is compiled in and what is traced."""

import dataclasses
import typing
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from backdoor_jax.errors import UserError


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
