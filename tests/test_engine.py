"""The engine: resumption, tracing, mapping, sharding, and its parts against closed forms and PyTorch."""

import collections
import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backdoor_jax import (
    Augment,
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
from backdoor_jax.models import Variables
from backdoor_jax.training import (
    Constants,
    CosineSGD,
    GradientStep,
    Info,
    State,
    Stopwatch,
    SupervisedLoss,
    batch_shape,
    cosine_in_stages,
    epoch,
    fit,
    merge,
    run_epoch,
    split_by_path,
    torch_amsgrad,
    torch_sgd,
    triangular_two_phase,
)

CONSTANTS = {"learning_rate": jnp.float32(0.1), "momentum": jnp.float32(0.9), "weight_decay": jnp.float32(1e-3)}
AUGMENT = Augment(crop=1, flip=True)
TRACES: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Counted:
    """Cross-entropy of noisy images, which counts how often it is traced."""

    classifier: Classifier
    name: str

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        TRACES[self.name] += 1
        dark = jax.random.bernoulli(key, 0.2, batch.images.shape)
        batch = dataclasses.replace(batch, images=jnp.where(dark, 0, batch.images))
        return SupervisedLoss(self.classifier)(variables, batch, key, constants)


@dataclasses.dataclass(frozen=True)
class Reporter:
    """A step that only tells which labels it saw; its loss is not finite once `fails` steps are done."""

    fails: int = -1

    def __call__(self, state: State, batch: Dataset, key: jax.Array, constants: Constants) -> tuple[State, Info]:
        loss = jnp.where(state.step == self.fails, jnp.nan, 1.0)
        drawn = jax.random.uniform(key)
        return state._replace(step=state.step + 1), {"loss": loss, "seen": batch.labels, "drawn": drawn}


IDLE = State(jnp.zeros((), jnp.int32), {}, ())


def copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def make_step(classifier: Classifier, name: str = "shared", **options: Any) -> GradientStep:
    return GradientStep(Counted(classifier, name), CosineSGD(100, 50), **options)


@pytest.fixture(scope="module")
def step(tiny_classifier: Classifier) -> GradientStep:
    return make_step(tiny_classifier)


@pytest.fixture(scope="module")
def start(step: GradientStep, tiny_variables: Variables) -> State:
    return step.init(tiny_variables, CONSTANTS)


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    devices = jax.devices("cpu")
    assert len(devices) >= 8, "the suite runs on eight virtual devices; see conftest.py"
    return NamedSharding(Mesh(np.array(devices[:8]), ("data",)), PartitionSpec("data"))


# fit


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    def run(epochs: int, folder: Path | None = None) -> tuple[State, dict[str, np.ndarray]]:
        return fit(
            key, step, start, tiny_data, CONSTANTS, epochs=epochs, batch_size=8, augment=AUGMENT, checkpoints=folder
        )

    whole, history = run(6)
    half, first = run(3, tmp_path / "run")
    resumed, second = run(6, tmp_path / "run")
    assert (int(half.step), int(resumed.step), int(whole.step)) == (9, 18, 18)
    chex.assert_trees_all_equal(resumed, whole)
    for name, values in history.items():
        np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), values)
    finished, nothing = run(6, tmp_path / "run")
    chex.assert_trees_all_equal(finished, whole)
    assert nothing == {}


def test_checkpoints_are_written_as_seldom_as_asked_and_at_the_end(tmp_path: Path, key: jax.Array) -> None:
    data = make_dataset(np.zeros((4, 1, 1, 3), np.uint8), np.arange(4))

    def run(epochs: int, fails: int) -> tuple[State, dict[str, np.ndarray]]:
        options = {"epochs": epochs, "batch_size": 2, "checkpoints": tmp_path / "run", "checkpoint_every": 2}
        return fit(key, Reporter(fails), IDLE, data, {}, **options)

    with pytest.raises(NonFiniteError):
        run(5, fails=7)  # In the fourth epoch: the checkpoint of the second is the newest.
    state, history = run(5, fails=-1)
    assert (int(state.step), len(history["loss"])) == (10, 6)
    assert run(5, fails=-1)[1] == {}


