"""I-BAU: the hypergradient against closed forms, its steps against float64 NumPy, and a miniature victim repaired."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, assert_trees_equal, trees_equal
from jax.tree_util import Partial
from miniature import TRACES, Linear, flat_miniature

from backdoor_jax import Classifier, Dataset, Repair, UserError, make_dataset
from backdoor_jax.defenses import IBAU
from backdoor_jax.defenses.i_bau import at_optimum, search_loss, unlearn_loss
from backdoor_jax.training import SGD, GradientStep

CLASSES, SHAPE, IMAGES = 3, (3, 3, 1), 40


def small(**changes: Any) -> IBAU:
    settings = {"steps": 4, "rounds": 2, "search_steps": 2, "batch_size": 20, "learning_rate": 1e-3, "crop": 0}
    return IBAU(**{**settings, "terms": 2, **changes})


class Quadratic(NamedTuple):
    """g = d'Ad/2 - d'Bw, minimal at the inverse of A times Bw, and f = |d - c|^2/2 + w'Dw/2."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray

    def inner(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ (jnp.asarray(self.a) @ x) / 2 - x @ (jnp.asarray(self.b) @ w)

    def outer(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum((x - jnp.asarray(self.c)) ** 2) / 2 + w @ (jnp.asarray(self.d) @ w) / 2


@pytest.mark.parametrize("terms", [0, 1, 3, 400])
def test_the_hypergradient_of_a_quadratic_is_its_closed_form(terms: int) -> None:
    generator, rate = np.random.default_rng(0), 0.2
    root = generator.standard_normal((4, 4))
    a, b = root @ root.T / 4 + np.eye(4), generator.standard_normal((4, 3))
    problem = Quadratic(a, b, generator.standard_normal(4), np.diag([1.0, 2.0, 3.0]))
    w = generator.standard_normal(3)
    optimum = np.linalg.solve(a, b @ w)
    value, slope = jax.value_and_grad(
        lambda w: at_optimum(problem.outer, problem.inner, jnp.asarray(optimum, jnp.float32), w, terms, rate)
    )(jnp.asarray(w, jnp.float32))

    away = optimum - problem.c
    answer = sum((np.linalg.matrix_power(np.eye(4) - rate * a, k) @ away for k in range(terms)), np.zeros(4))
    expected = problem.d @ w + rate * b.T @ answer
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-4)
    assert float(value) == pytest.approx(away @ away / 2 + w @ problem.d @ w / 2, rel=1e-4)
    if terms == 400:  # the complete sum: the slope of f at the optimum, which depends on the weights
        np.testing.assert_allclose(slope, problem.d @ w + b.T @ np.linalg.solve(a, away), rtol=1e-3, atol=1e-4)


class Numpy64:
    """Losses and derivatives of a linear model in float64; `w` holds kernel and bias together."""

    def __init__(self, classifier: Classifier, variables: Any, data: Dataset) -> None:
        head = variables["params"]["linear"]
        self.w = np.vstack([np.asarray(head["kernel"], np.float64), np.asarray(head["bias"], np.float64)])
        pixels = np.asarray(data.images, np.float64).reshape(IMAGES, -1) / 255
        self.x = np.hstack([(pixels - classifier.mean[0]) / classifier.std[0], np.ones((IMAGES, 1))])
        self.y = np.asarray(data.labels)

    def probabilities(self, change: np.ndarray, w: np.ndarray) -> np.ndarray:
        z = (self.x + np.append(change, 0)) @ w
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def loss(self, change: np.ndarray, w: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return -np.log(self.probabilities(change, w)[np.arange(IMAGES), labels])

    def slope(self, change: np.ndarray, w: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The gradient of the mean loss by the perturbation."""
        return ((self.probabilities(change, w) - np.eye(CLASSES)[labels]) @ w[:-1].T).mean(0)


class Plain(NamedTuple):
    """A linear model, images, and a perturbation."""

    classifier: Classifier
    variables: dict[str, Any]
    data: Dataset
    change: np.ndarray
    reference: Numpy64


@pytest.fixture(scope="module")
def plain() -> Plain:
    generator = np.random.default_rng(0)
    kernel, bias = generator.standard_normal((9, CLASSES)), generator.standard_normal(CLASSES)
    head = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    data = make_dataset(
        generator.integers(0, 256, (IMAGES, *SHAPE)).astype(np.uint8), np.arange(IMAGES) % CLASSES, CLASSES
    )
    classifier, variables = Classifier(Linear(CLASSES), CLASSES, mean=(0.4,), std=(0.3,)), {"params": {"linear": head}}
    return Plain(classifier, variables, data, 0.5 * generator.standard_normal(9), Numpy64(classifier, variables, data))


def run(plain: Plain, key: int = 1, **changes: Any) -> Repair:
    return small(**changes).repair(jax.random.key(key), plain.classifier, plain.variables, plain.data)


def test_the_search_ascends_the_loss_of_the_models_own_predictions(plain: Plain) -> None:
    classifier, variables, data, change, reference = plain
    step = GradientStep(Partial(search_loss, classifier, 0.01, variables), SGD(2.0))
    start = {"params": {"perturbation": jnp.asarray(change.reshape(SHAPE), jnp.float32)}}
    state, info = jax.jit(step)(step.init(start), data, jax.random.key(0))
    predicted = reference.probabilities(np.zeros(9), reference.w).argmax(1)
    assert np.any(predicted != reference.y)
    harm = reference.loss(change, reference.w, predicted).mean()
    assert float(info["harm"]) == pytest.approx(harm, rel=1e-4)
    assert float(info["loss"]) == pytest.approx(0.01 * np.sum(change**2) - harm, rel=1e-4)
    expected = change + 2.0 * (reference.slope(change, reference.w, predicted) - 0.02 * change)
    np.testing.assert_allclose(state.variables["params"]["perturbation"].reshape(-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("terms", [0, 1, 5])
def test_the_weights_descend_the_hypergradient_of_the_cross_entropy(plain: Plain, terms: int) -> None:
    classifier, variables, data, change, reference = plain
    defense = small(share=1.0, penalty=0.05, inner_rate=0.4, terms=terms)
    loss = Partial(unlearn_loss, classifier, defense, jnp.asarray(change.reshape(SHAPE), jnp.float32))
    value, gradient = jax.jit(jax.value_and_grad(lambda v: loss(v, data, jax.random.key(0))[0]))(variables)

    w, y = reference.w, reference.y
    p = reference.probabilities(change, w)
    assert float(value) == pytest.approx(reference.loss(change, w, y).mean(), rel=1e-4)
    curvature = sum(w[:-1] @ (np.diag(row) - np.outer(row, row)) @ w[:-1].T for row in p) / IMAGES
    jacobian = np.eye(9) - 0.4 * (2 * 0.05 * np.eye(9) - curvature)
    start = reference.slope(change, w, y)
    answer = sum((np.linalg.matrix_power(jacobian, k) @ start for k in range(terms)), np.zeros(9))
    expected = (reference.x + np.append(change, 0)).T @ (p - np.eye(CLASSES)[y]) / IMAGES
    for index in np.ndindex(expected.shape):
        nudge = np.zeros_like(w)
        nudge[index] = 1e-5
        # The inner loss has minus the cross-entropy, so its mixed derivative is minus that of `slope`.
        mixed = (reference.slope(change, w + nudge, y) - reference.slope(change, w - nudge, y)) / 2e-5
        expected[index] += 0.4 * answer @ mixed
    found = gradient["params"]["linear"]
    np.testing.assert_allclose(np.vstack([found["kernel"], found["bias"]]), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("share", "carriers"), [(0.01, 1), (0.025, 1), (0.05, 2), (1.0, IMAGES)])
def test_a_share_of_the_batch_carries_the_perturbation_and_at_least_one_image(
    plain: Plain, share: float, carriers: int
) -> None:
    classifier, variables, data, change, reference = plain
    defense = small(share=share, terms=0)
    loss = Partial(unlearn_loss, classifier, defense, jnp.asarray(change.reshape(SHAPE), jnp.float32))
    alone = reference.loss(np.zeros(9), reference.w, reference.y)
    harm = reference.loss(change, reference.w, reference.y) - alone
    for seed in range(4):
        key = jax.random.key(seed)
        value, _ = loss(variables, data, key)
        chosen = np.asarray(jax.random.permutation(key, IMAGES)) < carriers
        assert chosen.sum() == carriers
        assert float(value) == pytest.approx((alone + harm * chosen).mean(), rel=1e-4)


def test_one_key_gives_one_result_and_the_victim_is_unchanged(plain: Plain) -> None:
    one = assert_depends_on_key_alone(lambda key: run(plain, key), plain.variables)
    assert (one.info["steps"], one.info["batch"], len(one.info["rounds"])) == (4, 20, 2)
    assert all(round_["norm"] > 0 and round_["harm"] > 0 for round_ in one.info["rounds"])


def test_later_rounds_and_other_floats_do_not_trace_again(plain: Plain) -> None:
    def traces(**changes: Any) -> int:
        before = len(TRACES)
        run(plain, **changes)
        return len(TRACES) - before

    assert traces(rounds=3, terms=3) == traces(rounds=1, terms=3) > 0
    changes: list[dict[str, Any]] = [{"search_rate": 5.0, "share": 0.5}, {"penalty": 0.1, "inner_rate": 0.2}]
    run(plain)
    traced = len(TRACES)
    ends = [run(plain, **change).variables for change in changes]
    assert len(TRACES) == traced
    assert not trees_equal(*ends)


@pytest.mark.slow
def test_the_backdoor_is_removed_and_the_last_round_finds_less_harm() -> None:
    case = flat_miniature()
    # The victim is so sure that a search has hardly any gradient at first; a smaller head predicts the same classes.
    params = case.variables["params"]
    victim = {**case.variables, "params": {**params, "linear": jax.tree.map(lambda w: 0.2 * w, params["linear"])}}
    defense = small(steps=25, rounds=2, batch_size=32, search_steps=6, share=0.3, terms=1)
    repair = defense.repair(jax.random.key(1), case.classifier, victim, case.clean)
    before, after = case.scores(victim), case.scores(repair.variables)
    assert before.asr is not None and after.asr is not None
    assert after.asr < before.asr - 0.5
    assert after.acc > before.acc - 0.1
    first, *_, last = repair.info["rounds"]
    assert last["harm"] < first["harm"] / 10
    assert_trees_equal(repair.variables["batch_stats"], victim["batch_stats"])


def test_presets_are_the_code_of_the_benchmark_and_of_the_authors() -> None:
    assert IBAU.preset("benchmark") == IBAU()
    for name, values in (("benchmark", (50, 10, 256, 1e-4, 4)), ("released", (250, 50, 100, 1e-3, 0))):
        config = IBAU.preset(name)
        found = (config.steps, config.search_steps, config.batch_size, config.learning_rate, config.crop)
        assert found == values
        assert (config.rounds, config.terms, config.inner_rate) == (5, 5, 0.1)
        assert (config.search_rate, config.penalty, config.share) == (10.0, 1e-3, 0.01)
    with pytest.raises(UserError, match=r"'mine'.*benchmark.*released"):
        IBAU.preset("mine")


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 0), ("search_steps", 0), ("search_rate", 0.0), ("penalty", -1.0), ("share", 0.0), ("share", 1.5),
     ("terms", -1), ("inner_rate", float("nan")), ("steps", 0)],
)  # fmt: skip
def test_a_setting_out_of_range_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"IBAU.{field} is .*expected"):
        IBAU(**{field: value})
