"""Sequela: rates against SciPy and loops, signals against NumPy, membership of overfitted models, re-injection."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import cache_size
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial
from miniature import Case, SmallNet, make_textured_images, miniature
from scipy import stats

from backdoor_jax import Classifier, Dataset, TrainConfig, UserError, evaluate, train
from backdoor_jax.data import LabelMap, poison
from backdoor_jax.metrics import (
    ReinjectConfig,
    confidence_signal,
    loss_signal,
    membership,
    reinject,
    shadow_model,
    shadow_signal,
)
from backdoor_jax.metrics.sequela import _resampled, auc, balanced_accuracy, shadow_features, true_positive_rate
from backdoor_jax.models import Variables
from backdoor_jax.training import SGD, GradientStep, fit, supervised_loss
from backdoor_jax.training.fitting import _compiled_epoch

KEY = jax.random.key(0)
signals = st.lists(st.integers(0, 8), min_size=1, max_size=30).map(lambda values: np.array(values, np.float32))


# Rates


@given(members=signals, others=signals)
def test_the_area_is_the_mann_whitney_statistic(members: np.ndarray, others: np.ndarray) -> None:
    expected = stats.mannwhitneyu(members, others).statistic / (len(members) * len(others))
    assert float(auc(jnp.asarray(members), jnp.asarray(others))) == pytest.approx(expected, abs=1e-6)


@given(members=signals, others=signals)
def test_the_balanced_accuracy_is_the_best_over_all_thresholds(members: np.ndarray, others: np.ndarray) -> None:
    thresholds = np.arange(-1, 10)
    expected = max((np.mean(members >= t) + np.mean(others < t)) / 2 for t in thresholds)
    found = balanced_accuracy(jnp.asarray(members), jnp.asarray(others))
    assert float(found) == pytest.approx(expected, abs=1e-6)


@given(members=signals, others=signals, rate=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
def test_the_true_positive_rate_is_the_best_at_the_false_positive_rate(
    members: np.ndarray, others: np.ndarray, rate: float
) -> None:
    allowed = [t for t in np.arange(-1, 10) if np.mean(others > t) <= rate + 1e-9]
    expected = max(np.mean(members > t) for t in allowed)
    found = true_positive_rate(jnp.asarray(members), jnp.asarray(others), rate)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_known_signals_have_known_rates() -> None:
    apart = membership(KEY, jnp.arange(100.0) + 200, jnp.arange(100.0), resamples=20)
    assert [rate.value for rate in apart] == [1, 1, 1, 1]
    same = membership(KEY, jnp.arange(1000.0), jnp.arange(1000.0), resamples=20)
    assert same.auc.value == pytest.approx(0.5)
    assert same.balanced_accuracy.value == pytest.approx(0.5, abs=2e-3)
    assert (same.tpr_at_1.value, same.tpr_at_01.value) == (pytest.approx(0.01), pytest.approx(0.001))


def test_intervals_contain_the_true_value_about_as_often_as_their_level_says() -> None:
    """Normal signals one deviation apart, whose AUC is known; 50 samples of 100 and a level of 95 %."""
    truth, generator = stats.norm.cdf(1 / np.sqrt(2)), np.random.default_rng(0)
    inside = 0
    for number in range(50):
        members, others = generator.normal(1, 1, 100), generator.normal(0, 1, 100)
        found = membership(jax.random.key(number), jnp.asarray(members), jnp.asarray(others), resamples=200).auc
        assert found.low < found.value < found.high
        inside += found.low <= truth <= found.high
    assert 43 <= inside <= 50


def test_intervals_depend_on_the_key_alone_and_are_compiled_once() -> None:
    generator = np.random.default_rng(1)
    members, others = (jnp.asarray(generator.normal(size=50)) for _ in range(2))
    first = membership(KEY, members, others, resamples=60)
    compiled = cache_size(_resampled)
    again, other = (membership(jax.random.key(number), members, others, resamples=60) for number in (0, 1))
    wider = membership(KEY, members, others, resamples=60, level=0.99)
    assert cache_size(_resampled) == compiled
    assert first == again
    assert first.auc.value == other.auc.value and first != other
    assert wider.auc.low <= first.auc.low and wider.auc.high >= first.auc.high


@pytest.mark.parametrize(
    ("members", "others", "message"),
    [
        (np.ones((3, 2)), np.ones(3), r"members are float64 \(3, 2\), expected .* \(N,\)"),
        (np.ones(0), np.ones(3), "members are empty"),
        (np.ones(2), [np.nan], "finite"),
    ],
)
def test_unusable_signals_are_refused(members: Any, others: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        membership(KEY, members, others)


# Signals


def logits_of(case: Case) -> np.ndarray:
    return np.asarray(case.classifier.logits(case.variables, case.data.images)[0], np.float64)


@pytest.fixture(scope="module")
def case(tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset) -> Case:
    return Case(tiny_classifier, tiny_variables, tiny_data)


def test_signals_are_log_probabilities(case: Case) -> None:
    log_p = logits_of(case) - np.log(np.exp(logits_of(case)).sum(-1, keepdims=True))
    own = log_p[np.arange(24), np.asarray(case.data.labels)]
    np.testing.assert_allclose(loss_signal(*case), own, rtol=1e-4)
    np.testing.assert_allclose(confidence_signal(*case), log_p.max(-1), rtol=1e-4)
    features = shadow_features(*case)
    np.testing.assert_allclose(features[:, 0], own - np.log1p(-np.exp(own)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features[:, 1:], np.sort(log_p, -1)[:, ::-1], rtol=1e-4, atol=1e-5)


def test_signals_of_a_confident_model_are_not_ties(case: Case) -> None:
    head = jax.tree.map(lambda leaf: 60 * leaf, case.variables["params"]["linear"])
    sure = case._replace(variables={**case.variables, "params": {**case.variables["params"], "linear": head}})
    largest = jax.nn.softmax(jnp.asarray(logits_of(sure), jnp.float32)).max(-1)
    assert len(np.unique(largest)) < 24
    assert len(np.unique(confidence_signal(*sure))) == 24
    assert np.isfinite(shadow_features(*sure)).all()


# Models


def make_random_labels(seed: int, count: int) -> Dataset:
    """Images with random labels, which a model can only memorize."""
    data = make_textured_images(seed, count)
    return Dataset(data.images, jnp.asarray(np.random.default_rng(seed).integers(0, 4, count), jnp.int32))


MEMORIZING = TrainConfig(epochs=30, batch_size=25, learning_rate=0.05, crop=0, weight_decay=0.0)


@pytest.fixture(scope="module")
def memory() -> Case:
    """A model that has memorized its 100 images."""
    classifier, members = Classifier(SmallNet(((16, 2), (32, 2))), 4), make_random_labels(1, 100)
    return Case(classifier, train(jax.random.key(0), classifier, members, MEMORIZING).variables, members)


@pytest.mark.parametrize("signal", [loss_signal, confidence_signal])
def test_signals_do_not_separate_two_sets_that_the_model_never_saw(
    memory: Case, signal: Callable[..., jax.Array]
) -> None:
    first, second = (signal(memory.classifier, memory.variables, make_random_labels(seed, 1500)) for seed in (20, 21))
    found = membership(KEY, first, second, resamples=200)
    assert abs(found.auc.value - 0.5) <= 0.03
    assert found.tpr_at_1.value < 0.05


@pytest.mark.parametrize(("signal", "least"), [(loss_signal, 0.9), (confidence_signal, 0.7)])
def test_signals_separate_the_members_of_an_overfitted_model(
    memory: Case, signal: Callable[..., jax.Array], least: float
) -> None:
    inside, outside = (
        signal(memory.classifier, memory.variables, data) for data in (memory.data, make_random_labels(2, 400))
    )
    found = membership(KEY, inside, outside, resamples=200)
    assert found.auc.low > least
    assert found.balanced_accuracy.value > 0.6


def test_a_shadow_model_shows_what_members_look_like(memory: Case) -> None:
    shadow = shadow_model(jax.random.key(5), memory.classifier, make_random_labels(3, 200), MEMORIZING)
    assert len(shadow.members) == len(shadow.others) == 100
    rows = {image.tobytes() for image in np.asarray(shadow.members.images)}
    assert not rows & {image.tobytes() for image in np.asarray(shadow.others.images)}
    attack = (memory.classifier, shadow, memory.variables)
    inside, outside = (shadow_signal(*attack, data) for data in (memory.data, make_random_labels(2, 400)))
    assert membership(KEY, inside, outside, resamples=200).auc.low > 0.85
    first, second = (shadow_signal(*attack, make_random_labels(seed, 1500)) for seed in (20, 21))
    assert abs(membership(KEY, first, second, resamples=10).auc.value - 0.5) <= 0.03


# Re-injection


@jax.tree_util.Partial
def white_corner(images: jax.Array) -> jax.Array:
    return images.at[:, -3:, -3:].set(255)


QUICK = ReinjectConfig(rates=(0.125, 0.25), epochs=(1, 3), batch_size=12, crop=0)
LABELS = LabelMap("all_to_one", 3, 0)


def test_rows_are_those_of_training_on_poisoned_data_from_each_start(case: Case) -> None:
    other = case.classifier.init(jax.random.key(9), case.data.images)
    before = jax.tree.map(np.array, (case.variables, other))
    starts = {"a": case.variables, "b": other}
    rows = reinject(KEY, case.classifier, starts, case.data, case.data, white_corner, LABELS, QUICK)
    assert [(row.start, row.rate, row.steps, row.poisoned) for row in rows] == [
        (start, rate, steps, steps * 12 * rate) for start in "ab" for rate in (0.125, 0.25) for steps in (0, 2, 6)
    ]
    jax.tree.map(np.testing.assert_array_equal, (case.variables, other), before)

    poison_key, fit_key = jax.random.split(KEY)
    for start, variables in starts.items():
        data = poison(poison_key, case.data, white_corner, LABELS, 0.25).data
        step = GradientStep(Partial(supervised_loss, case.classifier), SGD(0.01, momentum=0.9, weight_decay=5e-4))
        fitted = fit(fit_key, step, step.init(variables), data, epochs=3, batch_size=12)
        expected = evaluate(case.classifier, fitted.variables, case.data, white_corner, LABELS)
        found = next(row for row in rows if (row.start, row.rate, row.steps) == (start, 0.25, 6))
        assert found.scores == expected
        first = next(row for row in rows if (row.start, row.steps) == (start, 0))
        assert first.scores == evaluate(case.classifier, variables, case.data, white_corner, LABELS)


def test_starts_and_rates_share_one_program(case: Case) -> None:
    few = ReinjectConfig(rates=(0.125,), epochs=(1,), batch_size=12, crop=0)
    reinject(KEY, case.classifier, {"a": case.variables}, case.data, case.data, white_corner, LABELS, few)
    compiled = cache_size(_compiled_epoch)
    starts = {"a": case.variables, "b": jax.tree.map(lambda leaf: leaf / 2, case.variables)}
    first, again = (
        reinject(KEY, case.classifier, starts, case.data, case.data, white_corner, LABELS, QUICK) for _ in range(2)
    )
    assert cache_size(_compiled_epoch) == compiled
    assert first == again


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rates", ()),
        ("rates", (0.0,)),
        ("rates", (1.1,)),
        ("epochs", ()),
        ("epochs", (0, 1)),
        ("epochs", (2, 2)),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("crop", -1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^ReinjectConfig\.{field} is "):
        ReinjectConfig(**{field: value})


@pytest.mark.slow
def test_a_backdoor_returns_on_poisoned_data_and_sooner_with_more_of_it() -> None:
    small = miniature()
    data = make_textured_images(7, 320)
    training = TrainConfig(epochs=10, batch_size=32, learning_rate=0.05, crop=0)
    clean = train(jax.random.key(8), small.classifier, data, training).variables
    config = ReinjectConfig(rates=(0.02, 0.2), epochs=(1, 4, 8), batch_size=32, crop=0)
    rows = reinject(KEY, small.classifier, {"clean": clean}, data, small.test, small.trigger, small.label_map, config)
    asr = {rate: np.array([row.scores.asr for row in rows if row.rate == rate], float) for rate in config.rates}
    assert asr[0.2][0] < 0.1
    assert asr[0.2][-1] > 0.9
    assert asr[0.02][-1] < asr[0.2][-1]
    assert all(row.scores.acc > 0.9 for row in rows if row.steps == 80)
