"""I-BAU: the hypergradient against closed forms, its steps against float64 NumPy, and a miniature victim repaired."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_victim import TRACES, Bench, Linear, bench, equal, leaves_of

from backdoor_jax import Classifier, Dataset, IBauConfig, UserError, i_bau, make_dataset
from backdoor_jax.config import numbers
from backdoor_jax.defenses.i_bau import SearchLoss, UnlearnLoss, at_optimum, plain_sgd
from backdoor_jax.training import GradientStep

CLASSES, SHAPE, IMAGES = 3, (3, 3, 1), 40


@pytest.fixture(scope="module")
def case() -> Bench:
    return bench()


def small(**changes: Any) -> IBauConfig:
    settings = {"steps": 4, "rounds": 2, "search_steps": 2, "batch_size": 20, "learning_rate": 1e-3, "crop": 0}
    return IBauConfig(**{**settings, "terms": 2, **changes})


class Quadratic(NamedTuple):
    """g = d'Ad/2 - d'Bw, least at the inverse of A times Bw, and f = |d - c|^2/2 + w'Dw/2."""

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
    want = problem.d @ w + rate * b.T @ answer
    np.testing.assert_allclose(slope, want, rtol=1e-3, atol=1e-4)
    assert float(value) == pytest.approx(away @ away / 2 + w @ problem.d @ w / 2, rel=1e-4)
    if terms == 400:  # the whole sum: the slope of f at the optimum, which moves with the weights
        np.testing.assert_allclose(slope, problem.d @ w + b.T @ np.linalg.solve(a, away), rtol=1e-3, atol=1e-4)


class Numpy64:
    """Losses and derivatives of a linear model in float64; `w` holds kernel and bias in one."""

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
        """Of the mean loss by the perturbation."""
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


def run(plain: Plain, key: int = 1, **changes: Any) -> Any:
    return i_bau(jax.random.key(key), plain.classifier, plain.variables, plain.data, small(**changes))


def test_the_search_ascends_the_loss_of_the_models_own_predictions(plain: Plain) -> None:
    classifier, variables, data, change, reference = plain
    config = small(search_rate=2.0, penalty=0.01)
    step = GradientStep(SearchLoss(classifier), plain_sgd)
    constants = {**numbers(config), "model": variables}
    start = {"params": {"perturbation": jnp.asarray(change.reshape(SHAPE), jnp.float32)}}
    state, info = jax.jit(step)(step.init(start, constants), data, jax.random.key(0), constants)
    predicted = reference.probabilities(np.zeros(9), reference.w).argmax(1)
    assert np.any(predicted != reference.y)
    harm = reference.loss(change, reference.w, predicted).mean()
    assert float(info["harm"]) == pytest.approx(harm, rel=1e-4)
    assert float(info["loss"]) == pytest.approx(0.01 * np.sum(change**2) - harm, rel=1e-4)
    want = change + 2.0 * (reference.slope(change, reference.w, predicted) - 0.02 * change)
    np.testing.assert_allclose(state.variables["params"]["perturbation"].reshape(-1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("terms", [0, 1, 5])
def test_the_weights_descend_the_hypergradient_of_the_cross_entropy(plain: Plain, terms: int) -> None:
    classifier, variables, data, change, reference = plain
    config = small(share=1.0, penalty=0.05, inner_rate=0.4)
    constants = {**numbers(config), "perturbation": jnp.asarray(change.reshape(SHAPE), jnp.float32)}
    loss = UnlearnLoss(classifier, terms)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda v: loss(v, data, jax.random.key(0), constants)[0])
    )(variables)  # fmt: skip

    w, y = reference.w, reference.y
    p = reference.probabilities(change, w)
    assert float(value) == pytest.approx(reference.loss(change, w, y).mean(), rel=1e-4)
    curvature = sum(w[:-1] @ (np.diag(row) - np.outer(row, row)) @ w[:-1].T for row in p) / IMAGES
    jacobian = np.eye(9) - 0.4 * (2 * 0.05 * np.eye(9) - curvature)
    start = reference.slope(change, w, y)
    answer = sum((np.linalg.matrix_power(jacobian, k) @ start for k in range(terms)), np.zeros(9))
    want = (reference.x + np.append(change, 0)).T @ (p - np.eye(CLASSES)[y]) / IMAGES
    for index in np.ndindex(want.shape):
        nudge = np.zeros_like(w)
        nudge[index] = 1e-5
        # The inner loss is less the cross-entropy, so its mixed derivative is less that of `slope`.
        mixed = (reference.slope(change, w + nudge, y) - reference.slope(change, w - nudge, y)) / 2e-5
        want[index] += 0.4 * answer @ mixed
    found = gradient["params"]["linear"]
    np.testing.assert_allclose(np.vstack([found["kernel"], found["bias"]]), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("share", "carriers"), [(0.01, 1), (0.025, 1), (0.05, 2), (1.0, IMAGES)])
