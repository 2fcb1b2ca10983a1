"""The image-to-image network of the attacks that generate their triggers."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from backdoor_jax.models.layers import BatchNorm, conv
from backdoor_jax.training import Constants
from backdoor_jax.training.schedules import Rate


class EncoderDecoder(nn.Module):
    """Halves the image `depth` times with strided convolutions and enlarges it back (bilinear).

    Images of any size: on the way back each level takes the size it had. Where the published generators pool, this one
    strides.

    Args:
        outputs: channels of the result.
        channels: of the first level; each deeper level has twice as many.
        depth: halvings.
        skips: hand each level's features across to the way back (a U-Net).

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
        """``(B, H, W, any)`` to ``(B, H, W, outputs)``, unbounded."""

        def block(x: jax.Array, features: int, stride: int = 1) -> jax.Array:
            return nn.relu(BatchNorm()(conv(features, 3, stride)(x), train))

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


@dataclasses.dataclass(frozen=True)
class Adam:
    """The generators' optimiser, at ``constants["generator_rate"]`` or what a schedule makes of it."""

    b1: float = 0.9
    b2: float = 0.999
    schedule: Callable[[Rate], optax.Schedule] = optax.constant_schedule

    def __call__(self, constants: Constants) -> optax.GradientTransformation:
        """The transformation for these constants."""
        return optax.adam(self.schedule(constants["generator_rate"]), b1=self.b1, b2=self.b2)


@dataclasses.dataclass(frozen=True)
class Together:
    """The victim's optimiser and the generator's, each on its own parameters of `join`'s tree."""

    classifier: Callable[[Constants], optax.GradientTransformation]
    generator: Callable[[Constants], optax.GradientTransformation]

    def __call__(self, constants: Constants) -> optax.GradientTransformation:
        """The transformation for these constants."""
        parts = {"classifier": self.classifier(constants), "generator": self.generator(constants)}
        return optax.partition(parts, {name: name for name in parts})
