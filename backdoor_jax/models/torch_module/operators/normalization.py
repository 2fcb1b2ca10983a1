"""Normalization, in evaluation and in training mode."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from backdoor_jax.models.torch_module.operators.registry import Array, Axes, register


def _by_channel(values: Array, rank: int, axes: Axes) -> Array:
    """Values ``(C,)`` in a shape that broadcasts along the channels."""
    return values.reshape([-1 if axis == axes[1] else 1 for axis in range(rank)])


def batch_norm(
    input: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axes: Axes,
) -> Array:
    """A tensor normalized with mean and variance ``(C,)`` of its channels, in float32 or more."""
    gain = lax.rsqrt(var + eps)
    gain = gain if weight is None else gain * weight
    shift = -mean * gain if bias is None else bias - mean * gain
    out = input * _by_channel(gain, input.ndim, axes) + _by_channel(shift, input.ndim, axes)
    return out.astype(input.dtype)


def batch_statistics(input: Array, axes: Axes, per_image: bool = False) -> tuple[Array, Array, int]:
    """Mean and biased variance ``(C,)`` over everything but channels, and the number of entries that each is of.

    With `per_image` they are the means over images of those of each image.
    """
    wide = input.astype(jnp.promote_types(input.dtype, jnp.float32))
    others = tuple(axis for axis in range(input.ndim) if axis != axes[1] and not (per_image and axis == axes[0]))
    mean, var = jnp.mean(wide, others), jnp.var(wide, others)
    if per_image:
        mean, var = jnp.mean(mean, 0), jnp.mean(var, 0)
    return mean, var, math.prod(input.shape[axis] for axis in others)


@register("_native_batch_norm_legit.no_stats", layout="axes")
def _batch_norm_without_statistics(
    input: Array,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    axes: Axes,
) -> tuple[Array]:
    del training, momentum
    mean, var, _ = batch_statistics(input, axes)
    weight, bias = (None if values is None else values.reshape(-1) for values in (weight, bias))
    return (batch_norm(input, mean, var, weight, bias, eps, axes),)


def _standardized(x: Array, axes: Axes, eps: float) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axes, keepdims=True)
    return ((wide - mean) * lax.rsqrt(jnp.var(wide, axes, keepdims=True) + eps)).astype(x.dtype)


@register("layer_norm")
def _layer_norm(
    input: Array,
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    out = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@register("_weight_norm")
def _weight_norm(v: Array, g: Array, dim: int = 0) -> Array:
    others = tuple(axis for axis in range(v.ndim) if axis != dim)  # All of them for -1.
    return v * (g / jnp.sqrt(jnp.sum(v**2, others, keepdims=True)))


@register("rms_norm")
def _rms_norm(
    input: Array, normalized_shape: Sequence[int], weight: Array | None = None, eps: float | None = None
) -> Array:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = float(jnp.finfo(input.dtype).eps) if eps is None else eps
    out = input * lax.rsqrt(jnp.mean(input**2, axes, keepdims=True) + eps)
    return out if weight is None else out * weight


@register("group_norm", layout="axes")
def _group_norm(
    input: Array,
    num_groups: int,
    axes: Axes,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    last = jnp.moveaxis(input, axes[1], -1)
    grouped = last.reshape(len(last), -1, num_groups, last.shape[-1] // num_groups)
    out = jnp.moveaxis(_standardized(grouped, (1, 3), eps).reshape(last.shape), -1, axes[1])
    out = out if weight is None else out * _by_channel(weight, out.ndim, axes)
    return out if bias is None else out + _by_channel(bias, out.ndim, axes)


@register("instance_norm", layout="axes")
def instance_norm(
    input: Array,
    axes: Axes,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Array:
    """A tensor whose channels are normalized in each image; with running statistics in use it is a node with state."""
    del running_mean, running_var, use_input_stats, momentum
    out = _standardized(input, axes[2:], eps)
    out = out if weight is None else out * _by_channel(weight, out.ndim, axes)
    return out if bias is None else out + _by_channel(bias, out.ndim, axes)
