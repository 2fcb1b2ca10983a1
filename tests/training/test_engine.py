"""The engine: resuming, tracing, mapping, sharding, and its parts against closed forms."""

import dataclasses
import functools
import operator
import time
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import cache_size, structure
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from backdoor_jax import (
    Classifier,
    Dataset,
    NonFiniteError,
    TrainConfig,
    UserError,
    build_classifier,
    evaluate,
    make_dataset,
    train,
)
from backdoor_jax.config import Config, Count, NonNegative
from backdoor_jax.data import Augment
from backdoor_jax.models import Variables
from backdoor_jax.training import (
    SGD,
    Cosine,
    Fitted,
    GradientStep,
    Info,
    LossResult,
    State,
    Stopwatch,
    batch_shape,
    epoch,
    fit,
    merge,
    split_by_path,
    supervised_loss,
)
from backdoor_jax.training.fitting import _compiled_epoch

OPTIMIZER = SGD(0.1, Cosine(100, 50), momentum=0.9, weight_decay=1e-3)
AUGMENT = Augment(crop=1, flip=True)
TRACES: list[int] = []
"""Grows by one whenever `noisy_loss` is traced."""


def noisy_loss(classifier: Classifier, variables: Variables, batch: Dataset, key: jax.Array) -> LossResult:
    """Cross-entropy of images with random pixels set to zero."""
    TRACES.append(1)
    dark = jax.random.bernoulli(key, 0.2, batch.images.shape)
    batch = dataclasses.replace(batch, images=jnp.where(dark, 0, batch.images))
    return supervised_loss(classifier, variables, batch, key)


def report(fails: jax.Array | int, state: State, batch: Dataset, key: jax.Array) -> tuple[State, Info]:
    """A step that only logs the labels it received; its loss is not finite once `fails` steps are done."""
    loss = jnp.where(state.step == fails, jnp.nan, 1.0)
    drawn = jax.random.uniform(key)
    return state._replace(step=state.step + 1), {"loss": loss, "seen": batch.labels, "drawn": drawn}


def sum_pixels(state: State, batch: Dataset, key: jax.Array) -> tuple[State, Info]:
    """A step whose loss is the sum of the pixels."""
    del key
    return state._replace(step=state.step + 1), {"loss": jnp.sum(batch.images.astype(jnp.float32))}


REPORTER = Partial(report, -1)
IDLE = State(jnp.zeros((), jnp.int32), {}, ())


def copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def make_step(classifier: Classifier, optimizer: SGD = OPTIMIZER, **options: Any) -> GradientStep:
    return GradientStep(Partial(noisy_loss, classifier), optimizer, **options)


@pytest.fixture(scope="module")
def step(tiny_classifier: Classifier) -> GradientStep:
    return make_step(tiny_classifier)


@pytest.fixture(scope="module")
def start(step: GradientStep, tiny_variables: Variables) -> State:
    return step.init(tiny_variables)


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    devices = jax.devices("cpu")
    assert len(devices) >= 8, "the suite runs on eight virtual devices; see conftest.py"
    return NamedSharding(Mesh(np.array(devices[:8]), ("data",)), PartitionSpec("data"))


# fit


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    def run(epochs: int, folder: Path | None = None) -> Fitted:
        return fit(key, step, start, tiny_data, epochs=epochs, batch_size=8, augment=AUGMENT, checkpoints=folder)

    complete = run(6)
    half = run(3, tmp_path / "run")
    resumed = run(6, tmp_path / "run")
    assert [int(fitted.state.step) for fitted in (half, resumed, complete)] == [9, 18, 18]
    chex.assert_trees_all_equal(resumed.state, complete.state)
    for name, values in complete.history.items():
        np.testing.assert_array_equal(np.concatenate([half.history[name], resumed.history[name]]), values)
    finished = run(6, tmp_path / "run")
    chex.assert_trees_all_equal(finished.state, complete.state)
    assert finished.history == {}


def test_a_failed_run_resumes_after_its_last_complete_epoch(tmp_path: Path, key: jax.Array) -> None:
    data = make_dataset(np.zeros((4, 1, 1, 3), np.uint8), np.arange(4))

    def run(fails: int) -> Fitted:
        return fit(key, Partial(report, fails), IDLE, data, epochs=5, batch_size=2, checkpoints=tmp_path / "run")

    with pytest.raises(NonFiniteError):
        run(fails=7)  # In the fourth epoch of two steps: the newest checkpoint is the third's.
    resumed = run(fails=-1)
    assert (int(resumed.state.step), len(resumed.history["loss"])) == (10, 4)
    assert run(fails=-1).history == {}


