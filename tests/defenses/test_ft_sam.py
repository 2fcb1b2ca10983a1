"""FT-SAM: smoothed labels in closed form, one step against two explicit gradients, and a miniature victim repaired."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, leaves_of, trees_equal
from jax.tree_util import Partial
from miniature import CLASSES, TRACES, Miniature, miniature

from backdoor_jax import FineTune, Repair, UserError
from backdoor_jax.defenses import FTSAM
from backdoor_jax.defenses.ft_sam import smoothed_loss
from backdoor_jax.training import SharpnessAwareStep, cross_entropy, smoothed_cross_entropy


@pytest.fixture(scope="module")
def case() -> Miniature:
    return miniature()


def small(**changes: Any) -> FTSAM:
    return FTSAM(**{"steps": 10, "batch_size": 32, "crop": 0, **changes})


def run(case: Miniature, key: int = 1, **changes: Any) -> Repair:
    return small(**changes).repair(jax.random.key(key), case.classifier, case.variables, case.clean)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_smoothed_cross_entropy_is_the_cross_entropy_to_the_smoothed_label(smoothing: float) -> None:
    generator = np.random.default_rng(0)
    z, y = 3 * generator.standard_normal((50, 7)), generator.integers(0, 7, 50)
    target = np.where(np.eye(7)[y] == 1, 1 - smoothing, smoothing / 6)
    logs = z - np.log(np.exp(z).sum(1, keepdims=True))
    got = smoothed_cross_entropy(jnp.asarray(z, jnp.float32), jnp.asarray(y), smoothing)
    np.testing.assert_allclose(got, -(target * logs).sum(1), rtol=1e-5, atol=1e-6)


def test_without_smoothing_it_keeps_the_digits_of_a_confident_model() -> None:
    logits, labels = jnp.array([[30.0, 0.0, 1.0]]), jnp.array([0])
    assert float(smoothed_cross_entropy(logits, labels, 0.0)[0]) == float(cross_entropy(logits, labels)[0]) > 0


def test_a_step_takes_the_gradient_at_the_worst_neighbor_and_statistics_from_the_first_pass(case: Miniature) -> None:
    defense = small(sam_radius=2.0, label_smoothing=0.1, momentum=0.0, weight_decay=0.0)
    loss_of_batch = Partial(smoothed_loss, case.classifier, defense.label_smoothing)
    step = SharpnessAwareStep(loss_of_batch, defense.optimizer, radius=defense.sam_radius)
    state, info = jax.jit(step)(step.init(case.variables), case.clean, jax.random.key(0))

    target = jnp.where(jax.nn.one_hot(case.clean.labels, CLASSES) == 1, 0.9, 0.1 / (CLASSES - 1))

    def loss(params: Any) -> jax.Array:
        logits, _ = case.classifier.logits({**case.variables, "params": params}, case.clean.images, train=True)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), -1))

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    leaves, structure = jax.tree.flatten(case.variables["params"])
    value, gradient = value_and_gradient(case.variables["params"])
    w, g = [np.asarray(x, np.float64) for x in leaves], [np.asarray(x, np.float64) for x in jax.tree.leaves(gradient)]
    norm = np.sqrt(sum(np.sum((a * b) ** 2) for a, b in zip(w, g, strict=True)))
    worst = [jnp.asarray(a + 2.0 * a**2 * b / norm, jnp.float32) for a, b in zip(w, g, strict=True)]
    _, second = value_and_gradient(jax.tree.unflatten(structure, worst))
    assert float(info["loss"]) == pytest.approx(float(value), rel=1e-4)
    found = jax.tree.leaves(state.variables["params"])
    for after, before, slope in zip(found, w, jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(after, before - 0.01 * np.asarray(slope), rtol=1e-3, atol=1e-5)
    _, once = case.classifier.logits(case.variables, case.clean.images, train=True)
    for got, expected in zip(
        jax.tree.leaves(state.variables["batch_stats"]), jax.tree.leaves(once["batch_stats"]), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_radius_zero_without_smoothing_is_fine_tuning(case: Miniature) -> None:
    plain = FineTune(steps=5, batch_size=32, crop=0).repair(
        jax.random.key(1), case.classifier, case.variables, case.clean
    )
    aware = run(case, steps=5, sam_radius=0.0, label_smoothing=0.0)
    for one, other in zip(leaves_of(plain.variables), leaves_of(aware.variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_one_key_gives_one_result_and_the_victim_is_unchanged(case: Miniature) -> None:
    assert_depends_on_key_alone(lambda key: run(case, key), case.variables)


def test_other_floats_do_not_trace_again(case: Miniature) -> None:
    run(case)
    traced = len(TRACES)
    ends = [run(case, sam_radius=radius, label_smoothing=s).variables for radius, s in ((4.0, 0.1), (8.0, 0.0))]
    assert len(TRACES) == traced
    assert not trees_equal(*ends)


def test_the_backdoor_is_removed_where_fine_tuning_keeps_it_and_accuracy_is_kept(case: Miniature) -> None:
    tuned, aware = (
        case.scores(run(case, steps=100, learning_rate=0.02, sam_radius=radius, label_smoothing=smoothing).variables)
        for radius, smoothing in ((0.0, 0.0), (8.0, 0.1))
    )
    assert tuned.asr is not None and aware.asr is not None
    assert aware.asr < tuned.asr - 0.5
    assert aware.acc > tuned.acc - 0.1


def test_presets_have_the_published_values() -> None:
    assert FTSAM.preset("cifar10") == FTSAM()
    found = {name: FTSAM.preset(name) for name in FTSAM.presets}
    assert {name: (c.steps, c.sam_radius, c.label_smoothing) for name, c in found.items()} == {
        "cifar10": (1000, 2.0, 0.1),
        "gtsrb": (400, 8.0, 0.0),
        "tiny_imagenet": (2000, 8.0, 0.0),
    }
    for config in found.values():
        assert (config.batch_size, config.learning_rate, config.momentum, config.weight_decay) == (256, 0.01, 0.9, 5e-4)
    assert FTSAM.preset("gtsrb", steps=3).steps == 3
    with pytest.raises(UserError, match=r"'mine'.*cifar10.*gtsrb.*tiny_imagenet"):
        FTSAM.preset("mine")


@pytest.mark.parametrize(
    ("field", "value"), [("sam_radius", -1.0), ("label_smoothing", 1.0), ("label_smoothing", -0.1), ("batch_size", 0)]
)
def test_a_setting_out_of_range_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"FTSAM.{field} is .*expected"):
        FTSAM(**{field: value})
