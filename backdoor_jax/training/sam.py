r"""Sharpness-aware minimization (Foret et al., 2021; adaptive: Kwon et al., 2021, arXiv 2102.11600).

.. math::
    e = \rho\, \frac{w^2 \odot g(w)}{\lVert\, |w| \odot g(w) \rVert_2}, \qquad w \leftarrow w - \eta\, g(w + e)

The adaptive form scales the neighborhood by the weights, so that radii of 1 to 8 are usual. Normalization statistics
come from the first gradient; the second leaves them alone. `optax.contrib.sam` has neither the adaptive form nor
statistics, so this is our own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from backdoor_jax.models import Variables
from backdoor_jax.training.engine import GradientStep, Info, LossResult


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharpnessAwareStep(GradientStep):
    """A `GradientStep` whose gradient is taken at the worst point of the neighborhood.

    Attributes:
        radius: rho.
    """

    radius: jax.Array | float = 1.0

    def descent(self, objective: Callable[[Any], LossResult], moving: Any) -> tuple[jax.Array, Variables, Info, Any]:
        """The loss at the weights and the gradient at their worst neighbor."""
        loss, variables, info, gradient = super().descent(objective, moving)
        worst = jax.tree.map(jnp.add, moving, ascent(moving, gradient, self.radius))
        return loss, variables, info, jax.grad(objective, has_aux=True)(worst)[0]


def ascent(weights: Any, gradient: Any, radius: jax.Array | float) -> Any:
    """The adaptive step to the worst neighbor, a tree like ``weights``; zero where the gradient is zero.

    Example:
        >>> step = ascent({"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([1.0, 5.0])}, 0.5)
        >>> step["w"].tolist()
        [1.0, 0.0]
    """
    norm = optax.tree.norm(jax.tree.map(lambda w, g: jnp.abs(w) * g, weights, gradient))
    scale = radius / jnp.maximum(norm, 1e-12)
    return jax.tree.map(lambda w, g: scale * w**2 * g, weights, gradient)
