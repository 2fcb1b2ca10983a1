"""BadNets, Blended and SIG against independent NumPy definitions, and what holds for every attack."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal
from hypothesis import given
from hypothesis import strategies as st

from backdoor_jax import Classifier, Dataset, TrainConfig, UserError, train
from backdoor_jax.attacks import (
    ATTACKS,
    SIG,
    AdapBlend,
    Attack,
    AttackContext,
    BadNets,
    Blended,
    LabelConsistent,
    LowFrequency,
    random_pattern,
)
from backdoor_jax.attacks.triggers import BlendTrigger
from backdoor_jax.data import LabelMap, poison
from backdoor_jax.interop.checkpoints import load_tree, save_tree
from backdoor_jax.models import Variables

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
SHAPES = st.sampled_from([(8, 8, 3), (8, 10, 1), (9, 7, 3)])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def with_patch(images: np.ndarray, patch: np.ndarray, corner: str) -> np.ndarray:
    """Images with a square patch pasted into a corner."""
    images, (side, _) = images.copy(), patch.shape
    rows = slice(0, side) if "top" in corner else slice(images.shape[1] - side, None)
    columns = slice(0, side) if "left" in corner else slice(images.shape[2] - side, None)
    images[:, rows, columns] = patch[None, :, :, None]
    return images


@given(shape=SHAPES, size=st.integers(1, 7), corner=st.sampled_from(CORNERS))
def test_badnets_puts_a_white_square_into_the_corner(shape: tuple[int, int, int], size: int, corner: Any) -> None:
    images = noise(3, *shape)
    out = BadNets(size=size, corner=corner).trigger(jax.random.key(0), shape)(jnp.asarray(images))
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out, with_patch(images, np.full((size, size), 255, np.uint8), corner))


def test_the_badnets_defaults_are_the_published_trigger(key: jax.Array) -> None:
    images = noise(2, 32, 32, 3)
    expected = images.copy()
    expected[:, 29:, 29:] = 255
    np.testing.assert_array_equal(BadNets().trigger(key, (32, 32, 3))(jnp.asarray(images)), expected)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("shape", [(32, 32, 3), (31, 32, 3)])
def test_the_checker_patch_is_the_published_grid_in_every_corner(
    key: jax.Array, corner: Any, shape: tuple[int, int, int]
) -> None:
    images = noise(2, *shape)
    grid = np.array([[255, 1, 255], [1, 255, 1], [255, 1, 255]], np.uint8)
    out = BadNets(style="checker", corner=corner).trigger(key, shape)(jnp.asarray(images))
    np.testing.assert_array_equal(out, with_patch(images, grid, corner))


def test_a_patch_may_be_as_large_as_the_image_but_not_larger(key: jax.Array) -> None:
    assert np.all(np.asarray(BadNets(size=6).trigger(key, (6, 6, 3))(jnp.zeros((1, 6, 6, 3), jnp.uint8))) == 255)
    with pytest.raises(UserError, match=r"BadNets\.size is 7, larger than the 8x6 images; make it smaller"):
        BadNets(size=7).trigger(key, (8, 6, 3))
    with pytest.raises(UserError, match=r"BadNets\.size is 6 with a border of 1, larger than the 8x6 images"):
        BadNets(size=6, border=1).trigger(key, (8, 6, 3))


def test_the_patch_of_bad_encoder_covers_rows_and_columns_21_to_30() -> None:
    trigger = BadNets(size=10, border=1).trigger(jax.random.key(0), (32, 32, 3))
    lit = np.asarray(trigger(jnp.zeros((1, 32, 32, 3), jnp.uint8)))[0, ..., 0]
    expected = np.zeros((32, 32))
    expected[21:31, 21:31] = 255
    np.testing.assert_array_equal(lit, expected)


def assert_truncated(out: Any, exact: np.ndarray) -> None:
    """Truncated to integers and clipped; where a value is nearly an integer, float32 may fall on either side."""
    low, high = np.floor(exact - 1e-3), np.floor(exact + 1e-3)
    assert np.asarray(out).dtype == np.uint8
    out = np.asarray(out, np.float64)
    assert np.all((out >= np.clip(low, 0, 255)) & (out <= np.clip(high, 0, 255)))


def assert_blended(out: Any, images: np.ndarray, picture: np.ndarray, alpha: float) -> None:
    assert_truncated(out, (1 - alpha) * images.astype(np.float64) + alpha * picture.astype(np.float64))


@given(shape=SHAPES, alpha=st.floats(0.01, 1.0), seed=st.integers(0, 3))
def test_blended_is_the_truncated_mixture_of_image_and_pattern(
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
def test_the_random_pattern_spans_0_to_255_in_every_channel(key: jax.Array, shape: tuple[int, int, int]) -> None:
    pattern = np.asarray(random_pattern(key, shape))
    assert pattern.shape == shape
    np.testing.assert_allclose(pattern.min((0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(pattern.max((0, 1)), 255, rtol=1e-5)


def test_a_custom_picture_of_the_right_size_is_blended_unchanged(tmp_path: Path, key: jax.Array) -> None:
    from PIL import Image

    picture, images = noise(8, 10, 3), noise(3, 8, 10, 3)
    Image.fromarray(picture).save(tmp_path / "custom.png")
    attack = Blended(alpha=0.3, image=str(tmp_path / "custom.png"))
    assert_blended(attack.trigger(key, (8, 10, 3))(jnp.asarray(images)), images, picture, 0.3)
    opaque = Blended(alpha=1.0, image=str(tmp_path / "custom.png")).trigger(key, (8, 10, 3))
    np.testing.assert_array_equal(opaque(jnp.asarray(images)), np.broadcast_to(picture, images.shape))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 1)])
def test_a_custom_picture_of_any_size_and_mode_is_resized_to_the_data(
    tmp_path: Path, key: jax.Array, mode: str, shape: tuple[int, int, int]
) -> None:
    from PIL import Image

    halves = np.zeros((30, 40), np.uint8)
    halves[:, 20:] = 200
    Image.fromarray(halves).convert(mode).save(tmp_path / "custom.png")
    pattern = np.asarray(Blended(image=str(tmp_path / "custom.png")).trigger(key, shape).pattern)
    assert pattern.shape == shape
    assert np.all(pattern[:, :3] == 0) and np.all(pattern[:, -3:] == 200)


def test_an_unreadable_picture_is_an_error(tmp_path: Path, key: jax.Array) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    for path in (tmp_path / "text.png", tmp_path / "absent.png", tmp_path):
        with pytest.raises(UserError, match=f"Blended.image cannot be read as a picture: {path}: "):
            Blended(image=str(path)).trigger(key, (8, 8, 3))


@given(shape=SHAPES, delta=st.floats(1, 200), frequency=st.sampled_from([1.0, 2.5, 6.0]))
def test_sig_adds_a_sine_wave_over_the_columns(shape: tuple[int, int, int], delta: float, frequency: float) -> None:
    images = noise(3, *shape)
    out = SIG(delta=delta, frequency=frequency).trigger(jax.random.key(0), shape)(jnp.asarray(images))
    expected = images.astype(np.float64)
    for column in range(shape[1]):
        expected[:, :, column] += delta * np.sin(2 * np.pi * column * frequency / shape[1])
    assert out.shape == images.shape
    assert_truncated(out, expected)


def test_the_sig_defaults_are_the_published_attack() -> None:
    attack = SIG()
    assert (attack.delta, attack.frequency, attack.labels, attack.rate) == (40.0, 6.0, "clean_label", 0.1)


TRIGGERED = sorted({*ATTACKS} - {"label_consistent", "adap_blend"})
"""The attacks that poison by triggering and relabeling images; the other two have their own tests."""


@pytest.fixture(scope="module")
def context(tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables) -> AttackContext:
    return AttackContext(tiny_classifier, tiny_data, clean_model=tiny_variables)


SMALL: dict[str, dict[str, Any]] = {
    "sig": {"labels": "all_to_one"},
    "wanet": {"cross_ratio": 0.0},
    "input_aware": {"channels": 2, "depth": 1},
    "lira": {"channels": 2, "depth": 1, "epsilon": 0.5},
    "ssba": {"channels": 2, "depth": 1, "epochs": 2, "bits": 4},
    "low_frequency": {"steps": 2, "cutoff": 4},
    "trojan_nn": {"steps": 3},
    "label_consistent": {"robust_epochs": 1, "steps": 2, "rate": 0.25},
    "adap_blend": {"cover_rate": 0.25, "alpha": 0.5},
}
"""Settings that make each attack quick on 24 images of 8x8."""


def small(name: str, **settings: Any) -> Attack:
    return ATTACKS[name](**{"rate": 0.5, **SMALL.get(name, {}), **settings})


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_depends_on_its_key_only(name: str, context: AttackContext, tiny_data: Dataset) -> None:
    attack = small(name)
    first, again, other = (attack.poison(jax.random.key(seed), context) for seed in (0, 0, 1))
    assert_trees_equal(first[0], again[0])
    assert_trees_equal(first[1](tiny_data.images), again[1](tiny_data.images))
    assert first[0].indices.tolist() != other[0].indices.tolist()


def test_a_blended_pattern_depends_on_the_key_of_the_poisoning(context: AttackContext) -> None:
    one, other = (Blended().poison(jax.random.key(seed), context)[1] for seed in (0, 1))
    assert isinstance(one, BlendTrigger) and isinstance(other, BlendTrigger)
    assert float(jnp.mean(jnp.abs(one.pattern - other.pattern))) > 10


@pytest.mark.parametrize("name", TRIGGERED)
@pytest.mark.parametrize("labels", ["all_to_one", "all_to_all"])
def test_a_poisoned_set_has_triggered_images_with_the_attackers_labels(
    name: str, labels: Any, context: AttackContext, tiny_data: Dataset, key: jax.Array
) -> None:
    attack = small(name, rate=0.25, labels=labels, target=2)
    (poisoned, indices), trigger, _ = attack.poison(key, context)
    assert len(indices) == 6
    expected_images, expected_labels = np.array(tiny_data.images), np.array(tiny_data.labels)
    expected_images[indices] = np.asarray(trigger(tiny_data.images))[indices]
    expected_labels[indices] = 2 if labels == "all_to_one" else (expected_labels[indices] + 1) % 3
    np.testing.assert_array_equal(poisoned.images, expected_images)
    np.testing.assert_array_equal(poisoned.labels, expected_labels)
    changed = np.any(expected_images != np.asarray(tiny_data.images), axis=(1, 2, 3))
    assert np.all(changed == np.isin(range(24), indices))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_trigger_keeps_shape_and_type_and_treats_every_image_alone(name: str, key: jax.Array) -> None:
    trigger, images = small(name).trigger(key, (9, 7, 1)), jnp.asarray(noise(4, 9, 7, 1))
    apply = jax.jit(lambda trigger, images: trigger(images))
    out, beside_others = apply(trigger, images), apply(trigger, images.at[2:].set(0))
    assert out.shape == images.shape and out.dtype == jnp.uint8
    np.testing.assert_array_equal(out[:2], beside_others[:2])


@pytest.mark.parametrize("name", sorted(name for name in ATTACKS if small(name).fits_trigger))
def test_a_fitted_trigger_is_saved_and_loaded_unchanged(
    name: str, key: jax.Array, tiny_data: Dataset, tmp_path: Path
) -> None:
    attack = small(name)
    trigger = attack.trigger(key, (8, 8, 3))
    save_tree(tmp_path / "trigger", trigger)
    like = jax.eval_shape(lambda key: attack.trigger(key, (8, 8, 3)), jax.random.key(7))
    loaded = load_tree(tmp_path / "trigger", like)
    assert type(loaded) is type(trigger)
    assert_trees_equal(loaded, trigger)
    np.testing.assert_array_equal(loaded(tiny_data.images), trigger(tiny_data.images))


# What attacks declare


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_declares_what_it_overrides(name: str) -> None:
    kind = ATTACKS[name]

    def overrides(method: str) -> bool:
        return getattr(kind, method) is not getattr(Attack, method)

    assert kind.name == name
    assert kind.trains_victim == overrides("train_victim_in")
    # A trigger or poisoned images that are expensive to make are stored; AdapBlend's and WaNet's are cheap.
    if overrides("fit_trigger") or overrides("poison"):
        assert kind.fits_trigger
    if kind.fits_trigger:
        assert any(map(overrides, ("fit_trigger", "poison", "poison_data", "train_victim_in")))


def test_which_attacks_need_a_clean_model() -> None:
    assert {name for name, kind in ATTACKS.items() if kind().needs_clean_model} == {
        "label_consistent", "low_frequency", "trojan_nn",
    }  # fmt: skip
    assert not LowFrequency(pattern="saved.npy").needs_clean_model


# Triggers in compiled code


@pytest.mark.parametrize("attacks", [(BadNets(size=2), BadNets(size=3)), (Blended(alpha=0.1), Blended(alpha=0.3))])
def test_triggers_are_arguments_of_compiled_code(attacks: tuple[Attack, Attack], tiny_data: Dataset) -> None:
    chex.clear_trace_counter()
    apply = jax.jit(chex.assert_max_traces(lambda trigger, images: trigger(images), n=1))
    for seed, attack in enumerate(attacks):
        trigger = attack.trigger(jax.random.key(seed), (8, 8, 3))
        got, expected = (np.asarray(out, int) for out in (apply(trigger, tiny_data.images), trigger(tiny_data.images)))
        assert np.abs(got - expected).max() <= 1  # In compiled code a mixture may fall on the other side of an integer.
        assert np.mean(got != expected) < 0.01


@pytest.mark.parametrize(
    ("attack", "fields", "field"),
    [
        (BadNets, {"size": 0}, "size"),
        (BadNets, {"rate": 0.0}, "rate"),
        (BadNets, {"rate": 1.5}, "rate"),
        (BadNets, {"target": -1}, "target"),
        (BadNets, {"style": "gray"}, "style"),
        (BadNets, {"corner": "middle"}, "corner"),
        (BadNets, {"labels": "some_to_one"}, "labels"),
        (AdapBlend, {"labels": "clean_label"}, "labels"),
        (LabelConsistent, {"labels": "all_to_one"}, "labels"),
        (Blended, {"alpha": 0.0}, "alpha"),
        (Blended, {"alpha": 1.5}, "alpha"),
        (Blended, {"rate": float("nan")}, "rate"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(
    attack: type[Attack], fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(UserError, match=f"{attack.__name__}.{field} is .*expected"):
        attack(**fields)


def test_a_target_class_that_does_not_exist_is_an_error(key: jax.Array, context: AttackContext) -> None:
    with pytest.raises(UserError, match="target class 3 does not exist; the data have classes 0 to 2"):
        BadNets(target=3).poison(key, context)


# The short form


TRAINING = TrainConfig(epochs=1, batch_size=8, crop=0)


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_the_short_form_equals_the_long_one_with_the_split_keys(
    name: str, tiny_classifier: Classifier, tiny_data: Dataset, key: jax.Array
) -> None:
    attack = small(name)
    victim = attack.train_victim(key, tiny_classifier, tiny_data, TRAINING, flip=True)
    poison_key, train_key, _ = jax.random.split(key, 3)
    context = AttackContext(tiny_classifier, tiny_data, TRAINING, flip=True)
    expected = attack.train_victim_in(context, poison_key, train_key)
    assert_trees_equal(victim[:3], expected[:3])
    assert victim.info == expected.info


def test_the_short_form_trains_the_clean_model_that_an_attack_needs(
    tiny_classifier: Classifier, tiny_data: Dataset, key: jax.Array
) -> None:
    attack = small("trojan_nn")
    victim = attack.train_victim(key, tiny_classifier, tiny_data, TRAINING)
    poison_key, train_key, clean_key = jax.random.split(key, 3)
    clean_model = train(clean_key, tiny_classifier, tiny_data, TRAINING).variables
    context = AttackContext(tiny_classifier, tiny_data, TRAINING, clean_model=clean_model)
    expected = attack.train_victim_in(context, poison_key, train_key)
    assert_trees_equal(victim[:3], expected[:3])
    assert victim.info == expected.info

    given = attack.train_victim(key, tiny_classifier, tiny_data, TRAINING, clean_model=clean_model)
    assert_trees_equal(given[:3], expected[:3])


# Rates and clean labels


WHITE = BadNets(size=1).trigger(jax.random.key(0), (2, 2, 1))


def counted(*counts: int) -> Dataset:
    """Black 2x2 images, with these numbers of images in each class, in random order."""
    labels = np.concatenate([np.full(count, number) for number, count in enumerate(counts)])
    labels = np.random.default_rng(0).permutation(labels)
    return Dataset(jnp.zeros((len(labels), 2, 2, 1), jnp.uint8), jnp.asarray(labels, jnp.int32))


@pytest.mark.parametrize(("rate", "count"), [(0.001, 1), (0.0026, 3), (0.1, 100), (0.5, 500), (1.0, 1000)])
def test_a_rate_is_a_share_of_all_training_images(rate: float, count: int, key: jax.Array) -> None:
    data = counted(300, 300, 400)
    poisoned = poison(key, data, WHITE, LabelMap("all_to_one", 3, 1), rate)
    white = np.flatnonzero(np.asarray(poisoned.data.images).any((1, 2, 3)))
    assert white.tolist() == poisoned.indices.tolist() and len(white) == count
    assert np.all(np.asarray(poisoned.data.labels)[white] == 1)


def test_a_rate_that_poisons_nothing_is_an_error_that_names_one_that_does(key: jax.Array) -> None:
    data, labels = counted(300, 300, 400), LabelMap("all_to_one", 3)
    with pytest.raises(UserError, match=r"rate 0\.0004 of 1000 images poisons none; give at least 0\.001"):
        poison(key, data, WHITE, labels, 0.0004)
    assert len(poison(key, data, WHITE, labels, 0.001).indices) == 1


def test_images_are_drawn_uniformly_from_the_candidates(key: jax.Array) -> None:
    data, candidates = counted(100, 100), np.arange(50, 90, 2)
    drawn = [
        poison(k, data, WHITE, LabelMap("all_to_one", 2), 0.05, candidates).indices for k in jax.random.split(key, 40)
    ]
    assert all(len(set(indices)) == 10 and np.all(np.diff(indices) > 0) for indices in drawn)
    times = np.bincount(np.concatenate(drawn), minlength=200)
    assert set(np.flatnonzero(times)) == set(candidates)
    # Each is drawn in half of the 40, up to five standard deviations.
    assert np.all(np.abs(times[candidates] - 20) < 5 * np.sqrt(10))


@pytest.mark.parametrize("kind", [BadNets, Blended, SIG])
def test_under_clean_labels_only_the_target_class_is_poisoned_and_keeps_its_label(
    kind: type[Attack], context: AttackContext, tiny_data: Dataset, key: jax.Array
) -> None:
    attack = kind(labels="clean_label", target=2, rate=0.25)
    poisoned, trigger, _ = attack.poison(key, context)
    labels = np.asarray(tiny_data.labels)
    assert attack.candidates(labels).tolist() == np.flatnonzero(labels == 2).tolist()
    assert len(poisoned.indices) == 6 and np.all(labels[poisoned.indices] == 2)
    np.testing.assert_array_equal(poisoned.data.labels, labels)
    expected = np.array(tiny_data.images)
    expected[poisoned.indices] = np.asarray(trigger(tiny_data.images))[poisoned.indices]
    np.testing.assert_array_equal(poisoned.data.images, expected)
    # At test time every image should be assigned to the target.
    assert attack.label_map(3) == LabelMap("all_to_one", 3, 2)


@pytest.mark.parametrize("labels", ["all_to_one", "all_to_all"])
def test_under_other_labels_every_image_is_a_candidate(labels: Any) -> None:
    attack = SIG(labels=labels, target=1, rate=0.5)
    assert attack.candidates(np.array([0, 1, 2, 1])).tolist() == [0, 1, 2, 3]
    assert attack.label_map(3) == LabelMap(labels, 3, 1)


@given(size=st.integers(2, 300_000), data=st.data())
def test_a_rate_larger_than_the_target_class_is_an_error_that_names_the_largest(size: int, data: Any) -> None:
    own = data.draw(st.integers(1, size - 1))
    labels = np.where(np.arange(size) < own, 3, 0)
    kind = data.draw(st.sampled_from([SIG, LabelConsistent]))
    with pytest.raises(UserError) as caught:
        kind(rate=1.0, target=3).candidates(labels)
    start = (
        f"{kind.__name__}.rate is 1.0, but with clean labels only the {own} of {size} images in target class 3 can be "
    )
    message, largest = str(caught.value).split("poisoned; give at most ")
    assert message == start
    rate = float(largest)
    assert len(kind(rate=rate, target=3).candidates(labels)) == own
    assert round(rate * size) == own
    with pytest.raises(UserError):
        kind(rate=(own + 0.51) / size, target=3).candidates(labels)


def test_ten_percent_under_clean_labels_needs_a_class_of_that_size(key: jax.Array) -> None:
    data = counted(7, 20, 73)
    context = AttackContext(Classifier(None, 3, (0.0,), (1.0,)), data)
    with pytest.raises(
        UserError, match=r"only the 7 of 100 images in target class 0 can be poisoned; give at most 0\.07$"
    ):
        SIG(rate=0.1).poison(key, context)
    assert len(SIG(rate=0.07).poison(key, context)[0].indices) == 7
    assert len(SIG(rate=0.1, target=1).poison(key, context)[0].indices) == 10


def test_a_target_class_without_images_is_an_error(key: jax.Array) -> None:
    with pytest.raises(
        UserError, match="only the 0 of 20 images in target class 1 can be poisoned; choose another target"
    ):
        SIG(rate=0.1, target=1).candidates(counted(20).labels)


def test_a_cover_rate_that_covers_nothing_is_an_error_before_anything_is_made() -> None:
    labels = counted(100, 100).labels
    assert len(AdapBlend(rate=0.1, cover_rate=0.0).candidates(labels)) == 200
    with pytest.raises(UserError, match=r"rate 0\.001 of 200 images poisons none"):
        AdapBlend(rate=0.1, cover_rate=0.001).candidates(labels)
