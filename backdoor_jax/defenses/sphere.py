"""Projection to the sphere of a layer's original norm, on which D3 and FST keep their selected weights."""

from typing import Any

import jax
import jax.numpy as jnp

from backdoor_jax.training import Path, merge, split_by_path


@jax.jit
def project_to_sphere(weights: Any, origin: Any) -> Any:
    """Weights with every layer rescaled to its original norm; a layer that is zero stays zero.

    Example:
        >>> project_to_sphere({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 1.0])})["w"].round(3).tolist()
        [0.6000000238418579, 0.800000011920929]
    """

    def rescale(w: jax.Array, w0: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(w)
        return jnp.where(norm > 0, w * (jnp.linalg.norm(w0) / jnp.where(norm > 0, norm, 1)), w)

    return jax.tree.map(rescale, weights, origin)


def paths_of(origin: Any) -> tuple[Path, ...]:
    """The paths of a tree's arrays; gaps (None) are skipped.

    Example:
        >>> paths_of({"linear": {"kernel": jnp.zeros(2), "bias": None}})
        (('linear', 'kernel'),)
    """
    return tuple(tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(origin))


def project_selected(origin: Any, params: Any) -> Any:
    """All parameters, with those that ``origin`` holds (it has None for the others) rescaled to their norms in it."""
    selected, others = split_by_path(params, paths_of(origin))
    return merge(project_to_sphere(selected, origin), others)
