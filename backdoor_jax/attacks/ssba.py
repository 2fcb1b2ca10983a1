r"""SSBA (Li et al., ICCV 2021, "Invisible backdoor attack with sample-specific triggers", arXiv 2012.03816).

An encoder hides a bit string in an image, a decoder reads it back (StegaStamp, Tancik et al., CVPR 2020). Both are
trained on the attacker's own data, with a new random string for every image,

.. math:: \mathrm{BCE}\bigl(\mathrm{dec}(x'), b\bigr) + \lambda \lVert x' - x \rVert^2 / n, \qquad
    x' = \mathrm{clip}\bigl(x + \mathrm{enc}(x, b)\bigr),

with :math:`\lambda` raised from 0 over the first half of the epochs. The trigger is what the encoder adds to an image
to hide one fixed random string.

>>> import jax, jax.numpy as jnp
>>> trigger = SSBA(bits=4, channels=2, depth=1).trigger(jax.random.key(0), (8, 8, 3))
>>> trigger(jnp.zeros((2, 8, 8, 3), jnp.uint8)).shape
(2, 8, 8, 3)
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge
from jax.tree_util import Partial

from backdoor_jax.attacks.base import Attack, AttackContext
from backdoor_jax.attacks.networks import EncoderDecoder
from backdoor_jax.config import Count, NonNegative, Positive
from backdoor_jax.data import Dataset
from backdoor_jax.models import Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.models.layers import BatchNorm, conv
from backdoor_jax.models.rectifier import relu
from backdoor_jax.training import Adam, GradientStep, LossResult, fit, map_chunks


class Encoder(nn.Module):
    """Maps images in [0, 1] and bits ``(B, n)`` to images in [0, 1] that hide them."""

    channels: int
    depth: int

    @nn.compact
    def __call__(self, inputs: tuple[jax.Array, jax.Array], train: bool) -> jax.Array:
        """Images with hidden bits, ``(B, H, W, channels)``."""
        x, bits = inputs
        height, width, image_channels = x.shape[1:]
        spread = relu(nn.Dense(8 * 8 * 3)(bits - 0.5)).reshape(-1, 8, 8, 3)
        spread = jax.image.resize(spread, (len(x), height, width, 3), "nearest")
        seen = jnp.concatenate([x - 0.5, spread], -1)
        return jnp.clip(x + EncoderDecoder(image_channels, self.channels, self.depth, skips=True)(seen, train), 0, 1)


class Decoder(nn.Module):
    """Maps images in [0, 1] to logits of the bits hidden in them."""

    bits: int
    channels: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of the bits, ``(B, n)``."""
        x = x - 0.5
        for level in range(self.depth + 1):
            x = relu(BatchNorm()(conv(self.channels * 2**level, 3, 2 if level else 1)(x), train))
        return nn.Dense(self.bits)(x.reshape(len(x), -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderTrigger:
    """Hides one bit string in every image.

    Attributes:
        encoder: the encoder's variables.
        secret: the string, float32 ``(n,)`` of 0 and 1.
        channels: the encoder's width.
        depth: how often the encoder halves the image.
    """

    encoder: dict[str, Any]
    secret: jax.Array
    channels: int = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)`` that hide the string, rounded."""
        x = images.astype(jnp.float32) / 255
        secrets = jnp.broadcast_to(self.secret, (len(x), len(self.secret)))
        made, _ = run(Encoder(self.channels, self.depth), self.encoder, (x, secrets), train=False)
        return jnp.round(255 * made).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class SSBA(Attack):
    """A bit string hidden by a network trained on the data at hand.

    Deviations: the published encoder is StegaStamp's at 224 or 400 pixels with a perceptual loss; ours is a small U-Net
    with a squared loss. The published benchmark ships its triggered images as files, made with a string of one bit.

    Attributes:
        bits: length of the string; published 100.
        image_weight: lambda, of the squared change, for pixels in [0, 1]; ours.
        epochs: passes that train encoder and decoder, at least 2, because the first ignores the change; ours.
        batch_size: images in a step; ours.
        generator_rate: Adam's learning rate; ours.
        channels: width of the networks; ours.
        depth: how often the networks halve the image; ours.
    """

    name: ClassVar[str] = "ssba"
    fits_trigger: ClassVar[bool] = True

    bits: Count = 100
    image_weight: NonNegative = 50.0
    epochs: Annotated[int, Ge(2)] = 10
    batch_size: Count = 64
    generator_rate: Positive = 2e-3
    channels: Count = 16
    depth: Count = 2

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> EncoderTrigger:
        """An untrained encoder and the string."""
        init_key, secret_key = jax.random.split(key)
        secret = jax.random.bernoulli(secret_key, 0.5, (self.bits,)).astype(jnp.float32)
        inputs = (jnp.zeros((1, *shape)), secret[None])
        return EncoderTrigger(
            init(Encoder(self.channels, self.depth), init_key, inputs), secret, self.channels, self.depth
        )

    def fit_trigger(self, key: jax.Array, context: AttackContext) -> tuple[EncoderTrigger, dict[str, Any]]:
        """Trains encoder and decoder.

        Returns:
            The trigger, and info over the training images with the trigger's string, rounded to uint8: the share of
            bits that the decoder reads correctly, and the peak signal-to-noise ratio in dB.

        Raises:
            NonFiniteError: if the training diverges.
        """
        trigger_key, decoder_key, fit_key = jax.random.split(key, 3)
        trigger = self.trigger(trigger_key, context.shape)
        decoder = Decoder(self.bits, self.channels, self.depth)
        decoding = init(decoder, decoder_key, jnp.zeros((1, *context.shape)))
        variables, optimizer = join(encoder=trigger.encoder, decoder=decoding), Adam(self.generator_rate)
        state = GradientStep(Partial(hiding_loss, self, 0.0), optimizer).init(variables)
        for epoch in range(self.epochs):
            ramp = min(1.0, 2 * epoch / self.epochs)
            state = fit(
                fit_key,
                GradientStep(Partial(hiding_loss, self, ramp), optimizer),
                state,
                context.data,
                epochs=epoch + 1,
                batch_size=self.batch_size,
                name="SSBA: encoder",
            ).state
        trigger = dataclasses.replace(trigger, encoder=part(state.variables, "encoder"))
        correct, change = _read_back(trigger, decoder, part(state.variables, "decoder"), context.data.images)
        return trigger, {
            "decoding_accuracy": float(correct.mean()),
            "psnr": float(10 * jnp.log10(255**2 / jnp.maximum(change.mean(), 1e-12))),
        }


def hiding_loss(
    config: SSBA, ramp: jax.Array | float, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    """The cross-entropy of the decoded bits plus the weighted change of the images.

    Args:
        config: gives ``image_weight`` and the size of the networks.
        ramp: what ``image_weight`` is multiplied by, from 0 to 1.
        variables: those of ``encoder`` and ``decoder`` in one tree that `join` made.
        batch: images; their labels are not used.
        key: for the bits.
    """
    encoder, decoder = Encoder(config.channels, config.depth), Decoder(config.bits, config.channels, config.depth)
    x = batch.images.astype(jnp.float32) / 255
    bits = jax.random.bernoulli(key, 0.5, (len(batch), config.bits)).astype(jnp.float32)
    made, encoding = run(encoder, part(variables, "encoder"), (x, bits), train=True)
    logits, decoding = run(decoder, part(variables, "decoder"), made, train=True)
    missed = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, bits))
    change = jnp.mean((made - x) ** 2)
    loss = missed + ramp * config.image_weight * change
    return loss, (join(encoder=encoding, decoder=decoding), {"read": jnp.mean((logits > 0) == (bits > 0.5))})


def _read_back(
    trigger: EncoderTrigger, decoder: Decoder, variables: Variables, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The share of correctly read bits and the mean squared change of each triggered image, ``(N,)`` each."""

    def one(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = trigger(chunk).astype(jnp.float32)
        logits, _ = run(decoder, variables, made / 255, train=False)
        correct = jnp.mean((logits > 0) == (trigger.secret > 0.5), axis=1)
        return correct, jnp.mean((made - chunk) ** 2, axis=(1, 2, 3))

    return map_chunks(one, images)
