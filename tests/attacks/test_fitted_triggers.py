"""Attacks that train a trigger, use a clean model or poison in their own way, against their definitions in NumPy."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft, ndimage

from backdoor_jax import Classifier, Dataset, TrainConfig, UserError, build_classifier, train
from backdoor_jax.attacks import (
    LIRA,
    SSBA,
    AdapBlend,
    AttackContext,
    InputAware,
    LabelConsistent,
    LowFrequency,
    TrojanNN,
    input_aware,
    lira,
    ssba,
)
from backdoor_jax.attacks.label_consistent import perturb, robust_loss
from backdoor_jax.attacks.low_frequency import smooth_pattern
from backdoor_jax.attacks.networks import EncoderDecoder
from backdoor_jax.attacks.triggers import AdditiveTrigger, BlendTrigger
from backdoor_jax.data import LabelMap
from backdoor_jax.models import Variables
from backdoor_jax.models.joint import init, join
from backdoor_jax.training import LossResult


@pytest.fixture(scope="module")
def context(tiny_classifier: Classifier, tiny_data: Dataset) -> AttackContext:
    """With an accurate clean model."""
    config = TrainConfig(epochs=40, batch_size=24, learning_rate=0.2, crop=0)
    trained = train(jax.random.key(0), tiny_classifier, tiny_data, config)
    assert trained.history["accuracy"][-1] > 0.9
    return AttackContext(tiny_classifier, tiny_data, clean_model=trained.variables)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def losses(context: AttackContext, images: Any, labels: Any) -> np.ndarray:
    """The clean model's cross-entropies in NumPy."""
    assert context.clean_model is not None
    logits = np.asarray(context.classifier.logits(context.clean_model, jnp.asarray(images))[0], np.float64)
    return cross_entropies(logits, np.asarray(labels))


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]


# The parts of networks in SciPy, for one image or its feature maps ``(H, W, channels)``


def convolved(variables: Variables, name: str, maps: np.ndarray, stride: int = 1) -> np.ndarray:
    kernel = np.asarray(variables["params"][name]["kernel"], np.float64)
    filters = [
        sum(ndimage.correlate(maps[..., c], kernel[..., c, f], mode="constant") for c in range(kernel.shape[2]))
        for f in range(kernel.shape[3])
    ]
    return np.stack(filters, -1)[::stride, ::stride]


def scipy_block(variables: Variables, conv: str, norm: str, maps: np.ndarray, stride: int = 1) -> np.ndarray:
    """Convolution, normalization by the running statistics, rectifier."""
    leaves = variables["params"][norm] | variables["batch_stats"][norm]
    values = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    maps = (convolved(variables, conv, maps, stride) - values["mean"]) / np.sqrt(values["var"] + 1e-5)
    return np.maximum(maps * values["scale"] + values["bias"], 0)


def resized(maps: np.ndarray, height: int, width: int, order: int) -> np.ndarray:
    """The nearest pixel (order 0), or bilinear interpolation between the centers of pixels (1)."""
    sizes = zip((height, width), maps.shape, strict=False)
    places = np.meshgrid(*[(np.arange(new) + 0.5) * old / new - 0.5 for new, old in sizes], indexing="ij")
    return np.stack(
        [ndimage.map_coordinates(m, places, order=order, mode="nearest") for m in np.moveaxis(maps, -1, 0)], -1
    )


def scipy_u_net(variables: Variables, maps: np.ndarray, depth: int) -> np.ndarray:
    numbers = itertools.count()

    def block(maps: np.ndarray, stride: int = 1) -> np.ndarray:
        number = next(numbers)
        return scipy_block(variables, f"Conv_{number}", f"BatchNorm_{number}", maps, stride)

    levels = []
    for _ in range(depth):
        levels.append(block(maps))
        maps = block(levels[-1], 2)
    maps = block(maps)
    for across in reversed(levels):
        maps = block(np.concatenate([resized(maps, across.shape[0], across.shape[1], order=1), across], -1))
    return convolved(variables, f"Conv_{next(numbers)}", maps)


def numpy_dense(variables: Variables, inputs: np.ndarray) -> np.ndarray:
    layer = {name: np.asarray(leaf, np.float64) for name, leaf in variables["params"]["Dense_0"].items()}
    return inputs @ layer["kernel"] + layer["bias"]


# Attacks that use a clean model


@pytest.mark.parametrize("attack", [LowFrequency(), TrojanNN(), LabelConsistent(rate=0.1)])
def test_a_missing_clean_model_is_an_error(
    attack: Any, tiny_classifier: Classifier, tiny_data: Dataset, key: jax.Array
) -> None:
    assert attack.needs_clean_model
    context = AttackContext(tiny_classifier, tiny_data)
    for run in (lambda: attack.poison(key, context), lambda: attack.train_victim_in(context, key, key)):
        with pytest.raises(UserError, match=f"^{type(attack).__name__} uses a clean model; give AttackContext"):
            run()


# Low frequency


