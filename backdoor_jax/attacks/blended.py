r"""Blended (Chen et al., 2017, arXiv 1712.05526): a picture mixed into the whole image.

.. math:: x' = \lfloor (1 - \alpha)\,x + \alpha\,t \rfloor

    >>> import jax, jax.numpy as jnp
    >>> trigger = Blended(alpha=0.5).trigger(jax.random.key(0), (32, 32, 3))
    >>> int(trigger(jnp.zeros((1, 32, 32, 3), jnp.uint8)).max())
    127
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from backdoor_jax.attacks.base import Attack
from backdoor_jax.attacks.triggers import BlendTrigger, picture
from backdoor_jax.config import Share


@dataclasses.dataclass(frozen=True)
class Blended(Attack):
    """A picture mixed in at 20 %.

    Attributes:
        alpha: the picture's share, in training and at test time; published 0.2.
        image: path of a custom picture, which is resized (bilinear) to the images' size. The published picture is a
            protected character and is not shipped; by default a smooth random pattern is made from the key.
    """

    name: ClassVar[str] = "blended"

    alpha: Share = 0.2
    image: str | None = None

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> BlendTrigger:
        """The picture for images of this shape.

        Raises:
            UserError: if the picture cannot be read.
        """
        return BlendTrigger(picture(key, shape, self.image, "Blended.image"), jnp.float32(self.alpha))
