r"""SIG (Barni et al., 2019, arXiv 1902.11237): a horizontal sine wave over the whole image, under clean labels.

.. math:: x'_{ij} = \lfloor x_{ij} + \Delta \sin(2 \pi j f / m) \rfloor

for column j of m, the same in all rows and channels.

>>> import jax, jax.numpy as jnp
>>> trigger = SIG(delta=40, frequency=6).trigger(jax.random.key(0), (32, 32, 3))
>>> trigger(jnp.full((1, 32, 32, 3), 100, jnp.uint8))[0, 0, :4, 0].tolist()
[100, 136, 128, 84]
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from backdoor_jax.attacks.base import Attack
from backdoor_jax.attacks.triggers import AdditiveTrigger
from backdoor_jax.config import Positive


@dataclasses.dataclass(frozen=True)
class SIG(Attack):
    """A sine wave over the columns; by default under clean labels.

    Attributes:
        labels: published ``clean_label``. A rate of 10 % is then all of a class of CIFAR-10, and more than most classes
            of other data sets have.
        delta: amplitude in gray levels; published 40.
        frequency: waves across the image; published 6.
    """

    name: ClassVar[str] = "sig"

    labels: Literal["all_to_one", "all_to_all", "clean_label"] = "clean_label"
    delta: Positive = 40.0
    frequency: Positive = 6.0

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """The wave for images of this shape; nothing is random."""
        del key
        phase = 2 * jnp.pi * self.frequency * jnp.arange(shape[1]) / shape[1]
        wave = self.delta * jnp.sin(phase)
        return AdditiveTrigger(jnp.broadcast_to(wave[None, :, None], shape).astype(jnp.float32))
