r"""Convolutions and their gradients as matrix products and dense convolutions.

Notation: images :math:`x` of ``(B, H, W, I)``, kernel :math:`w` of ``(h, w, I, O)``, stride :math:`s`, :math:`l` zeros
before the first pixel. Along one axis, and the same along the other,

.. math::
    y_a = \sum_i x_{s a + i - l}\, w_i, \qquad
    \bar x_n = \sum_{s a + i - l = n} g_a\, w_i, \qquad
    \bar w_i = \sum_a x_{s a + i - l}\, g_a .
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from backdoor_jax.models.chunks import cores, summed

Pads = tuple[tuple[int, int], tuple[int, int]]
Pair = tuple[int, int]
NHWC = ("NHWC", "HWIO", "NHWC")

CHUNK_BYTES = 2**20
"""Size, for each core, of a chunk's windows: small enough for its cache, and a product large enough to be divided."""


class Geometry(NamedTuple):
    """A convolution without its arrays.

    Attributes:
        size: height and width of the images.
        taps: height and width of the kernel.
        strides: steps along height and width.
        pads: zeros before and after, along height and width.
    """

    size: Pair
    taps: Pair
    strides: Pair
    pads: Pads

    @property
    def outputs(self) -> Pair:
        """Height and width of the result."""
        axes = zip(self.size, self.taps, self.strides, self.pads, strict=True)
        height, width = ((size + sum(pads) - taps) // stride + 1 for size, taps, stride, pads in axes)
        return height, width

    @property
    def transposed_pads(self) -> Pads:
        """Pads with which, at stride 1, a convolution of the cotangent with the flipped kernel gives the images'."""
        rows, columns = (
            (taps - 1 - low, taps - 1 - high) for taps, (low, high) in zip(self.taps, self.pads, strict=True)
        )
        return rows, columns


def dense(x: jax.Array, w: jax.Array, strides: Pair, pads: Pads, rhs_dilation: Pair = (1, 1)) -> jax.Array:
    """XLA's convolution in the one layout in which it is fast on a CPU."""
    return lax.conv_general_dilated(x, w, strides, pads, rhs_dilation=rhs_dilation, dimension_numbers=NHWC)


def pointwise_conv(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """A 1x1 convolution without padding: every ``s``-th pixel times the kernel."""
    down, across = geometry.strides
    return x[:, ::down, ::across] @ w[0, 0]


def pointwise_input_gradient(g: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient of `pointwise_conv` by its images: the cotangent times the kernel, with zeros in between."""
    axes = zip(geometry.size, geometry.strides, g.shape[1:3], strict=True)
    rows, columns = ((0, size - 1 - stride * (steps - 1), stride - 1) for size, stride, steps in axes)
    return lax.pad(g @ w[0, 0].T, jnp.zeros((), g.dtype), [(0, 0, 0), rows, columns, (0, 0, 0)])


def _over_pixels(x: jax.Array, g: jax.Array) -> jax.Array:
    """Products of channels, summed over images and pixels: ``(..., I), (..., O) -> (I, O)``."""
    return lax.dot_general(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), (((0,), (0,)), ((), ())))


def pointwise_weight_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient of `pointwise_conv` by its kernel: one product."""
    down, across = geometry.strides
    return _over_pixels(x[:, ::down, ::across], g)[None, None]


def strided_input_gradient(g: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    r"""The gradient by the images of a convolution with strides, as one dense convolution.

    A convolution with the flipped kernel of the cotangent with :math:`s - 1` zeros between its pixels would multiply
    mostly zeros. Instead let :math:`n = s b + p` with :math:`0 \le p < s`, and :math:`a = b + d`. Then

    .. math::
        \bar x_{s b + p} = \sum_d g_{b + d}\, w_{p + l - s d}, \qquad
        -\lfloor (h - 1 - l) / s \rfloor \le d \le \lfloor (l + s - 1) / s \rfloor,

    where taps outside the kernel are zero: at stride 1 a convolution from ``O`` to ``s s I`` channels, which are then
    put side by side as pixels.
    """
    kernel_pads, pads, blocks = [], [], []
    for size, taps, stride, (low, _), steps in zip(
        geometry.size, geometry.taps, geometry.strides, geometry.pads, g.shape[1:3], strict=True
    ):
        first, last = -((taps - 1 - low) // stride), (low + stride - 1) // stride
        length = last - first + 1
        before = stride * last - low
        kernel_pads.append((before, stride * length - taps - before, 0))
        blocks.append((length, stride, -(-size // stride)))
        pads.append((-first, blocks[-1][2] + last - steps))
    (height, down, rows), (width, across, columns) = blocks
    _, _, features, outputs = w.shape
    kernel = lax.pad(w, jnp.zeros((), w.dtype), [*kernel_pads, (0, 0, 0), (0, 0, 0)])
    kernel = kernel.reshape(height, down, width, across, features, outputs)[::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(height, width, outputs, -1)
    x = dense(g, kernel, (1, 1), (pads[0], pads[1])).reshape(-1, rows, columns, down, across, features)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * down, columns * across, features)
    return x[:, : geometry.size[0], : geometry.size[1]]


def _chunk(x: jax.Array, copies: int) -> int:
    """Images to a chunk whose windows are ``copies`` times as large as the images."""
    return cores() * CHUNK_BYTES // (copies * x[0].size * x.dtype.itemsize)


def _windows(x: jax.Array, offsets: Sequence[tuple[int, ...]], sizes: tuple[int, ...]) -> jax.Array:
    """Windows of one size at several offsets, side by side as channels."""
    ends = [[at + size for at, size in zip(offset, sizes, strict=True)] for offset in offsets]
    windows = [lax.slice(x, offset, end) for offset, end in zip(offsets, ends, strict=True)]
    # Stacked before the channels rather than joined along them: whole rows of channels are copied at a time.
    return lax.optimization_barrier(jnp.stack(windows, -2)).reshape(*sizes[:-1], -1)


def _padded(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    """Images with zeros around them (or without pixels, where negative), in memory of their own."""
    return lax.optimization_barrier(
        lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)])
    )


def shifted_weight_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient by the kernel at stride 1, as one product of the images and the cotangent, both shifted.

    Images shifted along width by every tap, side by side as channels, times the cotangent shifted along height by every
    tap, side by side as well: ``(w I, h O)``, all of which is the gradient. So matrices are wide where channels are
    few, and images are copied ``w`` times instead of ``h w`` times.
    """
    height, width = geometry.taps
    rows, columns = g.shape[1:3]

    def product(x: jax.Array, g: jax.Array) -> jax.Array:
        x, g = _padded(x, *geometry.pads), _padded(g, (height - 1, height - 1), (0, 0))
        tall = rows + height - 1
        right = [(0, 0, j, 0) for j in range(width)]
        down = [(0, height - 1 - i, 0, 0) for i in range(height)]
        return _over_pixels(
            _windows(x, right, (len(x), tall, columns, x.shape[3])), _windows(g, down, (len(g), tall, *g.shape[2:]))
        )

    total = summed(product, x, g, _chunk(x, width))
    return total.reshape(width, x.shape[3], height, g.shape[3]).transpose(2, 0, 1, 3)


def gathered_weight_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient by the kernel, as one product of the pixels under each tap, side by side, and the cotangent.

    Along an axis, tap ``i = s m + r`` reads every ``s``-th pixel from ``i`` on: in images cut into blocks of ``s``
    pixels, pixel ``r`` of the blocks from ``m`` on.
    """
    (down, across), (height, width) = geometry.strides, geometry.taps
    rows, columns = g.shape[1:3]
    blocks = rows + (height - 1) // down, columns + (width - 1) // across
    (top, _), (left, _) = geometry.pads

    def product(x: jax.Array, g: jax.Array) -> jax.Array:
        images, tall, broad, channels = x.shape
        x = _padded(x, (top, blocks[0] * down - tall - top), (left, blocks[1] * across - broad - left))
        x = x.reshape(images, blocks[0], down, blocks[1], across, channels)
        taps = [(0, i // down, i % down, j // across, j % across, 0) for i in range(height) for j in range(width)]
        return _over_pixels(_windows(x, taps, (images, rows, 1, columns, 1, channels)), g)

    copies = -(-height * width // (down * across))
    return summed(product, x, g, _chunk(x, copies)).reshape(*geometry.taps, x.shape[3], g.shape[3])


def dense_input_gradient(g: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient by the images at stride 1: a convolution with the flipped kernel, its channels exchanged."""
    return dense(g, flipped(w), (1, 1), geometry.transposed_pads)


def flipped(w: jax.Array) -> jax.Array:
    """The kernel with its taps reversed and its channels exchanged."""
    return w[::-1, ::-1].transpose(0, 1, 3, 2)


def dense_weight_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient by the kernel as one convolution: ``(I, H, W, B)`` with ``(H', W', B, O)``."""
    axes = zip(geometry.size, geometry.taps, geometry.strides, geometry.pads, g.shape[1:3], strict=True)
    rows, columns = ((low, taps + stride * (steps - 1) - size - low) for size, taps, stride, (low, _), steps in axes)
    turned = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    return dense(*turned, (1, 1), (rows, columns), rhs_dilation=geometry.strides).transpose(1, 2, 0, 3)
