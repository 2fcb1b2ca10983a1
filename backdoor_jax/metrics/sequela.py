r"""Backdoor sequela: how a repair changes a model's vulnerability to *other* attacks.

From Sha, He, Berrang, Humbert, Zhang, "Fine-Tuning Is All You Need to Mitigate Backdoor Attacks", arXiv 2212.09067. The
paper compares models before and after a repair under two attacks, membership inference and a second backdoor injection.
Its text gives no protocol for either, so the protocols here are ours, following common practice.

**Membership inference.** Was an image in the training set? The attacker has a signal that tends to be larger for
members:

- `loss_signal`: minus the cross-entropy under the true label (Yeom et al., 2018);
- `confidence_signal`: the largest class probability, without a label (Salem et al., 2019), as minus the cross-entropy
  under the predicted label, which gives the same order and stays exact where float32 probabilities are all 1;
- `shadow_signal`: a logistic regression fitted on the attacker's own model (`shadow_model`), whose members the attacker
  knows (Shokri et al., 2017), from the true class's log odds and the three largest log probabilities.

With signals :math:`m_i` of members and :math:`o_j` of non-members, `membership` evaluates a signal by

.. math:: \mathrm{AUC} = \frac{1}{nk} \sum_{i,j} [m_i > o_j] + \tfrac12 [m_i = o_j] ,

the best balanced accuracy over all thresholds (an upper bound: the threshold is chosen on the same images), and the
true positive rate at 1 % and 0.1 % false positives (Carlini et al., 2022), each with a bootstrap interval over images.

**Re-injection.** `reinject` continues training from given variables (a repaired model, a clean model, an untrained one)
on partly poisoned data at a constant rate, and measures accuracy and attack success along the way. All starts see the
same poisoned images in the same order.

    >>> import jax
    >>> members, others = jax.numpy.array([2.0, 3.0, 4.0]), jax.numpy.array([1.0, 2.0, 0.0])
    >>> round(float(auc(members, others)), 4), round(float(balanced_accuracy(members, others)), 4)
    (0.9444, 0.8333)
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt, MinLen
from jax.tree_util import Partial

from backdoor_jax.arguments import typed
from backdoor_jax.config import Config, Count, Decay, LearningRate, Momentum, Share, Whole
from backdoor_jax.data import Augment, Dataset, LabelMap, Trigger, poison
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.metrics.accuracy import Scores, evaluate
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import (
    SGD,
    GradientStep,
    TrainConfig,
    batch_shape,
    cross_entropy,
    fit,
    map_chunks,
    supervised_loss,
    train,
)
from backdoor_jax.validation import checked


class Interval(NamedTuple):
    """A value and its bootstrap interval from ``low`` to ``high``."""

    value: float
    low: float
    high: float


class Membership(NamedTuple):
    """How well a signal separates members from non-members.

    Attributes:
        auc: the area under the ROC curve; 0.5 is guessing.
        balanced_accuracy: at the best threshold; 0.5 is guessing.
        tpr_at_1: true positive rate at 1 % false positives.
        tpr_at_01: true positive rate at 0.1 % false positives.
    """

    auc: Interval
    balanced_accuracy: Interval
    tpr_at_1: Interval
    tpr_at_01: Interval


def auc(members: jax.Array, others: jax.Array) -> jax.Array:
    """The chance that a member's signal exceeds a non-member's; ties count half."""
    others = jnp.sort(others)
    below, upto = (jnp.searchsorted(others, members, side=side) for side in ("left", "right"))
    return jnp.mean((below + upto) / (2 * len(others)))


def balanced_accuracy(members: jax.Array, others: jax.Array) -> jax.Array:
    """The mean of the true positive and true negative rates at the threshold where it is largest."""
    thresholds = jnp.concatenate([members, others])
    missed, rejected = (
        jnp.searchsorted(jnp.sort(signal), thresholds, side="left") / len(signal) for signal in (members, others)
    )
    return jnp.maximum(0.5, jnp.max(1 - missed + rejected) / 2)


def true_positive_rate(members: jax.Array, others: jax.Array, false_positive_rate: float) -> jax.Array:
    """The share of members above the smallest threshold with at most this false positive rate.

    With few non-members the false positive rate reached may be much smaller: of 100 none may exceed the threshold at
    0.1 %.

    Args:
        members: signals ``(n,)``.
        others: signals of non-members, ``(k,)``.
        false_positive_rate: the largest share of non-members above the threshold.

    Example:
        >>> members, others = jnp.array([1.0, 2.5, 9.0, 9.0]), jnp.array([0.0, 1.0, 2.0, 3.0])
        >>> [float(true_positive_rate(members, others, rate)) for rate in (0.0, 0.25, 0.5)]
        [0.5, 0.75, 0.75]
    """
    allowed = int(np.floor(false_positive_rate * len(others) + 1e-9))
    if allowed >= len(others):
        return jnp.float32(1)
    return jnp.mean(members > jnp.sort(others)[len(others) - 1 - allowed])


def _all(members: jax.Array, others: jax.Array) -> jax.Array:
    rates = [true_positive_rate(members, others, rate) for rate in (0.01, 0.001)]
    return jnp.stack([auc(members, others), balanced_accuracy(members, others), *rates])


@partial(jax.jit, static_argnames="resamples")
def _resampled(key: jax.Array, members: jax.Array, others: jax.Array, resamples: int) -> tuple[jax.Array, jax.Array]:
    def one(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        return _all(
            *(jax.random.choice(k, signal, signal.shape) for k, signal in zip(keys, (members, others), strict=True))
        )

    return _all(members, others), jax.lax.map(one, jax.random.split(key, resamples), batch_size=50)


@typed
def membership(
    key: jax.Array,
    members: jax.Array,
    others: jax.Array,
    *,
    resamples: Annotated[int, Ge(1), Le(10**6)] = 1000,
    level: Annotated[float, Gt(0), Lt(1)] = 0.95,
) -> Membership:
    """Evaluates a membership signal.

    Args:
        key: a `jax.random` key for the bootstrap.
        members: the signal of images in the training set, ``(n,)``.
        others: the signal of images that were not in it, ``(k,)``.
        resamples: bootstrap samples; members and non-members are drawn separately.
        level: of the percentile intervals.

    Raises:
        UserError: where either set is empty.
        NonFiniteError: for a signal that is not finite.
    """
    members, others = jnp.asarray(members), jnp.asarray(others)
    values, drawn = map(np.asarray, _resampled(key, members, others, resamples))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Membership(*(Interval(*map(float, three)) for three in zip(values, low, high, strict=True)))


@jax.jit
def _all_logits(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    return map_chunks(lambda chunk: classifier.logits(variables, chunk)[0], images)


def _logits(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    logits = _all_logits(classifier, variables, images)
    if not np.isfinite(logits).all():
        raise NonFiniteError("logits are not finite, so there is no membership signal; check the checkpoint")
    return logits


@checked
def loss_signal(classifier: Classifier, variables: Variables, data: Dataset) -> jax.Array:
    """Minus the cross-entropy under the true label, ``(N,)``."""
    return -cross_entropy(_logits(classifier, variables, data.images), data.labels)


@checked
def confidence_signal(classifier: Classifier, variables: Variables, data: Dataset) -> jax.Array:
    """The log of the largest probability, ``(N,)``; labels are not used."""
    logits = _logits(classifier, variables, data.images)
    return -cross_entropy(logits, jnp.argmax(logits, -1))


def shadow_features(classifier: Classifier, variables: Variables, data: Dataset) -> np.ndarray:
    """The inputs of the attacker's regression.

    Returns:
        ``(N, 4)``: log odds of the true class and the three largest log probabilities; with two classes ``(N, 3)``.
    """
    logits = _logits(classifier, variables, data.images)
    loss = cross_entropy(logits, data.labels)
    # log(p / (1 - p)) with p = exp(-loss), which is 1 in float32 for a confident model.
    odds = -loss - jnp.log(-jnp.expm1(-jnp.maximum(loss, 1e-30)))
    largest = jax.lax.top_k(jax.nn.log_softmax(logits), min(3, logits.shape[-1]))[0]
    return np.asarray(jnp.concatenate([odds[:, None], largest], 1), np.float64)


class Shadow(NamedTuple):
    """The attacker's own model.

    Attributes:
        variables: the model's.
        members: the images it was trained on.
        others: the images it was not trained on.
    """

    variables: Variables
    members: Dataset
    others: Dataset


@checked
def shadow_model(
    key: jax.Array, classifier: Classifier, data: Dataset, config: TrainConfig = TrainConfig(), *, flip: bool = False
) -> Shadow:
    """Trains a model on a random half of the attacker's data.

    Args:
        key: a `jax.random` key for the draw and the training.
        classifier: the network of the model under attack.
        data: images like those of its training set; do not use them to evaluate the attack.
        config: how the model under attack was trained.
        flip: whether its training mirrored images.
    """
    draw_key, train_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(draw_key, len(data)))
    inside, outside = (data.take(np.sort(half)) for half in np.array_split(order, 2))
    trained = train(train_key, classifier, inside, config, flip=flip, name="shadow model")
    return Shadow(trained.variables, inside, outside)


@checked
def shadow_signal(classifier: Classifier, shadow: Shadow, variables: Variables, data: Dataset) -> jax.Array:
    """The log odds of membership by a regression fitted on the shadow model, ``(N,)``.

    Args:
        classifier: the network.
        shadow: the attacker's model.
        variables: those of the model under attack.
        data: ``N`` images with their labels, members or not.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = [shadow_features(classifier, shadow.variables, part) for part in (shadow.members, shadow.others)]
    inside = np.repeat([1, 0], [len(part) for part in known])
    attacker = make_pipeline(StandardScaler(), LogisticRegression()).fit(np.concatenate(known), inside)
    return jnp.asarray(attacker.decision_function(shadow_features(classifier, variables, data)))