def test_a_share_of_the_batch_carries_the_perturbation_and_at_least_one_image(
    plain: Plain, share: float, carriers: int
) -> None:
    classifier, variables, data, change, reference = plain
    constants = {**numbers(small(share=share)), "perturbation": jnp.asarray(change.reshape(SHAPE), jnp.float32)}
    alone = reference.loss(np.zeros(9), reference.w, reference.y)
    harm = reference.loss(change, reference.w, reference.y) - alone
    for seed in range(4):
        key = jax.random.key(seed)
        value, _ = UnlearnLoss(classifier, 0)(variables, data, key, constants)
        chosen = np.asarray(jax.random.permutation(key, IMAGES)) < carriers
        assert chosen.sum() == carriers
        assert float(value) == pytest.approx((alone + harm * chosen).mean(), rel=1e-4)


def test_one_key_gives_one_result_and_the_victim_stays(plain: Plain) -> None:
    before = leaves_of(plain.variables)
    one, same, other = (run(plain, key) for key in (1, 1, 2))
    assert equal(before, plain.variables)
    assert equal(one.variables, same.variables) and one.info == same.info
    assert not equal(one.variables["params"], other.variables["params"])
    assert jax.tree.structure(one.variables) == jax.tree.structure(plain.variables)
    assert (one.info["steps"], one.info["batch"], len(one.info["rounds"])) == (4, 20, 2)
    assert all(round_["norm"] > 0 and round_["harm"] > 0 for round_ in one.info["rounds"])


def test_rounds_and_a_sweep_trace_once(plain: Plain) -> None:
    run(plain)
    traced = len(TRACES)
    changes: list[dict[str, Any]] = [{"search_rate": 5.0, "share": 0.5}, {"penalty": 0.1, "rounds": 1}]
    ends = [run(plain, **change).variables for change in changes]
    assert len(TRACES) == traced
    assert not equal(*ends)


@pytest.mark.slow
def test_the_backdoor_goes_and_each_round_finds_less() -> None:
    case: Bench = bench()
    # So sure is the miniature victim that a search has hardly a gradient at first; a smaller head decides alike.
    params = case.victim["params"]
    victim = {**case.victim, "params": {**params, "linear": jax.tree.map(lambda w: 0.2 * w, params["linear"])}}
    config = small(steps=25, rounds=2, batch_size=32, search_steps=6, share=0.3, terms=1)
    repair = i_bau(jax.random.key(1), case.classifier, victim, case.clean, config)
    before, after = case.scores(victim), case.scores(repair.variables)
    assert before.asr is not None and after.asr is not None
    assert after.asr < before.asr - 0.5
    assert after.acc > before.acc - 0.1
    first, *_, last = repair.info["rounds"]
    assert last["harm"] < first["harm"] / 10
    assert equal(repair.variables["batch_stats"], victim["batch_stats"])


def test_presets_are_the_benchmarks_and_the_authors_code() -> None:
    assert IBauConfig.preset("benchmark") == IBauConfig()
    for name, values in (("benchmark", (50, 10, 256, 1e-4, 4)), ("released", (250, 50, 100, 1e-3, 0))):
        config = IBauConfig.preset(name)
        found = (config.steps, config.search_steps, config.batch_size, config.learning_rate, config.crop)
        assert found == values
        assert (config.rounds, config.terms, config.inner_rate) == (5, 5, 0.1)
        assert (config.search_rate, config.penalty, config.share) == (10.0, 1e-3, 0.01)
    with pytest.raises(UserError, match=r"'mine'.*benchmark.*released"):
        IBauConfig.preset("mine")


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 0), ("search_steps", 0), ("search_rate", 0.0), ("penalty", -1.0), ("share", 0.0), ("share", 1.5),
     ("terms", -1), ("inner_rate", float("nan")), ("steps", 0)],
)  # fmt: skip
def test_a_bad_setting_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"IBauConfig.{field} is .*expected"):
        IBauConfig(**{field: value})
