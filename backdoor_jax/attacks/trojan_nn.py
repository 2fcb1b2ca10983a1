r"""TrojanNN (Liu et al., NDSS 2018): a patch optimized to excite a few latent units of a clean model.

The :math:`n` units with the largest :math:`\sum_c |W_{uc}|` in the head are chosen. Signed gradient steps on the pixels
under a mask drive them to a value far above those that images reach,

.. math:: \min_{p \in [0, \epsilon]} \; \tfrac1n \sum_u (\phi_u(p) - a)^2 .

The pattern is then added to images, and a new model is trained on them.

>>> import jax
>>> attack = TrojanNN()
>>> float(attack.trigger(jax.random.key(0), (32, 32, 3)).pattern[0, 0].max())
0.0
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from annotated_types import Gt, Le

from backdoor_jax.attacks.base import Attack, AttackContext
from backdoor_jax.attacks.triggers import AdditiveTrigger
from backdoor_jax.config import Count, Positive, Share
from backdoor_jax.models import Classifier, Variables


@dataclasses.dataclass(frozen=True)
class TrojanNN(Attack):
    """A patch optimized against latent units of a clean model.

    Deviations: the published mask is a logo in the lower right that covers 9.8 % of the image; ours is a disc of the
    same size there. The published pattern is optimized in the network's normalized input, ours in pixels. Of all
    patterns on the way the best is kept, where the published benchmark keeps the last. Sums with an image are clipped,
    where the benchmark casts them to uint8 first.

    Attributes:
        neurons: units chosen, n; published 2.
        activation: the value they are driven to, a; published 100. Bounded pixels may not reach it: info has the values
            that were reached.
        steps: signed gradient steps; published 1000.
        step_size: for pixels in [0, 1]; published 0.1.
        epsilon: the largest value of a pixel of the pattern, for pixels in [0, 1]; published 0.3, as the largest change
            of the logo's own pixels. Our pattern changes black pixels.
        radius: of the disc, as a share of the image's shorter side; 0.177, which makes 9.8 % of a square.
    """

    name: ClassVar[str] = "trojan_nn"
    fits_trigger: ClassVar[bool] = True

    neurons: Count = 2
    activation: float = 100.0
    steps: Count = 1000
    step_size: Positive = 0.1
    epsilon: Share = 0.3
    radius: Annotated[float, Gt(0), Le(0.5)] = 0.177

    @property
    def needs_clean_model(self) -> bool:
        """Always: its units are those that are excited."""
        return True

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """The random patch that the optimization starts from."""
        pattern = jax.random.uniform(key, shape, maxval=255 * self.epsilon)
        return AdditiveTrigger(jnp.where(self.mask(shape), pattern, 0))

    def mask(self, shape: tuple[int, int, int]) -> jax.Array:
        """Which pixels the patch covers: bool ``(H, W, 1)``."""
        height, width, _ = shape
        radius = self.radius * min(height, width)
        # A large disc, as in a small image, is in the middle.
        rows = jnp.arange(height)[:, None] - jnp.maximum(height - 2 - radius, (height - 1) / 2)
        columns = jnp.arange(width)[None] - jnp.maximum(width - 2 - radius, (width - 1) / 2)
        return (rows**2 + columns**2 <= radius**2)[..., None]

    def fit_trigger(self, key: jax.Array, context: AttackContext) -> tuple[AdditiveTrigger, dict[str, Any]]:
        """Optimizes the patch; info has the units and their values before and after, to compare with `activation`."""
        assert context.clean_model is not None
        kernel, _ = context.classifier.head_weights(context.clean_model)
        units = jax.lax.top_k(jnp.abs(kernel).sum(1), min(self.neurons, len(kernel)))[1]
        start, mask = self.trigger(key, context.shape).pattern / 255, self.mask(context.shape)
        pattern, before, after = _excite(context.classifier, context.clean_model, self, units, start, mask)
        info = {"neurons": units.tolist(), "activation_before": before.tolist(), "activation_after": after.tolist()}
        return AdditiveTrigger(255 * pattern), info


Carry = tuple[jax.Array, jax.Array, jax.Array]


@jax.jit
def _excite(
    classifier: Classifier, variables: Variables, config: TrojanNN, units: jax.Array, start: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best pattern that signed gradient steps reach, and the units' values before and after."""

    def excitation(pattern: jax.Array) -> jax.Array:
        return classifier.features(variables, 255 * pattern[None])[0][0, units]

    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        pattern, best, smallest = carry
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((excitation(p) - config.activation) ** 2))(pattern)
        best = jnp.where(loss < smallest, pattern, best)
        pattern = jnp.where(mask, jnp.clip(pattern - config.step_size * jnp.sign(gradient), 0, config.epsilon), 0)
        return (pattern, best, jnp.minimum(loss, smallest)), None

    # Steps of a fixed size never settle, so the best pattern on the way is the answer.
    (_, best, _), _ = jax.lax.scan(step, (start, start, jnp.float32(jnp.inf)), None, length=config.steps + 1)
    return best, excitation(start), excitation(best)
