"""The random views that contrastive learning compares: crops at any scale, mirrored, with other colours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.data.augment import GREY, random_flip, to_pixels
from backdoor_jax.data.warp import bilinear_sample, pixel_grid

_YIQ = np.array([GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Views:
    """SimCLR's views as BadEncoder's code has them; everything is drawn per image.

    A crop of a random area and shape, resized to the whole; a mirror image half of the time; in 8 cases of 10 other
    brightness, contrast, saturation and hue; in 2 of 10 no colour. torchvision jitters colours in a random order and
    turns the hue in HSV; here the order is fixed, and the turn is that of the YIQ plane.

    Attributes:
        smallest: the least share of the area that a crop keeps; published .08; 1 crops nothing.
        jitter: brightness, contrast and saturation are scaled by 1 +- jitter; published .4.
        hue: the largest turn, of 1; published .1.

    Example:
        >>> Views()(jax.random.key(0), jnp.full((2, 8, 8, 3), 100, jnp.uint8)).shape
        (2, 8, 8, 3)
    """

    smallest: float = 0.08
    jitter: float = 0.4
    hue: float = 0.1

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, 3)`` to as many of the same shape."""
        crop_key, flip_key, colour_key = jax.random.split(key, 3)
        if self.smallest < 1:
            images = resized_crop(crop_key, images, self.smallest)
        return recolour(colour_key, random_flip(flip_key, images), self.jitter, self.hue)


def resized_crop(key: jax.Array, images: jax.Array, smallest: float) -> jax.Array:
    """A crop of an area in [smallest, 1] and an aspect ratio in [3/4, 4/3], resized bilinearly to the whole.

    Sides that would be longer than the image's are cut to it, where torchvision draws again.

    Example:
        >>> resized_crop(jax.random.key(0), jnp.full((1, 4, 4, 3), 7, jnp.uint8), 0.5)[0, 0, 0].tolist()
        [7, 7, 7]
    """
    count, height, width, _ = images.shape
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (count,), minval=smallest, maxval=1.0)
    ratio = jnp.exp(jax.random.uniform(ratio_key, (count,), minval=-1, maxval=1) * jnp.log(4 / 3))
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], -1), 1.0)
    whole = jnp.array([height, width], jnp.float32)
    corner = jax.random.uniform(corner_key, (count, 2)) * (1 - sides) * whole
    places = corner[:, None, None] + (pixel_grid(height, width) + 0.5) * sides[:, None, None] - 0.5
    return to_pixels(bilinear_sample(images, jnp.clip(places, 0, whole - 1)))


def recolour(key: jax.Array, images: jax.Array, jitter: float, hue: float) -> jax.Array:
    """Other brightness, contrast, saturation and hue in 8 cases of 10, and no colour in 2 of 10.

    Example:
        >>> grey = recolour(jax.random.key(0), jnp.full((1, 2, 2, 3), 100, jnp.uint8), 0.0, 0.1)
        >>> grey[0, 0, 0].tolist()
        [100, 100, 100]
    """
    chosen_key, factor_key, turn_key, grey_key = jax.random.split(key, 4)
    count = images.shape[0]
    x = images.astype(jnp.float32)
    factors = jax.random.uniform(factor_key, (3, count, 1, 1, 1), minval=max(0.0, 1 - jitter), maxval=1 + jitter)
    x = jnp.clip(factors[0] * x, 0, 255)
    mean = jnp.mean(_grey(x), axis=(1, 2, 3), keepdims=True)
    x = jnp.clip(mean + factors[1] * (x - mean), 0, 255)
    x = jnp.clip(_grey(x) + factors[2] * (x - _grey(x)), 0, 255)

    turn = 2 * jnp.pi * jax.random.uniform(turn_key, (count,), minval=-hue, maxval=hue)
    cos, sin, zero = jnp.cos(turn), jnp.sin(turn), jnp.zeros(count)
    plane = jnp.stack(
        [jnp.stack([zero + 1, zero, zero], -1), jnp.stack([zero, cos, -sin], -1), jnp.stack([zero, sin, cos], -1)], -2
    )
    turned = jnp.asarray(np.linalg.inv(_YIQ), jnp.float32) @ plane @ jnp.asarray(_YIQ, jnp.float32)
    x = jnp.einsum("bij,bhwj->bhwi", turned, x)

    def drawn(key: jax.Array, share: float) -> jax.Array:
        return jax.random.bernoulli(key, share, (count, 1, 1, 1))

    x = jnp.where(drawn(chosen_key, 0.8), x, images)
    return to_pixels(jnp.where(drawn(grey_key, 0.2), _grey(x), x))


def _grey(x: jax.Array) -> jax.Array:
    return (x @ jnp.asarray(GREY))[..., None]
