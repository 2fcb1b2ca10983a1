"""Several networks as one tree of variables, so that one step can train them together."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax


@partial(jax.jit, static_argnames="network")
def init(network: nn.Module, key: jax.Array, x: Any) -> dict[str, Any]:
    """The initial variables of a network for an input like ``x``, compiled as one program."""
    return dict(network.init(key, x, train=False))


def run(network: nn.Module, variables: dict[str, Any], x: Any, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    """A network's output, and its variables; in training mode they hold the batch's statistics."""
    if not train:
        return network.apply(variables, x, train=False), variables  # type: ignore[return-value]
    out, new = network.apply(variables, x, train=True, mutable=["batch_stats"])
    return out, {**variables, **new}


def join(**models: dict[str, Any]) -> dict[str, Any]:
    """One tree of the variables of several models: under each collection, one entry for each model.

    Example:
        >>> join(a={"params": 1}, b={"params": 2, "batch_stats": 3})
        {'params': {'a': 1, 'b': 2}, 'batch_stats': {'b': 3}}
    """
    joint: dict[str, Any] = {}
    for name, variables in models.items():
        for collection, tree in variables.items():
            joint.setdefault(collection, {})[name] = tree
    return joint


def part(joint: dict[str, Any], name: str) -> dict[str, Any]:
    """The variables of one model in a tree that `join` made.

    Example:
        >>> part({"params": {"a": 1, "b": 2}, "batch_stats": {"b": 3}}, "a")
        {'params': 1}
    """
    return {collection: trees[name] for collection, trees in joint.items() if name in trees}
