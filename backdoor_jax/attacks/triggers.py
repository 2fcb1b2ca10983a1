"""Triggers and pictures that several attacks use. A trigger is a pytree, so compiled code takes it as an argument."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed, typed_outside
from backdoor_jax.errors import UserError
from backdoor_jax.reading import file_size, image_pixels


def to_uint8(images: jax.Array) -> jax.Array:
    """Gray levels clipped to 0..255 and truncated, as the published benchmark stores triggered images.

    Example:
        >>> to_uint8(jnp.array([-3.0, 7.9, 300.0])).tolist()
        [0, 7, 255]
    """
    return jnp.clip(images, 0, 255).astype(jnp.uint8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchTrigger:
    """Replaces pixels under a mask.

    Attributes:
        pattern: uint8 ``(H, W, channels)``.
        mask: bool ``(H, W, 1)``.
    """

    pattern: jax.Array
    mask: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)`` with the patch."""
        return jnp.where(self.mask, self.pattern, images)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlendTrigger:
    """Mixes a picture into images.

    Attributes:
        pattern: float32 ``(H, W, channels)``, 0 to 255.
        alpha: the picture's share; a scalar, or per pixel ``(H, W, 1)``.
    """

    pattern: jax.Array
    alpha: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)``, mixed, clipped and truncated, as in the published benchmark."""
        return to_uint8((1 - self.alpha) * images.astype(jnp.float32) + self.alpha * self.pattern)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdditiveTrigger:
    """Adds the same pattern to every image.

    Attributes:
        pattern: float32 ``(H, W, channels)``, gray levels of either sign.
    """

    pattern: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)`` with the pattern added, clipped and truncated."""
        return to_uint8(images.astype(jnp.float32) + self.pattern)


@typed
def picture_patch(
    path: str, shape: tuple[int, int, int], position: tuple[int, int] | None, where: str = "patch"
) -> PatchTrigger:
    """A picture in its own size as a patch, of which transparent pixels are left out.

    Args:
        path: a picture file.
        shape: ``(height, width, channels)`` of the images.
        position: row and column of its upper left pixel; the lower right corner of the images by default.
        where: what errors call it.

    Raises:
        UserError: if the file cannot be read, or the patch does not lie inside the images.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     Image.new("RGB", (2, 3)).save(file.name)
        ...     int(picture_patch(file.name, (8, 8, 3), None).mask.sum())
        6
    """
    patch = _read_picture(Path(path), shape[-1], where)
    (height, width), (rows, columns) = shape[:2], patch.shape[:2]
    top, left = position or (height - rows, width - columns)
    if top < 0 or left < 0 or top + rows > height or left + columns > width:
        raise UserError(
            f"{where} {path}: {rows}x{columns} pixels at row {top} and column {left} reach beyond the images of "
            f"{height}x{width}; give a smaller picture or another position"
        )
    pattern, mask = np.zeros(shape, np.uint8), np.zeros((height, width, 1), bool)
    inside = slice(top, top + rows), slice(left, left + columns)
    pattern[inside], mask[inside] = patch, _read_picture(Path(path), 4, where)[..., 3:] > 127
    return PatchTrigger(jnp.asarray(pattern), jnp.asarray(mask))


@typed_outside
def random_pattern(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A colored pattern of soft blobs from 0 to 255: noise on an 8x8 grid, enlarged by cubic interpolation.

    Example:
        >>> random_pattern(jax.random.key(0), (32, 32, 3)).shape
        (32, 32, 3)
    """
    coarse = jax.random.uniform(key, (8, 8, shape[-1]))
    smooth = jax.image.resize(coarse, shape, "cubic")
    low, high = smooth.min((0, 1)), smooth.max((0, 1))
    return 255 * (smooth - low) / (high - low)


def picture(key: jax.Array, shape: tuple[int, int, int], path: str | None, field: str) -> jax.Array:
    """The picture at a path, or a random pattern if there is no path.

    Args:
        key: of the random pattern.
        shape: ``(height, width, channels)`` of the images.
        path: a picture file; it is resized (bilinear) to the images' size.
        field: the setting that gave the path, for errors.

    Returns:
        float32 of that shape, 0 to 255.

    Raises:
        UserError: if the file cannot be read.

    Example:
        >>> picture(jax.random.key(0), (32, 32, 1), None, "Blended.image").shape
        (32, 32, 1)
    """
    return (
        random_pattern(key, shape) if path is None else jnp.float32(_read_picture(Path(path), shape[-1], field, shape))
    )


def _read_picture(path: Path, channels: int, field: str, resize_to: tuple[int, int, int] | None = None) -> np.ndarray:
    """The uint8 pixels of a picture ``(height, width, channels)``; the fourth channel says how opaque they are."""
    from PIL import Image

    try:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        image = image_pixels(path, path, mode, file_size(path, "give a picture")).pixels
    except UserError as error:
        raise UserError(f"{field} cannot be read as a picture: {error}") from error
    if resize_to is not None:
        image = image.resize((resize_to[1], resize_to[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)