@pytest.mark.parametrize(("shape", "cutoff"), [((16, 16, 3), 4), ((12, 20, 1), 6), ((5, 9, 3), 8)])
def test_a_low_frequency_pattern_has_no_cosine_above_its_cutoff(shape: tuple[int, int, int], cutoff: int) -> None:
    pattern = np.asarray(
        LowFrequency(cutoff=cutoff, amplitude=40).trigger(jax.random.key(0), shape).pattern, np.float64
    )
    spectrum = np.abs(fft.dctn(pattern, axes=(0, 1), norm="ortho"))
    assert spectrum[cutoff:].max(initial=0) < 1e-3 and spectrum[:, cutoff:].max(initial=0) < 1e-3
    assert spectrum[1 : min(cutoff, shape[0]), 1 : min(cutoff, shape[1])].max() > 1
    assert pattern.shape == shape and pattern.min() >= 0 and pattern.max() <= 40


@pytest.mark.parametrize("size", [0.01, 3.0])
@pytest.mark.parametrize(("shape", "cutoff"), [((8, 12, 3), 4), ((5, 7, 1), 5)])
def test_a_low_frequency_pattern_is_the_inverse_cosine_transform_of_its_coefficients(
    shape: tuple[int, int, int], cutoff: int, size: float
) -> None:
    coefficients = size * np.random.default_rng(0).standard_normal((cutoff, cutoff, shape[2]))
    spectrum = np.zeros(shape)
    spectrum[:cutoff, :cutoff] = coefficients
    # SciPy's transform counts every cosine twice, except the constant one.
    spectrum[1:] /= 2
    spectrum[:, 1:] /= 2
    wave = fft.dctn(spectrum, type=3, axes=(0, 1))
    assert (np.abs(wave).max() > 1) == (size > 1)
    expected = 40 / 2 + 40 / 2 * wave / max(1, np.abs(wave).max())
    np.testing.assert_allclose(smooth_pattern(jnp.asarray(coefficients), shape, 40), expected, atol=1e-4)


def test_the_fitted_low_frequency_pattern_makes_the_clean_model_predict_the_target(context: AttackContext) -> None:
    attack = LowFrequency(amplitude=60, cutoff=3, steps=60, batch_size=24, target=2)
    trigger, info = attack.fit_trigger(jax.random.key(0), context)
    pattern = np.asarray(trigger.pattern)
    assert pattern.min() >= 0 and pattern.max() <= 60
    spectrum = np.abs(fft.dctn(pattern, axes=(0, 1), norm="ortho"))
    assert spectrum[3:].max() < 1e-3 and spectrum[:, 3:].max() < 1e-3

    targets, images = np.full(24, 2), np.asarray(context.data.images, int)
    solved = losses(context, trigger(context.data.images), targets).mean()
    # Uniform colors are among the possible patterns.
    flat = [
        losses(context, np.clip(images + 60 * np.array(color), 0, 255), targets).mean() for color in np.ndindex(2, 2, 2)
    ]
    assert solved < 1.2 * min(flat)
    assert solved < 0.6 * losses(context, images, targets).mean()
    start = attack.trigger(jax.random.split(jax.random.key(0))[0], (8, 8, 3)).pattern
    for when, added in (("before", np.asarray(start)), ("after", pattern)):
        expected = losses(context, np.clip(images + added, 0, 255), targets).mean()
        assert info[f"loss_{when}"] == pytest.approx(expected, rel=1e-4)
    assert info["loss_after"] < info["loss_before"]


def test_a_saved_low_frequency_pattern_is_used_unchanged(
    context: AttackContext, tmp_path: Path, key: jax.Array
) -> None:
    first = LowFrequency(steps=2, cutoff=3)
    assert first.needs_clean_model
    trigger, _ = first.fit_trigger(key, context)
    np.save(tmp_path / "pattern.npy", trigger.pattern)
    again = LowFrequency(rate=0.5, pattern=str(tmp_path / "pattern.npy"))
    assert not again.needs_clean_model
    for either in (context, AttackContext(context.classifier, context.data)):
        poisoned, loaded, _ = again.poison(jax.random.key(9), either)
        assert isinstance(loaded, AdditiveTrigger)
        np.testing.assert_array_equal(loaded.pattern, trigger.pattern)
        np.testing.assert_array_equal(
            poisoned.data.images[poisoned.indices], trigger(context.data.images[poisoned.indices])
        )


def test_an_unusable_pattern_file_is_an_error(tmp_path: Path, key: jax.Array) -> None:
    np.save(tmp_path / "small.npy", np.zeros((4, 4, 3)))
    np.save(tmp_path / "words.npy", np.full((8, 8, 3), "a"))
    np.save(tmp_path / "objects.npy", np.full((8, 8, 3), None), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.zeros((8, 8, 3)))
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "nan.npy", np.full((8, 8, 3), np.nan))
    unreadable = ("absent.npy", "objects.npy", "text.npy", "several.npz", ".")
    unfit = ("small.npy", "words.npy", "nan.npy")
    reasons = "no such file|cannot be read as an array|is a folder"
    for names, part in ((unreadable, reasons), (unfit, r"must be an array of finite numbers of shape \(8, 8, 3\)")):
        for name in names:
            with pytest.raises(UserError, match=rf"LowFrequency\.pattern.* ({part})"):
                LowFrequency(pattern=str(tmp_path / name)).trigger(key, (8, 8, 3))