def test_fit_leaves_the_callers_arrays_readable_and_unchanged(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    given_state, given_step = copied((start, step))  # Copies: what NumPy has looked at cannot be donated.
    trained = fit(key, given_step, given_state, tiny_data, epochs=2, batch_size=8, augment=AUGMENT)
    chex.assert_trees_all_equal(given_state, start)
    chex.assert_trees_all_equal(given_step, copied(step))
    kernels = [variables["params"]["linear"]["kernel"] for variables in (trained.variables, start.variables)]
    assert not np.array_equal(*kernels)


def test_an_epoch_reuses_the_memory_of_its_state(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    state = copied(start)
    _compiled_epoch(state, tiny_data, key, step, batch_size=8, augment=AUGMENT)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.variables["params"]))


def test_an_epoch_transfers_nothing_between_host_and_device(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    on_device = jax.tree.map(jnp.asarray, step)
    _compiled_epoch(copied(start), tiny_data, key, on_device, batch_size=8, augment=AUGMENT)
    state = copied(start)
    with jax.transfer_guard("disallow"):
        state, _ = _compiled_epoch(state, tiny_data, key, on_device, batch_size=8, augment=AUGMENT)
        with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
            _compiled_epoch(state, tiny_data, key, step, batch_size=8, augment=AUGMENT)


def test_a_non_finite_loss_is_an_error_that_names_the_run_and_the_step(key: jax.Array, tiny_data: Dataset) -> None:
    with pytest.raises(NonFiniteError, match="victim-7: the loss is nan at step 5; lower the learning rate"):
        fit(key, Partial(report, 4), IDLE, tiny_data, epochs=3, batch_size=8, name="victim-7")


def test_a_diverging_network_is_an_error(key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    step = make_step(tiny_classifier, dataclasses.replace(OPTIMIZER, learning_rate=jnp.float32(1e30)))
    start = step.init(tiny_classifier.init(key, tiny_data.images))
    with pytest.raises(NonFiniteError, match=r"training: the loss is (nan|inf) at step \d+"):
        fit(key, step, start, tiny_data, epochs=3, batch_size=8, augment=AUGMENT)


def test_non_finite_weights_after_the_last_step_are_an_error(key: jax.Array, tiny_data: Dataset) -> None:
    @Partial
    def overflow(state: State, batch: Dataset, key: jax.Array) -> tuple[State, Info]:
        done = state.step + 1
        weights = jnp.where(done == 6, jnp.inf, jnp.ones(2))
        return State(done, {"params": {"w": weights}}, ()), {"loss": jnp.ones(())}

    state = State(jnp.zeros((), jnp.int32), {"params": {"w": jnp.ones(2)}}, ())
    fit(key, overflow, state, tiny_data, epochs=1, batch_size=8)
    with pytest.raises(NonFiniteError, match="victim-7: weights are not finite after step 6"):
        fit(key, overflow, state, tiny_data, epochs=2, batch_size=8, name="victim-7")


@pytest.mark.parametrize("options", [{}, {"epochs": 1, "steps": 3}])
def test_fit_refuses_both_and_neither_of_epochs_and_steps(
    key: jax.Array, tiny_data: Dataset, options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="fit takes either epochs or steps; give one of them"):
        fit(key, REPORTER, IDLE, tiny_data, batch_size=8, **options)


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (3, 1), (4, 2), (6, 2)])
def test_steps_are_rounded_up_to_complete_epochs(key: jax.Array, tiny_data: Dataset, steps: int, epochs: int) -> None:
    by_steps = fit(key, REPORTER, IDLE, tiny_data, batch_size=8, steps=steps)
    by_epochs = fit(key, REPORTER, IDLE, tiny_data, batch_size=8, epochs=epochs)
    assert int(by_steps.state.step) == 3 * epochs
    chex.assert_trees_all_equal(by_steps, by_epochs)


