"""Bilinear sampling and rotation against SciPy and NumPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from comparison import read_at
from hypothesis import given
from hypothesis import strategies as st

from backdoor_jax.data import bilinear_sample, pixel_grid, rotate

SHAPES = st.sampled_from([(5, 8, 3), (8, 5, 1), (9, 9, 3)])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def assert_rounded(out: Any, exact: np.ndarray) -> None:
    """The nearest gray level; close to halfway float32 may round to either side."""
    assert np.asarray(out).dtype == np.uint8
    assert np.abs(np.asarray(out, np.float64) - exact).max() <= 0.5 + 2e-3


# Sampling


@given(shape=SHAPES, seed=st.integers(0, 5))
def test_bilinear_sampling_equals_scipys_inside_and_outside(shape: tuple[int, int, int], seed: int) -> None:
    height, width, _ = shape
    positions = np.random.default_rng(seed).uniform(-2, max(height, width) + 1, (6, 7, 2)).astype(np.float32)
    images = noise(2, *shape)
    out = bilinear_sample(jnp.asarray(images), jnp.asarray(positions))
    assert out.shape == (2, 6, 7, shape[2]) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, [read_at(image, positions) for image in images], atol=1e-3)


def test_separate_positions_for_each_image_are_read_from_that_image() -> None:
    images, positions = noise(3, 6, 8, 3), np.random.default_rng(0).uniform(-1, 8, (3, 6, 8, 2)).astype(np.float32)
    out = np.asarray(bilinear_sample(jnp.asarray(images), jnp.asarray(positions)))
    for image, at, read in zip(images, positions, out, strict=True):
        np.testing.assert_allclose(read, read_at(image, at), atol=1e-3)
    shared = bilinear_sample(jnp.asarray(images), jnp.asarray(positions[0]))
    each = bilinear_sample(jnp.asarray(images), jnp.broadcast_to(positions[0], positions.shape))
    np.testing.assert_array_equal(shared, each)


@pytest.mark.parametrize("shape", [(5, 8, 3), (8, 5, 1)])
def test_sampling_at_the_pixel_grid_changes_nothing(shape: tuple[int, int, int]) -> None:
    grid = np.asarray(pixel_grid(*shape[:2]))
    np.testing.assert_array_equal(grid, np.moveaxis(np.indices(shape[:2]), 0, -1))
    images = noise(3, *shape)
    np.testing.assert_array_equal(bilinear_sample(jnp.asarray(images), jnp.asarray(grid)), images)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("size", [7, 8])
def test_quarter_turns_are_exact_and_counterclockwise(turns: int, size: int) -> None:
    images = noise(2, size, size, 3)
    out = rotate(jnp.asarray(images), jnp.full(2, turns * np.pi / 2))
    assert_rounded(out, np.rot90(images, turns, axes=(1, 2)).astype(np.float64))
    assert np.mean(np.asarray(out) != np.rot90(images, turns, axes=(1, 2))) < 0.01


@pytest.mark.parametrize("shape", [(9, 9, 3), (6, 10, 1)])
def test_a_rotation_by_any_angle_reads_where_the_inverse_rotation_points(shape: tuple[int, int, int]) -> None:
    """With x to the right and y up, a counterclockwise rotation by a maps the complex number z to z e^(ia)."""
    images, angles = noise(4, *shape), np.array([0.1, -0.4, 1.0, 3.0])
    rows, columns = np.indices(shape[:2])
    center = (shape[1] - 1) / 2 - 1j * (shape[0] - 1) / 2
    expected = []
    for image, angle in zip(images, angles, strict=True):
        source = (columns - 1j * rows - center) * np.exp(-1j * angle) + center
        expected.append(read_at(image, np.stack([-source.imag, source.real], -1)))
    assert_rounded(rotate(jnp.asarray(images), jnp.asarray(angles, jnp.float32)), np.stack(expected))
