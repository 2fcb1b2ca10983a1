"""Fine-tuning on clean images: the baseline every defence is measured against.

Minimises the mean cross-entropy over all parameters, normalisation in training mode. Settings are the published
benchmark's (`TuneConfig` says which).

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> finetune(jax.random.key(1), classifier, victim, clean, FineTuneConfig(steps=2)).info["steps"]
    2
"""

import dataclasses

import jax

from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Repair, TuneConfig, tune
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import CosineSGD, GradientStep, SupervisedLoss


@dataclasses.dataclass(frozen=True)
class FineTuneConfig(TuneConfig):
    """Settings of plain fine-tuning; all are `TuneConfig`'s."""


def finetune(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    config: FineTuneConfig = FineTuneConfig(),
) -> Repair:
    """Fine-tunes the whole model.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: clean images.
        config: settings.
    """
    step = GradientStep(SupervisedLoss(classifier), CosineSGD(config.steps))
    return Repair(*tune(key, step, variables, data, numbers(config), config, "finetune"))


DEFENSE = Defense("fine-tune every weight on clean images, the baseline", "clean", FineTuneConfig, finetune)
