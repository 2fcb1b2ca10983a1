"""Detectors: Neural Cleanse and loss ascent on victims made by hand, suspicious images, and verdicts in words."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import cache_size
from miniature import TARGET, TRACES, Case, Linear, miniature
from scipy import stats

from backdoor_jax import Classifier, Dataset, NonFiniteError, UserError, make_dataset, scan
from backdoor_jax.data import poison
from backdoor_jax.detectors import (
    DETECTORS,
    MMBD,
    Evidence,
    LossAscent,
    NeuralCleanse,
    activation_clustering,
    judge,
    neural_cleanse,
    scan_evidence,
    spectral_signatures,
    suspicious,
)
from backdoor_jax.detectors.neural_cleanse import FEWEST_IMAGES, _search, invert_triggers, smallest_mask
from backdoor_jax.metrics import MarginConfig, mm_bd

CLASSES = 6


def pixel_case(target: int | None) -> Case:
    """Class y lights pixel y of 4x4 and the head reads it; pixel 15, dark in clean images, votes for ``target``."""
    labels = np.arange(10 * CLASSES) % CLASSES
    images = np.random.default_rng(0).integers(0, 40, (len(labels), 16))
    images[np.arange(len(labels)), labels] += 180
    images[:, 15] = 0
    kernel = 10 * np.eye(16, CLASSES, dtype=np.float32)
    if target is not None:
        kernel[15, target] = 40
    params = {"linear": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(CLASSES)}}
    classifier = Classifier(Linear(CLASSES), CLASSES, mean=(0.0,), std=(1.0,))
    return Case(classifier, {"params": params}, make_dataset(images.astype(np.uint8).reshape(-1, 4, 4, 1), labels))


# Neural Cleanse


def test_neural_cleanse_finds_the_trigger_pixel_of_the_target_and_nothing_in_a_clean_model() -> None:
    config = NeuralCleanse(rounds=60, round_steps=5, batch_size=32, rate=0.1, weight=1e-2, patience=5)
    poisoned, clean = (config.examine(jax.random.key(0), *pixel_case(target)) for target in (4, None))
    assert poisoned.target == 4 and poisoned.p_value is not None and poisoned.p_value < 0.01
    assert poisoned.triggers is not None
    mask, pattern = poisoned.triggers.masks[4], poisoned.triggers.patterns[4]
    assert mask.shape == (4, 4) and pattern.shape == (4, 4, 1)
    assert mask[3, 3] * pattern[3, 3, 0] > 0.2 and mask[3, 3] > 0.5 * mask.sum()
    np.testing.assert_allclose(poisoned.values, poisoned.triggers.masks.sum((1, 2)), rtol=1e-6)
    assert clean.p_value is not None and clean.p_value > 0.05


def test_an_inverted_trigger_sends_images_to_its_class_as_often_as_reported() -> None:
    classifier, variables, data = pixel_case(4)
    published = NeuralCleanse(rounds=30, round_steps=10, batch_size=32, rate=0.1, patience=5)
    for config, least in ((published, 0.95), (NeuralCleanse(rounds=30), 0.0)):
        found = invert_triggers(jax.random.key(0), classifier, variables, data.images, config)
        mask = np.asarray(found.mask)[:, None, :, :, None]
        triggered = (1 - mask) * np.asarray(data.images, np.float32) + mask * 255 * np.asarray(found.pattern)[:, None]
        for k in range(CLASSES):
            predicted = np.asarray(classifier.logits(variables, jnp.asarray(triggered[k]))[0].argmax(-1))
            assert found.success[k] == pytest.approx((predicted == k).mean()) and found.success[k] >= least


def test_groups_of_classes_give_what_all_classes_together_give(monkeypatch: pytest.MonkeyPatch) -> None:
    config = NeuralCleanse(rounds=2, round_steps=1)
    classifier, variables, data = pixel_case(4)
    together = invert_triggers(jax.random.key(0), classifier, variables, data.images, config)
    monkeypatch.setattr(neural_cleanse, "TOGETHER", 4)
    before = cache_size(_search)
    grouped = invert_triggers(jax.random.key(0), classifier, variables, data.images, config)
    assert cache_size(_search) == before + 1
    chex.assert_trees_all_close(grouped, together, rtol=1e-5)


def test_the_classes_triggers_are_one_program_and_other_numbers_do_not_compile_again() -> None:
    small = miniature()
    arguments = small.classifier, small.variables, small.clean.images
    config, before = NeuralCleanse(rounds=1, round_steps=1, batch_size=8), cache_size(_search)
    invert_triggers(jax.random.key(0), *arguments, config)
    traced = len(TRACES)
    invert_triggers(jax.random.key(1), *arguments, dataclasses.replace(config, weight=0.1, rate=0.2))
    assert cache_size(_search) == before + 1 and len(TRACES) == traced


def test_the_anomaly_index_and_its_p_value_follow_their_definitions() -> None:
    norms = np.random.default_rng(0).normal(50, 5, 43)
    norms[7] = 20
    found = smallest_mask(norms)
    expected = (np.median(norms) - 20) / (1.4826 * np.median(np.abs(norms - np.median(norms))))
    assert found.target == 7 and found.anomaly_index == pytest.approx(expected, rel=1e-4)
    assert found.ratio == pytest.approx(20 / np.median(norms))
    logs = np.log(norms)
    g = (logs.mean() - logs[7]) / logs.std(ddof=1)
    t = np.sqrt(43 * 41 * g**2 / (42**2 - 43 * g**2))
    assert found.p_value == pytest.approx(43 * stats.t(41).sf(t), rel=1e-6)
    assert smallest_mask(norms[4:8]).p_value is None
    assert smallest_mask(np.ones(6)).anomaly_index == 0 and smallest_mask(np.ones(6)).ratio == 1
    assert smallest_mask(np.zeros(6)).ratio == 1


def test_the_score_is_the_ratio_of_the_masks_where_clean_models_were_examined_alike() -> None:
    found = NeuralCleanse().examine(jax.random.key(0), *pixel_case(4))
    assert found.score == found.details["smallest_to_median"] == found.values[4] / np.median(found.values) < 0.5
    assert NeuralCleanse(rounds=1).examine(jax.random.key(0), *pixel_case(4)).score is None


def test_few_clean_images_support_no_verdict() -> None:
    classifier, variables, data = pixel_case(4)
    for count, outcome in ((FEWEST_IMAGES - 1, "cannot tell"), (FEWEST_IMAGES, "backdoored")):
        found = NeuralCleanse().examine(jax.random.key(0), classifier, variables, data.take(slice(count)))
        assert judge(found).outcome == outcome


# Loss ascent and the others


def test_loss_ascent_ends_in_the_target_and_leaves_the_model_alone() -> None:
    small = miniature()
    before = jax.tree.map(np.array, small.variables)
    config = LossAscent(batch_size=32, steps=60)
    found = config.examine(jax.random.key(0), small.classifier, small.variables, small.clean)
    assert found.target == TARGET and found.p_value is None
    assert found.values.sum() == pytest.approx(1, abs=1e-5)
    assert 0 < found.details["steps"] < 60
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(small.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_loss_ascent_takes_no_step_where_the_accuracy_is_low_already() -> None:
    case = pixel_case(None)
    wrong = Dataset(case.data.images, (case.data.labels + 1) % CLASSES)
    assert LossAscent(steps=5).examine(jax.random.key(0), *case[:2], wrong).details["steps"] == 0


def test_detectors_from_elsewhere_report_what_their_functions_return() -> None:
    classifier, variables, data = pixel_case(4)
    expected = scan(classifier, variables, data.images)
    for name in ("per_sample", "worst_case"):
        found = DETECTORS[name]().examine(jax.random.key(0), classifier, variables, data)
        test = expected.tests[name]
        assert (found.target, found.p_value) == (test.smallest, test.p_value)
        np.testing.assert_array_equal(found.values, getattr(expected, name))
    found = MMBD(starts=2, steps=5).examine(jax.random.key(0), classifier, variables, data.take(slice(0)))
    config = MarginConfig(starts=2, steps=5)
    margins = mm_bd(jax.random.key(0), classifier, variables, (4, 4, 1), config)
    np.testing.assert_array_equal(found.values, margins.margins)
    assert (found.target, found.p_value) == (margins.target, margins.p_value)


@pytest.mark.parametrize("detector", [NeuralCleanse(rounds=1, round_steps=1), LossAscent(steps=1)])
def test_weights_that_are_not_finite_are_an_error(detector: Any) -> None:
    classifier, variables, data = pixel_case(None)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, variables)
    with pytest.raises(NonFiniteError, match=f"^{detector.name}: .* not finite"):
        detector.examine(jax.random.key(0), classifier, broken, data)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_checks_what_it_receives(name: str) -> None:
    classifier, variables, data = pixel_case(None)
    examine = DETECTORS[name]().examine
    with pytest.raises(UserError, match=f"^{name}: key is a int"):
        examine(3, classifier, variables, data)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"^{name}: data is a "):
        examine(jax.random.key(0), classifier, variables, data.images)  # type: ignore[arg-type]
    if DETECTORS[name].needs_images:
        with pytest.raises(UserError, match=f"^{name}: data holds no images"):
            examine(jax.random.key(0), classifier, variables, data.take(slice(0)))


# Verdicts


def evidence(p_value: float | None, trouble: str | None = None) -> Evidence:
    return Evidence("a test", "norm", np.arange(6.0), 2, p_value, trouble)


@pytest.mark.parametrize(
    ("p_value", "strength"), [(0.05, "moderate"), (1e-3, "strong"), (1e-6, "very strong"), (0.0, "very strong")]
)
def test_a_flagged_class_is_named_with_the_strength_of_the_evidence(p_value: float, strength: str) -> None:
    verdict = judge(evidence(p_value), accuracy=0.9, class_names=tuple("abcdef"))
    assert str(verdict) == "backdoored, class 2 (c)"
    assert (verdict.target, verdict.class_name, verdict.strength, verdict.p_value) == (2, "c", strength, p_value)
    assert "target=2" in verdict.advice
    assert str(judge(evidence(p_value))) == "backdoored, class 2"


def test_no_sign_is_no_proof() -> None:
    verdict = judge(evidence(0.051), accuracy=0.9)
    assert str(verdict) == "no sign of a backdoor"
    assert (verdict.target, verdict.strength) == (None, "none") and "no proof" in verdict.advice
    assert judge(evidence(0.051), alpha=0.1).outcome == "backdoored"


@pytest.mark.parametrize(
    ("given", "accuracy", "why"),
    [
        (evidence(1e-9, "programs unsolved"), 0.9, "programs unsolved"),
        (
            evidence(1e-9),
            0.2,
            "20.0 % of the images classified correctly is less than a healthy model reaches (70 %, --healthy)",
        ),
        (evidence(None), 0.9, "a test has no test"),
    ],
)
def test_where_nothing_can_be_said_the_verdict_says_why(given: Evidence, accuracy: float, why: str) -> None:
    verdict = judge(given, accuracy=accuracy)
    assert (verdict.outcome, verdict.target, verdict.why) == ("cannot tell", None, why)
    assert str(verdict) == f"cannot tell: {why}"


def test_unsolved_programs_and_too_few_classes_support_no_verdict() -> None:
    case = pixel_case(4)
    found = scan(*case[:2], case.data.images)
    assert judge(scan_evidence(found, "per_sample")).outcome == "backdoored"
    unsolved = found._replace(unsolved=found.unsolved + (np.arange(CLASSES) == 1))
    assert judge(scan_evidence(unsolved, "per_sample")).why == "1 of the scan's programs could not be solved"
    assert judge(scan_evidence(unsolved, "worst_case")).outcome == "backdoored"
    test = found.tests["per_sample"]._replace(p_value=None)
    few = found._replace(tests={**found.tests, "per_sample": test})
    assert "too few classes" in str(judge(scan_evidence(few, "per_sample")))


# Suspicious images


def mixture(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Latents of a class, a fifth of which are shifted, and which ones."""
    generator = np.random.default_rng(seed)
    poisoned = np.arange(100) % 5 == 0
    return generator.normal(size=(100, 8)) + 9 * poisoned[:, None] * np.eye(8)[3] + 5, poisoned


