"""Pooling, interpolation, and what else moves pixels."""

from collections.abc import Callable, Sequence
from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax import lax

from backdoor_jax.models.layers import adaptive_windows
from backdoor_jax.models.torch_module.operators.registry import Array, Axes, pair, register


def _outputs(n: int, size: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows PyTorch lays along an axis of length n."""
    room = n + 2 * padding - dilation * (size - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= n + padding else count


def _pool(
    x: Array,
    combine: Callable[[Array, Array], Array],
    fill: float,
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Array:
    """Windows of maps ``(B, H, W, C)``, or of more or fewer axes, combined along one after the other by slices.

    Their gradient on a CPU is faster than that of XLA's windows; see `backdoor_jax.models.layers.max_pool`.
    """
    for axis, (size, stride, pad, step) in enumerate(zip(sizes, strides, padding, dilation, strict=True), 1):
        n = x.shape[axis]
        count = _outputs(n, size, stride, pad, step, ceil_mode)
        last = (count - 1) * stride + 1
        over = max(0, last + step * (size - 1) - n - pad)
        pads = [(pad, over) if at == axis else (0, 0) for at in range(x.ndim)]
        x = jnp.pad(x, pads, constant_values=fill)
        x = reduce(combine, [lax.slice_in_dim(x, at, at + last, stride, axis) for at in range(0, size * step, step)])
    return x


def _larger(x: Array, y: Array) -> Array:
    """The larger of two values, or NaN; the full gradient goes to the one that was chosen."""
    return jnp.where((y > x) | jnp.isnan(y), y, x)


@register("max_pool2d", layout="maps")
def _max_pool2d(
    self: Array,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Array:
    sizes = pair(kernel_size)
    strides = pair(stride) if stride else sizes
    return _pool(self, _larger, -jnp.inf, sizes, strides, pair(padding), pair(dilation), ceil_mode)


@register("avg_pool2d", layout="maps")
def _avg_pool2d(
    self: Array,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    sizes, pads = pair(kernel_size), pair(padding)
    strides = pair(stride) if stride else sizes
    return _average(self, sizes, strides, pads, ceil_mode, count_include_pad, divisor_override)


def _average(
    x: Array,
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None = None,
) -> Array:
    """Means of windows of maps with channels last."""
    total = _pool(x, jnp.add, 0, sizes, strides, padding, (1,) * len(sizes), ceil_mode)
    if divisor is not None:
        return total / divisor

    def counts(n: int, size: int, stride: int, pad: int) -> np.ndarray:
        start = np.arange(_outputs(n, size, stride, pad, 1, ceil_mode)) * stride - pad
        end = np.minimum(start + size, n + pad)
        return end - start if count_include_pad else np.minimum(end, n) - np.maximum(start, 0)

    along = [counts(*axis) for axis in zip(x.shape[1:-1], sizes, strides, padding, strict=True)]
    return total / jnp.asarray(reduce(np.multiply.outer, along)[..., None], total.dtype)


@register("avg_pool3d")
def _avg_pool3d(
    self: Array,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    sizes, strides, pads = ([*each] * (3 // len(each)) for each in (kernel_size, stride or kernel_size, padding))
    out = _average(jnp.moveaxis(self, 1, -1), sizes, strides, pads, ceil_mode, count_include_pad, divisor_override)
    return jnp.moveaxis(out, -1, 1)


@register("avg_pool1d")
def _avg_pool1d(
    self: Array,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Array:
    out = _average(self.mT, kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad)
    return out.mT


@register("max_pool1d")
def _max_pool1d(
    self: Array,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Array:
    return _pool(self.mT, _larger, -jnp.inf, kernel_size, stride or kernel_size, padding, dilation, ceil_mode).mT


@register("adaptive_avg_pool1d")
def _adaptive_avg_pool1d(self: Array, output_size: Sequence[int]) -> Array:
    inside = adaptive_windows(self.shape[-1], output_size[0])
    return self @ jnp.asarray((inside / inside.sum(1, keepdims=True)).T, self.dtype)


@register("adaptive_max_pool1d")
def _adaptive_max_pool1d(self: Array, output_size: Sequence[int]) -> tuple[Array, None]:
    inside = adaptive_windows(self.shape[-1], output_size[0])
    return jnp.stack([self[..., np.flatnonzero(row)].max(-1) for row in inside], -1), None


@register("im2col")
def _im2col(
    self: Array, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Array:
    (height, width), (rows, columns), (down, across) = pair(kernel_size), pair(dilation), pair(stride)
    x = jnp.pad(self, ((0, 0), (0, 0), *((p, p) for p in pair(padding))))
    ends = [n - step * (size - 1) for n, step, size in zip(x.shape[2:], (rows, columns), (height, width), strict=True)]
    parts = [
        x[:, :, i * rows : i * rows + ends[0] : down, j * columns : j * columns + ends[1] : across]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.stack(parts, 2).reshape(len(x), self.shape[1] * len(parts), -1)


def _along_axes(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Maps ``(B, H, W, C)`` with one matrix applied along the height and one along the width."""
    matrices = (jnp.asarray(matrix, x.dtype) for matrix in (rows, columns))
    return jnp.einsum("bhwc,ih,jw->bijc", x, *matrices)


@register("adaptive_avg_pool2d", "_adaptive_avg_pool2d", layout="maps")
def _adaptive_avg_pool2d(self: Array, output_size: Sequence[int]) -> Array:
    sizes = self.shape[1:3]
    out = tuple(n if size is None else size for n, size in zip(sizes, pair(output_size), strict=True))
    if out == (1, 1):
        return jnp.mean(self, (1, 2), keepdims=True)
    if out == sizes:
        return self
    windows = [adaptive_windows(n, size) for n, size in zip(sizes, out, strict=True)]
    return _along_axes(self, *(inside / inside.sum(1, keepdims=True) for inside in windows))


@register("adaptive_max_pool2d", layout="maps")
def _adaptive_max_pool2d(self: Array, output_size: Sequence[int]) -> tuple[Array, None]:
    for axis, out in enumerate(pair(output_size), 1):
        inside = adaptive_windows(self.shape[axis], out)
        parts = [jnp.take(self, np.flatnonzero(row), axis).max(axis, keepdims=True) for row in inside]
        self = jnp.concatenate(parts, axis)
    return self, None


def _sizes(x: Array, size: Sequence[int] | None, factors: Sequence[float] | None) -> list[tuple[int, int, float]]:
    """Length, new length and step between samples along height and width."""
    lengths = x.shape[1:3]
    if size is not None:
        return [(n, out, n / out) for n, out in zip(lengths, size, strict=True)]
    return [(n, int(n * factor), 1 / factor) for n, factor in zip(lengths, factors or (), strict=True)]


def _register_nearest(name: str, center: float) -> None:
    @register(name, layout="maps")
    def nearest(
        input: Array, output_size: Sequence[int] | None = None, scale_factors: Sequence[float] | None = None
    ) -> Array:
        for axis, (n, out, step) in enumerate(_sizes(input, output_size, scale_factors), 1):
            places = np.floor((np.arange(out) + center) * step).astype(int)
            input = jnp.take(input, np.minimum(places, n - 1), axis)
        return input


_register_nearest("upsample_nearest2d", 0)
_register_nearest("_upsample_nearest_exact2d", 0.5)


def _sampling(n: int, out: int, step: float, align_corners: bool, cubic: bool) -> np.ndarray:
    """The matrix ``(out, n)`` of linear or cubic interpolation along an axis."""
    at = np.arange(out)
    if align_corners:
        place = at * ((n - 1) / (out - 1)) if out > 1 else np.zeros(1)
    else:
        place = (at + 0.5) * step - 0.5
        place = place if cubic else np.maximum(place, 0)
    below = np.floor(place).astype(int)
    matrix = np.zeros((out, n))
    for neighbor in range(-1, 3) if cubic else range(2):
        distance = np.abs(place - below - neighbor)
        if cubic:  # Keys' kernel with a = -0.75, PyTorch's.
            near = 1.25 * distance**3 - 2.25 * distance**2 + 1
            far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weight = np.where(distance <= 1, near, far)
        else:
            weight = 1 - distance
        np.add.at(matrix, (at, np.clip(below + neighbor, 0, n - 1)), weight)
    return matrix


def _register_interpolation(name: str, cubic: bool) -> None:
    @register(name, layout="maps")
    def interpolate(
        input: Array,
        output_size: Sequence[int] | None = None,
        align_corners: bool = False,
        scale_factors: Sequence[float] | None = None,
    ) -> Array:
        axes = _sizes(input, output_size, scale_factors)
        return _along_axes(input, *(_sampling(*axis, align_corners, cubic) for axis in axes))


_register_interpolation("upsample_bilinear2d", cubic=False)
_register_interpolation("upsample_bicubic2d", cubic=True)


@register("pixel_shuffle")
def _pixel_shuffle(self: Array, upscale_factor: int) -> Array:
    batch, channels, height, width = self.shape
    r = upscale_factor
    x = self.reshape(batch, channels // r**2, r, r, height, width).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // r**2, height * r, width * r)


@register("pixel_unshuffle")
def _pixel_unshuffle(self: Array, downscale_factor: int) -> Array:
    batch, channels, height, width = self.shape
    r = downscale_factor
    x = self.reshape(batch, channels, height // r, r, width // r, r).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * r**2, height // r, width // r)


@register("channel_shuffle", layout="axes")
def _channel_shuffle(self: Array, groups: int, axes: Axes) -> Array:
    order = np.arange(self.shape[axes[1]]).reshape(groups, -1).T.reshape(-1)
    return jnp.take(self, order, axes[1])


@register("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", layout="axes")
def _pad(self: Array, pad: Sequence[int], axes: Axes, mode: str = "constant", value: float | None = None) -> Array:
    widths = [(0, 0)] * self.ndim
    for at in range(len(pad) // 2):  # PyTorch lists them from the last axis on.
        widths[axes[self.ndim - 1 - at]] = (pad[2 * at], pad[2 * at + 1])
    cut = [slice(max(0, -low), n - max(0, -high)) for n, (low, high) in zip(self.shape, widths, strict=True)]
    widths = [(max(0, low), max(0, high)) for low, high in widths]
    if mode == "constant":
        return jnp.pad(self[tuple(cut)], widths, constant_values=value or 0)
    return jnp.pad(self[tuple(cut)], widths, {"replicate": "edge", "circular": "wrap"}.get(mode, mode))
