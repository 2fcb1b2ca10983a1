r"""Convolutions that are fast on the CPU backend: for each shape the fastest of several algorithms.

On CPU, XLA runs a convolution on its fast path only where the layout is canonical (NHWC images, HWIO kernels). The two
convolutions that automatic differentiation makes are not, and inside a loop nothing moves them there: a training step
is then about 40 times slower than the same step dispatched from Python (jax-ml/jax issue 12868). Here a convolution and
its two gradients are three functions,

.. math::
    y = C(x, w), \qquad \bar x = X(g, w), \qquad \bar w = W(x, g),

of one trilinear form :math:`\langle C(x, w), g \rangle = \langle x, X(g, w) \rangle = \langle w, W(x, g) \rangle`.
The gradients of each are the two others, so that derivatives of any order, in reverse mode, are these three again.
Each is computed by the fastest of several algorithms; `choose` says by which. Other backends, and convolutions with
groups or dilations, use XLA's own.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from backdoor_jax.models import products
from backdoor_jax.models.chunks import cores
from backdoor_jax.models.products import NHWC, Geometry, Pads
from backdoor_jax.models.winograd import winograd_conv, winograd_weight_gradient

WIDE, WIDE_ON_ONE_CORE = 128, 64
"""Channels from which Winograd's transforms are repaid by its smaller products: those are not divided over cores."""


SMALL = 2**23
"""Multiplications below which a layer is left to dense convolutions: what it gains would not repay its compilation."""


class Choice(NamedTuple):
    """Names of the algorithms of a convolution and of its gradients, in `FORWARD`, `INPUT` and `WEIGHT`."""

    forward: str
    input_gradient: str
    weight_gradient: str


def choose(geometry: Geometry, batch: int, channels: tuple[int, int], dtype: jax.typing.DTypeLike) -> Choice:
    """The algorithms for a convolution of so many images, with these numbers of input and output channels.

    Types narrower than float32 are left to dense convolutions, which add up in float32. The choice depends on the
    number of cores, and so does the rounding, as it does in XLA's own convolutions. A batch of symbolic size, as
    `jax.export` has it, takes dense convolutions.

    Example:
        >>> choose(Geometry((32, 32), (3, 3), (1, 1), ((1, 1), (1, 1))), 200, (128, 128), "float32")
        Choice(forward='winograd', input_gradient='winograd', weight_gradient='winograd')
        >>> choose(Geometry((32, 32), (3, 3), (2, 2), ((1, 1), (1, 1))), 200, (16, 32), "float32")
        Choice(forward='dense', input_gradient='strided', weight_gradient='gathered')
    """
    dense = geometry.strides == (1, 1)
    input_gradient = "dense" if dense else "strided"
    if not isinstance(batch, int):
        return Choice("dense", input_gradient, "dense")
    if geometry.taps == (1, 1) and geometry.pads == ((0, 0), (0, 0)):
        return Choice("pointwise", "pointwise", "pointwise")
    if jnp.finfo(dtype).bits < 32 or batch * math.prod((*geometry.outputs, *geometry.taps, *channels)) < SMALL:
        return Choice("dense", input_gradient, "dense")
    wide = WIDE if cores() > 1 else WIDE_ON_ONE_CORE
    if dense and geometry.taps == (3, 3) and min(channels) >= wide:
        return Choice("winograd", "winograd", "winograd")
    return Choice("dense", input_gradient, "shifted" if dense else "gathered")


