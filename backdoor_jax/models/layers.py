"""The layers of our networks, with PyTorch's numerics so that published settings mean the same thing here."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from backdoor_jax.models.conv import conv_general_dilated

torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for convolutions and linear layers: uniform on +-1/sqrt(fan-in)."""


def torch_bias(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for a bias: uniform on +-1/sqrt(fan-in of the layer)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / jnp.sqrt(fan_in)

    return init


def conv(features: int, size: int, stride: int = 1, name: str | None = None) -> nn.Conv:
    """A square convolution without bias, padded to keep the size at stride 1."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(size // 2, size // 2)] * 2,
        use_bias=False,
        kernel_init=torch_uniform,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch computes it.

    In training mode images are normalised with the batch's biased variance, while the running average takes the
    unbiased one: ``running = (1 - momentum) running + momentum batch``. Flax's own layer keeps the biased variance and
    computes it as a difference of squares.

    Shapes: ``(..., C) -> (..., C)``; parameters ``scale``, ``bias`` and statistics ``mean``, ``var`` are ``(C,)``.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalised ``x``, with the batch's statistics when training."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if train:
            axes = tuple(range(x.ndim - 1))
            batch_mean, batch_var = jnp.mean(x, axes), jnp.var(x, axes)
            if not self.is_initializing():
                n = x.size // channels
                mean.value += self.momentum * (batch_mean - mean.value)
                var.value += self.momentum * (batch_var * (n / max(n - 1, 1)) - var.value)
        else:
            batch_mean, batch_var = mean.value, var.value
        gain = scale * jax.lax.rsqrt(batch_var + self.epsilon)
        return x * gain + (bias - batch_mean * gain)


class ReLU(nn.Module):
    """A rectifier that respects an upper bound per channel where the model carries one.

    The bound lives in the collection ``bounds`` under the layer's own path, shape ``(C,)``, and is read only where
    present: a clipped model and a plain one are served by the same ``apply``. Where the collection ``activations`` is
    mutable, the channel's largest value over the batch is written there.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Rectified ``x``, clipped where there is a bound."""
        x = nn.relu(x)
        if self.has_variable("bounds", "upper"):
            x = jnp.minimum(x, self.get_variable("bounds", "upper"))
        if self.is_mutable_collection("activations"):
            largest = jnp.max(x, axis=tuple(range(x.ndim - 1)))
            self.sow("activations", "upper", largest, reduce_fn=jnp.maximum, init_fn=lambda: jnp.zeros(x.shape[-1]))
        return x
