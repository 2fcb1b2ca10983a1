"""BadNets (Gu et al., 2017, arXiv 1708.06733): a small patch in a corner.

>>> import jax, jax.numpy as jnp
>>> trigger = BadNets().trigger(jax.random.key(0), (32, 32, 3))
>>> triggered = trigger(jnp.zeros((1, 32, 32, 3), jnp.uint8))
>>> int(triggered.astype(int).sum()) == 3 * 3 * 3 * 255
True
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.attacks.base import Attack
from backdoor_jax.attacks.triggers import PatchTrigger
from backdoor_jax.config import Count, Whole
from backdoor_jax.errors import UserError

Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]


@dataclasses.dataclass(frozen=True)
class BadNets(Attack):
    """A square patch; the published benchmark's is 3x3, white, in the bottom right corner of a 32x32 image.

    Deviation from the benchmark: on images of another size the patch keeps its `size` in pixels, where the benchmark
    resizes a 32x32 mask to the image. A size of 6 covers the same share of a 64x64 image.

    Attributes:
        size: side of the patch in pixels; published 3.
        style: ``white`` (published), or ``checker``: 255 and 1 alternating, starting in the top left cell of the patch,
            the benchmark's grid trigger.
        corner: which corner; published ``bottom_right``.
        border: pixels between the patch and the image's border; published 0. BadEncoder's has 1.
    """

    name: ClassVar[str] = "badnets"

    size: Count = 3
    style: Literal["white", "checker"] = "white"
    corner: Corner = "bottom_right"
    border: Whole = 0

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> PatchTrigger:
        """The patch for images of this shape; nothing is random.

        Raises:
            UserError: if the patch is larger than the images.
        """
        del key
        height, width, channels = shape
        if self.size + self.border > min(height, width):
            within = f" with a border of {self.border}" if self.border else ""
            raise UserError(
                f"BadNets.size is {self.size}{within}, larger than the {height}x{width} images; make it smaller"
            )
        rows, columns = np.arange(height)[:, None], np.arange(width)[None]
        vertical, horizontal = self.corner.split("_")
        first_row = self.border if vertical == "top" else height - self.size - self.border
        first_column = self.border if horizontal == "left" else width - self.size - self.border
        inside = (rows >= first_row) & (rows < first_row + self.size)
        inside = inside & (columns >= first_column) & (columns < first_column + self.size)
        even = (rows - first_row + columns - first_column) % 2 == 0
        light = even if self.style == "checker" else np.ones((height, width), bool)
        pattern = np.where(light, 255, 1).astype(np.uint8)[..., None]
        return PatchTrigger(jnp.asarray(np.tile(pattern, channels)), jnp.asarray(inside[..., None]))
