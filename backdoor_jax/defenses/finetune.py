"""Fine-tuning on clean images: the baseline that every defense is compared with.

Minimizes the mean cross-entropy over all parameters, with normalization in training mode. The settings are the
published benchmark's; for GTSRB its 100 epochs are about 800 steps (preset ``gtsrb``).

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> FineTune(steps=2).repair(jax.random.key(1), classifier, victim, clean).info["steps"]
    2
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax.tree_util import Partial

from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Repair, SGDDefense
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import GradientStep, supervised_loss


@dataclasses.dataclass(frozen=True)
class FineTune(SGDDefense):
    """Plain fine-tuning."""

    name: ClassVar[str] = "finetune"
    summary: ClassVar[str] = "fine-tune all weights on clean images, the baseline"
    limits: ClassVar[str] = "it has no reason to leave the backdoor, which costs nothing on clean images"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gtsrb": {"steps": 800}}

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Fine-tunes the complete model.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.

        Raises:
            NonFiniteError: where the training diverges, naming the step.
        """
        step = GradientStep(Partial(supervised_loss, classifier), self.optimizer)
        return self.tune(key, step, variables, data)
