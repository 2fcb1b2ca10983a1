r"""Super-fine-tuning (Sha et al., "Fine-Tuning Is All You Need to Mitigate Backdoor Attacks", arXiv 2212.09067).

Fine-tunes the complete model with cross-entropy under a learning rate that climbs and falls in triangles: first up to
a large peak, to forget the trigger, then up to a smaller one, to regain accuracy
(`backdoor_jax.training.triangular_two_phase`).

The paper's full text was not available and no official code is known, so both sets of numbers are second-hand:

- ``guide``: a community guide that quotes the paper: base 3e-4, peaks 0.1 and 0.001, three epochs a phase, SGD with
  momentum 0.9 and weight decay 5e-4, batches of 256, on the complete clean training set (50,000 images: 1,176 steps).
  It gives a cycle of 500 iterations, taken here as 250 up and 250 down.
- ``toolbox_cifar10`` and ``toolbox_gtsrb``: a third party's re-implementation: 100 epochs of 2,000 images in batches of
  128 (1,600 steps), the first 40 % of them under the large peak, 10 steps up and 10 down, plain SGD; base 3e-2, peaks
  2.5 and 5e-2 (CIFAR-10), or base 3e-3, peaks 0.25 and 5e-3 (GTSRB). It does not augment; here ``crop=0, flip=False``
  is that, and the presets augment as the benchmark's fine-tuning does.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> defense = SuperFineTune.preset("toolbox_gtsrb", steps=2)
    >>> defense.repair(jax.random.key(1), classifier, victim, clean).info["steps"]
    2
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax.tree_util import Partial

from backdoor_jax.config import Count, Decay, Fraction, LearningRate, Momentum
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Repair, SGDDefense
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import SGD, GradientStep, Triangular, supervised_loss


@dataclasses.dataclass(frozen=True)
class SuperFineTune(SGDDefense):
    """Super-fine-tuning; the defaults are the preset ``toolbox_gtsrb``.

    Attributes:
        learning_rate: B, the base of the triangles.
        peak1: their peak in the first phase.
        peak2: their peak in the second phase.
        first_phase: share of the steps in the first phase.
        up: steps from base to peak.
        down: steps from peak to base.
    """

    name: ClassVar[str] = "super_finetune"
    summary: ClassVar[str] = "fine-tune under a triangular learning rate, high peaks first"
    limits: ClassVar[str] = "its peaks must throw the network out of its valley, and few images may not bring it back"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
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

    steps: Count = 1600
    batch_size: Count = 128
    learning_rate: LearningRate = 3e-3
    peak1: LearningRate = 0.25
    peak2: LearningRate = 5e-3
    first_phase: Fraction = 0.4
    up: Count = 10
    down: Count = 10
    momentum: Momentum = 0.0
    weight_decay: Decay = 0.0

    @property
    def optimizer(self) -> SGD:
        """SGD under the two-phase triangular schedule."""
        schedule = Triangular(self.peak1, self.peak2, self.first_phase, self.steps, self.up, self.down)
        return SGD(self.learning_rate, schedule, self.momentum, self.weight_decay)

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Fine-tunes the complete model under the triangular schedule.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.

        Raises:
            NonFiniteError: where a peak is too high for the model, naming the step.
        """
        step = GradientStep(Partial(supervised_loss, classifier), self.optimizer)
        return self.tune(key, step, variables, data)