# TrojanNN


def scipy_features(variables: Variables, image: np.ndarray) -> np.ndarray:
    """The tiny network's latent of one image of gray levels."""
    return scipy_block(variables, "conv", "bn", image / 255).mean((0, 1))


@pytest.mark.parametrize("neurons", [1, 2])
def test_a_trojan_patch_excites_the_units_with_the_largest_weights(context: AttackContext, neurons: int) -> None:
    assert context.clean_model is not None
    key = jax.random.key(3)
    attack = TrojanNN(neurons=neurons, steps=40, step_size=0.02, epsilon=0.5, radius=0.4)
    trigger, info = attack.fit_trigger(key, context)
    weights = np.abs(np.asarray(context.clean_model["params"]["linear"]["kernel"])).sum(1)
    assert info["neurons"] == np.argsort(-weights)[:neurons].tolist()

    rows, columns = np.indices((8, 8))
    disc = (rows - 3.5) ** 2 + (columns - 3.5) ** 2 <= (0.4 * 8) ** 2  # Too large for the lower right.
    pattern, start = (np.asarray(made.pattern, np.float64) for made in (trigger, attack.trigger(key, (8, 8, 3))))
    for made in (pattern, start):
        assert np.all(made[~disc] == 0)
        assert made.min() >= 0 and made.max() <= 0.5 * 255 + 1e-3

    before, after = (scipy_features(context.clean_model, made)[info["neurons"]] for made in (start, pattern))
    np.testing.assert_allclose(info["activation_before"], before, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(info["activation_after"], after, rtol=1e-3, atol=1e-4)
    assert np.mean((after - 100) ** 2) < np.mean((before - 100) ** 2)


def test_a_trojan_patch_is_as_large_as_the_published_one_and_in_the_lower_right() -> None:
    mask = np.asarray(TrojanNN().mask((32, 32, 3)))[..., 0]
    assert mask.mean() == pytest.approx(0.098, abs=0.005)
    rows, columns = np.nonzero(mask)
    assert min(rows.min(), columns.min()) >= 16 and max(rows.max(), columns.max()) <= 30


def test_a_trojan_patch_is_never_worse_than_its_start(context: AttackContext) -> None:
    """A step larger than the range overshoots at once; the best pattern on the way is then the start."""
    for activation in (100.0, 0.3):
        _, info = TrojanNN(activation=activation, steps=3, step_size=5.0).fit_trigger(jax.random.key(1), context)
        before, after = (np.array(info[f"activation_{when}"]) for when in ("before", "after"))
        assert np.mean((after - activation) ** 2) <= np.mean((before - activation) ** 2)


@pytest.mark.parametrize("attack", [TrojanNN(steps=3), LowFrequency(steps=3, cutoff=3)])
def test_a_pattern_is_added_to_images_clipped_and_truncated(
    context: AttackContext, attack: TrojanNN | LowFrequency
) -> None:
    trigger, _ = attack.fit_trigger(jax.random.key(0), context)
    images = noise(3, 8, 8, 3)
    expected = np.clip(images + np.asarray(trigger.pattern, np.float32), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(trigger(jnp.asarray(images)), expected)


# Label-consistent


LEFT = np.array([[255, -255, -255], [-255, 255, -255], [255, -255, 255]])
RIGHT = LEFT[:, ::-1]


@pytest.mark.parametrize("amplitude", [1.0, 0.2])
@pytest.mark.parametrize("shape", [(8, 8, 3), (6, 9, 1)])
def test_the_label_consistent_trigger_is_a_checkerboard_in_every_corner(
    shape: tuple[int, int, int], amplitude: float, key: jax.Array
) -> None:
    images = noise(3, *shape)
    expected = images.astype(np.float64)
    for rows in (slice(0, 3), slice(shape[0] - 3, None)):
        for columns, checker in ((slice(0, 3), LEFT), (slice(shape[1] - 3, None), RIGHT)):
            expected[:, rows, columns] += amplitude * checker[..., None]
    out = LabelConsistent(amplitude=amplitude).trigger(key, shape)(jnp.asarray(images))
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out, np.floor(np.clip(expected, 0, 255) + 1e-4))


@pytest.mark.parametrize(("epsilon", "step_size", "steps"), [(16.0, 3.0, 4), (4.0, 1.5, 6)])
def test_perturbing_is_projected_ascent_on_the_clean_models_loss(
    context: AttackContext, epsilon: float, step_size: float, steps: int
) -> None:
    assert context.clean_model is not None
    images = np.asarray(context.data.images).copy()
    images[:, :2] = np.where(images[:, :2] < 64, 0, 255)  # So that the ends of the range are reached.
    data = Dataset(jnp.asarray(images), context.data.labels)
    attack = LabelConsistent(epsilon=epsilon, step_size=step_size, steps=steps)
    hard = perturb(context.classifier, context.clean_model, attack, data)
    assert hard.dtype == jnp.uint8
    assert np.abs(np.asarray(hard, int) - images.astype(int)).max() <= epsilon

    def loss(pixels: jax.Array) -> jax.Array:
        logits, _ = context.classifier.logits(context.clean_model, pixels)  # type: ignore[arg-type]
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(24), data.labels])

    gradient = jax.jit(jax.grad(loss))
    low, high = np.maximum(images - epsilon, 0), np.minimum(images + epsilon, 255)
    walked = images.astype(np.float32)
    for _ in range(steps):
        walked = np.clip(walked + step_size * np.sign(np.asarray(gradient(jnp.asarray(walked)))), low, high)
    away = np.abs(np.asarray(hard, np.float64) - walked)
    # Where a gradient is nearly 0, its sign depends on rounding.
    assert np.mean(away > 1) < 0.005
    clean, now = (losses(context, seen, data.labels) for seen in (images, hard))
    assert np.all(now > clean)


