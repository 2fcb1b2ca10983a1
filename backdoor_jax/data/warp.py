"""Bilinear sampling of images at positions between pixels, and rotation by it."""

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed_outside
from backdoor_jax.compiling import one_program
from backdoor_jax.errors import UserError


@one_program
def bilinear_sample(images: jax.Array, positions: jax.Array) -> jax.Array:
    """Reads images at positions between pixels by bilinear interpolation; outside an image is black.

    Args:
        images: ``(B, H, W, channels)``, any dtype.
        positions: ``(H', W', 2)``, or ``(B, H', W', 2)`` for separate positions in each image: row and column, in
            pixels from 0.

    Returns:
        float32 ``(B, H', W', channels)``.

    Example:
        >>> images = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> bilinear_sample(images, jnp.array([[[0.0, 0.0], [0.5, 0.5], [0.0, 1.5]]]))[0, 0, :, 0].tolist()
        [0.0, 1.5, 0.5]
    """
    height, width = images.shape[1:3]

    def one(image: jax.Array, positions: jax.Array) -> jax.Array:
        corner = jnp.floor(positions)
        fraction = positions - corner
        row, column = corner[..., 0].astype(jnp.int32), corner[..., 1].astype(jnp.int32)
        total = jnp.zeros((*positions.shape[:-1], image.shape[-1]))
        for down in (0, 1):
            for right in (0, 1):
                r, c = row + down, column + right
                weight = jnp.abs(1 - down - fraction[..., 0]) * jnp.abs(1 - right - fraction[..., 1])
                inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
                pixel = image[jnp.clip(r, 0, height - 1), jnp.clip(c, 0, width - 1)].astype(jnp.float32)
                total += jnp.where(inside, weight, 0.0)[..., None] * pixel
        return total

    return jax.vmap(one, in_axes=(0, 0 if positions.ndim == 4 else None))(images, positions)


def pixel_grid(height: int, width: int) -> jax.Array:
    """The position of every pixel, ``(height, width, 2)``; sampling there returns the image unchanged.

    Example:
        >>> pixel_grid(2, 3)[1, 2].tolist()
        [1.0, 2.0]
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return jnp.asarray(np.stack([rows, columns], -1), jnp.float32)


@typed_outside
def rotate(images: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates each uint8 image about its center; what comes in at the corners is black.

    Args:
        images: uint8 ``(B, H, W, channels)``.
        angles: radians ``(B,)``, counterclockwise.

    Returns:
        uint8 ``(B, H, W, channels)``.

    Example:
        >>> image = jnp.zeros((1, 3, 3, 1), jnp.uint8).at[0, 1, 2].set(9)
        >>> rotate(image, jnp.array([jnp.pi / 2]))[0, :, :, 0].tolist()
        [[0, 9, 0], [0, 0, 0], [0, 0, 0]]
    """
    if angles.shape != images.shape[:1]:
        raise UserError(f"rotate: angles have shape {angles.shape}, expected one for each of {len(images)} images")
    height, width = images.shape[1:3]
    center = jnp.array([(height - 1) / 2, (width - 1) / 2])
    offset = pixel_grid(height, width) - center
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turn = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)
    positions = jnp.einsum("bij,hwj->bhwi", turn, offset) + center
    return jnp.round(bilinear_sample(images, positions)).astype(jnp.uint8)
