r"""LIRA (Doan et al., ICCV 2021): an imperceptible trigger, made for each image by a network trained with the victim.

.. math:: x' = \mathrm{clip}(x + \epsilon \tanh T(x)), \qquad
    \min_{f, T} \; \alpha\,\mathrm{CE}(f(x), y) + (1 - \alpha)\,\mathrm{CE}(f(x'), y^*)

over both networks at first; then T is fixed and the training of the victim continues.

>>> import jax, jax.numpy as jnp
>>> trigger = LIRA(channels=2, depth=1).trigger(jax.random.key(0), (8, 8, 3))
>>> change = trigger(jnp.full((1, 8, 8, 3), 100, jnp.uint8)).astype(int) - 100
>>> bool(jnp.abs(change).max() <= 3)
True
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from backdoor_jax.attacks.base import Attack, AttackContext, Victim
from backdoor_jax.attacks.networks import EncoderDecoder
from backdoor_jax.config import Count, Fraction, Positive, Share
from backdoor_jax.data import Dataset, LabelMap
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.training import SGD, Adam, LossResult, Separately, cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LIRATrigger:
    """Adds bounded noise that a network makes for each image.

    Attributes:
        generator: the network's variables.
        epsilon: the largest change, for pixels in [0, 1].
        channels: the network's width.
        depth: how often the network halves the image.
    """

    generator: dict[str, Any]
    epsilon: jax.Array
    channels: int = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)`` with the noise, rounded."""
        x = images.astype(jnp.float32) / 255
        network = noise_network(images.shape[-1], self.channels, self.depth)
        made, _ = add_noise(network, self.generator, x, self.epsilon, train=False)
        return jnp.round(255 * made).astype(jnp.uint8)


def noise_network(image_channels: int, channels: int, depth: int) -> EncoderDecoder:
    """The U-Net that makes the noise."""
    return EncoderDecoder(image_channels, channels, depth, skips=True)


