"""Passes over a complete set in chunks of one size: one compiled program, and memory independent of the set's size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from backdoor_jax.compiling import jit
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.validation import checked

CHUNK = 500


def map_chunks(function: Callable[..., Any], *arrays: jax.Array, size: int = CHUNK) -> Any:
    """Applies a function of batches to arrays with a common leading axis, chunk by chunk.

    The last chunk overlaps the one before it, so that all chunks have the same static size without padding.

    Args:
        function: takes a slice of each array, ``(size, ...)``, and returns a tree of arrays with that leading axis;
            the result for a row must not depend on the other rows.
        arrays: ``(N, ...)`` each.
        size: rows per chunk.

    Returns:
        The function's results for all rows, a tree of arrays ``(N, ...)``.

    Example:
        >>> map_chunks(lambda x: 2 * x, jnp.arange(5), size=2).tolist()
        [0, 2, 4, 6, 8]
    """
    count = arrays[0].shape[0]
    size = min(size, count)
    full = -(-count // size) - 1

    def one(start: jax.Array) -> Any:
        return function(*(jax.lax.dynamic_slice_in_dim(array, start, size) for array in arrays))

    parts = jax.lax.map(one, jnp.minimum(jnp.arange(full + 1) * size, count - size))
    rest = count - full * size

    def join(part: jax.Array) -> jax.Array:
        return jnp.concatenate([part[:-1].reshape(full * size, *part.shape[2:]), part[-1, size - rest :]])

    return jax.tree.map(join, parts)


@checked
def latents(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    """Computes the latents ``(N, D)`` of uint8 images in evaluation mode.

    Raises:
        UserError: for images or variables that cannot be used.
        NonFiniteError: for weights or statistics that are not finite.
    """
    return _latents(classifier, variables, images)


@jit
def _latents(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    return map_chunks(lambda chunk: classifier.features(variables, chunk)[0], images)
