r"""What D3 shows of a repair (Wei, Liu, Zha, ICCV 2025, arXiv 2411.09585): the way there, and what moved.

The paper's argument is that fine-tuning stays in a valley where clean and backdoor loss are both low. `along` measures
both losses and both rates on the straight line from one model to another and beyond,

.. math:: \theta(t) = \theta_0 + t\,(\theta_1 - \theta_0),

t = 0 at the first model, 1 at the second. `moved` says how far selected weights are from where they were, and
`embedding` draws latents in the plane. The paper's ranges and projection are not at hand, and these are ours: the
running means of normalisation go along the line with the weights, the variances along a geometric one, on which they
stay positive beyond the models too; latents are projected on their two principal components.

    >>> from backdoor_jax import build_classifier, digits
    >>> test, classifier = digits().test.take(slice(20)), build_classifier("small_cnn", 10, width=2)
    >>> start, end = (classifier.init(jax.random.key(seed), test.images) for seed in (0, 1))
    >>> line = along(classifier, start, end, test, lambda images: 255 - images, LabelMap("all_to_one", 10), (0.0, 1.5))
    >>> line.positions.tolist(), line.clean_loss.shape
    ([0.0, 1.5], (2,))
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from backdoor_jax.data import Dataset, LabelMap, Trigger
from backdoor_jax.errors import UserError
from backdoor_jax.metrics.latent import cosine
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import cross_entropy, map_chunks

POSITIONS = tuple(step / 10 for step in range(21))
"""From the first model to as far beyond the second as that is from the first."""


class Line(NamedTuple):
    """Losses and rates at places along a line of models, ``(P,)`` each.

    Attributes:
        positions: t.
        clean_loss: mean cross-entropy of clean images.
        backdoor_loss: mean cross-entropy of triggered images to the attacker's class, those of that class left out.
        acc: share of clean images classified rightly; NaN where a logit is not finite.
        asr: share of triggered images that go where the attacker wants them, the same left out; likewise.
    """

    positions: np.ndarray
    clean_loss: np.ndarray
    backdoor_loss: np.ndarray
    acc: np.ndarray
    asr: np.ndarray


class Moved(NamedTuple):
    """How far a weight array is from where it was.

    Attributes:
        difference: now minus before.
        distance: its Frobenius norm over that of the weights before.
        cosine: of now and before; 0 where one of them is zero.
    """

    difference: np.ndarray
    distance: float
    cosine: float


@jax.jit
def _judge(
    classifier: Classifier,
    variables: Variables,
    images: jax.Array,
    triggered: jax.Array,
    data: Dataset,
    wanted: jax.Array,
) -> jax.Array:
    def chunk(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = classifier.logits(variables, images)
        finite = jnp.isfinite(logits).all(-1)
        return cross_entropy(logits, labels), jnp.where(finite, jnp.argmax(logits, -1) == labels, jnp.nan)

    clean_loss, right = map_chunks(chunk, images, data.labels)
    backdoor_loss, obeyed = map_chunks(chunk, triggered, wanted)
    counted = data.labels != wanted
    return jnp.stack(
        [
            jnp.mean(clean_loss),
            jnp.mean(backdoor_loss, where=counted),
            jnp.mean(right),
            jnp.mean(obeyed, where=counted),
        ]
    )


def along(
    classifier: Classifier,
    start: Variables,
    end: Variables,
    test: Dataset,
    trigger: Trigger,
    label_map: LabelMap,
    positions: Sequence[float] = POSITIONS,
) -> Line:
    """Judges the models on the line from ``start`` to ``end`` and beyond.

    Args:
        classifier: the network of both.
        start: variables at 0, such as the victim's.
        end: variables at 1, such as a repaired model's; without bounds, which are no point of a line.
        test: clean test images.
        trigger: the attacker's.
        label_map: the attacker's.
        positions: where to look.

    Raises:
        UserError: where the two models have other variables than one another, or no image counts for the attack.
    """
    if jax.tree.map(jnp.shape, start) != jax.tree.map(jnp.shape, end):
        raise UserError("the two models have different variables; give two of one network, both without bounds")
    wanted = label_map(test.labels)
    if not bool(jnp.any(wanted != test.labels)):
        raise UserError("no test image is outside the target class, so there is no backdoor loss; give more images")
    triggered = trigger(test.images)
    found = []
    for position in positions:
        there = between(start, end, position)
        found.append(np.asarray(_judge(classifier, there, test.images, triggered, test, wanted)))
    return Line(np.asarray(positions, np.float64), *np.stack(found, axis=1))


def between(start: Variables, end: Variables, position: float) -> Variables:
    """The model at a place of the line.

    Example:
        >>> at = lambda weight, var: {"params": {"w": jnp.float32(weight)}, "batch_stats": {"var": jnp.float32(var)}}
        >>> there = between(at(1, 4), at(3, 1), 2.0)
        >>> float(there["params"]["w"]), round(float(there["batch_stats"]["var"]), 3)
        (5.0, 0.25)
    """
    small = 1e-5  # As normalisation adds it; a variance may be 0.

    def meet(path: jax.tree_util.KeyPath, a: jax.Array, b: jax.Array) -> jax.Array:
        t = jnp.asarray(position, a.dtype)
        if path[0].key == "batch_stats" and path[-1].key == "var":
            return jnp.maximum((a + small) ** (1 - t) * (b + small) ** t - small, 0)
        return a + t * (b - a)

    return jax.tree_util.tree_map_with_path(meet, start, end)


def moved(before: Variables, after: Variables, path: tuple[str, ...]) -> Moved:
    """How far the parameter array at a path has gone.

    Raises:
        UserError: where there is no array in one of the two, or not of one shape.

    Example:
        >>> at = lambda *w: {"params": {"linear": {"kernel": np.array(w)}}}
        >>> found = moved(at(3.0, 4.0), at(-3.0, -4.0), ("linear", "kernel"))
        >>> found.distance, found.cosine
        (2.0, -1.0)
    """
    found = [flatten_dict(variables["params"]).get(path) for variables in (before, after)]
    if any(leaf is None for leaf in found):
        raise UserError(f"no parameters at {'/'.join(path)!r} in both models; give the path of an array")
    one, other = (np.asarray(leaf, np.float64) for leaf in found)
    if one.shape != other.shape:
        raise UserError(f"{'/'.join(path)!r} has shapes {one.shape} and {other.shape}; give two models of one network")
    difference, norm = other - one, float(np.linalg.norm(one))
    distance = float(np.linalg.norm(difference))
    return Moved(difference, distance / norm if norm else float(distance > 0), cosine(one.ravel(), other.ravel()))


def embedding(*latents: jax.Array | np.ndarray) -> list[np.ndarray]:
    """Sets of latents ``(N, D)`` in the plane of the two principal components of all of them together, ``(N, 2)`` each.

    A component points to where its largest entry is positive, so that figures can be compared.

    Example:
        >>> one, other = embedding(np.eye(3) * 2, np.eye(3))
        >>> one.shape, other.shape
        ((3, 2), (3, 2))
    """
    arrays = [np.asarray(part, np.float64) for part in latents]
    if not arrays or any(part.ndim != 2 or part.shape[1] != arrays[0].shape[1] for part in arrays):
        raise UserError(f"latents have shapes {[part.shape for part in arrays]}, expected (N, D) with one D")
    if arrays[0].shape[1] < 2:
        raise UserError("latents of one entry have no plane; give (N, D) with D of at least 2")
    centre = np.concatenate(arrays).mean(0)
    _, _, rows = np.linalg.svd(np.concatenate(arrays) - centre, full_matrices=False)
    axes = rows[:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    return [(part - centre) @ axes.T for part in arrays]
