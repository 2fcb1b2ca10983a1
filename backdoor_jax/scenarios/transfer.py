"""The transfer-based scenario: a backdoored pre-trained network is fine-tuned for another task.

Of the super-fine-tuning paper (Sha et al., "Fine-Tuning Is All You Need", arXiv 2212.09067). The user replaces the head
and tunes the whole network on the new task's training set, conventionally or under super-fine-tuning's schedule; the
paper finds that the first is often enough, and the second faster.

How the attacker's success is counted when the target class is no longer there, the text at hand does not say. Ours:
the class to which most triggered *training* images go is what the attacker would find, so the rate is that of triggered
test images of other classes that go there, beside the rate of the same images without the trigger. A network that was
never backdoored says how much of it the trigger's mere looks explain.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from backdoor_jax.data import Dataset, LabelMap, Trigger
from backdoor_jax.defenses import FineTuneConfig, Repair, SuperFineTuneConfig, finetune, super_finetune
from backdoor_jax.defenses.base import replaced
from backdoor_jax.errors import UserError
from backdoor_jax.metrics import predict, success_rates
from backdoor_jax.models import Classifier, Variables


class Following(NamedTuple):
    """How triggered images fare in the new task; rates in [0, 1].

    Attributes:
        acc: share of clean test images classified rightly.
        target: the class that triggered training images go to most.
        asr: share of triggered test images of other classes that go there.
        unprovoked: share of the same images that go there without the trigger.
        ra: share of the same images, triggered, still classified rightly.
    """

    acc: float
    target: int
    asr: float
    unprovoked: float
    ra: float


def transplant(
    key: jax.Array, classifier: Classifier, variables: Variables, num_classes: int, images: jax.Array
) -> tuple[Classifier, Variables]:
    """The same network with a fresh head for another number of classes.

    Args:
        key: of the head's weights.
        classifier: the pre-trained network; a Linen module with a field ``num_classes``, as ours are.
        variables: its own; left as they are.
        num_classes: of the new task.
        images: of the new task; only their shape matters.

    Raises:
        UserError: where the network cannot be made for another number of classes.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> images, classifier = digits().test.images, build_classifier("small_cnn", 43, width=2)
        >>> pretrained = classifier.init(jax.random.key(0), images)
        >>> ten, variables = transplant(jax.random.key(1), classifier, pretrained, 10, images)
        >>> ten.logits(variables, images[:2])[0].shape
        (2, 10)
    """
    network = classifier.network
    if not isinstance(network, nn.Module) or not hasattr(network, "num_classes"):
        raise UserError(
            f"{type(network).__name__} cannot be made for {num_classes} classes; give a Linen module with num_classes"
        )
    other = dataclasses.replace(classifier, network=network.clone(num_classes=num_classes), num_classes=num_classes)
    fresh = flatten_dict(other.init(key, images[:1])["params"])
    depth = len(classifier.head_path)
    head = {path: leaf for path, leaf in fresh.items() if path[:depth] == classifier.head_path}
    return other, replaced(variables, head)


def transfer(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    num_classes: int,
    config: FineTuneConfig | SuperFineTuneConfig = FineTuneConfig(),
) -> tuple[Classifier, Repair]:
    """Fine-tunes a pre-trained network for another task.

    Args:
        key: a `jax.random` key.
        classifier: the pre-trained network.
        variables: its own; left as they are.
        data: the new task's training set.
        num_classes: its classes.
        config: of conventional or of super-fine-tuning.

    Returns:
        The network for the new task, and its variables with what happened.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data, classifier = digits().train.take(slice(32)), build_classifier("small_cnn", 43, width=2)
        >>> pretrained = classifier.init(jax.random.key(0), data.images)
        >>> tuning = FineTuneConfig(steps=1)
        >>> ten, tuned = transfer(jax.random.key(1), classifier, pretrained, data, 10, tuning)
        >>> ten.num_classes, tuned.info["steps"]
        (10, 1)
    """
    head_key, tune_key = jax.random.split(key)
    other, start = transplant(head_key, classifier, variables, num_classes, data.images)
    if isinstance(config, SuperFineTuneConfig):
        return other, super_finetune(tune_key, other, start, data, config)
    return other, finetune(tune_key, other, start, data, config)


def following(
    classifier: Classifier, variables: Variables, train: Dataset, test: Dataset, trigger: Trigger
) -> Following:
    """Whether triggered images still go together.

    Args:
        classifier: the network of the new task.
        variables: its own.
        train: the new task's training set; the class most of them go to under the trigger is the attacker's.
        test: its test set.
        trigger: the attacker's.
    """
    target = int(np.bincount(predict(classifier, variables, train.images, trigger)).argmax())
    label_map = LabelMap("all_to_one", classifier.num_classes, target)
    labels = np.asarray(test.labels)
    clean = predict(classifier, variables, test.images)
    asr, ra = success_rates(predict(classifier, variables, test.images, trigger), labels, label_map)
    return Following(float(np.mean(clean == labels)), target, asr, success_rates(clean, labels, label_map)[0], ra)