def test_the_info_of_a_fit_is_plain_and_averages_its_last_epoch(key: jax.Array) -> None:
    @Partial
    def count(state: State, batch: Dataset, key: jax.Array) -> tuple[State, Info]:
        return state._replace(step=state.step + 1), {"loss": state.step.astype(jnp.float32), "two": jnp.float32(2)}

    data = make_dataset(np.zeros((23, 1, 1, 3), np.uint8), np.arange(23))
    fitted = fit(key, count, IDLE, data, batch_size=8, epochs=2)
    assert fitted.history["loss"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (fitted.epoch_steps, fitted.last_epoch) == (3, {"loss": 4.0, "two": 2.0})
    assert fitted.info == {"steps": 6, "batch": 7, "last_epoch": {"loss": 4.0, "two": 2.0}}
    assert {type(value) for value in (*fitted.last_epoch.values(), fitted.info["steps"])} == {float, int}


# Tracing


@dataclasses.dataclass(frozen=True)
class Penalized(Config):
    """A configuration with a traced field and a static one."""

    penalty: NonNegative = 0.5
    power: Count = 2


def penalized_loss(
    classifier: Classifier, config: Penalized, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    loss, (new, info) = noisy_loss(classifier, variables, batch, key)
    size = jnp.asarray(sum(jnp.sum(jnp.abs(leaf) ** config.power) for leaf in jax.tree.leaves(variables["params"])))
    return loss + config.penalty * size, (new, {**info, "size": size})


def test_one_program_serves_all_floats_and_another_integer_compiles_again(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    def run(seed: int, optimizer: SGD, config: Penalized) -> np.ndarray:
        equal = Classifier(type(tiny_classifier.network)(3), 3)
        step = GradientStep(Partial(penalized_loss, equal, config), optimizer)
        options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "augment": Augment(crop=1, flip=True)}
        return fit(jax.random.key(seed), step, step.init(tiny_variables), tiny_data, **options).history["loss"]

    traced, compiled = len(TRACES), cache_size(_compiled_epoch)
    losses = [
        run(seed, SGD(rate, Cosine(90, 50), momentum), Penalized(penalty))
        for seed, rate, momentum, penalty in (
            (0, 0.1, 0.9, 0.5),
            (0, 0.2, 0.9, 0.5),
            (0, 0.1, 0.0, 0.5),
            (0, 0.1, 0.9, 0.0),
            (1, 0.1, 0.9, 0.5),
        )
    ]
    assert (len(TRACES), cache_size(_compiled_epoch)) == (traced + 1, compiled + 1)
    assert len({loss.tobytes() for loss in losses}) == 5
    run(0, SGD(0.1, Cosine(80, 50), 0.9), Penalized())
    assert (len(TRACES), cache_size(_compiled_epoch)) == (traced + 2, compiled + 2)
    run(0, SGD(0.1, Cosine(90, 50), 0.9), Penalized(power=1))
    assert (len(TRACES), cache_size(_compiled_epoch)) == (traced + 3, compiled + 3)


def test_a_rate_of_zero_reaches_the_compiled_step(
    key: jax.Array, tiny_classifier: Classifier, start: State, tiny_data: Dataset
) -> None:
    zero: Any = jnp.zeros(())
    still = make_step(tiny_classifier, dataclasses.replace(OPTIMIZER, learning_rate=zero))
    fitted = fit(key, still, start, tiny_data, epochs=1, batch_size=8, augment=AUGMENT)
    chex.assert_trees_all_equal(fitted.variables["params"], start.variables["params"])


# Order, batches and keys


@given(images=st.integers(1, 5000), batch_size=st.integers(1, 600))
def test_batches_are_as_many_as_published_and_almost_as_large(images: int, batch_size: int) -> None:
    steps, size = batch_shape(images, batch_size)
    assert steps == -(-images // batch_size)
    assert 1 <= size <= batch_size
    assert 0 <= images - steps * size < steps


@pytest.mark.parametrize("batch_size", [0, -4])
def test_an_empty_batch_is_refused(batch_size: int) -> None:
    with pytest.raises(UserError, match="expected at least 1"):
        batch_shape(10, batch_size)


def test_every_image_is_seen_once_per_epoch_in_a_new_order(key: jax.Array) -> None:
    data = make_dataset(np.zeros((24, 1, 1, 3), np.uint8), np.arange(24))
    history = fit(key, REPORTER, IDLE, data, epochs=3, batch_size=8).history
    epochs = history["seen"].reshape(3, 24)
    assert [sorted(seen) for seen in epochs.tolist()] == [list(range(24))] * 3
    assert len({tuple(seen) for seen in epochs.tolist()}) == 3
    assert len(set(history["drawn"].tolist())) == 9


def test_no_image_is_seen_twice_where_batches_do_not_divide(key: jax.Array) -> None:
    data = make_dataset(np.zeros((23, 1, 1, 3), np.uint8), np.arange(23))
    history = fit(key, REPORTER, IDLE, data, epochs=4, batch_size=8).history
    assert history["seen"].shape == (12, 7)
    epochs = history["seen"].reshape(4, 21)
    assert all(len(set(seen)) == 21 for seen in epochs.tolist())
    assert set(epochs.ravel().tolist()) == set(range(23))


def test_a_run_depends_on_its_key_alone(step: GradientStep, start: State, tiny_data: Dataset) -> None:
    losses = [
        fit(jax.random.key(seed), step, start, tiny_data, epochs=1, batch_size=8, augment=AUGMENT).history["loss"]
        for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])


def test_augmentation_changes_pixels_before_the_step(key: jax.Array) -> None:
    data = make_dataset(np.full((8, 4, 4, 3), 10, np.uint8), np.zeros(8, int))
    plain, darker = (
        fit(key, Partial(sum_pixels), IDLE, data, epochs=1, batch_size=8, augment=augment).history["loss"]
        for augment in (None, Augment(crop=2))
    )
    assert plain.tolist() == [8 * 4 * 4 * 3 * 10] and darker[0] < plain[0]


# Mapping and sharding


def test_a_step_mapped_over_two_keys_equals_two_steps(step: GradientStep, start: State, tiny_data: Dataset) -> None:
    keys = jax.random.split(jax.random.key(5), 2)
    batch = tiny_data.take(slice(8))
    mapped = jax.jit(jax.vmap(step, (None, None, 0)))(start, batch, keys)
    one = jax.jit(step)
    for number in range(2):
        expected = one(start, batch, keys[number])
        found = jax.tree.map(lambda leaf, n=number: leaf[n], mapped)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_epoch_mapped_over_two_victims_equals_two_epochs(
    step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    victims = [start, step.init(jax.tree.map(lambda leaf: 0.5 * leaf, start.variables))]
    keys = jax.random.split(jax.random.key(6), 2)

    @jax.jit
    def both(states: State, keys: jax.Array, data: Dataset, step: GradientStep) -> tuple[State, Info]:
        return jax.lax.map(
            lambda pair: epoch(pair[0], data, pair[1], step, batch_size=8, augment=AUGMENT), (states, keys)
        )

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *victims)
    mapped = both(stacked, keys, tiny_data, step)
    for number, victim in enumerate(victims):
        expected = _compiled_epoch(copied(victim), tiny_data, keys[number], step, batch_size=8, augment=AUGMENT)
        found = jax.tree.map(lambda leaf, n=number: leaf[n], mapped)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


class Spread(NamedTuple):
    """A run over eight devices, and how often it was compiled."""

    state: State
    history: dict[str, np.ndarray]
    compiled: int


@pytest.fixture(scope="module")
def spread(key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, sharding: NamedSharding) -> Spread:
    compiled = cache_size(_compiled_epoch)
    fitted = fit(key, step, start, tiny_data, epochs=3, batch_size=8, augment=AUGMENT, sharding=sharding)
    return Spread(fitted.state, fitted.history, cache_size(_compiled_epoch) - compiled)


def test_a_run_sharded_over_eight_devices_equals_that_on_one(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, spread: Spread
) -> None:
    alone = fit(key, step, start, tiny_data, epochs=3, batch_size=8, augment=AUGMENT)
    chex.assert_trees_all_close(jax.device_get(spread[:2]), jax.device_get(alone[:2]), rtol=1e-4, atol=1e-5)
    devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(spread.state.variables)}
    assert devices == {8}


def test_a_sharded_batch_is_spread_over_the_devices(
    key: jax.Array, tiny_data: Dataset, sharding: NamedSharding
) -> None:
    placed: list[Any] = []

    @Partial
    def inspect(state: State, batch: Dataset, key: jax.Array) -> tuple[State, Info]:
        jax.debug.inspect_array_sharding(batch.images, callback=placed.append)
        return sum_pixels(state, batch, key)

    history = fit(key, inspect, IDLE, tiny_data, epochs=1, batch_size=8, sharding=sharding).history
    assert placed[0].is_equivalent_to(sharding, 4)
    assert history["loss"].sum() == np.asarray(tiny_data.images).sum()


def test_a_mesh_may_be_of_any_kind(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, sharding: NamedSharding
) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "augment": AUGMENT}
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = NamedSharding(explicit, PartitionSpec("data"))
    found, expected = (
        fit(key, step, start, tiny_data, **options, sharding=placement).state for placement in (spread, sharding)
    )
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))


