"""What an attack is: a trigger, made or learnt from a key, a label map, and a way to plant the two in a model."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from backdoor_jax.config import Config
from backdoor_jax.data import Augment, Dataset, LabelMap, Poisoned, Trigger, poison, poison_count
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Constants, Step, TrainConfig, fit, train


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an attacker works on.

    Attributes:
        classifier: the network to plant the backdoor in.
        data: the clean training set.
        training: how victims are trained.
        flip: whether training mirrors images.
        clean_model: variables of a model trained on the clean data, for attacks that look into one.
    """

    classifier: Classifier
    data: Dataset
    training: TrainConfig = TrainConfig()  # noqa: RUF009
    flip: bool = False
    clean_model: Variables | None = None

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
        self,
        key: jax.Array,
        step: Step,
        state: Any,
        constants: Constants,
        *,
        epochs: int,
        name: str,
        checkpoints: Path | None,
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """`backdoor_jax.training.fit` on the clean images, batched and augmented as victims are trained."""
        return fit(
            key,
            step,
            state,
            self.data,
            constants,
            epochs=epochs,
            batch_size=self.training.batch_size,
            augment=Augment(crop=self.training.crop, flip=self.flip),
            name=name,
            checkpoints=checkpoints,
        )


class Planted(NamedTuple):
    """A victim and the attacker's means.

    Attributes:
        variables: of the victim.
        trigger: what makes it obey.
        poisoned: the training set as a defender would find it.
        info: what is worth knowing about the attack, as plain values.
    """

    variables: Variables
    trigger: Trigger
    poisoned: Poisoned
    info: dict[str, Any]


def at_most(share: float) -> str:
    """The largest share there is, for errors: rounded down, so that it is allowed itself.

    Example:
        >>> at_most(2 / 3)
        'at most 0.666666'
    """
    return f"at most {np.floor(share * 1e6) / 1e6:g}"


@dataclasses.dataclass(frozen=True)
class Attack(Config):
    """Base of the attacks: a configuration with the methods that carry it out.

    An attack has at least `trigger`. One that learns overrides `learn`; one that poisons in another way than by
    stamping and relabelling, `stamp`; one that controls the training, `plant`.

    Attributes:
        rate: poisoned share of all training images; published 0.1. Ratios of 0.001 to 0.5 are usual.
        labels: ``all_to_one``; ``all_to_all``, where label y becomes (y + 1) mod C; or ``clean_label``, where only
            images of the target class are poisoned, and keep their label.
        target: the target class of ``all_to_one`` and ``clean_label``; published 0.
    """

    learns: ClassVar[bool] = False
    """Whether trigger or poison take work, so that an experiment keeps them beside the victim."""
    needs_clean_model: ClassVar[bool] = False
    """Whether it looks into a model trained on the clean data."""

    rate: float = 0.1
    labels: Literal["all_to_one", "all_to_all", "clean_label"] = "all_to_one"
    target: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.rate <= 1, "rate", "a share in (0, 1]")
        self.require(self.target >= 0, "target", "a class from 0")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> Trigger:
        """The trigger for images of this ``(height, width, channels)``, before anything is learnt."""
        raise NotImplementedError

    def learn(self, key: jax.Array, scene: Scene) -> tuple[Trigger, dict[str, Any]]:
        """The trigger as it is used, and what is worth knowing about it; by default nothing is learnt."""
        return self.trigger(key, scene.shape), {}

    def label_map(self, num_classes: int) -> LabelMap:
        """Where the attacker sends triggered images at test time."""
        return LabelMap("all_to_all" if self.labels == "all_to_all" else "all_to_one", num_classes, self.target)

    def require_shares(self, cross_ratio: float) -> None:
        """Checks that poison and `cross_ratio` times as many images in noise mode fit into a batch."""
        self.require(cross_ratio >= 0, "cross_ratio", "0 or more")
        largest = f"{at_most(1 / (1 + cross_ratio))} where cross_ratio is {cross_ratio}"
        self.require(self.rate * (1 + cross_ratio) <= 1, "rate", largest)

    def candidates(self, labels: jax.Array | np.ndarray) -> np.ndarray:
        """Indices of the training images that may be poisoned: all, or under clean labels those of the target class.

        Raises:
            UserError: where there are too few for the poisoning rate, naming the largest that exists.
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

    def stamp(self, key: jax.Array, scene: Scene, trigger: Trigger) -> Poisoned:
        """The poisoned training set: a drawn share of the candidates triggered and relabelled."""
        label_map = self.label_map(scene.num_classes)
        return poison(key, scene.data, trigger, label_map, self.rate, self.candidates(scene.data.labels))

    def poison(self, key: jax.Array, scene: Scene) -> tuple[Poisoned, Trigger, dict[str, Any]]:
        """A poisoned copy of the training set, the trigger that poisoned it, and what is worth knowing about it.

        A network that is trained together with the victim (`InputAware`, `LIRA`) is untrained here; see `plant`.
        """
        if self.needs_clean_model and scene.clean_model is None:
            raise UserError(f"{type(self).__name__} looks into a clean model; give Scene(..., clean_model=variables)")
        trigger_key, choice_key = jax.random.split(key)
        trigger, info = self.learn(trigger_key, scene)
        return self.stamp(choice_key, scene, trigger), trigger, info

    def plant(
        self,
        key: jax.Array,
        train_key: jax.Array,
        scene: Scene,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Planted:
        """Makes a victim: poisons the training set and trains on it.

        Args:
            key: of the trigger and of the choice of images.
            train_key: of weights, order and augmentation.
            scene: what there is to work on.
            name: what progress and errors call the run.
            checkpoints: a folder for those of the training; a killed run resumes from there.

        Raises:
            UserError: for a target or rate that the data do not allow, or where a clean model is missing.
        """
        poisoned, trigger, info = self.poison(key, scene)
        variables, _ = train(
            train_key,
            scene.classifier,
            poisoned.data,
            scene.training,
            flip=scene.flip,
            name=name,
            checkpoints=checkpoints,
        )
        return Planted(variables, trigger, poisoned, info)
