"""The random views that contrastive learning compares: crops, mirror images and changed colors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.data.augment import GRAY, random_flip, to_pixels
from backdoor_jax.data.warp import bilinear_sample, pixel_grid

_YIQ = np.array([GRAY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Views:
    """SimCLR's views as in BadEncoder's code; everything is drawn for every image separately.

    A crop of random area and aspect ratio, resized to the full image; mirrored half of the time; in 8 cases of 10
    changed brightness, contrast, saturation and hue; in 2 of 10 converted to gray. torchvision jitters colors in a
    random order and rotates the hue in HSV; here the order is fixed, and the rotation is in the YIQ plane.

    Attributes:
        smallest: the smallest share of the area that a crop keeps; published .08; 1 crops nothing.
        jitter: brightness, contrast and saturation are scaled by 1 +- jitter; published .4.
        hue: the largest rotation of the hue, as a share of a full turn; published .1.

    Example:
        >>> Views()(jax.random.key(0), jnp.full((2, 8, 8, 3), 100, jnp.uint8)).shape
        (2, 8, 8, 3)
    """

    smallest: float = 0.08
    jitter: float = 0.4
    hue: float = 0.1

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """One view of each image, uint8 ``(B, H, W, 3)`` like the images given."""
        crop_key, flip_key, color_key = jax.random.split(key, 3)
        if self.smallest < 1:
            images = resized_crop(crop_key, images, self.smallest)
        return recolor(color_key, random_flip(flip_key, images), self.jitter, self.hue)


def resized_crop(key: jax.Array, images: jax.Array, smallest: float) -> jax.Array:
    """Crops each image to a random area and aspect ratio, and resizes the crop to the original size.

    The area is drawn from [smallest, 1] and the aspect ratio from [3/4, 4/3]; resizing is bilinear. Sides that would be
    longer than the image's are shortened to it, where torchvision draws again.

    Example:
        >>> resized_crop(jax.random.key(0), jnp.full((1, 4, 4, 3), 7, jnp.uint8), 0.5)[0, 0, 0].tolist()
        [7, 7, 7]
    """
    count, height, width, _ = images.shape
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (count,), minval=smallest, maxval=1.0)
    ratio = jnp.exp(jax.random.uniform(ratio_key, (count,), minval=-1, maxval=1) * jnp.log(4 / 3))
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], -1), 1.0)
    size = jnp.array([height, width], jnp.float32)
    corner = jax.random.uniform(corner_key, (count, 2)) * (1 - sides) * size
    positions = corner[:, None, None] + (pixel_grid(height, width) + 0.5) * sides[:, None, None] - 0.5
    return to_pixels(bilinear_sample(images, jnp.clip(positions, 0, size - 1)))


def recolor(key: jax.Array, images: jax.Array, jitter: float, hue: float) -> jax.Array:
    """Changes brightness, contrast, saturation and hue in 8 cases of 10, and converts 2 of 10 to gray.

    Example:
        >>> gray = recolor(jax.random.key(0), jnp.full((1, 2, 2, 3), 100, jnp.uint8), 0.0, 0.1)
        >>> gray[0, 0, 0].tolist()
        [100, 100, 100]
    """
    chosen_key, factor_key, turn_key, gray_key = jax.random.split(key, 4)
    count = images.shape[0]
    x = images.astype(jnp.float32)
    factors = jax.random.uniform(factor_key, (3, count, 1, 1, 1), minval=max(0.0, 1 - jitter), maxval=1 + jitter)
    x = jnp.clip(factors[0] * x, 0, 255)
    mean = jnp.mean(_gray(x), axis=(1, 2, 3), keepdims=True)
    x = jnp.clip(mean + factors[1] * (x - mean), 0, 255)
    x = jnp.clip(_gray(x) + factors[2] * (x - _gray(x)), 0, 255)

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
    return to_pixels(jnp.where(drawn(gray_key, 0.2), _gray(x), x))


def _gray(x: jax.Array) -> jax.Array:
    return (x @ jnp.asarray(GRAY))[..., None]