def test_fit_leaves_the_callers_arrays_readable_and_unchanged(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    state, constants = copied((start, CONSTANTS))  # Fresh ones: what NumPy has looked at cannot be donated.
    trained, _ = fit(key, step, state, tiny_data, constants, epochs=2, batch_size=8, augment=AUGMENT)
    chex.assert_trees_all_equal((state, constants), (start, CONSTANTS))
    kernels = [one.variables["params"]["linear"]["kernel"] for one in (trained, start)]
    assert not np.array_equal(*kernels)


def test_an_epoch_reuses_the_memory_of_the_state_it_is_given(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    state = copied(start)
    run_epoch(state, tiny_data, key, CONSTANTS, step=step, batch_size=8, augment=AUGMENT)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.variables["params"]))


def test_an_epoch_moves_nothing_between_host_and_device(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    options = {"step": step, "batch_size": 8, "augment": AUGMENT}
    run_epoch(copied(start), tiny_data, key, CONSTANTS, **options)
    state = copied(start)
    with jax.transfer_guard("disallow"):
        state, _ = run_epoch(state, tiny_data, key, CONSTANTS, **options)
        with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
            run_epoch(state, tiny_data, key, {**CONSTANTS, "momentum": np.float32(0.9)}, **options)


def test_a_loss_that_is_not_finite_names_the_run_and_the_step(key: jax.Array, tiny_data: Dataset) -> None:
    with pytest.raises(NonFiniteError, match="victim-7: the loss is nan at step 5; lower the learning rate"):
        fit(key, Reporter(fails=4), IDLE, tiny_data, {}, epochs=3, batch_size=8, name="victim-7")


def test_a_diverging_network_is_an_error(key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset) -> None:
    wild = {**CONSTANTS, "learning_rate": jnp.float32(1e30)}
    with pytest.raises(NonFiniteError, match=r"training: the loss is (nan|inf) at step \d+"):
        fit(key, step, start, tiny_data, wild, epochs=3, batch_size=8, augment=AUGMENT)


def test_weights_that_are_not_finite_after_the_last_step_are_an_error(key: jax.Array, tiny_data: Dataset) -> None:
    @dataclasses.dataclass(frozen=True)
    class Breaker:
        def __call__(self, state: State, batch: Dataset, key: jax.Array, constants: Constants) -> tuple[State, Info]:
            done = state.step + 1
            weights = jnp.where(done == 6, jnp.inf, jnp.ones(2))
            return State(done, {"params": {"w": weights}}, ()), {"loss": jnp.ones(())}

    state = State(jnp.zeros((), jnp.int32), {"params": {"w": jnp.ones(2)}}, ())
    fit(key, Breaker(), state, tiny_data, {}, epochs=1, batch_size=8)
    with pytest.raises(NonFiniteError, match="victim-7: weights are not finite after step 6"):
        fit(key, Breaker(), state, tiny_data, {}, epochs=2, batch_size=8, name="victim-7")


# Tracing


def test_a_configuration_is_traced_and_compiled_once(
    key: jax.Array, tiny_classifier: Classifier, start: State, tiny_data: Dataset
) -> None:
    compiled = run_epoch._cache_size()
    for seed, rate in ((0, 0.1), (0, 0.2), (1, 0.3)):
        constants = {**CONSTANTS, "learning_rate": jnp.float32(rate)}
        equal = make_step(Classifier(type(tiny_classifier.network)(3), 3), "once")
        fit(jax.random.key(seed), equal, start, tiny_data, constants, epochs=2, batch_size=8, augment=Augment(1, True))
    assert TRACES["once"] == 1
    assert run_epoch._cache_size() == compiled + 1


def test_constants_reach_the_compiled_step(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    still = {**CONSTANTS, "learning_rate": jnp.float32(0)}
    state, _ = fit(key, step, start, tiny_data, still, epochs=1, batch_size=8, augment=AUGMENT)
    chex.assert_trees_all_equal(state.variables["params"], start.variables["params"])


# Order, batches and keys


@given(images=st.integers(1, 5000), batch_size=st.integers(1, 600))
def test_batches_are_as_many_as_published_and_nearly_as_large(images: int, batch_size: int) -> None:
    steps, size = batch_shape(images, batch_size)
    assert steps == -(-images // batch_size)
    assert 1 <= size <= batch_size
    assert 0 <= images - steps * size < steps


@pytest.mark.parametrize("batch_size", [0, -4])
def test_a_batch_without_images_is_refused(batch_size: int) -> None:
    with pytest.raises(UserError, match="expected at least 1"):
        batch_shape(10, batch_size)


def test_every_image_is_seen_once_an_epoch_in_a_fresh_order(key: jax.Array) -> None:
    data = make_dataset(np.zeros((24, 1, 1, 3), np.uint8), np.arange(24))
    _, history = fit(key, Reporter(), IDLE, data, {}, epochs=3, batch_size=8)
    epochs = history["seen"].reshape(3, 24)
    assert [sorted(seen) for seen in epochs.tolist()] == [list(range(24))] * 3
    assert len({tuple(seen) for seen in epochs.tolist()}) == 3
    assert len(set(history["drawn"].tolist())) == 9


def test_no_image_is_seen_twice_where_batches_do_not_divide(key: jax.Array) -> None:
    data = make_dataset(np.zeros((23, 1, 1, 3), np.uint8), np.arange(23))
    _, history = fit(key, Reporter(), IDLE, data, {}, epochs=4, batch_size=8)
    assert history["seen"].shape == (12, 7)
    epochs = history["seen"].reshape(4, 21)
    assert all(len(set(seen)) == 21 for seen in epochs.tolist())
    assert set(epochs.ravel().tolist()) == set(range(23))


def test_a_run_follows_its_key(step: GradientStep, start: State, tiny_data: Dataset) -> None:
    losses = [
        fit(jax.random.key(seed), step, start, tiny_data, CONSTANTS, epochs=1, batch_size=8, augment=AUGMENT)[1]["loss"]
        for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])


def test_augmentation_changes_pixels_before_the_step(key: jax.Array) -> None:
    @dataclasses.dataclass(frozen=True)
    class Sum:
        def __call__(self, state: State, batch: Dataset, key: jax.Array, constants: Constants) -> tuple[State, Info]:
            return state._replace(step=state.step + 1), {"loss": jnp.sum(batch.images.astype(jnp.float32))}

    data = make_dataset(np.full((8, 4, 4, 3), 10, np.uint8), np.zeros(8, int))
    plain = fit(key, Sum(), IDLE, data, {}, epochs=1, batch_size=8)[1]["loss"]
    darker = fit(key, Sum(), IDLE, data, {}, epochs=1, batch_size=8, augment=Augment(crop=2))[1]["loss"]
    assert plain.tolist() == [8 * 4 * 4 * 3 * 10] and darker[0] < plain[0]


# Mapping and sharding


def test_one_step_mapped_over_two_keys_is_two_steps(step: GradientStep, start: State, tiny_data: Dataset) -> None:
    keys = jax.random.split(jax.random.key(5), 2)
    batch = tiny_data.take(slice(8))
    mapped = jax.jit(jax.vmap(step, (None, None, 0, None)))(start, batch, keys, CONSTANTS)
    one = jax.jit(step)
    for number in range(2):
        want = one(start, batch, keys[number], CONSTANTS)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, n=number: leaf[n], mapped), want, rtol=1e-5, atol=1e-6)


