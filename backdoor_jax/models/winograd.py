r"""Winograd's F(2x2, 3x3): 3x3 convolutions at stride 1 with 2.25 times fewer multiplications.

In one dimension, two outputs :math:`y_0, y_1` of three taps :math:`w` read four inputs :math:`d`, and take four
products instead of six (Lavin and Gray, 2016, arXiv 1509.09308). With :math:`\sigma = (1, -1)` and :math:`p, s \in
\{0, 1\}`

.. math::
    D_p &= (d_p - d_{p+2})\, w_{2p}, \\
    S_s &= (d_2 + \sigma_s d_1)\, (w_0 + \sigma_s w_1 + w_2) / 2, \\
    y_p &= S_0 + \sigma_p (S_1 + D_p).

In two dimensions the same is done along rows and along columns: an image falls into 4x4 tiles that overlap by two
pixels, every tile's 16 transformed pixels are multiplied by the 16 transformed taps, and the products, summed over
channels, are transformed to 2x2 outputs. The sum over channels is a matrix product, tiles by channels times input by
output channels, one for each of the 16. Written with :math:`D` and :math:`S`, they come in four groups of four, DD,
DS, SD and SS, and no array has to be put together out of parts: a group's transform is one loop over memory, and so is
that of the outputs.

The gradient by the kernel transforms images and cotangent by the transposes of these maps and multiplies over tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backdoor_jax.models.chunks import mapped, summed

Pads = tuple[tuple[int, int], tuple[int, int]]
Groups = list[jax.Array]
"""The products DD, DS, SD and SS, each ``(2, 2, ...)``."""

CHUNK_TILES = 192
"""At least as many tiles are worked on at a time: enough rows for matrix products, and few enough for the cache."""

WHOLE_BYTES = 2**23
"""Transformed tiles of this size or less are not worked on in chunks."""


def _signs(x: jax.Array, axis: int) -> jax.Array:
    """Signs 1 and -1 along an axis of length 2, to be broadcast over the others."""
    return jnp.asarray([1, -1], x.dtype).reshape(2, *(1,) * (x.ndim - 1 - axis))


def _images_along(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The two transforms of tiles along an axis of ``2 t + 2`` pixels: ``(..., 2 t + 2, ...) -> (2, ..., t, ...)``."""
    pairs = jnp.moveaxis(x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :]), axis + 1, 0)
    first = lax.slice_in_dim(pairs, 0, -1, axis=axis + 1)
    second = lax.slice_in_dim(pairs, 1, None, axis=axis + 1)
    sums = second[0] + _signs(first, 0) * first[1]
    return first - second, sums


def _kernel_along(w: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The two transforms of taps along an axis: ``(..., 3, ...) -> (2, ..., ...)``."""
    taps = jnp.moveaxis(w, axis, 0)
    return taps[::2], (taps[0] + taps[2] + _signs(taps, 0) * taps[1]) / 2


def _outputs_along(differences: jax.Array, sums: jax.Array) -> jax.Array:
    """Two outputs of each tile: ``(2, ...) -> (2, ...)``."""
    return sums[0] + _signs(differences, 0) * (sums[1] + differences)


def _cotangents_along(g: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The transpose of `_outputs_along`: ``(..., 2 t, ...) -> (2, ..., t, ...)``."""
    pairs = jnp.moveaxis(g.reshape(*g.shape[:axis], -1, 2, *g.shape[axis + 1 :]), axis + 1, 0)
    signs = _signs(pairs, 0)
    return signs * pairs, pairs[0] + signs * pairs[1]


def _taps_along(differences: jax.Array, sums: jax.Array, axis: int) -> jax.Array:
    """The transpose of `_kernel_along`: ``(2, ...) -> (..., 3, ...)``."""
    outer = differences + (sums[0] + sums[1]) / 2
    inner = (sums[0] - sums[1])[None] / 2
    return jnp.moveaxis(jnp.concatenate([outer[:1], inner, outer[1:]]), 0, axis)


def _groups(along: Any, x: jax.Array, rows: int, columns: int) -> Groups:
    """Both transforms along rows, and of each both along columns."""
    return [half for part in along(x, rows) for half in along(part, columns + 1)]


def _tiles(x: jax.Array, pads: Pads, outputs: tuple[int, int]) -> Groups:
    """The transformed 4x4 tiles of images, ``(4, tiles, I)`` each."""
    fill = [
        (low, 2 * -(-n // 2) + 2 - size - low) for (low, _), n, size in zip(pads, outputs, x.shape[1:3], strict=True)
    ]
    padded = lax.optimization_barrier(
        lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*f, 0) for f in fill), (0, 0, 0)])
    )
    return [
        group.reshape(4, -1, x.shape[3]) for group in lax.optimization_barrier(_groups(_images_along, padded, 1, 2))
    ]


