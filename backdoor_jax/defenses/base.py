"""The base classes of the defenses, and the `Repair` that they return."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from backdoor_jax.config import Config, Count, Decay, LearningRate, Momentum, Whole
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import SGD, Cosine, GradientStep, Optimizer, fit
from backdoor_jax.validation import checked

Needs = Literal["clean", "training_set", "nothing"]


@dataclasses.dataclass(frozen=True)
class Repair:
    """The result of a defense.

    Attributes:
        variables: the repaired model's variables, in the same tree as the victim's (plus ``bounds`` where its
            activations are bounded).
        changed: whether the variables differ from the victim's.
        why: the reason why nothing was changed; None where something was.
        target: the class that was repaired, where the defense repairs one.
        scan: the result of the scan for a poisoned class, as from `Scan.summary`; None without a scan.
        kept: indices of the training images taken to be clean, where the defense selects some.
        info: further results in plain Python values: steps, what was chosen and from which data.
    """

    variables: Variables
    changed: bool = True
    why: str | None = None
    target: int | None = None
    scan: dict[str, Any] | None = None
    kept: np.ndarray | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Defense(Config):
    """Base class of the defenses: a configuration with the method that runs it.

    Class attributes:
        name: what registries, configurations and results call it.
        summary: one line about it.
        limits: where it fails, or what it costs, for the reader of a failure: a sentence without a period.
        needs: ``clean`` images, the poisoned ``training_set``, or ``nothing``: it then receives an empty data set,
            which only shows the shape of an image.
        mirrors: whether it augments by mirroring; it then has a field ``flip``, which an experiment sets to what the
            data set allows where it is None.
        targeted: whether it repairs one class; it then has a field ``target``, to which an experiment can set the
            attacker's.
        presets: published settings by name.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    limits: ClassVar[str] = ""
    needs: ClassVar[Needs] = "clean"
    mirrors: ClassVar[bool] = False
    targeted: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes every defense check what its `repair` receives."""
        super().__init_subclass__(**kwargs)
        if "repair" in vars(cls):
            cls.repair = checked(cls.repair)  # type: ignore[method-assign]

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Repairs a model.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: the data that the defense `needs`.
        """
        raise NotImplementedError

    @classmethod
    def preset(cls, preset: str, **changes: Any) -> Self:
        """The defense with published settings.

        Args:
            preset: a name in ``presets``.
            changes: fields to set otherwise.

        Raises:
            UserError: for a name that is not in ``presets``.

        Example:
            >>> from backdoor_jax import D3
            >>> D3.preset("paper", steps=5).penalty
            10.0
        """
        if preset not in cls.presets:
            known = f"known are {', '.join(cls.presets)}" if cls.presets else "it has none"
            raise UserError(f"unknown {cls.name} preset {preset!r}; {known}")
        return cls(**{**cls.presets[preset], **changes})


@dataclasses.dataclass(frozen=True)
class GradientDefense(Defense):
    """Base class of the defenses that train on clean images; the defaults are the published benchmark's.

    Attributes:
        steps: gradient steps, rounded up to complete epochs; published 100 epochs of 2,500 images in batches of 256, so
            1,000. A smaller clean set gets the same number.
        batch_size: published 256.
        learning_rate: published 0.01.
        crop: zeros padded before a random crop; published 4.
        flip: mirror half of the images, which the benchmark does for CIFAR-10 only. None is off, except that an
            experiment sets it to what its data set allows.
    """

    mirrors: ClassVar[bool] = True

    steps: Count = 1000
    batch_size: Count = 256
    learning_rate: LearningRate = 0.01
    crop: Whole = 4
    flip: bool | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the weights."""
        raise NotImplementedError

    @property
    def augment(self) -> Augment:
        """The augmentation of every batch."""
        return Augment(crop=self.crop, flip=bool(self.flip))

    def tune(self, key: jax.Array, step: GradientStep, variables: Variables, data: Dataset) -> Repair:
        """Trains a model for `steps` of a gradient step.

        Args:
            key: a `jax.random` key.
            step: what to take.
            variables: where to start.
            data: clean images.

        Returns:
            The repair, with ``steps``, ``batch`` and the means of the ``last_epoch`` in ``info``.

        Raises:
            NonFiniteError: where the training diverges, naming the step.
        """
        fitted = fit(
            key,
            step,
            step.init(variables),
            data,
            steps=self.steps,
            batch_size=self.batch_size,
            augment=self.augment,
            name=self.name,
        )
        return Repair(fitted.variables, info=fitted.info)


@dataclasses.dataclass(frozen=True)
class SGDDefense(GradientDefense):
    """Base class of those that train with SGD; the learning rate follows a cosine in 100 stages.

    Attributes:
        momentum: published 0.9.
        weight_decay: published 5e-4.
    """

    momentum: Momentum = 0.9
    weight_decay: Decay = 5e-4

    @property
    def optimizer(self) -> Optimizer:
        """SGD under a cosine in 100 stages."""
        return SGD(self.learning_rate, Cosine(self.steps), self.momentum, self.weight_decay)


def replace_params(variables: Variables, changes: dict[tuple[str, ...], jax.Array]) -> Variables:
    """New variables with other parameters at these paths in ``params``; the given ones are left as they are.

    Example:
        >>> replace_params({"params": {"bn": {"scale": 1, "bias": 2}}}, {("bn", "scale"): 0})
        {'params': {'bn': {'scale': 0, 'bias': 2}}}
    """
    return {**variables, "params": unflatten_dict({**flatten_dict(variables["params"]), **changes})}
