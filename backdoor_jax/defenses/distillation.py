r"""Distillation on mixed images without the target's logit: what a teacher knows, except about the target.

For images :math:`x_i` of a batch, a permutation :math:`\pi` of it, and :math:`p^{-t}` the probabilities among the
classes other than t,

.. math::
    \mathrm{KL}\bigl(p_\text{teacher}^{-t}(\tilde x_i)\,\|\,p_\theta^{-t}(\tilde x_i)\bigr), \qquad
    \tilde x_i = \lambda_i x_i + (1 - \lambda_i)\,x_{\pi(i)}, \quad \lambda_i \sim \mathrm{U}(0.2, 0.8),

counts where neither image of a pair is of class t. Few clean images overfit, and mixed ones show the student much more
of what its teacher does between them; without the target's logit they say nothing about the target.

Mixed images are those of mixup (Zhang et al., ICLR 2018); their use here is this package's.
"""

import jax
import jax.numpy as jnp

from backdoor_jax.data import Dataset
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Loss, LossResult

MIXED = (0.2, 0.8)
"""The range of an image's weight in a mixed pair; ours."""


def mix_pairs(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images ``(B, H, W, channels)`` mixed in random pairs, in float32, and each one's partner ``(B,)``.

    Example:
        >>> mixed, partner = mix_pairs(jax.random.key(0), jnp.full((2, 8, 8, 3), 100, jnp.uint8))
        >>> round(float(mixed.max()), 3), sorted(partner.tolist())
        (100.0, [0, 1])
    """
    weight_key, pair_key = jax.random.split(key)
    weight = jax.random.uniform(weight_key, (len(images), 1, 1, 1), minval=MIXED[0], maxval=MIXED[1])
    partner = jax.random.permutation(pair_key, len(images))
    return weight * images + (1 - weight) * images[partner], partner


def divergence_without(target: jax.Array, logits: jax.Array, others: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence ``(B,)`` from the first to the second of two models, among classes but the target.

    Args:
        target: the class that is left out.
        logits: ``(B, C)`` of the first, the teacher.
        others: ``(B, C)`` of the second, the student.

    Example:
        >>> logits = jnp.array([[0.0, 0.0, 9.0]])
        >>> divergence_without(jnp.asarray(2), logits, jnp.array([[0.0, 0.0, -9.0]])).tolist()
        [0.0]
    """
    left_out = jnp.arange(logits.shape[-1]) == target
    p, q = (jax.nn.log_softmax(jnp.where(left_out, -jnp.inf, part)) for part in (logits, others))
    return jnp.sum(jnp.where(left_out, 0, jnp.exp(p) * (p - q)), -1)


def distillation_loss(
    classifier: Classifier,
    mu: jax.Array | float,
    teacher: Variables,
    target: jax.Array,
    task: Loss,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """The task's loss on one batch, plus the weighted divergence from a teacher on its mixed pairs.

    The normalization statistics are the task's; mixed images are normalized by their own.

    Args:
        classifier: the network.
        mu: weight of the divergence.
        teacher: the teacher's variables.
        target: the class whose logit and images are left out of the divergence.
        task: the loss of the clean images.
        variables: the student's.
        batch: augmented images and labels.
        key: for the pairs.
    """
    mixed, partner = mix_pairs(key, batch.images)
    counted = (batch.labels != target) & (batch.labels[partner] != target)
    loss, (updated, info) = task(variables, batch, key)
    learned, _ = classifier.logits(variables, mixed, train=True)
    taught, _ = classifier.logits(teacher, mixed)
    divergences = jnp.where(counted, divergence_without(target, taught, learned), 0)
    divergence = jnp.sum(divergences) / jnp.maximum(jnp.sum(counted), 1)
    return loss + mu * divergence, (updated, {**info, "divergence": divergence})
