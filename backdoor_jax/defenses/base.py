"""What every defence takes, needs and gives back."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from backdoor_jax.config import Config
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Constants, GradientStep, batch_shape, cosine_in_stages, descend

Needs = Literal["clean", "training_set", "nothing"]


class Repair(NamedTuple):
    """What a defence gives back.

    Attributes:
        variables: the repaired model's, in the same tree as the victim's (plus ``bounds`` where it was clipped).
        info: what happened, in plain Python values and index arrays: steps, whether anything was changed, what was
            chosen and from what.
    """

    variables: Variables
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Defense:
    """A defence as the registry lists it.

    Attributes:
        summary: one line.
        needs: ``clean`` images, the poisoned ``training_set``, or ``nothing``: it is then handed an empty set, which
            tells the shape of an image.
        config: its configuration class.
        run: ``(key, classifier, variables, data, config) -> Repair``.
        choose: where the configuration leaves a choice to the data, makes it: ``(classifier, variables, data,
            config)`` to the configuration with the choice written out, or None where there is nothing to repair, and
            what was found.
    """

    summary: str
    needs: Needs
    config: type[Config]
    run: Callable[[jax.Array, Classifier, Variables, Dataset, Any], Repair]
    choose: Callable[[Classifier, Variables, Dataset, Any], tuple[Any | None, dict[str, Any]]] | None = None


@dataclasses.dataclass(frozen=True)
class StepsConfig(Config):
    """What every defence that tunes on clean images shares; the published benchmark's settings.

    Attributes:
        steps: gradient steps; published 100 epochs of 2,500 images in 256s, so 1,000. Kept for smaller clean sets.
        batch_size: published 256.
        learning_rate: published 0.01.
        crop: zeros padded before a random crop; published 4.
        flip: mirror half of the images, which the benchmark does for CIFAR-10 only; by default not, and in an
            experiment as its data ask for.
    """

    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 0.01
    crop: int = 4
    flip: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.steps > 0, "steps", "at least 1")
        self.require(self.batch_size > 0, "batch_size", "at least 1")
        self.require(self.learning_rate > 0, "learning_rate", "a positive number")
        self.require(self.crop >= 0, "crop", "0 or more pixels")

    def schedule(self) -> optax.Schedule:
        """The learning rate of each step, for figures; constant unless a method has another."""
        return optax.constant_schedule(self.learning_rate)


@dataclasses.dataclass(frozen=True)
class TuneConfig(StepsConfig):
    """What those that descend by SGD share besides; the learning rate is annealed by a cosine in 100 stages.

    Attributes:
        momentum: published 0.9.
        weight_decay: published 5e-4.
    """

    momentum: float = 0.9
    weight_decay: float = 5e-4

    def schedule(self) -> optax.Schedule:
        """See `StepsConfig.schedule`."""
        return cosine_in_stages(self.learning_rate, self.steps)


def adam(constants: Constants) -> optax.GradientTransformation:
    """Adam at the constant rate ``constants["learning_rate"]``, with PyTorch's other defaults."""
    return optax.adam(constants["learning_rate"])


def replaced(variables: Variables, changes: dict[tuple[str, ...], jax.Array]) -> Variables:
    """The variables with other parameters at these paths in ``params``; the old ones are left as they are.

    Example:
        >>> replaced({"params": {"bn": {"scale": 1, "bias": 2}}}, {("bn", "scale"): 0})
        {'params': {'bn': {'scale': 0, 'bias': 2}}}
    """
    return {**variables, "params": unflatten_dict({**flatten_dict(variables["params"]), **changes})}


def tune(
    key: jax.Array,
    step: GradientStep,
    variables: Variables,
    data: Dataset,
    constants: Constants,
    config: StepsConfig,
    name: str,
) -> tuple[Variables, dict[str, Any]]:
    """Runs a gradient step for ``config.steps``, in whole epochs, and says what it did."""
    per_epoch, size = batch_shape(len(data), config.batch_size)
    tuned, done = descend(
        key,
        step,
        variables,
        data,
        constants,
        epochs=-(-config.steps // per_epoch),
        batch_size=config.batch_size,
        augment=Augment(crop=config.crop, flip=bool(config.flip)),
        name=name,
    )
    return tuned, {"changed": True, "batch": size, **done}
