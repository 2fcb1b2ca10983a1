"""The image-to-image network of the attacks that generate their triggers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from backdoor_jax.models.layers import BatchNorm, conv
from backdoor_jax.models.rectifier import relu


class EncoderDecoder(nn.Module):
    """Halves the image `depth` times with strided convolutions and enlarges it again (bilinear).

    It takes images of any size: on the way up each level gets the size that it had on the way down. The published
    generators pool instead of striding.

    Args:
        outputs: channels of the result.
        channels: of the first level; each deeper level has twice as many.
        depth: how often the image is halved.
        skips: concatenate each level's features on the way down to those on the way up (a U-Net).

    Example:
        >>> net = EncoderDecoder(outputs=1, channels=4, depth=2)
        >>> images = jnp.zeros((2, 9, 8, 3))
        >>> out, _ = net.init_with_output(jax.random.key(0), images, train=False)
        >>> out.shape
        (2, 9, 8, 1)
    """

    outputs: int
    channels: int = 32
    depth: int = 3
    skips: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps ``(B, H, W, any)`` to ``(B, H, W, outputs)``, unbounded."""

        def block(x: jax.Array, features: int, stride: int = 1) -> jax.Array:
            return relu(BatchNorm()(conv(features, 3, stride)(x), train))

        levels = []
        for level in range(self.depth):
            x = block(x, self.channels * 2**level)
            levels.append(x)
            x = block(x, self.channels * 2**level, 2)
        x = block(x, self.channels * 2**self.depth)
        for level in reversed(range(self.depth)):
            across = levels[level]
            x = jax.image.resize(x, (*across.shape[:3], x.shape[-1]), "bilinear")
            if self.skips:
                x = jnp.concatenate([x, across], -1)
            x = block(x, self.channels * 2**level)
        return conv(self.outputs, 3)(x)
