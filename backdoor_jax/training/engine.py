"""The optimization engine: a step, and an epoch that is a `lax.scan` of steps.

A *step* ``(state, batch, key) -> (state, info)`` is pure, and a pytree: what a sweep would change (learning rates,
penalties, the original head) are its leaves and traced; the functions and the integers in it are static, so that an
equal step is compiled once. `GradientStep` is the usual one; a method may bring its own.

A *loss* is a plain function ``(..., variables, batch, key)`` whose first arguments are bound by
`jax.tree_util.Partial`, which is a pytree as well:

    >>> from jax.tree_util import Partial
    >>> from backdoor_jax import build_classifier
    >>> from backdoor_jax.training import SGD, supervised_loss
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> step = GradientStep(Partial(supervised_loss, classifier), SGD(learning_rate=0.1))
    >>> jax.tree.leaves(step)
    [0.1, 0.0, 0.0]

An *epoch* shuffles, gathers, augments and steps on the device; it may be jitted, mapped over and sharded. The loop over
epochs is `backdoor_jax.training.fit`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from backdoor_jax.data import Augment, Dataset
from backdoor_jax.errors import UserError
from backdoor_jax.models import Variables
from backdoor_jax.training.optimizers import Optimizer

Info = dict[str, jax.Array]
"""Scalars of a step worth logging."""
Path = tuple[str, ...]
"""Names down to a part of a tree of dictionaries."""
LossResult = tuple[jax.Array, tuple[Variables, Info]]
"""A loss, and with it the variables with the batch's statistics and scalars worth logging."""


class State(NamedTuple):
    """What an optimization carries from step to step.

    Attributes:
        step: int32 scalar, steps done.
        variables: the model's variables.
        optimizer: the optimizer's state.
    """

    step: jax.Array
    variables: Variables
    optimizer: Any


class Step(Protocol):
    """One update; a pytree."""

    def __call__(self, state: Any, batch: Dataset, key: jax.Array) -> tuple[Any, Info]:
        """The next state, and scalars worth logging, ``loss`` among them."""


class Loss(Protocol):
    """The loss of one batch; a pytree, usually a function with its first arguments bound by `Partial`."""

    def __call__(self, variables: Variables, batch: Dataset, key: jax.Array) -> LossResult:
        """The loss, which is differentiated by ``variables["params"]``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientStep:
    """Descends a loss, then projects.

    Attributes:
        loss: see `Loss`.
        optimizer: see `Optimizer`.
        project: ``params -> params`` after the update, a proximal step; a pytree.
        trainable: path prefixes of the parameters that move, such as ``(("linear",),)``; all of them by default.
    """

    loss: Loss
    optimizer: Optimizer
    project: Callable[[Any], Any] | None = None
    trainable: tuple[Path, ...] = dataclasses.field(default=((),), metadata={"static": True})

    def init(self, variables: Variables) -> State:
        """The state before the first step."""
        moving, _ = split_by_path(variables["params"], self.trainable)
        return State(jnp.zeros((), jnp.int32), variables, self.optimizer.transformation().init(moving))

    def __call__(self, state: State, batch: Dataset, key: jax.Array) -> tuple[State, Info]:
        """One gradient step."""
        moving, fixed = split_by_path(state.variables["params"], self.trainable)

        def objective(moving: Any) -> LossResult:
            return self.loss({**state.variables, "params": merge(moving, fixed)}, batch, key)

        loss, variables, info, gradient = self.descent(objective, moving)
        updates, optimizer = self.optimizer.transformation().update(gradient, state.optimizer, moving)
        params = merge(optax.apply_updates(moving, updates), fixed)
        if self.project is not None:
            params = self.project(params)
        return State(state.step + 1, {**variables, "params": params}, optimizer), {"loss": loss, **info}

    def descent(self, objective: Callable[[Any], LossResult], moving: Any) -> tuple[jax.Array, Variables, Info, Any]:
        """The loss, the variables with new statistics, info, and what the optimizer receives: the gradient."""
        (loss, (variables, info)), gradient = jax.value_and_grad(objective, has_aux=True)(moving)
        return loss, variables, info, gradient


def split_by_path(tree: Any, prefixes: tuple[Path, ...]) -> tuple[Any, Any]:
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
    """Joins the two parts that `split_by_path` made."""
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
    step: Step,
    *,
    batch_size: int,
    augment: Augment | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[Any, Info]:
    """One pass over the data in a new order, all of it on the device.

    ``key`` stays the same for a whole run: it is folded with the number of steps done, so that a resumed run draws
    what an uninterrupted one would have.

    Args:
        state: whatever `step` carries, with a field ``step`` that counts.
        data: ``N`` images and labels; or a pytree dataclass of other rows that has `Dataset`'s length and ``take``.
        key: the run's key.
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
        return step(state, batch, step_key)

    return jax.lax.scan(body, state, order[: steps * size].reshape(steps, size))
