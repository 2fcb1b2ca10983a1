"""A module's computation as a static graph of operators, and its interpreter."""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from backdoor_jax.errors import UserError, first_line
from backdoor_jax.models.torch_module.layouts import TO_TORCH, ChannelsLast, call
from backdoor_jax.models.torch_module.operators import batch_norm, batch_statistics, find, instance_norm

INPUT, TENSOR, BATCH, BATCH_NORM = "input", "tensor", "batch", "batch_norm"
"""Nodes that are no operator: the images, a tensor of the module, the number of images; and the operator with state."""
PYTHON = "python."
"""The prefix of operators on numbers."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """The result of another node."""

    node: int


@dataclasses.dataclass(frozen=True)
class Node:
    """One step of a graph.

    Attributes:
        operator: a name in `OPERATORS`, or one of the kinds above.
        arguments: by name; `Ref` for results, tuples for lists, plain values otherwise.
        layer: the path of the module that it belongs to, for messages.
    """

    operator: str
    arguments: tuple[tuple[str, Any], ...] = ()
    layer: str = ""

    def refs(self) -> Iterator[int]:
        """The nodes whose results it uses."""
        for _, value in self.arguments:
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Ref):
                    yield part.node


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in the order of computation; hashed once, since a program's cache is asked at every call."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.nodes))

    def __hash__(self) -> int:
        return operator.attrgetter("_hash")(self)

    def needed(self, wanted: Sequence[int], given: Mapping[int, Any]) -> list[int]:
        """The nodes to compute for those wanted, in order, where some are given."""
        found: set[int] = set()
        waiting = list(wanted)
        while waiting:
            at = waiting.pop()
            if at not in found and at not in given:
                found.add(at)
                waiting += self.nodes[at].refs()
        return sorted(found)

    def run(
        self,
        wanted: Sequence[int],
        given: Mapping[int, Any],
        tensor: Callable[[str], jax.Array],
        *,
        batch: Any,
        train: bool = False,
        after: Callable[[int, Any], Any] = lambda node, value: value,
    ) -> tuple[list[Any], dict[str, jax.Array]]:
        """Results of the nodes wanted.

        Args:
            wanted: which nodes.
            given: results that are known, such as the images.
            tensor: the module's tensor of a name, in PyTorch's layout.
            batch: the number of images.
            train: whether batch normalizations use the batch's statistics.
            after: what becomes of each result, given the node and the result.

        Returns:
            The results, and in training mode the new statistics by name.

        Raises:
            UserError: where an operator cannot be computed, naming it and its layer.
        """
        values = dict(given)
        statistics: dict[str, jax.Array] = {}
        for at in self.needed(wanted, given):
            node = self.nodes[at]
            if node.operator == BATCH:
                values[at] = batch
                continue
            arguments = {name: _resolved(value, values) for name, value in node.arguments}
            if node.operator == TENSOR:
                values[at] = tensor(arguments["name"])
                continue
            try:
                if node.operator == BATCH_NORM:
                    result = _batch_norm(arguments, tensor, statistics, train)
                else:
                    result = _operate(node.operator, arguments)
            except UserError:
                raise
            except Exception as error:  # JAX raises many types for shapes that do not fit.
                raise UserError(
                    f"{node.operator} of layer {node.layer!r} cannot be computed with these arguments "
                    f"({first_line(error)}); replace it, or fix it in backdoor_jax/models/torch_module/operators"
                ) from error
            values[at] = after(at, result)
        return [values[at] for at in wanted], statistics


def _resolved(value: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.node]
    return tuple(_resolved(part, values) for part in value) if isinstance(value, tuple) else value


def _operate(name: str, arguments: dict[str, Any]) -> Any:
    found = find(name)
    if found is None:
        raise UserError(f"the operator {name} is not there; make the classifier again with Classifier.from_torch")
    if name.startswith(PYTHON):
        return found.function(*arguments.values())
    return call(found.function, found.layout, arguments)


def _batch_norm(
    arguments: dict[str, Any], tensor: Callable[[str], jax.Array], statistics: dict[str, jax.Array], train: bool
) -> Any:
    """A batch normalization with running statistics, which in training mode are updated as in PyTorch.

    The running variance gets the unbiased variance of the batch. Without a momentum it is the mean over all batches.
    An instance normalization uses the statistics of each image, and their means as those of the batch.
    """
    x, names = arguments["input"], (arguments["mean"], arguments["var"])
    last = isinstance(x, ChannelsLast)
    array = x.array if last else x
    axes = TO_TORCH if last else tuple(range(array.ndim))
    mean, var = (statistics.get(name, tensor(name)) for name in names)
    if train:
        counter, momentum = arguments["counter"], arguments["momentum"]
        count: Any = None if counter is None else statistics.get(counter, tensor(counter)) + 1
        share = 1 / count if momentum is None else momentum
        batch_mean, batch_var, n = batch_statistics(array, axes, arguments["per_image"])
        statistics[names[0]] = mean + share * (batch_mean - mean)
        statistics[names[1]] = var + share * (batch_var * (n / max(n - 1, 1)) - var)
        if count is not None:
            statistics[counter] = count
        mean, var = batch_mean, batch_var
    given = {name: arguments[name] for name in ("weight", "bias", "eps")}
    if train and arguments["per_image"]:
        out = instance_norm(array, axes, **given)
    else:
        out = batch_norm(array, mean, var, axes=axes, **given)
    return ChannelsLast(out) if last else out
