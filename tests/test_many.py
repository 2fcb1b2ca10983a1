"""Several runs at once: each is what it would have been alone, on one device or on eight."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from backdoor_jax import Augment, Classifier, Dataset, NonFiniteError, TrainConfig, UserError, train
from backdoor_jax.config import numbers
from backdoor_jax.training import (
    Constants,
    CosineSGD,
    GradientStep,
    Info,
    State,
    SupervisedLoss,
    fit,
    fit_many,
    mesh_for,
    stack,
    train_many,
    unstack,
)
from backdoor_jax.training.many import _compiled

RUNS = 8
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "augment": Augment(crop=1, flip=True)}


@pytest.fixture(scope="module")
def step(tiny_classifier: Classifier) -> GradientStep:
    return GradientStep(SupervisedLoss(tiny_classifier), CosineSGD(6))


@pytest.fixture(scope="module")
def runs(
    step: GradientStep, tiny_classifier: Classifier, tiny_data: Dataset
) -> list[tuple[jax.Array, State, Dataset, Constants]]:
    """Runs that differ in everything that a run has: key, weights, images and learning rate."""
    made = []
    for number in range(RUNS):
        key = jax.random.key(number)
        constants = {**numbers(TrainConfig()), "learning_rate": jnp.float32(0.01 * (number + 1))}
        data = dataclasses.replace(tiny_data, images=jnp.roll(tiny_data.images, number, 0))
        made.append((key, step.init(tiny_classifier.init(key, data.images), constants), data, constants))
    return made


def together(step: GradientStep, runs: list[Any], **options: Any) -> tuple[State, dict[str, np.ndarray]]:
    keys, states, data, constants = stack(runs)
    return fit_many(keys, step, states, data, constants, **{**OPTIONS, **options})


@pytest.mark.parametrize("devices", [1, 8])
def test_each_of_many_runs_is_the_run_alone(step: GradientStep, runs: list[Any], devices: int) -> None:
    states, history = together(step, runs, mesh=mesh_for(RUNS, jax.devices()[:devices]))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(states)} == {devices}
    found = unstack(jax.device_get(states))
    for number, (key, state, data, constants) in enumerate(runs):
        alone, steps = fit(key, step, state, data, constants, **OPTIONS)
        chex.assert_trees_all_close(found[number], jax.device_get(alone), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(history["loss"][number], steps["loss"], rtol=1e-4)


def test_the_number_of_devices_does_not_change_the_result(step: GradientStep, runs: list[Any]) -> None:
    one, two = (together(step, runs, mesh=mesh_for(RUNS, jax.devices()[:count])) for count in (1, 2))
    chex.assert_trees_all_close(jax.device_get(one), jax.device_get(two), rtol=1e-5, atol=1e-6)


def test_many_runs_leave_what_they_were_given_readable_and_are_compiled_once(
    step: GradientStep, runs: list[Any]
) -> None:
    mesh = mesh_for(2, jax.devices()[:2])
    program = _compiled(step, OPTIONS["batch_size"], OPTIONS["augment"], mesh)
    compiled = program._cache_size()
    for rate in (0.1, 0.2):
        keys, states, data, constants = stack(runs[:2])
        constants["learning_rate"] = jnp.full(2, rate)
        fit_many(keys, step, states, data, constants, **OPTIONS, mesh=mesh)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(states))
    assert program._cache_size() == compiled + 1


def test_many_runs_are_resumed(tmp_path: Path, step: GradientStep, runs: list[Any]) -> None:
    whole, _ = together(step, runs[:2])
    together(step, runs[:2], epochs=1, checkpoints=tmp_path / "runs")
    resumed, history = together(step, runs[:2], checkpoints=tmp_path / "runs")
    assert history["loss"].shape == (2, 3)
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(whole))


def test_a_loss_that_is_not_finite_names_the_run(tiny_data: Dataset) -> None:
    @dataclasses.dataclass(frozen=True)
    class Fails:
        def __call__(self, state: State, batch: Dataset, key: jax.Array, constants: Constants) -> tuple[State, Info]:
            loss = jnp.where(state.step == constants["fails"], jnp.nan, 1.0)
            return state._replace(step=state.step + 1), {"loss": loss}

    keys = jax.random.split(jax.random.key(0), 3)
    idle = stack([State(jnp.zeros((), jnp.int32), {}, ())] * 3)
    constants = {"fails": jnp.array([-1, -1, 4])}
    with pytest.raises(NonFiniteError, match="seeds: the loss of run 2 is nan at step 5; lower"):
        fit_many(keys, Fails(), idle, stack([tiny_data] * 3), constants, epochs=2, batch_size=8, name="seeds")


def test_as_many_devices_are_used_as_divide_the_runs() -> None:
    assert [mesh_for(runs).size for runs in (1, 3, 7, 8, 9, 10, 11)] == [1, 3, 7, 8, 3, 5, 1]


@pytest.mark.parametrize("names", [("runs",), ("batch",)])
def test_devices_that_do_not_divide_the_runs_are_refused(
    step: GradientStep, runs: list[Any], names: tuple[str]
) -> None:
    count = 3 if names == ("runs",) else 2
    with pytest.raises(UserError, match=r"2 runs do not divide over a mesh .*; give mesh_for\(2, devices\)"):
        together(step, runs[:2], mesh=Mesh(np.array(jax.devices()[:count]), names))


def test_victims_trained_at_once_are_those_trained_alone(tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    config = TrainConfig(epochs=2, batch_size=8, crop=1, sam_radius=0.5)
    keys = jax.random.split(jax.random.key(3), 2)
    sets = [tiny_data, dataclasses.replace(tiny_data, labels=(tiny_data.labels + 1) % 3)]
    victims, history = train_many(keys, tiny_classifier, sets, config, flip=True)
    for number in range(2):
        alone, steps = train(keys[number], tiny_classifier, sets[number], config, flip=True)
        chex.assert_trees_all_close(victims[number], jax.device_get(alone), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(history["loss"][number], steps["loss"], rtol=1e-4)


def test_sets_of_several_sizes_are_refused(tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    keys = jax.random.split(jax.random.key(3), 2)
    with pytest.raises(UserError, match=r"2 keys and sets of shapes .*; give one set of one shape a key"):
        train_many(keys, tiny_classifier, [tiny_data, tiny_data.take(slice(8))])
