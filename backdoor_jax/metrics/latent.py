r"""Trigger-activated change (TAC): how a trigger changes the latents, and how well neuron scores agree with it.

With latents :math:`\phi`, clean images x and the same images under the trigger x', neuron d changes by

.. math:: s_d = \mathrm{E}\,[\phi_d(x') - \phi_d(x)], \qquad t_d = \mathrm{E}\,|\phi_d(x') - \phi_d(x)| .

"TAC reconstruction" (Iwahana et al., arXiv 2511.08944) estimates s; Zheng et al. (ECCV 2022, arXiv 2208.03111) compare
their channel scores with t. Both need the trigger, so they evaluate a defense and are not part of one. `agreement`
compares any scores of the neurons with either: their cosine, Spearman's rank correlation, and the share of the k
highest scores that are among the k largest changes (k / D by chance).

    >>> found = agreement(np.array([3.0, 1.0, 2.0, 0.0]), np.array([6.0, 2.0, 1.0, 0.0]), k=2)
    >>> round(found.cosine, 3), round(found.spearman, 3), found.precision
    (0.918, 0.8, 0.5)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.data import Trigger, triggered
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import map_chunks
from backdoor_jax.validation import checked


class Change(NamedTuple):
    """How a trigger changes each latent neuron.

    Attributes:
        mean: s, the mean change, ``(D,)``.
        size: t, the mean absolute change, ``(D,)``.
    """

    mean: np.ndarray
    size: np.ndarray


class Agreement(NamedTuple):
    """How well scores of neurons agree with their change.

    Attributes:
        cosine: of the scores and the changes.
        spearman: their rank correlation; 0 where all scores or all changes are equal.
        precision: share of the k highest scores that are among the k largest changes.
    """

    cosine: float
    spearman: float
    precision: float


@jax.jit
def _changes(classifier: Classifier, variables: Variables, images: jax.Array, seen: jax.Array) -> jax.Array:
    def chunk(images: jax.Array, seen: jax.Array) -> jax.Array:
        before, after = (classifier.features(variables, part)[0] for part in (images, seen))
        return after - before

    return map_chunks(chunk, images, seen)


@checked
def triggered_change(classifier: Classifier, variables: Variables, images: jax.Array, trigger: Trigger) -> Change:
    """Measures the true change of the latents under the trigger.

    Args:
        classifier: the network.
        variables: its variables.
        images: clean uint8 images, ``(n, H, W, channels)``; leave out those of the target class.
        trigger: the attacker's.
    """
    changes = _changes(classifier, variables, images, triggered(trigger, images))
    return Change(np.asarray(jnp.mean(changes, 0)), np.asarray(jnp.mean(jnp.abs(changes), 0)))


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """The cosine of two vectors; 0 where one of them is zero.

    Example:
        >>> cosine(np.array([1.0, 0.0]), np.array([-2.0, 0.0])), cosine(np.zeros(2), np.ones(2))
        (-1.0, 0.0)
    """
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / norms) if norms else 0.0


@typed
def agreement(scores: np.ndarray, change: np.ndarray, k: int) -> Agreement:
    """Compares scores of neurons with their change.

    Args:
        scores: ``(D,)``; a larger score means a more suspicious neuron.
        change: ``(D,)``, the ``size`` of a `Change`, or its ``mean`` where the sign matters.
        k: how many of the largest are compared; equal values rank by their index.

    Raises:
        UserError: for vectors of different lengths, or a k outside [1, D].
    """
    from scipy import stats

    scores, change = np.asarray(scores, np.float64), np.asarray(change, np.float64)
    if scores.shape != change.shape or scores.ndim != 1:
        raise UserError(f"scores have shape {scores.shape} and changes {change.shape}, expected (D,) for both")
    if not 1 <= k <= len(scores):
        raise UserError(f"k is {k}, expected 1 to {len(scores)} neurons")
    vary = np.ptp(scores) > 0 and np.ptp(change) > 0
    spearman = float(stats.spearmanr(scores, change).statistic) if vary else 0.0
    largest = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (scores, change)]
    return Agreement(cosine(scores, change), spearman, len(largest[0] & largest[1]) / k)
