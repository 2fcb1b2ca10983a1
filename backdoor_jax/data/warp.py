"""Bilinear sampling of images at places between pixels, and the rotation made of it."""

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.compiling import one_program


@one_program
def bilinear_sample(images: jax.Array, places: jax.Array) -> jax.Array:
    """Reads images between pixels; outside an image is black.

    Args:
        images: ``(B, H, W, channels)``, any dtype.
        places: ``(H', W', 2)``, or ``(B, H', W', 2)`` for places of each image's own: row and column, in pixels from 0.

    Returns:
        float32 ``(B, H', W', channels)``.

    Example:
        >>> images = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> bilinear_sample(images, jnp.array([[[0.0, 0.0], [0.5, 0.5], [0.0, 1.5]]]))[0, 0, :, 0].tolist()
        [0.0, 1.5, 0.5]
    """
    height, width = images.shape[1:3]

    def one(image: jax.Array, places: jax.Array) -> jax.Array:
        corner = jnp.floor(places)
        fraction = places - corner
        row, column = corner[..., 0].astype(jnp.int32), corner[..., 1].astype(jnp.int32)
        total = jnp.zeros((*places.shape[:-1], image.shape[-1]))
        for down in (0, 1):
            for right in (0, 1):
                r, c = row + down, column + right
                weight = jnp.abs(1 - down - fraction[..., 0]) * jnp.abs(1 - right - fraction[..., 1])
                inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
                pixel = image[jnp.clip(r, 0, height - 1), jnp.clip(c, 0, width - 1)].astype(jnp.float32)
                total += jnp.where(inside, weight, 0.0)[..., None] * pixel
        return total

    return jax.vmap(one, in_axes=(0, 0 if places.ndim == 4 else None))(images, places)


def pixel_grid(height: int, width: int) -> jax.Array:
    """Every pixel's own place, ``(height, width, 2)``: sampling there changes nothing.

    Example:
        >>> pixel_grid(2, 3)[1, 2].tolist()
        [1.0, 2.0]
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return jnp.asarray(np.stack([rows, columns], -1), jnp.float32)


def rotate(images: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns each uint8 image about its centre; corners that come in are black.

    Args:
        images: uint8 ``(B, H, W, channels)``.
        angles: radians ``(B,)``, anticlockwise.

    Returns:
        uint8 ``(B, H, W, channels)``.

    Example:
        >>> image = jnp.zeros((1, 3, 3, 1), jnp.uint8).at[0, 1, 2].set(9)
        >>> rotate(image, jnp.array([jnp.pi / 2]))[0, :, :, 0].tolist()
        [[0, 9, 0], [0, 0, 0], [0, 0, 0]]
    """
    height, width = images.shape[1:3]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    offset = pixel_grid(height, width) - centre
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turn = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)
    places = jnp.einsum("bij,hwj->bhwi", turn, offset) + centre
    return jnp.round(bilinear_sample(images, places)).astype(jnp.uint8)
