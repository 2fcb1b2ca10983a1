"""Sharpness-aware minimization: its closed form, one step against NumPy, and the settings that turn it on."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import cache_size
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

from backdoor_jax import Classifier, Dataset, TrainConfig, UserError, train
from backdoor_jax.attacks import LIRA, AttackContext, InputAware
from backdoor_jax.config_files import load_experiment
from backdoor_jax.models import Variables
from backdoor_jax.training import (
    SGD,
    Cosine,
    Fitted,
    GradientStep,
    LossResult,
    SharpnessAwareStep,
    State,
    supervised_loss,
)
from backdoor_jax.training.sam import ascent


def published_ascent(weights: list[np.ndarray], gradients: list[np.ndarray], radius: float) -> list[np.ndarray]:
    """The adaptive step: T = |w|, e = radius T^2 g / ||T g||, the norm over all weights together."""
    norm = np.sqrt(sum(np.sum((np.abs(w) * g) ** 2) for w, g in zip(weights, gradients, strict=True)))
    return [radius * np.abs(w) ** 2 * g / norm for w, g in zip(weights, gradients, strict=True)]


@given(radius=st.floats(0.01, 10), seed=st.integers(0, 100))
def test_the_ascent_leads_to_the_worst_neighbor_in_the_scaled_ball(radius: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = {"a": generator.standard_normal((3, 2)), "b": generator.standard_normal(4)}
    gradient = {"a": generator.standard_normal((3, 2)), "b": generator.standard_normal(4)}
    inputs = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (weights, gradient)]
    step = ascent(inputs[0], inputs[1], radius)
    chex.assert_trees_all_equal_structs(step, weights)
    expected = published_ascent([*weights.values()], [*gradient.values()], radius)
    for found, part in zip(step.values(), expected, strict=True):
        np.testing.assert_allclose(found, part, rtol=1e-4, atol=1e-6)
    # It lies on the boundary ||e / |w||| = radius, and no point of it climbs further to first order.
    scaled = [np.asarray(step[name]) / np.abs(weights[name]) for name in weights]
    assert np.sqrt(sum(np.sum(part**2) for part in scaled)) == pytest.approx(radius, rel=1e-4)
    climb = sum(np.sum(np.asarray(step[name]) * gradient[name]) for name in weights)
    other = {name: generator.standard_normal(weights[name].shape) for name in weights}
    length = np.sqrt(sum(np.sum((other[name] / np.abs(weights[name])) ** 2) for name in weights))
    assert sum(np.sum(radius / length * other[name] * gradient[name]) for name in weights) <= climb + 1e-6


def test_the_ascent_is_zero_where_the_gradient_is_zero() -> None:
    step = ascent({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, 2.0)
    np.testing.assert_array_equal(step["w"], np.zeros(3))
    np.testing.assert_array_equal(ascent({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, 2.0)["w"], np.zeros(3))


def quadratic_loss(variables: Variables, batch: Dataset, key: jax.Array) -> LossResult:
    """A loss with a known gradient, and with the weights at which it was computed as its statistics."""
    del batch, key
    w = variables["params"]["w"]
    loss = jnp.sum(jnp.array([1.0, 4.0, 9.0]) * (w - 1) ** 2) / 2
    return loss, ({**variables, "batch_stats": w}, {"seen": w[0]})


@pytest.mark.parametrize("radius", [0.0, 0.5, 3.0])
def test_a_step_descends_along_the_gradient_at_the_worst_neighbor(radius: float, tiny_data: Dataset) -> None:
    start, curvature = np.array([2.0, -1.0, 0.5]), np.array([1.0, 4.0, 9.0])
    gradient = curvature * (start - 1)
    worst = start + published_ascent([start], [gradient], radius)[0]
    expected = start - 0.1 * curvature * (worst - 1)

    step = SharpnessAwareStep(Partial(quadratic_loss), SGD(0.1), radius=radius)
    state = step.init({"params": {"w": jnp.asarray(start, jnp.float32)}, "batch_stats": jnp.zeros(3)})
    state, info = step(state, tiny_data, jax.random.key(0))
    np.testing.assert_allclose(state.variables["params"]["w"], expected, rtol=1e-5)
    assert int(state.step) == 1
    # Loss, statistics and info are those at the weights, not at the neighbor.
    assert float(info["loss"]) == pytest.approx(np.sum(curvature * (start - 1) ** 2) / 2)
    np.testing.assert_allclose(state.variables["batch_stats"], start)
    assert float(info["seen"]) == 2.0


def test_the_statistics_of_a_network_come_from_the_first_of_the_two_gradients(
    tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables, key: jax.Array
) -> None:
    optimizer = SGD(0.1, Cosine(10), momentum=0.9, weight_decay=0.01)
    step = SharpnessAwareStep(Partial(supervised_loss, tiny_classifier), optimizer, radius=1.5)
    state, info = jax.jit(step)(step.init(tiny_variables), tiny_data, key)

    def loss(params: Any) -> jax.Array:
        logits, _ = tiny_classifier.logits({**tiny_variables, "params": params}, tiny_data.images, train=True)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(24), tiny_data.labels])

    gradient = jax.jit(jax.grad(loss))
    leaves, structure = jax.tree.flatten(tiny_variables["params"])
    weights = [np.asarray(leaf, np.float64) for leaf in leaves]
    first = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient(tiny_variables["params"]))]
    worst = [w + e for w, e in zip(weights, published_ascent(weights, first, 1.5), strict=True)]
    second = jax.tree.leaves(gradient(jax.tree.unflatten(structure, [jnp.asarray(w, jnp.float32) for w in worst])))
    expected = [w - 0.1 * (np.asarray(g) + 0.01 * w) for w, g in zip(weights, second, strict=True)]
    for found, part in zip(jax.tree.leaves(state.variables["params"]), expected, strict=True):
        np.testing.assert_allclose(found, part, rtol=1e-3, atol=1e-5)
    _, once = tiny_classifier.logits(tiny_variables, tiny_data.images, train=True)
    chex.assert_trees_all_close(state.variables["batch_stats"], once["batch_stats"], rtol=1e-5)
    assert float(info["loss"]) == pytest.approx(float(loss(tiny_variables["params"])), rel=1e-5)


def test_a_radius_of_zero_gives_the_plain_step(
    tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables, key: jax.Array
) -> None:
    loss, optimizer = Partial(supervised_loss, tiny_classifier), SGD(0.1, Cosine(10), momentum=0.9, weight_decay=0.01)
    ends = []
    for step in (GradientStep(loss, optimizer), SharpnessAwareStep(loss, optimizer, radius=0.0)):
        state, _ = jax.jit(step)(step.init(tiny_variables), tiny_data, key)
        ends.append(state.variables)
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-7)


def test_one_program_serves_all_radii(
    tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables, key: jax.Array
) -> None:
    loss, optimizer = Partial(supervised_loss, tiny_classifier), SGD(0.1)
    run = jax.jit(lambda step, state: step(state, tiny_data, key))
    ends = []
    for radius in (0.5, 2.0):
        step = SharpnessAwareStep(loss, optimizer, radius=radius)
        ends.append(run(step, step.init(tiny_variables))[0].variables["params"]["linear"]["kernel"])
    assert cache_size(run) == 1
    assert not np.allclose(ends[0], ends[1], rtol=1e-4)


def test_training_is_sharpness_aware_where_a_radius_is_given(tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    config = TrainConfig(epochs=12, batch_size=8, learning_rate=0.1, crop=0)
    plain, aware = (
        train(jax.random.key(0), tiny_classifier, tiny_data, dataclasses.replace(config, sam_radius=radius))
        for radius in (0.0, 0.5)
    )
    params = [trained.variables["params"] for trained in (plain, aware)]
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *params)
    assert max(jax.tree.leaves(differences)) > 1e-3
    assert aware.history["loss"][-3:].mean() < 0.7 * aware.history["loss"][:3].mean()
    with pytest.raises(UserError, match=r"TrainConfig\.sam_radius is -1, expected a value greater than or equal to 0"):
        TrainConfig(sam_radius=-1)


@pytest.mark.parametrize("kind", [LIRA, InputAware])
@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_attacks_that_train_a_generator_with_the_victim_are_sharpness_aware_too(
    monkeypatch: pytest.MonkeyPatch,
    tiny_classifier: Classifier,
    tiny_data: Dataset,
    kind: type[LIRA | InputAware],
    radius: float,
) -> None:
    steps: list[Any] = []

    def fit(key: jax.Array, step: Any, state: State, data: Dataset, **options: Any) -> Fitted:
        steps.append(step)
        return Fitted(state, {"density": np.zeros(1)}, 1, 12)

    monkeypatch.setattr(sys.modules[AttackContext.__module__], "fit", fit)
    context = AttackContext(tiny_classifier, tiny_data, TrainConfig(epochs=1, batch_size=12, sam_radius=radius))
    kind(channels=2, depth=1, rate=0.25).train_victim_in(context, jax.random.key(0), jax.random.key(1))
    victims = steps[-2:] if kind is LIRA else steps[-1:]
    assert {type(step) for step in victims} == {SharpnessAwareStep if radius else GradientStep}
    assert all(step.radius == radius for step in victims if radius)
    if kind is InputAware:
        assert type(steps[0]) is GradientStep


# In an experiment's YAML file

YAML = """
name: adaptive
victim: {epochs: 3, learning_rate: 0.05}
attacks:
  - {name: badnets}
  - {name: badnets, label: adaptive, rate: 0.2, victim: VICTIM}
