r"""Input-aware dynamic backdoor (Nguyen & Tran, NeurIPS 2020, arXiv 2010.08138): every image has a trigger of its own.

A generator makes a pattern p(x), a second network a mask m(x) of limited density, and the triggered image is
:math:`x + (p(x) - x) \odot m(x)`. First the mask network is trained,

.. math:: \lambda_n \operatorname{mean} \max(0, m(x) - d) + \lambda_d \frac{\lVert x - x' \rVert}{\lVert m(x) - m(x')
    \rVert},

then generator and victim together: in each batch a share r of the images carries its own trigger and the attacker's
label, as many carry *another* image's trigger and keep theirs, and patterns of different images must differ,

.. math:: \mathrm{CE} + \lambda_d \frac{\lVert x - x' \rVert}{\lVert p(x) - p(x') \rVert} .

>>> import jax, jax.numpy as jnp
>>> trigger = InputAware(channels=2).trigger(jax.random.key(0), (16, 16, 3))
>>> trigger(jnp.zeros((2, 16, 16, 3), jnp.uint8)).shape
(2, 16, 16, 3)
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from backdoor_jax.attacks.base import Attack, Planted, Scene
from backdoor_jax.attacks.networks import Adam, EncoderDecoder, Together
from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset, LabelMap
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.training import Constants, CosineSGD, GradientStep, Info, batch_shape, cosine_in_stages, cross_entropy
from backdoor_jax.training.schedules import Rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputAwareTrigger:
    """Puts on each image the pattern that the generator makes of it, where the mask network says.

    Attributes:
        generator: variables of the pattern's network.
        masker: variables of the mask's.
        channels: width of both networks.
        depth: halvings in both.
    """

    generator: dict[str, Any]
    masker: dict[str, Any]
    channels: int = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    def networks(self, image_channels: int) -> tuple[EncoderDecoder, EncoderDecoder]:
        """The pattern's and the mask's network."""
        return EncoderDecoder(image_channels, self.channels, self.depth), EncoderDecoder(1, self.channels, self.depth)

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)``, each with its own trigger, rounded."""
        generator, masker = self.networks(images.shape[-1])
        x = images.astype(jnp.float32) / 255
        pattern, _ = make_pattern(generator, self.generator, x, train=False)
        mask, _ = make_mask(masker, self.masker, x, train=False)
        return jnp.round(255 * (x + (pattern - x) * mask)).astype(jnp.uint8)


