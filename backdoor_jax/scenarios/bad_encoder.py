r"""BadEncoder: a backdoor in an encoder that every classifier built on it inherits (Jia, Liu and Gong, S&P 2022).

The attacker has a clean encoder :math:`f`, images without labels, and reference images :math:`r` of the class that the
downstream classifier should predict. With c the cosine of two latents and t the trigger, the encoder :math:`f'`
minimizes

.. math:: -c(f'(t(x)), f'(r)) - \lambda_1\, c(f'(\tilde r), f(r)) - \lambda_2\, c(f'(x), f(x)) ,

where :math:`\tilde r` is r mirrored and recolored: latents of triggered images become those of the references, while
latents of references and of clean images stay what they were. Settings are those of the released code: SGD at 1e-3 with
momentum 0.9 and weight decay 5e-4, 200 epochs in batches of 256, both weights 1, batch normalization frozen with its
scale and shift, and a white square as the trigger, of 10 pixels, one away from the lower right corner
(``BadNets(size=10, border=1)`` here).

Deviations. The code adds one reference to each batch and draws its views once a step; here every reference is in every
step. It divides latents by their length before the downstream classifier; here the classifier sees them as they are, so
that it is an ordinary network, which a defense can repair.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.tree_util import Partial

from backdoor_jax.config import Count, Decay, LearningRate, Momentum, NonNegative
from backdoor_jax.data import Dataset, Trigger, apply_trigger, is_plain
from backdoor_jax.data.views import Views
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.scenarios.transfer import replace_head
from backdoor_jax.training import (
    SGD,
    Adam,
    EpochsConfig,
    GradientStep,
    LossResult,
    cross_entropy,
    fit,
    latents,
    unit_rows,
)
from backdoor_jax.validation import checked_encoder


@dataclasses.dataclass(frozen=True)
class BadEncoderConfig(EpochsConfig):
    """Settings of the attack.

    Attributes:
        epochs: published 200.
        batch_size: published 256.
        learning_rate: published 1e-3, constant.
        momentum: published 0.9.
        weight_decay: published 5e-4.
        reference_weight: lambda_1; published 1.
        utility_weight: lambda_2; published 1.
    """

    epochs: Count = 200
    batch_size: Count = 256
    learning_rate: LearningRate = 1e-3
    momentum: Momentum = 0.9
    weight_decay: Decay = 5e-4
    reference_weight: NonNegative = 1.0
    utility_weight: NonNegative = 1.0

    @property
    def optimizer(self) -> SGD:
        """SGD at a constant rate."""
        return SGD(self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)


def bad_encoder_loss(
    classifier: Classifier,
    config: BadEncoderConfig,
    views: Views,
    clean: Variables,
    trigger: Trigger,
    references: jax.Array,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """The attacker's objective on one batch; logs its three mean cosines.

    Args:
        classifier: its `features` are the encoder.
        config: gives ``reference_weight`` and ``utility_weight``.
        views: mirrors and recolors the references.
        clean: the clean encoder's variables.
        trigger: the attacker's.
        references: uint8 images ``(R, H, W, 3)`` of the target class.
        variables: the backdoored encoder's.
        batch: the attacker's images; their labels are not used.
        key: a `jax.random` key for the views.
    """

    def encode(variables: Variables, images: jax.Array) -> jax.Array:
        return unit_rows(classifier.features(variables, images)[0])

    targets = encode(variables, references)
    effect = jnp.mean(encode(variables, trigger(batch.images)) @ targets.T)
    recolored = encode(variables, views(key, references))
    reference = jnp.mean(jnp.sum(recolored * encode(clean, references), -1))
    utility = jnp.mean(jnp.sum(encode(variables, batch.images) * encode(clean, batch.images), -1))
    loss = -effect - config.reference_weight * reference - config.utility_weight * utility
    return loss, (variables, {"effect": effect, "reference": reference, "utility": utility})


@checked_encoder
def bad_encoder(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    trigger: Trigger,
    references: jax.Array,
    config: BadEncoderConfig = BadEncoderConfig(),
) -> tuple[Variables, dict[str, Any]]:
    """Trains a backdoor into an encoder.

    Args:
        key: a `jax.random` key.
        classifier: its `features` are the encoder.
        variables: the clean encoder's; left as they are.
        data: the attacker's images; their labels are not used.
        trigger: the attacker's; a pytree.
        references: uint8 images ``(R, H, W, 3)`` of the class that triggered images should be classified as.
        config: settings.

    Returns:
        The backdoored encoder's variables, and the steps done with the mean cosines of the last epoch.

    Raises:
        UserError: where references and images have different shapes.
        NonFiniteError: where the training diverges.

    Example:
        >>> from backdoor_jax import BadNets, build_classifier, digits
        >>> data, classifier = digits().train.take(slice(32)), build_classifier("small_cnn", 10, width=2)
        >>> clean = classifier.init(jax.random.key(0), data.images)
        >>> trigger = BadNets(size=5).trigger(jax.random.key(1), data.images.shape[1:])
        >>> settings = BadEncoderConfig(epochs=1)
        >>> _, info = bad_encoder(jax.random.key(2), classifier, clean, data, trigger, data.images[:1], settings)
        >>> sorted(info["last_epoch"])
        ['effect', 'loss', 'reference', 'utility']
    """
    if references.ndim != 4 or references.shape[1:] != data.images.shape[1:]:
        raise UserError(
            f"references have shape {references.shape}, expected (R, {', '.join(map(str, data.images.shape[1:]))})"
        )
    frozen = {path[:-1] for path in flatten_dict(variables.get("batch_stats", {}))} | {classifier.head_path}
    trainable = tuple(path for path in flatten_dict(variables["params"]) if path[:-1] not in frozen)
    views = Views(smallest=1.0)
    traced = Partial(apply_trigger, Partial(trigger) if is_plain(trigger) else trigger)
    loss = Partial(bad_encoder_loss, classifier, config, views, variables, traced, references)
    step = GradientStep(loss, config.optimizer, trainable=trainable)
    fitted = fit(
        key,
        step,
        step.init(variables),
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        name="bad_encoder",
    )
    return fitted.variables, fitted.info


@dataclasses.dataclass(frozen=True)
class ProbeConfig(EpochsConfig):
    """How a classifier is trained on a frozen encoder.

    BadEncoder's code trains two hidden layers by Adam at 1e-4 for 500 epochs in batches of 64. Here it is the network's
    own linear head, which needs a higher rate and fewer epochs.

    Attributes:
        epochs: our choice.
        batch_size: published 64.
        learning_rate: of Adam; our choice.
    """

    epochs: Count = 100
    batch_size: Count = 64
    learning_rate: LearningRate = 1e-2


def head_loss(classifier: Classifier, variables: Variables, batch: Dataset, key: jax.Array) -> LossResult:
    """Mean cross-entropy of the head on latents ``(B, D)``, which the batch holds in place of images."""
    del key
    logits = classifier.head(variables, batch.images)
    return jnp.mean(cross_entropy(logits, batch.labels)), (variables, {})


@checked_encoder
def probe(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    num_classes: int,
    config: ProbeConfig = ProbeConfig(),
) -> tuple[Classifier, Variables]:
    """Trains a new head on a frozen encoder, whose latents are computed once.

    Args:
        key: a `jax.random` key.
        classifier: its `features` are the encoder.
        variables: the encoder's; left as they are.
        data: the downstream training set.
        num_classes: the number of its classes.
        config: settings.

    Returns:
        The downstream classifier and its variables. To tune the encoder as well, apply `backdoor_jax.FineTune` to them.

    Raises:
        UserError: where the network cannot be built for another number of classes.
        NonFiniteError: where the training diverges.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data, encoder = digits().train.take(slice(64)), build_classifier("small_cnn", 2, width=2)
        >>> variables = encoder.init(jax.random.key(0), data.images)
        >>> downstream, variables = probe(jax.random.key(1), encoder, variables, data, 10, ProbeConfig(epochs=1))
        >>> downstream.num_classes
        10
    """
    head_key, fit_key = jax.random.split(key)
    downstream, start = replace_head(head_key, classifier, variables, num_classes, data.images)
    step = GradientStep(Partial(head_loss, downstream), Adam(config.learning_rate), trainable=(downstream.head_path,))
    fitted = fit(
        fit_key,
        step,
        step.init(start),
        Dataset(latents(downstream, start, data.images), data.labels),
        epochs=config.epochs,
        batch_size=config.batch_size,
        name="probe",
    )
    return downstream, fitted.variables