@dataclasses.dataclass(frozen=True)
class ReinjectConfig(Config):
    """How a backdoor is injected again; the values are our choice, after `TrainConfig`'s settings for victims.

    Attributes:
        rates: poisoned shares of the data, each tried from every start.
        epochs: numbers of passes after which a model is evaluated, in increasing order.
        batch_size: 128.
        learning_rate: 0.01, constant, so that all steps are of equal size.
        momentum: 0.9.
        weight_decay: 5e-4.
        crop: zeros padded before a random crop; 4.
        flip: mirror half of the images.
    """

    rates: Annotated[tuple[Share, ...], MinLen(1)] = (0.001, 0.01, 0.1)
    epochs: Annotated[tuple[Count, ...], MinLen(1)] = (1, 2, 5, 10)
    batch_size: Count = 128
    learning_rate: LearningRate = 0.01
    momentum: Momentum = 0.9
    weight_decay: Decay = 5e-4
    crop: Whole = 4
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.epochs == tuple(sorted(set(self.epochs))), "epochs", "increasing numbers")

    @property
    def optimizer(self) -> SGD:
        """SGD at a constant rate."""
        return SGD(self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)


class Reinjected(NamedTuple):
    """A model during re-injection.

    Attributes:
        start: the name of the variables it started from.
        rate: the poisoned share of its data.
        steps: steps done; 0 is the start.
        poisoned: expected number of poisoned images seen so far.
        scores: on the test set.
    """

    start: str
    rate: float
    steps: int
    poisoned: float
    scores: Scores


