"""The CPU convolutions against XLA's own: results, gradients and second derivatives, for every kind of layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_near, draw
from jax import lax

from backdoor_jax.models.cpu_conv import FORWARD, INPUT, WEIGHT, Choice, canonical_conv, choose
from backdoor_jax.models.products import NHWC, Geometry, Pads

SAME: Pads = ((1, 1), (1, 1))
NONE: Pads = ((0, 0), (0, 0))

# Batch, size, taps, channels, stride and pads: every kind of layer of our networks, and sizes that divide nothing.
LAYERS = {
    "stem": (3, (32, 32), (3, 3), (3, 16), 1, SAME),
    "imagenet_stem": (2, (33, 32), (7, 7), (3, 8), 2, ((3, 3), (3, 3))),
    "patch_embedding": (2, (16, 16), (4, 4), (3, 8), 4, NONE),
    "narrow": (7, (16, 16), (3, 3), (16, 16), 1, SAME),
    "narrow_odd": (5, (9, 7), (3, 3), (8, 4), 1, SAME),
    "narrow_strided": (5, (16, 16), (3, 3), (8, 16), 2, SAME),
    "strided_odd": (3, (9, 7), (3, 3), (4, 8), 2, SAME),
    "strided_asymmetric": (2, (8, 9), (3, 3), (4, 4), 2, ((0, 1), (1, 0))),
    "stride_three": (2, (10, 11), (3, 3), (4, 4), 3, SAME),
    "pointwise": (3, (8, 8), (1, 1), (8, 16), 1, NONE),
    "pointwise_strided": (3, (9, 8), (1, 1), (8, 16), 2, NONE),
    "wide": (5, (8, 8), (3, 3), (64, 64), 1, SAME),
    "wide_many": (13, (16, 16), (3, 3), (64, 64), 1, SAME),
    "wide_odd": (3, (7, 5), (3, 3), (64, 72), 1, SAME),
    "wide_small": (4, (2, 2), (3, 3), (64, 64), 1, SAME),
    "wide_one": (1, (4, 4), (3, 3), (72, 64), 1, SAME),
    "wide_valid": (2, (6, 7), (3, 3), (64, 64), 1, NONE),
    "wide_strided": (3, (8, 8), (3, 3), (64, 64), 2, SAME),
}


def pair(name: str, dtype: str = "float32") -> tuple[Callable[..., Any], Callable[..., Any], Any, Any]:
    """Ours and XLA's convolution of a kind of layer, and random images and kernel."""
    batch, size, taps, channels, stride, pads = LAYERS[name]
    x, w = draw(batch, *size, channels[0]).astype(dtype), draw(*taps, *channels, seed=1).astype(dtype)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return canonical_conv(x, w, (stride, stride), pads)

    def theirs(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=NHWC)

    return ours, theirs, x, w


def everything(conv: Callable[..., Any]) -> Callable[..., Any]:
    """The result, both gradients, and the gradients of the gradients, in one program."""

    def value(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(v * jnp.tanh(conv(x, w)))

    def slopes(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        by_x, by_w = jax.grad(value, (0, 1))(x, w, v)
        return jnp.mean(by_x**2) + jnp.mean(by_w**2)

    def found(x: jax.Array, w: jax.Array, v: jax.Array) -> Any:
        return conv(x, w), jax.grad(value, (0, 1))(x, w, v), jax.grad(slopes, (0, 1))(x, w, v)

    return jax.jit(found)


@pytest.mark.parametrize("name", LAYERS)
def test_results_gradients_and_second_derivatives_are_those_of_xla_in_float64(name: str) -> None:
    with jax.enable_x64(True):
        ours, theirs, x, w = pair(name, "float64")
        v = jnp.asarray(np.random.default_rng(2).standard_normal(jax.eval_shape(theirs, x, w).shape))
        pairs = zip(*(jax.tree.leaves(everything(conv)(x, w, v)) for conv in (ours, theirs)), strict=True)
        for got, expected in pairs:
            assert got.dtype == jnp.float64
            assert_near(got, expected, 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_those_of_xla_in_float32(name: str) -> None:
    ours, theirs, x, w = pair(name)
    g = jnp.asarray(np.random.default_rng(2).standard_normal(jax.eval_shape(theirs, x, w).shape), jnp.float32)

    def with_gradients(conv: Callable[..., Any]) -> Any:
        def found(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
            out, pull = jax.vjp(conv, x, w)
            return out, *pull(g)

        return jax.jit(found)(x, w, g)

    for got, expected in zip(with_gradients(ours), with_gradients(theirs), strict=True):
        assert_near(got, expected, 1e-5)


@pytest.mark.parametrize("name", ["narrow", "narrow_strided", "pointwise", "wide"])
def test_bfloat16_and_vmap_over_weights(name: str) -> None:
    ours, theirs, x, w = pair(name, "bfloat16")
    assert ours(x, w).dtype == jnp.bfloat16
    assert_near(ours(x, w).astype(jnp.float32), theirs(x, w).astype(jnp.float32), 2e-2)
    ours, theirs, x, w = pair(name)
    two = jnp.stack([w, 2 * w])

    def slope(conv: Callable[..., Any]) -> Any:
        return jax.jit(jax.vmap(jax.grad(lambda w: jnp.sum(conv(x, w) ** 2))))(two)

    assert_near(slope(ours), slope(theirs), 1e-4)


@pytest.mark.parametrize("name", ["narrow", "wide", "pointwise", "narrow_strided"])
def test_a_value_that_is_not_finite_stays_so(name: str) -> None:
    ours, _, x, w = pair(name)
    assert not np.isfinite(np.asarray(ours(x.at[0, 3, 3, 0].set(jnp.nan), w))[0]).all()


def test_the_rule_chooses_by_shape_and_type() -> None:
    same, strided = Geometry((32, 32), (3, 3), (1, 1), SAME), Geometry((32, 32), (3, 3), (2, 2), SAME)
    assert choose(same, (64, 64), "float32") == Choice("winograd", "winograd", "winograd")
    assert choose(same, (63, 64), "float32") == Choice("dense", "dense", "shifted")
    assert choose(same, (64, 64), "bfloat16") == Choice("dense", "dense", "dense")
    assert choose(strided, (64, 64), "float32") == Choice("dense", "strided", "gathered")
    pointwise = Geometry((8, 8), (1, 1), (2, 2), NONE)
    assert choose(pointwise, (64, 64), "float32") == Choice("pointwise", "pointwise", "pointwise")
    for choice in (choose(same, (64, 64), "float32"), choose(strided, (8, 8), "float32")):
        assert choice.forward in FORWARD and choice.input_gradient in INPUT and choice.weight_gradient in WEIGHT
