"""Several networks as one tree of variables, so that one step can train them together."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax


@partial(jax.jit, static_argnames="network")
def init(network: nn.Module, key: jax.Array, x: Any) -> dict[str, Any]:
    """Fresh variables of a network, compiled as one program."""
    return dict(network.init(key, x, train=False))


def run(network: nn.Module, variables: dict[str, Any], x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    """A network's output, and its variables with the batch's statistics where it trains."""
    if not train:
        return network.apply(variables, x, train=False), variables  # type: ignore[return-value]
    out, new = network.apply(variables, x, train=True, mutable=["batch_stats"])
    return out, {**variables, **new}


def join(**models: dict[str, Any]) -> dict[str, Any]:
    """Several models' variables as one tree, each collection by model, so that one step can train them together.

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
    """One model's variables out of `join`'s tree."""
    return {collection: trees[name] for collection, trees in joint.items() if name in trees}
