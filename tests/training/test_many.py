"""Several runs at once: each gives what it gives alone, on one device or on eight."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import cache_size
from jax.sharding import Mesh
from jax.tree_util import Partial

from backdoor_jax import Classifier, Dataset, NonFiniteError, TrainConfig, UserError, train
from backdoor_jax.data import Augment
from backdoor_jax.training import (
    SGD,
    Cosine,
    Fitted,
    GradientStep,
    Info,
    State,
    fit,
    fit_many,
    mesh_for,
    stack,
    supervised_loss,
    train_many,
    unstack,
)
from backdoor_jax.training.fitting import _compiled_epochs

RUNS = 8
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "augment": Augment(crop=1, flip=True)}


class Run(NamedTuple):
    """What `fit` takes for one run."""

    key: jax.Array
    step: GradientStep
    state: State
    data: Dataset


@pytest.fixture(scope="module")
def runs(tiny_classifier: Classifier, tiny_data: Dataset) -> list[Run]:
    """Runs that differ in everything: key, learning rate, weights and images."""
    made = []
    for number in range(RUNS):
        key = jax.random.key(number)
        optimizer = SGD(0.01 * (number + 1), Cosine(6), momentum=0.9, weight_decay=5e-4)
        step = GradientStep(Partial(supervised_loss, tiny_classifier), optimizer)
        data = dataclasses.replace(tiny_data, images=jnp.roll(tiny_data.images, number, 0))
        made.append(Run(key, step, step.init(tiny_classifier.init(key, data.images)), data))
    return made


def fit_together(runs: list[Run], **options: Any) -> Fitted:
    return fit_many(*stack(runs), **{**OPTIONS, **options})


@pytest.mark.parametrize("devices", [1, 8])
def test_each_of_many_runs_equals_the_run_alone(runs: list[Run], devices: int) -> None:
    fitted = fit_together(runs, mesh=mesh_for(RUNS, jax.devices()[:devices]))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(fitted.state)} == {devices}
    found = unstack(jax.device_get(fitted.state))
    for number, run in enumerate(runs):
        alone = fit(*run, **OPTIONS)
        chex.assert_trees_all_close(found[number], jax.device_get(alone.state), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fitted.history["loss"][number], alone.history["loss"], rtol=1e-4)


def test_the_number_of_devices_does_not_change_the_result(runs: list[Run]) -> None:
    one, two = (fit_together(runs, mesh=mesh_for(RUNS, jax.devices()[:count])) for count in (1, 2))
    chex.assert_trees_all_close(jax.device_get(one), jax.device_get(two), rtol=1e-5, atol=1e-6)


def test_many_runs_leave_their_arguments_readable_and_are_compiled_once(runs: list[Run]) -> None:
    mesh = mesh_for(2, jax.devices()[:2])
    program = _compiled_epochs(OPTIONS["batch_size"], OPTIONS["augment"], mesh)
    compiled = cache_size(program)
    for rate in (0.1, 0.2):
        keys, steps, states, data = stack(runs[:2])
        optimizer = dataclasses.replace(steps.optimizer, learning_rate=jnp.full(2, rate))
        fit_many(keys, dataclasses.replace(steps, optimizer=optimizer), states, data, **OPTIONS, mesh=mesh)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(states))
    assert cache_size(program) == compiled + 1


def test_many_runs_are_resumed(tmp_path: Path, runs: list[Run]) -> None:
    complete = fit_together(runs[:2])
    fit_together(runs[:2], epochs=1, checkpoints=tmp_path / "runs")
    resumed = fit_together(runs[:2], checkpoints=tmp_path / "runs")
    assert resumed.history["loss"].shape == (2, 3)
    chex.assert_trees_all_equal(jax.device_get(resumed.state), jax.device_get(complete.state))


def test_the_info_of_many_runs_averages_over_the_runs_and_the_last_epoch(runs: list[Run]) -> None:
    fitted = fit_together(runs[:2])
    info = {name: pytest.approx(values[:, -3:].mean()) for name, values in fitted.history.items()}
    assert fitted.info == {"steps": 6, "batch": 8, "last_epoch": info}


def test_a_non_finite_loss_is_an_error_that_names_the_run(tiny_data: Dataset) -> None:
    def report(fails: jax.Array, state: State, batch: Dataset, key: jax.Array) -> tuple[State, Info]:
        loss = jnp.where(state.step == fails, jnp.nan, 1.0)
        return state._replace(step=state.step + 1), {"loss": loss}

    keys = jax.random.split(jax.random.key(0), 3)
    steps = stack([Partial(report, jnp.array(fails)) for fails in (-1, -1, 4)])
    idle = stack([State(jnp.zeros((), jnp.int32), {}, ())] * 3)
    with pytest.raises(NonFiniteError, match="seeds: the loss of run 2 is nan at step 5; lower"):
        fit_many(keys, steps, idle, stack([tiny_data] * 3), epochs=2, batch_size=8, name="seeds")


def test_a_mesh_has_as_many_devices_as_divide_the_runs() -> None:
    assert [mesh_for(runs).size for runs in (1, 3, 7, 8, 9, 10, 11)] == [1, 3, 7, 8, 3, 5, 1]


@pytest.mark.parametrize("names", [("runs",), ("batch",)])
def test_devices_that_do_not_divide_the_runs_are_refused(runs: list[Run], names: tuple[str]) -> None:
    count = 3 if names == ("runs",) else 2
    with pytest.raises(UserError, match=r"2 runs do not divide over a mesh .*; give mesh_for\(2, devices\)"):
        fit_together(runs[:2], mesh=Mesh(np.array(jax.devices()[:count]), names))


def test_models_trained_at_once_equal_those_trained_alone(tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    config = TrainConfig(epochs=2, batch_size=8, crop=1, sam_radius=0.5)
    keys = list(jax.random.split(jax.random.key(3), 2))
    sets = [tiny_data, dataclasses.replace(tiny_data, labels=(tiny_data.labels + 1) % 3)]
    found = train_many(keys, tiny_classifier, sets, config, flip=True)
    for number in range(2):
        alone = train(keys[number], tiny_classifier, sets[number], config, flip=True)
        chex.assert_trees_all_close(found[number], jax.device_get(alone.variables), rtol=1e-4, atol=1e-5)


def test_sets_of_different_sizes_are_refused(tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    keys = list(jax.random.split(jax.random.key(3), 2))
    with pytest.raises(UserError, match=r"2 keys and sets of shapes .*; give one set of one shape a key"):
        train_many(keys, tiny_classifier, [tiny_data, tiny_data.take(slice(8))])