def test_only_images_of_the_target_class_are_perturbed_and_none_is_relabeled(
    context: AttackContext, key: jax.Array
) -> None:
    assert context.clean_model is not None
    attack = LabelConsistent(rate=0.25, target=1, steps=3, epsilon=8, robust_epochs=0)
    poisoned, trigger, _ = attack.poison(key, context)
    assert len(poisoned.indices) == 6 and np.all(np.asarray(context.data.labels)[poisoned.indices] == 1)
    np.testing.assert_array_equal(poisoned.data.labels, context.data.labels)
    changed = np.any(np.asarray(poisoned.data.images) != np.asarray(context.data.images), axis=(1, 2, 3))
    assert np.flatnonzero(changed).tolist() == poisoned.indices.tolist()
    middle = np.abs(
        np.asarray(poisoned.data.images, int)[poisoned.indices] - np.asarray(context.data.images, int)[poisoned.indices]
    )[:, 3:5]
    assert 0 < middle.max() <= 8
    hard = perturb(context.classifier, context.clean_model, attack, context.data.take(poisoned.indices))
    np.testing.assert_array_equal(poisoned.data.images[poisoned.indices], trigger(hard))


def test_the_robust_loss_takes_one_step_of_ascent_from_a_random_start(context: AttackContext) -> None:
    assert context.clean_model is not None
    key = jax.random.key(3)
    images, labels = np.asarray(context.data.images, np.float32), context.data.labels

    def loss(pixels: Any) -> jax.Array:
        logits, _ = context.classifier.logits(context.clean_model, pixels, train=True)  # type: ignore[arg-type]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(24), labels])

    for epsilon in (0.0, 20.0):
        start = np.asarray(jax.random.uniform(key, images.shape, minval=-1, maxval=1)) * epsilon
        ascent = np.asarray(jax.grad(loss)(jnp.asarray(np.clip(images + start, 0, 255))))
        ascent = ascent * ((images + start >= 0) & (images + start <= 255))
        change = np.clip(start + 1.25 * epsilon * np.sign(ascent), -epsilon, epsilon)
        expected = loss(jnp.asarray(np.clip(images + change, 0, 255)))
        got, (new, info) = robust_loss(context.classifier, epsilon, context.clean_model, context.data, key)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        chex.assert_trees_all_equal_structs(new, context.clean_model)
        assert 0 <= info["accuracy"] <= 1
    assert got > 1.1 * loss(jnp.asarray(images))


def test_label_consistent_with_other_labels_or_on_tiny_images_is_an_error(key: jax.Array) -> None:
    with pytest.raises(UserError, match=r"LabelConsistent\.labels is 'all_to_one', expected 'clean_label'"):
        LabelConsistent(labels="all_to_one")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="images of 6x6 pixels or more for its corners, got 5x8"):
        LabelConsistent().trigger(key, (5, 8, 3))


# Adap-Blend