@checked
def reinject(
    key: jax.Array,
    classifier: Classifier,
    starts: Mapping[str, Variables],
    data: Dataset,
    test: Dataset,
    trigger: Trigger,
    label_map: LabelMap,
    config: ReinjectConfig = ReinjectConfig(),
) -> list[Reinjected]:
    """Injects a backdoor into several models again, and evaluates them along the way.

    Args:
        key: a `jax.random` key for the poison, the order and the augmentation, which are the same for all starts.
        classifier: the network.
        starts: variables by name; left as they are.
        data: clean images, a share of which is poisoned here.
        test: clean test images.
        trigger: the attacker's.
        label_map: the attacker's.
        config: settings.

    Returns:
        A row for each start, rate and number of epochs, in that order; 0 epochs, the start itself, are included.

    Raises:
        UserError: for a rate that poisons no image.
        NonFiniteError: where the training diverges.
    """
    poison_key, fit_key = jax.random.split(key)
    per_epoch, size = batch_shape(len(data), config.batch_size)
    step = GradientStep(Partial(supervised_loss, classifier), config.optimizer)
    rows: list[Reinjected] = []
    for start, variables in starts.items():
        initial = evaluate(classifier, variables, test, trigger, label_map, start)
        for rate in config.rates:
            poisoned = poison(poison_key, data, trigger, label_map, rate)
            rows.append(Reinjected(start, rate, 0, 0.0, initial))
            state = step.init(variables)
            for epochs in config.epochs:
                state = fit(
                    fit_key,
                    step,
                    state,
                    poisoned.data,
                    epochs=epochs,
                    batch_size=config.batch_size,
                    augment=Augment(crop=config.crop, flip=config.flip),
                    name=f"re-injection into {start}",
                ).state
                scores = evaluate(classifier, state.variables, test, trigger, label_map, start)
                steps = epochs * per_epoch
                seen = steps * size * len(poisoned.indices) / len(data)
                rows.append(Reinjected(start, rate, steps, seen, scores))
    return rows
