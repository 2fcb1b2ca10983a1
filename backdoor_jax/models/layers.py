"""The networks' layers, with PyTorch's numerics, so that published settings mean the same thing here."""

from collections.abc import Callable
from functools import reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from backdoor_jax.compiling import one_program
from backdoor_jax.models.conv import conv_general_dilated
from backdoor_jax.models.rectifier import relu

torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for convolutions and linear layers: uniform on +-1/sqrt(fan-in)."""


def torch_bias(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for a bias: uniform on +-1/sqrt(fan-in of the layer)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / jnp.sqrt(fan_in)

    return init


kaiming_fan_out = nn.initializers.variance_scaling(2, "fan_out", "normal")
"""torchvision's default for the convolutions of its ResNets and VGGs: normal with variance 2/fan-out."""


def conv(
    features: int,
    size: int,
    stride: int = 1,
    name: str | None = None,
    *,
    use_bias: bool = False,
    kernel_init: Callable[..., jax.Array] = torch_uniform,
) -> nn.Conv:
    """A square convolution, padded to keep the size at stride 1; a bias starts at zero."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(size // 2, size // 2)] * 2,
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalization as PyTorch computes it.

    In training mode images are normalized with the batch's biased variance, while the running average uses the
    unbiased one: ``running = (1 - momentum) running + momentum batch``. Flax's own layer keeps the biased variance and
    computes it as a difference of squares.

    Computed in float32 or more; the result has the type of ``x``.

    Shapes: ``(..., C) -> (..., C)``; parameters ``scale``, ``bias`` and statistics ``mean``, ``var`` are ``(C,)``.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized ``x``, with the batch's statistics when training."""
        channels, dtype = x.shape[-1], x.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            batch_mean, batch_var = jnp.mean(x, axes), jnp.var(x, axes)
            if not self.is_initializing():
                n = x.size // channels
                mean.value += self.momentum * (batch_mean - mean.value)
                var.value += self.momentum * (batch_var * (n / max(n - 1, 1)) - var.value)
        else:
            batch_mean, batch_var = mean.value, var.value
        return _apply_norm(x, batch_mean, batch_var, scale, bias, self.epsilon).astype(dtype)


@one_program
def _apply_norm(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    gain = scale * lax.rsqrt(var + epsilon)
    return x * gain + (bias - mean * gain)


def _bounded(layer: nn.Module, x: jax.Array) -> jax.Array:
    """The activations ``x`` of a layer, clipped where the model has a bound for it.

    The bound is in the collection ``bounds`` under the layer's own path, shape ``(C,)``, and is read only where
    present: the same ``apply`` serves clipped and plain models. Where the collection ``activations`` is mutable, each
    channel's largest value over the batch, or 0 if that is larger, is written there.
    """
    if layer.has_variable("bounds", "upper"):
        upper: jax.Array = layer.get_variable("bounds", "upper").astype(x.dtype)
        x = jnp.where(x >= upper, upper, x)  # Not `jnp.minimum`, for the reason given in `max_pool`.
    if layer.is_mutable_collection("activations"):
        largest = jnp.max(x, axis=tuple(range(x.ndim - 1)))
        layer.sow("activations", "upper", largest, reduce_fn=jnp.maximum, init_fn=lambda: jnp.zeros(x.shape[-1]))
    return x


class ReLU(nn.Module):
    """A rectifier that applies an upper bound per channel where the model has one; see `_bounded`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Rectified ``x``, clipped where there is a bound."""
        return _bounded(self, relu(x))


class GELU(nn.Module):
    """The Gaussian error linear unit, exact as in PyTorch, with the same upper bounds as `ReLU`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` times the normal distribution's mass below it, clipped where there is a bound."""
        return _bounded(self, nn.gelu(x, approximate=False))


def max_pool(x: jax.Array, size: int, padding: int = 0) -> jax.Array:
    """The largest value of every square window of images ``(B, H, W, C)``, at stride 2.

    Written as choices between strided slices, whose gradient on CPU is 3 times faster than that of XLA's windows. Where
    values are equal one of them gets the gradient, as in PyTorch. Not `jnp.maximum`, whose gradient compares the result
    with the inputs: where a compiler computes one of them again and rounds it differently, the gradient is lost.

    Example:
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]
    """
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        last = x.shape[axis] - size + 1
        x = reduce(_larger, [lax.slice_in_dim(x, at, last + at, 2, axis) for at in range(size)])
    return x


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    """The larger of two values, NaN if either is; the full gradient goes to the one that was chosen."""
    return jnp.where((y > x) | jnp.isnan(y), y, x)


def adaptive_windows(n: int, out: int) -> np.ndarray:
    """Which of ``n`` entries each window of PyTorch's adaptive pooling covers, ``(out, n)``.

    Window i is ``[floor(i n / out), ceil((i + 1) n / out))``.

    Example:
        >>> adaptive_windows(3, 2).astype(int).tolist()
        [[1, 1, 0], [0, 1, 1]]
    """
    at, window = np.arange(n), np.arange(out)[:, None]
    return (at >= window * n // out) & (at < -(-(window + 1) * n // out))


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """PyTorch's adaptive average pooling of images ``(B, H, W, C)`` to ``(B, size, size, C)``.

    Each output is the mean over its window (see `adaptive_windows`), so that a map smaller than the output is repeated.

    Example:
        >>> adaptive_avg_pool(jnp.arange(3.0).reshape(1, 1, 3, 1), 2)[0, :, :, 0].tolist()
        [[0.5, 1.5], [0.5, 1.5]]
    """

    def means(n: int) -> jax.Array:
        inside = adaptive_windows(n, size)
        return jnp.asarray(inside / inside.sum(1, keepdims=True), jnp.promote_types(x.dtype, jnp.float32))

    return jnp.einsum("bhwc,ih,jw->bijc", x, means(x.shape[1]), means(x.shape[2])).astype(x.dtype)
