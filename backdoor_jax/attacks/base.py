"""What an attack is: a trigger, made or trained from a key, a label map, and a way to train a victim with the two."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from backdoor_jax.config import Config, Share, Whole
from backdoor_jax.data import Augment, Dataset, LabelMap, Poisoned, Trigger, poison, poison_count
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Fitted, Step, TrainConfig, fit, train
from backdoor_jax.validation import checked, require_classifier, require_dataset, require_variables


@dataclasses.dataclass(frozen=True)
class AttackContext:
    """What an attacker works with.

    Attributes:
        classifier: the network to backdoor.
        data: the clean training set.
        training: how victims are trained.
        flip: whether training mirrors images.
        clean_model: variables of a model trained on the clean data, for attacks that use one.

    Raises:
        UserError: for data that are not the classifier's, or a clean model whose variables cannot be used.
    """

    classifier: Classifier
    data: Dataset
    training: TrainConfig = TrainConfig()  # noqa: RUF009
    flip: bool = False
    clean_model: Variables | None = None

    def __post_init__(self) -> None:
        require_classifier(self.classifier, "AttackContext: classifier")
        require_dataset(self.data, self.classifier, "AttackContext: data")
        if self.clean_model is not None:
            require_variables(self.clean_model, "AttackContext: clean_model")

    @property
    def num_classes(self) -> int:
        """The number of classes C."""
        return self.classifier.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self.data.images.shape[1:]
        return height, width, channels

    def fit(
        self, key: jax.Array, step: Step, state: Any, *, epochs: int, name: str, checkpoints: Path | None = None
    ) -> Fitted:
        """`backdoor_jax.training.fit` on the clean images, with the batches and augmentation of a victim's training."""
        return fit(
            key,
            step,
            state,
            self.data,
            epochs=epochs,
            batch_size=self.training.batch_size,
            augment=Augment(crop=self.training.crop, flip=self.flip),
            name=name,
            checkpoints=checkpoints,
        )


class Victim(NamedTuple):
    """A backdoored model, and what its attacker knows.

    Attributes:
        variables: the model's variables.
        trigger: maps uint8 images to triggered uint8 images.
        poisoned: the training set that a defender would find.
        info: details of the attack, as plain Python values.
    """

    variables: Variables
    trigger: Trigger
    poisoned: Poisoned
    info: dict[str, Any]


CHECKED = {"fit_trigger", "poison_data", "poison", "train_victim_in"}
"""The methods of an attack that check their arguments, also where a subclass overrides them."""


def at_most(share: float) -> str:
    """The largest allowed share, for error messages; rounded down, so that it is itself allowed.

    Example:
        >>> at_most(2 / 3)
        'at most 0.666666'
    """
    return f"at most {np.floor(share * 1e6) / 1e6:g}"


