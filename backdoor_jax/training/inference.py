"""Passes over a complete set in chunks of one size: one compiled program, and memory independent of the set's size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.compiling import jit, make_room, one_program
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.progress import progress_bar
from backdoor_jax.stopping import stop_if_asked
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


def run_chunks(program: Callable[..., Any], *arrays: jax.Array, name: str, size: int = CHUNK) -> Any:
    """`map_chunks` of a compiled program, called by the host for every chunk: with progress, and able to stop.

    Args:
        program: takes a slice of each array, ``(size, ...)``, and returns a tree of arrays with that leading axis; the
            result for a row must not depend on the other rows.
        arrays: ``(N, ...)`` each.
        name: what progress calls the pass.
        size: rows per chunk.

    Returns:
        The program's results for all rows, a tree of NumPy arrays ``(N, ...)``.

    Example:
        >>> run_chunks(lambda x: 2 * x, jnp.arange(5), name="doubling", size=2).tolist()
        [0, 2, 4, 6, 8]
    """
    make_room()
    count = arrays[0].shape[0]
    size = min(size, count)
    parts = []
    with progress_bar(name, count, unit="images") as tell:
        tell(0, "compiling")
        for done in range(0, count, size):
            start = min(done, count - size)
            chunk = arrays if size == count else _rows(arrays, start, size=size)
            found = jax.device_get(program(*chunk))
            parts.append(jax.tree.map(lambda part, skip=done - start: part[skip:], found))
            tell(size - (done - start))
            stop_if_asked()
    return jax.tree.map(lambda *chunks: np.concatenate(chunks), *parts)


@partial(one_program, static_argnames="size")
def _rows(arrays: tuple[jax.Array, ...], start: int, size: int) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.dynamic_slice_in_dim(array, start, size) for array in arrays)


@checked
def latents(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    """Computes the latents ``(N, D)`` of uint8 images in evaluation mode.

    Raises:
        UserError: for images or variables that cannot be used.
        NonFiniteError: for weights or statistics that are not finite.
    """
    return jnp.asarray(run_chunks(partial(_latents, classifier, variables), images, name="latents"))


@jit
def _latents(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    return classifier.features(variables, images)[0]