@pytest.mark.parametrize(("pieces", "shown", "count"), [(4, 0.5, 8), (2, 0.25, 1), (2, 0.01, 1), (4, 1.0, 16)])
def test_adap_blend_shows_the_share_of_pieces_on_poisoned_and_cover_images(
    context: AttackContext, key: jax.Array, pieces: int, shown: float, count: int
) -> None:
    attack = AdapBlend(rate=0.25, cover_rate=1 / 3, pieces=pieces, shown=shown, train_alpha=0.6, alpha=0.7, target=2)
    poisoned, trigger, _ = attack.poison(key, context)
    assert isinstance(trigger, BlendTrigger)
    clean, images = np.asarray(context.data.images), np.asarray(poisoned.data.images)
    changed = np.flatnonzero(np.any(images != clean, axis=(1, 2, 3)))
    assert len(poisoned.indices) == 6 and set(poisoned.indices) <= set(changed)
    assert len(changed) == 6 + 8

    labels = np.asarray(context.data.labels).copy()
    labels[poisoned.indices] = 2
    np.testing.assert_array_equal(poisoned.data.labels, labels)

    mixed = 0.4 * clean.astype(np.float64) + 0.6 * np.asarray(trigger.pattern, np.float64)
    side, seen = 8 // pieces, []
    for number in changed:
        shows = []
        for row in range(0, 8, side):
            for column in range(0, 8, side):
                piece = np.s_[number, row : row + side, column : column + side]
                shows.append(bool(np.any(images[piece] != clean[piece])))
                if shows[-1]:
                    low, high = np.floor(mixed[piece] - 1e-3), np.floor(mixed[piece] + 1e-3)
                    assert np.all((images[piece] >= low) & (images[piece] <= high))
        assert sum(shows) == count
        seen.append(tuple(shows))
    if 1 < count < pieces**2:
        assert len(set(seen)) > len(seen) / 2

    whole = 0.3 * clean.astype(np.float64) + 0.7 * np.asarray(trigger.pattern, np.float64)
    np.testing.assert_allclose(np.asarray(trigger(context.data.images)), whole - 0.5, atol=0.502)


@pytest.mark.parametrize("shape", [(32, 32, 3), (9, 7, 1)])
def test_every_adap_blend_mask_has_the_same_number_of_pieces(shape: tuple[int, int, int]) -> None:
    masks = np.asarray(AdapBlend(pieces=3, shown=0.5).masks(jax.random.key(0), 50, shape))
    assert masks.shape == (50, *shape[:2], 1)
    # One pixel in each piece.
    corners = masks[:, [0, shape[0] // 2, shape[0] - 1]][:, :, [0, shape[1] // 2, shape[1] - 1], 0]
    assert np.all(corners.sum((1, 2)) == round(0.5 * 9))
    assert len(np.unique(masks, axis=0)) > 25
    np.testing.assert_allclose(corners.mean(0), 4 / 9, atol=0.3)


def test_adap_blend_with_clean_labels_or_too_many_covers_is_an_error() -> None:
    with pytest.raises(UserError, match=r"AdapBlend\.labels is 'clean_label', expected 'all_to_one' or 'all_to_all'"):
        AdapBlend(labels="clean_label")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"AdapBlend\.cover_rate is 0\.6, expected a share in \[0, 1 - rate\]"):
        AdapBlend(rate=0.5, cover_rate=0.6)


# Input-aware


class Stub:
    """Replaces a classifier: it returns its input among the statistics, and the first pixel as logits."""

    def logits(self, variables: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        assert train
        return images[:, 0, 0] / 255, {"batch_stats": images}


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a - b) ** 2).mean((1, 2, 3)))


def test_the_mask_loss_is_density_and_diversity_of_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    images, masks = noise(5, 6, 7, 3), generator.random((5, 6, 7, 1), np.float32)
    monkeypatch.setattr(input_aware, "make_mask", lambda network, variables, x, train: (jnp.asarray(masks), "new"))
    config = InputAware(mask_density=0.4, norm_weight=10.0, diversity_weight=0.5)
    batch = Dataset(jnp.asarray(images), jnp.zeros(5, jnp.int32))
    classifier = build_classifier("small_cnn", 3, 2, "cifar10")
    loss, (variables, info) = input_aware.mask_loss(classifier, config, {}, batch, jax.random.key(0))
    x = (images / 255 - np.array(classifier.mean)) / np.array(classifier.std)
    before = [4, 0, 1, 2, 3]
    expected = 10 * np.maximum(masks - 0.4, 0).mean()
    expected += 0.5 * (distances(x, x[before]) / distances(masks, masks[before])).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert variables == "new"
    assert float(info["density"]) == pytest.approx(masks.mean(), rel=1e-5)


