"""Products of matrices, and attention."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from backdoor_jax.models.torch_module.operators.registry import Array, register


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


@register("mv")
def _mv(self: Array, vec: Array) -> Array:
    return self @ vec


@register("dot", "vdot")
def _dot(self: Array, tensor: Array | None = None, other: Array | None = None) -> Array:
    return self @ (other if tensor is None else tensor)  # type: ignore[operator]


@register("matrix_exp")
def _matrix_exp(self: Array) -> Array:
    return jax.scipy.linalg.expm(self)


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
