r"""TrojanNN (Liu et al., NDSS 2018): a patch made to excite a few latent units of a clean model.

The :math:`n` units with the largest :math:`\sum_c |W_{uc}|` in the head are chosen, and signed gradient steps on the
pixels under a mask drive them to a value far above what images give,

.. math:: \min_{p \in [0, \epsilon]} \; \tfrac1n \sum_u (\phi_u(p) - a)^2 .

The pattern is then added to images, and a new model trained.

>>> import jax
>>> attack = TrojanNN()
>>> float(attack.trigger(jax.random.key(0), (32, 32, 3)).pattern[0, 0].max())
0.0
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from backdoor_jax.attacks.base import Attack, Scene
from backdoor_jax.attacks.triggers import AdditiveTrigger
from backdoor_jax.models import Classifier, Variables


@dataclasses.dataclass(frozen=True)
class TrojanNN(Attack):
    """A patch optimised against latent units of a clean model.

    The published mask is the outline of a logo; ours is a disc in the middle of the image, as large. Of all patterns
    that the steps come by the best is kept, where the published benchmark keeps the last. Sums with an image are
    clipped, where the benchmark casts them to uint8 first.

    Attributes:
        neurons: units chosen, n; published 2.
        activation: the value they are driven to, a; published 100. Bounded pixels need not get there: info gives the
            values reached.
        steps: signed gradient steps; published 1000.
        step_size: of pixels in [0, 1]; published 0.1.
        epsilon: the largest value of a pixel of the pattern, of 1; published 0.3, as the largest change from the logo's
            own pixels. Ours starts from black.
        radius: of the disc, as a share of the image's side; ours.
    """

    learns: ClassVar[bool] = True
    needs_clean_model: ClassVar[bool] = True

    neurons: int = 2
    activation: float = 100.0
    steps: int = 1000
    step_size: float = 0.1
    epsilon: float = 0.3
    radius: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.neurons > 0, "neurons", "at least 1")
        self.require(self.steps > 0, "steps", "at least 1")
        self.require(self.step_size > 0, "step_size", "a positive number")
        self.require(0 < self.epsilon <= 1, "epsilon", "a share in (0, 1]")
        self.require(0 < self.radius <= 1, "radius", "a share in (0, 1]")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """A random patch to start from."""
        pattern = jax.random.uniform(key, shape, maxval=255 * self.epsilon)
        return AdditiveTrigger(jnp.where(self.mask(shape), pattern, 0))

    def mask(self, shape: tuple[int, int, int]) -> jax.Array:
        """Which pixels the patch covers: bool ``(H, W, 1)``."""
        height, width, _ = shape
        rows = jnp.arange(height)[:, None] - (height - 1) / 2
        columns = jnp.arange(width)[None] - (width - 1) / 2
        return (rows**2 + columns**2 <= (self.radius * min(height, width)) ** 2)[..., None]

    def learn(self, key: jax.Array, scene: Scene) -> tuple[AdditiveTrigger, dict[str, Any]]:
        """Excites the chosen units; info names them, with their values before and after, to set beside `activation`."""
        assert scene.clean_model is not None
        kernel, _ = scene.classifier.head_weights(scene.clean_model)
        units = jax.lax.top_k(jnp.abs(kernel).sum(1), min(self.neurons, len(kernel)))[1]
        pattern, before, after = _excite(
            scene.classifier,
            scene.clean_model,
            self.trigger(key, scene.shape).pattern / 255,
            self.mask(scene.shape),
            units,
            jnp.float32(self.activation),
            jnp.float32(self.step_size),
            jnp.float32(self.epsilon),
            self.steps,
        )
        info = {"neurons": units.tolist(), "activation_before": before.tolist(), "activation_after": after.tolist()}
        return AdditiveTrigger(255 * pattern), info


Carry = tuple[jax.Array, jax.Array, jax.Array]


@partial(jax.jit, static_argnames="steps")
def _excite(
    classifier: Classifier,
    variables: Variables,
    start: jax.Array,
    mask: jax.Array,
    units: jax.Array,
    activation: jax.Array,
    step_size: jax.Array,
    epsilon: jax.Array,
    steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def excitation(pattern: jax.Array) -> jax.Array:
        return classifier.features(variables, 255 * pattern[None])[0][0, units]

    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        pattern, best, smallest = carry
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((excitation(p) - activation) ** 2))(pattern)
        best = jnp.where(loss < smallest, pattern, best)
        pattern = jnp.where(mask, jnp.clip(pattern - step_size * jnp.sign(gradient), 0, epsilon), 0)
        return (pattern, best, jnp.minimum(loss, smallest)), None

    # A fixed step overshoots for ever; the best pattern met is the answer.
    (_, best, _), _ = jax.lax.scan(step, (start, start, jnp.float32(jnp.inf)), None, length=steps + 1)
    return best, excitation(start), excitation(best)
