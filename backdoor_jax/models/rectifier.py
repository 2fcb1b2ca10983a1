"""The rectifier, which keeps NaN on every backend.

XLA's compiler for CPUs may take the larger of NaN and 0 to be 0, so that a damaged network gives finite logits and a
rate that means nothing.
"""

import jax
import jax.numpy as jnp


def relu(x: jax.Array) -> jax.Array:
    """``x`` where it is positive, 0 where it is not, and NaN where it is NaN; the gradient at 0 is 0.

    Example:
        >>> relu(jnp.array([-1.0, 2.0, jnp.nan])).tolist()
        [0.0, 2.0, nan]
    """
    return jnp.where(x <= 0, 0, x)
