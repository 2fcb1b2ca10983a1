r"""Label-consistent attack (Turner et al., 2019, arXiv 1912.02771): poisoned images look like their labels say.

Images of the target class are made hard to recognize by projected gradient ascent against a network g,

.. math:: x \leftarrow \Pi_{\lVert x - x_0 \rVert_\infty \le \epsilon} \bigl(x + \eta\,\mathrm{sign}\,\nabla_x
    \mathrm{CE}(g(x), y)\bigr),

and then get a pattern in all four corners, so that the victim relies on the pattern instead. At test time only the
pattern is added. g itself is trained against perturbations. The paper does so by steps of projected ascent; here the
training of the clean model continues with single steps from a random start (Wong et al., ICLR 2020, arXiv 2001.03994),
which need one more gradient than usual training.

If all images of the class are poisoned, the perturbation identifies the class as well as the pattern does, and the
victim learns the perturbation; leave some images clean. A network that is wide enough to recognize the perturbed images
does not need the pattern in any case (both in `benchmarks/results/development.md`).

>>> import jax, jax.numpy as jnp
>>> trigger = LabelConsistent().trigger(jax.random.key(0), (32, 32, 3))
>>> trigger(jnp.full((1, 32, 32, 3), 100, jnp.uint8))[0, :4, :4, 0].tolist()
[[255, 0, 0, 100], [0, 255, 0, 100], [255, 0, 255, 100], [100, 100, 100, 100]]
"""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le
from jax.tree_util import Partial

from backdoor_jax.attacks.base import Attack, AttackContext
from backdoor_jax.attacks.triggers import AdditiveTrigger
from backdoor_jax.config import Count, Positive, Share, Whole
from backdoor_jax.data import Dataset, Poisoned, Trigger, draw_poisoned
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import GradientStep, LossResult, cross_entropy, map_chunks, supervised_loss

GrayLevels = Annotated[float, Ge(0), Le(255)]


@dataclasses.dataclass(frozen=True)
class LabelConsistent(Attack):
    """Adversarially perturbed images of the target class with a pattern in the four corners.

    Attributes:
        labels: always ``clean_label``.
        robust_epochs: passes that train g against perturbations; ours. With 0, g is the clean model.
        robust_epsilon: largest change of a pixel in these passes, in gray levels; 8 of 255 is usual.
        epsilon: largest change of a pixel in gray levels; published 16 of 255. The benchmark's images have 8.
        steps: of the ascent; the paper's 100.
        step_size: in gray levels; the paper's 1.5.
        amplitude: of the 3x3 checkerboards added in the corners, as a share of 255; published 1. As published, the cell
            of their top row that is closer to the middle of the image is dark.
    """

    name: ClassVar[str] = "label_consistent"
    fits_trigger: ClassVar[bool] = True

    labels: Literal["clean_label"] = "clean_label"
    robust_epochs: Whole = 10
    robust_epsilon: GrayLevels = 8.0
    epsilon: GrayLevels = 16.0
    steps: Count = 100
    step_size: Positive = 1.5
    amplitude: Share = 1.0

    @property
    def needs_clean_model(self) -> bool:
        """Always: images are perturbed against it, or against the robust network that its training becomes."""
        return True

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """The pattern in the corners; nothing is random.

        Raises:
            UserError: for images smaller than 6x6.
        """
        del key
        height, width, _ = shape
        if min(height, width) < 6:
            raise UserError(f"LabelConsistent needs images of 6x6 pixels or more for its corners, got {height}x{width}")
        light = (jnp.arange(3)[:, None] + jnp.arange(3)) % 2 == 0
        checker = jnp.where(light, 255.0, -255.0) * self.amplitude
        pattern = jnp.zeros((height, width))
        for rows in (slice(3), slice(-3, None)):
            for columns in (slice(3), slice(-3, None)):
                pattern = pattern.at[rows, columns].set(checker)
        inner = jnp.array([0, 0, -3, -3]), jnp.array([2, -3, 2, -3])
        pattern = pattern.at[inner].set(-255.0 * self.amplitude)
        return AdditiveTrigger(jnp.broadcast_to(pattern[..., None], shape))

    def poison(self, key: jax.Array, context: AttackContext) -> tuple[Poisoned, Trigger, dict[str, Any]]:
        """Trains g and poisons with it; info has the accuracy of g on perturbed images in its last epoch.

        Raises:
            UserError: if there is no clean model.
            NonFiniteError: if the training of g diverges.
        """
        key, robust_key = jax.random.split(key)
        context, info = self.harden(robust_key, context)
        poisoned, trigger, _ = super().poison(key, context)
        return poisoned, trigger, info

    def harden(self, key: jax.Array, context: AttackContext) -> tuple[AttackContext, dict[str, Any]]:
        """The context with the clean model trained further against perturbations, and how accurate it then is."""
        if context.clean_model is None or not self.robust_epochs:
            return context, {}
        step = GradientStep(
            Partial(robust_loss, context.classifier, self.robust_epsilon),
            context.training.optimizer(len(context.data), self.robust_epochs),
        )
        fitted = context.fit(
            key,
            step,
            step.init(context.clean_model),
            epochs=self.robust_epochs,
            name="label-consistent: robust network",
        )
        info = {"robust_accuracy": fitted.last_epoch["accuracy"]}
        return dataclasses.replace(context, clean_model=fitted.variables), info

    def poison_data(self, key: jax.Array, context: AttackContext, trigger: Trigger) -> Poisoned:
        """The poisoned training set: randomly drawn images of the target class, perturbed and then triggered."""
        assert context.clean_model is not None
        labels = context.data.labels
        chosen = draw_poisoned(key, self.rate, len(labels), self.candidates(labels))
        perturbed = perturb(context.classifier, context.clean_model, self, context.data.take(chosen))
        return Poisoned(Dataset(context.data.images.at[chosen].set(trigger(perturbed)), labels), chosen)


