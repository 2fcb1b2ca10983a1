"""SAU: search and loss against float64 NumPy on linear models, and a miniature victim repaired."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, assert_trees_equal, trees_equal
from jax.tree_util import Partial
from miniature import TRACES, Linear, Miniature, flat_miniature, miniature

from backdoor_jax import Classifier, Dataset, Repair, UserError, make_dataset
from backdoor_jax.defenses import SAU
from backdoor_jax.defenses.sau import jensen_shannon, sau_loss, shared_perturbations
from backdoor_jax.training import unlikelihood

CLASSES, SHAPE = 3, (4, 4, 1)


class Two(NamedTuple):
    """Two linear models that differ a little, and images."""

    classifier: Classifier
    student: dict[str, Any]
    victim: dict[str, Any]
    data: Dataset


@pytest.fixture(scope="module")
def two() -> Two:
    generator = np.random.default_rng(0)
    kernel, bias = generator.standard_normal((16, CLASSES)), 0.3 * generator.standard_normal(CLASSES)
    images = generator.integers(0, 256, (60, *SHAPE)).astype(np.uint8)
    student, victim = (
        {"params": {"linear": {"kernel": jnp.asarray(kernel + change, jnp.float32), "bias": jnp.asarray(bias)}}}
        for change in (0.4 * generator.standard_normal((16, CLASSES)), 0)
    )
    classifier = Classifier(Linear(CLASSES), CLASSES, mean=(0.4,), std=(0.5,))
    clean = np.asarray(classifier.logits(victim, jnp.asarray(images))[0]).argmax(1)
    labels = np.where(np.arange(60) % 6 == 0, (clean + 1) % CLASSES, clean)
    return Two(classifier, student, victim, make_dataset(images, labels, CLASSES))


@pytest.fixture(scope="module")
def case() -> Miniature:
    return miniature()


def small(**changes: Any) -> SAU:
    return SAU(**{"steps": 10, "batch_size": 32, "learning_rate": 1e-3, **changes})


def run(case: Miniature, key: int = 1, **changes: Any) -> Repair:
    return small(**changes).repair(jax.random.key(key), case.classifier, case.variables, case.clean)


class Numpy64:
    """SAU on `Linear` written out by hand."""

    def __init__(self, two: Two, config: SAU) -> None:
        models = [model["params"]["linear"] for model in (two.student, two.victim)]
        self.w = [np.asarray(model["kernel"], np.float64) for model in models]
        self.b = [np.asarray(model["bias"], np.float64) for model in models]
        self.x = np.asarray(two.data.images, np.float64).reshape(60, -1) / 255
        self.y = np.asarray(two.data.labels)
        self.config = config

    def logits(self, x: np.ndarray) -> list[np.ndarray]:
        return [(x - 0.4) / 0.5 @ w + b for w, b in zip(self.w, self.b, strict=True)]

    @staticmethod
    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def search(self) -> np.ndarray:
        config, onehot = self.config, np.eye(CLASSES)[self.y]
        clean = [z.argmax(1) for z in self.logits(self.x)]
        change = np.full_like(self.x, config.bound)
        for _ in range(config.search_steps):
            z = self.logits(self.x + change)
            p, q = (self.softmax(one) for one in z)
            found = [one.argmax(1) for one in z]
            misled = [a != b for a, b in zip(found, clean, strict=True)]
            shared = misled[0] & misled[1] & (found[0] == found[1])
            middle = (p + q) / 2
            slope = np.zeros_like(self.x)
            for own, w, done in ((p, self.w[0], misled[0]), (q, self.w[1], misled[1])):
                inner = np.log(own / middle) / 2  # of JS by this model's probabilities
                through = own * (inner - (own * inner).sum(1, keepdims=True))
                dz = config.beta1 / 2 * ~done[:, None] * (own - onehot) - config.beta2 * ~shared[:, None] * through
                slope += dz @ w.T
            change = np.clip(change + config.search_rate * np.sign(slope), -config.bound, config.bound)
        return change

    def loss(self, change: np.ndarray) -> dict[str, float]:
        config, rows = self.config, np.arange(60)
        z, _ = self.logits(self.x)
        z0 = self.logits(self.x)[1]
        zd, z0d = self.logits(self.x + change)
        target = z0d.argmax(1)
        misled = (target != self.y) & (target != z0.argmax(1))
        clean = -np.log(self.softmax(z)[rows, self.y]).mean()
        robust = -np.log(self.softmax(zd)[rows, self.y]).mean()
        unlearned = (-np.log(1 - self.softmax(zd)[rows, target]) * misled).mean()
        return {
            "loss": config.lambda1 * clean + config.lambda2 * robust + config.lambda3 * unlearned,
            "misled": misled.mean(),
            "shared": (misled & (zd.argmax(1) == target)).mean(),
        }


@pytest.mark.parametrize(
    "changes", [{}, {"search_rate": 0.03, "bound": 0.1}, {"beta1": 1.0, "beta2": 0.2, "lambda2": 0.5, "lambda3": 2.0}]
)
def test_search_and_loss_equal_an_independent_float64_computation(two: Two, changes: dict[str, Any]) -> None:
    config = small(**changes)
    reference = Numpy64(two, config)
    perturbation = reference.search()
    got = np.asarray(jax.jit(shared_perturbations)(two.classifier, config, two.victim, two.student, two.data))
    assert got.shape == two.data.images.shape
    np.testing.assert_allclose(got.reshape(60, -1), perturbation, atol=1e-6)
    assert np.abs(got).max() <= config.bound + 1e-7
    assert len(np.unique(got.round(4))) > 1

    loss = Partial(sau_loss, two.classifier, config, two.victim)
    value, (variables, info) = jax.jit(loss)(two.student, two.data, jax.random.key(0))
    expected = reference.loss(perturbation)
    assert 0 < expected["shared"] <= expected["misled"] < 1
    assert float(value) == pytest.approx(expected["loss"], rel=1e-4)
    assert float(info["misled"]) == pytest.approx(expected["misled"])
    assert float(info["shared"]) == pytest.approx(expected["shared"])
    assert_trees_equal(variables, two.student)


def test_the_gradient_is_taken_at_the_examples_and_not_through_the_search(two: Two) -> None:
    config = small()
    loss = Partial(sau_loss, two.classifier, config, two.victim)
    gradient = jax.jit(jax.grad(lambda v: loss(v, two.data, jax.random.key(0))[0]))(two.student)
    reference = Numpy64(two, config)
    change = reference.search()
    slopes = []
    for index in ((0, 0), (7, 1), (15, 2)):
        ends = []
        for step in (1e-5, -1e-5):
            reference.w[0][index] += step
            ends.append(reference.loss(change)["loss"])
            reference.w[0][index] -= step
        slopes.append((ends[0] - ends[1]) / 2e-5)
    found = np.asarray(gradient["params"]["linear"]["kernel"])
    np.testing.assert_allclose([found[0, 0], found[7, 1], found[15, 2]], slopes, rtol=1e-3, atol=1e-5)


def test_examples_do_not_depend_on_the_others_in_the_batch(case: Miniature) -> None:
    search = Partial(shared_perturbations, case.classifier, small(search_steps=3), case.variables, run(case).variables)
    all_twelve, four = search(case.clean.take(slice(0, 12))), search(case.clean.take(slice(4, 8)))
    assert np.mean(np.isclose(all_twelve[4:8], four)) > 0.99


def test_divergence_and_unlikelihood_in_closed_form() -> None:
    generator = np.random.default_rng(1)
    z, z0 = generator.standard_normal((2, 20, 5))
    p, q = (Numpy64.softmax(one) for one in (z, z0))
    middle = (p + q) / 2
    expected = (p * np.log(p / middle) + q * np.log(q / middle)).sum(1) / 2
    np.testing.assert_allclose(jensen_shannon(jnp.asarray(z), jnp.asarray(z0)), expected, rtol=1e-4)
    np.testing.assert_allclose(jensen_shannon(jnp.asarray(z), jnp.asarray(z)), 0, atol=1e-6)
    labels = np.arange(20) % 5
    np.testing.assert_allclose(
        unlikelihood(jnp.asarray(z), jnp.asarray(labels)), -np.log(1 - p[np.arange(20), labels]), rtol=1e-5
    )
    slope = jax.grad(lambda margin: unlikelihood(jnp.array([margin, 0.0]), jnp.array(0)))
    assert float(slope(60.0)) == 1.0
    assert float(slope(-200.0)) == 0.0


def test_one_key_gives_one_result_and_the_victim_is_unchanged(case: Miniature) -> None:
    one = assert_depends_on_key_alone(lambda key: run(case, key), case.variables)
    assert_trees_equal(one.variables["batch_stats"], case.variables["batch_stats"])


def test_other_floats_do_not_trace_again(case: Miniature) -> None:
    run(case)
    traced = len(TRACES)
    changes: list[dict[str, Any]] = [{"bound": 0.1, "lambda3": 2.0}, {"beta1": 0.1, "search_rate": 0.05}]
    ends = [run(case, **change).variables for change in changes]
    assert len(TRACES) == traced
    assert not trees_equal(*ends)


def test_the_backdoor_is_removed_only_where_examples_are_unlearned() -> None:
    case = flat_miniature()
    tuned, unlearned = (case.scores(run(case, steps=60, lambda3=weight).variables) for weight in (0.0, 1.0))
    assert tuned.asr is not None and unlearned.asr is not None
    assert unlearned.asr < tuned.asr - 0.5
    assert unlearned.acc > tuned.acc - 0.1


def test_defaults_are_the_published_ones() -> None:
    config = SAU()
    assert (config.steps, config.batch_size, config.learning_rate, config.crop) == (1000, 256, 1e-4, 0)
    assert (config.bound, config.search_steps, config.search_rate) == (0.2, 5, 0.2)
    assert (config.beta1, config.beta2) == (0.01, 1.0)
    assert (config.lambda1, config.lambda2, config.lambda3) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bound", 0.0), ("search_steps", 0), ("search_rate", -1.0), ("beta2", -1.0), ("lambda3", float("nan")),
     ("steps", 0)],
)  # fmt: skip
def test_a_setting_out_of_range_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"SAU.{field} is .*expected"):
        SAU(**{field: value})
