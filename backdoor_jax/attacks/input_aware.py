r"""Input-aware dynamic backdoor (Nguyen & Tran, NeurIPS 2020, arXiv 2010.08138): every image has its own trigger.

A generator makes a pattern p(x), a second network a mask m(x) of limited density, and the triggered image is
:math:`x + (p(x) - x) \odot m(x)`. First the mask network is trained with the loss

.. math:: \lambda_n \operatorname{mean} \max(0, m(x) - d) + \lambda_d \frac{\lVert x - x' \rVert}{\lVert m(x) - m(x')
    \rVert},

then generator and victim together: in each batch a share r of the images gets its own trigger and the attacker's label,
a second share, ``cross_ratio`` times as large, gets *another* image's trigger and keeps its labels, and the patterns of
different images must differ,

.. math:: \mathrm{CE} + \lambda_d \frac{\lVert x - x' \rVert}{\lVert p(x) - p(x') \rVert} .

>>> import jax, jax.numpy as jnp
>>> trigger = InputAware(channels=2).trigger(jax.random.key(0), (16, 16, 3))
>>> trigger(jnp.zeros((2, 16, 16, 3), jnp.uint8)).shape
(2, 16, 16, 3)
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Lt
from jax.tree_util import Partial

from backdoor_jax.attacks.base import Attack, AttackContext, Victim
from backdoor_jax.attacks.networks import EncoderDecoder
from backdoor_jax.config import Config, Count, NonNegative, Positive, Whole
from backdoor_jax.data import Dataset, LabelMap
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.models.rectifier import relu
from backdoor_jax.training import (
    Adam,
    GradientStep,
    LossResult,
    Separately,
    Tenths,
    batch_shape,
    cross_entropy,
)

BETAS = (0.5, 0.9)
"""Adam's, for the generator and the mask network; published."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputAwareTrigger:
    """Puts on each image the pattern that the generator makes for it, where the mask network says.

    Attributes:
        generator: variables of the generator.
        masker: variables of the mask network.
        channels: width of both networks.
        depth: how often both networks halve the image.
    """

    generator: dict[str, Any]
    masker: dict[str, Any]
    channels: int = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)``, each with its own trigger, rounded."""
        generator, masker = networks(images.shape[-1], self.channels, self.depth)
        x = images.astype(jnp.float32) / 255
        pattern, _ = make_pattern(generator, self.generator, x, train=False)
        mask, _ = make_mask(masker, self.masker, x, train=False)
        return jnp.round(255 * (x + (pattern - x) * mask)).astype(jnp.uint8)


def networks(image_channels: int, channels: int, depth: int) -> tuple[EncoderDecoder, EncoderDecoder]:
    """The generator and the mask network."""
    return EncoderDecoder(image_channels, channels, depth), EncoderDecoder(1, channels, depth)


def make_pattern(
    network: EncoderDecoder, variables: dict[str, Any], x: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """A pattern in [0, 1] for each image in [0, 1], and the network's variables after the batch."""
    out, variables = run(network, variables, x, train)
    return jnp.tanh(out) / 2 + 0.5, variables