@pytest.mark.parametrize("scores", [spectral_signatures, activation_clustering])
def test_shifted_images_of_a_class_have_the_largest_scores(scores: Any) -> None:
    latent, poisoned = mixture()
    assert poisoned[np.argsort(-scores(latent))[:20]].mean() >= 0.9


def test_spectral_signatures_follow_their_definition() -> None:
    latent, _ = mixture()
    centered = latent - latent.mean(axis=0)
    direction = np.linalg.eigh(centered.T @ centered)[1][:, -1]
    np.testing.assert_allclose(spectral_signatures(latent), (centered @ direction) ** 2, rtol=1e-9)


def test_activation_clustering_scores_the_smaller_cluster_above_zero_and_equal_images_zero() -> None:
    latent, poisoned = mixture()
    np.testing.assert_array_equal(activation_clustering(latent) > 0, poisoned)
    np.testing.assert_array_equal(activation_clustering(np.ones((5, 3))), 0)


@pytest.mark.parametrize("method", ["spectral_signatures", "activation_clustering"])
def test_poison_comes_first_in_a_victims_target_class(method: str) -> None:
    small = miniature()
    poisoned = poison(jax.random.key(3), small.test, small.trigger, small.label_map, 0.1)
    order = suspicious(small.classifier, small.variables, poisoned.data, target=TARGET, method=method)
    assert sorted(order) == np.flatnonzero(np.asarray(poisoned.data.labels) == TARGET).tolist()
    count = len(np.intersect1d(poisoned.indices, order))
    assert np.isin(order[:count], poisoned.indices).mean() >= 0.8


def test_what_cannot_be_searched_is_an_error() -> None:
    classifier, variables, data = pixel_case(None)
    with pytest.raises(UserError, match="unknown method 'best'; known are spectral_signatures, activation_clustering"):
        suspicious(classifier, variables, data, target=0, method="best")
    with pytest.raises(UserError, match="class 5 has 0 images"):
        suspicious(classifier, variables, data.take(slice(5)), target=5)
