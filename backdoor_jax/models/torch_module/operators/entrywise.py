"""Functions entry by entry, of one tensor or of several."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backdoor_jax.models.torch_module.operators.registry import Array, Axes, known_type, register

# Functions of one tensor, entry by entry


def _unary(function: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda self: function(self)


UNARY: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
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
    "log2": jnp.log2,
    "log10": jnp.log10,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": jnp.reciprocal,
    "square": jnp.square,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "erf": jax.scipy.special.erf,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "sign": jnp.sign,
    "isnan": jnp.isnan,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not,
    "zero": jnp.zeros_like,
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


@register("nan_to_num", layout="pointwise")
def _nan_to_num(
    self: Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Array:
    return jnp.nan_to_num(self, nan=nan or 0.0, posinf=posinf, neginf=neginf)


@register("type_as")
def _type_as(self: Array, other: Array) -> Array:
    return self.astype(other.dtype)


@register("_to_copy", "to.dtype", layout="pointwise")
def convert(self: Array, dtype: str | None = None, copy: bool = False) -> Array:
    """A tensor in another type; None keeps its own."""
    del copy
    return self if dtype is None else self.astype(known_type(dtype))


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


@register("celu", layout="pointwise")
def _celu(self: Array, alpha: float = 1) -> Array:
    return jax.nn.celu(self, alpha)


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
    "max.other": jnp.maximum,
    "minimum": jnp.minimum,
    "min.other": jnp.minimum,
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
