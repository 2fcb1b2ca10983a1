"""The transfer-based scenario: a backdoored pre-trained network is fine-tuned for another task.

From the super-fine-tuning paper (Sha et al., "Fine-Tuning Is All You Need", arXiv 2212.09067). The user replaces the
head and tunes the complete network on the new task's training set, by conventional fine-tuning or by super-fine-tuning;
the paper finds that the first is often enough, and the second faster.

The text available to us does not say how the attack's success is counted when the target class no longer exists. Our
definition: the new target is the class predicted for most triggered *training* images, which is what the attacker would
find, and the rate is that of triggered test images of other classes that are classified as it, next to the rate of the
same images without the trigger. The same numbers of a clean pre-trained network show how much of the rate is due to the
trigger's appearance alone.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from backdoor_jax.data import Dataset, LabelMap, Trigger
from backdoor_jax.defenses import FineTune, Repair, SuperFineTune
from backdoor_jax.defenses.base import replace_params
from backdoor_jax.errors import UserError
from backdoor_jax.metrics import predict, success_rates
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.validation import checked, checked_encoder


class TransferScores(NamedTuple):
    """How triggered images are classified in the new task; rates in [0, 1].

    Attributes:
        acc: share of clean test images classified correctly.
        target: the class predicted for most triggered training images.
        asr: share of triggered test images of other classes that are classified as the target.
        unprovoked: share of the same images that are classified as the target without the trigger.
        ra: share of the same images, triggered, that are still classified correctly.
    """

    acc: float
    target: int
    asr: float
    unprovoked: float
    ra: float


@checked_encoder
def replace_head(
    key: jax.Array, classifier: Classifier, variables: Variables, num_classes: int, images: jax.Array
) -> tuple[Classifier, Variables]:
    """Gives a network a new head for another number of classes.

    Args:
        key: a `jax.random` key for the head's weights.
        classifier: the pre-trained network, a Linen module with a field ``num_classes``.
        variables: its variables; left as they are.
        num_classes: the number of classes of the new task.
        images: images of the new task; only their shape matters.

    Returns:
        The network for the new task, and its variables: the old ones with a newly initialized head.

    Raises:
        UserError: where the network cannot be built for another number of classes.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> images, classifier = digits().test.images, build_classifier("small_cnn", 43, width=2)
        >>> pretrained = classifier.init(jax.random.key(0), images)
        >>> other, variables = replace_head(jax.random.key(1), classifier, pretrained, 10, images)
        >>> other.logits(variables, images[:2])[0].shape
        (2, 10)
    """
    network = classifier.network
    if not isinstance(network, nn.Module) or not hasattr(network, "num_classes"):
        raise UserError(
            f"{type(network).__name__} cannot be built for {num_classes} classes; give a Linen module with num_classes"
        )
    other = dataclasses.replace(classifier, network=network.clone(num_classes=num_classes), num_classes=num_classes)
    initial = flatten_dict(other.init(key, images[:1])["params"])
    depth = len(classifier.head_path)
    head = {path: leaf for path, leaf in initial.items() if path[:depth] == classifier.head_path}
    return other, replace_params(variables, head)


@checked_encoder
def transfer(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    num_classes: int,
    defense: FineTune | SuperFineTune = FineTune(),
) -> tuple[Classifier, Repair]:
    """Fine-tunes a pre-trained network for another task.

    Args:
        key: a `jax.random` key.
        classifier: the pre-trained network.
        variables: its variables; left as they are.
        data: the new task's training set.
        num_classes: the number of its classes.
        defense: conventional fine-tuning or super-fine-tuning.

    Returns:
        The network for the new task, and the repair with its variables.

    Raises:
        UserError: where the network cannot be built for another number of classes.
        NonFiniteError: where the training diverges.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data, classifier = digits().train.take(slice(32)), build_classifier("small_cnn", 43, width=2)
        >>> pretrained = classifier.init(jax.random.key(0), data.images)
        >>> other, tuned = transfer(jax.random.key(1), classifier, pretrained, data, 10, FineTune(steps=1))
        >>> other.num_classes, tuned.info["steps"]
        (10, 1)
    """
    head_key, tune_key = jax.random.split(key)
    other, start = replace_head(head_key, classifier, variables, num_classes, data.images)
    return other, defense.repair(tune_key, other, start, data)


@checked
def evaluate_transfer(
    classifier: Classifier, variables: Variables, train: Dataset, test: Dataset, trigger: Trigger
) -> TransferScores:
    """Measures whether triggered images are still classified as one class.

    Args:
        classifier: the network of the new task.
        variables: its variables.
        train: the new task's training set; most of its images, triggered, are classified as the target.
        test: the new task's test set.
        trigger: the attacker's.
    """
    target = int(np.bincount(predict(classifier, variables, train.images, trigger)).argmax())
    label_map = LabelMap("all_to_one", classifier.num_classes, target)
    labels = np.asarray(test.labels)
    clean = predict(classifier, variables, test.images)
    asr, ra = success_rates(predict(classifier, variables, test.images, trigger), labels, label_map)
    unprovoked, _ = success_rates(clean, labels, label_map)
    return TransferScores(float(np.mean(clean == labels)), target, asr, unprovoked, ra)
