"""Parts of tensors, joins, and shapes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from backdoor_jax.models.torch_module.operators.registry import Array, Axes, register

# Parts and joins


@register("cat", layout="axes")
def _cat(tensors: Sequence[Array], axes: Axes, dim: int = 0) -> Array:
    return jnp.concatenate(tensors, axes[dim])


@register("stack")
def _stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack(tensors, dim)


def _range(n: int, start: int | None, end: int | None, step: int) -> slice:
    return slice(*slice(start, end, step).indices(n))


@register("slice", layout="axes")
def _slice(
    self: Array, axes: Axes, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    at = axes[dim]
    if start in (0, None) and end in (None, 2**63 - 1) and step == 1:
        return self  # Of any length, also of one that is a symbol (`jax.export`).
    found = _range(self.shape[at], start, end, step)
    return lax.slice_in_dim(self, found.start, max(found.start, found.stop), step, at)


@register("narrow", layout="axes")
def _narrow(self: Array, dim: int, start: int, length: int, axes: Axes) -> Array:
    return lax.slice_in_dim(self, start, start + length, axis=axes[dim])


@register("split.Tensor", layout="axes")
def _split(self: Array, split_size: int, axes: Axes, dim: int = 0) -> tuple[Array, ...]:
    n = self.shape[axes[dim]]
    return tuple(jnp.split(self, list(range(split_size, n, split_size)), axes[dim]))


@register("split_with_sizes", "split.sizes", layout="axes")
def _split_with_sizes(self: Array, split_sizes: Sequence[int], axes: Axes, dim: int = 0) -> tuple[Array, ...]:
    return tuple(jnp.split(self, np.cumsum(split_sizes)[:-1], axes[dim]))


@register("chunk", layout="axes")
def _chunk(self: Array, chunks: int, axes: Axes, dim: int = 0) -> tuple[Array, ...]:
    return _split(self, -(-self.shape[axes[dim]] // chunks), axes, dim)


@register("unbind")
def _unbind(self: Array, dim: int = 0) -> tuple[Array, ...]:
    return tuple(jnp.moveaxis(self, dim, 0))


@register("select")
def _select(self: Array, dim: int, index: int) -> Array:
    return lax.index_in_dim(self, index, dim, keepdims=False)


@register("flip", layout="axes")
def _flip(self: Array, dims: Sequence[int], axes: Axes) -> Array:
    return jnp.flip(self, tuple(axes[d] for d in dims))


@register("roll", layout="axes")
def _roll(self: Array, shifts: Sequence[int], axes: Axes, dims: Sequence[int] = ()) -> Array:
    return jnp.roll(self, tuple(shifts), tuple(axes[d] for d in dims))


@register("slice_scatter")
def _slice_scatter(
    self: Array, src: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    place = [slice(None)] * self.ndim
    place[dim] = _range(self.shape[dim], start, end, step)
    return self.at[tuple(place)].set(src.astype(self.dtype))


@register("select_scatter")
def _select_scatter(self: Array, src: Array, dim: int, index: int) -> Array:
    place: list[Any] = [slice(None)] * self.ndim
    place[dim] = index
    return self.at[tuple(place)].set(src)


@register("index")
def _index(self: Array, indices: Sequence[Array | None]) -> Array:
    return self[tuple(slice(None) if index is None else index for index in indices)]


@register("index_put")
def _index_put(self: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False) -> Array:
    place = self.at[tuple(slice(None) if index is None else index for index in indices)]
    return place.add(values) if accumulate else place.set(values)


@register("index_select")
def _index_select(self: Array, dim: int, index: Array) -> Array:
    return jnp.take(self, index, dim)


@register("gather")
def _gather(self: Array, dim: int, index: Array) -> Array:
    return jnp.take_along_axis(self, index, dim)


@register("embedding")
def _embedding(weight: Array, indices: Array, padding_idx: int = -1) -> Array:
    del padding_idx
    return weight[indices]


# Shapes


@register("view", "_unsafe_view", "reshape")
def _view(self: Array, size: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Array:
    return self.reshape(tuple(shape if size is None else size))  # type: ignore[arg-type]


@register("flatten")
def _flatten(self: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    first, last = start_dim % self.ndim, end_dim % self.ndim
    return self.reshape(*self.shape[:first], -1, *self.shape[last + 1 :])


@register("unflatten")
def _unflatten(self: Array, dim: int, sizes: Sequence[int]) -> Array:
    at = dim % self.ndim
    return self.reshape(*self.shape[:at], *sizes, *self.shape[at + 1 :])


@register("permute")
def _permute(self: Array, dims: Sequence[int]) -> Array:
    return self.transpose([d % self.ndim for d in dims])


@register("transpose")
def _transpose(self: Array, dim0: int, dim1: int) -> Array:
    return jnp.swapaxes(self, dim0, dim1)


@register("t", "numpy_T", "matrix_H", "mT")
def _t(self: Array) -> Array:
    return jnp.swapaxes(self, -1, -2) if self.ndim > 1 else self


@register("movedim")
def _movedim(self: Array, source: Sequence[int], destination: Sequence[int]) -> Array:
    return jnp.moveaxis(self, source, destination)


@register("unsqueeze")
def _unsqueeze(self: Array, dim: int) -> Array:
    return jnp.expand_dims(self, dim)


@register("squeeze")
def _squeeze(self: Array, dim: int | Sequence[int] | None = None) -> Array:
    dims = range(self.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return self.squeeze(tuple(d for d in dims if self.shape[d] == 1))


@register("expand")
def _expand(self: Array, size: Sequence[int], implicit: bool = False) -> Array:
    del implicit
    known = (1,) * (len(size) - self.ndim) + self.shape
    return jnp.broadcast_to(
        self, [n if isinstance(s, int) and s == -1 else s for s, n in zip(size, known, strict=True)]
    )


@register("repeat")
def _repeat(self: Array, repeats: Sequence[int]) -> Array:
    return jnp.tile(self, tuple(repeats))


@register("repeat_interleave.self_int")
def _repeat_interleave(self: Array, repeats: int, dim: int | None = None) -> Array:
    return jnp.repeat(self, repeats, dim)
