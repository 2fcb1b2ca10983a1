"""Reductions, and what runs along an axis."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from backdoor_jax.models.torch_module.operators.entrywise import convert
from backdoor_jax.models.torch_module.operators.registry import Array, Axes, register


def _reduced(
    function: Callable[..., Array], x: Array, dim: int | Sequence[int] | None, keepdim: bool, axes: Axes
) -> Array:
    """A reduction over some of PyTorch's axes, or all; without `keepdim` the rest is in PyTorch's order."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or range(x.ndim))
    out = function(x, axis=tuple(axes[d] for d in dims), keepdims=True)
    return out if keepdim else out.transpose(axes).squeeze(tuple(dims))


@register("mean", layout="axes")
def _mean(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: str | None = None
) -> Array:
    return _reduced(jnp.mean, convert(self, dtype), dim, keepdim, axes)


@register("sum", layout="axes")
def _sum(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: str | None = None
) -> Array:
    return _reduced(jnp.sum, convert(self, dtype), dim, keepdim, axes)


@register("amax", layout="axes")
def _amax(self: Array, axes: Axes, dim: Sequence[int] = (), keepdim: bool = False) -> Array:
    return _reduced(jnp.max, self, dim, keepdim, axes)


@register("amin", layout="axes")
def _amin(self: Array, axes: Axes, dim: Sequence[int] = (), keepdim: bool = False) -> Array:
    return _reduced(jnp.min, self, dim, keepdim, axes)


@register("max", layout="axes")
def _max(self: Array, axes: Axes) -> Array:
    return _reduced(jnp.max, self, None, False, axes)


@register("min", layout="axes")
def _min(self: Array, axes: Axes) -> Array:
    return _reduced(jnp.min, self, None, False, axes)


@register("max.dim", layout="axes")
def _max_dim(self: Array, dim: int, axes: Axes, keepdim: bool = False) -> tuple[Array, Array]:
    return _reduced(jnp.max, self, dim, keepdim, axes), _reduced(_along(jnp.argmax), self, dim, keepdim, axes)


@register("min.dim", layout="axes")
def _min_dim(self: Array, dim: int, axes: Axes, keepdim: bool = False) -> tuple[Array, Array]:
    return _reduced(jnp.min, self, dim, keepdim, axes), _reduced(_along(jnp.argmin), self, dim, keepdim, axes)


def _along(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of one axis, for `_reduced`."""
    return lambda x, axis, keepdims: function(x, axis[0], keepdims=keepdims)


@register("argmax")
def _argmax(self: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmax(self, dim, keepdims=keepdim)


@register("argmin")
def _argmin(self: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmin(self, dim, keepdims=keepdim)


@register("prod", layout="axes")
def _prod(self: Array, axes: Axes, dim: int | None = None, keepdim: bool = False, dtype: str | None = None) -> Array:
    return _reduced(jnp.prod, convert(self, dtype), dim, keepdim, axes)


@register("logsumexp", layout="axes")
def _logsumexp(self: Array, dim: Sequence[int], axes: Axes, keepdim: bool = False) -> Array:
    return _reduced(jax.nn.logsumexp, self, dim, keepdim, axes)


@register("var.correction", layout="axes")
def _var(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False
) -> Array:
    def variance(x: Array, axis: Sequence[int], keepdims: bool) -> Array:
        return jnp.var(x, tuple(axis), ddof=1 if correction is None else int(correction), keepdims=keepdims)

    return _reduced(variance, self, dim, keepdim, axes)


@register("var.dim", layout="axes")
def _var_dim(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, unbiased: bool = True, keepdim: bool = False
) -> Array:
    return _var(self, axes, dim, float(unbiased), keepdim)


@register("std.dim", layout="axes")
def _std_dim(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, unbiased: bool = True, keepdim: bool = False
) -> Array:
    return jnp.sqrt(_var_dim(self, axes, dim, unbiased, keepdim))


@register("std.correction", layout="axes")
def _std(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False
) -> Array:
    return jnp.sqrt(_var(self, axes, dim, correction, keepdim))


@register("var_mean.correction", layout="axes")
def _var_mean(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False
) -> tuple[Array, Array]:
    return _var(self, axes, dim, correction, keepdim), _mean(self, axes, dim, keepdim)


@register("linalg_vector_norm", layout="axes")
def _vector_norm(
    self: Array, axes: Axes, ord: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False
) -> Array:
    def norm(x: Array, axis: Sequence[int], keepdims: bool) -> Array:
        if ord == math.inf:
            return jnp.max(jnp.abs(x), axis, keepdims=keepdims)
        return jnp.sum(jnp.abs(x) ** ord, axis, keepdims=keepdims) ** (1 / ord)

    return _reduced(norm, self, dim, keepdim, axes)


@register("softmax", "_softmax", layout="axes")
def _softmax(self: Array, dim: int, axes: Axes, dtype: str | None = None) -> Array:
    return jax.nn.softmax(convert(self, dtype), axes[dim])


@register("log_softmax", layout="axes")
def _log_softmax(self: Array, dim: int, axes: Axes, dtype: str | None = None) -> Array:
    return jax.nn.log_softmax(convert(self, dtype), axes[dim])


@register("glu", layout="axes")
def _glu(self: Array, axes: Axes, dim: int = -1) -> Array:
    return jax.nn.glu(self, axes[dim])


@register("cumsum", layout="axes")
def _cumsum(self: Array, dim: int, axes: Axes) -> Array:
    return jnp.cumsum(self, axes[dim])
