"""The sphere of a layer's original norm, on which D3 and FST keep the weights that they drive away."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from backdoor_jax.training import Constants, merge, split_by_path

Paths = tuple[tuple[str, ...], ...]
"""Prefixes of paths in ``params``, such as ``(("linear", "kernel"),)``."""


@jax.jit
def project_to_sphere(weights: Any, origin: Any) -> Any:
    """The proximal step: every layer rescaled to the norm of its original; a zero layer is left alone.

    Example:
        >>> project_to_sphere({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 1.0])})["w"].round(3).tolist()
        [0.6000000238418579, 0.800000011920929]
    """

    def one(w: jax.Array, w0: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(w)
        return jnp.where(norm > 0, w * (jnp.linalg.norm(w0) / jnp.where(norm > 0, norm, 1)), w)

    return jax.tree.map(one, weights, origin)


@dataclasses.dataclass(frozen=True)
class SphereProjection:
    """Puts the selected weights back on the sphere of their original norm; reads ``constants["origin"]``."""

    select: Paths

    def __call__(self, params: Any, constants: Constants) -> Any:
        """All parameters, the selected ones rescaled."""
        selected, others = split_by_path(params, self.select)
        return merge(project_to_sphere(selected, constants["origin"]), others)
