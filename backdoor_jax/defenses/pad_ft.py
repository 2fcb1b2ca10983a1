r"""PAD-FT (Xu, Gu, Sakurai, arXiv 2409.12072): purify the poisoned training set, clip activations, tune the classifier.

The defender has the victim and its poisoned training set, and no clean data. Three stages, each public:

1. `purify`: score every training image by its symmetric cross-entropy under the victim (eq. 1) and keep the k images of
   each labeled class with the smallest score: those that the model finds easiest are assumed to be clean.
2. `bound_activations` (eq. 2; the file `bounds`): one upper bound per channel after every rectifier, as low as the
   purified images allow.
3. `tune_classifier` (eqs. 3, 4): only the head is tuned, on augmented views of the purified images under the clipped
   network, with symmetric cross-entropy and consistency between an image and its views,

   .. math:: \min_{W, b}\ \mathrm{SCE} + \gamma\, \mathrm{E}\,\|p(x) - p(x')\|^2 .

   The network below the head is frozen, so the latents of all views are computed once and reused.

`PAD` is the first two stages alone, as in the paper's tables.

Sources. The paper's text gives the stages, the augmentations (flip, brightness, contrast), "the default settings of the
benchmark" and, in its table III, sizes of the purified set (2,000 to 3,000 of 50,000 images were best). Its equations
were not available to us: alpha, log 0, gamma, the strengths of augmentation and the number of views are ours. On the
bounds PAD-FT says only "as in" MM-BD, and that they start at "very large values"; `bounds` says how they are made here.

A limit that follows from the math: for one-hot labels SCE falls strictly with p_y, so it ranks images as p_y does for
any alpha and log 0, and a poisoned image has p_target close to 1. In the target class the easiest images can be the
poisoned ones.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> training_set = digits().train.take(slice(200))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), training_set.images)
    >>> defense = PADFT(per_class=5, bound_epochs=1, tune_epochs=1)
    >>> defense.repair(jax.random.key(1), classifier, victim, training_set).info["purified"]
    50
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Lt
from jax.tree_util import Partial

from backdoor_jax.compiling import jit
from backdoor_jax.config import Count, Decay, LearningRate, Momentum, NonNegative
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.defenses.base import Defense, Needs, Repair
from backdoor_jax.defenses.bounds import MMBM_PLACES, BoundConfig, bound_activations, require_rectifiers
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import (
    SGD,
    Cosine,
    GradientStep,
    LossResult,
    batch_shape,
    fit,
    latents,
    run_chunks,
    symmetric_cross_entropy,
)
from backdoor_jax.validation import checked


@dataclasses.dataclass(frozen=True)
class PAD(BoundConfig, Defense):
    """The first two stages; the settings of the second are `BoundConfig`'s.

    The presets are ``all``, every rectifier (the default), and ``mmbm``, MM-BM's three places and weight.

    Attributes:
        per_class: k, images kept of each labeled class; by default 6 % of the training set over all classes, table
            III's 3,000 of 50,000.
        alpha: weight of the reverse cross-entropy; 1, ours. It cannot change which images are kept.
        log_zero: A, the value that replaces log 0; -4, ours. It cannot change which images are kept either.
    """

    name: ClassVar[str] = "pad"
    summary: ClassVar[str] = "purify the training set and clip activations"
    needs: ClassVar[Needs] = "training_set"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "all": {},
        "mmbm": {"places": MMBM_PLACES, "bound_weight": 0.5},
    }

    per_class: Count | None = None
    alpha: NonNegative = 1.0
    log_zero: Annotated[float, Lt(0)] = -4.0

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Purifies and clips, and leaves the weights as they are.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: the poisoned training set.

        Returns:
            The victim's variables with ``bounds``; ``kept`` are the images assumed to be clean.

        Raises:
            UserError: where the network has no rectifier that can be bounded, a named place does not exist, or a class
                has no images.
            NonFiniteError: where a score is not finite.
        """
        require_rectifiers(classifier, variables, data.images)
        purified = purify(classifier, variables, data, self)
        clean = data.take(purified.indices)
        repaired, info = bound_activations(key, classifier, variables, clean, self)
        info = {"steps": 0, "purified": len(clean), "short_classes": list(purified.short), **info}
        return Repair(repaired, kept=purified.indices, info=info)


