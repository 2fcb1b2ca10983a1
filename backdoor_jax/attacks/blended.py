r"""Blended (Chen et al., 2017, arXiv 1712.05526): a picture mixed into the whole image.

.. math:: x' = \lfloor (1 - \alpha)\,x + \alpha\,t \rfloor

    >>> import jax, jax.numpy as jnp
    >>> trigger = Blended(alpha=0.5).trigger(jax.random.key(0), (32, 32, 3))
    >>> int(trigger(jnp.zeros((1, 32, 32, 3), jnp.uint8)).max())
    127
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.attacks.base import Attack
from backdoor_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlendTrigger:
    """Mixes a picture into images.

    Attributes:
        pattern: float32 ``(H, W, channels)``, 0 to 255.
        alpha: the picture's share.
    """

    pattern: jax.Array
    alpha: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)``, mixed, clipped and truncated as the published benchmark does."""
        mixed = (1 - self.alpha) * images.astype(jnp.float32) + self.alpha * self.pattern
        return jnp.clip(mixed, 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Blended(Attack):
    """A picture mixed in at 20 %.

    Attributes:
        alpha: the picture's share in training and test; published 0.2.
        image: path of a picture of one's own, resized (bilinear) to the data's size. The published one is a protected
            character and is not shipped; by default a smooth random pattern is made from the key.
    """

    alpha: float = 0.2
    image: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.alpha <= 1, "alpha", "a share in (0, 1]")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> BlendTrigger:
        """The picture for images of this shape."""
        pattern = random_pattern(key, shape) if self.image is None else _read(Path(self.image), shape)
        return BlendTrigger(pattern, jnp.float32(self.alpha))


def random_pattern(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A coloured pattern of soft blobs that spans 0 to 255: noise on an 8x8 grid, enlarged by cubic interpolation.

    Example:
        >>> random_pattern(jax.random.key(0), (32, 32, 3)).shape
        (32, 32, 3)
    """
    coarse = jax.random.uniform(key, (8, 8, shape[-1]))
    smooth = jax.image.resize(coarse, shape, "cubic")
    low, high = smooth.min((0, 1)), smooth.max((0, 1))
    return 255 * (smooth - low) / (high - low)


def _read(path: Path, shape: tuple[int, int, int]) -> jax.Array:
    from PIL import Image, UnidentifiedImageError

    height, width, channels = shape
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"Blended.image {str(path)!r} cannot be read as a picture ({error})") from error
    return jnp.asarray(np.asarray(picture, np.float32).reshape(shape))
