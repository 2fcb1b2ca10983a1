"""The loop over epochs, on the host: `fit` for one run, `fit_many` for several of one shape at once.

Neither is ever traced. They show progress, checkpoint, resume, and end with an error where a loss or a weight is not
finite.

Several runs on one device go one after another inside one compiled program (`jax.lax.map`): mapping a network over its
weights (`jax.vmap`) makes grouped convolutions, which are 2 to 5 times slower on CPU, and running two at a time gains
nothing where one fills the device. Several devices each take their share of the runs and never communicate
(`jax.shard_map`). `benchmarks/scaling.py` measures this on the device at hand.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backdoor_jax.compiling import jit, make_room
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.interop.checkpoints import Checkpoints
from backdoor_jax.models import Variables
from backdoor_jax.progress import progress_bar
from backdoor_jax.stopping import stop_if_asked
from backdoor_jax.training.engine import Info, Step, batch_shape, epoch
from backdoor_jax.validation import checked

RUNS = "runs"
"""The name of the axis of the mesh that `fit_many` spreads runs over."""

_compiled_epoch = partial(jit, static_argnames=("batch_size", "augment", "sharding"), donate_argnames="state")(epoch)
"""`epoch`, compiled once for each configuration; it consumes the state it is given."""


class Fitted(NamedTuple):
    """The result of `fit`, or of `fit_many`, whose arrays have a leading axis of V runs.

    Attributes:
        state: the final state.
        history: the info of every step of this call, ``(steps,)`` or ``(V, steps)``; steps done before a resumed run
            are not in it.
        epoch_steps: steps per epoch.
        batch: images per step.
    """

    state: Any
    history: dict[str, np.ndarray]
    epoch_steps: int
    batch: int

    @property
    def variables(self) -> Variables:
        """The final state's variables."""
        return self.state.variables

    @property
    def last_epoch(self) -> dict[str, float]:
        """Means of the info over the last epoch, and over all runs."""
        return {name: float(np.mean(values[..., -self.epoch_steps :])) for name, values in self.history.items()}

    @property
    def info(self) -> dict[str, Any]:
        """Steps done, images per step, and means over the last epoch, as plain values."""
        return {"steps": int(np.max(self.state.step)), "batch": self.batch, "last_epoch": self.last_epoch}