def _chunk(images: int, tiles: int, channels: int) -> int:
    """Images to a chunk, of so many tiles each; wide kernels, which every chunk reads, are read less often."""
    if 16 * 4 * images * tiles * channels <= WHOLE_BYTES:
        return images
    return max(CHUNK_TILES, 3 * channels // 2) // tiles


def winograd_conv(x: jax.Array, w: jax.Array, pads: Pads) -> jax.Array:
    """Convolves images ``(B, H, W, I)`` with a kernel ``(3, 3, I, O)`` at stride 1."""
    height, width = (size + sum(pad) - 2 for size, pad in zip(x.shape[1:3], pads, strict=True))
    rows, columns, features = -(-height // 2), -(-width // 2), w.shape[3]
    kernels = lax.optimization_barrier(_groups(_kernel_along, w, 0, 0))
    kernels = [kernel.reshape(4, *w.shape[2:]) for kernel in kernels]

    def convolve(x: jax.Array) -> jax.Array:
        tiles = _tiles(x, pads, (height, width))
        dots = [lax.dot_general(v, u, (((2,), (1,)), ((0,), (0,)))) for v, u in zip(tiles, kernels, strict=True)]
        dots = lax.optimization_barrier(dots)
        products = [m.reshape(2, 2, len(x), rows, columns, features) for m in dots]
        dd, ds, sd, ss = products
        y = _outputs_along(jnp.moveaxis(_outputs_along(dd, ds), 1, 0), jnp.moveaxis(_outputs_along(sd, ss), 1, 0))
        # (row, column, B, rows, columns, O) to images.
        y = y.transpose(2, 3, 0, 4, 1, 5).reshape(len(x), 2 * rows, 2 * columns, features)
        return lax.optimization_barrier(y[:, :height, :width])

    return mapped(convolve, x, _chunk(len(x), rows * columns, x.shape[3]))


def winograd_weight_gradient(x: jax.Array, g: jax.Array, pads: Pads) -> jax.Array:
    """The gradient ``(3, 3, I, O)`` by the kernel of `winograd_conv`, of images and cotangents ``(B, H', W', O)``."""
    height, width = g.shape[1:3]
    rows, columns = -(-height // 2), -(-width // 2)

    def products(x: jax.Array, g: jax.Array) -> Groups:
        tiles = _tiles(x, pads, (height, width))
        odd = ((0, 0), (0, 2 * rows - height), (0, 2 * columns - width), (0, 0))
        g = jnp.pad(g, odd)
        cotangents = lax.optimization_barrier(_groups(_cotangents_along, g, 1, 2))
        pairs = [(v, c.reshape(4, -1, g.shape[3])) for v, c in zip(tiles, cotangents, strict=True)]
        return [lax.dot_general(v, c, (((1,), (1,)), ((0,), (0,)))) for v, c in pairs]

    totals = lax.optimization_barrier(summed(products, x, g, _chunk(len(x), rows * columns, x.shape[3])))
    dd, ds, sd, ss = [m.reshape(2, 2, x.shape[3], g.shape[3]) for m in totals]
    return _taps_along(_taps_along(dd, ds, 1), _taps_along(sd, ss, 1), 0)