def make_mask(
    network: EncoderDecoder, variables: dict[str, Any], x: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """A mask in [0, 1] for each image in [0, 1], and the network's variables after the batch.

    It is ``tanh(20 y - 10)``, scaled to [0, 1], of y in [0, 1], and so nearly 0 or 1 everywhere.
    """
    out, variables = run(network, variables, x, train)
    return jnp.tanh(20 * (jnp.tanh(out) / 2 + 0.5) - 10) / 2 + 0.5, variables


@dataclasses.dataclass(frozen=True)
class Slots(Config):
    """How many images at the start of a batch `joint_loss` puts triggers on.

    Attributes:
        poisoned: the first images, which get their own trigger and the attacker's label.
        crossed: the next images, which get another image's trigger and keep their labels.
    """

    poisoned: Count = 1
    crossed: Whole = 0


@dataclasses.dataclass(frozen=True)
class InputAware(Attack):
    """Generator, mask network and victim, trained on one data set.

    Deviations from the published code: the second images of a batch are the batch's own in another order, not those of
    a second loader; the networks stride where the published ones pool, have one convolution per level on the way up and
    end in a convolution without normalization; the generator's gradient is that of the batch, where the published code
    never resets it; the learning rates of victim and generator are annealed by a cosine, where there they are constant;
    generator and mask network see pixels in [0, 1], where there they see normalized ones; triggered images are rounded
    at test time only; images with another's trigger occur in training only, and are never rounded, where the
    benchmark's poisoned set contains them too; if r times the batch is not an integer, the number of triggered images
    is random, with that expectation.

    Attributes:
        labels: ``all_to_one`` or ``all_to_all``.
        mask_epochs: passes that train the mask network alone; published 25, with a tenth of the rate after two fifths
            of them and a hundredth after four fifths. They are within the published 100 epochs, so 75
            are left for the joint training, which here takes the victim's epochs.
        mask_density: the value of a mask that is not penalized, d; published 0.032.
        norm_weight: lambda_n; published 100.
        diversity_weight: lambda_d; published 1.
        generator_rate: Adam's initial learning rate for generator and mask network, with betas 0.5 and 0.9; published
            0.01.
        cross_ratio: images with another's trigger for each poisoned one; published 1.
        channels: width of the two networks; published 32.
        depth: how often they halve the image; published 3.
    """

    name: ClassVar[str] = "input_aware"
    fits_trigger: ClassVar[bool] = True
    trains_victim: ClassVar[bool] = True

    labels: Literal["all_to_one", "all_to_all"] = "all_to_one"
    mask_epochs: Count = 25
    mask_density: Annotated[float, Ge(0), Lt(1)] = 0.032
    norm_weight: NonNegative = 100.0
    diversity_weight: NonNegative = 1.0
    generator_rate: Positive = 0.01
    cross_ratio: NonNegative = 1.0
    channels: Count = 32
    depth: Count = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_shares(self.cross_ratio)

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> InputAwareTrigger:
        """The networks before training."""
        both, image = networks(shape[2], self.channels, self.depth), jnp.zeros((1, *shape))
        generator, masker = (init(network, k, image) for network, k in zip(both, jax.random.split(key), strict=True))
        return InputAwareTrigger(generator, masker, self.channels, self.depth)

    def slots(self, images: int) -> Slots:
        """How many images of a batch of this size get a trigger: the share r, rounded up, and the crossed ones."""
        return Slots(
            poisoned=-int(-self.rate * images // 1),
            crossed=round(self.cross_ratio * images * self.rate),
        )

    def train_victim_in(
        self,
        context: AttackContext,
        key: jax.Array,
        train_key: jax.Array,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Victim:
        """Trains the mask network, then generator and victim together.

        The training set that a defender would find has the final trigger on a fixed share of the images.

        Args:
            context: the network, the data and the training settings.
            key: for the trigger's networks, the training of the mask network and the choice of images.
            train_key: for the victim's initial weights, the order of images and augmentation.
            name: what progress and errors call the run.
            checkpoints: a folder for checkpoints of both trainings; a killed run resumes from there.

        Returns:
            The victim. ``info["mask_density"]`` is the mean of the masks of (at most) 256 images.

        Raises:
            UserError: for a target or rate that the data do not allow.
            NonFiniteError: if the training diverges.
        """
        trigger_key, choice_key, mask_key = jax.random.split(key, 3)
        init_key, fit_key = jax.random.split(train_key)
        trigger, training = self.trigger(trigger_key, context.shape), context.training
        steps, images = batch_shape(len(context.data), training.batch_size)

        alone = GradientStep(
            Partial(mask_loss, context.classifier, self),
            Adam(self.generator_rate, Tenths(steps * self.mask_epochs), BETAS),
        )
        fitted = context.fit(
            mask_key,
            alone,
            alone.init(trigger.masker),
            epochs=self.mask_epochs,
            name=f"{name}: mask",
            checkpoints=checkpoints and checkpoints / "mask",
        )
        trigger = dataclasses.replace(trigger, masker=fitted.variables)

        label_map, optimizer = self.label_map(context.num_classes), training.optimizer(len(context.data))
        joint = training.step(
            Partial(joint_loss, context.classifier, self, self.slots(images), label_map, trigger.masker),
            Separately(classifier=optimizer, generator=Adam(self.generator_rate, optimizer.schedule, BETAS)),
        )
        victim = context.classifier.init(init_key, context.data.images[:1])
        fitted = context.fit(
            fit_key,
            joint,
            joint.init(join(classifier=victim, generator=trigger.generator)),
            epochs=training.epochs,
            name=name,
            checkpoints=checkpoints and checkpoints / "joint",
        )
        trigger = dataclasses.replace(trigger, generator=part(fitted.variables, "generator"))
        _, masker = networks(context.shape[2], self.channels, self.depth)
        masks, _ = make_mask(masker, trigger.masker, context.data.images[:256] / 255.0, train=False)
        poisoned = self.poison_data(choice_key, context, trigger)
        return Victim(part(fitted.variables, "classifier"), trigger, poisoned, {"mask_density": float(masks.mean())})


def diversity(images: jax.Array, others: jax.Array, made: jax.Array, made_of_others: jax.Array) -> jax.Array:
    """Distances of images relative to those of what was made of them; small if what was made differs much.

    Args:
        images: ``(B, H, W, channels)``.
        others: the images that they are compared with, in the same shape.
        made: what was made of `images`: patterns or masks, ``(B, H, W, any)``.
        made_of_others: what was made of `others`, in the same shape.

    Returns:
        ``(B,)``.

    Example:
        >>> one, two = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))
        >>> [round(float(diversity(one, two, one, made)[0]), 3) for made in (two, two / 2)]
        [1.0, 2.0]
    """

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        # The root has no finite gradient at 0; the constant keeps it finite where a and b are equal.
        return jnp.sqrt(jnp.mean((a - b) ** 2, axis=(1, 2, 3)) + 1e-12)

    return distance(images, others) / (distance(made, made_of_others) + 1e-7)


def mask_loss(
    classifier: Classifier, config: InputAware, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    """Density and diversity of the masks of one batch; logs ``density``.

    Args:
        classifier: normalizes the images that are compared, as published.
        config: gives ``mask_density``, ``norm_weight``, ``diversity_weight`` and the size of the network.
        variables: the mask network's.
        batch: augmented images; their labels are not used.
        key: not used.
    """
    del key
    _, masker = networks(batch.images.shape[-1], config.channels, config.depth)
    x = batch.images.astype(jnp.float32) / 255
    masks, variables = make_mask(masker, variables, x, train=True)
    excess = jnp.mean(relu(masks - config.mask_density))
    seen = classifier.normalize(batch.images)
    spread = jnp.mean(diversity(seen, jnp.roll(seen, 1, 0), masks, jnp.roll(masks, 1, 0)))
    loss = config.norm_weight * excess + config.diversity_weight * spread
    return loss, (variables, {"density": jnp.mean(masks)})


def joint_loss(
    classifier: Classifier,
    config: InputAware,
    slots: Slots,
    label_map: LabelMap,
    masker_variables: Variables,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """Cross-entropy of a batch with triggered and crossed images, and diversity of the patterns.

    Args:
        classifier: the victim's network.
        config: gives ``rate``, ``diversity_weight`` and the size of the networks.
        slots: how many images get a trigger.
        label_map: gives the labels of the triggered images.
        masker_variables: the trained mask network's.
        variables: those of ``classifier`` and ``generator`` in one tree that `join` made.
        batch: augmented images and labels.
        key: for the choice of triggered images.
    """
    first, second = slots.poisoned, slots.poisoned + slots.crossed
    generator, masker = networks(batch.images.shape[-1], config.channels, config.depth)
    x = batch.images.astype(jnp.float32) / 255
    others = jnp.roll(x, len(batch) // 2, 0)
    sources = jnp.concatenate([x[:first], others[:second]])
    patterns, generating = make_pattern(generator, part(variables, "generator"), sources, train=True)
    masks, _ = make_mask(masker, masker_variables, sources, train=False)
    patterns, different = jnp.split(patterns, [first])
    masks, others_masks = jnp.split(masks, [first])

    # The number of slots is the rate's share, rounded up; at random, some stay clean so that the mean is the share.
    used = jax.random.uniform(key, (first,)) < config.rate * len(batch) / first
    own = x[:first] + (patterns - x[:first]) * masks * used[:, None, None, None]
    crossed = x[first:second] + (different[first:] - x[first:second]) * others_masks[first:]
    images = jnp.concatenate([own, crossed, x[second:]])
    labels = batch.labels.at[:first].set(jnp.where(used, label_map(batch.labels[:first]), batch.labels[:first]))
    logits, victim = classifier.logits(part(variables, "classifier"), 255 * images, train=True)
    spread = jnp.mean(diversity(x[:first], others[:first], patterns, different[:first]))
    loss = jnp.mean(cross_entropy(logits, labels)) + config.diversity_weight * spread
    correct = jnp.argmax(logits, -1) == labels
    info = {"accuracy": jnp.mean(correct[second:]), "success": jnp.mean(correct[:first], where=used)}
    return loss, (join(classifier=victim, generator=generating), info)
