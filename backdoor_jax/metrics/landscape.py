r"""The loss landscape around a repair, as D3 analyzes it (Wei, Liu, Zha, ICCV 2025, arXiv 2411.09585).

The paper argues that fine-tuning stays in a valley where clean and backdoor loss are both low. `loss_along_line`
measures both losses and both rates on the straight line from one model to another and beyond,

.. math:: \theta(t) = \theta_0 + t\,(\theta_1 - \theta_0),

with t = 0 at the first model and 1 at the second. `weight_change` measures how far selected weights are from where they
were, and `embedding` projects latents to 2-D. The paper's ranges and projection are not known to us, so these are our
choice: the running means of normalization are interpolated like the weights, the variances geometrically, so that they
stay positive beyond the two models; latents are projected onto their two principal components.

    >>> from backdoor_jax import build_classifier, digits
    >>> test, classifier = digits().test.take(slice(20)), build_classifier("small_cnn", 10, width=2)
    >>> start, end = (classifier.init(jax.random.key(seed), test.images) for seed in (0, 1))
    >>> label_map = LabelMap("all_to_one", 10)
    >>> line = loss_along_line(classifier, start, end, test, lambda images: 255 - images, label_map, (0.0, 1.5))
    >>> line.positions.tolist(), line.clean_loss.shape
    ([0.0, 1.5], (2,))
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from backdoor_jax.arguments import typed
from backdoor_jax.data import Dataset, LabelMap, Trigger, triggered
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.metrics.latent import cosine
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import cross_entropy, map_chunks
from backdoor_jax.validation import checked

POSITIONS = tuple(step / 10 for step in range(21))
"""From the first model past the second, to twice the distance between them."""


class Line(NamedTuple):
    """Losses and rates of the models along a line, ``(P,)`` each.

    Attributes:
        positions: t.
        clean_loss: mean cross-entropy of clean images.
        backdoor_loss: mean cross-entropy of triggered images under the target label; images of the target class are
            left out.
        acc: share of clean images classified correctly.
        asr: share of triggered images classified as the target, images of the target class left out.
    """

    positions: np.ndarray
    clean_loss: np.ndarray
    backdoor_loss: np.ndarray
    acc: np.ndarray
    asr: np.ndarray


class WeightChange(NamedTuple):
    """How a weight array changed.

    Attributes:
        difference: after minus before.
        distance: the Frobenius norm of the difference over that of the weights before.
        cosine: of the weights after and before; 0 where one of them is zero.
    """

    difference: np.ndarray
    distance: float
    cosine: float


@jax.jit
def _evaluate_model(
    classifier: Classifier,
    variables: Variables,
    images: jax.Array,
    triggered: jax.Array,
    data: Dataset,
    targets: jax.Array,
) -> jax.Array:
    """Clean loss, backdoor loss, ACC and ASR of one model."""

    def chunk(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = classifier.logits(variables, images)
        finite = jnp.isfinite(logits).all(-1)
        return cross_entropy(logits, labels), jnp.where(finite, jnp.argmax(logits, -1) == labels, jnp.nan)

    clean_loss, correct = map_chunks(chunk, images, data.labels)
    backdoor_loss, hit = map_chunks(chunk, triggered, targets)
    counted = data.labels != targets
    return jnp.stack(
        [
            jnp.mean(clean_loss),
            jnp.mean(backdoor_loss, where=counted),
            jnp.mean(correct),
            jnp.mean(hit, where=counted),
        ]
    )


@checked
def loss_along_line(
    classifier: Classifier,
    start: Variables,
    end: Variables,
    test: Dataset,
    trigger: Trigger,
    label_map: LabelMap,
    positions: Sequence[float] = POSITIONS,
) -> Line:
    """Evaluates the models on the line from ``start`` to ``end`` and beyond.

    Args:
        classifier: the network of both.
        start: variables at t = 0, such as the victim's.
        end: variables at t = 1, such as a repaired model's; without bounds, which cannot be interpolated.
        test: clean test images.
        trigger: the attacker's.
        label_map: the attacker's.
        positions: the values of t.

    Raises:
        UserError: where the two models' variables have different shapes, or no image counts for the attack.
        NonFiniteError: where a logit is not finite.
    """
    if not len(positions):
        raise UserError("loss_along_line: positions are none; give some, such as (0.0, 0.5, 1.0)")
    if jax.tree.map(jnp.shape, start) != jax.tree.map(jnp.shape, end):
        raise UserError("the two models have different variables; give two of one network, both without bounds")
    targets = label_map(test.labels)
    if not bool(jnp.any(targets != test.labels)):
        raise UserError("no test image is outside the target class, so there is no backdoor loss; give more images")
    seen = triggered(trigger, test.images)
    found = []
    for position in positions:
        model = interpolate(start, end, position)
        values = np.asarray(_evaluate_model(classifier, model, test.images, seen, test, targets))
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"loss_along_line: logits at position {position:g} are not finite; give positions between the models"
            )
        found.append(values)
    return Line(np.asarray(positions, np.float64), *np.stack(found, axis=1))


def interpolate(start: Variables, end: Variables, position: float) -> Variables:
    """The variables at a position t on the line.

    Example:
        >>> at = lambda weight, var: {"params": {"w": jnp.float32(weight)}, "batch_stats": {"var": jnp.float32(var)}}
        >>> beyond = interpolate(at(1, 4), at(3, 1), 2.0)
        >>> float(beyond["params"]["w"]), round(float(beyond["batch_stats"]["var"]), 3)
        (5.0, 0.25)
    """
    small = 1e-5  # As normalization adds it; a variance may be 0.

    def combine(path: jax.tree_util.KeyPath, a: jax.Array, b: jax.Array) -> jax.Array:
        t = jnp.asarray(position, a.dtype)
        if path[0].key == "batch_stats" and path[-1].key == "var":
            return jnp.maximum((a + small) ** (1 - t) * (b + small) ** t - small, 0)
        return a + t * (b - a)

    return jax.tree_util.tree_map_with_path(combine, start, end)


@checked
def weight_change(before: Variables, after: Variables, path: tuple[str, ...]) -> WeightChange:
    """Measures how far the parameter array at a path has moved.

    Args:
        before: variables before the change.
        after: variables after it.
        path: names down to an array in ``params``, such as ``("linear", "kernel")``.

    Raises:
        UserError: where one of the two has no array at the path, or their shapes differ.

    Example:
        >>> at = lambda *w: {"params": {"linear": {"kernel": np.array(w)}}}
        >>> found = weight_change(at(3.0, 4.0), at(-3.0, -4.0), ("linear", "kernel"))
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
    return WeightChange(
        difference, distance / norm if norm else float(distance > 0), cosine(one.ravel(), other.ravel())
    )