def _dense_conv(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    return products.dense(x, w, geometry.strides, geometry.pads)


def _winograd_conv(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    return winograd_conv(x, w, geometry.pads)


def _winograd_input_gradient(g: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    return winograd_conv(g, products.flipped(w), geometry.transposed_pads)


def _winograd_weight_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    return winograd_weight_gradient(x, g, geometry.pads)


Algorithm = Callable[[jax.Array, jax.Array, Geometry], jax.Array]

FORWARD: dict[str, Algorithm] = {
    "dense": _dense_conv,
    "pointwise": products.pointwise_conv,
    "winograd": _winograd_conv,
}
INPUT: dict[str, Algorithm] = {
    "dense": products.dense_input_gradient,
    "pointwise": products.pointwise_input_gradient,
    "strided": products.strided_input_gradient,
    "winograd": _winograd_input_gradient,
}
WEIGHT: dict[str, Algorithm] = {
    "dense": products.dense_weight_gradient,
    "pointwise": products.pointwise_weight_gradient,
    "shifted": products.shifted_weight_gradient,
    "gathered": products.gathered_weight_gradient,
    "winograd": _winograd_weight_gradient,
}


@partial(jax.jit, static_argnames=("algorithm", "geometry"))
def _shared(algorithm: Algorithm, first: jax.Array, second: jax.Array, geometry: Geometry) -> jax.Array:
    """``algorithm(first, second, geometry)``, traced once for all layers of a shape."""
    return algorithm(first, second, geometry)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """``C(x, w)``: images ``(B, H, W, I)`` and kernel ``(h, w, I, O)`` to ``(B, H', W', O)``."""
    chosen = choose(geometry, x.shape[0], (w.shape[2], w.shape[3]), x.dtype)
    return _shared(FORWARD[chosen.forward], x, w, geometry)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient(g: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """``X(g, w)``: cotangent ``(B, H', W', O)`` and kernel to ``(B, H, W, I)``."""
    chosen = choose(geometry, g.shape[0], (w.shape[2], w.shape[3]), g.dtype)
    return _shared(INPUT[chosen.input_gradient], g, w, geometry)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weight_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """``W(x, g)``: images and cotangent to ``(h, w, I, O)``."""
    chosen = choose(geometry, x.shape[0], (x.shape[3], g.shape[3]), x.dtype)
    return _shared(WEIGHT[chosen.weight_gradient], x, g, geometry)


Arrays = tuple[jax.Array, jax.Array]


def _with_arguments(function: Any) -> Callable[..., Any]:
    """The rule for going forward: the result, and the arguments, which are all that its gradients need."""

    def forward(first: jax.Array, second: jax.Array, geometry: Geometry) -> tuple[jax.Array, Arrays]:
        return function(first, second, geometry), (first, second)

    return forward


def _convolve_backward(geometry: Geometry, arguments: Arrays, g: jax.Array) -> Arrays:
    x, w = arguments
    # Fused with what made its argument, a transposition walks memory 10 times slower than as a copy of its own.
    x, g = lax.optimization_barrier((x, g))
    return _input_gradient(g, w, geometry), _weight_gradient(x, g, geometry)


def _input_gradient_backward(geometry: Geometry, arguments: Arrays, x: jax.Array) -> Arrays:
    g, w = arguments
    x, g = lax.optimization_barrier((x, g))
    return _convolve(x, w, geometry), _weight_gradient(x, g, geometry)


def _weight_gradient_backward(geometry: Geometry, arguments: Arrays, w: jax.Array) -> Arrays:
    x, g = arguments
    return _input_gradient(g, w, geometry), _convolve(x, w, geometry)


_convolve.defvjp(_with_arguments(_convolve), _convolve_backward)
_input_gradient.defvjp(_with_arguments(_input_gradient), _input_gradient_backward)
_weight_gradient.defvjp(_with_arguments(_weight_gradient), _weight_gradient_backward)


def canonical_conv(x: jax.Array, w: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    """Convolves NHWC images with an HWIO kernel by the algorithms that are fast on a CPU, and so its gradients.

    Args:
        x: images, ``(B, H, W, I)``.
        w: kernel, ``(h, w, I, O)``.
        strides: steps along height and width.
        pads: zeros before and after, along height and width.

    Returns:
        ``(B, H', W', O)``.

    Example:
        >>> x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
        >>> canonical_conv(x, w, (1, 1), ((1, 1), (1, 1)))[0, :, :, 0].astype(int).tolist()
        [[8, 12, 12, 8], [12, 18, 18, 12], [12, 18, 18, 12], [8, 12, 12, 8]]
    """
    (_, *size, _), (*taps, _, _) = x.shape, w.shape
    return _convolve(x, w, Geometry((size[0], size[1]), (taps[0], taps[1]), strides, pads))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    batch_group_count: int = 1,
    **kwargs: Any,
) -> jax.Array:
    """A drop-in for ``flax.linen.Conv(conv_general_dilated=...)``: canonical on CPU, XLA's own elsewhere.

    Arguments are those of `jax.lax.conv_general_dilated`, whose meaning they keep. The canonical one has no
    forward-mode derivative (`jax.jvp`).

    Example:
        >>> import flax.linen as nn
        >>> layer = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 3)))[0].shape
        (1, 8, 8, 4)
    """

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            batch_group_count=batch_group_count,
            **kwargs,
        )

    layouts = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    canonical = layouts == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if (
        lhs.ndim != 4
        or not canonical
        or dilated
        or feature_group_count != 1
        or batch_group_count != 1
        or any(kwargs.values())
    ):
        return plain(lhs, rhs)
    strides = (window_strides[0], window_strides[1])
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    pads: Pads = tuple((int(low), int(high)) for low, high in padding)  # type: ignore[assignment]
    return lax.platform_dependent(lhs, rhs, cpu=lambda x, w: canonical_conv(x, w, strides, pads), default=plain)