@dataclasses.dataclass(frozen=True)
class PADFT(PAD):
    """All three stages.

    Attributes:
        views: augmented views of each purified image; 4, ours.
        flip: mirror half of the views, as in the paper, which is right only where a mirrored image keeps its class; off
            by default, and in an experiment set as its data allow.
        brightness: the brightness is multiplied by a factor in 1 +- this; 0.2, ours.
        contrast: the contrast is multiplied by a factor in 1 +- this; 0.2, ours.
        consistency: gamma; 1, ours. The distance is between softmax outputs (the paper: "predictions").
        tune_epochs: 100, the benchmark's default.
        batch_size: images in a step, each with all its views; 256, the benchmark's.
        learning_rate: 0.01 under a cosine, the benchmark's.
        momentum: 0.9, the benchmark's.
        weight_decay: 5e-4, the benchmark's.
    """

    name: ClassVar[str] = "pad_ft"
    summary: ClassVar[str] = "purify, clip activations, tune the classifier"
    limits: ClassVar[str] = "it trusts the images that the victim finds easiest, and poisoned images are easy"
    mirrors: ClassVar[bool] = True

    views: Count = 4
    flip: bool | None = None
    brightness: NonNegative = 0.2
    contrast: NonNegative = 0.2
    consistency: NonNegative = 1.0
    tune_epochs: Count = 100
    batch_size: Count = 256
    learning_rate: LearningRate = 0.01
    momentum: Momentum = 0.9
    weight_decay: Decay = 5e-4

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Purifies, clips and tunes the head.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: the poisoned training set.

        Returns:
            The repaired model with ``bounds``; ``kept`` are the images assumed to be clean.

        Raises:
            UserError: where the network has no rectifier that can be bounded, a named place does not exist, or a class
                has no images.
            NonFiniteError: where a score is not finite, or the tuning diverges.
        """
        bound_key, tune_key = jax.random.split(key)
        clipped = super().repair(bound_key, classifier, variables, data)
        assert clipped.kept is not None
        repaired, info = tune_classifier(tune_key, classifier, clipped.variables, data.take(clipped.kept), self)
        return dataclasses.replace(clipped, variables=repaired, info={**clipped.info, **info})


class Purified(NamedTuple):
    """Which images purification keeps.

    Attributes:
        indices: into the training set, sorted.
        scores: ``(N,)``, the symmetric cross-entropy of every training image.
        short: classes that have fewer than k images, all of which were kept.
    """

    indices: np.ndarray
    scores: np.ndarray
    short: tuple[int, ...]


def score(
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    alpha: jax.Array | float = 1.0,
    log_zero: jax.Array | float = -4.0,
) -> np.ndarray:
    """Symmetric cross-entropy ``(N,)`` of every image under its label."""
    program = partial(_score, classifier, variables, alpha, log_zero)
    scores: np.ndarray = run_chunks(program, data.images, data.labels, name="pad_ft scores")
    return scores


@jit
def _score(
    classifier: Classifier,
    variables: Variables,
    alpha: jax.Array | float,
    log_zero: jax.Array | float,
    images: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    one = jax.vmap(symmetric_cross_entropy, in_axes=(0, 0, None, None))
    return one(classifier.logits(variables, images)[0], labels, alpha, log_zero)


@checked
def purify(classifier: Classifier, variables: Variables, data: Dataset, config: PAD = PAD()) -> Purified:
    """Stage 1: the k images of each labeled class that the victim finds easiest.

    Args:
        classifier: the network.
        variables: the victim's.
        data: the poisoned training set.
        config: settings.

    Raises:
        NonFiniteError: where a score is not finite.
        UserError: where a class has no images at all.
    """
    scores = score(classifier, variables, data, config.alpha, config.log_zero)
    if not np.isfinite(scores).all():
        raise NonFiniteError(
            "pad_ft purify: scores are not finite; the victim's weights are damaged or its logits overflow"
        )
    labels = np.asarray(data.labels)
    counts = np.bincount(labels, minlength=classifier.num_classes)
    if not counts.all():
        raise UserError(
            f"pad_ft purify: class {int(np.argmin(counts))} has no images in the training set; give the complete set "
            "that the victim was trained on"
        )
    k = config.per_class or max(1, round(0.06 * len(data) / classifier.num_classes))
    order = np.argsort(scores, kind="stable")
    kept = [order[labels[order] == c][:k] for c in range(classifier.num_classes)]
    return Purified(np.sort(np.concatenate(kept)), scores, tuple(np.flatnonzero(counts < k).tolist()))


def classifier_loss(
    classifier: Classifier, config: PADFT, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    """SCE on every view plus consistency of the views with their image.

    Args:
        classifier: the network.
        config: gives ``alpha``, ``log_zero`` and ``consistency``.
        variables: the model's.
        batch: latents ``(B, 1 + views, D)`` in place of images, and labels.
        key: not used.
    """
    del key
    logits = jax.vmap(lambda latent: classifier.head(variables, latent))(batch.images)
    labels = jnp.broadcast_to(batch.labels[:, None], logits.shape[:2])
    supervised = jnp.mean(symmetric_cross_entropy(logits, labels, config.alpha, config.log_zero))
    predictions = jax.nn.softmax(logits)
    distance = jnp.mean(jnp.sum((predictions[:, 1:] - predictions[:, :1]) ** 2, axis=-1))
    accuracy = jnp.mean(jnp.argmax(logits[:, 0], -1) == batch.labels)
    info = {"supervised": supervised, "consistency": distance, "accuracy": accuracy}
    return supervised + config.consistency * distance, (variables, info)


def view_latents(
    key: jax.Array, classifier: Classifier, variables: Variables, images: jax.Array, config: PADFT
) -> jax.Array:
    """Latents of each image and of its augmented views under the frozen network: ``(n, 1 + views, D)``."""
    augment = Augment(flip=bool(config.flip), brightness=config.brightness, contrast=config.contrast)
    views = [images, *(augment(view_key, images) for view_key in jax.random.split(key, config.views))]
    return jnp.stack([latents(classifier, variables, view) for view in views], axis=1)


@checked
def tune_classifier(
    key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset, config: PADFT = PADFT()
) -> tuple[Variables, dict[str, Any]]:
    """Stage 3: tunes the head alone, on latents computed once.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the clipped victim's; left as they are.
        data: images assumed to be clean, with labels.
        config: settings.

    Returns:
        The variables with a new head, all else untouched, and what happened.

    Raises:
        NonFiniteError: where the tuning diverges, naming the step.
    """
    view_key, fit_key = jax.random.split(key)
    seen = view_latents(view_key, classifier, variables, data.images, config)
    steps, _ = batch_shape(len(data), config.batch_size)
    schedule = Cosine(steps * config.tune_epochs)
    optimizer = SGD(config.learning_rate, schedule, config.momentum, config.weight_decay)
    step = GradientStep(Partial(classifier_loss, classifier, config), optimizer, trainable=(classifier.head_path,))
    fitted = fit(
        fit_key,
        step,
        step.init(variables),
        Dataset(seen, data.labels),
        epochs=config.tune_epochs,
        batch_size=config.batch_size,
        name="pad_ft classifier",
    )
    return fitted.variables, fitted.info
