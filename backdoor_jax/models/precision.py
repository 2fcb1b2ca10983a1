"""Half precision: a network computed in bfloat16 up to its latents, on weights that stay in float32."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from backdoor_jax.models.network import Path, Variables

Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class HalfPrecision:
    """Another network, computed in bfloat16.

    Parameters are rounded before they are used, so that gradients, updates and the parameters themselves stay in
    float32. So do batch normalizations with their statistics, the head, and everything computed from latents and
    logits.

    Attributes:
        network: the network; its batch normalizations must compute in float32 for any input, as
            `backdoor_jax.models.layers.BatchNorm` and Flax's own do.
        head_path: path of its linear head in ``params``.

    Example:
        >>> from backdoor_jax.models import SmallCNN
        >>> from backdoor_jax.models.network import LinenNetwork
        >>> network = HalfPrecision(LinenNetwork(SmallCNN(10, width=2), ("linear",), "features", "head"), ("linear",))
        >>> variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> latent, variables = network.features(variables, jnp.zeros((1, 8, 8, 3)), train=True)
        >>> {str(leaf.dtype) for leaf in jax.tree.leaves((latent, variables))}
        {'float32'}
    """

    network: Any
    head_path: Path

    @property
    def module(self) -> Any:
        """The network's module, where it has one."""
        return getattr(self.network, "module", None)

    def _rounded(self, variables: Variables) -> Variables:
        precise = {path[:-1] for path in flatten_dict(variables.get("batch_stats", {}))} | {self.head_path}
        params = {
            path: leaf if path[:-1] in precise else leaf.astype(jnp.bfloat16)
            for path, leaf in flatten_dict(variables["params"]).items()
        }
        return {**variables, "params": unflatten_dict(params)}

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """New variables, in float32."""
        return self.network.init(key, x)

    def features(self, variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` in float32, and the variables, with new statistics when training."""
        latent, new = self.network.features(self._rounded(variables), x.astype(jnp.bfloat16), train)
        return latent.astype(jnp.float32), {**new, "params": variables["params"]}

    def maps(
        self, variables: Variables, x: jax.Array, train: bool, layers: tuple[Path, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...], Variables]:
        """What `features` returns, with the outputs of these layers in between, all in float32."""
        latent, maps, new = self.network.maps(self._rounded(variables), x.astype(jnp.bfloat16), train, layers)
        latent, *wide = (value.astype(jnp.float32) for value in (latent, *maps))
        return latent, tuple(wide), {**new, "params": variables["params"]}

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``, in float32."""
        return self.network.head(variables, latent)

    def activations(self, variables: Variables, x: jax.Array) -> Variables:
        """The largest value per channel of each activation that can be bounded, in float32."""
        found = self.network.activations(self._rounded(variables), x.astype(jnp.bfloat16))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    def conv_feeding_norm(self, variables: Variables, x: jax.Array) -> dict[Path, Path]:
        """The path in ``params`` of the convolution that feeds each batch normalization, by its own path."""
        return self.network.conv_feeding_norm(variables, x)