defenses: []
"""


def load(folder: Path, victim: str) -> Any:
    (folder / "adaptive.yaml").write_text(YAML.replace("VICTIM", victim))
    return load_experiment(folder / "adaptive.yaml")


def test_an_attack_may_override_the_training_of_its_victims(tmp_path: Path) -> None:
    experiment = load(tmp_path, "{sam_radius: 1.0, crop: 0}")
    common = TrainConfig(epochs=3, learning_rate=0.05)
    assert experiment.victim == common
    assert experiment.attacks[0].victim is None
    assert experiment.attacks[1].victim == dataclasses.replace(common, sam_radius=1.0, crop=0)
    assert experiment.attacks[1].attack.rate == 0.2


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("{radius: 1.0}", "victim: unknown key 'radius'; known are epochs, .*sam_radius"),
        ("{sam_radius: far}", r"victim\.sam_radius is 'far', expected a valid number"),
        ("{sam_radius: -1}", r"victim\.sam_radius is -1, expected a value greater than or equal to 0"),
        ("1.0", "victim: expected keys and values, got 1.0"),
    ],
)
def test_a_wrong_training_setting_is_a_one_line_error_that_names_it(tmp_path: Path, victim: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"adaptive\.yaml: attacks\[1\]: .*{message}") as caught:
        load(tmp_path, victim)
    assert "\n" not in str(caught.value)