def make_pattern(
    network: EncoderDecoder, variables: dict[str, Any], x: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """A pattern in [0, 1] for each image in [0, 1]."""
    out, variables = run(network, variables, x, train)
    return jnp.tanh(out) / 2 + 0.5, variables


def make_mask(
    network: EncoderDecoder, variables: dict[str, Any], x: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """A mask, nearly 0 or 1, for each image in [0, 1]: ``tanh(20 y - 10)``, scaled to [0, 1], of y in [0, 1]."""
    out, variables = run(network, variables, x, train)
    return jnp.tanh(20 * (jnp.tanh(out) / 2 + 0.5) - 10) / 2 + 0.5, variables


@dataclasses.dataclass(frozen=True)
class InputAware(Attack):
    """Generator, mask network and victim, trained on one data set.

    Deviations from the published code: the second images of a batch are the batch's own in another order, not those of
    a second loader; the networks stride where the published ones pool, have one convolution a level on the way up and
    end in a bare one; the generator's gradient is that of the batch, where there it is never set back; rates of victim
    and generator fall by a cosine, where there they are constant; generator and mask network see pixels in [0, 1],
    where there they see normalised ones; triggered images are rounded at test time only, and crossed ones never: they
    are made in training alone, where the benchmark's poisoned set has them too; where r times the batch is no whole
    number, its fraction is drawn.

    Attributes:
        mask_epochs: passes that train the mask network alone; published 25, with a tenth of the rate after two fifths
            of them and a hundredth after four. The joint training takes the victim's.
        mask_density: what a mask's value may be at every pixel for nothing, d; published 0.032.
        norm_weight: lambda_n; published 100.
        diversity_weight: lambda_d; published 1.
        generator_rate: Adam's learning rate for generator and mask network at first, with betas 0.5 and 0.9; published
            0.01.
        cross_ratio: images with another's trigger for each poisoned one; published 1.
        channels: width of the two networks; published 32.
        depth: halvings in them; published 3.
    """

    learns: ClassVar[bool] = True

    mask_epochs: int = 25
    mask_density: float = 0.032
    norm_weight: float = 100.0
    diversity_weight: float = 1.0
    generator_rate: float = 0.01
    cross_ratio: float = 1.0
    channels: int = 32
    depth: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.labels != "clean_label", "labels", "all_to_one or all_to_all")
        self.require(self.mask_epochs > 0, "mask_epochs", "at least 1")
        self.require(0 <= self.mask_density < 1, "mask_density", "a value in [0, 1)")
        self.require(self.generator_rate > 0, "generator_rate", "a positive number")
        self.require_shares(self.cross_ratio)
        self.require(self.channels > 0 and self.depth > 0, "channels", "at least 1, and so the depth")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> InputAwareTrigger:
        """The networks before training."""
        empty = InputAwareTrigger({}, {}, self.channels, self.depth)
        image = jnp.zeros((1, *shape))
        made = [
            init(network, k, image) for network, k in zip(empty.networks(shape[2]), jax.random.split(key), strict=True)
        ]
        return InputAwareTrigger(made[0], made[1], self.channels, self.depth)

    def plant(
        self,
        key: jax.Array,
        train_key: jax.Array,
        scene: Scene,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Planted:
        """See `Attack.plant`; in the training set a defender would find, a fixed share has the final trigger."""
        trigger_key, choice_key, mask_key = jax.random.split(key, 3)
        init_key, fit_key = jax.random.split(train_key)
        trigger = self.trigger(trigger_key, scene.shape)
        generator, masker = trigger.networks(scene.shape[2])
        constants = {**numbers(self), **numbers(scene.training)}

        steps, images = batch_shape(len(scene.data), scene.training.batch_size)
        epochs = scene.training.epochs

        falling = Adam(b1=0.5, b2=0.9, schedule=Tenths(steps * self.mask_epochs))
        alone = GradientStep(MaskLoss(scene.classifier, masker), falling)
        state, _ = scene.fit(
            mask_key,
            alone,
            alone.init(trigger.masker, constants),
            constants,
            epochs=self.mask_epochs,
            name=f"{name}: mask",
            checkpoints=checkpoints and checkpoints / "mask",
        )
        trigger = dataclasses.replace(trigger, masker=state.variables)

        loss = JointLoss(
            scene.classifier,
            generator,
            masker,
            self.label_map(scene.num_classes),
            -int(-self.rate * images // 1),
            round(self.cross_ratio * images * self.rate),
        )
        falling = Adam(b1=0.5, b2=0.9, schedule=Cosine(steps * epochs, epochs))
        joint = scene.training.step(loss, Together(CosineSGD(steps * epochs, epochs), falling))
        victim = scene.classifier.init(init_key, scene.data.images[:1])
        constants["masker"] = trigger.masker
        state, _ = scene.fit(
            fit_key,
            joint,
            joint.init(join(classifier=victim, generator=trigger.generator), constants),
            constants,
            epochs=epochs,
            name=name,
            checkpoints=checkpoints and checkpoints / "joint",
        )
        trigger = dataclasses.replace(trigger, generator=part(state.variables, "generator"))
        masks, _ = make_mask(masker, trigger.masker, scene.data.images[:256] / 255.0, train=False)
        return Planted(
            part(state.variables, "classifier"),
            trigger,
            self.stamp(choice_key, scene, trigger),
            {"mask_density": float(masks.mean())},
        )


@dataclasses.dataclass(frozen=True)
class Tenths:
    """A rate that falls to a tenth after two fifths of the steps, and again after four."""

    steps: int

    def __call__(self, rate: Rate) -> optax.Schedule:
        """The schedule from this rate."""
        return optax.piecewise_constant_schedule(rate, {self.steps * 2 // 5: 0.1, self.steps * 4 // 5: 0.1})


@dataclasses.dataclass(frozen=True)
class Cosine:
    """`backdoor_jax.training.cosine_in_stages`."""

    steps: int
    stages: int

    def __call__(self, rate: Rate) -> optax.Schedule:
        """The schedule from this rate."""
        return cosine_in_stages(rate, self.steps, self.stages)


def diversity(images: jax.Array, others: jax.Array, made: jax.Array, made_of_others: jax.Array) -> jax.Array:
    """How far images are apart beside what was made of them, ``(B,)``; small where what was made differs.

    Example:
        >>> one, two = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))
        >>> [round(float(diversity(one, two, one, made)[0]), 3) for made in (two, two / 2)]
        [1.0, 2.0]
    """

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        # Where a and b are equal the root has no gradient; the constant keeps it finite.
        return jnp.sqrt(jnp.mean((a - b) ** 2, axis=(1, 2, 3)) + 1e-12)

    return distance(images, others) / (distance(made, made_of_others) + 1e-7)


@dataclasses.dataclass(frozen=True)
class MaskLoss:
    """Density and diversity of masks; images are compared as the classifier sees them, as published."""

    classifier: Classifier
    masker: EncoderDecoder

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key
        x = batch.images.astype(jnp.float32) / 255
        masks, variables = make_mask(self.masker, variables, x, train=True)
        excess = jnp.mean(jax.nn.relu(masks - constants["mask_density"]))
        seen = self.classifier.normalize(batch.images)
        spread = jnp.mean(diversity(seen, jnp.roll(seen, 1, 0), masks, jnp.roll(masks, 1, 0)))
        loss = constants["norm_weight"] * excess + constants["diversity_weight"] * spread
        return loss, (variables, {"density": jnp.mean(masks)})


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """Cross-entropy with triggered and cross-triggered images in the batch, and diversity of patterns."""

    classifier: Classifier
    generator: EncoderDecoder
    masker: EncoderDecoder
    label_map: LabelMap
    poisoned: int
    crossed: int

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        first, second = self.poisoned, self.poisoned + self.crossed
        x = batch.images.astype(jnp.float32) / 255
        others = jnp.roll(x, len(batch) // 2, 0)
        sources = jnp.concatenate([x[:first], others[:second]])
        patterns, generator = make_pattern(self.generator, part(variables, "generator"), sources, train=True)
        masks, _ = make_mask(self.masker, constants["masker"], sources, train=False)
        patterns, different = jnp.split(patterns, [first])
        masks, others_masks = jnp.split(masks, [first])

        # The slots are a whole number; a share of them is left clean where the rate asks for less.
        used = jax.random.uniform(key, (first,)) < constants["rate"] * len(batch) / first
        own = x[:first] + (patterns - x[:first]) * masks * used[:, None, None, None]
        crossed = x[first:second] + (different[first:] - x[first:second]) * others_masks[first:]
        images = jnp.concatenate([own, crossed, x[second:]])
        labels = batch.labels.at[:first].set(
            jnp.where(used, self.label_map(batch.labels[:first]), batch.labels[:first])
        )
        logits, classifier = self.classifier.logits(part(variables, "classifier"), 255 * images, train=True)
        spread = jnp.mean(diversity(x[:first], others[:first], patterns, different[:first]))
        loss = jnp.mean(cross_entropy(logits, labels)) + constants["diversity_weight"] * spread
        rightly = jnp.argmax(logits, -1) == labels
        info = {"accuracy": jnp.mean(rightly[second:]), "success": jnp.mean(rightly[:first], where=used)}
        return loss, (join(classifier=classifier, generator=generator), info)
