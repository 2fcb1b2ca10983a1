r"""LIRA (Doan et al., ICCV 2021): an imperceptible trigger that a network makes of each image, learnt with the victim.

.. math:: x' = \mathrm{clip}(x + \epsilon \tanh T(x)), \qquad
    \min_{f, T} \; \alpha\,\mathrm{CE}(f(x), y) + (1 - \alpha)\,\mathrm{CE}(f(x'), y^*)

over both networks at first; then T is fixed and the victim trained on.

>>> import jax, jax.numpy as jnp
>>> trigger = LIRA(channels=2, depth=1).trigger(jax.random.key(0), (8, 8, 3))
>>> change = trigger(jnp.full((1, 8, 8, 3), 100, jnp.uint8)).astype(int) - 100
>>> bool(jnp.abs(change).max() <= 3)
True
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from backdoor_jax.attacks.base import Attack, Planted, Scene
from backdoor_jax.attacks.networks import Adam, EncoderDecoder, Together
from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset, LabelMap
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.joint import init, join, part, run
from backdoor_jax.training import Constants, CosineSGD, Info, batch_shape, constant_sgd, cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LIRATrigger:
    """Adds the bounded noise that a network makes of each image.

    Attributes:
        generator: the network's variables.
        epsilon: the largest change, of 1.
        channels: the network's width.
        depth: halvings in it.
    """

    generator: dict[str, Any]
    epsilon: jax.Array
    channels: int = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    def network(self, image_channels: int) -> EncoderDecoder:
        """The network."""
        return EncoderDecoder(image_channels, self.channels, self.depth, skips=True)

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)`` with the noise, rounded."""
        x = images.astype(jnp.float32) / 255
        made, _ = add_noise(self.network(images.shape[-1]), self.generator, x, self.epsilon, train=False)
        return jnp.round(255 * made).astype(jnp.uint8)


def add_noise(
    network: EncoderDecoder, variables: dict[str, Any], x: jax.Array, epsilon: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """Images in [0, 1] with noise of at most ``epsilon``."""
    out, variables = run(network, variables, x, train)
    return jnp.clip(x + epsilon * jnp.tanh(out), 0, 1), variables


@dataclasses.dataclass(frozen=True)
class LIRA(Attack):
    """A U-Net's noise as trigger; every image of a batch is seen clean and triggered.

    Deviations from the published code: clean and triggered images are normalised together, since a network that is
    trained on batches of one kind only may tell the kinds by the statistics of the batch, and then does not tell single
    images (`benchmarks/results/development.md`); noise network and victim take their steps at the same time, where
    there the victim sees the noise network of the epoch before; the noise network sees and epsilon bounds pixels in
    [0, 1], where there both are of normalised ones, whose bound on CIFAR-10 is a quarter of ours; rounding to uint8
    happens at test time only. And from the benchmark's: a small U-Net where it has an autoencoder without connections
    across; images are cropped as for every other victim, and not turned; the joint training has weight decay, and the
    rate falls by a cosine after it.

    Attributes:
        rate: of the training set that a defender would find, and of nothing else: the training sees both forms of every
            image, as published, where there is no rate.
        epsilon: largest change of a pixel, of 1; published 0.01.
        generator_rate: Adam's learning rate for the noise network; published 1e-4.
        alpha: weight of the clean loss; published 0.5.
        joint_epochs: passes that train both; published 50 of 100 (GTSRB: 25 of 150). Then follow the victim's own.
        channels: width of the network; ours.
        depth: halvings in it; ours.
    """

    learns: ClassVar[bool] = True

    epsilon: float = 0.01
    generator_rate: float = 1e-4
    alpha: float = 0.5
    joint_epochs: int = 50
    channels: int = 16
    depth: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.labels != "clean_label", "labels", "all_to_one or all_to_all")
        self.require(0 < self.epsilon <= 1, "epsilon", "a share in (0, 1]")
        self.require(self.generator_rate > 0, "generator_rate", "a positive number")
        self.require(0 <= self.alpha <= 1, "alpha", "a weight in [0, 1]")
        self.require(self.joint_epochs > 0, "joint_epochs", "at least 1")
        self.require(self.channels > 0 and self.depth > 0, "channels", "at least 1, and so the depth")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> LIRATrigger:
        """The noise network before training."""
        empty = LIRATrigger({}, jnp.float32(self.epsilon), self.channels, self.depth)
        return dataclasses.replace(empty, generator=init(empty.network(shape[2]), key, jnp.zeros((1, *shape))))

    def plant(
        self,
        key: jax.Array,
        train_key: jax.Array,
        scene: Scene,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Planted:
        """See `Attack.plant`; the training set a defender would find has a fixed share with the final noise."""
        trigger_key, choice_key = jax.random.split(key)
        init_key, joint_key, tune_key = jax.random.split(train_key, 3)
        trigger = self.trigger(trigger_key, scene.shape)
        constants = {**numbers(self), **numbers(scene.training)}
        steps, _ = batch_shape(len(scene.data), scene.training.batch_size)
        network, label_map = trigger.network(scene.shape[2]), self.label_map(scene.num_classes)

        joint = scene.training.step(
            NoiseLoss(scene.classifier, network, label_map, learns=True), Together(constant_sgd, Adam())
        )
        victim = scene.classifier.init(init_key, scene.data.images[:1])
        state, _ = scene.fit(
            joint_key,
            joint,
            joint.init(join(classifier=victim, generator=trigger.generator), constants),
            constants,
            epochs=self.joint_epochs,
            name=f"{name}: noise",
            checkpoints=checkpoints and checkpoints / "joint",
        )
        tune = scene.training.step(
            NoiseLoss(scene.classifier, network, label_map, learns=False),
            CosineSGD(steps * scene.training.epochs, scene.training.epochs),
            trainable=(("classifier",),),
        )
        state, _ = scene.fit(
            tune_key,
            tune,
            tune.init(state.variables, constants),
            constants,
            epochs=scene.training.epochs,
            name=name,
            checkpoints=checkpoints and checkpoints / "tune",
        )
        trigger = dataclasses.replace(trigger, generator=part(state.variables, "generator"))
        return Planted(part(state.variables, "classifier"), trigger, self.stamp(choice_key, scene, trigger), {})


@dataclasses.dataclass(frozen=True)
class NoiseLoss:
    """Weighted cross-entropies of the clean and of the triggered batch, normalised together."""

    classifier: Classifier
    network: EncoderDecoder
    label_map: LabelMap
    learns: bool

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key
        x = batch.images.astype(jnp.float32) / 255
        noisy, generator = add_noise(
            self.network, part(variables, "generator"), x, constants["epsilon"], train=self.learns
        )
        both = 255 * jnp.concatenate([x, noisy])
        logits, classifier = self.classifier.logits(part(variables, "classifier"), both, train=True)
        clean, triggered = jnp.split(logits, 2)
        wanted = self.label_map(batch.labels)
        loss = constants["alpha"] * jnp.mean(cross_entropy(clean, batch.labels))
        loss += (1 - constants["alpha"]) * jnp.mean(cross_entropy(triggered, wanted))
        info = {
            "accuracy": jnp.mean(jnp.argmax(clean, -1) == batch.labels),
            "success": jnp.mean(jnp.argmax(triggered, -1) == wanted),
        }
        return loss, (join(classifier=classifier, generator=generator), info)