def test_an_epoch_mapped_over_two_victims_is_two_epochs(
    tiny_classifier: Classifier, step: GradientStep, start: State, tiny_data: Dataset
) -> None:
    victims = [start, step.init(jax.tree.map(lambda leaf: 0.5 * leaf, start.variables), CONSTANTS)]
    keys = jax.random.split(jax.random.key(6), 2)
    options = {"step": step, "batch_size": 8, "augment": AUGMENT}

    @jax.jit
    def both(states: State, keys: jax.Array, data: Dataset, constants: Constants) -> tuple[State, Info]:
        return jax.lax.map(lambda pair: epoch(pair[0], data, pair[1], constants, **options), (states, keys))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *victims)
    mapped = both(stacked, keys, tiny_data, CONSTANTS)
    for number, victim in enumerate(victims):
        want = run_epoch(copied(victim), tiny_data, keys[number], CONSTANTS, **options)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, n=number: leaf[n], mapped), want, rtol=1e-5, atol=1e-6)


class Spread(NamedTuple):
    """A run over eight devices, and how often it was compiled."""

    state: State
    history: dict[str, np.ndarray]
    compiled: int


@pytest.fixture(scope="module")
def spread(key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, sharding: NamedSharding) -> Spread:
    compiled = run_epoch._cache_size()
    options = {"epochs": 3, "batch_size": 8, "augment": AUGMENT, "sharding": sharding}
    state, history = fit(key, step, start, tiny_data, CONSTANTS, **options)
    return Spread(state, history, run_epoch._cache_size() - compiled)


