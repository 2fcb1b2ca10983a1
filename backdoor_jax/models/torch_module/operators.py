"""PyTorch's operators in JAX, one small function for each.

A function has PyTorch's names for its arguments and PyTorch's defaults, so that a call in an exported graph is a call
of it by keyword. It is registered under the operator's name, such as ``conv2d``, or with the overload where overloads
differ, such as ``max.dim``. To add an operator, write its function and register it; see `Layout` for how it can take
its arrays.

Dropout is the identity, in training as well: a latent is a function of weights and images alone.
"""

import dataclasses
import inspect
import math
import operator as python
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from backdoor_jax.models.conv import NHWC, conv_general_dilated
from backdoor_jax.models.grouped_conv import grouped_conv
from backdoor_jax.models.layers import adaptive_windows
from backdoor_jax.models.torch_module.layouts import Layout

Array = jax.Array
Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator.

    Attributes:
        function: what computes it.
        layout: how it takes its arrays.
        parameters: the names of its arguments.
    """

    function: Callable[..., Any]
    layout: Layout
    parameters: frozenset[str]


OPERATORS: dict[str, Operator] = {}
"""The operators by name."""


def register(*names: str, layout: Layout = "torch") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the operator of these names."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = frozenset(inspect.signature(function).parameters)
        OPERATORS.update(dict.fromkeys(names, Operator(function, layout, parameters)))
        return function

    return add


def find(name: str) -> Operator | None:
    """The operator of a name with its overload, such as ``add.Tensor``.

    Example:
        >>> find("add.Tensor") is OPERATORS["add"], find("max.dim") is OPERATORS["max.dim"]
        (True, True)
    """
    return OPERATORS.get(name) or OPERATORS.get(name.partition(".")[0])


# Numbers: what graphs compute of the number of images

for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem"):
    OPERATORS[f"python.{name}"] = Operator(getattr(python, name), "torch", frozenset())


# Functions of one tensor, entry by entry


def _unary(function: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda self: function(self)


UNARY: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "celu": jax.nn.celu,
    "selu": jax.nn.selu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "hardsigmoid": lambda x: _between(x + 3, 0, 6) / 6,
    "hardswish": lambda x: x * _between(x + 3, 0, 6) / 6,
    "relu6": lambda x: _between(x, 0, 6),
    "neg": jnp.negative,
    "abs": jnp.abs,
    "exp": jnp.exp,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": jnp.reciprocal,
    "square": jnp.square,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "erf": jax.scipy.special.erf,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "sign": jnp.sign,
    "isnan": jnp.isnan,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not,
    "zeros_like": jnp.zeros_like,
    "ones_like": jnp.ones_like,
    "detach": lax.stop_gradient,
}
for name, unary in UNARY.items():
    register(name, layout="pointwise")(_unary(unary))


def _between(x: Array, low: float | None, high: float | None) -> Array:
    """``x`` clipped, with PyTorch's gradient, which is 0 outside."""
    x = x if low is None else jnp.where(x > low, x, low)
    return x if high is None else jnp.where(x < high, x, high)


@register("clone", "alias", "contiguous", "lift_fresh_copy", layout="pointwise")
def _identity(self: Array) -> Array:
    return self


@register("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", layout="pointwise")
def _dropout(input: Array, p: float, train: bool = False) -> Array:
    del p, train
    return input


@register("_to_copy", "to.dtype", "type_as", layout="pointwise")
def _convert(self: Array, dtype: str | None = None, copy: bool = False) -> Array:
    del copy
    return self if dtype is None else self.astype(_known(dtype))


def _known(dtype: Any) -> Any:
    """A type, in 32 bits where JAX has no 64."""
    return jax.dtypes.canonicalize_dtype(dtype)


@register("hardtanh", layout="pointwise")
def _hardtanh(self: Array, min_val: float = -1, max_val: float = 1) -> Array:
    return _between(self, min_val, max_val)


@register("clamp", "clip", "clamp_min", "clamp_max", layout="pointwise")
def _clamp(self: Array, min: Any = None, max: Any = None) -> Array:
    return _between(self, min, max)


@register("leaky_relu", layout="pointwise")
def _leaky_relu(self: Array, negative_slope: float = 0.01) -> Array:
    return jnp.where(self > 0, self, negative_slope * self)


