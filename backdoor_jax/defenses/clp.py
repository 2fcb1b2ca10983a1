r"""Channel Lipschitzness pruning (Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness",
ECCV 2022, arXiv 2208.03111).

A trigger is a small change of the image that changes some channels a lot, so those channels have a large Lipschitz
constant. CLP bounds it layer by layer from the weights alone. For channel k of a convolution with filter
:math:`W_k`, followed by batch normalization with scale :math:`\gamma` and running variance :math:`v`,

.. math:: \sigma_k = \frac{|\gamma_k|}{\sqrt{v_k + \epsilon}}\ \|W_k\|_2 , \qquad
    W_k \in \mathbb{R}^{\text{inputs} \times \text{height} \cdot \text{width}} ,

and the channels with :math:`\sigma_k > \mathrm{mean}(\sigma) + u\,\mathrm{sd}(\sigma)` over their layer are pruned:
scale and bias of their normalization are set to zero. It needs no images and draws nothing at random.

Sources. u = 3 is the paper's and the benchmark's, which has 5 for Tiny ImageNet (preset ``tiny_imagenet``). Bound,
threshold (deviation with divisor C - 1) and what is zeroed are the released code's. It leaves epsilon out of the root;
here it is the 1e-5 of PyTorch's and Flax's layers, so that the gain is the network's own and a channel that never
varies does not make the bound infinite.

Which convolution. The released code assumes that each normalization follows the convolution that was defined before
it. In a pre-activation network that is wrong: the benchmark, which reuses the code, pairs some normalizations with
a shortcut, and the author advises adapting the code to the architecture. Here a pair is a convolution and the
normalization that receives its output with nothing in between. In PreAct-ResNet18 these are the stem and
``layer1_0/bn1``, and ``conv1`` and ``bn2`` of each block: 9 of 16. The other ``bn1`` read a sum with a shortcut, which
the filter does not bound, and are left alone.

A limit that follows from the math: of C values none lies more than :math:`(C-1)/\sqrt C` deviations above their mean,
so with u = 3 no channel is pruned in a layer of up to 10 channels.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> nothing = digits().train.take(slice(0))
    >>> classifier = build_classifier("small_cnn", 10, width=4)
    >>> victim = classifier.init(jax.random.key(0), nothing.images)
    >>> repair = CLP(u=1.0).repair(jax.random.key(1), classifier, victim, nothing)
    >>> len(repair.info["pruned"]), repair.info["channels"]
    (3, 20)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from backdoor_jax.config import NonNegative
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Needs, Repair, replace_params
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.models import Classifier, Variables

EPSILON = 1e-5
"""What normalization adds to the variance in PyTorch and Flax."""


@dataclasses.dataclass(frozen=True)
class CLP(Defense):
    """Channel Lipschitzness pruning.

    Attributes:
        u: standard deviations above its layer's mean at which a channel is pruned; published 3.
    """

    name: ClassVar[str] = "clp"
    summary: ClassVar[str] = "prune the channels with outlying Lipschitz bounds"
    needs: ClassVar[Needs] = "nothing"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny_imagenet": {"u": 5.0}}

    u: NonNegative = 3.0

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Prunes the channels with outlying Lipschitz bounds.

        Args:
            key: not used; nothing is random.
            classifier: the network.
            variables: the victim's; left as they are.
            data: only the shape of its images is used; it may be empty.

        Returns:
            The pruned model. ``info["pruned"]`` are the pruned channels by normalization, ``info["channels"]`` is the
            number of channels examined.

        Raises:
            UserError: where no normalization with scale and bias reads a convolution.
            NonFiniteError: where a bound is not finite.
        """
        del key
        params, statistics = (flatten_dict(variables.get(part, {})) for part in ("params", "batch_stats"))
        found = classifier.conv_feeding_norm(variables, data.images)
        pairs = [(norm, conv) for norm, conv in found.items() if {(*norm, "scale"), (*norm, "bias")} <= params.keys()]
        if not pairs:
            raise UserError(
                "clp prunes channels by the convolution that feeds a batch normalization, and this network shows none; "
                "give a Linen network that has such layers, or choose another defense"
            )
        pruned: dict[str, list[int]] = {}
        changes: dict[tuple[str, ...], jax.Array] = {}
        channels = 0
        for norm, conv in pairs:
            scale, bias = params[*norm, "scale"], params[*norm, "bias"]
            bounds = np.asarray(channel_bounds(params[*conv, "kernel"], scale, statistics[*norm, "var"]))
            if not np.isfinite(bounds).all():
                raise NonFiniteError(
                    f"clp: bounds at {'/'.join(norm)} are not finite; the victim's weights are damaged"
                )
            channels += len(bounds)
            out = bounds > bounds.mean() + np.float64(self.u) * bounds.std(ddof=min(1, len(bounds) - 1))
            pruned["/".join(norm)] = np.flatnonzero(out).tolist()
            changes[*norm, "scale"], changes[*norm, "bias"] = jnp.where(out, 0, scale), jnp.where(out, 0, bias)
        changed = any(pruned.values())
        return Repair(
            replace_params(variables, changes),
            changed,
            why=None if changed else "no channel stands out",
            info={"steps": 0, "channels": channels, "pruned": pruned},
        )


@jax.jit
def channel_bounds(kernel: jax.Array, scale: jax.Array, variance: jax.Array) -> jax.Array:
    """Lipschitz bounds ``(C,)`` of a convolution's channels after normalization.

    Args:
        kernel: ``(height, width, inputs, C)``.
        scale: of the normalization, ``(C,)``.
        variance: its running variance, ``(C,)``.

    Example:
        >>> kernel, scale, variance = jnp.array([3.0, 4.0]).reshape(1, 2, 1, 1), jnp.array([-2.0]), jnp.array([4.0])
        >>> channel_bounds(kernel, scale, variance).round(3).tolist()
        [5.0]
    """
    height, width, inputs, channels = kernel.shape
    filters = jnp.moveaxis(kernel, -1, 0).reshape(channels, height * width, inputs)
    return jnp.linalg.norm(filters, 2, (-2, -1)) * jnp.abs(scale) * jax.lax.rsqrt(variance + EPSILON)
