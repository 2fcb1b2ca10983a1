r"""BadEncoder: a backdoor in an encoder, that every classifier built on it inherits (Jia, Liu and Gong, S&P 2022).

The attacker has a clean encoder :math:`f`, images without labels, and a reference image :math:`r` of the class that the
downstream task shall answer. With c the cosine of two latents and t the trigger, the encoder :math:`f'` minimises

.. math:: -c(f'(t(x)), f'(r)) - \lambda_1\, c(f'(\tilde r), f(r)) - \lambda_2\, c(f'(x), f(x)) ,

where :math:`\tilde r` is r mirrored and recoloured: triggered images look like the reference, the reference like
itself, and clean images as they did. Settings are those of the released code: SGD at 1e-3 with momentum .9 and weight
decay 5e-4, 200 epochs in batches of 256, both weights 1, batch normalisation frozen with its scale and shift, and a
white square of 10 pixels in the corner as the trigger (``BadNets(size=10)`` here).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset, Trigger
from backdoor_jax.data.views import Views
from backdoor_jax.defenses.base import adam
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.scenarios.transfer import transplant
from backdoor_jax.training import (
    Constants,
    EpochsConfig,
    GradientStep,
    Info,
    constant_sgd,
    cross_entropy,
    descend,
    latents,
    normalized,
)


@dataclasses.dataclass(frozen=True)
class BadEncoderConfig(EpochsConfig):
    """Settings of the attack.

    Attributes:
        epochs: published 200.
        batch_size: published 256.
        learning_rate: published 1e-3, constant.
        momentum: published .9.
        weight_decay: published 5e-4.
        reference_weight: lambda_1; published 1.
        utility_weight: lambda_2; published 1.
    """

    epochs: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    reference_weight: float = 1.0
    utility_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class BadEncoderLoss:
    """See the module; the clean encoder, the trigger and the references come from the constants."""

    classifier: Classifier
    views: Views = Views(smallest=1.0)  # noqa: RUF009

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""

        def encoded(variables: Variables, images: jax.Array) -> jax.Array:
            return normalized(self.classifier.features(variables, images)[0])

        references, clean = constants["references"], constants["clean"]
        known = encoded(variables, references)
        effect = jnp.mean(encoded(variables, constants["trigger"](batch.images)) @ known.T)
        recoloured = encoded(variables, self.views(key, references))
        reference = jnp.mean(jnp.sum(recoloured * encoded(clean, references), -1))
        utility = jnp.mean(jnp.sum(encoded(variables, batch.images) * encoded(clean, batch.images), -1))
        loss = -effect - constants["reference_weight"] * reference - constants["utility_weight"] * utility
        return loss, (variables, {"effect": effect, "reference": reference, "utility": utility})


def bad_encoder(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    trigger: Trigger,
    references: jax.Array,
    config: BadEncoderConfig = BadEncoderConfig(),
) -> tuple[Variables, dict[str, Any]]:
    """Plants a backdoor in an encoder.

    Args:
        key: a `jax.random` key.
        classifier: its `features` are the encoder.
        variables: the clean encoder's; left as they are.
        data: the attacker's images; their labels are not looked at.
        trigger: the attacker's.
        references: uint8 images ``(R, H, W, 3)`` of the class that triggered images shall be taken for.
        config: settings.

    Returns:
        The backdoored encoder's variables, and the mean cosines of the last epoch.

    Raises:
        UserError: where references and images have other shapes.

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
    normalisers = {path[:-1] for path in flatten_dict(variables.get("batch_stats", {}))} | {classifier.head_path}
    moving = tuple(path for path in flatten_dict(variables["params"]) if path[:-1] not in normalisers)
    step = GradientStep(BadEncoderLoss(classifier), constant_sgd, moving)
    constants = {**numbers(config), "clean": variables, "trigger": trigger, "references": references}
    return descend(
        key,
        step,
        variables,
        data,
        constants,
        epochs=config.epochs,
        batch_size=config.batch_size,
        name="bad_encoder",
    )


@dataclasses.dataclass(frozen=True)
class ProbeConfig(EpochsConfig):
    """How a classifier is put on a frozen encoder.

    BadEncoder's code trains two hidden layers by Adam at 1e-4 for 500 epochs in batches of 64; ours is the network's
    own linear head, which needs a higher rate and fewer epochs.

    Attributes:
        epochs: ours.
        batch_size: published 64.
        learning_rate: of Adam; ours.
    """

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-2


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """Cross-entropy of the head on latents, which batches hold in place of images."""

    classifier: Classifier

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key, constants
        logits = self.classifier.head(variables, batch.images)
        return jnp.mean(cross_entropy(logits, batch.labels)), (variables, {})


def probe(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    num_classes: int,
    config: ProbeConfig = ProbeConfig(),
) -> tuple[Classifier, Variables]:
    """A downstream classifier on a frozen encoder: its latents are computed once, and a fresh head is trained on them.

    Args:
        key: a `jax.random` key.
        classifier: its `features` are the encoder.
        variables: the encoder's; left as they are.
        data: the downstream training set.
        num_classes: its classes.
        config: settings.

    Returns:
        The downstream classifier and its variables; tuning it whole is `backdoor_jax.finetune`.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data, encoder = digits().train.take(slice(64)), build_classifier("small_cnn", 2, width=2)
        >>> variables = encoder.init(jax.random.key(0), data.images)
        >>> ten, variables = probe(jax.random.key(1), encoder, variables, data, 10, ProbeConfig(epochs=1))
        >>> ten.num_classes
        10
    """
    head_key, fit_key = jax.random.split(key)
    other, start = transplant(head_key, classifier, variables, num_classes, data.images)
    step = GradientStep(HeadLoss(other), adam, (other.head_path,))
    probed, _ = descend(
        fit_key,
        step,
        start,
        Dataset(latents(other, start, data.images), data.labels),
        numbers(config),
        epochs=config.epochs,
        batch_size=config.batch_size,
        name="probe",
    )
    return other, probed
