"""Several runs of one shape at once: seeds, victims or settings, on one device or over many.

On a device the runs go one after another, inside one compiled program (`jax.lax.map`): mapping a network over its
weights (`jax.vmap`) makes grouped convolutions, which are 2 to 5 times slower on CPU, and running two at a time gains
nothing where one fills the device. Several devices each take their share of the runs and never speak to one another
(`jax.shard_map`). `benchmarks/scaling.py` measures all of this on the device at hand.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backdoor_jax.compiling import jit
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.errors import UserError
from backdoor_jax.training.engine import Constants, Info, Step, automatic, batch_shape, epoch, place, run_epochs

RUNS = "runs"
"""The name of the mesh's axis."""


def stack(trees: Sequence[Any]) -> Any:
    """Equal trees as one, along a new leading axis.

    Example:
        >>> stack([{"a": jnp.zeros(3)}, {"a": jnp.ones(3)}])["a"].shape
        (2, 3)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """What `stack` put together.

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


@cache
def _compiled(step: Step, batch_size: int, augment: Augment | None, mesh: Mesh) -> Any:
    """An epoch of all runs, compiled once for each configuration; it consumes the states it is given."""

    def each(state: Any, data: Dataset, key: jax.Array, constants: Constants) -> tuple[Any, Info]:
        return epoch(state, data, key, constants, step=step, batch_size=batch_size, augment=augment)

    def share(states: Any, data: Dataset, keys: jax.Array, constants: Constants) -> tuple[Any, Info]:
        return jax.lax.map(lambda own: each(*own), (states, data, keys, constants))

    runs = PartitionSpec(RUNS)
    return jit(jax.shard_map(share, mesh=mesh, in_specs=runs, out_specs=runs, check_vma=False), donate_argnums=0)


def fit_many(
    keys: jax.Array,
    step: Step,
    states: Any,
    data: Dataset,
    constants: Constants,
    *,
    epochs: int,
    batch_size: int,
    augment: Augment | None = None,
    mesh: Mesh | None = None,
    name: str = "training",
    checkpoints: Path | None = None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """`backdoor_jax.training.fit` for V runs at once; each is what `fit` would have made of it alone.

    Args:
        keys: ``(V,)``, the runs' keys.
        step: see `Step`; one for all.
        states: where to start, along a leading axis of V; see `stack`.
        data: each run's images ``(V, N, H, W, channels)`` and labels ``(V, N)``.
        constants: each run's, along a leading axis of V.
        epochs: passes over the data in all.
        batch_size: see `backdoor_jax.training.batch_shape`.
        augment: see `backdoor_jax.training.epoch`.
        mesh: devices that divide V, along an axis ``runs``; `mesh_for` V by default.
        name: what progress and errors call the runs.
        checkpoints: see `fit`.

    Returns:
        The states, and the info of every step run here, ``(V, steps)``.

    Raises:
        UserError: where the devices do not divide the runs.
        NonFiniteError: see `fit`; it names the run.

    Example:
        >>> from backdoor_jax import TrainConfig, build_classifier, digits
        >>> from backdoor_jax.config import numbers
        >>> from backdoor_jax.training import CosineSGD, GradientStep, SupervisedLoss
        >>> data = digits().train.take(slice(32))
        >>> classifier = build_classifier("small_cnn", 10, width=2)
        >>> step, constants = GradientStep(SupervisedLoss(classifier), CosineSGD(1)), numbers(TrainConfig())
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> states = [step.init(classifier.init(key, data.images), constants) for key in keys]
        >>> two = stack([(state, data, constants) for state in states])
        >>> states, history = fit_many(keys, step, *two, epochs=1, batch_size=32)
        >>> history["loss"].shape
        (2, 1)
    """
    runs = len(keys)
    mesh = automatic(mesh or mesh_for(runs))
    if mesh.axis_names != (RUNS,) or runs % mesh.size:
        raise UserError(
            f"{runs} runs do not divide over a mesh {dict(mesh.shape)}; give mesh_for({runs}, devices), or none"
        )
    steps, _ = batch_shape(data.labels.shape[1], batch_size)
    states = jax.tree.map(jnp.copy, states)
    states, data, keys, constants = place((states, data, keys, constants), NamedSharding(mesh, PartitionSpec(RUNS)))
    compiled = _compiled(step, batch_size, augment, mesh)
    return run_epochs(lambda states: compiled(states, data, keys, constants), states, epochs, steps, name, checkpoints)
