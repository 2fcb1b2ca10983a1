"""Synthetic traffic signs: what they hold, and that they stay the same."""

from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from backdoor_jax import Task, load, signs
from backdoor_jax.data.traffic_signs import SIGNS, draw_signs

GOLDEN = Path(__file__).with_name("signs.png")
"""The first image of each class that is drawn from seed 0, side by side; `draw_golden` writes it."""


@pytest.fixture(scope="module")
def task() -> Task:
    return signs()


def first_of_each_class() -> np.ndarray:
    images, labels = draw_signs(np.random.default_rng(0), 1000)
    return np.concatenate([images[np.flatnonzero(labels == label)[0]] for label in range(len(SIGNS))], axis=1)


def draw_golden() -> None:
    Image.fromarray(first_of_each_class()).save(GOLDEN)


def test_the_set_has_named_classes_and_images_of_the_promised_form(task: Task) -> None:
    chex.assert_shape(task.train.images, (6000, 32, 32, 3))
    chex.assert_shape(task.test.images, (2000, 32, 32, 3))
    chex.assert_type([task.train.images, task.train.labels], [np.uint8, np.int32])
    assert task.num_classes == len(SIGNS) == len(set(task.class_names or ())) == 16
    assert task.class_names == tuple(sign.name for sign in SIGNS)
    assert (task.name, task.normalization, task.flip) == ("signs", "none", False)


def test_classes_are_as_frequent_as_their_records_say(task: Task) -> None:
    expected = np.array([sign.frequency for sign in SIGNS], float)
    expected /= expected.sum()
    assert expected.max() == pytest.approx(8 * expected.min())
    for data in (task.train, task.test):
        counts = np.bincount(data.labels, minlength=len(SIGNS))
        deviations = np.sqrt(len(data) * expected * (1 - expected))
        assert (abs(counts - len(data) * expected) < 4 * deviations).all()
        assert counts.min() > 20


def test_images_use_the_range_of_pixels_and_differ(task: Task) -> None:
    images = np.asarray(task.train.images)
    assert (images.min(), images.max()) == (0, 255)
    assert 90 < images.mean() < 150
    assert images.std(axis=(1, 2, 3)).min() > 5
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_faces_have_their_colors(task: Task) -> None:
    """Near the middle, where the glyph is not: a blue face is blue, a red one red, on the average."""
    near = np.asarray(task.train.images, float)[:, 10:14, 10:14].mean(axis=(1, 2))
    labels = np.asarray(task.train.labels)
    for label, sign in enumerate(SIGNS):
        seen, painted = near[labels == label].mean(axis=0), np.array(sign.face)
        if np.ptp(painted) > 0.5 and sign.corners != 3:
            assert np.argmax(seen) == np.argmax(painted)
            assert np.argmin(seen) == np.argmin(painted)


def test_a_key_draws_the_same_images_again_and_another_key_others(task: Task) -> None:
    again, same, other = signs(jax.random.key(0)), load("signs"), signs(jax.random.key(1))
    np.testing.assert_array_equal(again.train.images, task.train.images)
    np.testing.assert_array_equal(same.test.labels, task.test.labels)
    assert not np.array_equal(other.train.labels, task.train.labels)
    assert (np.asarray(other.train.images) != np.asarray(task.train.images)).mean() > 0.9


def test_the_first_images_are_the_same_however_many_are_drawn() -> None:
    few, many = (draw_signs(np.random.default_rng(3), count) for count in (250, 600))
    np.testing.assert_array_equal(few[0], many[0][:250])
    np.testing.assert_array_equal(few[1], many[1][:250])


def test_the_images_are_those_that_were_committed() -> None:
    """Up to one level: processors round sums and exponentials differently."""
    with Image.open(GOLDEN) as golden:
        committed = np.asarray(golden).astype(int)
    assert abs(first_of_each_class() - committed).max() <= 1
