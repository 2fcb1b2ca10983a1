"""Sharpness-aware minimisation: its closed form, one step against NumPy, and where it can be asked for."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoor_jax import LIRA, Classifier, Dataset, InputAware, Scene, TrainConfig, UserError, train
from backdoor_jax.config_files import load_experiment
from backdoor_jax.models import Variables
from backdoor_jax.training import CosineSGD, GradientStep, SupervisedLoss
from backdoor_jax.training.sam import SharpnessAwareStep, ascent


def published_ascent(weights: list[np.ndarray], gradients: list[np.ndarray], radius: float) -> list[np.ndarray]:
    """The adaptive step: T = |w|, e = radius T^2 g / ||T g||, the norm over all weights together."""
    norm = np.sqrt(sum(np.sum((np.abs(w) * g) ** 2) for w, g in zip(weights, gradients, strict=True)))
    return [radius * np.abs(w) ** 2 * g / norm for w, g in zip(weights, gradients, strict=True)]


@given(radius=st.floats(0.01, 10), seed=st.integers(0, 100))
def test_the_ascent_is_the_worst_neighbour_of_the_scaled_ball(radius: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = {"a": generator.standard_normal((3, 2)), "b": generator.standard_normal(4)}
    gradient = {"a": generator.standard_normal((3, 2)), "b": generator.standard_normal(4)}
    step = ascent(*(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (weights, gradient)), radius)
    chex.assert_trees_all_equal_structs(step, weights)
    want = published_ascent([*weights.values()], [*gradient.values()], radius)
    for got, expected in zip(step.values(), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    # It lies on the boundary ||e / |w||| = radius, and no point of it climbs further to first order.
    scaled = [np.asarray(step[name]) / np.abs(weights[name]) for name in weights]
    assert np.sqrt(sum(np.sum(part**2) for part in scaled)) == pytest.approx(radius, rel=1e-4)
    climb = sum(np.sum(np.asarray(step[name]) * gradient[name]) for name in weights)
    other = {name: generator.standard_normal(weights[name].shape) for name in weights}
    length = np.sqrt(sum(np.sum((other[name] / np.abs(weights[name])) ** 2) for name in weights))
    assert sum(np.sum(radius / length * other[name] * gradient[name]) for name in weights) <= climb + 1e-6


def test_where_there_is_no_gradient_there_is_no_ascent() -> None:
    step = ascent({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, 2.0)
    np.testing.assert_array_equal(step["w"], np.zeros(3))
    np.testing.assert_array_equal(ascent({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, 2.0)["w"], np.zeros(3))


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A loss with a gradient one can write down, and a statistic that says where it was last computed."""

    def __call__(self, variables: Any, batch: Any, key: jax.Array, constants: Any) -> Any:
        w = variables["params"]["w"]
        loss = jnp.sum(jnp.array([1.0, 4.0, 9.0]) * (w - 1) ** 2) / 2
        return loss, ({**variables, "batch_stats": w}, {"seen": w[0]})


def plain_sgd(constants: Any) -> optax.GradientTransformation:
    return optax.sgd(0.1)


@pytest.mark.parametrize("radius", [0.0, 0.5, 3.0])
def test_a_step_descends_the_gradient_found_at_the_worst_neighbour(radius: float, tiny_data: Dataset) -> None:
    start, curvature = np.array([2.0, -1.0, 0.5]), np.array([1.0, 4.0, 9.0])
    gradient = curvature * (start - 1)
    worst = start + published_ascent([start], [gradient], radius)[0]
    want = start - 0.1 * curvature * (worst - 1)

    step = SharpnessAwareStep(Quadratic(), plain_sgd)
    constants = {"sam_radius": jnp.float32(radius)}
    state = step.init({"params": {"w": jnp.asarray(start, jnp.float32)}, "batch_stats": jnp.zeros(3)}, constants)
    state, info = step(state, tiny_data, jax.random.key(0), constants)
    np.testing.assert_allclose(state.variables["params"]["w"], want, rtol=1e-5)
    assert int(state.step) == 1
    # Loss, statistics and info are those of the weights themselves.
    assert float(info["loss"]) == pytest.approx(np.sum(curvature * (start - 1) ** 2) / 2)
    np.testing.assert_allclose(state.variables["batch_stats"], start)
    assert float(info["seen"]) == 2.0