@register("elu", layout="pointwise")
def _elu(self: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    below = alpha * jnp.expm1(jnp.where(self > 0, 0, self) * input_scale)
    return scale * jnp.where(self > 0, self, below)


@register("gelu", layout="pointwise")
def _gelu(self: Array, approximate: str = "none") -> Array:
    return jax.nn.gelu(self, approximate=approximate == "tanh")


@register("softplus", layout="pointwise")
def _softplus(self: Array, beta: float = 1, threshold: float = 20) -> Array:
    return jnp.where(self * beta > threshold, self, jax.nn.softplus(self * beta) / beta)


@register("threshold", layout="pointwise")
def _threshold(self: Array, threshold: float, value: float) -> Array:
    return jnp.where(self > threshold, self, value)


@register("prelu", layout="axes")
def _prelu(self: Array, weight: Array, axes: Axes) -> Array:
    if weight.size > 1:
        weight = weight.reshape(tuple(-1 if axis == axes[1] else 1 for axis in range(self.ndim)))
    return jnp.where(self > 0, self, weight.reshape(-1)[0] * self if weight.size == 1 else weight * self)


# Functions of several tensors, entry by entry


def _binary(function: Callable[[Any, Any], Array]) -> Callable[..., Array]:
    return lambda self, other: function(self, other)


BINARY: dict[str, Callable[[Any, Any], Array]] = {
    "mul": jnp.multiply,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "floor_divide": jnp.floor_divide,
    "remainder": jnp.remainder,
}
for name, binary in BINARY.items():
    register(name, layout="pointwise")(_binary(binary))


@register("add", layout="pointwise")
def _add(self: Any, other: Any, alpha: float = 1) -> Array:
    return self + (other if alpha == 1 else alpha * other)


@register("sub", layout="pointwise")
def _sub(self: Any, other: Any, alpha: float = 1) -> Array:
    return self - (other if alpha == 1 else alpha * other)


@register("rsub", layout="pointwise")
def _rsub(self: Any, other: Any, alpha: float = 1) -> Array:
    return _sub(other, self, alpha)


@register("div", layout="pointwise")
def _div(self: Any, other: Any, rounding_mode: str | None = None) -> Array:
    if rounding_mode is None:
        return self / other
    return jnp.floor_divide(self, other) if rounding_mode == "floor" else jnp.trunc(self / other)


@register("pow", layout="pointwise")
def _pow(self: Any, exponent: Any) -> Array:
    whole = isinstance(exponent, float) and exponent.is_integer()
    return self ** (int(exponent) if whole else exponent)


@register("where", layout="pointwise")
def _where(condition: Array, self: Any, other: Any) -> Array:
    return jnp.where(condition, self, other)


@register("masked_fill", layout="pointwise")
def _masked_fill(self: Array, mask: Array, value: Any) -> Array:
    return jnp.where(mask, jnp.asarray(value, self.dtype), self)


@register("addcmul", layout="pointwise")
def _addcmul(self: Array, tensor1: Array, tensor2: Array, value: float = 1) -> Array:
    return self + value * tensor1 * tensor2


# Convolutions


def _pair(values: int | Sequence[int]) -> tuple[int, int]:
    """A value for each axis of a map; one value holds for both."""
    first, last = (values, values) if isinstance(values, int) else (values[0], values[-1])
    return first, last


@register("conv2d", layout="maps")
def _conv2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | str = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Array:
    steps, spread = _pair(stride), _pair(dilation)
    if isinstance(padding, str):  # PyTorch puts the odd zero of "same" at the end.
        extra = [d * (size - 1) * (padding == "same") for d, size in zip(spread, weight.shape[2:], strict=True)]
        pads = [(e // 2, e - e // 2) for e in extra]
    else:
        pads = [(p, p) for p in _pair(padding)]
    kernel = weight.transpose(2, 3, 1, 0)
    if groups == 1:
        out = conv_general_dilated(input, kernel, steps, pads, rhs_dilation=spread, dimension_numbers=NHWC)
    else:
        out = grouped_conv(input, kernel, steps, pads, spread, groups)
    return out if bias is None else out + bias


@register("conv_transpose2d", layout="maps")
def _conv_transpose2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Array:
    inputs, outputs, *size = weight.shape
    kernel = weight[:, :, ::-1, ::-1].reshape(groups, inputs // groups, outputs, *size)
    kernel = kernel.transpose(3, 4, 1, 0, 2).reshape(*size, inputs // groups, groups * outputs)
    reach = [d * (n - 1) for d, n in zip(_pair(dilation), size, strict=True)]
    pads = [(r - p, r - p + o) for r, p, o in zip(reach, _pair(padding), _pair(output_padding), strict=True)]
    out = lax.conv_general_dilated(
        input,
        kernel,
        (1, 1),
        pads,
        lhs_dilation=_pair(stride),
        rhs_dilation=_pair(dilation),
        dimension_numbers=NHWC,
        feature_group_count=groups,
    )
    return out if bias is None else out + bias


@register("conv1d")
def _conv1d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Array:
    pads = [(p, p) for p in padding]
    out = lax.conv_general_dilated(
        input, weight, tuple(stride), pads, rhs_dilation=tuple(dilation), feature_group_count=groups
    )
    return out if bias is None else out + bias[:, None]


# Pooling and interpolation


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
    """Windows of maps ``(B, H, W, C)`` combined along one axis and then the other, as choices or sums of slices.

    Their gradient on a CPU is faster than that of XLA's windows; see `backdoor_jax.models.layers.max_pool`.
    """
    for axis, (size, stride, pad, step) in enumerate(zip(sizes, strides, padding, dilation, strict=True), 1):
        n = x.shape[axis]
        count = _outputs(n, size, stride, pad, step, ceil_mode)
        last = (count - 1) * stride + 1
        over = max(0, last + step * (size - 1) - n - pad)
        pads = [(pad, over) if at == axis else (0, 0) for at in range(4)]
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
    sizes = _pair(kernel_size)
    strides = _pair(stride) if stride else sizes
    return _pool(self, _larger, -jnp.inf, sizes, strides, _pair(padding), _pair(dilation), ceil_mode)


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
    sizes, pads = _pair(kernel_size), _pair(padding)
    strides = _pair(stride) if stride else sizes
    total = _pool(self, jnp.add, 0, sizes, strides, pads, ceil_mode=ceil_mode)
    if divisor_override is not None:
        return total / divisor_override

    def counts(n: int, size: int, stride: int, pad: int) -> np.ndarray:
        start = np.arange(_outputs(n, size, stride, pad, 1, ceil_mode)) * stride - pad
        end = np.minimum(start + size, n + pad)
        return end - start if count_include_pad else np.minimum(end, n) - np.maximum(start, 0)

    rows, columns = (counts(*axis) for axis in zip(self.shape[1:3], sizes, strides, pads, strict=True))
    return total / jnp.asarray(rows[:, None, None] * columns[:, None], total.dtype)


def _along_axes(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Maps ``(B, H, W, C)`` with one matrix applied along the height and one along the width."""
    matrices = (jnp.asarray(matrix, x.dtype) for matrix in (rows, columns))
    return jnp.einsum("bhwc,ih,jw->bijc", x, *matrices)


@register("adaptive_avg_pool2d", "_adaptive_avg_pool2d", layout="maps")
def _adaptive_avg_pool2d(self: Array, output_size: Sequence[int]) -> Array:
    sizes = self.shape[1:3]
    out = tuple(n if size is None else size for n, size in zip(sizes, _pair(output_size), strict=True))
    if out == (1, 1):
        return jnp.mean(self, (1, 2), keepdims=True)
    if out == sizes:
        return self
    windows = [adaptive_windows(n, size) for n, size in zip(sizes, out, strict=True)]
    return _along_axes(self, *(inside / inside.sum(1, keepdims=True) for inside in windows))


@register("adaptive_max_pool2d", layout="maps")
def _adaptive_max_pool2d(self: Array, output_size: Sequence[int]) -> tuple[Array, None]:
    for axis, out in enumerate(_pair(output_size), 1):
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


@register("upsample_nearest2d", layout="maps")
def _nearest(
    input: Array, output_size: Sequence[int] | None = None, scale_factors: Sequence[float] | None = None
) -> Array:
    for axis, (n, out, step) in enumerate(_sizes(input, output_size, scale_factors), 1):
        input = jnp.take(input, np.minimum(np.floor(np.arange(out) * step).astype(int), n - 1), axis)
    return input


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


# Normalization


def _by_channel(values: Array, rank: int, axes: Axes) -> Array:
    """Values ``(C,)`` in a shape that broadcasts along the channels."""
    return values.reshape([-1 if axis == axes[1] else 1 for axis in range(rank)])


def batch_norm(
    input: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axes: Axes,
) -> Array:
    """A tensor normalized with mean and variance ``(C,)`` of its channels, in float32 or more."""
    gain = lax.rsqrt(var + eps)
    gain = gain if weight is None else gain * weight
    shift = -mean * gain if bias is None else bias - mean * gain
    out = input * _by_channel(gain, input.ndim, axes) + _by_channel(shift, input.ndim, axes)
    return out.astype(input.dtype)


def batch_statistics(input: Array, axes: Axes) -> tuple[Array, Array, int]:
    """Mean and biased variance ``(C,)`` over everything but channels, and the number of entries of a channel."""
    wide = input.astype(jnp.promote_types(input.dtype, jnp.float32))
    others = tuple(axis for axis in range(input.ndim) if axis != axes[1])
    return jnp.mean(wide, others), jnp.var(wide, others), input.size // input.shape[axes[1]]


@register("_native_batch_norm_legit.no_stats", layout="axes")
def _batch_norm_without_statistics(
    input: Array,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    axes: Axes,
) -> tuple[Array]:
    del training, momentum
    mean, var, _ = batch_statistics(input, axes)
    return (batch_norm(input, mean, var, weight, bias, eps, axes),)


def _standardized(x: Array, axes: Axes, eps: float) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axes, keepdims=True)
    return ((wide - mean) * lax.rsqrt(jnp.var(wide, axes, keepdims=True) + eps)).astype(x.dtype)


@register("layer_norm")
def _layer_norm(
    input: Array,
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    out = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@register("rms_norm")
def _rms_norm(
    input: Array, normalized_shape: Sequence[int], weight: Array | None = None, eps: float | None = None
) -> Array:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = float(jnp.finfo(input.dtype).eps) if eps is None else eps
    out = input * lax.rsqrt(jnp.mean(input**2, axes, keepdims=True) + eps)
    return out if weight is None else out * weight


@register("group_norm", layout="axes")
def _group_norm(
    input: Array,
    num_groups: int,
    axes: Axes,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    last = jnp.moveaxis(input, axes[1], -1)
    grouped = last.reshape(len(last), -1, num_groups, last.shape[-1] // num_groups)
    out = jnp.moveaxis(_standardized(grouped, (1, 3), eps).reshape(last.shape), -1, axes[1])
    out = out if weight is None else out * _by_channel(weight, out.ndim, axes)
    return out if bias is None else out + _by_channel(bias, out.ndim, axes)


@register("instance_norm", layout="axes")
def _instance_norm(
    input: Array,
    axes: Axes,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Array:
    del momentum
    if not use_input_stats and running_mean is not None and running_var is not None:
        return batch_norm(input, running_mean, running_var, weight, bias, eps, axes)
    out = _standardized(input, axes[2:], eps)
    out = out if weight is None else out * _by_channel(weight, out.ndim, axes)
    return out if bias is None else out + _by_channel(bias, out.ndim, axes)


# Reductions and what runs along an axis


def _reduced(
    function: Callable[..., Array], x: Array, dim: int | Sequence[int] | None, keepdim: bool, axes: Axes
) -> Array:
    """A reduction over some of PyTorch's axes, or all; without `keepdim` the rest is in PyTorch's order."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or range(x.ndim))
    out = function(x, axis=tuple(axes[d] for d in dims), keepdims=True)
    return out if keepdim else out.transpose(axes).squeeze(tuple(dims))


@register("mean", layout="axes")
def _mean(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: str | None = None
) -> Array:
    return _reduced(jnp.mean, _convert(self, dtype), dim, keepdim, axes)


@register("sum", layout="axes")
def _sum(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: str | None = None
) -> Array:
    return _reduced(jnp.sum, _convert(self, dtype), dim, keepdim, axes)


@register("amax", layout="axes")
def _amax(self: Array, axes: Axes, dim: Sequence[int] = (), keepdim: bool = False) -> Array:
    return _reduced(jnp.max, self, dim, keepdim, axes)


@register("max", layout="axes")
def _max(self: Array, axes: Axes) -> Array:
    return _reduced(jnp.max, self, None, False, axes)


@register("max.dim", layout="axes")
def _max_dim(self: Array, dim: int, axes: Axes, keepdim: bool = False) -> tuple[Array, None]:
    return _reduced(jnp.max, self, dim, keepdim, axes), None


@register("var.correction", layout="axes")
def _var(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False
) -> Array:
    def variance(x: Array, axis: Sequence[int], keepdims: bool) -> Array:
        return jnp.var(x, tuple(axis), ddof=1 if correction is None else int(correction), keepdims=keepdims)

    return _reduced(variance, self, dim, keepdim, axes)


@register("var.dim", layout="axes")
def _var_dim(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, unbiased: bool = True, keepdim: bool = False
) -> Array:
    return _var(self, axes, dim, float(unbiased), keepdim)


@register("std.dim", layout="axes")
def _std_dim(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, unbiased: bool = True, keepdim: bool = False
) -> Array:
    return jnp.sqrt(_var_dim(self, axes, dim, unbiased, keepdim))


@register("std.correction", layout="axes")
def _std(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False
) -> Array:
    return jnp.sqrt(_var(self, axes, dim, correction, keepdim))


@register("var_mean.correction", layout="axes")
def _var_mean(
    self: Array, axes: Axes, dim: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False
) -> tuple[Array, Array]:
    return _var(self, axes, dim, correction, keepdim), _mean(self, axes, dim, keepdim)


@register("linalg_vector_norm", layout="axes")
def _vector_norm(
    self: Array, axes: Axes, ord: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False
) -> Array:
    def norm(x: Array, axis: Sequence[int], keepdims: bool) -> Array:
        if ord == math.inf:
            return jnp.max(jnp.abs(x), axis, keepdims=keepdims)
        return jnp.sum(jnp.abs(x) ** ord, axis, keepdims=keepdims) ** (1 / ord)

    return _reduced(norm, self, dim, keepdim, axes)


@register("softmax", "_softmax", layout="axes")
def _softmax(self: Array, dim: int, axes: Axes, dtype: str | None = None) -> Array:
    return jax.nn.softmax(_convert(self, dtype), axes[dim])


@register("log_softmax", layout="axes")
def _log_softmax(self: Array, dim: int, axes: Axes, dtype: str | None = None) -> Array:
    return jax.nn.log_softmax(_convert(self, dtype), axes[dim])


@register("glu", layout="axes")
def _glu(self: Array, axes: Axes, dim: int = -1) -> Array:
    return jax.nn.glu(self, axes[dim])


@register("cumsum", layout="axes")
def _cumsum(self: Array, dim: int, axes: Axes) -> Array:
    return jnp.cumsum(self, axes[dim])


# Parts and joins


@register("cat", layout="axes")
def _cat(tensors: Sequence[Array], axes: Axes, dim: int = 0) -> Array:
    return jnp.concatenate(tensors, axes[dim])


@register("stack")
def _stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack(tensors, dim)


def _range(n: int, start: int | None, end: int | None, step: int) -> slice:
    return slice(*slice(start, end, step).indices(n))


@register("slice", layout="axes")
def _slice(
    self: Array, axes: Axes, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    at = axes[dim]
    if start in (0, None) and end in (None, 2**63 - 1) and step == 1:
        return self  # Of any length, also of one that is a symbol (`jax.export`).
    found = _range(self.shape[at], start, end, step)
    return lax.slice_in_dim(self, found.start, max(found.start, found.stop), step, at)


@register("narrow", layout="axes")
def _narrow(self: Array, dim: int, start: int, length: int, axes: Axes) -> Array:
    return lax.slice_in_dim(self, start, start + length, axis=axes[dim])


@register("split.Tensor", layout="axes")
def _split(self: Array, split_size: int, axes: Axes, dim: int = 0) -> tuple[Array, ...]:
    n = self.shape[axes[dim]]
    return tuple(jnp.split(self, list(range(split_size, n, split_size)), axes[dim]))


@register("split_with_sizes", "split.sizes", layout="axes")
def _split_with_sizes(self: Array, split_sizes: Sequence[int], axes: Axes, dim: int = 0) -> tuple[Array, ...]:
    return tuple(jnp.split(self, np.cumsum(split_sizes)[:-1], axes[dim]))


@register("chunk", layout="axes")
def _chunk(self: Array, chunks: int, axes: Axes, dim: int = 0) -> tuple[Array, ...]:
    return _split(self, -(-self.shape[axes[dim]] // chunks), axes, dim)


@register("unbind")
def _unbind(self: Array, dim: int = 0) -> tuple[Array, ...]:
    return tuple(jnp.moveaxis(self, dim, 0))


@register("select")
def _select(self: Array, dim: int, index: int) -> Array:
    return lax.index_in_dim(self, index, dim, keepdims=False)


@register("flip", layout="axes")
def _flip(self: Array, dims: Sequence[int], axes: Axes) -> Array:
    return jnp.flip(self, tuple(axes[d] for d in dims))


@register("roll", layout="axes")
def _roll(self: Array, shifts: Sequence[int], axes: Axes, dims: Sequence[int] = ()) -> Array:
    return jnp.roll(self, tuple(shifts), tuple(axes[d] for d in dims))


@register("slice_scatter")
def _slice_scatter(
    self: Array, src: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    place = [slice(None)] * self.ndim
    place[dim] = _range(self.shape[dim], start, end, step)
    return self.at[tuple(place)].set(src.astype(self.dtype))


@register("select_scatter")
def _select_scatter(self: Array, src: Array, dim: int, index: int) -> Array:
    place: list[Any] = [slice(None)] * self.ndim
    place[dim] = index
    return self.at[tuple(place)].set(src)


@register("index")
def _index(self: Array, indices: Sequence[Array | None]) -> Array:
    return self[tuple(slice(None) if index is None else index for index in indices)]


@register("index_put")
def _index_put(self: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False) -> Array:
    place = self.at[tuple(slice(None) if index is None else index for index in indices)]
    return place.add(values) if accumulate else place.set(values)


@register("index_select")
def _index_select(self: Array, dim: int, index: Array) -> Array:
    return jnp.take(self, index, dim)


@register("gather")
def _gather(self: Array, dim: int, index: Array) -> Array:
    return jnp.take_along_axis(self, index, dim)


@register("embedding")
def _embedding(weight: Array, indices: Array, padding_idx: int = -1) -> Array:
    del padding_idx
    return weight[indices]


# Shapes


@register("view", "_unsafe_view", "reshape")
def _view(self: Array, size: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Array:
    return self.reshape(tuple(shape if size is None else size))  # type: ignore[arg-type]


@register("flatten")
def _flatten(self: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    first, last = start_dim % self.ndim, end_dim % self.ndim
    return self.reshape(*self.shape[:first], -1, *self.shape[last + 1 :])


@register("unflatten")
def _unflatten(self: Array, dim: int, sizes: Sequence[int]) -> Array:
    at = dim % self.ndim
    return self.reshape(*self.shape[:at], *sizes, *self.shape[at + 1 :])


@register("permute")
def _permute(self: Array, dims: Sequence[int]) -> Array:
    return self.transpose([d % self.ndim for d in dims])


@register("transpose")
def _transpose(self: Array, dim0: int, dim1: int) -> Array:
    return jnp.swapaxes(self, dim0, dim1)


@register("t", "numpy_T", "matrix_H", "mT")
def _t(self: Array) -> Array:
    return jnp.swapaxes(self, -1, -2) if self.ndim > 1 else self


@register("movedim")
def _movedim(self: Array, source: Sequence[int], destination: Sequence[int]) -> Array:
    return jnp.moveaxis(self, source, destination)


@register("unsqueeze")
def _unsqueeze(self: Array, dim: int) -> Array:
    return jnp.expand_dims(self, dim)


@register("squeeze")
def _squeeze(self: Array, dim: int | Sequence[int] | None = None) -> Array:
    dims = range(self.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return self.squeeze(tuple(d for d in dims if self.shape[d] == 1))


@register("expand")
def _expand(self: Array, size: Sequence[int], implicit: bool = False) -> Array:
    del implicit
    known = (1,) * (len(size) - self.ndim) + self.shape
    return jnp.broadcast_to(
        self, [n if isinstance(s, int) and s == -1 else s for s, n in zip(size, known, strict=True)]
    )


@register("repeat")
def _repeat(self: Array, repeats: Sequence[int]) -> Array:
    return jnp.tile(self, tuple(repeats))


@register("repeat_interleave.self_int")
def _repeat_interleave(self: Array, repeats: int, dim: int | None = None) -> Array:
    return jnp.repeat(self, repeats, dim)


# Products


@register("linear")
def _linear(input: Array, weight: Array, bias: Array | None = None) -> Array:
    out = input @ weight.T
    return out if bias is None else out + bias


@register("matmul", "mm", "bmm")
def _matmul(self: Array, other: Array | None = None, mat2: Array | None = None) -> Array:
    return jnp.matmul(self, mat2 if other is None else other)  # type: ignore[arg-type]


@register("addmm")
def _addmm(self: Array, mat1: Array, mat2: Array, beta: float = 1, alpha: float = 1) -> Array:
    return beta * self + alpha * (mat1 @ mat2)


@register("baddbmm")
def _baddbmm(self: Array, batch1: Array, batch2: Array, beta: float = 1, alpha: float = 1) -> Array:
    return beta * self + alpha * (batch1 @ batch2)


@register("einsum")
def _einsum(equation: str, tensors: Sequence[Array]) -> Array:
    return jnp.einsum(equation, *tensors)


@register("scaled_dot_product_attention")
def _attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    del dropout_p
    scores = query @ jnp.swapaxes(key, -1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if attn_mask is not None:
        scores = jnp.where(attn_mask, scores, -jnp.inf) if attn_mask.dtype == bool else scores + attn_mask
    return jax.nn.softmax(scores, -1) @ value


# New tensors


def _number_type(dtype: str | None, *values: Any) -> Any:
    """PyTorch's type for numbers that were given without one."""
    if dtype is not None:
        return _known(dtype)
    return "float32" if any(isinstance(value, float) for value in values) else "int32"


@register("arange")
def _arange(end: float, start: float = 0, step: float = 1, dtype: str | None = None) -> Array:
    return jnp.arange(start, end, step, _number_type(dtype, start, end, step))


@register("linspace")
def _linspace(start: float, end: float, steps: int, dtype: str | None = None) -> Array:
    return jnp.linspace(start, end, steps, dtype=_known(dtype or "float32"))


@register("zeros", "empty")
def _zeros(size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.zeros(tuple(size), _known(dtype or "float32"))


@register("ones")
def _ones(size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.ones(tuple(size), _known(dtype or "float32"))


@register("full")
def _full(size: Sequence[int], fill_value: Any, dtype: str | None = None) -> Array:
    return jnp.full(tuple(size), fill_value, _number_type(dtype, fill_value))


@register("scalar_tensor")
def _scalar_tensor(s: Any, dtype: str | None = None) -> Array:
    return jnp.asarray(s, _known(dtype or "float32"))


@register("new_zeros", "new_empty")
def _new_zeros(self: Array, size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.zeros(tuple(size), _known(dtype or self.dtype))


@register("new_ones")
def _new_ones(self: Array, size: Sequence[int], dtype: str | None = None) -> Array:
    return jnp.ones(tuple(size), _known(dtype or self.dtype))


@register("new_full")
def _new_full(self: Array, size: Sequence[int], fill_value: Any, dtype: str | None = None) -> Array:
    return jnp.full(tuple(size), fill_value, _known(dtype or self.dtype))


@register("full_like", layout="pointwise")
def _full_like(self: Array, fill_value: Any, dtype: str | None = None) -> Array:
    return jnp.full_like(self, fill_value, dtype=_known(dtype or self.dtype))


@register("fill", layout="pointwise")
def _fill(self: Array, value: Any) -> Array:
    return jnp.full_like(self, value)


@register("copy", layout="pointwise")
def _copy(self: Array, src: Array) -> Array:
    return jnp.broadcast_to(src, self.shape).astype(self.dtype)


@register("tril")
def _tril(self: Array, diagonal: int = 0) -> Array:
    return jnp.tril(self, diagonal)


@register("triu")
def _triu(self: Array, diagonal: int = 0) -> Array:
    return jnp.triu(self, diagonal)


@register("meshgrid")
def _meshgrid(tensors: Sequence[Array], indexing: str = "ij") -> tuple[Array, ...]:
    return tuple(jnp.meshgrid(*tensors, indexing=indexing))
