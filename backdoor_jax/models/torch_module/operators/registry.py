"""PyTorch's operators in JAX, one small function for each.

A function has PyTorch's names for its arguments and PyTorch's defaults, so that a call in an exported graph is a call
of it by keyword. It is registered under the operator's name, such as ``conv2d``, or with the overload where overloads
differ, such as ``max.dim``. To add an operator, write its function and register it; see `Layout` for how it can take
its arrays.
"""

import dataclasses
import inspect
import operator as python
from collections.abc import Callable, Sequence
from typing import Any

import jax

from backdoor_jax.models.torch_module.layouts import Layout

Array = jax.Array
Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator.

    Attributes:
        function: what computes it.
        layout: how it takes its arrays.
        parameters: the names of its arguments.
    """

    function: Callable[..., Any]
    layout: Layout
    parameters: frozenset[str]


OPERATORS: dict[str, Operator] = {}
"""The operators by name."""


def register(*names: str, layout: Layout = "torch") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the operator of these names."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = frozenset(inspect.signature(function).parameters)
        OPERATORS.update(dict.fromkeys(names, Operator(function, layout, parameters)))
        return function

    return add


def find(name: str) -> Operator | None:
    """The operator of a name with its overload, such as ``add.Tensor``.

    Example:
        >>> find("add.Tensor") is OPERATORS["add"], find("max.dim") is OPERATORS["max.dim"]
        (True, True)
    """
    return OPERATORS.get(name) or OPERATORS.get(name.partition(".")[0])


def known_type(dtype: Any) -> Any:
    """A type, in 32 bits where JAX has no 64."""
    return jax.dtypes.canonicalize_dtype(dtype)


def pair(values: int | Sequence[int]) -> tuple[int, int]:
    """A value for each axis of a map; one value holds for both."""
    first, last = (values, values) if isinstance(values, int) else (values[0], values[-1])
    return first, last


for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem"):  # of the number of images
    OPERATORS[f"python.{name}"] = Operator(getattr(python, name), "torch", frozenset())
