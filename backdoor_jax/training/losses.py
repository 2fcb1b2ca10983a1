r"""Per-sample classification losses that stay exact for confident models.

In float32 half of a confident victim's cross-entropies are 0 when computed as ``logsumexp(z) - z_y``, and so is
``1 - p_y``: a ranking by them is mostly ties. Computed from the margins :math:`m_j = z_j - z_y` both stay accurate:

.. math::
    \mathrm{CE} = \mathrm{softplus}\Bigl(\log \sum_{j \ne y} e^{m_j}\Bigr), \qquad 1 - p_y =
    -\mathrm{expm1}(-\mathrm{CE}), \qquad
    -\log(1 - p_y) = \mathrm{softplus}\Bigl(-\log \sum_{j \ne y} e^{m_j}\Bigr) .
"""

import jax
import jax.numpy as jnp

from backdoor_jax.compiling import one_program


@one_program
def _log_odds_against(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Log odds against the labels: the log of the sum of ``exp(m_j)`` over the other classes."""
    logits = logits.astype(jnp.float32) if logits.dtype != jnp.float64 else logits
    own = jnp.take_along_axis(logits, labels[..., None], -1)
    others = jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], -jnp.inf, logits - own)
    return jax.nn.logsumexp(others, axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy per sample, in float32, or in float64 for float64 logits.

    Args:
        logits: ``(..., C)``.
        labels: ``(...,)``.

    Returns:
        ``(...,)``, positive for finite margins up to about 88.

    Example:
        >>> float(cross_entropy(jnp.array([30.0, 0.0]), jnp.array(0))) > 0
        True
    """
    return jax.nn.softplus(_log_odds_against(logits, labels))


def unlikelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The unlikelihood loss -log(1 - p_y) per sample, which is large where the labeled class is likely.

    Args:
        logits: ``(..., C)``.
        labels: ``(...,)``.

    Returns:
        ``(...,)``.

    Example:
        >>> float(unlikelihood(jnp.array([100.0, 0.0]), jnp.array(0)))
        100.0
    """
    return jax.nn.softplus(-_log_odds_against(logits, labels))


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: jax.Array | float) -> jax.Array:
    r"""Cross-entropy per sample under label smoothing: 1 - s on the label, s spread evenly over the other classes.

    .. math::
        \mathrm{CE}_s = (1 - s)\,\mathrm{CE}_y + \frac{s}{C - 1} \sum_{j \ne y} \mathrm{CE}_j
        = \mathrm{CE}_y + \frac{s\,C}{C - 1} (z_y - \bar z)

    Args:
        logits: ``(..., C)``.
        labels: ``(...,)``.
        smoothing: s in [0, 1); at 0 this is `cross_entropy`.

    Returns:
        ``(...,)``.

    Example:
        >>> round(float(smoothed_cross_entropy(jnp.array([2.0, 0.0]), jnp.array(0), 0.1)), 4)
        0.3269
    """
    classes = logits.shape[-1]
    own = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    spread = classes / (classes - 1) * (own - jnp.mean(logits, -1))
    return cross_entropy(logits, labels) + smoothing * spread


def symmetric_cross_entropy(
    logits: jax.Array, labels: jax.Array, alpha: jax.Array | float = 1.0, log_zero: jax.Array | float = -4.0
) -> jax.Array:
    r"""Symmetric cross-entropy per sample (Wang et al., ICCV 2019; PAD-FT eq. 1).

    .. math:: \mathrm{SCE} = \mathrm{CE} + \alpha\,\mathrm{RCE}, \qquad \mathrm{RCE} = -A\,(1 - p_y)

    RCE is the cross-entropy with prediction and one-hot label swapped, and log 0 replaced by A.

    Args:
        logits: ``(..., C)``.
        labels: ``(...,)``.
        alpha: weight of the reverse term, at least 0. PAD-FT's value is not known.
        log_zero: A, negative. PAD-FT's value is not known; -4 is one of those in the SCE paper.

    Returns:
        ``(...,)``. The loss decreases strictly in p_y for every alpha >= 0, so neither constant changes a ranking.

    Example:
        >>> round(float(symmetric_cross_entropy(jnp.zeros(2), jnp.array(0))), 4)
        2.6931
    """
    forward = cross_entropy(logits, labels)
    return forward - alpha * log_zero * -jnp.expm1(-forward)