def test_a_run_sharded_over_eight_devices_is_that_of_one(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, spread: Spread
) -> None:
    alone = fit(key, step, start, tiny_data, CONSTANTS, epochs=3, batch_size=8, augment=AUGMENT)
    chex.assert_trees_all_close(jax.device_get(spread[:2]), jax.device_get(alone), rtol=1e-4, atol=1e-5)
    devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(spread.state.variables)}
    assert devices == {8}


def test_a_sharded_batch_is_spread_over_the_devices(
    key: jax.Array, tiny_data: Dataset, sharding: NamedSharding
) -> None:
    placed = []

    @dataclasses.dataclass(frozen=True)
    class Inspector:
        def __call__(self, state: State, batch: Dataset, key: jax.Array, constants: Constants) -> tuple[State, Info]:
            jax.debug.inspect_array_sharding(batch.images, callback=placed.append)
            loss = jnp.sum(batch.images.astype(jnp.float32))
            return state._replace(step=state.step + 1), {"loss": loss}

    _, history = fit(key, Inspector(), IDLE, tiny_data, {}, epochs=1, batch_size=8, sharding=sharding)
    assert placed[0].is_equivalent_to(sharding, 4)
    assert history["loss"].sum() == np.asarray(tiny_data.images).sum()


def test_a_mesh_may_be_of_any_kind(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, sharding: NamedSharding
) -> None:
    options = {"epochs": 1, "batch_size": 8, "augment": AUGMENT}
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = NamedSharding(explicit, PartitionSpec("data"))
    found, _ = fit(key, step, start, tiny_data, CONSTANTS, **options, sharding=spread)
    wanted, _ = fit(key, step, start, tiny_data, CONSTANTS, **options, sharding=sharding)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(wanted))


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
    options = {"batch_size": 8, "augment": AUGMENT, "sharding": sharding, "checkpoints": tmp_path / "run"}
    fit(key, step, start, tiny_data, CONSTANTS, epochs=1, **options)
    resumed, history = fit(key, step, start, tiny_data, CONSTANTS, epochs=3, **options)
    assert len(history["loss"]) == 6
    chex.assert_trees_all_close(jax.device_get(resumed), jax.device_get(spread.state), rtol=1e-5, atol=1e-6)


def test_a_batch_that_the_devices_do_not_divide_is_trained_on_all_the_same(
    key: jax.Array, step: GradientStep, start: State, tiny_data: Dataset, sharding: NamedSharding
) -> None:
    options = {"epochs": 1, "batch_size": 12, "augment": AUGMENT}
    alone = fit(key, step, start, tiny_data, CONSTANTS, **options)
    uneven = fit(key, step, start, tiny_data, CONSTANTS, sharding=sharding, **options)
    chex.assert_trees_all_close(jax.device_get(uneven), jax.device_get(alone), rtol=1e-4, atol=1e-5)


# What moves


def test_only_trainable_parameters_move(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset, start: State
) -> None:
    step = make_step(tiny_classifier, trainable=(("linear", "kernel"), ("bn",)))
    state, _ = fit(key, step, step.init(start.variables, CONSTANTS), tiny_data, CONSTANTS, epochs=1, batch_size=8)
    before, after = start.variables["params"], state.variables["params"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    np.testing.assert_array_equal(before["conv"]["kernel"], after["conv"]["kernel"])
    np.testing.assert_array_equal(before["linear"]["bias"], after["linear"]["bias"])
    for layer, name in (("linear", "kernel"), ("bn", "scale"), ("bn", "bias")):
        assert not np.array_equal(before[layer][name], after[layer][name])


def test_an_unknown_trainable_prefix_is_refused(tiny_classifier: Classifier, tiny_variables: Variables) -> None:
    step = make_step(tiny_classifier, trainable=(("linear",), ("liner", "kernel")))
    with pytest.raises(UserError, match=r"no parameters under 'liner/kernel'.*bn.*conv.*linear"):
        step.init(tiny_variables, CONSTANTS)


def test_a_projection_is_applied_after_the_update(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset, start: State
) -> None:
    def project(params: Any, constants: Constants) -> Any:
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -constants["radius"], constants["radius"]), params)

    constants = {**CONSTANTS, "radius": jnp.float32(0.05)}
    step = make_step(tiny_classifier, project=project)
    state, _ = fit(key, step, start, tiny_data, constants, epochs=1, batch_size=8)
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.variables["params"])]
    assert max(sizes) == pytest.approx(0.05)


