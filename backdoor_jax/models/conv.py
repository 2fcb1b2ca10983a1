r"""A convolution whose gradients stay fast inside ``lax.scan`` on the CPU backend.

On CPU, XLA runs a convolution on its fast path only where the layout is canonical (NHWC images, HWIO kernels). The two
convolutions that automatic differentiation makes are not, and inside a loop nothing moves them there: a training step
is then about 40 times slower than the same step dispatched from Python (jax-ml/jax issue 12868). Here the gradients are
written as canonical convolutions themselves. With stride :math:`s`, kernel :math:`w` and cotangent :math:`g`

.. math::
    \bar x = \mathrm{pad}_s(g) * \mathrm{flip}(w)^{\top_{IO}}, \qquad
    \bar w = x^{(I,H,W,B)} *_{\mathrm{dilation}\,s} g^{(H,W,B,O)} .

These are differentiated in the same way where they are not dilated, for second derivatives in reverse mode. Other
backends, and convolutions with groups or dilations, use XLA's own gradients.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
NHWC = ("NHWC", "HWIO", "NHWC")


def _convolve(x: jax.Array, w: jax.Array, strides: tuple[int, int], pads: Pads, **kwargs: Any) -> jax.Array:
    return lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=NHWC, **kwargs)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def canonical_conv(x: jax.Array, w: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    """Convolves NHWC images with an HWIO kernel; both gradients are canonical convolutions as well.

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
    return _convolve(x, w, strides, pads)


def _forward(
    x: jax.Array, w: jax.Array, strides: tuple[int, int], pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, w, strides, pads), (x, w)


def _backward(
    strides: tuple[int, int], pads: Pads, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    # Fused with what made its argument, a transposition walks memory 10 times slower than as a copy of its own.
    x, g = lax.optimization_barrier((x, g))
    # Rows and columns past the last whole stride do not reach the output: the far pads are what makes sizes agree.
    image_pads, kernel_pads = [], []
    for axis in (0, 1):
        low, _ = pads[axis]
        size, taps, steps = x.shape[1 + axis], w.shape[axis], g.shape[1 + axis]
        spread = (steps - 1) * strides[axis] + 1
        before = taps - 1 - low
        image_pads.append((before, size + taps - 1 - spread - before))
        kernel_pads.append((low, taps - 1 + spread - size - low))

    interior = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)])
    flipped = w[::-1, ::-1].transpose(0, 1, 3, 2)
    x_bar = canonical_conv(interior, flipped, (1, 1), tuple(image_pads))
    turned = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    if strides == (1, 1):
        w_bar = canonical_conv(*turned, (1, 1), tuple(kernel_pads))
    else:
        w_bar = _convolve(*turned, (1, 1), tuple(kernel_pads), rhs_dilation=strides)  # type: ignore[arg-type]
    return x_bar, w_bar.transpose(1, 2, 0, 3)


canonical_conv.defvjp(_forward, _backward)


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
