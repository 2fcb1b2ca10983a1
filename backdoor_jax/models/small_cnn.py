"""A small convolutional network for examples, quick trials and tests: it compiles in a second.

Not from a paper. Three 3x3 convolutions of 1, 2 and 2 times `width` channels and strides 1, 2 and 2, each normalized
and rectified, then global average pooling and a linear head. Weights are initialized as in PyTorch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from backdoor_jax.models.layers import BatchNorm, ReLU, conv, torch_bias, torch_uniform


class SmallCNN(nn.Module):
    """Three convolutions and a linear head.

    Args:
        num_classes: columns of the head.
        width: channels of the first convolution; latents have ``2 * width`` entries.

    Example:
        >>> net = SmallCNN(num_classes=10, width=4)
        >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
        >>> net.apply(variables, jnp.zeros((2, 16, 16, 3)), train=False).shape
        (2, 10)
    """

    num_classes: int
    width: int = 64

    @property
    def map_layers(self) -> tuple[tuple[str, ...], ...]:
        """Its rectifiers."""
        return (("relu0",), ("relu1",), ("relu2",))

    def setup(self) -> None:
        """Makes the layers; Flax calls it."""
        sizes = ((self.width, 1), (2 * self.width, 2), (2 * self.width, 2))
        self.convolutions = [conv(features, 3, stride, name=f"conv{at}") for at, (features, stride) in enumerate(sizes)]
        self.normalizations = [BatchNorm(name=f"bn{at}") for at in range(3)]
        self.rectifiers = [ReLU(name=f"relu{at}") for at in range(3)]
        latent = 2 * self.width
        self.linear = nn.Dense(self.num_classes, kernel_init=torch_uniform, bias_init=torch_bias(latent))

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images ``(B, H, W, channels)`` to latents ``(B, 2 * width)``."""
        for layer, norm, rectify in zip(self.convolutions, self.normalizations, self.rectifiers, strict=True):
            x = rectify(norm(layer(x), train))
        return jnp.mean(x, axis=(1, 2))

    def head(self, latent: jax.Array) -> jax.Array:
        """Latents ``(B, D)`` to logits ``(B, num_classes)``."""
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images to logits."""
        return self.head(self.features(x, train))
