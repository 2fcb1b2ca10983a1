"""Plain supervised training: the victim's, and what fine-tuning shares with it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from backdoor_jax.config import Config, numbers
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training.engine import Constants, GradientStep, Info, Loss, batch_shape, fit
from backdoor_jax.training.losses import cross_entropy
from backdoor_jax.training.many import fit_many, stack, unstack
from backdoor_jax.training.sam import SharpnessAwareStep
from backdoor_jax.training.schedules import cosine_in_stages, torch_sgd


@dataclasses.dataclass(frozen=True)
class EpochsConfig(Config):
    """What every training by epochs has.

    Attributes:
        epochs: passes over the training set.
        batch_size: see `backdoor_jax.training.batch_shape`.
        learning_rate: of the optimiser.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.epochs > 0, "epochs", "at least 1")
        self.require(self.batch_size > 0, "batch_size", "at least 1")
        self.require(self.learning_rate > 0, "learning_rate", "a positive number")


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
        sam_radius: radius of adaptive sharpness-aware minimisation, for an attacker who expects fine-tuning (D3,
            section on adaptive attacks: 1 and 3); 0 is plain training.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop: int = 4
    sam_radius: float = 0.0

    @property
    def step(self) -> type[GradientStep]:
        """The kind of step that victims are trained by: sharpness-aware where a radius is given."""
        return SharpnessAwareStep if self.sam_radius else GradientStep

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.crop >= 0, "crop", "0 or more pixels")
        self.require(self.sam_radius >= 0, "sam_radius", "0 or more")


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """Mean cross-entropy of a batch, normalisation in training mode."""

    classifier: Classifier

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key, constants
        logits, variables = self.classifier.logits(variables, batch.images, train=True)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch.labels)
        return jnp.mean(cross_entropy(logits, batch.labels)), (variables, {"accuracy": accuracy})


@dataclasses.dataclass(frozen=True)
class CosineSGD:
    """PyTorch's SGD under a staged cosine; rate, momentum and weight decay come from the constants."""

    steps: int
    stages: int = 100

    def __call__(self, constants: Constants) -> optax.GradientTransformation:
        """The transformation for these constants."""
        schedule = cosine_in_stages(constants["learning_rate"], self.steps, self.stages)
        return torch_sgd(schedule, constants["momentum"], constants["weight_decay"])


def constant_sgd(constants: Constants) -> optax.GradientTransformation:
    """PyTorch's SGD at a constant rate; rate, momentum and weight decay come from the constants."""
    rate = constants["learning_rate"]
    return torch_sgd(lambda count: rate, constants["momentum"], constants["weight_decay"])


def train(
    key: jax.Array,
    classifier: Classifier,
    data: Dataset,
    config: TrainConfig = TrainConfig(),
    *,
    flip: bool = False,
    loss: Loss | None = None,
    constants: Constants | None = None,
    name: str = "training",
    checkpoints: Path | None = None,
) -> tuple[Variables, dict[str, np.ndarray]]:
    """Trains a classifier from scratch.

    Args:
        key: a `jax.random` key; weights, order and augmentation all come from it.
        classifier: what to train.
        data: the (poisoned or clean) training set.
        config: settings.
        flip: whether training mirrors images, as the benchmark does for CIFAR-10.
        loss: stands in for the cross-entropy; it then gets the images as they are, and augments them itself.
        constants: traced values that this loss reads.
        name: what progress and errors call the run.
        checkpoints: a folder for Orbax checkpoints; a killed run resumes from there.

    Returns:
        The variables, and loss and accuracy of every step run here.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data = digits().train.take(slice(64))
        >>> classifier = build_classifier("small_cnn", 10, width=2)
        >>> variables, history = train(jax.random.key(0), classifier, data, TrainConfig(epochs=1, batch_size=32))
        >>> history["loss"].shape
        (2,)
    """
    init_key, fit_key = jax.random.split(key)
    step = _step(loss or SupervisedLoss(classifier), len(data), config)
    constants = {**numbers(config), **(constants or {})}
    state, history = fit(
        fit_key,
        step,
        step.init(classifier.init(init_key, data.images[:1]), constants),
        data,
        constants,
        epochs=config.epochs,
        batch_size=config.batch_size,
        augment=None if loss else Augment(crop=config.crop, flip=flip),
        name=name,
        checkpoints=checkpoints,
    )
    return state.variables, history


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
) -> tuple[list[Variables], dict[str, np.ndarray]]:
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
        The runs' variables, and loss and accuracy of every step run here, ``(V, steps)``.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data = digits().train.take(slice(64))
        >>> classifier = build_classifier("small_cnn", 10, width=2)
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> victims, history = train_many(keys, classifier, [data, data], TrainConfig(epochs=1, batch_size=32))
        >>> len(victims), history["loss"].shape
        (2, (2, 2))
    """
    sizes = {own.images.shape for own in data}
    if len(sizes) != 1 or len(data) != len(keys):
        raise UserError(
            f"{len(keys)} keys and sets of shapes {', '.join(map(str, sorted(sizes)))}; give one set of one shape a key"
        )
    step = _step(SupervisedLoss(classifier), len(data[0]), config)
    constants = numbers(config)
    pairs = [jax.random.split(key) for key in keys]
    starts = [step.init(classifier.init(own[0], data[0].images[:1]), constants) for own in pairs]
    states, history = fit_many(
        jnp.stack([own[1] for own in pairs]),
        step,
        stack(starts),
        stack(data),
        stack([constants] * len(keys)),
        epochs=config.epochs,
        batch_size=config.batch_size,
        augment=Augment(crop=config.crop, flip=flip),
        mesh=mesh,
        name=name,
        checkpoints=checkpoints,
    )
    return unstack(jax.device_get(states.variables)), history


def _step(loss: Loss, images: int, config: TrainConfig) -> GradientStep:
    steps, _ = batch_shape(images, config.batch_size)
    return config.step(loss, CosineSGD(steps * config.epochs, config.epochs))
