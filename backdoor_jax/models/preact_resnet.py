"""PreAct-ResNet18 as in the published backdoor benchmark.

He et al., 2016, "Identity mappings in deep residual networks", in the benchmark's variant: a 3x3 stem, four stages of
two pre-activation blocks with 1, 2, 4 and 8 times `width` channels and strides 1, 2, 2, 2, then global average pooling
and a linear head. The variant leaves out the normalization and the rectifier that usually
come before pooling, so latents may be negative; the 1x1 shortcut acts on the normalized and rectified input.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from backdoor_jax.models.layers import BatchNorm, ReLU, conv, torch_bias, torch_uniform


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after normalization and rectifier.

    Shapes: ``(B, H, W, I) -> (B, H/s, W/s, features)``.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output."""
        out = ReLU(name="relu1")(BatchNorm(name="bn1")(x, train))
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, name="shortcut")(out)
        out = conv(self.features, 3, self.stride, name="conv1")(out)
        out = ReLU(name="relu2")(BatchNorm(name="bn2")(out, train))
        return conv(self.features, 3, name="conv2")(out) + shortcut


class PreActResNet18(nn.Module):
    """The benchmark's PreAct-ResNet18.

    Args:
        num_classes: columns of the head.
        width: channels of the stem; 64 is the published network, and latents have ``8 * width`` entries.

    Example:
        >>> net = PreActResNet18(num_classes=10, width=4)
        >>> variables = net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
        >>> net.apply(variables, jnp.zeros((2, 32, 32, 3)), train=False).shape
        (2, 10)
    """

    num_classes: int
    width: int = 64

    @property
    def map_layers(self) -> tuple[tuple[str, ...], ...]:
        """The last block of each stage."""
        return tuple((f"layer{stage + 1}_1",) for stage in range(4))

    def setup(self) -> None:
        """Makes the layers; Flax calls it."""
        self.stem = conv(self.width, 3)
        self.blocks = [
            PreActBlock(self.width * 2**stage, 2 if stage and not block else 1, name=f"layer{stage + 1}_{block}")
            for stage in range(4)
            for block in range(2)
        ]
        latent = 8 * self.width
        self.linear = nn.Dense(self.num_classes, kernel_init=torch_uniform, bias_init=torch_bias(latent))

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images ``(B, H, W, 3)`` to latents ``(B, 8 * width)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, train)
        return jnp.mean(x, axis=(1, 2))

    def head(self, latent: jax.Array) -> jax.Array:
        """Latents ``(B, D)`` to logits ``(B, num_classes)``."""
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images to logits."""
        return self.head(self.features(x, train))