@typed
def embedding(*latents: jax.Array | np.ndarray, method: Literal["pca", "tsne"] = "pca") -> list[np.ndarray]:
    """Brings sets of latents to two dimensions, all of them together.

    ``pca`` projects them onto their two principal components; the sign of a component is chosen such that its largest
    entry is positive, so that figures can be compared. ``tsne`` is scikit-learn's t-SNE with its defaults, as D3 draws
    latents (its perplexity of 30 where there are more than 90 of them, else a third), started from the principal
    components and the same in every run; only who is near whom means something there, not distances.

    Args:
        latents: sets of ``(N, D)`` with one D, at least two rows in all, for t-SNE at least four.
        method: ``pca`` or ``tsne``.

    Returns:
        The sets in 2-D, ``(N, 2)`` each.

    Raises:
        UserError: for latents of other shapes, or another method.
        NonFiniteError: for latents that are not finite.

    Example:
        >>> one, other = embedding(np.eye(3) * 2, np.eye(3))
        >>> one.shape, other.shape
        ((3, 2), (3, 2))
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method not in ("pca", "tsne"):
        raise UserError(f"unknown method {method!r}; known are pca, tsne")
    arrays = [np.asarray(part, np.float64) for part in latents]
    if not arrays or any(part.ndim != 2 or part.shape[1] != arrays[0].shape[1] for part in arrays):
        raise UserError(f"latents have shapes {[part.shape for part in arrays]}, expected (N, D) with one D")
    if not all(np.isfinite(part).all() for part in arrays):
        raise NonFiniteError("latents are not finite, so they cannot be projected; check the checkpoint")
    together = np.concatenate(arrays)
    if min(together.shape) < 2:
        raise UserError(f"latents {together.shape} have no two components; give at least 2 rows and 2 columns")
    if method == "pca":
        components = PCA(2, svd_solver="full").fit(together)
        return [components.transform(part) for part in arrays]
    if len(together) < 4:
        raise UserError(f"t-SNE of {len(together)} latents shows nothing; give at least 4, or use pca")
    points = TSNE(perplexity=min(30, (len(together) - 1) / 3), random_state=0).fit_transform(together)
    return np.split(points, np.cumsum([len(part) for part in arrays])[:-1])