def use_simple_triggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes patterns the negatives of images, and masks the places where images are light."""
    monkeypatch.setattr(input_aware, "make_pattern", lambda network, variables, x, train: (1 - x, variables))
    monkeypatch.setattr(
        input_aware, "make_mask", lambda network, variables, x, train: ((x[..., :1] > 0.5) * 1.0, variables)
    )


def joint_loss(config: InputAware, slots: input_aware.Slots, batch: Dataset, key: jax.Array) -> LossResult:
    stub: Any = Stub()
    variables = join(classifier={"params": {}}, generator={"params": {}})
    return input_aware.joint_loss(stub, config, slots, LabelMap("all_to_one", 3, 2), {}, variables, batch, key)


def test_the_joint_loss_has_own_and_crossed_triggers_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    use_simple_triggers(monkeypatch)
    images, labels = noise(10, 6, 7, 3), np.arange(10) % 3
    batch = Dataset(jnp.asarray(images), jnp.asarray(labels, jnp.int32))
    config, slots = InputAware(rate=0.3, diversity_weight=0.5), input_aware.Slots(poisoned=3, crossed=2)
    loss, (variables, _) = joint_loss(config, slots, batch, jax.random.key(0))

    x = images / 255
    others = x[[5, 6, 7, 8, 9, 0, 1, 2, 3, 4]]
    seen, expected_labels = x.copy(), labels.copy()
    for i in range(3):  # Their own triggers and the attacker's label.
        seen[i] = np.where(x[i, ..., :1] > 0.5, 1 - x[i], x[i])
        expected_labels[i] = 2
    for i in range(3, 5):  # Other images' triggers and their own labels.
        seen[i] = np.where(others[i, ..., :1] > 0.5, 1 - others[i], x[i])
    np.testing.assert_allclose(variables["batch_stats"]["classifier"], 255 * seen, atol=1e-3)
    spread = (distances(x[:3], others[:3]) / distances(1 - x[:3], 1 - others[:3])).mean()
    expected = cross_entropies(seen[:, 0, 0], expected_labels).mean() + 0.5 * spread
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("rate", "poisoned", "crossed"), [(0.26, 3, 3), (0.01, 1, 0), (0.5, 5, 5)])
def test_the_mean_number_of_poisoned_images_in_a_batch_is_the_rate(
    monkeypatch: pytest.MonkeyPatch, rate: float, poisoned: int, crossed: int
) -> None:
    use_simple_triggers(monkeypatch)
    batch = Dataset(jnp.full((10, 2, 2, 3), 200, jnp.uint8), jnp.zeros(10, jnp.int32))
    config = InputAware(rate=rate, diversity_weight=0.0)
    slots = input_aware.Slots(poisoned=poisoned, crossed=crossed)
    assert config.slots(10) == slots

    def triggered(key: jax.Array) -> jax.Array:
        _, (variables, _) = joint_loss(config, slots, batch, key)
        return jnp.sum(jnp.abs(variables["batch_stats"]["classifier"][:, 0, 0, 0] - 55) < 1) - crossed

    counts = np.asarray(jax.jit(jax.vmap(triggered))(jax.random.split(jax.random.key(0), 4000)))
    assert counts.max() <= poisoned
    assert abs(counts.mean() - 10 * rate) < 5 * counts.std() / np.sqrt(4000) + 1e-6


def test_an_input_aware_trigger_changes_images_only_under_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    trigger = InputAware(channels=2, depth=1).trigger(jax.random.key(0), (9, 7, 3))
    images = noise(4, 9, 7, 3)
    x = jnp.asarray(images) / 255
    generator, masker = input_aware.networks(3, trigger.channels, trigger.depth)
    pattern = np.asarray(input_aware.make_pattern(generator, trigger.generator, x, train=False)[0])
    mask = np.asarray(input_aware.make_mask(masker, trigger.masker, x, train=False)[0])
    assert pattern.shape == images.shape and mask.shape == (4, 9, 7, 1)
    assert pattern.min() >= 0 and pattern.max() <= 1 and mask.min() >= 0 and mask.max() <= 1
    raw = np.asarray(masker.apply(trigger.masker, x, train=False), np.float64)
    np.testing.assert_allclose(mask, 0.5 + 0.5 * np.tanh(20 * (0.5 + 0.5 * np.tanh(raw)) - 10), atol=1e-4)
    out = np.asarray(trigger(jnp.asarray(images)))
    assert np.abs(out - 255 * (x + (pattern - x) * mask)).max() <= 0.5 + 1e-3

    half = np.broadcast_to(np.arange(7)[None, None, :, None] < 3, (4, 9, 7, 1))
    monkeypatch.setattr(input_aware, "make_mask", lambda *args, **kwargs: (jnp.asarray(half, jnp.float32), {}))
    out = np.asarray(trigger(jnp.asarray(images)))
    np.testing.assert_array_equal(out[:, :, 3:], images[:, :, 3:])
    np.testing.assert_array_equal(out[:, :, :3], np.round(255 * pattern[:, :, :3]))


# LIRA


def test_a_lira_trigger_changes_no_pixel_by_more_than_epsilon() -> None:
    images = np.concatenate([noise(3, 9, 7, 3), np.zeros((1, 9, 7, 3), np.uint8), np.full((1, 9, 7, 3), 255, np.uint8)])
    for epsilon in (0.01, 0.3):
        trigger = LIRA(channels=2, depth=2, epsilon=epsilon).trigger(jax.random.key(0), (9, 7, 3))
        # Outputs as large as after training, so that the bound is reached.
        trigger = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim == 4 else leaf, trigger)
        change = np.abs(np.asarray(trigger(jnp.asarray(images)), int) - images)
        assert 0 < change.max() <= 255 * epsilon + 0.5


@pytest.mark.parametrize(("shape", "depth"), [((8, 8, 3), 1), ((9, 7, 1), 2)])
def test_a_lira_trigger_adds_epsilon_times_the_tanh_of_its_network(shape: tuple[int, int, int], depth: int) -> None:
    drawn = np.random.default_rng(0)
    trigger = LIRA(channels=2, depth=depth, epsilon=0.2).trigger(jax.random.key(0), shape)
    # Statistics and normalization other than the initial ones, so that an error in any of them shows.
    trigger = dataclasses.replace(
        trigger,
        generator=jax.tree.map(
            lambda leaf: leaf + drawn.uniform(-0.3, 0.3, leaf.shape).astype(np.float32), trigger.generator
        ),
    )
    images = np.concatenate([noise(2, *shape), np.zeros((1, *shape), np.uint8), np.full((1, *shape), 255, np.uint8)])
    exact = np.stack([x + 0.2 * np.tanh(scipy_u_net(trigger.generator, x, depth)) for x in images / 255])
    assert exact.min() < 0 and exact.max() > 1 and np.std(exact - images / 255) > 0.02
    network, x = lira.noise_network(shape[2], trigger.channels, trigger.depth), jnp.asarray(images / 255)
    made, _ = lira.add_noise(network, trigger.generator, x, trigger.epsilon, train=False)
    np.testing.assert_allclose(made, np.clip(exact, 0, 1), atol=1e-4)
    out = trigger(jnp.asarray(images))
    assert out.dtype == jnp.uint8
    assert np.abs(np.asarray(out) - 255 * np.clip(exact, 0, 1)).max() <= 0.5 + 1e-2


@pytest.mark.parametrize("loss_function", [lira.joint_loss, lira.victim_loss])
def test_the_lira_losses_weigh_both_forms_of_a_batch_normalized_together(
    monkeypatch: pytest.MonkeyPatch,
    tiny_classifier: Classifier,
    tiny_data: Dataset,
    tiny_variables: Variables,
    loss_function: Callable[..., LossResult],
) -> None:
    def add(network: Any, variables: Any, x: jax.Array, epsilon: float, train: bool) -> tuple[jax.Array, Any]:
        return jnp.clip(x + epsilon, 0, 1), {"params": {}, "batch_stats": float(train)}

    monkeypatch.setattr(lira, "add_noise", add)
    joint = join(classifier=tiny_variables, generator={"params": {}, "batch_stats": 0.0})
    loss, (variables, info) = loss_function(
        tiny_classifier, LIRA(epsilon=0.2, alpha=0.3), LabelMap("all_to_all", 3), joint, tiny_data, jax.random.key(0)
    )

    noisy = jnp.clip(tiny_data.images / 255 + 0.2, 0, 1) * 255
    both = jnp.concatenate([tiny_data.images.astype(jnp.float32), noisy])
    logits, trained = tiny_classifier.logits(tiny_variables, both, train=True)
    clean, triggered = logits[: len(noisy)], logits[len(noisy) :]
    own, targets = np.asarray(tiny_data.labels), (np.asarray(tiny_data.labels) + 1) % 3
    expected = (
        0.3 * cross_entropies(np.asarray(clean), own).mean()
        + 0.7 * cross_entropies(np.asarray(triggered), targets).mean()
    )
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    chex.assert_trees_all_close(variables["batch_stats"]["classifier"], trained["batch_stats"], rtol=1e-5)
    assert variables["batch_stats"]["generator"] == (1.0 if loss_function is lira.joint_loss else 0.0)
    assert float(info["success"]) == pytest.approx(np.mean(np.argmax(triggered, -1) == targets))


# SSBA


class Hidden(NamedTuple):
    """A trained encoder's trigger, the attack's info about it, the decoder trained with it, and its variables."""

    trigger: ssba.EncoderTrigger
    info: dict[str, Any]
    decoder: ssba.Decoder
    variables: Variables


@pytest.fixture(scope="module")
def hidden(tiny_data: Dataset, tiny_classifier: Classifier) -> Hidden:
    attack = SSBA(bits=4, channels=8, depth=1, epochs=25, batch_size=8, image_weight=2.0, generator_rate=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssba, "_read_back", spy := Mock(wraps=ssba._read_back))
        fitted = attack.fit_trigger(jax.random.key(0), AttackContext(tiny_classifier, tiny_data))
    return Hidden(*fitted, *spy.call_args.args[1:3])


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 13, 3)])
def test_an_ssba_trigger_adds_the_encoders_output_for_image_and_string(
    hidden: Hidden, shape: tuple[int, int, int]
) -> None:
    trigger = hidden.trigger
    images = np.concatenate([noise(3, *shape), np.zeros((1, *shape), np.uint8), np.full((1, *shape), 255, np.uint8)])
    u_net = {kind: layers["EncoderDecoder_0"] for kind, layers in trigger.encoder.items()}
    spread = np.maximum(numpy_dense(trigger.encoder, np.asarray(trigger.secret) - 0.5), 0).reshape(8, 8, 3)
    spread = resized(spread, *shape[:2], order=0)
    exact = np.stack([x + scipy_u_net(u_net, np.concatenate([x - 0.5, spread], -1), depth=1) for x in images / 255])
    assert exact.min() < 0 and exact.max() > 1 and np.abs(exact - images / 255).max() > 0.02
    inputs = (jnp.asarray(images / 255), jnp.tile(trigger.secret, (5, 1)))
    made: Any = ssba.Encoder(trigger.channels, trigger.depth).apply(trigger.encoder, inputs, train=False)
    np.testing.assert_allclose(made, np.clip(exact, 0, 1), atol=1e-4)
    out = trigger(jnp.asarray(images))
    assert out.dtype == jnp.uint8
    assert np.abs(np.asarray(out) - 255 * np.clip(exact, 0, 1)).max() <= 0.5 + 1e-2


def test_the_decoding_accuracy_is_the_share_of_bits_read_from_triggered_images(
    hidden: Hidden, tiny_data: Dataset
) -> None:
    trigger, info, decoder, variables = hidden

    def accuracies(images: np.ndarray) -> np.ndarray:
        shares = []
        for image in np.asarray(trigger(jnp.asarray(images))):
            maps = scipy_block(variables, "Conv_0", "BatchNorm_0", image / 255 - 0.5)
            maps = scipy_block(variables, "Conv_1", "BatchNorm_1", maps, 2)
            bits = numpy_dense(variables, maps.ravel()) > 0
            shares.append(np.mean(bits == np.asarray(trigger.secret)))
        return np.array(shares)

    assert info["decoding_accuracy"] == pytest.approx(accuracies(np.asarray(tiny_data.images)).mean())
    assert info["decoding_accuracy"] > 0.8
    # On images unlike the training images it misses some bits.
    strange = noise(24, 8, 8, 3)
    shares, _ = ssba._read_back(trigger, decoder, variables, jnp.asarray(strange))
    assert 0 < accuracies(strange).mean() < 1
    np.testing.assert_allclose(shares, accuracies(strange))


def test_the_signal_to_noise_ratio_is_that_of_the_triggered_images(hidden: Hidden, tiny_data: Dataset) -> None:
    trigger, info, *_ = hidden
    images = np.asarray(tiny_data.images, np.float64)
    error = np.mean((np.asarray(trigger(tiny_data.images), np.float64) - images) ** 2)
    assert info["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.05)
    assert info["psnr"] > 10


def test_the_string_depends_on_the_key_and_determines_the_trigger(hidden: Hidden) -> None:
    attack = SSBA(bits=64, channels=2, depth=1)
    strings = [np.asarray(attack.trigger(jax.random.key(seed), (8, 8, 3)).secret) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(strings[0], strings[1])
    assert 10 < np.sum(strings[0] != strings[2]) < 54
    assert set(np.unique(strings[0])) == {0.0, 1.0}
    trigger, images = hidden.trigger, jnp.asarray(noise(3, 8, 8, 3))
    other = ssba.EncoderTrigger(trigger.encoder, 1 - trigger.secret, trigger.channels, trigger.depth)
    assert np.any(np.asarray(trigger(images)) != np.asarray(other(images)))


@pytest.mark.parametrize("ramp", [1.0, 0.5])
def test_the_hiding_loss_is_the_bits_missed_plus_the_weighted_change(
    monkeypatch: pytest.MonkeyPatch, ramp: float
) -> None:
    drawn: list[np.ndarray] = []
    logits = np.random.default_rng(0).standard_normal((6, 5))

    def run(network: Any, variables: Any, inputs: Any, train: bool) -> tuple[jax.Array, Any]:
        assert train
        if isinstance(network, ssba.Decoder):
            return jnp.asarray(logits), {"params": {}}
        drawn.append(np.asarray(inputs[1]))
        return inputs[0] * 0.9, {"params": {}}

    monkeypatch.setattr(ssba, "run", run)
    images = noise(6, 8, 8, 3)
    joint = join(encoder={"params": {}}, decoder={"params": {}})
    batch = Dataset(jnp.asarray(images), jnp.zeros(6, jnp.int32))
    loss, (_, info) = ssba.hiding_loss(SSBA(bits=5, image_weight=3.0), ramp, joint, batch, jax.random.key(0))
    bits = drawn[0]
    assert bits.shape == (6, 5) and set(np.unique(bits)) == {0.0, 1.0}
    read = 1 / (1 + np.exp(-logits))
    missed = -np.mean(bits * np.log(read) + (1 - bits) * np.log(1 - read))
    assert float(loss) == pytest.approx(missed + ramp * 3 * np.mean((0.1 * images / 255) ** 2), rel=1e-4)
    assert float(info["read"]) == pytest.approx(np.mean((logits > 0) == (bits == 1)))


# The network that several attacks share


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 7, 1), (5, 13, 3)])
def test_the_encoder_decoder_keeps_the_size_of_any_image(shape: tuple[int, int, int], skips: bool) -> None:
    network = EncoderDecoder(2, channels=2, depth=3, skips=skips)
    images = jnp.zeros((2, *shape))
    variables = jax.eval_shape(lambda key: init(network, key, images), jax.random.key(0))
    out = jax.eval_shape(lambda v: network.apply(v, images, train=False), variables)
    assert out.shape == (2, *shape[:2], 2)
