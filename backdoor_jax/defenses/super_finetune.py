r"""Super-fine-tuning (Sha et al., "Fine-Tuning Is All You Need to Mitigate Backdoor Attacks", arXiv 2212.09067).

Fine-tunes the whole model with cross-entropy under a learning rate that climbs and falls in triangles: first up to a
large peak, to forget the trigger, then up to a smaller one, to regain accuracy
(`backdoor_jax.training.triangular_two_phase`).

The paper's full text was not at hand and no official code is known, so both sets of numbers are second-hand:

- ``guide``: a community guide that quotes the paper: base 3e-4, peaks 0.1 and 0.001, three epochs a phase, SGD with
  momentum 0.9 and weight decay 5e-4, batches of 256, on the whole clean training set (50,000 images: 1,176 steps). It
  gives a cycle of 500 iterations, taken here as 250 up and 250 down.
- ``toolbox_cifar10`` and ``toolbox_gtsrb``: a third party's re-implementation: 100 epochs of 2,000 images in 128s
  (1,600 steps), the first 40 % of them under the large peak, 10 steps up and 10 down, plain SGD; base 3e-2, peaks 2.5
  and 5e-2 (CIFAR-10), or base 3e-3, peaks 0.25 and 5e-3 (GTSRB).

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> config = SuperFineTuneConfig.preset("toolbox_gtsrb", steps=2)
    >>> super_finetune(jax.random.key(1), classifier, victim, clean, config).info["steps"]
    2
"""

import dataclasses
from typing import Any

import jax
import optax

from backdoor_jax.config import from_preset, numbers
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Repair, TuneConfig, tune
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Constants, GradientStep, SupervisedLoss, torch_sgd, triangular_two_phase

PRESETS: dict[str, dict[str, Any]] = {
    "guide": {
        "steps": 1176, "batch_size": 256, "learning_rate": 3e-4, "peak1": 0.1, "peak2": 1e-3, "first_phase": 0.5,
        "up": 250, "down": 250, "momentum": 0.9, "weight_decay": 5e-4,
    },
    "toolbox_cifar10": {
        "steps": 1600, "batch_size": 128, "learning_rate": 3e-2, "peak1": 2.5, "peak2": 5e-2, "first_phase": 0.4,
        "up": 10, "down": 10, "momentum": 0.0, "weight_decay": 0.0,
    },
    "toolbox_gtsrb": {
        "steps": 1600, "batch_size": 128, "learning_rate": 3e-3, "peak1": 0.25, "peak2": 5e-3, "first_phase": 0.4,
        "up": 10, "down": 10, "momentum": 0.0, "weight_decay": 0.0,
    },
}  # fmt: skip
"""Second-hand settings by name; see the module's text."""


@dataclasses.dataclass(frozen=True)
class SuperFineTuneConfig(TuneConfig):
    """Settings of super-fine-tuning; the defaults are the preset ``toolbox_gtsrb``.

    Attributes:
        learning_rate: base of the triangles, ``B``.
        peak1: their height in the first phase.
        peak2: their height in the second.
        first_phase: share of the steps in the first phase.
        up: steps from base to peak.
        down: steps from peak to base.
    """

    steps: int = 1600
    batch_size: int = 128
    learning_rate: float = 3e-3
    peak1: float = 0.25
    peak2: float = 5e-3
    first_phase: float = 0.4
    up: int = 10
    down: int = 10
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.up >= 1, "up", "at least 1 step")
        self.require(self.down >= 1, "down", "at least 1 step")
        self.require(0 <= self.first_phase <= 1, "first_phase", "a share in [0, 1]")
        self.require(self.peak1 > 0, "peak1", "a positive learning rate")
        self.require(self.peak2 > 0, "peak2", "a positive learning rate")

    def schedule(self) -> optax.Schedule:
        """See `backdoor_jax.defenses.base.StepsConfig.schedule`."""
        return triangular_two_phase(
            self.learning_rate, self.peak1, self.peak2, self.steps, self.up, self.down, self.first_phase
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "SuperFineTuneConfig":
        """A named set of second-hand settings, with changes.

        Raises:
            UserError: for an unknown name.
        """
        return from_preset(cls, "super_finetune", PRESETS, name, changes)


@dataclasses.dataclass(frozen=True)
class TriangularSGD:
    """SGD under the two-phase triangular schedule."""

    steps: int
    up: int
    down: int

    def __call__(self, constants: Constants) -> optax.GradientTransformation:
        """The transformation for these constants."""
        schedule = triangular_two_phase(
            constants["learning_rate"],
            constants["peak1"],
            constants["peak2"],
            self.steps,
            self.up,
            self.down,
            constants["first_phase"],
        )
        return torch_sgd(schedule, constants["momentum"], constants["weight_decay"])


def super_finetune(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    config: SuperFineTuneConfig = SuperFineTuneConfig(),
) -> Repair:
    """Fine-tunes the whole model under the triangular schedule.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: clean images.
        config: settings.

    Raises:
        NonFiniteError: where a peak is too high for the model, naming the step.
    """
    step = GradientStep(SupervisedLoss(classifier), TriangularSGD(config.steps, config.up, config.down))
    return Repair(*tune(key, step, variables, data, numbers(config), config, "super_finetune"))


DEFENSE = Defense(
    "fine-tune under a triangular learning rate, high peaks first", "clean", SuperFineTuneConfig, super_finetune
)
