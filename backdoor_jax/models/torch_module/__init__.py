"""PyTorch modules as networks in JAX: an exported graph, an interpreter, and a table of operators."""

from backdoor_jax.models.torch_module.network import TorchNetwork
from backdoor_jax.models.torch_module.reading import (
    EXTRA_STATE,
    image_shape,
    read_module,
    require_shapes,
    run_module,
    unwrapped,
)

__all__ = ["EXTRA_STATE", "TorchNetwork", "image_shape", "read_module", "require_shapes", "run_module", "unwrapped"]
