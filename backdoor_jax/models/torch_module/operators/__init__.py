"""PyTorch's operators in JAX, one small function for each, registered under its name.

Dropout is the identity, in training as well: a latent is a function of weights and images alone.
"""

from backdoor_jax.models.torch_module.operators import (  # noqa: F401  Importing them registers their operators.
    convolutions,
    creation,
    entrywise,
    pooling,
    products,
    reductions,
    shapes,
)
from backdoor_jax.models.torch_module.operators.normalization import batch_norm, batch_statistics, instance_norm
from backdoor_jax.models.torch_module.operators.registry import OPERATORS, find

__all__ = ["OPERATORS", "batch_norm", "batch_statistics", "find", "instance_norm"]
