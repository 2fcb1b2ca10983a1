"""MM-BD: margins against linear programs, the test against SciPy and under its null, and which models it flags."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import cache_size
from scipy import stats
from scipy.optimize import linprog

from backdoor_jax import (
    BadNets,
    Classifier,
    NonFiniteError,
    TrainConfig,
    UserError,
    build_classifier,
    digits,
    evaluate,
    train,
)
from backdoor_jax.attacks import AttackContext
from backdoor_jax.data import LabelMap
from backdoor_jax.interop.pytorch import zeros
from backdoor_jax.metrics import MarginConfig, largest_margin, maximum_margins, mm_bd
from backdoor_jax.metrics.detection import _ascend
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
    """The maximum margin as a linear program over pixels and the margin."""
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
    expected = [np.maximum(-apart, 0).sum() - shift, np.maximum(apart, 0).sum() + shift]
    found = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(rate=0.05))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("classes", [5, 12])
def test_margins_approach_those_of_linear_programs_from_below(classes: int) -> None:
    classifier, variables = linear(classes)
    config = MarginConfig(starts=10, tolerance=0.0)
    found = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, config)
    expected = np.array([exact(variables, target) for target in range(classes)])
    assert (found <= expected + 1e-4).all()
    assert (found >= expected - 0.05 * np.abs(expected) - 0.1).all()


def test_images_that_do_not_fit_into_memory_are_an_error() -> None:
    classifier = build_classifier("resnet18", 2, width=2)
    with pytest.raises(UserError, match=r"mm_bd on 60 images of 100000x100000: needs .* GB of memory"):
        maximum_margins(jax.random.key(0), classifier, zeros(classifier), (10**5, 10**5, 3))


def test_margins_grow_with_more_starts_and_steps() -> None:
    classifier, variables = linear(6)
    one, more = (
        maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(starts=starts, steps=steps))
        for starts, steps in ((1, 2), (30, 100))
    )
    assert (more > one).all()


def test_the_ascent_stops_where_the_margin_hardly_changes() -> None:
    """With a huge tolerance that is after the second step, the first with a step before it to compare with."""
    classifier, variables = linear(5)
    stopped, two, three = (
        maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(starts=3, rate=1e-3, **options))
        for options in ({"tolerance": 1e9}, {"steps": 2}, {"steps": 3})
    )
    np.testing.assert_array_equal(stopped, two)
    assert (three > two).all()


def test_margins_depend_on_the_key_alone_and_are_compiled_once() -> None:
    classifier, variables = linear(5)
    first = maximum_margins(jax.random.key(0), classifier, variables, SHAPE, MarginConfig(steps=5))
    compiled = cache_size(_ascend)
    twice = jax.tree.map(lambda leaf: 2 * leaf, variables)
    maximum_margins(jax.random.key(0), classifier, twice, SHAPE, MarginConfig(steps=5, rate=0.1, tolerance=0.1))
    again, other = (
        maximum_margins(jax.random.key(number), classifier, variables, SHAPE, MarginConfig(steps=5))
        for number in (0, 1)
    )
    assert cache_size(_ascend) == compiled
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


# The test


@pytest.mark.parametrize(
    "margins", [[5.0, 5.4, 4.8, 6.0, 5.2, 5.1], [1.0, 2.0, 3.0, 4.0, 30.0], [3.0, -1.0, 2.0, 0, 1]]
)
def test_the_p_value_is_that_of_the_largest_of_as_many_gamma_values(margins: list[float]) -> None:
    found = largest_margin(np.array(margins))
    shape, place, scale = stats.gamma.fit(np.delete(margins, np.argmax(margins)))
    expected = 1 - stats.gamma.cdf(max(margins), shape, place, scale) ** len(margins)
    assert found.target == int(np.argmax(margins))
    assert found.p_value == pytest.approx(expected, rel=1e-6, abs=1e-12)
    deviation = np.median(np.abs(np.array(margins) - np.median(margins))) / stats.norm.ppf(0.75)
    assert found.mad_score == pytest.approx((max(margins) - np.median(margins)) / deviation)


def test_a_tiny_p_value_is_exact() -> None:
    margins = np.append(np.random.default_rng(0).gamma(50.0, 1.0, 30), 500.0)
    found = largest_margin(margins).p_value
    assert found is not None and 0 < found < 1e-17


def test_the_published_test_exceeds_its_level() -> None:
    """All values are of one gamma distribution, so every flag is a false alarm; the module's docstring says why."""
    generator = np.random.default_rng(0)
    flags = [largest_margin(generator.gamma(9.0, 2.0, 10)).flagged() is not None for _ in range(60)]
    assert 0.1 < np.mean(flags) < 0.5


