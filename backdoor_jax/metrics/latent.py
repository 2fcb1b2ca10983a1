r"""Trigger-activated change: what the trigger does to the latents, and how well neuron scores find where.

With latents :math:`\phi`, clean images x and the same images under the trigger x', neuron d changes by

.. math:: s_d = \mathrm{E}\,[\phi_d(x') - \phi_d(x)], \qquad t_d = \mathrm{E}\,|\phi_d(x') - \phi_d(x)| .

s is what "TAC reconstruction" (Iwahana et al., arXiv 2511.08944) wants to recover; t is the size that Zheng et al.
(ECCV 2022, arXiv 2208.03111) hold against their channel scores. Both need the trigger, so they judge a method and are
no part of one. `agreement` compares any scores of the neurons with either: their cosine, Spearman's rank correlation,
and the share of the k highest scores that are among the k largest changes (k / D by chance).

    >>> found = agreement(np.array([3.0, 1.0, 2.0, 0.0]), np.array([6.0, 2.0, 1.0, 0.0]), k=2)
    >>> round(found.cosine, 3), round(found.spearman, 3), found.precision
    (0.918, 0.8, 0.5)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.data import Trigger
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import map_chunks


class Change(NamedTuple):
    """What a trigger does to each latent neuron.

    Attributes:
        mean: s, ``(D,)``.
        size: t, ``(D,)``.
    """

    mean: np.ndarray
    size: np.ndarray


class Agreement(NamedTuple):
    """How well scores of neurons agree with their change; see the file's text."""

    cosine: float
    spearman: float
    precision: float


@jax.jit
def _changes(classifier: Classifier, variables: Variables, images: jax.Array, trigger: Trigger) -> jax.Array:
    def chunk(images: jax.Array) -> jax.Array:
        clean, triggered = (classifier.features(variables, seen)[0] for seen in (images, trigger(images)))
        return triggered - clean

    return map_chunks(chunk, images)


def triggered_change(classifier: Classifier, variables: Variables, images: jax.Array, trigger: Trigger) -> Change:
    """The true change under the trigger.

    Args:
        classifier: the network.
        variables: its variables.
        images: clean uint8 images, ``(n, H, W, channels)``; leave those of the target class out.
        trigger: the attacker's.
    """
    changes = _changes(classifier, variables, images, trigger)
    return Change(np.asarray(jnp.mean(changes, 0)), np.asarray(jnp.mean(jnp.abs(changes), 0)))


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """The cosine of two vectors; 0 where one of them is zero.

    Example:
        >>> cosine(np.array([1.0, 0.0]), np.array([-2.0, 0.0])), cosine(np.zeros(2), np.ones(2))
        (-1.0, 0.0)
    """
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / norms) if norms else 0.0


def agreement(scores: np.ndarray, change: np.ndarray, k: int) -> Agreement:
    """Compares scores of neurons with their change.

    Args:
        scores: ``(D,)``; the larger, the more the neuron is suspected.
        change: `Change`'s ``size``, or its ``mean`` where the sign counts.
        k: how many of the largest are compared; equal values rank by their place.

    Raises:
        UserError: for vectors of different length or a k that is none.
    """
    from scipy import stats

    scores, change = np.asarray(scores, np.float64), np.asarray(change, np.float64)
    if scores.shape != change.shape or scores.ndim != 1:
        raise UserError(f"scores have shape {scores.shape} and changes {change.shape}, expected (D,) for both")
    if not 1 <= k <= len(scores):
        raise UserError(f"k is {k}, expected 1 to {len(scores)} neurons")
    ranks = [stats.rankdata(values) for values in (scores, change)]
    spearman = cosine(*(rank - rank.mean() for rank in ranks))
    largest = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (scores, change)]
    return Agreement(cosine(scores, change), spearman, len(largest[0] & largest[1]) / k)