def robust_loss(
    classifier: Classifier, epsilon: jax.Array | float, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    """Mean cross-entropy of images changed by one step of ascent from a random start; logs ``accuracy``.

    The step is 1.25 times as long as the largest change, as published. Normalization is in training mode.

    Args:
        classifier: the network.
        epsilon: the largest change of a pixel, in gray levels.
        variables: the model's variables.
        batch: images and labels.
        key: for the random start.
    """
    images = batch.images.astype(jnp.float32)

    def loss(change: jax.Array, variables: Variables) -> LossResult:
        changed = jnp.clip(images + change, 0, 255)
        return supervised_loss(classifier, variables, Dataset(changed, batch.labels), key)

    start = epsilon * jax.random.uniform(key, images.shape, minval=-1, maxval=1)
    ascent, _ = jax.grad(loss, has_aux=True)(start, jax.lax.stop_gradient(variables))
    return loss(jnp.clip(start + 1.25 * epsilon * jnp.sign(ascent), -epsilon, epsilon), variables)


@jax.jit
def perturb(classifier: Classifier, variables: Variables, config: LabelConsistent, data: Dataset) -> jax.Array:
    """Images changed by projected gradient ascent to be hard to recognize.

    Args:
        classifier: the network.
        variables: those of the model that they should be hard to recognize for.
        config: gives ``epsilon``, ``step_size`` and ``steps``.
        data: images and labels.

    Returns:
        uint8 ``(N, H, W, channels)``, changed by at most ``epsilon`` gray levels.
    """

    def ascend(chunk: jax.Array, labels: jax.Array) -> jax.Array:
        original = chunk.astype(jnp.float32)

        def loss(images: jax.Array) -> jax.Array:
            logits, _ = classifier.logits(variables, images)
            return jnp.sum(cross_entropy(logits, labels))

        def step(images: jax.Array, _: None) -> tuple[jax.Array, None]:
            images = images + config.step_size * jnp.sign(jax.grad(loss)(images))
            return jnp.clip(jnp.clip(images, original - config.epsilon, original + config.epsilon), 0, 255), None

        return jnp.round(jax.lax.scan(step, original, None, length=config.steps)[0]).astype(jnp.uint8)

    return map_chunks(ascend, data.images, data.labels)
