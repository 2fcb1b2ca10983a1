"""MM-BD: margins against linear programmes, the test against SciPy and under its null, and what is flagged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linprog

from backdoor_jax import (
    BadNets,
    Classifier,
    LabelMap,
    MarginConfig,
    NonFiniteError,
    Scene,
    TrainConfig,
    UserError,
    build_classifier,
    digits,
    evaluate,
    maximum_margins,
    mm_bd,
    train,
)
from backdoor_jax.metrics.detection import _ascend, largest_margin
from backdoor_jax.models import Variables

SHAPE = (2, 2, 3)


def features(variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
    del train
    return x.reshape(len(x), -1), variables


def head(variables: Variables, latent: jax.Array) -> jax.Array:
    return latent @ variables["params"]["out"]["kernel"] + variables["params"]["out"]["bias"]


def linear(classes: int, seed: int = 0) -> tuple[Classifier, Variables]:
    """A classifier of pixels in [0, 1] by a random matrix."""
    generator = np.random.default_rng([seed, classes])
    kernel = generator.choice([-1, 1], (12, classes)) * generator.uniform(0.5, 2, (12, classes))
    variables = {
        "params": {"out": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(generator.normal(size=classes))}}
    }
    return Classifier.from_functions(None, features, head, classes, ("out",)), variables


def exact(variables: Variables, target: int) -> float:
    """The maximum margin as a linear programme over pixels and the margin."""
    kernel, bias = (np.asarray(variables["params"]["out"][name], np.float64) for name in ("kernel", "bias"))
    others = [j for j in range(len(bias)) if j != target]
    below = np.concatenate([(kernel[:, others] - kernel[:, [target]]).T, np.ones((len(others), 1))], 1)
    solution = linprog(
        np.append(np.zeros(12), -1.0), below, bias[target] - bias[others], bounds=[(0, 1)] * 12 + [(None, None)]
    )
    return -float(solution.fun)


def test_two_classes_have_the_margins_of_the_closed_form() -> None:
    classifier, variables = linear(2)
    kernel, bias = (np.asarray(variables["params"]["out"][name]) for name in ("kernel", "bias"))
    apart, shift = kernel[:, 1] - kernel[:, 0], bias[1] - bias[0]
    want = [np.maximum(-apart, 0).sum() - shift, np.maximum(apart, 0).sum() + shift]
    found = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(rate=0.05))
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize("classes", [5, 12])
def test_margins_come_close_to_linear_programmes_and_never_above(classes: int) -> None:
    classifier, variables = linear(classes)
    config = MarginConfig(starts=10, tolerance=0.0)
    found = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, config)
    want = np.array([exact(variables, target) for target in range(classes)])
    assert (found <= want + 1e-4).all()
    assert (found >= want - 0.05 * np.abs(want) - 0.1).all()


def test_margins_do_not_fall_with_more_starts_and_steps() -> None:
    classifier, variables = linear(6)
    one, more = (
        maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(starts=starts, steps=steps))
        for starts, steps in ((1, 2), (30, 100))
    )
    assert (more > one).all()


def test_a_class_is_done_where_its_margin_hardly_changes() -> None:
    """With an endless tolerance that is after the second step, the first that has something to compare with."""
    classifier, variables = linear(5)
    config = {"starts": 3, "rate": 1e-3}
    stopped = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(tolerance=1e9, **config))
    two = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(steps=2, **config))
    three = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(steps=3, **config))
    np.testing.assert_array_equal(stopped, two)
    assert (three > two).all()


def test_margins_are_deterministic_under_their_key_and_compiled_once() -> None:
    classifier, variables = linear(5)
    first = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(steps=5))
    compiled = _ascend._cache_size()
    twice = jax.tree.map(lambda leaf: 2 * leaf, variables)
    maximum_margins(jax.random.key(0), classifier, twice, SHAPE, MarginConfig(steps=5, rate=0.1, tolerance=0.1))
    again, other = (
        maximum_margins(jax.random.key(number), classifier, variables, SHAPE, MarginConfig(steps=5))
        for number in (0, 1)
    )
    assert _ascend._cache_size() == compiled
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


# The test


@pytest.mark.parametrize(
    "margins", [[5.0, 5.4, 4.8, 6.0, 5.2, 5.1], [1.0, 2.0, 3.0, 4.0, 30.0], [3.0, -1.0, 2.0, 0, 1]]
)
def test_the_p_value_is_that_of_the_largest_of_as_many_gamma_values(margins: list[float]) -> None:
    found = largest_margin(np.array(margins))
    shape, place, scale = stats.gamma.fit(np.delete(margins, np.argmax(margins)))
    want = 1 - stats.gamma.cdf(max(margins), shape, place, scale) ** len(margins)
    assert found.target == int(np.argmax(margins))
    assert found.p_value == pytest.approx(want, rel=1e-6, abs=1e-12)
    deviation = np.median(np.abs(np.array(margins) - np.median(margins))) / stats.norm.ppf(0.75)
    assert found.mad_score == pytest.approx((max(margins) - np.median(margins)) / deviation)


def test_a_tiny_p_value_keeps_its_digits() -> None:
    margins = np.append(np.random.default_rng(0).gamma(50.0, 1.0, 30), 500.0)
    found = largest_margin(margins).p_value
    assert found is not None and 0 < found < 1e-17


def test_the_published_test_flags_more_often_than_its_level() -> None:
    """Values of one gamma distribution, so that every flag is a false one; see the limit in the file's text."""
    generator = np.random.default_rng(0)
    flags = [largest_margin(generator.gamma(9.0, 2.0, 10)).flagged() is not None for _ in range(60)]
    assert 0.1 < np.mean(flags) < 0.5


