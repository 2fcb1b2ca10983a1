"""The machine's memory: what cannot fit is refused before it is begun, because the system kills without a word."""

import os
from typing import Any

import jax

from backdoor_jax.errors import UserError


def require_memory(needed: int, where: str, fix: str, available: int | None = None) -> None:
    """Refuses what needs more memory than there is.

    Args:
        needed: a lower bound, in bytes.
        where: what needs it, for the error.
        fix: the end of the error.
        available: bytes; by default what the machine has.

    Raises:
        UserError: with both figures.

    Example:
        >>> require_memory(2 * 10**11, "images", "give fewer", 10**10)
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: images: needs 200.0 GB of memory, there are 10.0 GB; give fewer
    """
    available = machine_memory() if available is None else available
    if needed > available:
        raise UserError(f"{where}: needs {needed / 1e9:.1f} GB of memory, there are {available / 1e9:.1f} GB; {fix}")


def require_batch_memory(needed: int, shape: tuple[int, ...], name: str) -> None:
    """Refuses a batch of images for which the device has less memory than needed.

    Args:
        needed: a lower bound, in bytes; see `largest_array`.
        shape: the batch's, ``(B, H, W, channels)``.
        name: what computes, for the error.

    Raises:
        UserError: with both figures.

    Example:
        >>> require_batch_memory(10**17, (9, 4096, 4096, 3), "mm_bd")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: mm_bd on 9 images of 4096x4096: needs 100000000.0 GB of memory, ...
    """
    count, height, width, _ = shape
    what = f"{name} on {count} images of {height}x{width}"
    require_memory(needed, what, "give smaller images (--size)", device_memory())


def machine_memory() -> int:
    """The bytes of the machine's memory; beyond all bounds where the system does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63


def device_memory() -> int:
    """The bytes of the memory that JAX computes in: an accelerator's own, or the machine's."""
    statistics = jax.devices()[0].memory_stats() or {}
    return int(statistics.get("bytes_limit", machine_memory()))


def largest_array(function: Any, *arguments: Any) -> int:
    """The bytes of the largest array that a function computes on the way, found by tracing alone.

    Example:
        >>> largest_array(lambda x: (x[:, None] * x).sum(), jax.ShapeDtypeStruct((1000,), "float32"))
        4000000
    """
    return _largest(jax.make_jaxpr(function)(*arguments).jaxpr)


def _largest(program: Any) -> int:
    """The bytes of the largest array in a program and in those that it calls."""
    sizes = [0]
    for step in program.eqns:
        made = [variable.aval for variable in step.outvars]
        sizes += [aval.size * aval.dtype.itemsize for aval in made if hasattr(aval, "size")]
        called = [getattr(value, "jaxpr", value) for value in step.params.values()]
        sizes += [_largest(inner) for inner in called if hasattr(inner, "eqns")]
    return max(sizes)