def test_a_sharded_run_is_compiled_once(spread: Spread) -> None:
    assert spread.compiled == 1


def test_a_sharded_run_is_resumed(
    tmp_path: Path,
    key: jax.Array,
    step: GradientStep,
    start: State,
    tiny_data: Dataset,
    sharding: NamedSharding,
    spread: Spread,
) -> None:
    options: dict[str, Any] = {
        "batch_size": 8,
        "augment": AUGMENT,
        "sharding": sharding,
        "checkpoints": tmp_path / "run",
    }
    fit(key, step, start, tiny_data, epochs=1, **options)
    resumed = fit(key, step, start, tiny_data, epochs=3, **options)
    assert len(resumed.history["loss"]) == 6
    chex.assert_trees_all_close(jax.device_get(resumed.state), jax.device_get(spread.state), rtol=1e-5, atol=1e-6)


def test_a_batch_need_not_divide_over_the_devices(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, sharding: NamedSharding
) -> None:
    alone, uneven = (
        fit(key, step, start, tiny_data, epochs=1, batch_size=12, augment=AUGMENT, sharding=placement)
        for placement in (None, sharding)
    )
    chex.assert_trees_all_close(jax.device_get(uneven), jax.device_get(alone), rtol=1e-4, atol=1e-5)


# Trainable parameters and projections