def test_equal_margins_have_a_p_value() -> None:
    assert largest_margin(np.ones(6)).p_value == 1
    assert largest_margin(np.append(np.ones(6), 2.0)).p_value == 0
    assert largest_margin(np.ones(6)).mad_score == 0


def test_with_few_classes_there_is_no_p_value_and_nothing_is_flagged() -> None:
    found = largest_margin(np.array([1.0, 1.1, 0.9, 50.0]))
    assert (found.target, found.p_value, found.flagged()) == (3, None, None)
    assert found.mad_score > 3.5


def test_a_class_is_flagged_at_the_level_of_its_p_value() -> None:
    found = largest_margin(np.array([5.0, 5.4, 4.8, 7.0, 5.2, 5.1]))
    assert found.p_value is not None
    assert found.flagged(found.p_value) == 3
    assert found.flagged(found.p_value * 0.99) is None


def test_bad_weights_and_settings_are_errors() -> None:
    classifier, variables = linear(5)
    with pytest.raises(NonFiniteError, match=r"mm_bd: variables: weights .* are not finite"):
        mm_bd(jax.random.key(0), classifier, jax.tree.map(lambda x: x * jnp.nan, variables), SHAPE)
    wrong: dict[str, Any] = {"starts": 0, "steps": 0, "rate": 0.0, "tolerance": -1.0}
    for field, value in wrong.items():
        with pytest.raises(UserError, match=rf"^MarginConfig\.{field} is "):
            MarginConfig(**{field: value})


# End to end


def test_only_a_class_with_a_much_larger_margin_is_flagged() -> None:
    """Every class has its own pixel, whose weight is the margin that the class can reach."""
    classifier, _ = linear(10)
    weights = np.linspace(4, 6, 10)
    for margins, flagged in ((weights, None), (np.where(np.arange(10) == 7, 12, weights), 7)):
        variables = {"params": {"out": {"kernel": jnp.asarray(np.eye(12, 10) * margins), "bias": jnp.zeros(10)}}}
        found = mm_bd(jax.random.key(0), classifier, variables, SHAPE)
        np.testing.assert_allclose(found.margins, margins, rtol=1e-5)
        assert found.flagged() == flagged
        assert (found.mad_score > 3.5) == (flagged is not None)


@pytest.mark.slow
def test_a_small_victim_is_flagged_with_its_target_and_a_clean_model_is_not() -> None:
    task, classifier = digits(), build_classifier("small_cnn", 10, width=16)
    training = TrainConfig(epochs=12, batch_size=64, learning_rate=0.05, crop=0)
    key, train_key = jax.random.key(1), jax.random.key(101)
    victim = BadNets(target=3).train_victim_in(AttackContext(classifier, task.train, training), key, train_key)
    clean_model = train(train_key, classifier, task.train, training).variables
    scores = evaluate(classifier, victim.variables, task.test, victim.trigger, LabelMap("all_to_one", 10, 3))
    assert scores.acc > 0.9 and scores.asr is not None and scores.asr > 0.9
    backdoored, clean = (
        mm_bd(jax.random.key(1), classifier, variables, (16, 16, 3), MarginConfig(starts=3))
        for variables in (victim.variables, clean_model)
    )
    assert backdoored.flagged(0.001) == 3 and backdoored.mad_score > 10
    assert clean.flagged() is None and clean.mad_score < 10
