"""How programs that run a network are compiled."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jaxlib

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_SEEN = ((0, 9), (0, 12))
"""First and last version of jaxlib on which the option was tried; others might not know it."""
_TRIED = _SEEN[0] <= jaxlib.version.__version_info__[:2] <= _SEEN[1]

OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_onednn_custom_call": True} if _TRIED else {}
"""Lets oneDNN compute what it can on a CPU: 12 % faster training and 18 % faster inference on jaxlib 0.12."""

ROOM = 0.7
"""The share of the regions allowed at which `make_room` acts: the largest programs take a tenth."""

jit = partial(jax.jit, compiler_options=OPTIONS)
"""`jax.jit` with these options; its result cannot be called inside another compiled function."""

one_program = partial(jax.jit, inline=True)
"""`jax.jit` for functions that are called inside and outside compiled functions.

Inside they become part of the surrounding program; outside they are one program, not one for each operation.
"""


@contextlib.contextmanager
def standard_rules() -> Iterator[None]:
    """JAX's default rules for ranks, types and transfers, whatever the user has set for code of their own."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.transfer_guard("allow"):
        yield


def full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with matrix products in full float32.

    By default GPUs and TPUs keep 11 or 8 bits of the factors.
    """

    @wraps(function)
    def precise(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


def make_room() -> None:
    """Forgets all compiled programs where they are nearly too many for one process; those used again compile again.

    A program of a deep network takes hundreds of regions of memory. Linux allows a process 65,530 of them, which some
    60 networks of different shapes reach, and the compiler crashes with more.
    """
    regions, largest = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if regions.exists() and largest.exists() and regions.read_bytes().count(b"\n") > ROOM * int(largest.read_text()):
        jax.clear_caches()


def use_program_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX's own settings name one or turn it off."""
    from platformdirs import user_cache_path

    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        config.update("jax_compilation_cache_dir", str(user_cache_path("backdoor_jax", False) / "programs"))
        # A command compiles nearly a hundred small programs, two seconds in all.
        config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # On a CPU jaxlib 0.12 cannot write programs that call oneDNN; those are compiled in every run.
    # A folder that cannot be read or written only costs time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
