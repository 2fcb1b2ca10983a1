"""Convolutions on CPU against XLA's own: results, gradients and second derivatives, for every kind of layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_near, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from backdoor_jax.models import conv, products, winograd
from backdoor_jax.models.conv import FORWARD, INPUT, WEIGHT, Choice, canonical_conv, choose, conv_general_dilated
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


@pytest.fixture(autouse=True)
def large_layers_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers here are small; they are computed as large ones are, in several chunks."""
    monkeypatch.setattr(conv, "SMALL", 0)
    monkeypatch.setattr(products, "CHUNK_BYTES", 2**17)
    monkeypatch.setattr(winograd, "WHOLE_BYTES", 0)
    monkeypatch.setattr(conv, "cores", lambda: 1)


def pair(name: str, dtype: str = "float32") -> tuple[Callable[..., Any], Callable[..., Any], Any, Any]:
    """Ours and XLA's convolution of a kind of layer, and random images and kernel."""
    batch, size, taps, channels, stride, pads = LAYERS[name]
    x, w = draw(batch, *size, channels[0]).astype(dtype), draw(*taps, *channels, seed=1).astype(dtype)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return canonical_conv(x, w, (stride, stride), pads)

    def theirs(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=NHWC)

    return ours, theirs, x, w


def with_gradients(function: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    """Value, and the gradients of a random weighting of it."""

    @jax.jit
    def both(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(function, x, w)
        return out, *pull(draw(*out.shape, seed=9))

    return both(x, w)


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
    for got, expected in zip(with_gradients(ours, x, w), with_gradients(theirs, x, w), strict=True):
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


@pytest.mark.parametrize("count", [1, 2])
def test_the_rule_chooses_by_shape_and_type(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(conv, "cores", lambda: count)
    same, strided = Geometry((32, 32), (3, 3), (1, 1), SAME), Geometry((32, 32), (3, 3), (2, 2), SAME)
    wide = 64 if count == 1 else 128
    assert choose(same, 200, (wide, wide), "float32") == Choice("winograd", "winograd", "winograd")
    assert choose(same, 200, (wide - 1, wide), "float32") == Choice("dense", "dense", "shifted")
    assert choose(same, 200, (wide, wide), "bfloat16") == Choice("dense", "dense", "dense")
    assert choose(strided, 200, (64, 64), "float32") == Choice("dense", "strided", "gathered")
    pointwise = Geometry((8, 8), (1, 1), (2, 2), NONE)
    assert choose(pointwise, 200, (64, 64), "float32") == Choice("pointwise", "pointwise", "pointwise")
    # 32 * 32 outputs of 9 taps and 16 * 16 channels, 2,359,296 multiplications an image, in all just above 2**25.
    monkeypatch.setattr(conv, "SMALL", 2**25)
    assert choose(same, 15, (16, 16), "float32") == Choice("dense", "dense", "shifted")
    assert choose(same, 14, (16, 16), "float32") == Choice("dense", "dense", "dense")
    for choice in (choose(same, 200, (64, 64), "float32"), choose(strided, 200, (16, 16), "float32")):
        assert choice.forward in FORWARD and choice.input_gradient in INPUT and choice.weight_gradient in WEIGHT


@settings(max_examples=6)
@given(
    sizes=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_value_and_gradients_equal_xlas_for_any_geometry(
    sizes: tuple[int, int],
    taps: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[tuple[int, int], tuple[int, int]],
    channels: tuple[int, int],
) -> None:
    x, w = draw(2, *sizes, channels[0]), draw(*taps, *channels)
    ours = with_gradients(lambda x, w: canonical_conv(x, w, strides, pads), x, w)
    theirs = with_gradients(lambda x, w: lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=NHWC), x, w)
    jax.tree.map(assert_near, ours, theirs)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_inside_a_scan_equal_those_of_a_loop(stride: int) -> None:
    xs, w = draw(3, 2, 5, 6, 2), draw(3, 3, 2, 2)
    pads = [(1, 1), (1, 1)]

    def scanned(xs: jax.Array, w: jax.Array) -> jax.Array:
        def body(total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=NHWC)
            return total + jnp.sum(out**2), out

        total, outs = lax.scan(body, jnp.zeros(()), xs)
        return total * jnp.tanh(outs)

    def looped(xs: jax.Array, w: jax.Array) -> jax.Array:
        outs = [lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=NHWC) for x in xs]
        return sum(jnp.sum(out**2) for out in outs) * jnp.tanh(jnp.stack(outs))

    jax.tree.map(assert_near, with_gradients(scanned, xs, w), with_gradients(looped, xs, w))


@pytest.mark.parametrize(
    ("kernel", "padding", "options"),
    [
        ((3, 3, 2, 4), "SAME", {"feature_group_count": 2}),
        ((3, 3, 4, 4), "SAME", {"batch_group_count": 2}),
        ((3, 3, 4, 2), "SAME", {"rhs_dilation": (2, 2)}),
        ((3, 3, 4, 2), [(1, 0), (2, 1)], {"rhs_dilation": (1, 2)}),
        ((3, 3, 4, 2), [(1, 0), (2, 1)], {"lhs_dilation": (2, 1)}),
    ],
)
def test_groups_and_dilations_fall_back_to_xla(kernel: tuple[int, ...], padding: Any, options: dict[str, Any]) -> None:
    x, w = draw(4, 6, 5, 4), draw(*kernel)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=NHWC, **options)

    def theirs(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=NHWC, **options)

    jax.tree.map(assert_near, with_gradients(ours, x, w), with_gradients(theirs, x, w))
    assert "custom_vjp" not in str(jax.make_jaxpr(ours)(x, w))


def test_the_preferred_element_type_is_kept() -> None:
    x, w = draw(2, 5, 5, 3).astype(jnp.bfloat16), draw(3, 3, 3, 4).astype(jnp.bfloat16)
    options = {"dimension_numbers": NHWC, "preferred_element_type": jnp.float32}
    got = conv_general_dilated(x, w, (1, 1), "SAME", **options)
    assert got.dtype == jnp.float32
    assert_near(got, lax.conv_general_dilated(x, w, (1, 1), "SAME", **options))


def test_other_layouts_fall_back_to_xla() -> None:
    x, w = draw(2, 3, 6, 5), draw(4, 3, 3, 3)
    ours = with_gradients(lambda x, w: conv_general_dilated(x, w, (2, 1), "SAME"), x, w)
    theirs = with_gradients(lambda x, w: lax.conv_general_dilated(x, w, (2, 1), "SAME"), x, w)
    jax.tree.map(assert_near, ours, theirs)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "SAME_LOWER"])
def test_named_padding_is_canonical_and_equals_xlas(padding: str) -> None:
    x, w = draw(2, 6, 5, 3), draw(3, 2, 3, 4)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv_general_dilated(x, w, (2, 1), padding, dimension_numbers=NHWC)

    assert "custom_vjp" in str(jax.make_jaxpr(ours)(x, w))
    theirs = with_gradients(lambda x, w: lax.conv_general_dilated(x, w, (2, 1), padding, dimension_numbers=NHWC), x, w)
    jax.tree.map(assert_near, with_gradients(ours, x, w), theirs)


def test_a_batch_of_unknown_size_can_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "SMALL", 2**25)
    w = draw(3, 3, 4, 4)

    def run(x: jax.Array) -> jax.Array:
        return conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)

    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((batch, 6, 5, 4), jnp.float32))
    x = draw(3, 6, 5, 4)
    assert_near(exported.call(x), run(x))
