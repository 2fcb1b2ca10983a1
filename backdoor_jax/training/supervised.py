"""Supervised training from scratch: victims and clean models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial

from backdoor_jax.config import Config, Count, Decay, LearningRate, Momentum, NonNegative, Whole
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training.engine import GradientStep, Loss, LossResult, batch_shape
from backdoor_jax.training.engine import Path as TreePath
from backdoor_jax.training.fitting import Fitted, fit, fit_many, stack, unstack
from backdoor_jax.training.losses import cross_entropy
from backdoor_jax.training.optimizers import SGD, Cosine, Optimizer
from backdoor_jax.training.sam import SharpnessAwareStep
from backdoor_jax.validation import checked


@dataclasses.dataclass(frozen=True)
class EpochsConfig(Config):
    """What every training by epochs has.

    Attributes:
        epochs: passes over the training set.
        batch_size: see `backdoor_jax.training.batch_shape`.
        learning_rate: of the optimizer.
    """

    epochs: Count = 100
    batch_size: Count = 128
    learning_rate: LearningRate = 0.01


@dataclasses.dataclass(frozen=True)
class TrainConfig(EpochsConfig):
    """How a model is trained from scratch; the benchmark's settings for CIFAR-10.

    Attributes:
        epochs: passes over the training set; published 100 (CIFAR), 50 (GTSRB).
        batch_size: published 128.
        learning_rate: published 0.01, annealed by a cosine once an epoch.
        momentum: published 0.9.
        weight_decay: published 5e-4, on every parameter.
        crop: zeros padded before a random crop; published 4.
        sam_radius: radius of adaptive sharpness-aware minimization, for an attacker who expects fine-tuning (D3,
            section on adaptive attacks: 1 and 3); 0 is plain training.
    """

    epochs: Count = 100
    batch_size: Count = 128
    learning_rate: LearningRate = 0.01
    momentum: Momentum = 0.9
    weight_decay: Decay = 5e-4
    crop: Whole = 4
    sam_radius: NonNegative = 0.0

    def optimizer(self, images: int, epochs: int | None = None) -> SGD:
        """SGD under a cosine over all steps on so many images, or over the steps of other epochs."""
        epochs = self.epochs if epochs is None else epochs
        steps, _ = batch_shape(images, self.batch_size)
        return SGD(self.learning_rate, Cosine(steps * epochs, epochs), self.momentum, self.weight_decay)

    def step(self, loss: Loss, optimizer: Optimizer, trainable: tuple[TreePath, ...] = ((),)) -> GradientStep:
        """The step that models are trained by: sharpness-aware where a radius is given."""
        if self.sam_radius:
            return SharpnessAwareStep(loss, optimizer, trainable=trainable, radius=self.sam_radius)
        return GradientStep(loss, optimizer, trainable=trainable)


def supervised_loss(classifier: Classifier, variables: Variables, batch: Dataset, key: jax.Array) -> LossResult:
    """Mean cross-entropy of a batch, normalization in training mode; logs ``accuracy``."""
    del key
    logits, variables = classifier.logits(variables, batch.images, train=True)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == batch.labels)
    return jnp.mean(cross_entropy(logits, batch.labels)), (variables, {"accuracy": accuracy})


@checked
def train(
    key: jax.Array,
    classifier: Classifier,
    data: Dataset,
    config: TrainConfig = TrainConfig(),
    *,
    flip: bool = False,
    loss: Loss | None = None,
    name: str = "training",
    checkpoints: Path | None = None,
) -> Fitted:
    """Trains a classifier from scratch.

    Args:
        key: a `jax.random` key; weights, order and augmentation all come from it.
        classifier: what to train.
        data: the (poisoned or clean) training set.
        config: settings.
        flip: whether training mirrors images, as the benchmark does for CIFAR-10.
        loss: replaces the cross-entropy; it then receives the images as they are, and augments them itself.
        name: what progress and errors call the run.
        checkpoints: a folder for Orbax checkpoints; a killed run resumes from there.

    Returns:
        The fit: its ``variables``, and ``history`` with the loss and accuracy of every step run here.

    Raises:
        NonFiniteError: where the training diverges.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data = digits().train.take(slice(64))
        >>> classifier = build_classifier("small_cnn", 10, width=2)
        >>> trained = train(jax.random.key(0), classifier, data, TrainConfig(epochs=1, batch_size=32))
        >>> trained.history["loss"].shape
        (2,)
    """
    init_key, fit_key = jax.random.split(key)
    step = config.step(loss or Partial(supervised_loss, classifier), config.optimizer(len(data)))
    return fit(
        fit_key,
        step,
        step.init(classifier.init(init_key, data.images[:1])),
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        augment=None if loss else Augment(crop=config.crop, flip=flip),
        name=name,
        checkpoints=checkpoints,
    )


@checked
def train_many(
    keys: Sequence[jax.Array],
    classifier: Classifier,
    data: Sequence[Dataset],
    config: TrainConfig = TrainConfig(),
    *,
    flip: bool = False,
    mesh: Mesh | None = None,
    name: str = "training",
    checkpoints: Path | None = None,
) -> list[Variables]:
    """Trains classifiers of one shape at once, each as `train` would have alone.

    Args:
        keys: one a run.
        classifier: what to train.
        data: one training set a run, all of one size.
        config: settings of all.
        flip: see `train`.
        mesh: see `backdoor_jax.training.fit_many`.
        name: see `train`.
        checkpoints: see `train`.

    Returns:
        The runs' variables.

    Raises:
        UserError: for sets of different sizes, or another number of keys.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data = digits().train.take(slice(64))
        >>> classifier = build_classifier("small_cnn", 10, width=2)
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> len(train_many(keys, classifier, [data, data], TrainConfig(epochs=1, batch_size=32)))
        2
    """
    sizes = {own.images.shape for own in data}
    if len(sizes) != 1 or len(data) != len(keys):
        raise UserError(
            f"{len(keys)} keys and sets of shapes {', '.join(map(str, sorted(sizes)))}; give one set of one shape a key"
        )
    step = config.step(Partial(supervised_loss, classifier), config.optimizer(len(data[0])))
    pairs = [jax.random.split(key) for key in keys]
    fitted = fit_many(
        jnp.stack([own[1] for own in pairs]),
        stack([step] * len(keys)),
        stack([step.init(classifier.init(own[0], data[0].images[:1])) for own in pairs]),
        stack(data),
        epochs=config.epochs,
        batch_size=config.batch_size,
        augment=Augment(crop=config.crop, flip=flip),
        mesh=mesh,
        name=name,
        checkpoints=checkpoints,
    )
    return unstack(jax.device_get(fitted.variables))