def add_noise(
    network: EncoderDecoder, variables: dict[str, Any], x: jax.Array, epsilon: jax.Array | float, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """Images in [0, 1] with noise of at most ``epsilon``, and the network's variables after the batch."""
    out, variables = run(network, variables, x, train)
    return jnp.clip(x + epsilon * jnp.tanh(out), 0, 1), variables


@dataclasses.dataclass(frozen=True)
class LIRA(Attack):
    """A U-Net's noise as trigger; the victim sees every image of a batch clean and triggered.

    Deviations from the published code: clean and triggered images are normalized together, because a network that is
    trained on batches of only one kind can tell the kinds apart by the statistics of the batch, and then fails on
    single images (`benchmarks/results/development.md`); noise network and victim are updated in the same step, where
    there the victim sees the noise network of the epoch before; the noise network sees pixels in [0, 1], and epsilon
    bounds those, where there both refer to normalized ones, whose bound on CIFAR-10 is a quarter of ours; images are
    rounded to uint8 at test time only. Deviations from the benchmark: a small U-Net, where it has an autoencoder
    without skip connections; images are cropped as for every other victim, padded with black, and not rotated; the
    joint training has weight decay, and after it the rate is annealed by a cosine.

    Attributes:
        rate: of the training set that a defender would find only: the training itself sees both forms of every image,
            as published, where there is no rate.
        labels: ``all_to_one`` or ``all_to_all``.
        epsilon: largest change, for pixels in [0, 1]; published 0.01.
        generator_rate: Adam's learning rate for the noise network; published 1e-4.
        alpha: weight of the clean loss; published 0.5.
        joint_epochs: passes that train both networks; published 50 of 100 (GTSRB: 25 of 150). The victim's own epochs
            follow: 50 for the published 50 + 50.
        channels: width of the network; ours.
        depth: how often the network halves the image; ours.
    """

    name: ClassVar[str] = "lira"
    fits_trigger: ClassVar[bool] = True
    trains_victim: ClassVar[bool] = True

    labels: Literal["all_to_one", "all_to_all"] = "all_to_one"
    epsilon: Share = 0.01
    generator_rate: Positive = 1e-4
    alpha: Fraction = 0.5
    joint_epochs: Count = 50
    channels: Count = 16
    depth: Count = 3

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> LIRATrigger:
        """The noise network before training."""
        generator = init(noise_network(shape[2], self.channels, self.depth), key, jnp.zeros((1, *shape)))
        return LIRATrigger(generator, jnp.float32(self.epsilon), self.channels, self.depth)

    def train_victim_in(
        self,
        context: AttackContext,
        key: jax.Array,
        train_key: jax.Array,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Victim:
        """Trains noise network and victim together, then the victim alone.

        The training set that a defender would find has the final noise on a fixed share of the images.

        Args:
            context: the network, the data and the training settings.
            key: for the noise network's initial weights and for the choice of images.
            train_key: for the victim's initial weights, the order of images and augmentation.
            name: what progress and errors call the run.
            checkpoints: a folder for checkpoints of both trainings; a killed run resumes from there.

        Raises:
            UserError: for a target or rate that the data do not allow.
            NonFiniteError: if the training diverges.
        """
        trigger_key, choice_key = jax.random.split(key)
        init_key, joint_key, tune_key = jax.random.split(train_key, 3)
        trigger, training = self.trigger(trigger_key, context.shape), context.training
        label_map = self.label_map(context.num_classes)

        constant = SGD(training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay)
        joint = training.step(
            Partial(joint_loss, context.classifier, self, label_map),
            Separately(classifier=constant, generator=Adam(self.generator_rate)),
        )
        victim = context.classifier.init(init_key, context.data.images[:1])
        fitted = context.fit(
            joint_key,
            joint,
            joint.init(join(classifier=victim, generator=trigger.generator)),
            epochs=self.joint_epochs,
            name=f"{name}: noise",
            checkpoints=checkpoints and checkpoints / "joint",
        )
        tune = training.step(
            Partial(victim_loss, context.classifier, self, label_map),
            training.optimizer(len(context.data)),
            trainable=(("classifier",),),
        )
        fitted = context.fit(
            tune_key,
            tune,
            tune.init(fitted.variables),
            epochs=training.epochs,
            name=name,
            checkpoints=checkpoints and checkpoints / "tune",
        )
        trigger = dataclasses.replace(trigger, generator=part(fitted.variables, "generator"))
        poisoned = self.poison_data(choice_key, context, trigger)
        return Victim(part(fitted.variables, "classifier"), trigger, poisoned, {})


def joint_loss(
    classifier: Classifier,
    config: LIRA,
    label_map: LabelMap,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """`clean_and_triggered_loss` while both networks train."""
    del key
    return clean_and_triggered_loss(classifier, config, label_map, variables, batch, train_noise=True)


def victim_loss(
    classifier: Classifier,
    config: LIRA,
    label_map: LabelMap,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """`clean_and_triggered_loss` while the noise network is fixed."""
    del key
    return clean_and_triggered_loss(classifier, config, label_map, variables, batch, train_noise=False)


def clean_and_triggered_loss(
    classifier: Classifier,
    config: LIRA,
    label_map: LabelMap,
    variables: Variables,
    batch: Dataset,
    *,
    train_noise: bool,
) -> LossResult:
    """Weighted cross-entropies of a batch and of its triggered images, normalized together.

    Args:
        classifier: the victim's network.
        config: gives ``epsilon``, ``alpha`` and the size of the noise network.
        label_map: gives the labels of the triggered images.
        variables: those of ``classifier`` and ``generator`` in one tree that `join` made.
        batch: augmented images and labels.
        train_noise: whether the noise network is in training mode.
    """
    x = batch.images.astype(jnp.float32) / 255
    network = noise_network(x.shape[-1], config.channels, config.depth)
    noisy, generator = add_noise(network, part(variables, "generator"), x, config.epsilon, train=train_noise)
    both = 255 * jnp.concatenate([x, noisy])
    logits, victim = classifier.logits(part(variables, "classifier"), both, train=True)
    clean, triggered = jnp.split(logits, 2)
    targets = label_map(batch.labels)
    loss = config.alpha * jnp.mean(cross_entropy(clean, batch.labels))
    loss += (1 - config.alpha) * jnp.mean(cross_entropy(triggered, targets))
    info = {
        "accuracy": jnp.mean(jnp.argmax(clean, -1) == batch.labels),
        "success": jnp.mean(jnp.argmax(triggered, -1) == targets),
    }
    return loss, (join(classifier=victim, generator=generator), info)