def test_only_trainable_parameters_change(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset, start: State
) -> None:
    step = make_step(tiny_classifier, trainable=(("linear", "kernel"), ("bn",)))
    fitted = fit(key, step, step.init(start.variables), tiny_data, epochs=1, batch_size=8)
    before, after = start.variables["params"], fitted.variables["params"]
    assert structure(before) == structure(after)
    np.testing.assert_array_equal(before["conv"]["kernel"], after["conv"]["kernel"])
    np.testing.assert_array_equal(before["linear"]["bias"], after["linear"]["bias"])
    for layer, name in (("linear", "kernel"), ("bn", "scale"), ("bn", "bias")):
        assert not np.array_equal(before[layer][name], after[layer][name])


def test_an_unknown_trainable_prefix_is_refused(tiny_classifier: Classifier, tiny_variables: Variables) -> None:
    step = make_step(tiny_classifier, trainable=(("linear",), ("liner", "kernel")))
    with pytest.raises(UserError, match=r"no parameters under 'liner/kernel'.*bn.*conv.*linear"):
        step.init(tiny_variables)


def test_a_projection_is_applied_after_the_update(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset, start: State
) -> None:
    def clip(radius: jax.Array, params: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -radius, radius), params)

    compiled = cache_size(_compiled_epoch)
    for radius in (0.05, 0.02):
        step = make_step(tiny_classifier, project=Partial(clip, radius))
        fitted = fit(key, step, start, tiny_data, epochs=1, batch_size=8)
        sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(fitted.variables["params"])]
        assert max(sizes) == pytest.approx(radius)
    assert cache_size(_compiled_epoch) == compiled + 1


TREE = {"a": {"b": 1.0, "c": 2.0}, "d": {"b": 3.0}, "e": 4.0}
PATHS = (("a", "b"), ("a", "c"), ("d", "b"), ("e",))


@given(prefixes=st.sets(st.sampled_from([(), ("a",), ("d",), *PATHS])))
def test_merging_the_parts_of_a_split_tree_restores_it(prefixes: set[tuple[str, ...]]) -> None:
    inside, outside = split_by_path(TREE, tuple(prefixes))
    for path in PATHS:
        first, second, value = (functools.reduce(operator.getitem, path, tree) for tree in (inside, outside, TREE))
        chosen = any(path[: len(prefix)] == prefix for prefix in prefixes)
        assert (first, second) == ((value, None) if chosen else (None, value))
    assert merge(inside, outside) == merge(outside, inside) == TREE


def test_an_unknown_path_is_refused() -> None:
    for prefix in (("z",), ("a", "z"), ("a", "b", "c"), ("b",)):
        with pytest.raises(UserError, match=r"no parameters under .*a.*d.*e"):
            split_by_path(TREE, (("a",), prefix))


# Stopwatch


def test_a_stopwatch_separates_compilation_from_work() -> None:
    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(jnp.sin(x) @ jnp.cos(x))

    x = jnp.ones((7, 7)).block_until_ready()
    for first in (True, False):
        before = time.perf_counter()
        with Stopwatch() as watch:
            function(x).block_until_ready()
        total = time.perf_counter() - before
        assert (watch.compile_seconds > 0) == first
        assert watch.seconds > 0 and watch.seconds + watch.compile_seconds <= total


