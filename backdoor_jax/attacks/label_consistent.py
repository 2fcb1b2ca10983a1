r"""Label-consistent attack (Turner et al., 2019, arXiv 1912.02771): poisoned images look like what they are labelled.

Images of the target class are made hard to recognise by projected gradient ascent against a network g,

.. math:: x \leftarrow \Pi_{\lVert x - x_0 \rVert_\infty \le \epsilon} \bigl(x + \eta\,\mathrm{sign}\,\nabla_x
    \mathrm{CE}(g(x), y)\bigr),

and then get a pattern in all four corners, which is what the victim is to learn in their stead. At test time only the
pattern is put on. g is trained against perturbations itself. The paper does so by steps of projected ascent; here the
clean model goes on training with single ones from a random start (Wong et al., ICLR 2020, arXiv 2001.03994), which cost
one gradient more than usual.

Where all images of the class are poisoned, the perturbation tells the class as well as the pattern does, and the victim
learns that; leave some clean. Where the network is wide enough to see through the perturbation, it has no need of the
pattern either way (both in `benchmarks/results/development.md`).

>>> import jax, jax.numpy as jnp
>>> trigger = LabelConsistent().trigger(jax.random.key(0), (32, 32, 3))
>>> trigger(jnp.full((1, 32, 32, 3), 100, jnp.uint8))[0, :4, :4, 0].tolist()
[[255, 0, 0, 100], [0, 255, 0, 100], [255, 0, 255, 100], [100, 100, 100, 100]]
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from backdoor_jax.attacks.base import Attack, Scene
from backdoor_jax.attacks.triggers import AdditiveTrigger
from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset, Poisoned, Trigger, draw_poisoned
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import (
    Constants,
    CosineSGD,
    GradientStep,
    Info,
    SupervisedLoss,
    batch_shape,
    cross_entropy,
    last_epoch,
    map_chunks,
)


@dataclasses.dataclass(frozen=True)
class LabelConsistent(Attack):
    """Adversarially perturbed images of the target class with a pattern in the four corners.

    Attributes:
        labels: always ``clean_label``.
        robust_epochs: passes in which g learns to withstand perturbations; ours. 0 leaves it the clean model.
        robust_epsilon: largest change of a pixel in these, in grey levels; 8 of 255 is usual.
        epsilon: largest change of a pixel in grey levels; published 16 of 255.
        steps: of the ascent; the paper's 100.
        step_size: in grey levels; the paper's 1.5.
        amplitude: of the 3x3 chequers added in the corners, of 255; published 1. As published, the cell of their top
            row that is nearer the middle is dark.
    """

    learns: ClassVar[bool] = True
    needs_clean_model: ClassVar[bool] = True

    labels: Literal["all_to_one", "all_to_all", "clean_label"] = "clean_label"
    robust_epochs: int = 10
    robust_epsilon: float = 8.0
    epsilon: float = 16.0
    steps: int = 100
    step_size: float = 1.5
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.labels == "clean_label", "labels", "clean_label")
        self.require(self.robust_epochs >= 0, "robust_epochs", "0 or more")
        self.require(0 <= self.robust_epsilon <= 255, "robust_epsilon", "grey levels in [0, 255]")
        self.require(0 <= self.epsilon <= 255, "epsilon", "grey levels in [0, 255]")
        self.require(self.steps > 0, "steps", "at least 1")
        self.require(self.step_size > 0, "step_size", "a positive number of grey levels")
        self.require(0 < self.amplitude <= 1, "amplitude", "a share in (0, 1]")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """The corners' pattern; no randomness."""
        del key
        height, width, _ = shape
        if min(height, width) < 6:
            raise UserError(f"LabelConsistent needs images of 6x6 pixels or more for its corners, got {height}x{width}")
        light = (jnp.arange(3)[:, None] + jnp.arange(3)) % 2 == 0
        chequer = jnp.where(light, 255.0, -255.0) * self.amplitude
        pattern = jnp.zeros((height, width))
        for rows in (slice(3), slice(-3, None)):
            for columns in (slice(3), slice(-3, None)):
                pattern = pattern.at[rows, columns].set(chequer)
        inner = jnp.array([0, 0, -3, -3]), jnp.array([2, -3, 2, -3])
        pattern = pattern.at[inner].set(-255.0 * self.amplitude)
        return AdditiveTrigger(jnp.broadcast_to(pattern[..., None], shape))

    def poison(self, key: jax.Array, scene: Scene) -> tuple[Poisoned, Trigger, dict[str, Any]]:
        """See `Attack.poison`; info is the accuracy of g on perturbed training images in its last epoch."""
        key, robust_key = jax.random.split(key)
        scene, info = self.harden(robust_key, scene)
        poisoned, trigger, _ = super().poison(key, scene)
        return poisoned, trigger, info

    def harden(self, key: jax.Array, scene: Scene) -> tuple[Scene, dict[str, Any]]:
        """The scene with a clean model that withstands perturbations."""
        if scene.clean_model is None or not self.robust_epochs:
            return scene, {}
        steps, _ = batch_shape(len(scene.data), scene.training.batch_size)
        step = GradientStep(RobustLoss(scene.classifier), CosineSGD(steps * self.robust_epochs, self.robust_epochs))
        constants = {**numbers(self), **numbers(scene.training)}
        state, history = scene.fit(
            key,
            step,
            step.init(scene.clean_model, constants),
            constants,
            epochs=self.robust_epochs,
            name="label-consistent: robust network",
            checkpoints=None,
        )
        seen = last_epoch(history, steps)
        return dataclasses.replace(scene, clean_model=state.variables), {"robust_accuracy": seen["accuracy"]}

    def stamp(self, key: jax.Array, scene: Scene, trigger: Trigger) -> Poisoned:
        """The poisoned training set: drawn images of the target class perturbed, then triggered."""
        assert scene.clean_model is not None
        labels = scene.data.labels
        chosen = draw_poisoned(key, self.rate, len(labels), self.candidates(labels))
        originals = scene.data.take(chosen)
        hard = perturb(
            scene.classifier,
            scene.clean_model,
            originals,
            jnp.float32(self.epsilon),
            jnp.float32(self.step_size),
            self.steps,
        )
        return Poisoned(Dataset(scene.data.images.at[chosen].set(trigger(hard)), labels), chosen)


