"""Augmentation inside the compiled step: uint8 images in, uint8 images out."""

import dataclasses

import jax
import jax.numpy as jnp

from backdoor_jax.arguments import typed_outside
from backdoor_jax.config import Whole
from backdoor_jax.errors import UserError

GRAY = (0.299, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Augment:
    """Random crop, mirror image, brightness and contrast, each drawn for every image separately.

    Attributes:
        crop: zeros padded on every side before a crop of the original size; the benchmark uses 4.
        flip: mirror half of the images; the benchmark does so for CIFAR-10 only.
        brightness: pixels are multiplied by a factor drawn from 1 +- brightness.
        contrast: the distance to the image's mean gray level (ITU-R 601 weights, as in torchvision) is multiplied by a
            factor drawn from 1 +- contrast.

    Example:
        >>> images = jnp.full((2, 8, 8, 3), 100, jnp.uint8)
        >>> Augment(crop=2, flip=True)(jax.random.key(0), images).shape
        (2, 8, 8, 3)
    """

    crop: int = 0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """The augmented images, uint8 ``(B, H, W, channels)`` like those given."""
        crop_key, flip_key, brightness_key, contrast_key = jax.random.split(key, 4)
        if self.crop:
            images = random_crop(crop_key, images, self.crop)
        if self.flip:
            images = random_flip(flip_key, images)
        if self.brightness:
            images = _blend(images, 0.0, _factors(brightness_key, images, self.brightness))
        if self.contrast:
            weights = jnp.asarray(GRAY) if images.shape[-1] == 3 else jnp.ones(1)
            gray = jnp.mean(images.astype(jnp.float32) @ weights, axis=(1, 2))
            images = _blend(images, gray[:, None, None, None], _factors(contrast_key, images, self.contrast))
        return images


@typed_outside
def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors about half of the images left to right, each with probability 1/2.

    Example:
        >>> random_flip(jax.random.key(0), jnp.ones((3, 8, 8, 1), jnp.uint8)).shape
        (3, 8, 8, 1)
    """
    mirrored = jax.random.bernoulli(key, 0.5, images.shape[:1])
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


@typed_outside
def random_crop(key: jax.Array, images: jax.Array, pad: Whole) -> jax.Array:
    """Pads with zeros on every side and crops each image to its original size at a random position.

    Raises:
        UserError: for as many zeros as the image has pixels, because a crop might then show nothing of it.

    Example:
        >>> random_crop(jax.random.key(0), jnp.ones((3, 8, 8, 1), jnp.uint8), 2).shape
        (3, 8, 8, 1)
    """
    count, height, width, channels = images.shape
    if pad >= min(height, width):
        raise UserError(f"crop is {pad} for images of {height}x{width}, expected less than their side; lower it")
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (count, 2), 0, 2 * pad + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(cut)(padded, corners)


def _factors(key: jax.Array, images: jax.Array, spread: float) -> jax.Array:
    drawn = jax.random.uniform(key, images.shape[:1], minval=max(0.0, 1 - spread), maxval=1 + spread)
    return drawn[:, None, None, None]


def _blend(images: jax.Array, base: jax.Array | float, factor: jax.Array) -> jax.Array:
    mixed = base + factor * (images.astype(jnp.float32) - base)
    return to_pixels(mixed)


def to_pixels(x: jax.Array) -> jax.Array:
    """The nearest uint8 values.

    Example:
        >>> to_pixels(jnp.array([-3.0, 1.6, 300.0])).tolist()
        [0, 2, 255]
    """
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)
