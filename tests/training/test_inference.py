"""Passes over many images in chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backdoor_jax.training import map_chunks, run_chunks

RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 2), (6, 3), (7, 7), (7, 10), (10, 3), (11, 10)])
def test_map_chunks_equals_the_function_applied_at_once(count: int, size: int) -> None:
    x, y = jnp.asarray(RANDOM.standard_normal((count, 2))), jnp.arange(count)

    def function(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        return {"sum": x.sum(1) + y, "outer": x[:, :, None] * x[:, None], "small": x < 0}

    got, expected = map_chunks(function, x, y, size=size), function(x, y)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    jax.tree.map(np.testing.assert_array_equal, run_chunks(function, x, y, name="test", size=size), expected)
    jitted = jax.jit(lambda x, y: map_chunks(function, x, y, size=size))(x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, expected)


@pytest.mark.parametrize("passes", [map_chunks, partial(run_chunks, name="test")])
def test_passes_never_show_more_than_their_size(passes: Callable[..., Any]) -> None:
    seen = []

    def function(x: jax.Array) -> jax.Array:
        seen.append(x.shape[0])
        return x

    passes(function, jnp.arange(23), size=5)
    assert set(seen) == {5}
