"""BadNets and Blended against NumPy definitions written apart, and what every attack promises."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoor_jax import ATTACKS, Attack, BadNets, Blended, Classifier, Dataset, Scene, UserError
from backdoor_jax.attacks import random_pattern
from backdoor_jax.models import Variables

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
SHAPES = st.sampled_from([(8, 8, 3), (8, 10, 1), (9, 7, 3)])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def stamped(images: np.ndarray, patch: np.ndarray, corner: str) -> np.ndarray:
    """Images with a square patch pasted into a corner."""
    images, (side, _) = images.copy(), patch.shape
    rows = slice(0, side) if "top" in corner else slice(images.shape[1] - side, None)
    columns = slice(0, side) if "left" in corner else slice(images.shape[2] - side, None)
    images[:, rows, columns] = patch[None, :, :, None]
    return images


@given(shape=SHAPES, size=st.integers(1, 7), corner=st.sampled_from(CORNERS))
def test_badnets_pastes_a_white_square_into_its_corner(shape: tuple[int, int, int], size: int, corner: Any) -> None:
    images = noise(3, *shape)
    out = BadNets(size=size, corner=corner).trigger(jax.random.key(0), shape)(jnp.asarray(images))
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out, stamped(images, np.full((size, size), 255, np.uint8), corner))


def test_badnets_at_its_defaults_is_the_published_trigger(key: jax.Array) -> None:
    images = noise(2, 32, 32, 3)
    want = images.copy()
    want[:, 29:, 29:] = 255
    np.testing.assert_array_equal(BadNets().trigger(key, (32, 32, 3))(jnp.asarray(images)), want)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("shape", [(32, 32, 3), (31, 32, 3)])
def test_the_checker_patch_is_the_published_grid_wherever_it_lies(
    key: jax.Array, corner: Any, shape: tuple[int, int, int]
) -> None:
    images = noise(2, *shape)
    grid = np.array([[255, 1, 255], [1, 255, 1], [255, 1, 255]], np.uint8)
    out = BadNets(style="checker", corner=corner).trigger(key, shape)(jnp.asarray(images))
    np.testing.assert_array_equal(out, stamped(images, grid, corner))


def test_a_patch_larger_than_the_image_is_refused_and_one_as_large_is_not(key: jax.Array) -> None:
    assert np.all(np.asarray(BadNets(size=6).trigger(key, (6, 6, 3))(jnp.zeros((1, 6, 6, 3), jnp.uint8))) == 255)
    with pytest.raises(UserError, match=r"BadNets\.size is 7, larger than the 8x6 images; make it smaller"):
        BadNets(size=7).trigger(key, (8, 6, 3))


def assert_blended(out: Any, images: np.ndarray, picture: np.ndarray, alpha: float) -> None:
    """The truncated mixture; where it falls on a whole number, float32 may round to either side."""
    exact = np.clip((1 - alpha) * images.astype(np.float64) + alpha * picture.astype(np.float64), 0, 255)
    low, high = np.floor(exact - 1e-3), np.floor(exact + 1e-3)
    out = np.asarray(out, np.float64)
    assert np.all((out >= np.maximum(low, 0)) & (out <= high))


@given(shape=SHAPES, alpha=st.floats(0.01, 1.0), seed=st.integers(0, 3))
def test_blended_is_the_truncated_mixture_with_its_pattern(
    shape: tuple[int, int, int], alpha: float, seed: int
) -> None:
    images = noise(3, *shape)
    trigger = Blended(alpha=alpha).trigger(jax.random.key(seed), shape)
    out = trigger(jnp.asarray(images))
    assert out.shape == images.shape and out.dtype == jnp.uint8
    assert_blended(out, images, np.asarray(trigger.pattern), alpha)
    assert np.all(np.asarray(out) + 1.0 >= np.minimum(images, trigger.pattern))
    assert np.all(np.asarray(out) <= np.maximum(images, trigger.pattern) + 1e-3)


@pytest.mark.parametrize("shape", [(8, 8, 3), (16, 12, 1), (32, 32, 3)])
def test_the_random_pattern_spans_the_range_in_every_channel(key: jax.Array, shape: tuple[int, int, int]) -> None:
    pattern = np.asarray(random_pattern(key, shape))
    assert pattern.shape == shape
    np.testing.assert_allclose(pattern.min((0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(pattern.max((0, 1)), 255, rtol=1e-5)


def test_a_picture_of_ones_own_is_blended_as_it_is(tmp_path: Path, key: jax.Array) -> None:
    from PIL import Image

    picture, images = noise(8, 10, 3), noise(3, 8, 10, 3)
    Image.fromarray(picture).save(tmp_path / "mine.png")
    attack = Blended(alpha=0.3, image=str(tmp_path / "mine.png"))
    assert_blended(attack.trigger(key, (8, 10, 3))(jnp.asarray(images)), images, picture, 0.3)
    opaque = Blended(alpha=1.0, image=str(tmp_path / "mine.png")).trigger(key, (8, 10, 3))
    np.testing.assert_array_equal(opaque(jnp.asarray(images)), np.broadcast_to(picture, images.shape))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 1)])
def test_a_picture_of_any_size_and_mode_is_fitted_to_the_data(
    tmp_path: Path, key: jax.Array, mode: str, shape: tuple[int, int, int]
) -> None:
    from PIL import Image

    halves = np.zeros((30, 40), np.uint8)
    halves[:, 20:] = 200
    Image.fromarray(halves).convert(mode).save(tmp_path / "mine.png")
    pattern = np.asarray(Blended(image=str(tmp_path / "mine.png")).trigger(key, shape).pattern)
    assert pattern.shape == shape
    assert np.all(pattern[:, :3] == 0) and np.all(pattern[:, -3:] == 200)


def test_an_unreadable_picture_is_refused(tmp_path: Path, key: jax.Array) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "absent.png", tmp_path):
        with pytest.raises(UserError, match=f"Blended.image '{path}' cannot be read as a picture"):
            Blended(image=str(path)).trigger(key, (8, 8, 3))


STAMPED = sorted({*ATTACKS} - {"label_consistent", "adap_blend"})
"""The attacks that poison by stamping their trigger; the other two have tests of their own."""


@pytest.fixture(scope="module")
def scene(tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables) -> Scene:
    return Scene(tiny_classifier, tiny_data, clean_model=tiny_variables)


SMALL: dict[str, dict[str, Any]] = {
    "sig": {"labels": "all_to_one"},
    "wanet": {"cross_ratio": 0.0},
    "input_aware": {"channels": 2, "depth": 1},
    "lira": {"channels": 2, "depth": 1, "epsilon": 0.5},
    "ssba": {"channels": 2, "depth": 1, "epochs": 1, "bits": 4},
    "low_frequency": {"steps": 2, "cutoff": 4},
    "trojan_nn": {"steps": 3},
    "label_consistent": {"steps": 2, "rate": 0.25},
    "adap_blend": {"cover_rate": 0.25, "alpha": 0.5},
}
"""Settings that make each attack quick on 24 images of 8x8."""


def small(name: str, **settings: Any) -> Attack:
    return ATTACKS[name](**{"rate": 0.5, **SMALL.get(name, {}), **settings})


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_made_by_its_key_alone(name: str, scene: Scene, tiny_data: Dataset) -> None:
    attack = small(name)
    first, again, other = (attack.poison(jax.random.key(seed), scene) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first[0], again[0])
    chex.assert_trees_all_equal(first[1](tiny_data.images), again[1](tiny_data.images))
    assert first[0].indices.tolist() != other[0].indices.tolist()


def test_a_blended_pattern_is_drawn_from_the_key_of_the_poisoning(scene: Scene) -> None:
    patterns = [np.asarray(Blended().poison(jax.random.key(seed), scene)[1].pattern) for seed in (0, 1)]
    assert np.mean(np.abs(patterns[0] - patterns[1])) > 10


@pytest.mark.parametrize("name", STAMPED)
@pytest.mark.parametrize("labels", ["all_to_one", "all_to_all"])
def test_a_poisoned_set_holds_triggered_images_under_the_attackers_labels(
    name: str, labels: Any, scene: Scene, tiny_data: Dataset, key: jax.Array
) -> None:
    attack = small(name, rate=0.25, labels=labels, target=2)
    (poisoned, indices), trigger, _ = attack.poison(key, scene)
    assert len(indices) == 6
    want_images, want_labels = np.array(tiny_data.images), np.array(tiny_data.labels)
    want_images[indices] = np.asarray(trigger(tiny_data.images))[indices]
    want_labels[indices] = 2 if labels == "all_to_one" else (want_labels[indices] + 1) % 3
    np.testing.assert_array_equal(poisoned.images, want_images)
    np.testing.assert_array_equal(poisoned.labels, want_labels)
    assert np.all(np.any(want_images != np.asarray(tiny_data.images), axis=(1, 2, 3)) == np.isin(range(24), indices))


@pytest.mark.parametrize("attacks", [(BadNets(size=2), BadNets(size=3)), (Blended(alpha=0.1), Blended(alpha=0.3))])
def test_triggers_are_arguments_of_compiled_code(attacks: tuple[Attack, Attack], tiny_data: Dataset) -> None:
    chex.clear_trace_counter()
    apply = jax.jit(chex.assert_max_traces(lambda trigger, images: trigger(images), n=1))
    for seed, attack in enumerate(attacks):
        trigger = attack.trigger(jax.random.key(seed), (8, 8, 3))
        got, want = (np.asarray(out, int) for out in (apply(trigger, tiny_data.images), trigger(tiny_data.images)))
        assert np.abs(got - want).max() <= 1  # Compiled, a mixture may fall on the other side of a whole number.
        assert np.mean(got != want) < 0.01


@pytest.mark.parametrize(
    ("attack", "fields", "field"),
    [
        (BadNets, {"size": 0}, "size"),
        (BadNets, {"rate": 0.0}, "rate"),
        (BadNets, {"rate": 1.5}, "rate"),
        (BadNets, {"target": -1}, "target"),
        (BadNets, {"style": "grey"}, "style"),
        (BadNets, {"corner": "middle"}, "corner"),
        (BadNets, {"labels": "some_to_one"}, "labels"),
        (Blended, {"alpha": 0.0}, "alpha"),
        (Blended, {"alpha": 1.5}, "alpha"),
        (Blended, {"rate": float("nan")}, "rate"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(attack: type[Attack], fields: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"{attack.__name__}.{field} is .*expected"):
        attack(**fields)


def test_a_target_that_the_data_do_not_have_is_refused(key: jax.Array, scene: Scene) -> None:
    with pytest.raises(UserError, match="target class 3 does not exist; the data have classes 0 to 2"):
        BadNets(target=3).poison(key, scene)
