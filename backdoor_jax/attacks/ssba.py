r"""SSBA (Li et al., ICCV 2021, "Invisible backdoor attack with sample-specific triggers", arXiv 2012.03816).

An encoder hides a bit string in an image, a decoder reads it back (StegaStamp, Tancik et al., CVPR 2020). Both are
trained on the data at hand with strings drawn anew for every image,

.. math:: \mathrm{BCE}\bigl(\mathrm{dec}(x'), b\bigr) + \lambda \lVert x' - x \rVert^2 / n, \qquad
    x' = \mathrm{clip}\bigl(x + \mathrm{enc}(x, b)\bigr),

with :math:`\lambda` raised from 0 over the first half of the epochs. Then one string is drawn, and its trace in
an image is the trigger.

>>> import jax, jax.numpy as jnp
>>> trigger = SSBA(bits=4, channels=2, depth=1).trigger(jax.random.key(0), (8, 8, 3))
>>> trigger(jnp.zeros((2, 8, 8, 3), jnp.uint8)).shape
(2, 8, 8, 3)
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from backdoor_jax.attacks.base import Attack, Scene
from backdoor_jax.attacks.networks import Adam, EncoderDecoder
from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset
from backdoor_jax.models import Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.models.layers import BatchNorm, conv
from backdoor_jax.training import Constants, GradientStep, Info, fit, map_chunks


class Encoder(nn.Module):
    """Images in [0, 1] and bits ``(B, n)`` to images that carry them, in [0, 1]."""

    channels: int
    depth: int

    @nn.compact
    def __call__(self, inputs: tuple[jax.Array, jax.Array], train: bool) -> jax.Array:
        """``(B, H, W, channels)``."""
        x, bits = inputs
        height, width, image_channels = x.shape[1:]
        spread = nn.relu(nn.Dense(8 * 8 * 3)(bits - 0.5)).reshape(-1, 8, 8, 3)
        spread = jax.image.resize(spread, (len(x), height, width, 3), "nearest")
        seen = jnp.concatenate([x - 0.5, spread], -1)
        return jnp.clip(x + EncoderDecoder(image_channels, self.channels, self.depth, skips=True)(seen, train), 0, 1)


class Decoder(nn.Module):
    """Images in [0, 1] to logits of the bits they carry, ``(B, n)``."""

    bits: int
    channels: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``(B, n)``."""
        x = x - 0.5
        for level in range(self.depth + 1):
            x = nn.relu(BatchNorm()(conv(self.channels * 2**level, 3, 2 if level else 1)(x), train))
        return nn.Dense(self.bits)(x.reshape(len(x), -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderTrigger:
    """Hides one bit string in every image.

    Attributes:
        encoder: the encoder's variables.
        secret: the string, float32 ``(n,)`` of 0 and 1.
        channels: the encoder's width.
        depth: halvings in it.
    """

    encoder: dict[str, Any]
    secret: jax.Array
    channels: int = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)`` that carry the string, rounded."""
        x = images.astype(jnp.float32) / 255
        secrets = jnp.broadcast_to(self.secret, (len(x), len(self.secret)))
        made, _ = run(Encoder(self.channels, self.depth), self.encoder, (x, secrets), train=False)  # type: ignore[arg-type]
        return jnp.round(255 * made).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class SSBA(Attack):
    """A bit string hidden by a network trained on the data at hand.

    The published encoder is StegaStamp's at 224 or 400 pixels with a perceptual loss; ours is a small U-Net with a
    squared loss. The published benchmark ships its images as files made with a string of one bit.

    Attributes:
        bits: length of the string; published 100.
        image_weight: lambda, of the squared change with pixels in [0, 1]; ours.
        epochs: passes that train encoder and decoder, at least 2; ours.
        batch_size: ours.
        generator_rate: Adam's learning rate; ours.
        channels: width of the networks; ours.
        depth: halvings in them; ours.
    """

    learns: ClassVar[bool] = True

    bits: int = 100
    image_weight: float = 50.0
    epochs: int = 10
    batch_size: int = 64
    generator_rate: float = 2e-3
    channels: int = 16
    depth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.bits > 0, "bits", "at least 1")
        self.require(self.image_weight >= 0, "image_weight", "0 or more")
        self.require(self.epochs > 1, "epochs", "at least 2, since the first does not weigh the change")
        self.require(self.batch_size > 0, "batch_size", "at least 1")
        self.require(self.generator_rate > 0, "generator_rate", "a positive number")
        self.require(self.channels > 0 and self.depth > 0, "channels", "at least 1, and so the depth")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> EncoderTrigger:
        """An untrained encoder and the string."""
        init_key, secret_key = jax.random.split(key)
        secret = jax.random.bernoulli(secret_key, 0.5, (self.bits,)).astype(jnp.float32)
        inputs = (jnp.zeros((1, *shape)), secret[None])
        return EncoderTrigger(
            init(Encoder(self.channels, self.depth), init_key, inputs), secret, self.channels, self.depth
        )

    def learn(self, key: jax.Array, scene: Scene) -> tuple[EncoderTrigger, dict[str, Any]]:
        """Trains encoder and decoder.

        Info, over the training images with the string of the trigger, rounded to uint8: the share of bits that the
        decoder reads rightly, and the peak signal-to-noise ratio in dB.
        """
        trigger_key, decoder_key, fit_key = jax.random.split(key, 3)
        trigger = self.trigger(trigger_key, scene.shape)
        decoder = Decoder(self.bits, self.channels, self.depth)
        decoding = init(decoder, decoder_key, jnp.zeros((1, *scene.shape)))
        constants = numbers(self)
        step = GradientStep(HidingLoss(Encoder(self.channels, self.depth), decoder), Adam())
        state = step.init(join(encoder=trigger.encoder, decoder=decoding), constants)
        for epoch in range(self.epochs):
            share = min(1.0, 2 * epoch / self.epochs)
            state, _ = fit(
                fit_key,
                step,
                state,
                scene.data,
                {**constants, "image_weight": share * constants["image_weight"]},
                epochs=epoch + 1,
                batch_size=self.batch_size,
                name="SSBA: encoder",
            )
        trigger = dataclasses.replace(trigger, encoder=part(state.variables, "encoder"))
        rightly, change = _read_back(trigger, decoder, part(state.variables, "decoder"), scene.data.images)
        return trigger, {
            "decoding_accuracy": float(rightly.mean()),
            "psnr": float(10 * jnp.log10(255**2 / jnp.maximum(change.mean(), 1e-12))),
        }


@dataclasses.dataclass(frozen=True)
class HidingLoss:
    """What the decoder misses and what the encoder changes."""

    encoder: Encoder
    decoder: Decoder

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        x = batch.images.astype(jnp.float32) / 255
        bits = jax.random.bernoulli(key, 0.5, (len(batch), self.decoder.bits)).astype(jnp.float32)
        made, encoder = run(self.encoder, part(variables, "encoder"), (x, bits), train=True)  # type: ignore[arg-type]
        logits, decoder = run(self.decoder, part(variables, "decoder"), made, train=True)
        missed = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, bits))
        change = jnp.mean((made - x) ** 2)
        loss = missed + constants["image_weight"] * change
        return loss, (join(encoder=encoder, decoder=decoder), {"read": jnp.mean((logits > 0) == (bits > 0.5))})


def _read_back(
    trigger: EncoderTrigger, decoder: Decoder, variables: Variables, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def one(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = trigger(chunk).astype(jnp.float32)
        logits, _ = run(decoder, variables, made / 255, train=False)
        rightly = jnp.mean((logits > 0) == (trigger.secret > 0.5), axis=1)
        return rightly, jnp.mean((made - chunk) ** 2, axis=(1, 2, 3))

    return map_chunks(one, images)