def test_on_a_network_statistics_come_from_the_first_of_two_gradients(
    tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables, key: jax.Array
) -> None:
    constants = {
        name: jnp.float32(x) for name, x in (("learning_rate", 0.1), ("momentum", 0.9), ("weight_decay", 0.01))
    }
    step = SharpnessAwareStep(SupervisedLoss(tiny_classifier), CosineSGD(10))
    constants["sam_radius"] = jnp.float32(1.5)
    state, info = jax.jit(step)(step.init(tiny_variables, constants), tiny_data, key, constants)

    def loss(params: Any) -> jax.Array:
        logits, _ = tiny_classifier.logits({**tiny_variables, "params": params}, tiny_data.images, train=True)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(24), tiny_data.labels])

    gradient = jax.jit(jax.grad(loss))
    leaves, structure = jax.tree.flatten(tiny_variables["params"])
    weights = [np.asarray(leaf, np.float64) for leaf in leaves]
    first = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient(tiny_variables["params"]))]
    worst = [w + e for w, e in zip(weights, published_ascent(weights, first, 1.5), strict=True)]
    second = jax.tree.leaves(gradient(jax.tree.unflatten(structure, [jnp.asarray(w, jnp.float32) for w in worst])))
    want = [w - 0.1 * (np.asarray(g) + 0.01 * w) for w, g in zip(weights, second, strict=True)]
    for got, expected in zip(jax.tree.leaves(state.variables["params"]), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    _, once = tiny_classifier.logits(tiny_variables, tiny_data.images, train=True)
    chex.assert_trees_all_close(state.variables["batch_stats"], once["batch_stats"], rtol=1e-5)
    assert float(info["loss"]) == pytest.approx(float(loss(tiny_variables["params"])), rel=1e-5)


def test_a_radius_of_zero_is_the_plain_step(
    tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables, key: jax.Array
) -> None:
    constants = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01, "sam_radius": 0.0}
    ends = []
    for kind in (GradientStep, SharpnessAwareStep):
        step = kind(SupervisedLoss(tiny_classifier), CosineSGD(10))
        state, _ = jax.jit(step)(step.init(tiny_variables, constants), tiny_data, key, constants)
        ends.append(state.variables)
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-7)


def test_a_victim_is_trained_with_it_where_its_radius_is_given(tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    config = TrainConfig(epochs=12, batch_size=8, learning_rate=0.1, crop=0)
    plain, _ = train(jax.random.key(0), tiny_classifier, tiny_data, config)
    aware, history = train(jax.random.key(0), tiny_classifier, tiny_data, dataclasses.replace(config, sam_radius=0.5))
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), plain["params"], aware["params"])
    assert max(jax.tree.leaves(apart)) > 1e-3
    assert history["loss"][-3:].mean() < 0.7 * history["loss"][:3].mean()
    with pytest.raises(UserError, match=r"TrainConfig\.sam_radius is -1, expected 0 or more"):
        TrainConfig(sam_radius=-1)


@pytest.mark.parametrize("kind", [LIRA, InputAware])
@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_attacks_that_train_a_network_beside_the_victim_use_it_too(
    monkeypatch: pytest.MonkeyPatch,
    tiny_classifier: Classifier,
    tiny_data: Dataset,
    kind: type[LIRA | InputAware],
    radius: float,
) -> None:
    steps: list[Any] = []

    def fit(key: jax.Array, step: Any, state: Any, data: Any, constants: Any, **options: Any) -> Any:
        steps.append(step)
        assert constants["sam_radius"] == radius
        return state, {"density": np.zeros(1)}

    monkeypatch.setattr(sys.modules[Scene.__module__], "fit", fit)
    scene = Scene(tiny_classifier, tiny_data, TrainConfig(epochs=1, batch_size=12, sam_radius=radius))
    kind(channels=2, depth=1, rate=0.25).plant(jax.random.key(0), jax.random.key(1), scene)
    victims = steps[-2:] if kind is LIRA else steps[-1:]
    assert {type(step) for step in victims} == {SharpnessAwareStep if radius else GradientStep}
    if kind is InputAware:
        assert type(steps[0]) is GradientStep


# In an experiment's file

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


def test_an_attack_may_train_its_victims_in_another_way(tmp_path: Path) -> None:
    experiment = load(tmp_path, "{sam_radius: 1.0, crop: 0}")
    common = TrainConfig(epochs=3, learning_rate=0.05)
    assert experiment.victim == common
    assert experiment.attacks[0].victim is None
    assert experiment.attacks[1].victim == dataclasses.replace(common, sam_radius=1.0, crop=0)
    assert experiment.attacks[1].attack.rate == 0.2


@pytest.mark.parametrize(
    ("victim", "part"),
    [
        ("{radius: 1.0}", "victim: unknown key 'radius'; known are epochs, .*sam_radius"),
        ("{sam_radius: far}", r"victim\.sam_radius: Input should be a valid number, .*'far'"),
        ("{sam_radius: -1}", "sam_radius is -1.0, expected 0 or more"),
        ("1.0", "victim: expected keys and values, got 1.0"),
    ],
)
def test_a_wrong_way_is_one_line_that_names_it(tmp_path: Path, victim: str, part: str) -> None:
    with pytest.raises(UserError, match=rf"adaptive\.yaml: attacks\[1\]: .*{part}") as caught:
        load(tmp_path, victim)
    assert "\n" not in str(caught.value)
