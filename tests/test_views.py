"""The views of contrastive learning against what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backdoor_jax.data.augment import GREY
from backdoor_jax.data.views import Views, recolour, resized_crop

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 6, 3), dtype=np.uint8)


def grey(images: np.ndarray) -> np.ndarray:
    return np.repeat((images.astype(np.float64) @ np.array(GREY))[..., None], 3, -1)


def test_views_keep_shape_and_type_and_follow_their_key() -> None:
    one, again, other = (np.asarray(Views()(jax.random.key(seed), IMAGES)) for seed in (0, 0, 1))
    assert (one.shape, one.dtype) == (IMAGES.shape, np.uint8)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_without_crop_a_view_is_mirrored_or_not() -> None:
    seen = np.asarray(Views(smallest=1.0, jitter=0.0, hue=0.0)(jax.random.key(0), IMAGES)).astype(float)
    kinds = [IMAGES, IMAGES[:, :, ::-1], grey(IMAGES), grey(IMAGES[:, :, ::-1])]
    near = np.stack([np.abs(seen - kind).max((1, 2, 3)) <= 1 for kind in kinds])
    np.testing.assert_array_equal(near.any(0), True)
    assert near[1].any() and near[0].any()


@pytest.mark.parametrize("shape", [(12, 12), (16, 9)])
def test_a_crop_enlarges_a_ramp_evenly(shape: tuple[int, int]) -> None:
    height, width = shape
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    ramps = np.stack([10 * rows, 10 * columns, 0 * rows], -1).astype(np.uint8)
    seen = np.asarray(resized_crop(jax.random.key(1), np.repeat(ramps[None], 200, 0), 0.1)).astype(float)
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
    assert len(np.unique(seen[:, height // 2, width // 2, 0])) > 5, "crops lie in many places"


def test_colours_are_changed_in_eight_and_lost_in_two_of_ten() -> None:
    many = np.tile(IMAGES[:1], (4000, 1, 1, 1))
    seen = np.asarray(recolour(jax.random.key(2), many, 0.4, 0.1))
    colourless = (seen == seen[..., :1]).all((1, 2, 3))
    assert colourless.mean() == pytest.approx(0.2, abs=0.03)
    untouched = (seen == many).all((1, 2, 3))
    assert untouched.mean() == pytest.approx(0.2 * 0.8, abs=0.03)


def test_a_turn_of_the_hue_keeps_the_grey_of_a_colour() -> None:
    soft = np.full((400, 2, 2, 3), (140, 110, 120), np.uint8)
    seen = np.asarray(recolour(jax.random.key(3), soft, 0.0, 0.1))
    np.testing.assert_allclose(grey(seen)[..., 0], grey(soft)[..., 0], atol=1.5)
    coloured = seen[(seen != seen[..., :1]).any((1, 2, 3))]
    assert len(np.unique(coloured.reshape(len(coloured), -1), axis=0)) > 10


def test_grey_images_stay_grey() -> None:
    flat = jnp.broadcast_to(jnp.arange(0, 250, 10, dtype=jnp.uint8)[:, None, None, None], (25, 4, 4, 3))
    seen = np.asarray(recolour(jax.random.key(4), flat, 0.4, 0.1)).astype(int)
    assert np.abs(seen - seen[..., :1]).max() <= 1
