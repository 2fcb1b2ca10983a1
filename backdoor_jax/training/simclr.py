r"""SimCLR: an encoder pre-trained without labels (Chen et al., ICML 2020, arXiv 2002.05709).

Two random views of every image are encoded and projected; with :math:`z` the 2B normalised projections and :math:`p(i)`
the other view of i

.. math:: L = \frac{1}{2B} \sum_i -\log
    \frac{\exp(z_i^\top z_{p(i)} / \tau)}{\sum_{j \ne i} \exp(z_i^\top z_j / \tau)} .

Settings are those of BadEncoder's code (Jia, Liu and Gong, S&P 2022): 1,000 epochs in batches of 256, Adam at 1e-3 with
weight decay 1e-6, temperature .5, a projection of 512 hidden and 128 output units.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset
from backdoor_jax.data.views import Views
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.models.layers import BatchNorm
from backdoor_jax.training.descent import descend
from backdoor_jax.training.engine import Constants, GradientStep, Info
from backdoor_jax.training.supervised import EpochsConfig


@dataclasses.dataclass(frozen=True)
class SimCLRConfig(EpochsConfig):
    """Settings of the pre-training.

    Attributes:
        epochs: published 1,000.
        batch_size: published 256.
        learning_rate: of Adam; published 1e-3, constant.
        weight_decay: published 1e-6, added to the gradient.
        temperature: published .5.
    """

    epochs: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    temperature: float = 0.5

    def __post_init__(self) -> None:
        self.require(self.batch_size > 1, "batch_size", "at least 2")
        super().__post_init__()
        self.require(self.temperature > 0, "temperature", "a positive number")


class Projector(nn.Module):
    """Latents ``(B, D)`` to what is compared ``(B, outputs)``."""

    hidden: int = 512
    outputs: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The projection, not yet normalised."""
        x = nn.relu(BatchNorm()(nn.Dense(self.hidden, use_bias=False)(x), train))
        return nn.Dense(self.outputs)(x)


def normalized(x: jax.Array) -> jax.Array:
    """Rows at length 1.

    Example:
        >>> normalized(jnp.array([[3.0, 4.0]])).round(1).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    return x / jnp.maximum(optax.safe_norm(x, 1e-12, axis=-1, keepdims=True), 1e-12)


def contrast(one: jax.Array, two: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """The normalised temperature-scaled cross-entropy of two views' projections ``(B, d)``.

    Example:
        >>> z = jnp.ones((4, 3))
        >>> round(float(contrast(z, z, 0.5)), 4) == round(float(jnp.log(7)), 4)
        True
    """
    z = normalized(jnp.concatenate([one, two]))
    likeness = z @ z.T / temperature
    likeness = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, likeness)
    other = jnp.roll(jnp.arange(len(z)), len(one))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(likeness, other))


@dataclasses.dataclass(frozen=True)
class ContrastiveLoss:
    """`contrast` of two views of each image; variables are `join`'s of ``encoder`` and ``projector``."""

    classifier: Classifier
    projector: Projector
    views: Views

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        encoder, projector, seen = part(variables, "encoder"), part(variables, "projector"), []
        for view_key in jax.random.split(key):
            latent, encoder = self.classifier.features(encoder, self.views(view_key, batch.images), train=True)
            projected, projector = run(self.projector, projector, latent, train=True)
            seen.append(projected)
        one, two = seen
        loss = contrast(one, two, constants["temperature"])
        return loss, (join(encoder=encoder, projector=projector), {})


@dataclasses.dataclass(frozen=True)
class DecayedAdam:
    """PyTorch's Adam, whose weight decay is added to the gradient; both come from the constants."""

    def __call__(self, constants: Constants) -> optax.GradientTransformation:
        """The transformation for these constants."""
        decay = optax.add_decayed_weights(constants["weight_decay"])
        return optax.chain(decay, optax.adam(constants["learning_rate"]))


def pretrain(
    key: jax.Array,
    classifier: Classifier,
    data: Dataset,
    config: SimCLRConfig = SimCLRConfig(),
    *,
    optimizer: Callable[[Constants], optax.GradientTransformation] = DecayedAdam(),
    views: Views = Views(),
    name: str = "simclr",
    checkpoints: Path | None = None,
) -> tuple[Variables, dict[str, Any]]:
    """Pre-trains the encoder of a classifier by SimCLR.

    Args:
        key: a `jax.random` key.
        classifier: its `features` are the encoder; its head stays as it is drawn.
        data: images; their labels are not looked at.
        config: settings.
        optimizer: makes the Optax transformation out of the settings' numbers.
        views: what is compared.
        name: what progress and errors call the run.
        checkpoints: a folder for Orbax checkpoints; a killed run resumes from there.

    Returns:
        The classifier's variables, and what happened.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> data, classifier = digits().train.take(slice(32)), build_classifier("small_cnn", 10, width=2)
        >>> settings = SimCLRConfig(epochs=1, batch_size=32)
        >>> variables, info = pretrain(jax.random.key(0), classifier, data, settings)
        >>> info["steps"]
        1
    """
    init_key, projector_key, fit_key = jax.random.split(key, 3)
    encoder = classifier.init(init_key, data.images[:1])
    latent = jax.eval_shape(lambda: classifier.features(encoder, data.images[:1])[0])
    projector = Projector()
    variables = join(encoder=encoder, projector=init(projector, projector_key, jnp.zeros(latent.shape)))
    head = classifier.head_path
    moving = [("encoder", *path) for path in flatten_dict(encoder["params"]) if path[: len(head)] != head]
    step = GradientStep(ContrastiveLoss(classifier, projector, views), optimizer, (*moving, ("projector",)))
    trained, done = descend(
        fit_key,
        step,
        variables,
        data,
        numbers(config),
        epochs=config.epochs,
        batch_size=config.batch_size,
        name=name,
        checkpoints=checkpoints,
    )
    return part(trained, "encoder"), done