@dataclasses.dataclass(frozen=True)
class RobustLoss:
    """Mean cross-entropy of images that one step of ascent from a random start has changed, normalisation in training
    mode; the step is 1.25 times as long as the largest change, as published."""

    classifier: Classifier

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        images, epsilon = batch.images.astype(jnp.float32), constants["robust_epsilon"]
        supervised = SupervisedLoss(self.classifier)

        def loss(change: jax.Array, variables: Variables) -> tuple[jax.Array, tuple[Variables, Info]]:
            changed = jnp.clip(images + change, 0, 255)
            return supervised(variables, Dataset(changed, batch.labels), key, constants)

        start = epsilon * jax.random.uniform(key, images.shape, minval=-1, maxval=1)
        ascent, _ = jax.grad(loss, has_aux=True)(start, jax.lax.stop_gradient(variables))
        return loss(jnp.clip(start + 1.25 * epsilon * jnp.sign(ascent), -epsilon, epsilon), variables)


@partial(jax.jit, static_argnames="steps")
def perturb(
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    epsilon: jax.Array,
    step_size: jax.Array,
    steps: int,
) -> jax.Array:
    """Images ``(N, H, W, channels)`` changed by at most ``epsilon`` grey levels to be hard to recognise; uint8."""

    def ascend(chunk: jax.Array, labels: jax.Array) -> jax.Array:
        original = chunk.astype(jnp.float32)

        def loss(images: jax.Array) -> jax.Array:
            logits, _ = classifier.logits(variables, images)
            return jnp.sum(cross_entropy(logits, labels))

        def step(images: jax.Array, _: None) -> tuple[jax.Array, None]:
            images = images + step_size * jnp.sign(jax.grad(loss)(images))
            return jnp.clip(jnp.clip(images, original - epsilon, original + epsilon), 0, 255), None

        return jnp.round(jax.lax.scan(step, original, None, length=steps)[0]).astype(jnp.uint8)

    return map_chunks(ascend, data.images, data.labels)
