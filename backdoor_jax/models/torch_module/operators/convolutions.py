"""Convolutions."""

from collections.abc import Sequence

from jax import lax

from backdoor_jax.models.conv import NHWC, conv_general_dilated
from backdoor_jax.models.grouped_conv import grouped_conv
from backdoor_jax.models.torch_module.operators.registry import Array, pair, register


def _pads(padding: Sequence[int] | str, dilation: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each axis; PyTorch puts the odd zero of "same" at the end."""
    if not isinstance(padding, str):
        return [(p, p) for p in padding]
    extra = [d * (size - 1) * (padding == "same") for d, size in zip(dilation, sizes, strict=True)]
    return [(e // 2, e - e // 2) for e in extra]


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
    steps, spread = pair(stride), pair(dilation)
    pads = _pads(padding if isinstance(padding, str) else pair(padding), spread, weight.shape[2:])
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
    reach = [d * (n - 1) for d, n in zip(pair(dilation), size, strict=True)]
    pads = [(r - p, r - p + o) for r, p, o in zip(reach, pair(padding), pair(output_padding), strict=True)]
    out = lax.conv_general_dilated(
        input,
        kernel,
        (1, 1),
        pads,
        lhs_dilation=pair(stride),
        rhs_dilation=pair(dilation),
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
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Array:
    pads = _pads(padding, dilation, weight.shape[2:])
    out = lax.conv_general_dilated(
        input, weight, tuple(stride), pads, rhs_dilation=tuple(dilation), feature_group_count=groups
    )
    return out if bias is None else out + bias[:, None]
