"""The views of contrastive learning: shares, ranges and what they leave unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backdoor_jax.data.augment import GRAY
from backdoor_jax.data.views import Views, recolor, resized_crop

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 6, 3), dtype=np.uint8)


def gray(images: np.ndarray) -> np.ndarray:
    return np.repeat((images.astype(np.float64) @ np.array(GRAY))[..., None], 3, -1)


def test_views_keep_shape_and_dtype_and_depend_on_the_key() -> None:
    one, again, other = (np.asarray(Views()(jax.random.key(seed), jnp.asarray(IMAGES))) for seed in (0, 0, 1))
    assert (one.shape, one.dtype) == (IMAGES.shape, np.uint8)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_without_crop_a_view_is_mirrored_or_not() -> None:
    views = Views(smallest=1.0, jitter=0.0, hue=0.0)
    seen = np.asarray(views(jax.random.key(0), jnp.asarray(IMAGES))).astype(float)
    kinds = [IMAGES, IMAGES[:, :, ::-1], gray(IMAGES), gray(IMAGES[:, :, ::-1])]
    near = np.stack([np.abs(seen - kind).max((1, 2, 3)) <= 1 for kind in kinds])
    np.testing.assert_array_equal(near.any(0), True)
    assert near[1].any() and near[0].any()


@pytest.mark.parametrize("shape", [(12, 12), (16, 9)])
def test_a_crop_enlarges_a_ramp_linearly(shape: tuple[int, int]) -> None:
    height, width = shape
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    ramps = np.stack([10 * rows, 10 * columns, 0 * rows], -1).astype(np.uint8)
    seen = np.asarray(resized_crop(jax.random.key(1), jnp.asarray([ramps] * 200), 0.1)).astype(float)
    sides = []
    for axis, channel in ((1, 0), (2, 1)):
        inner = np.diff(seen[..., channel], axis=axis)
        inner = inner[:, 1:-1, 1:-1]  # The outermost pixels may have been clipped to the image.
        assert (inner.max((1, 2)) - inner.min((1, 2)) <= 1).all()
        sides.append(inner.mean((1, 2)) / 10)
    down, right = sides
    assert down.min() > np.sqrt(0.1 * 0.75) - 0.02 and max(down.max(), right.max()) < 1.02
    assert (down * right).min() > 0.09
    assert (seen[..., 2] == 0).all()
    assert len(np.unique(seen[:, height // 2, width // 2, 0])) > 5, "crops are at many positions"


def test_colors_change_in_eight_cases_of_ten_and_become_gray_in_two() -> None:
    many = np.tile(IMAGES[:1], (4000, 1, 1, 1))
    seen = np.asarray(recolor(jax.random.key(2), jnp.asarray(many), 0.4, 0.1))
    colorless = (seen == seen[..., :1]).all((1, 2, 3))
    assert colorless.mean() == pytest.approx(0.2, abs=0.03)
    untouched = (seen == many).all((1, 2, 3))
    assert untouched.mean() == pytest.approx(0.2 * 0.8, abs=0.03)


def test_a_rotation_of_the_hue_keeps_the_gray_level_of_a_color() -> None:
    soft = np.full((400, 2, 2, 3), (140, 110, 120), np.uint8)
    seen = np.asarray(recolor(jax.random.key(3), jnp.asarray(soft), 0.0, 0.1))
    np.testing.assert_allclose(gray(seen)[..., 0], gray(soft)[..., 0], atol=1.5)
    colored = seen[(seen != seen[..., :1]).any((1, 2, 3))]
    assert len(np.unique(colored.reshape(len(colored), -1), axis=0)) > 10


def test_gray_images_stay_gray() -> None:
    flat = jnp.broadcast_to(jnp.arange(0, 250, 10, dtype=jnp.uint8)[:, None, None, None], (25, 4, 4, 3))
    seen = np.asarray(recolor(jax.random.key(4), flat, 0.4, 0.1)).astype(int)
    assert np.abs(seen - seen[..., :1]).max() <= 1
