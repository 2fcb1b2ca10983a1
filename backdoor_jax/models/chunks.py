"""Work on a batch of images a few at a time, so that what is computed in between stays in the processor's cache."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunk_count(batch: int, chunk: int) -> int:
    """The number of chunks of at most ``chunk`` images in which a batch is processed; as equal as can be.

    A divisor of the batch is taken where one is near, because other chunks need a padded copy of the batch.

    Example:
        >>> chunk_count(200, 60), chunk_count(199, 60), chunk_count(1, 60)
        (4, 4, 1)
    """
    least = -(-batch // max(chunk, 1))
    return next((count for count in range(least, min(batch, 2 * least) + 1) if batch % count == 0), least)


def _split(x: jax.Array, count: int) -> jax.Array:
    """The images in ``count`` chunks, ``(count, chunk, ...)``; the last one is filled up with zeros."""
    size = -(-len(x) // count)
    missing = count * size - len(x)
    if missing:
        x = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(count, size, *x.shape[1:])


def mapped(function: Callable[[jax.Array], jax.Array], x: jax.Array, chunk: int) -> jax.Array:
    """``function(x)`` for a function that treats every image by itself, computed ``chunk`` images at a time.

    Example:
        >>> mapped(lambda x: 2 * x, jnp.arange(5.0), 2).tolist()
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    count = chunk_count(len(x), chunk)
    if count == 1:
        return function(x)
    y = lax.map(function, _split(x, count))
    return y.reshape(-1, *y.shape[2:])[: len(x)]


def summed(function: Callable[..., Any], x: jax.Array, y: jax.Array, chunk: int) -> Any:
    """``function(x, y)`` for a function that sums over images and is zero for zeros, ``chunk`` images at a time.

    Example:
        >>> float(summed(lambda x, y: x @ y, jnp.arange(5.0), jnp.ones(5), 2))
        10.0
    """
    count = chunk_count(len(x), chunk)
    if count == 1:
        return function(x, y)
    parts = _split(x, count), _split(y, count)
    shapes = jax.eval_shape(function, parts[0][0], parts[1][0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    return lax.scan(add, zeros, parts)[0]