@checked
def fit(
    key: jax.Array,
    step: Step,
    state: Any,
    data: Dataset,
    *,
    batch_size: int,
    epochs: int | None = None,
    steps: int | None = None,
    augment: Augment | None = None,
    sharding: NamedSharding | None = None,
    name: str = "training",
    checkpoints: Path | None = None,
) -> Fitted:
    """Runs epochs until the state has done as many as asked for.

    The caller's state stays readable: it is copied before the first compiled call, which donates.

    Args:
        key: the run's key; see `epoch`.
        step: see `backdoor_jax.training.Step`.
        state: where to start.
        data: ``N`` images and labels.
        batch_size: see `batch_shape`.
        epochs: passes over the data in all, those before a resumption included.
        steps: instead of epochs, how many steps in all; they are rounded up to whole epochs.
        augment: see `epoch`.
        sharding: see `epoch`.
        name: what progress and errors call the run.
        checkpoints: a folder of Orbax checkpoints; a run that finds some there resumes from the newest.

    Raises:
        UserError: for a key or data that cannot be used, or a step that cannot be called.
        NonFiniteError: when a loss or the final weights are not finite, naming the run and the step.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> from backdoor_jax.training import SGD, GradientStep, supervised_loss
        >>> data, classifier = digits().train.take(slice(32)), build_classifier("small_cnn", 10, width=2)
        >>> step = GradientStep(jax.tree_util.Partial(supervised_loss, classifier), SGD())
        >>> start = step.init(classifier.init(jax.random.key(0), data.images))
        >>> fit(jax.random.key(1), step, start, data, batch_size=16, steps=3).info["steps"]
        4
    """
    epoch_steps, size = batch_shape(len(data), batch_size)
    if (epochs is None) == (steps is None):
        raise UserError("fit takes either epochs or steps; give one of them")
    total = epochs if epochs is not None else -(-steps // epoch_steps)  # type: ignore[operator]
    state, step = jax.device_put(state, may_alias=False), jax.tree.map(jnp.asarray, step)
    if sharding is not None:
        mesh: Any = sharding.mesh
        sharding = NamedSharding(_automatic(mesh), sharding.spec)
        key, state, data, step = _place((key, state, data, step), NamedSharding(sharding.mesh, PartitionSpec()))

    def advance(state: Any) -> tuple[Any, Info]:
        return _compiled_epoch(state, data, key, step, batch_size=batch_size, augment=augment, sharding=sharding)

    state, history = _loop(advance, state, total, epoch_steps, name, checkpoints)
    return Fitted(state, history, epoch_steps, size)


@checked
def fit_many(
    keys: jax.Array,
    steps: Step,
    states: Any,
    data: Dataset,
    *,
    batch_size: int,
    epochs: int,
    augment: Augment | None = None,
    mesh: Mesh | None = None,
    name: str = "training",
    checkpoints: Path | None = None,
) -> Fitted:
    """`fit` for V runs at once; each is what `fit` would have made of it alone.

    Args:
        keys: ``(V,)``, the runs' keys.
        steps: each run's step, of one structure, along a leading axis of V; see `stack`.
        states: where to start, along a leading axis of V.
        data: each run's images ``(V, N, H, W, channels)`` and labels ``(V, N)``.
        batch_size: see `backdoor_jax.training.batch_shape`.
        epochs: passes over the data in all.
        augment: see `backdoor_jax.training.epoch`.
        mesh: devices that divide V, along an axis ``runs``; `mesh_for` V by default.
        name: what progress and errors call the runs.
        checkpoints: see `fit`.

    Returns:
        The states, and the info of every step run here, ``(V, steps)``.

    Raises:
        UserError: for keys or data that cannot be used, or where the devices do not divide the runs.
        NonFiniteError: see `fit`; it names the run.

    Example:
        Two learning rates side by side:

        >>> from backdoor_jax import build_classifier, digits
        >>> from backdoor_jax.training import SGD, GradientStep, supervised_loss
        >>> data, classifier = digits().train.take(slice(32)), build_classifier("small_cnn", 10, width=2)
        >>> loss = jax.tree_util.Partial(supervised_loss, classifier)
        >>> steps = [GradientStep(loss, SGD(learning_rate=rate)) for rate in (0.1, 0.01)]
        >>> start = classifier.init(jax.random.key(0), data.images)
        >>> two = [stack(parts) for parts in (steps, [step.init(start) for step in steps], [data, data])]
        >>> fit_many(jax.random.split(jax.random.key(1)), *two, batch_size=32, epochs=1).history["loss"].shape
        (2, 1)
    """
    runs = len(keys)
    mesh = _automatic(mesh or mesh_for(runs))
    if mesh.axis_names != (RUNS,) or runs % mesh.size:
        raise UserError(
            f"{runs} runs do not divide over a mesh {dict(mesh.shape)}; give mesh_for({runs}, devices), or none"
        )
    epoch_steps, size = batch_shape(data.labels.shape[1], batch_size)
    states = jax.tree.map(jnp.copy, states)
    states, data, keys, steps = _place((states, data, keys, steps), NamedSharding(mesh, PartitionSpec(RUNS)))
    compiled = _compiled_epochs(batch_size, augment, mesh)
    states, history = _loop(
        lambda states: compiled(states, data, keys, steps), states, epochs, epoch_steps, name, checkpoints
    )
    return Fitted(states, history, epoch_steps, size)


@cache
def _compiled_epochs(batch_size: int, augment: Augment | None, mesh: Mesh) -> Any:
    """An epoch of all runs; it consumes the states it is given."""

    def share(*runs: Any) -> tuple[Any, Info]:
        return jax.lax.map(lambda run: epoch(*run, batch_size=batch_size, augment=augment), runs)

    spec = PartitionSpec(RUNS)
    return jit(jax.shard_map(share, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), donate_argnums=0)


def _loop(
    advance: Callable[[Any], tuple[Any, Info]],
    state: Any,
    epochs: int,
    epoch_steps: int,
    name: str,
    checkpoints: Path | None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Calls a compiled epoch until ``epochs`` are done.

    ``state.step`` may have a leading axis, of runs that go together; so has their info then, before that of the steps.
    """
    make_room()
    history: list[Info] = []
    with contextlib.ExitStack() as closing:
        saved = None if checkpoints is None else closing.enter_context(contextlib.closing(Checkpoints(checkpoints)))
        if saved is not None:
            state = saved.latest(state)
        done = int(np.max(state.step)) // epoch_steps
        tell = closing.enter_context(progress_bar(name, epochs * epoch_steps, done * epoch_steps))
        tell(0, "compiling")
        for number in range(done, epochs):
            state, info = advance(state)
            info = jax.device_get(info)
            bad = np.argwhere(~np.isfinite(info["loss"])).tolist()
            if bad:
                *run, at = bad[0]
                raise NonFiniteError(
                    f"{name}: the loss{f' of run {run[0]}' if run else ''} is {info['loss'][(*run, at)]} at step "
                    f"{number * epoch_steps + at + 1}; lower the learning rate, or check the model and the data given"
                )
            history.append(info)
            if saved is not None or number + 1 == epochs:
                _require_finite(state, name)
            if saved is not None:
                saved.save(number + 1, state)
            tell(epoch_steps, f"loss {info['loss'].mean():.4f}")
            stop_if_asked()
    names, axis = history[0] if history else (), np.ndim(state.step)
    return state, {name: np.concatenate([info[name] for info in history], axis) for name in names}


def _require_finite(state: Any, name: str) -> None:
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not all(np.isfinite(leaf).all() for leaf in floats):
        done = int(np.max(state.step))
        raise NonFiniteError(f"{name}: weights are not finite after step {done}; lower the learning rate")


def stack(trees: Sequence[Any]) -> Any:
    """Equal trees as one, along a new leading axis.

    Example:
        >>> stack([{"a": jnp.zeros(3)}, {"a": jnp.ones(3)}])["a"].shape
        (2, 3)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """The inverse of `stack`.

    Example:
        >>> unstack({"a": np.arange(2)})
        [{'a': np.int64(0)}, {'a': np.int64(1)}]
    """
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, number=number: leaf[number], tree) for number in range(count)]


def mesh_for(runs: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of as many devices as divide the runs evenly; of all devices by default.

    Example:
        >>> mesh_for(7, jax.devices()[:1]).size
        1
    """
    devices = jax.devices() if devices is None else devices
    count = max(number for number in range(1, min(runs, len(devices)) + 1) if runs % number == 0)
    return Mesh(np.array(devices[:count]), (RUNS,))


def _automatic(mesh: Mesh) -> Mesh:
    """A mesh of the same devices with axes over which the compiler spreads programs, whatever kind they were."""
    return Mesh(mesh.devices, mesh.axis_names)


def _place(tree: Any, sharding: NamedSharding) -> Any:
    """A tree on the devices of a mesh, those of other processes included; every process must give the same."""

    def put(leaf: Any) -> jax.Array:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        # Keys themselves cannot be placed on devices of other processes.
        bits = jax.device_put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))

    return jax.tree.map(put, tree)
