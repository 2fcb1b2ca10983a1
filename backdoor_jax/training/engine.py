"""The one optimisation engine: a step, an epoch that is a `lax.scan` of steps, and `fit`, a host loop over epochs.

A *step* ``(state, batch, key, constants) -> (state, info)`` is pure. `GradientStep` is the usual one; a method may
bring its own. Steps are static to the compiler: make them frozen dataclasses, equal by value, so that an equal step is
compiled once. What a sweep would change goes into ``constants``, which are traced: learning rates, penalties, the
original head.

An *epoch* shuffles, gathers, augments and steps on the device; it may be jitted, mapped over and sharded. `fit` is
never traced. It shows progress, checkpoints and resumes.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backdoor_jax.compiling import jit
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.interop.checkpoints import Checkpoints
from backdoor_jax.models import Variables

Constants = dict[str, Any]
"""Traced values a step reads and does not change: a tree of arrays."""
Info = dict[str, jax.Array]


class State(NamedTuple):
    """What an optimisation carries from step to step.

    Attributes:
        step: int32 scalar, steps done.
        variables: the model's variables.
        optimizer: the optimiser's state.
    """

    step: jax.Array
    variables: Variables
    optimizer: Any


class Step(Protocol):
    """One update; hashable, and equal to any step that would compile to the same program."""

    def __hash__(self) -> int:
        """Equal for equal steps."""

    def __call__(self, state: Any, batch: Dataset, key: jax.Array, constants: Constants) -> tuple[Any, Info]:
        """The next state, and scalars worth logging."""


class Loss(Protocol):
    """``(variables, batch, key, constants) -> (scalar, (variables with new statistics, info))``; hashable."""

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """The loss of one batch."""


@dataclasses.dataclass(frozen=True)
class GradientStep:
    """Descends a loss, then projects.

    Attributes:
        loss: see `Loss`.
        optimizer: makes the Optax transformation out of the (traced) constants; hashable.
        trainable: path prefixes of the parameters that move, such as ``(("linear",),)``; all of them by default.
        project: ``(params, constants) -> params`` after the update, a proximal step; hashable.
    """

    loss: Loss
    optimizer: Callable[[Constants], optax.GradientTransformation]
    trainable: tuple[tuple[str, ...], ...] = ((),)
    project: Callable[[Any, Constants], Any] | None = None

    def init(self, variables: Variables, constants: Constants) -> State:
        """The state before the first step."""
        moving, _ = split_by_path(variables["params"], self.trainable)
        return State(jnp.zeros((), jnp.int32), variables, self.optimizer(constants).init(moving))

    def __call__(self, state: State, batch: Dataset, key: jax.Array, constants: Constants) -> tuple[State, Info]:
        """One gradient step."""
        moving, fixed = split_by_path(state.variables["params"], self.trainable)

        def objective(moving: Any) -> tuple[jax.Array, tuple[Variables, Info]]:
            variables = {**state.variables, "params": merge(moving, fixed)}
            return self.loss(variables, batch, key, constants)

        loss, variables, info, gradient = self.descent(objective, moving, constants)
        updates, optimizer = self.optimizer(constants).update(gradient, state.optimizer, moving)
        params = merge(optax.apply_updates(moving, updates), fixed)
        if self.project is not None:
            params = self.project(params, constants)
        return State(state.step + 1, {**variables, "params": params}, optimizer), {"loss": loss, **info}

    def descent(
        self, objective: Callable[[Any], Any], moving: Any, constants: Constants
    ) -> tuple[jax.Array, Variables, Info, Any]:
        """The loss, the variables with new statistics, info, and what the optimiser is handed: the gradient."""
        del constants
        (loss, (variables, info)), gradient = jax.value_and_grad(objective, has_aux=True)(moving)
        return loss, variables, info, gradient


def split_by_path(tree: Any, prefixes: tuple[tuple[str, ...], ...]) -> tuple[Any, Any]:
    """Splits a tree of dictionaries by path: leaves under a prefix, and the others; gaps are None.

    Raises:
        UserError: for a prefix under which nothing lies.

    Example:
        >>> split_by_path({"a": {"b": 1}, "c": 2}, (("a",),))
        ({'a': {'b': 1}, 'c': None}, {'a': {'b': None}, 'c': 2})
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [tuple(str(entry.key) for entry in path) for path, _ in leaves]
    for prefix in prefixes:
        if not any(path[: len(prefix)] == prefix for path in paths):
            raise UserError(
                f"no parameters under {'/'.join(prefix)!r}; there are {', '.join(sorted(map('/'.join, paths)))}"
            )
    chosen = [any(path[: len(prefix)] == prefix for prefix in prefixes) for path in paths]
    values = [value for _, value in leaves]
    inside = [value if take else None for value, take in zip(values, chosen, strict=True)]
    outside = [None if take else value for value, take in zip(values, chosen, strict=True)]
    return jax.tree.unflatten(treedef, inside), jax.tree.unflatten(treedef, outside)


