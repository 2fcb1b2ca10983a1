r"""Accuracy (ACC), attack success rate (ASR), robust accuracy (RA) and defense effectiveness rating (DER).

ACC is the share of clean test images classified correctly. ASR is the share of triggered images *not of the target
class* that are classified as the attacker's target; RA is the share of the same images still classified correctly. With
the drop :math:`\Delta` from before to after a defense,

.. math:: \mathrm{DER} = \tfrac12 \bigl(\max(0, \Delta\mathrm{ASR}) - \max(0, \Delta\mathrm{ACC}) + 1\bigr) .
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.compiling import jit
from backdoor_jax.config import Count, Whole, is_number
from backdoor_jax.data import Dataset, LabelMap, Trigger, apply_trigger, is_plain, triggered
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import run_chunks
from backdoor_jax.validation import checked

SIGNIFICANT = 0.05
"""The level at which a model is better than guessing."""


class Scores(NamedTuple):
    """ACC, ASR and RA in [0, 1]; ``asr`` and ``ra`` are None where there is no trigger."""

    acc: float
    asr: float | None = None
    ra: float | None = None


@jit
def _predict(
    classifier: Classifier, variables: Variables, trigger: Trigger | None, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits, _ = classifier.logits(variables, images if trigger is None else apply_trigger(trigger, images))
    return jnp.argmax(logits, -1), jnp.all(jnp.isfinite(logits), -1)


@checked
def predict(
    classifier: Classifier,
    variables: Variables,
    images: jax.Array,
    trigger: Trigger | None = None,
    name: str = "model",
) -> np.ndarray:
    """Predicts the classes of uint8 images in one pass.

    Args:
        classifier: the network.
        variables: its variables.
        images: ``(N, H, W, channels)``.
        trigger: applied to the images first, where given.
        name: what errors call the model.

    Returns:
        The classes, ``(N,)``.

    Raises:
        UserError: where the trigger makes anything but uint8 images of the same shape.
        NonFiniteError: where a logit is not finite.
    """
    if trigger is not None and is_plain(trigger):
        images, trigger = triggered(trigger, images), None
    program = partial(_predict, classifier, variables, trigger)
    predictions, finite = run_chunks(program, images, name=f"evaluating {name}")
    if not finite.all():
        raise NonFiniteError(
            f"{name}: logits are not finite, so there is no rate; the training diverged or the checkpoint is damaged"
        )
    return predictions


@typed
def success_rates(predictions: np.ndarray, labels: np.ndarray, label_map: LabelMap) -> tuple[float, float]:
    """ASR and RA of predictions on triggered images.

    Under an all-to-one map images of the target class do not count; under an all-to-all map every image counts.

    Args:
        predictions: classes of the triggered images, ``(N,)``.
        labels: the images' true labels, ``(N,)``.
        label_map: the attacker's.

    Raises:
        UserError: where no image counts, or there is not one prediction for each label.

    Example:
        >>> success_rates(np.array([0, 0, 2]), np.array([0, 1, 2]), LabelMap("all_to_one", 3))
        (0.5, 0.5)
    """
    if len(predictions) != len(labels):
        raise UserError(f"success_rates: {len(predictions)} predictions for {len(labels)} labels; give one for each")
    targets = np.asarray(label_map(jnp.asarray(labels)))
    counted = targets != labels
    if not counted.any():
        raise UserError(
            "no test image is outside the target class, so there is no attack success rate; give images of other "
            "classes under their true labels"
        )
    predictions, labels, targets = predictions[counted], labels[counted], targets[counted]
    return float(np.mean(predictions == targets)), float(np.mean(predictions == labels))


@checked
def evaluate(
    classifier: Classifier,
    variables: Variables,
    test: Dataset,
    trigger: Trigger | None = None,
    label_map: LabelMap | None = None,
    name: str = "model",
    *,
    triggered: Dataset | None = None,
) -> Scores:
    """Computes ACC, and with a label map and a trigger or triggered images ASR and RA, each set in one pass.

    Args:
        classifier: the network.
        variables: its variables.
        test: clean test images; the trigger is applied here.
        trigger: the attacker's.
        label_map: the attacker's; ``LabelMap("all_to_one", 10, 3)`` for class 3 of 10 as the target.
        name: what errors call the model.
        triggered: images that carry the trigger already, under their true labels, instead of a trigger.

    Raises:
        UserError: for a trigger and triggered images, and for either without a label map.
        NonFiniteError: where weights or logits are not finite.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> classifier, test = build_classifier("small_cnn", 10, width=2), digits().test
        >>> evaluate(classifier, classifier.init(jax.random.key(0), test.images), test).acc < 0.5
        True
    """
    if trigger is not None and triggered is not None:
        raise UserError("a trigger and triggered images are two ways to say the same; give one of them")
    attacked = trigger is not None or triggered is not None
    if attacked and label_map is None:
        raise UserError(
            "evaluate: label_map is missing, so the trigger has no target; give attack.label_map(num_classes) or "
            "LabelMap('all_to_one', num_classes, target)"
        )
    labels = np.asarray(test.labels)
    acc = float(np.mean(predict(classifier, variables, test.images, name=name) == labels))
    if not attacked or label_map is None:
        return Scores(acc)
    shown = test if triggered is None else triggered
    found = predict(classifier, variables, shown.images, trigger, name)
    return Scores(acc, *success_rates(found, np.asarray(shown.labels), label_map))


@typed
def chance_level(labels: np.ndarray, num_classes: Count) -> float:
    """The accuracy of guessing: 1/C, or the share of the most frequent class where that is larger.

    Example:
        >>> chance_level(np.array([0, 0, 0, 1]), 2)
        0.75
    """
    return max(1 / num_classes, float(np.bincount(labels).max()) / len(labels))


@typed
def is_near_chance(correct: Whole, labels: np.ndarray, num_classes: Count) -> bool:
    """Whether a model is hardly better than guessing.

    Better is one that is correct for a tenth of the images that guessing misses as well, and for significantly more
    than guessing (binomial test, 5 %), which matters where there are few images.

    Args:
        correct: how many images it classifies correctly.
        labels: ``(N,)``.
        num_classes: the number of classes C.

    Example:
        >>> is_near_chance(18, np.arange(100) % 10, 10), is_near_chance(20, np.arange(100) % 10, 10)
        (True, False)
    """
    from scipy import stats

    chance, count = chance_level(labels, num_classes), len(labels)
    if correct > count:
        raise UserError(f"is_near_chance: correct is {correct}, expected at most the number of labels, {count}")
    better = correct / count >= chance + (1 - chance) / 10
    return not (better and stats.binom.sf(correct - 1, count, chance) <= SIGNIFICANT)


def defense_effectiveness(before: Scores, after: Scores) -> float | None:
    """DER in [0, 1], where 0.5 is that of an unchanged model; None where there is no ASR.

    Raises:
        UserError: for a rate outside [0, 1], or NaN.

    Example:
        >>> round(defense_effectiveness(Scores(0.92, 0.95), Scores(0.91, 0.01)), 3)
        0.965
    """
    for scores in (before, after):
        if not isinstance(scores, Scores):
            raise UserError(f"defense_effectiveness: {scores!r} is a {type(scores).__name__}, expected Scores")
        for rate in (scores.acc, 0.0 if scores.asr is None else scores.asr):
            if not is_number(rate) or not 0 <= rate <= 1:
                raise UserError(f"defense_effectiveness: a rate is {rate!r}, expected shares in [0, 1]")
    if before.asr is None or after.asr is None:
        return None
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2