@dataclasses.dataclass(frozen=True)
class Attack(Config):
    """Base of the attacks: a configuration with the methods that carry it out.

    An attack has a `name` and defines `trigger`. One that trains its trigger overrides `fit_trigger`; one that does
    more to the training set than triggering and relabeling images overrides `poison_data`; one that trains the victim
    itself overrides `train_victim_in`; one that uses a clean model overrides `needs_clean_model`.

    Class attributes:
        name: what registries, configurations and results call it.
        fits_trigger: whether making the trigger or the poisoned images is expensive; an experiment then stores them
            with the victim.
        trains_victim: whether it overrides `train_victim_in`.

    Attributes:
        rate: poisoned share of all training images; published 0.1. Ratios of 0.001 to 0.5 are usual.
        labels: ``all_to_one``; ``all_to_all``, where label y becomes (y + 1) mod C; or ``clean_label``, where only
            images of the target class are poisoned, and keep their label.
        target: the target class of ``all_to_one`` and ``clean_label``; published 0.
    """

    name: ClassVar[str]
    fits_trigger: ClassVar[bool] = False
    trains_victim: ClassVar[bool] = False

    rate: Share = 0.1
    labels: Literal["all_to_one", "all_to_all", "clean_label"] = "all_to_one"
    target: Whole = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes every attack check what its methods receive."""
        super().__init_subclass__(**kwargs)
        for name in CHECKED & vars(cls).keys():
            setattr(cls, name, checked(vars(cls)[name]))

    @property
    def needs_clean_model(self) -> bool:
        """Whether the attack, with these settings, uses a model trained on the clean data."""
        return False

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> Trigger:
        """The trigger for images of shape ``(height, width, channels)``, before any training."""
        raise NotImplementedError

    @checked
    def fit_trigger(self, key: jax.Array, context: AttackContext) -> tuple[Trigger, dict[str, Any]]:
        """The final trigger, and details about it as plain values; by default nothing is trained."""
        return self.trigger(key, context.shape), {}

    def label_map(self, num_classes: int) -> LabelMap:
        """The class that each triggered image should be assigned at test time."""
        return LabelMap("all_to_all" if self.labels == "all_to_all" else "all_to_one", num_classes, self.target)

    def require_shares(self, cross_ratio: float) -> None:
        """Checks that the poisoned images of a batch and `cross_ratio` times as many contrast images fit into it."""
        largest = f"{at_most(1 / (1 + cross_ratio))} where cross_ratio is {cross_ratio}"
        self.require(self.rate * (1 + cross_ratio) <= 1, "rate", largest)

    def candidates(self, labels: jax.Array | np.ndarray) -> np.ndarray:
        """Indices of the images that may be poisoned: all, or under clean labels those of the target class.

        Raises:
            UserError: if there are too few for the poisoning rate; it names the largest possible rate.
        """
        labels = np.asarray(labels)
        allowed = np.flatnonzero(labels == self.target) if self.labels == "clean_label" else np.arange(len(labels))
        if poison_count(self.rate, len(labels)) > len(allowed):
            raise UserError(
                f"{type(self).__name__}.rate is {self.rate}, but with clean labels only the {len(allowed)} of "
                f"{len(labels)} images in target class {self.target} can be poisoned; "
                + (f"give {at_most(len(allowed) / len(labels))}" if len(allowed) else "choose another target")
            )
        return allowed

    @checked
    def poison_data(self, key: jax.Array, context: AttackContext, trigger: Trigger) -> Poisoned:
        """The poisoned training set: randomly drawn candidates, triggered and relabeled."""
        label_map = self.label_map(context.num_classes)
        return poison(key, context.data, trigger, label_map, self.rate, self.candidates(context.data.labels))

    @checked
    def poison(self, key: jax.Array, context: AttackContext) -> tuple[Poisoned, Trigger, dict[str, Any]]:
        """A poisoned copy of the training set, the trigger in it, and details about it as plain values.

        A trigger that is trained together with the victim (`InputAware`, `LIRA`) is untrained here; `train_victim`
        trains it.

        Raises:
            UserError: if the attack needs a clean model and the context has none.
        """
        if self.needs_clean_model and context.clean_model is None:
            raise UserError(f"{type(self).__name__} uses a clean model; give AttackContext(..., clean_model=variables)")
        trigger_key, choice_key = jax.random.split(key)
        trigger, info = self.fit_trigger(trigger_key, context)
        return self.poison_data(choice_key, context, trigger), trigger, info

    @checked
    def train_victim(
        self,
        key: jax.Array,
        classifier: Classifier,
        data: Dataset,
        training: TrainConfig = TrainConfig(),
        *,
        flip: bool = False,
        clean_model: Variables | None = None,
        checkpoints: Path | None = None,
    ) -> Victim:
        """Poisons a training set and trains a victim on it.

        Args:
            key: a `jax.random` key.
            classifier: the network to backdoor.
            data: the clean training set.
            training: how the victim is trained.
            flip: whether training mirrors images.
            clean_model: variables of a model trained on the clean data, for an attack that uses one; trained here if
                none is given.
            checkpoints: a folder for checkpoints of the training; a killed run resumes from there.

        Raises:
            UserError: for a target or rate that the data do not allow.
            NonFiniteError: if the training diverges.

        Example:
            >>> from backdoor_jax import BadNets, build_classifier, digits
            >>> data = digits().train.take(slice(64))
            >>> classifier = build_classifier("small_cnn", 10, width=2)
            >>> victim = BadNets().train_victim(jax.random.key(0), classifier, data, TrainConfig(epochs=1))
            >>> len(victim.poisoned.indices)
            6
        """
        poison_key, train_key, clean_key = jax.random.split(key, 3)
        if self.needs_clean_model and clean_model is None:
            clean_model = train(clean_key, classifier, data, training, flip=flip, name="clean model").variables
        context = AttackContext(classifier, data, training, flip, clean_model)
        return self.train_victim_in(context, poison_key, train_key, checkpoints=checkpoints)

    @checked
    def train_victim_in(
        self,
        context: AttackContext,
        key: jax.Array,
        train_key: jax.Array,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Victim:
        """Does what `train_victim` does, in a given context and with a separate key for the training.

        Args:
            context: the network, the data and the training settings.
            key: for the trigger and the choice of images.
            train_key: for the initial weights, the order of images and augmentation.
            name: what progress and errors call the run.
            checkpoints: a folder for checkpoints of the training; a killed run resumes from there.

        Raises:
            UserError: for a target or rate that the data do not allow, or if a clean model is missing.
            NonFiniteError: if the training diverges.
        """
        poisoned, trigger, info = self.poison(key, context)
        trained = train(
            train_key,
            context.classifier,
            poisoned.data,
            context.training,
            flip=context.flip,
            name=name,
            checkpoints=checkpoints,
        )
        return Victim(trained.variables, trigger, poisoned, info)
