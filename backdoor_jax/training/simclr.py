r"""SimCLR: an encoder pre-trained without labels (Chen et al., ICML 2020, arXiv 2002.05709).

Two random views of every image are encoded and projected. With the 2B projections :math:`z` scaled to length 1, and
:math:`p(i)` the other view of i, the loss is

.. math:: L = \frac{1}{2B} \sum_i -\log
    \frac{\exp(z_i^\top z_{p(i)} / \tau)}{\sum_{j \ne i} \exp(z_i^\top z_j / \tau)} .

The settings are those of BadEncoder's code (Jia, Liu and Gong, S&P 2022): 1,000 epochs in batches of 256, Adam at 1e-3
with weight decay 1e-6, temperature 0.5, and a projection with 512 hidden and 128 output units.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge
from flax.traverse_util import flatten_dict
from jax.tree_util import Partial

from backdoor_jax.config import Count, Decay, LearningRate, Positive
from backdoor_jax.data import Dataset
from backdoor_jax.data.views import Views
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.models.layers import BatchNorm
from backdoor_jax.models.rectifier import relu
from backdoor_jax.training.engine import GradientStep, LossResult
from backdoor_jax.training.fitting import fit
from backdoor_jax.training.optimizers import DecayedAdam, Optimizer
from backdoor_jax.training.supervised import EpochsConfig
from backdoor_jax.validation import checked_encoder


@dataclasses.dataclass(frozen=True)
class SimCLRConfig(EpochsConfig):
    """Settings of the pre-training.

    Attributes:
        epochs: published 1,000.
        batch_size: published 256.
        learning_rate: of Adam; published 1e-3, constant.
        weight_decay: published 1e-6, added to the gradient.
        temperature: published 0.5.
    """

    epochs: Count = 1000
    batch_size: Annotated[int, Ge(2)] = 256
    learning_rate: LearningRate = 1e-3
    weight_decay: Decay = 1e-6
    temperature: Positive = 0.5

    def optimizer(self, images: int) -> Optimizer:
        """Adam at a constant rate with weight decay, for any number of images."""
        del images
        return DecayedAdam(self.learning_rate, weight_decay=self.weight_decay)


class Projector(nn.Module):
    """Maps latents ``(B, D)`` to the projections ``(B, outputs)`` that are compared."""

    hidden: int = 512
    outputs: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The projections, not yet scaled to length 1."""
        x = relu(BatchNorm()(nn.Dense(self.hidden, use_bias=False)(x), train))
        return nn.Dense(self.outputs)(x)


PROJECTOR = Projector()


def unit_rows(x: jax.Array) -> jax.Array:
    """Rows scaled to length 1.

    Example:
        >>> unit_rows(jnp.array([[3.0, 4.0]])).round(1).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    return x / jnp.maximum(optax.safe_norm(x, 1e-12, axis=-1, keepdims=True), 1e-12)


def contrast(one: jax.Array, two: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """The normalized temperature-scaled cross-entropy (NT-Xent) of two views.

    Args:
        one: projections of one view of each image, ``(B, d)``.
        two: projections of the other view of each, ``(B, d)``.
        temperature: tau.

    Example:
        >>> z = jnp.ones((4, 3))
        >>> round(float(contrast(z, z, 0.5)), 4) == round(float(jnp.log(7)), 4)
        True
    """
    z = unit_rows(jnp.concatenate([one, two]))
    similarity = z @ z.T / temperature
    similarity = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, similarity)
    other = jnp.roll(jnp.arange(len(z)), len(one))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(similarity, other))


def contrastive_loss(
    classifier: Classifier,
    views: Views,
    temperature: jax.Array | float,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """The `contrast` of two views of each image; ``variables`` are those of ``encoder`` and ``projector``, joined."""
    encoder, projection, seen = part(variables, "encoder"), part(variables, "projector"), []
    for view_key in jax.random.split(key):
        latent, encoder = classifier.features(encoder, views(view_key, batch.images), train=True)
        projected, projection = run(PROJECTOR, projection, latent, train=True)
        seen.append(projected)
    return contrast(seen[0], seen[1], temperature), (join(encoder=encoder, projector=projection), {})


@checked_encoder
def pretrain(
    key: jax.Array,
    classifier: Classifier,
    data: Dataset,
    config: SimCLRConfig = SimCLRConfig(),
    *,
    views: Views = Views(),
    name: str = "simclr",
    checkpoints: Path | None = None,
) -> tuple[Variables, dict[str, Any]]:
    """Pre-trains the encoder of a classifier with SimCLR.

    Args:
        key: a `jax.random` key.
        classifier: its `features` are the encoder; its head stays as initialized.
        data: images; their labels are not used.
        config: settings.
        views: makes the views that are compared.
        name: what progress and errors call the run.
        checkpoints: a folder for Orbax checkpoints; a killed run resumes from there.

    Returns:
        The classifier's variables, and the steps done with means of the last epoch.

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
    variables = join(encoder=encoder, projector=init(PROJECTOR, projector_key, jnp.zeros(latent.shape)))
    head = classifier.head_path
    moving = [("encoder", *path) for path in flatten_dict(encoder["params"]) if path[: len(head)] != head]
    loss = Partial(contrastive_loss, classifier, views, config.temperature)
    step = GradientStep(loss, config.optimizer(len(data)), trainable=(*moving, ("projector",)))
    fitted = fit(
        fit_key,
        step,
        step.init(variables),
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        name=name,
        checkpoints=checkpoints,
    )
    return part(fitted.variables, "encoder"), fitted.info
