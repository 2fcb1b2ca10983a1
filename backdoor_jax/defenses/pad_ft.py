r"""PAD-FT (Xu, Gu, Sakurai, arXiv 2409.12072): purify the poisoned training set, clip activations, tune the classifier.

The defender has the victim and its poisoned training set, and no clean data. Three stages, each public:

1. `purify`: score every training image with the symmetric cross-entropy under the victim (eq. 1) and keep, of each
   labelled class, the k smallest: the images the model finds easiest are taken to be clean.
2. `bound_activations` (eq. 2; the file `bounds`): one upper bound per channel after every rectifier, as low as the
   purified images allow.
3. `tune_classifier` (eqs. 3, 4): only the head is tuned, on augmented views of the purified images under the clipped
   network, with symmetric cross-entropy and consistency between an image and its views,

   .. math:: \min_{W, b}\ \mathrm{SCE} + \gamma\, \mathrm{E}\,\|p(x) - p(x')\|^2 .

   The network below the head is frozen, so the latents of all views are computed once and reused.

``pad`` is the first two stages alone, as in the paper's tables.

Sources. The paper's text gives the stages, the augmentations (flip, brightness, contrast), "the default settings of the
benchmark" and, in its table III, sizes of the purified set (2,000 to 3,000 of 50,000 images were best). Its equations
are lost to us: alpha, log 0, gamma, strengths of augmentation and number of views are ours. Of the bounds PAD-FT says
only "as in" MM-BD, and that they start at "very large values"; `bounds` says what was made of that.

A limit that follows from the maths: for one-hot labels SCE falls strictly with p_y, so it ranks as p_y does whatever
alpha and log 0 are, and a poisoned image has p_target close to 1. In the target class the easiest images can be the
poisoned ones.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> training_set = digits().train.take(slice(200))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), training_set.images)
    >>> config = PadFtConfig(per_class=5, bound_epochs=1, tune_epochs=1)
    >>> pad_ft(jax.random.key(1), classifier, victim, training_set, config).info["purified"]
    50
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.compiling import jit
from backdoor_jax.config import from_preset, numbers
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.defenses.base import Defense, Repair
from backdoor_jax.defenses.bounds import MMBM_PLACES, BoundConfig, bound_activations, require_rectifiers
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import (
    Constants,
    CosineSGD,
    GradientStep,
    Info,
    batch_shape,
    descend,
    latents,
    map_chunks,
    symmetric_cross_entropy,
)


@dataclasses.dataclass(frozen=True)
class PadConfig(BoundConfig):
    """Settings of the first two stages; the second's are `BoundConfig`'s.

    Attributes:
        per_class: k, images kept of each labelled class; by default 6 % of the training set over all classes, table
            III's 3,000 of 50,000.
        alpha: weight of the reverse cross-entropy; 1, ours. It cannot change which images are kept.
        log_zero: A, what log 0 is set to; -4, ours. Nor can it.
    """

    per_class: int | None = None
    alpha: float = 1.0
    log_zero: float = -4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.per_class is None or self.per_class > 0, "per_class", "at least 1 image, or null")
        self.require(self.alpha >= 0, "alpha", "0 or more")
        self.require(self.log_zero < 0, "log_zero", "a negative number")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """``all``: every rectifier, the default; or ``mmbm``: MM-BM's three places and weight; with changes.

        Raises:
            UserError: for an unknown name.
        """
        presets: dict[str, dict[str, Any]] = {"all": {}, "mmbm": {"places": MMBM_PLACES, "bound_weight": 0.5}}
        return from_preset(cls, "pad", presets, name, changes)


@dataclasses.dataclass(frozen=True)
class PadFtConfig(PadConfig):
    """Settings of all three stages.

    Attributes:
        views: augmented views of each purified image; 4, ours.
        flip: mirror half of the views, as the paper; only where a mirrored image keeps its class. By default not, and
            in an experiment as its data ask for.
        brightness: factor 1 +- that; 0.2, ours.
        contrast: likewise; 0.2, ours.
        consistency: gamma; 1, ours. The distance is between softmax outputs (the paper: "predictions").
        tune_epochs: 100, the benchmark's default.
        batch_size: images in a step, each with all its views; 256, the benchmark's.
        learning_rate: 0.01 under a cosine, the benchmark's.
        momentum: 0.9, the benchmark's.
        weight_decay: 5e-4, the benchmark's.
    """

    views: int = 4
    flip: bool | None = None
    brightness: float = 0.2
    contrast: float = 0.2
    consistency: float = 1.0
    tune_epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.views > 0, "views", "at least 1")
        self.require(self.consistency >= 0, "consistency", "0 or more")
        self.require(self.tune_epochs > 0, "tune_epochs", "at least 1")
        self.require(self.batch_size > 0, "batch_size", "at least 1")
        self.require(self.learning_rate > 0, "learning_rate", "a positive number")


class Purified(NamedTuple):
    """What purification kept.

    Attributes:
        indices: into the training set, sorted.
        scores: ``(N,)``, the symmetric cross-entropy of every training image.
        short: classes that have fewer than k images, all of which were kept.
    """

    indices: np.ndarray
    scores: np.ndarray
    short: tuple[int, ...]


@jit
def score(
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    alpha: jax.Array | float = 1.0,
    log_zero: jax.Array | float = -4.0,
) -> jax.Array:
    """Symmetric cross-entropy ``(N,)`` of every image under its label: one chunk program, vmapped per sample."""
    one = jax.vmap(symmetric_cross_entropy, in_axes=(0, 0, None, None))

    def chunk(images: jax.Array, labels: jax.Array) -> jax.Array:
        return one(classifier.logits(variables, images)[0], labels, alpha, log_zero)

    return map_chunks(chunk, data.images, data.labels)


def purify(classifier: Classifier, variables: Variables, data: Dataset, config: PadConfig = PadConfig()) -> Purified:
    """Stage 1: the k images of each labelled class that the victim finds easiest.

    Args:
        classifier: the network.
        variables: the victim's.
        data: the poisoned training set.
        config: settings.

    Raises:
        NonFiniteError: where a score is not finite.
        UserError: where a class has no images at all.
    """
    scores = np.asarray(score(classifier, variables, data, config.alpha, config.log_zero))
    if not np.isfinite(scores).all():
        raise NonFiniteError(
            "pad_ft purify: scores are not finite; the victim's weights are damaged or its logits overflow"
        )
    labels = np.asarray(data.labels)
    counts = np.bincount(labels, minlength=classifier.num_classes)
    if not counts.all():
        raise UserError(
            f"pad_ft purify: class {int(np.argmin(counts))} has no images in the training set; give the whole set the "
            "victim was trained on"
        )
    k = config.per_class or max(1, round(0.06 * len(data) / classifier.num_classes))
    order = np.argsort(scores, kind="stable")
    kept = [order[labels[order] == c][:k] for c in range(classifier.num_classes)]
    return Purified(np.sort(np.concatenate(kept)), scores, tuple(np.flatnonzero(counts < k).tolist()))


@dataclasses.dataclass(frozen=True)
class ClassifierLoss:
    """SCE on every view plus consistency of the views with their image; batches hold latents ``(B, 1 + views, D)``."""

    classifier: Classifier

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key
        logits = jax.vmap(lambda latent: self.classifier.head(variables, latent))(batch.images)
        labels = jnp.broadcast_to(batch.labels[:, None], logits.shape[:2])
        supervised = jnp.mean(symmetric_cross_entropy(logits, labels, constants["alpha"], constants["log_zero"]))
        predictions = jax.nn.softmax(logits)
        apart = jnp.mean(jnp.sum((predictions[:, 1:] - predictions[:, :1]) ** 2, axis=-1))
        accuracy = jnp.mean(jnp.argmax(logits[:, 0], -1) == batch.labels)
        info = {"supervised": supervised, "consistency": apart, "accuracy": accuracy}
        return supervised + constants["consistency"] * apart, (variables, info)


def view_latents(
    key: jax.Array, classifier: Classifier, variables: Variables, images: jax.Array, config: PadFtConfig
) -> jax.Array:
    """Latents of each image and of its augmented views under the frozen network: ``(n, 1 + views, D)``."""
    augment = Augment(flip=bool(config.flip), brightness=config.brightness, contrast=config.contrast)
    views = [images, *(augment(view_key, images) for view_key in jax.random.split(key, config.views))]
    return jnp.stack([latents(classifier, variables, view) for view in views], axis=1)


def tune_classifier(
    key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset, config: PadFtConfig = PadFtConfig()
) -> tuple[Variables, dict[str, Any]]:
    """Stage 3: tunes the head alone, on latents computed once.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the clipped victim's; left as they are.
        data: images taken to be clean, with labels.
        config: settings.

    Returns:
        The variables with a new head, all else untouched, and what happened.
    """
    view_key, fit_key = jax.random.split(key)
    seen = view_latents(view_key, classifier, variables, data.images, config)
    steps, _ = batch_shape(len(data), config.batch_size)
    step = GradientStep(
        ClassifierLoss(classifier), CosineSGD(steps * config.tune_epochs), trainable=(classifier.head_path,)
    )
    return descend(
        fit_key,
        step,
        variables,
        Dataset(seen, data.labels),
        numbers(config),
        epochs=config.tune_epochs,
        batch_size=config.batch_size,
        name="pad_ft classifier",
    )


def pad(
    key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset, config: PadConfig = PadConfig()
) -> Repair:
    """Purifies and clips, and leaves the weights as they are.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: the poisoned training set.
        config: settings.

    Returns:
        The victim's variables with ``bounds``; ``info["purified_indices"]`` are those kept.
    """
    require_rectifiers(classifier, variables, data.images)
    purified = purify(classifier, variables, data, config)
    clean = data.take(purified.indices)
    repaired, info = bound_activations(key, classifier, variables, clean, config)
    kept = {"purified": len(clean), "short_classes": list(purified.short), "purified_indices": purified.indices}
    return Repair(repaired, {"changed": True, "steps": 0, **kept, **info})


def pad_ft(
    key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset, config: PadFtConfig = PadFtConfig()
) -> Repair:
    """Purifies, clips and tunes the head.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: the poisoned training set.
        config: settings.

    Returns:
        The repaired model with ``bounds``; ``info["purified_indices"]`` are the images that were kept.
    """
    bound_key, tune_key = jax.random.split(key)
    clipped = pad(bound_key, classifier, variables, data, config)
    clean = data.take(clipped.info["purified_indices"])
    repaired, info = tune_classifier(tune_key, classifier, clipped.variables, clean, config)
    return Repair(repaired, {**clipped.info, **info})


PAD = Defense("purify the training set and clip activations", "training_set", PadConfig, pad)
PAD_FT = Defense("purify, clip activations, tune the classifier", "training_set", PadFtConfig, pad_ft)
