"""New tensors."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from backdoor_jax.models.torch_module.operators.registry import Array, known_type, register


def _number_type(dtype: str | None, *values: Any) -> Any:
    """PyTorch's type for numbers that were given without one."""
    if dtype is not None:
        return known_type(dtype)
    return "float32" if any(isinstance(value, float) for value in values) else "int32"


@register("arange")
def _arange(end: float, start: float = 0, step: float = 1, dtype: str | None = None) -> Array:
    return jnp.arange(start, end, step, _number_type(dtype, start, end, step))


@register("linspace")
def _linspace(start: float, end: float, steps: int, dtype: str | None = None) -> Array:
    return jnp.linspace(start, end, steps, dtype=known_type(dtype or "float32"))


@register("zeros", "empty")
def _zeros(size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.zeros(tuple(size), known_type(dtype or "float32"))


@register("ones")
def _ones(size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.ones(tuple(size), known_type(dtype or "float32"))


@register("full")
def _full(size: Sequence[int], fill_value: Any, dtype: str | None = None) -> Array:
    return jnp.full(tuple(size), fill_value, _number_type(dtype, fill_value))


@register("scalar_tensor")
def _scalar_tensor(s: Any, dtype: str | None = None) -> Array:
    return jnp.asarray(s, known_type(dtype or "float32"))


@register("new_zeros", "new_empty")
def _new_zeros(self: Array, size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.zeros(tuple(size), known_type(dtype or self.dtype))


@register("new_ones")
def _new_ones(self: Array, size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.ones(tuple(size), known_type(dtype or self.dtype))


@register("new_full")
def _new_full(self: Array, size: Sequence[int], fill_value: Any, dtype: str | None = None) -> Array:
    return jnp.full(tuple(size), fill_value, known_type(dtype or self.dtype))


@register("zeros_like", layout="pointwise")
def _zeros_like(self: Array, dtype: str | None = None) -> Array:
    return jnp.zeros_like(self, dtype=known_type(dtype or self.dtype))


@register("ones_like", layout="pointwise")
def _ones_like(self: Array, dtype: str | None = None) -> Array:
    return jnp.ones_like(self, dtype=known_type(dtype or self.dtype))


@register("full_like", layout="pointwise")
def _full_like(self: Array, fill_value: Any, dtype: str | None = None) -> Array:
    return jnp.full_like(self, fill_value, dtype=known_type(dtype or self.dtype))


@register("fill", layout="pointwise")
def _fill(self: Array, value: Any) -> Array:
    return jnp.full_like(self, value)


@register("copy", layout="pointwise")
def _copy(self: Array, src: Array) -> Array:
    return jnp.broadcast_to(src, self.shape).astype(self.dtype)


@register("tril")
def _tril(self: Array, diagonal: int = 0) -> Array:
    return jnp.tril(self, diagonal)


@register("triu")
def _triu(self: Array, diagonal: int = 0) -> Array:
    return jnp.triu(self, diagonal)


@register("meshgrid")
def _meshgrid(tensors: Sequence[Array], indexing: str = "ij") -> tuple[Array, ...]:
    return tuple(jnp.meshgrid(*tensors, indexing=indexing))
