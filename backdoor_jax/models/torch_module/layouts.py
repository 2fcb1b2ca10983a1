"""Where a tensor's axes lie in memory: as PyTorch numbers them, or with the channels of a map last.

PyTorch's maps are ``(B, C, H, W)``, while convolutions on a CPU are fast on ``(B, H, W, C)``. A map that a convolution
made is therefore kept as `ChannelsLast` until an operator needs PyTorch's own order.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Layout = Literal["torch", "pointwise", "maps", "axes"]
"""How an operator takes its arrays.

- ``torch``: as PyTorch numbers the axes.
- ``pointwise``: in either order, the same for all of them; the result has it too.
- ``maps``: the first array, if it has rank 4, with channels last; the result has them last too.
- ``axes``: in either order, with the place of each of PyTorch's axes as the argument ``axes``.
"""

FROM_TORCH = (0, 2, 3, 1)
"""The transposition from ``(B, C, H, W)`` to ``(B, H, W, C)``."""
TO_TORCH = (0, 3, 1, 2)
"""The transposition back, which is also the place of each of PyTorch's axes in ``(B, H, W, C)``."""


class ChannelsLast(NamedTuple):
    """A tensor of rank 4, ``(B, C, H, W)`` in PyTorch, as an array ``(B, H, W, C)``."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in PyTorch."""
        return tuple(self.array.shape[axis] for axis in TO_TORCH)


def to_torch(value: Any) -> Any:
    """The array in PyTorch's order of axes; anything else as it is.

    Example:
        >>> to_torch(ChannelsLast(jax.numpy.zeros((1, 4, 4, 2)))).shape
        (1, 2, 4, 4)
    """
    return value.array.transpose(TO_TORCH) if isinstance(value, ChannelsLast) else value


def to_channels_last(value: Any) -> Any:
    """The array with channels last: of rank 4 transposed, of lower rank as it is to be broadcast against such a one."""
    if isinstance(value, ChannelsLast):
        return value.array
    rank = getattr(value, "ndim", 0)
    if rank == 0 or rank > 4:
        return value
    return value.reshape((1,) * (4 - rank) + value.shape).transpose(FROM_TORCH)


def call(function: Callable[..., Any], layout: Layout, arguments: dict[str, Any]) -> Any:
    """Calls an operator's function with its arrays in the order of axes that it takes.

    Args:
        function: the function.
        layout: how it takes arrays.
        arguments: by name; arrays, `ChannelsLast`, sequences of them, and plain values.

    Returns:
        Its result, or results, `ChannelsLast` where their channels are last.

    Example:
        >>> x = ChannelsLast(jax.numpy.zeros((1, 4, 4, 2)))
        >>> call(lambda self, dim, axes: self.sum(axes[dim], keepdims=True), "axes", {"self": x, "dim": 1}).shape
        (1, 1, 4, 4)
    """
    if layout == "maps":
        first = next(name for name, value in arguments.items() if _rank(value) >= 0)
        if _rank(arguments[first]) != 4:
            return function(**_each(to_torch, arguments))
        others = _each(to_torch, {name: value for name, value in arguments.items() if name != first})
        return _wrapped(function(**{first: to_channels_last(arguments[first])}, **others))
    last = layout != "torch" and any(isinstance(value, ChannelsLast) for value in _flat(arguments.values()))
    arguments = _each(to_channels_last if last else to_torch, arguments)
    if layout == "axes":
        arguments["axes"] = TO_TORCH if last else tuple(range(max(_rank(value) for value in _flat(arguments.values()))))
    result = function(**arguments)
    return _wrapped(result) if last else result


def _rank(value: Any) -> int:
    """A tensor's rank, -1 for anything else."""
    return 4 if isinstance(value, ChannelsLast) else getattr(value, "ndim", -1)


def _flat(values: Any) -> list[Any]:
    """Values, with those inside sequences of tensors."""
    found = []
    for value in values:
        found += list(value) if isinstance(value, tuple) and not isinstance(value, ChannelsLast) else [value]
    return found


def _each(convert: Callable[[Any], Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(map(convert, value))
        if isinstance(value, tuple) and not isinstance(value, ChannelsLast)
        else convert(value)
        for name, value in arguments.items()
    }


def _wrapped(result: Any) -> Any:
    if isinstance(result, tuple | list):
        return tuple(map(_wrapped, result))
    return ChannelsLast(result) if getattr(result, "ndim", 0) == 4 else result
