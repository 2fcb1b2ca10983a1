r"""Reactivation: how little brings back an attack that a repair has disabled.

**Retuning** (Min, Qin, Zhang, Li, Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor
Defense", NeurIPS 2024, arXiv 2410.09838): the repaired model is fine-tuned on 1,000 images of which 5 are poisoned.
This is `backdoor_jax.metrics.reinject` at a rate of 0.005 for 5 epochs; its attack success rate is compared with that
of a clean model which is tuned in the same way.

**A search near the old trigger.** Zhu, Liang, Wu ("Breaking the False Sense of Security in Backdoor Defense through
Re-Activation Attack", NeurIPS 2024, arXiv 2405.16134) add to the triggered image :math:`T(x)` one perturbation for all
images,

.. math:: \min_{\|\delta\|_\infty \le \epsilon} \frac1n \sum_i \mathrm{CE}\bigl(f_s(T(x_i) + \delta), t(y_i)\bigr) .

Here the attacker cannot query the repaired model. They have the victim, which they trained, and repair a copy of it
themselves: the *surrogate* :math:`f_s` (`unlearn`) is the victim tuned on images of which half carry the trigger under
their true labels. What misleads the surrogate is then tried on the repair. The papers transfer from models that several
published defenses repaired; this surrogate, and the settings except :math:`\epsilon = 16/255` and the 5 epochs at 0.01,
are ours.

A perturbation of this size can mislead a model that never had a backdoor. So the same perturbation is also tried on
images without the trigger, and on a clean model: what counts is the difference.

    >>> from backdoor_jax import BadNets, build_classifier, digits
    >>> attack, clean = BadNets(target=1), digits().train.take(slice(40))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> trigger, labels = attack.trigger(jax.random.key(1), (16, 16, 3)), attack.label_map(10)
    >>> config = SearchConfig(steps=2, epochs=1)
    >>> surrogate = unlearn(jax.random.key(2), classifier, victim, clean, trigger, config)
    >>> nearby = search_nearby(jax.random.key(3), classifier, surrogate, clean, trigger, labels, config)
    >>> change = nearby(clean.images).astype(int) - trigger(clean.images).astype(int)
    >>> bool(abs(change).max() <= 16)
    True
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from backdoor_jax.compiling import jit
from backdoor_jax.config import Config, Count, LearningRate, Positive, Whole
from backdoor_jax.data import Augment, Dataset, LabelMap, Trigger, is_plain, triggered
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import SGD, GradientStep, cross_entropy, fit, supervised_loss
from backdoor_jax.validation import checked


@dataclasses.dataclass(frozen=True)
class SearchConfig(Config):
    """How a perturbation near the old trigger is searched for.

    Attributes:
        radius: the largest change of a gray level; published 16.
        steps: signed gradient steps; 200, ours.
        step_size: gray levels per step; 1, ours.
        batch_size: images per step, of the search and of the surrogate's tuning; 128, ours.
        epochs: of the surrogate's tuning; published 5.
        learning_rate: of the surrogate's tuning; published 0.01.
        crop: zeros padded before a random crop, in the surrogate's tuning; 4.
        flip: mirror half of the images, in the surrogate's tuning.
    """

    radius: Positive = 16.0
    steps: Count = 200
    step_size: Positive = 1.0
    batch_size: Count = 128
    epochs: Count = 5
    learning_rate: LearningRate = 0.01
    crop: Whole = 4
    flip: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NearbyTrigger:
    """A trigger and a perturbation that is added after it.

    Attributes:
        trigger: the old trigger.
        perturbation: float32 ``(H, W, channels)``, gray levels of either sign.
    """

    trigger: Trigger
    perturbation: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)``, triggered, perturbed, rounded and clipped."""
        pixels = jnp.round(self.trigger(images).astype(jnp.float32) + self.perturbation)
        return jnp.clip(pixels, 0, 255).astype(jnp.uint8)


@checked
def unlearn(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    trigger: Trigger,
    config: SearchConfig = SearchConfig(),
) -> Variables:
    """Returns the attacker's own repair of a victim: it is tuned on images of which half carry the trigger.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: clean images with their true labels, which triggered ones keep.
        trigger: the attacker's.
        config: settings.

    Raises:
        NonFiniteError: where the tuning diverges.
    """
    images = data.images.at[::2].set(triggered(trigger, data.images[::2]))
    step = GradientStep(Partial(supervised_loss, classifier), SGD(config.learning_rate, momentum=0.9))
    return fit(
        key,
        step,
        step.init(variables),
        Dataset(images, data.labels),
        epochs=config.epochs,
        batch_size=config.batch_size,
        augment=Augment(crop=config.crop, flip=config.flip),
        name="the attacker's surrogate",
    ).state.variables


@checked
def search_nearby(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    trigger: Trigger,
    label_map: LabelMap,
    config: SearchConfig = SearchConfig(),
) -> NearbyTrigger:
    """Returns the trigger with one perturbation for all images that sends them to the attacker's class again.

    Args:
        key: a `jax.random` key for the choice of batches.
        classifier: the network.
        variables: of the model whose gradients are followed, such as a surrogate's.
        data: clean images with their true labels.
        trigger: the attacker's.
        label_map: the attacker's.
        config: settings.
    """
    labels = label_map(data.labels)
    perturbation = _search(classifier, key, variables, triggered(trigger, data.images), labels, config)
    return NearbyTrigger(Partial(trigger) if is_plain(trigger) else trigger, perturbation)


@partial(jit, static_argnums=0)
def _search(
    classifier: Classifier,
    key: jax.Array,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    config: SearchConfig,
) -> jax.Array:
    """Signed gradient descent, projected to the box of `SearchConfig.radius`."""

    def loss(perturbation: jax.Array, rows: jax.Array) -> jax.Array:
        pixels = jnp.clip(images[rows].astype(jnp.float32) + perturbation, 0, 255)
        logits, _ = classifier.logits(variables, pixels)
        return jnp.mean(cross_entropy(logits.astype(jnp.float32), labels[rows]))

    def step(perturbation: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        rows = jax.random.randint(key, (min(config.batch_size, len(images)),), 0, len(images))
        moved = perturbation - config.step_size * jnp.sign(jax.grad(loss)(perturbation, rows))
        return jnp.clip(moved, -config.radius, config.radius), None

    keys = jax.random.split(key, config.steps)
    return jax.lax.scan(step, jnp.zeros(images.shape[1:]), keys)[0]