def test_values_that_do_not_differ_are_no_reason_to_fail() -> None:
    assert largest_margin(np.ones(6)).p_value == 1
    assert largest_margin(np.append(np.ones(6), 2.0)).p_value == 0
    assert largest_margin(np.ones(6)).mad_score == 0


def test_few_classes_have_no_p_value_and_nothing_is_flagged() -> None:
    found = largest_margin(np.array([1.0, 1.1, 0.9, 50.0]))
    assert (found.target, found.p_value, found.flagged()) == (3, None, None)
    assert found.mad_score > 3.5


def test_a_class_is_flagged_up_to_the_level() -> None:
    found = largest_margin(np.array([5.0, 5.4, 4.8, 7.0, 5.2, 5.1]))
    assert found.p_value is not None
    assert found.flagged(found.p_value) == 3
    assert found.flagged(found.p_value * 0.99) is None


def test_what_cannot_be_used_is_refused() -> None:
    classifier, variables = linear(5)
    with pytest.raises(NonFiniteError, match="mm_bd: margins are not finite"):
        mm_bd(jax.random.key(0), classifier, jax.tree.map(lambda x: x * jnp.nan, variables), SHAPE)
    wrong: dict[str, Any] = {"starts": 0, "steps": 0, "rate": 0.0, "tolerance": -1.0}
    for field, value in wrong.items():
        with pytest.raises(UserError, match=rf"^MarginConfig\.{field} is "):
            MarginConfig(**{field: value})


# End to end


def test_a_class_of_much_larger_margin_is_flagged_and_without_one_none_is() -> None:
    """Every class has a pixel of its own, whose weight is the margin that it can reach."""
    classifier, _ = linear(10)
    weights = np.linspace(4, 6, 10)
    for margins, flagged in ((weights, None), (np.where(np.arange(10) == 7, 12, weights), 7)):
        variables = {"params": {"out": {"kernel": jnp.asarray(np.eye(12, 10) * margins), "bias": jnp.zeros(10)}}}
        found = mm_bd(jax.random.key(0), classifier, variables, SHAPE)
        np.testing.assert_allclose(found.margins, margins, rtol=1e-5)
        assert found.flagged() == flagged
        assert (found.mad_score > 3.5) == (flagged is not None)


@pytest.mark.slow
def test_a_small_victim_is_flagged_with_its_target_and_its_unpoisoned_twin_is_not() -> None:
    task, classifier = digits(), build_classifier("small_cnn", 10, width=16)
    training = TrainConfig(epochs=12, batch_size=64, learning_rate=0.05, crop=0)
    key, train_key = jax.random.key(1), jax.random.key(101)
    planted = BadNets(target=3).plant(key, train_key, Scene(classifier, task.train, training))
    twin, _ = train(train_key, classifier, task.train, training)
    scores = evaluate(classifier, planted.variables, task.test, planted.trigger, LabelMap("all_to_one", 10, 3))
    assert scores.acc > 0.9 and scores.asr is not None and scores.asr > 0.9
    victims, twins = (
        mm_bd(jax.random.key(1), classifier, variables, (16, 16, 3), MarginConfig(starts=3))
        for variables in (planted.variables, twin)
    )
    assert victims.flagged(0.001) == 3 and victims.mad_score > 10
    assert twins.flagged() is None and twins.mad_score < 3.5