def merge(first: Any, second: Any) -> Any:
    """Puts together what `split_by_path` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def batch_shape(images: int, batch_size: int) -> tuple[int, int]:
    """Steps in an epoch and images in each: ceil(n / b) steps of n // steps, so that every batch has one static size.

    Example:
        >>> batch_shape(2500, 256)
        (10, 250)
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}, expected at least 1")
    steps = -(-images // batch_size)
    return steps, images // steps


def epoch(
    state: Any,
    data: Dataset,
    key: jax.Array,
    constants: Constants,
    *,
    step: Step,
    batch_size: int,
    augment: Augment | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[Any, Info]:
    """One pass over the data in a fresh order, everything on the device.

    ``key`` stays the same for a whole run: it is folded with the number of steps done, so that a resumed run draws
    what an uninterrupted one would have.

    Args:
        state: whatever `step` carries, with a field ``step`` that counts.
        data: ``N`` images and labels; or a pytree dataclass of other rows that has `Dataset`'s length and ``take``.
        key: the run's key.
        constants: traced values handed to every step.
        step: see `Step`.
        batch_size: the largest batch; see `batch_shape`.
        augment: applied to each batch of uint8 images.
        sharding: spreads each batch over the devices of a mesh.

    Returns:
        The state, and the steps' info stacked along a leading axis.
    """
    steps, size = batch_shape(len(data), batch_size)
    shuffle_key, steps_key = jax.random.split(key)
    order = jax.random.permutation(jax.random.fold_in(shuffle_key, state.step), len(data))

    def body(state: Any, indices: jax.Array) -> tuple[Any, Info]:
        augment_key, step_key = jax.random.split(jax.random.fold_in(steps_key, state.step))
        batch = data.take(indices)
        if sharding is not None:
            batch = jax.lax.with_sharding_constraint(batch, sharding)
        if augment is not None:
            batch = dataclasses.replace(batch, images=augment(augment_key, batch.images))
        return step(state, batch, step_key, constants)

    return jax.lax.scan(body, state, order[: steps * size].reshape(steps, size))


run_epoch = partial(jit, static_argnames=("step", "batch_size", "augment", "sharding"), donate_argnames=("state",))(
    epoch
)
"""`epoch`, compiled once for each configuration; it consumes the state it is given."""


@contextlib.contextmanager
def _progress(name: str, total: int, done: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda steps, loss: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc=name, unit="step", leave=False) as bar:

        def advance(steps: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(steps)

        yield advance


def automatic(mesh: Mesh) -> Mesh:
    """A mesh with axes over which the compiler spreads programs, whatever kind they were; of the same devices."""
    return Mesh(mesh.devices, mesh.axis_names)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """A tree on the devices of a mesh, those of other processes included; every process must give the same."""

    def put(leaf: Any) -> jax.Array:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        # Keys themselves are not taken to devices of other processes.
        bits = jax.device_put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))

    return jax.tree.map(put, tree)


def _require_finite(state: Any, name: str) -> None:
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not all(np.isfinite(leaf).all() for leaf in floats):
        done = int(np.max(state.step))
        raise NonFiniteError(f"{name}: weights are not finite after step {done}; lower the learning rate")


def fit(
    key: jax.Array,
    step: Step,
    state: Any,
    data: Dataset,
    constants: Constants,
    *,
    epochs: int,
    batch_size: int,
    augment: Augment | None = None,
    sharding: NamedSharding | None = None,
    name: str = "training",
    checkpoints: Path | None = None,
    checkpoint_every: int = 1,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Runs epochs until the state has done ``epochs`` of them.

    The caller's state stays readable: it is copied before the first compiled call, which donates.

    Args:
        key: the run's key; see `epoch`.
        step: see `Step`.
        state: where to start.
        data: ``N`` images and labels.
        constants: traced values handed to every step.
        epochs: passes over the data in all, those before a resumption included.
        batch_size: see `batch_shape`.
        augment: see `epoch`.
        sharding: see `epoch`.
        name: what progress and errors call the run.
        checkpoints: a folder of Orbax checkpoints; a run that finds some there goes on from the newest.
        checkpoint_every: epochs between two checkpoints.

    Returns:
        The state, and the info of every step run here.

    Raises:
        NonFiniteError: when a loss or the final weights are not finite, naming the run and the step.
    """
    steps, _ = batch_shape(len(data), batch_size)
    state = jax.device_put(state, may_alias=False)
    if sharding is not None:
        mesh: Any = sharding.mesh
        sharding = NamedSharding(automatic(mesh), sharding.spec)
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        key, state, data, constants = place((key, state, data, constants), everywhere)
    options: Any = {"step": step, "batch_size": batch_size, "augment": augment, "sharding": sharding}

    def advance(state: Any) -> tuple[Any, Info]:
        return run_epoch(state, data, key, constants, **options)

    return run_epochs(advance, state, epochs, steps, name, checkpoints, checkpoint_every)


def run_epochs(
    advance: Callable[[Any], tuple[Any, Info]],
    state: Any,
    epochs: int,
    steps: int,
    name: str,
    checkpoints: Path | None = None,
    checkpoint_every: int = 1,
) -> tuple[Any, dict[str, np.ndarray]]:
    """The host's side of `fit`: calls a compiled epoch of so many steps until ``epochs`` are done.

    ``state.step`` may have a leading axis, of runs that go together; so has their info then, before that of the steps.
    """
    history: list[Info] = []
    with contextlib.ExitStack() as closing:
        saved = None if checkpoints is None else closing.enter_context(contextlib.closing(Checkpoints(checkpoints)))
        if saved is not None:
            state = saved.latest(state)
        done = int(np.max(state.step)) // steps
        tell = closing.enter_context(_progress(name, epochs * steps, done * steps))
        for number in range(done, epochs):
            state, info = advance(state)
            info = jax.device_get(info)
            bad = np.argwhere(~np.isfinite(info["loss"])).tolist()
            if bad:
                *run, at = bad[0]
                raise NonFiniteError(
                    f"{name}: the loss{f' of run {run[0]}' if run else ''} is {info['loss'][(*run, at)]} at step "
                    f"{number * steps + at + 1}; lower the learning rate, or check the model and the data given"
                )
            history.append(info)
            tell(steps, float(info["loss"].mean()))
            last = number + 1 == epochs
            if last or (saved is not None and (number + 1) % checkpoint_every == 0):
                _require_finite(state, name)
                if saved is not None:
                    saved.save(number + 1, state)
    names, axis = history[0] if history else (), np.ndim(state.step)
    return state, {name: np.concatenate([info[name] for info in history], axis) for name in names}
