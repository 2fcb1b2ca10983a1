"""Arrays of images and labels as people have them, to uint8 ``(N, H, W, channels)`` and integers ``(N,)``.

Only what is unambiguous is converted, and every conversion is told.
"""

import numpy as np

from backdoor_jax.errors import UserError


def as_images(array: np.ndarray, where: str) -> tuple[np.ndarray, list[str]]:
    """Images as uint8 with channels last, and what was converted.

    Args:
        array: ``(N, H, W, channels)``, ``(N, channels, H, W)`` or ``(N, H, W)``; integers from 0 to 255, or floating
            point from 0 to 1 or from 0 to 255.
        where: what errors call it.

    Raises:
        UserError: for values out of these ranges, such as normalized ones, or another shape.

    Example:
        >>> images, notes = as_images(np.ones((2, 3, 8, 8), np.float32), "x")
        >>> images.shape, int(images.max()), notes
        ((2, 8, 8, 3), 255, ['channels moved last', 'values from 0 to 1 scaled to 0 to 255'])
    """
    notes = []
    if array.ndim == 3:
        array = array[..., None]
        notes.append("an axis added for the one channel")
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
        notes.append("channels moved last")
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape[1:]:
        clear = "; leave out the fourth channel, transparency" if array.ndim == 4 and 4 in array.shape[1::2] else ""
        raise UserError(f"{where}: images have shape {array.shape}, expected (N, height, width, 1 or 3){clear}")
    if array.dtype == np.uint8 or not len(array):
        return array, notes
    if array.dtype.kind not in "iuf":
        raise UserError(f"{where}: images are {array.dtype}, expected uint8 from 0 to 255")
    low, high = float(array.min()), float(array.max())
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or low < 0 or high > 255 or 1 < high < 2:
            raise UserError(
                f"{where}: values run from {low:.3g} to {high:.3g}, expected 0 to 1 or 0 to 255; give the images "
                "before normalization"
            )
        if high <= 1:
            array = array * 255
            notes.append("values from 0 to 1 scaled to 0 to 255")
        return np.round(array).astype(np.uint8), notes
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 255:
        return array.astype(np.uint8), notes
    if array.dtype == np.uint16:
        notes.append("16 bits scaled to 8")
        return np.round(array / 257).astype(np.uint8), notes
    raise UserError(f"{where}: images are {array.dtype} from {low:.3g} to {high:.3g}, expected uint8 from 0 to 255")


def as_labels(array: np.ndarray, where: str) -> tuple[np.ndarray, list[str]]:
    """Labels as integers ``(N,)``, and what was converted.

    Args:
        array: integers ``(N,)`` or ``(N, 1)``, whole numbers in floating point, or one-hot rows ``(N, C)``.
        where: what errors call it.

    Raises:
        UserError: for anything else.

    Example:
        >>> as_labels(np.eye(3)[[2, 0]], "y")
        (array([2, 0]), ['one-hot rows to numbers'])
    """
    notes = []
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where}: labels are {array.dtype}, expected a class from 0 for each image")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    elif array.ndim == 2:
        if not (np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all()):
            raise UserError(
                f"{where}: labels have shape {array.shape} and are not one-hot; give a class for each image"
            )
        array = array.argmax(1)
        notes.append("one-hot rows to numbers")
    if np.issubdtype(array.dtype, np.floating) and (array == np.round(array)).all():
        array = array.astype(np.int64)
    return array, notes