TREE = {"a": {"b": 1.0, "c": 2.0}, "d": {"b": 3.0}, "e": 4.0}
PATHS = (("a", "b"), ("a", "c"), ("d", "b"), ("e",))


@given(prefixes=st.sets(st.sampled_from([(), ("a",), ("d",), *PATHS])))
def test_splitting_and_merging_gives_the_tree_back(prefixes: set[tuple[str, ...]]) -> None:
    inside, outside = split_by_path(TREE, tuple(prefixes))
    for path in PATHS:
        first, second, value = inside, outside, TREE
        for name in path:
            first, second, value = first[name], second[name], value[name]  # type: ignore[index, assignment]
        chosen = any(path[: len(prefix)] == prefix for prefix in prefixes)
        assert (first, second) == ((value, None) if chosen else (None, value))
    assert merge(inside, outside) == merge(outside, inside) == TREE


def test_a_path_that_is_not_there_is_refused() -> None:
    for prefix in (("z",), ("a", "z"), ("a", "b", "c"), ("b",)):
        with pytest.raises(UserError, match=r"no parameters under .*a.*d.*e"):
            split_by_path(TREE, (("a",), prefix))


# Optimiser and schedules


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_sgd_is_pytorchs(momentum: float, decay: float) -> None:
    torch = pytest.importorskip("torch")
    matrix, start = np.array([[3.0, 1.0], [1.0, 2.0]], np.float32), np.array([1.0, -2.0], np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.SGD([weight], lr=0.05, momentum=momentum, weight_decay=decay)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=5)
    ours = torch_sgd(cosine_in_stages(0.05, 5, 5), jnp.float32(momentum), jnp.float32(decay))
    params, state = jnp.asarray(start), ours.init(jnp.asarray(start))
    for _ in range(5):
        theirs.zero_grad()
        (0.5 * weight @ torch.tensor(matrix) @ weight).backward()
        theirs.step()
        annealing.step()
        updates, state = ours.update(matrix @ params, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-5)


def test_amsgrad_is_pytorchs() -> None:
    torch = pytest.importorskip("torch")
    gradients = np.random.default_rng(0).standard_normal((40, 3)) * np.geomspace(1, 1e-3, 40)[:, None]
    weight = torch.nn.Parameter(torch.zeros(3))
    theirs = torch.optim.Adam([weight], lr=0.05, amsgrad=True)
    ours = torch_amsgrad(jnp.float32(0.05))
    params, state = jnp.zeros(3), ours.init(jnp.zeros(3))
    for gradient in gradients.astype(np.float32):
        weight.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = ours.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize(("epochs", "an_epoch"), [(100, 10), (7, 3), (1, 5), (4, 1)])
def test_the_cosine_moves_once_an_epoch_as_pytorchs_does(epochs: int, an_epoch: int) -> None:
    schedule = cosine_in_stages(0.1, epochs * an_epoch, epochs)
    got = [float(schedule(count)) for count in range(epochs * an_epoch)]
    want = [0.05 * (1 + np.cos(np.pi * number / epochs)) for number in range(epochs) for _ in range(an_epoch)]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    assert float(schedule(epochs * an_epoch + 3)) == pytest.approx(0, abs=1e-7)