def test_a_stopwatch_counts_nested_tracing_once_as_compilation() -> None:
    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        time.sleep(0.05)
        return x * 3

    x = jnp.ones(6).block_until_ready()
    with Stopwatch() as watch:
        jax.jit(lambda x: inner(x) + 1)(x).block_until_ready()
        time.sleep(0.05)
    assert watch.compile_seconds > 0.04
    assert watch.seconds > 0.04


def test_a_stopwatch_counts_overlapping_reports_once() -> None:
    with Stopwatch() as watch:
        time.sleep(0.06)
        for _ in range(4):
            jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.05)
    assert watch.compile_seconds > 0.04
    assert watch.seconds > 0


def test_stopwatches_nest_and_stop_when_the_block_fails() -> None:
    with Stopwatch() as outer:
        with pytest.raises(RuntimeError), Stopwatch() as inner:
            jax.jit(lambda x: x + 17)(jnp.ones(5))
            raise RuntimeError
        caught = inner.compile_seconds
        jax.jit(lambda x: x - 17)(jnp.ones(5))
    assert 0 < caught < outer.compile_seconds
    assert inner.compile_seconds == caught


# Supervised training


def test_training_fits_a_separable_set(key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    config = TrainConfig(epochs=12, batch_size=8, learning_rate=0.1, crop=1)
    trained = train(key, tiny_classifier, tiny_data, config)
    assert trained.history["loss"].shape == trained.history["accuracy"].shape == (36,)
    assert evaluate(tiny_classifier, trained.variables, tiny_data).acc > 0.9


def test_a_finished_training_is_restored(
    tmp_path: Path, key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    config = TrainConfig(epochs=1, batch_size=8, crop=1)
    first, again = (train(key, tiny_classifier, tiny_data, config, checkpoints=tmp_path / "run") for _ in range(2))
    chex.assert_trees_all_equal(again.state, first.state)
    assert again.history == {}


def test_training_is_sgd_under_a_cosine_that_changes_once_per_epoch(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    # All images are equal, so that their order does not matter; a tiny rate gives the weights at the start.
    data = tiny_data.take(np.zeros(8, int))
    start, trained = (
        train(key, tiny_classifier, data, TrainConfig(4, 4, rate, crop=0, weight_decay=0.1)).variables
        for rate in (1e-30, 0.5)
    )

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = tiny_classifier.logits({**start, "params": params}, data.images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()

        return jax.grad(loss)(params)

    params = start["params"]
    speed = jax.tree.map(jnp.zeros_like, params)
    for count in range(8):
        rate = 0.25 * (1 + np.cos(np.pi * (count // 2) / 4))
        speed = jax.tree.map(lambda v, g, w: 0.9 * v + g + 0.1 * w, speed, gradient(params), params)
        params = jax.tree.map(lambda w, v, rate=rate: w - rate * v, params, speed)
    chex.assert_trees_all_close(trained["params"], params, rtol=1e-4, atol=1e-5)


def test_integers_are_accepted_where_a_setting_is_a_float(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    configs = [TrainConfig(epochs=1, batch_size=12, crop=0, momentum=zero, weight_decay=zero) for zero in (0, 0.0)]
    integers, floats = (train(key, tiny_classifier, tiny_data, config).variables for config in configs)
    chex.assert_trees_all_equal(integers, floats)


@pytest.mark.parametrize("field", ["epochs", "batch_size", "learning_rate"])
def test_training_settings_out_of_range_are_refused_by_name(field: str) -> None:
    with pytest.raises(UserError, match=f"^TrainConfig.{field} is 0, expected a value greater than"):
        TrainConfig(**{field: 0})


def test_the_published_network_trains_in_a_scan(key: jax.Array, tiny_data: Dataset) -> None:
    classifier = build_classifier("preact_resnet18", 3, width=2)
    optimizer = dataclasses.replace(OPTIMIZER, schedule=Cosine(6, 2))
    step = GradientStep(Partial(supervised_loss, classifier), optimizer)
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(classifier.init, key, tiny_data.images)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0.1, 0.2, leaf.shape), jnp.float32), shapes)
    state = step.init(drawn)
    trained = fit(key, step, state, tiny_data, epochs=2, batch_size=12)
    assert np.all(np.isfinite(trained.history["loss"])) and int(trained.state.step) == 4
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained.variables, state.variables)
    assert all(jax.tree.leaves(changed))