def test_the_cosine_keeps_its_stages_where_steps_do_not_divide() -> None:
    schedule = jax.jit(jax.vmap(cosine_in_stages(1.0, 250, 100)))
    want = [0.5 * (1 + np.cos(np.pi * (count * 100 // 250) / 100)) for count in range(250)]
    np.testing.assert_allclose(schedule(jnp.arange(250)), want, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "want"),
    [(0, 0.1), (1, 0.6), (4, 2.1), (5, 1.1), (6, 0.1), (10, 2.1), (14, 1.1), (15, 0.4), (16, 0.5), (17, 0.3)],
)
def test_the_triangles_pass_named_steps(count: int, want: float) -> None:
    # Up in 4, down in 2; the high peak up to step 15 of 30, in the middle of a climb, then the low one.
    schedule = triangular_two_phase(0.1, 2.1, 0.5, steps=30, up=4, down=2, first_phase=0.5)
    assert float(schedule(count)) == pytest.approx(want, rel=1e-5)


def test_schedules_take_traced_rates() -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def rates(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cosine_in_stages(rate, 10, 10)(5), triangular_two_phase(rate, 2 * rate, rate, 10, 1, 1, 0.5 * rate)(1)

    for rate in (0.5, 1.0):
        np.testing.assert_allclose(rates(jnp.float32(rate)), (rate / 2, 2 * rate), rtol=1e-6)


# Stopwatch


def test_a_stopwatch_splits_compilation_from_work() -> None:
    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(jnp.sin(x) @ jnp.cos(x))

    x = jnp.ones((7, 7)).block_until_ready()
    for first in (True, False):
        before = time.perf_counter()
        with Stopwatch() as watch:
            function(x).block_until_ready()
        whole = time.perf_counter() - before
        assert (watch.compile_seconds > 0) == first
        assert watch.seconds > 0 and watch.seconds + watch.compile_seconds <= whole


def test_a_stopwatch_counts_tracing_as_compilation_and_once() -> None:
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


def test_training_learns_a_set_that_can_be_learnt(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    config = TrainConfig(epochs=12, batch_size=8, learning_rate=0.1, crop=1)
    variables, history = train(key, tiny_classifier, tiny_data, config)
    assert history["loss"].shape == history["accuracy"].shape == (36,)
    assert evaluate(tiny_classifier, variables, tiny_data).acc > 0.9


def test_training_that_was_finished_is_read_back(
    tmp_path: Path, key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    config = TrainConfig(epochs=1, batch_size=8, crop=1)
    first, _ = train(key, tiny_classifier, tiny_data, config, checkpoints=tmp_path / "run")
    again, nothing = train(key, tiny_classifier, tiny_data, config, checkpoints=tmp_path / "run")
    chex.assert_trees_all_equal(again, first)
    assert nothing == {}


def test_training_is_sgd_under_a_cosine_that_moves_once_an_epoch(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    # All images alike, so that their order does not matter; and a rate so small that it gives the weights at the start.
    data = tiny_data.take(np.zeros(8, int))
    options = {"batch_size": 4, "crop": 0, "weight_decay": 0.1}
    start, _ = train(key, tiny_classifier, data, TrainConfig(epochs=1, learning_rate=1e-30, **options))
    got, _ = train(key, tiny_classifier, data, TrainConfig(epochs=4, learning_rate=0.5, **options))

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
    chex.assert_trees_all_close(got["params"], params, rtol=1e-4, atol=1e-5)


def test_whole_numbers_are_taken_where_a_setting_is_a_float(
    key: jax.Array, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    options = {"epochs": 1, "batch_size": 12, "crop": 0}
    whole, _ = train(key, tiny_classifier, tiny_data, TrainConfig(momentum=0, weight_decay=0, **options))
    real, _ = train(key, tiny_classifier, tiny_data, TrainConfig(momentum=0.0, weight_decay=0.0, **options))
    chex.assert_trees_all_equal(whole, real)


@pytest.mark.parametrize("field", ["epochs", "batch_size", "learning_rate"])
def test_training_settings_out_of_range_are_refused_by_name(field: str) -> None:
    with pytest.raises(UserError, match=f"TrainConfig.{field} is 0, expected"):
        TrainConfig(**{field: 0})


def test_the_published_network_trains_in_a_scan(key: jax.Array, tiny_data: Dataset) -> None:
    classifier = build_classifier("preact_resnet18", 3, width=2)
    step = GradientStep(SupervisedLoss(classifier), CosineSGD(6, 2))
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(classifier.init, key, tiny_data.images)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0.1, 0.2, leaf.shape), jnp.float32), shapes)
    state = step.init(drawn, CONSTANTS)
    trained, history = fit(key, step, state, tiny_data, CONSTANTS, epochs=2, batch_size=12)
    assert np.all(np.isfinite(history["loss"])) and int(trained.step) == 4
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained.variables, state.variables)
    assert all(jax.tree.leaves(moved))
