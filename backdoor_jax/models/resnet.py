"""ResNet-18, 34 and 50 (He et al., 2016, arXiv 1512.03385) as in torchvision.

A stem, four stages of blocks with 1, 2, 4 and 8 times `width` channels, global average pooling and a linear head. The
stride of a ResNet-50's block is in its 3x3 convolution. Weights start as torchvision's: convolutions normal with
variance 2/fan-out, normalizations at scale 1 and bias 0, the head uniform on +-1/sqrt(fan-in).

The published stem is ``imagenet``, a 7x7 convolution with stride 2 and 3x3 max-pooling with stride 2, which
BackdoorBench uses for 32x32 images too. The stem ``small``, a 3x3 convolution with stride 1 and no pooling, is the
usual one for 32x32 images elsewhere, and the default here. The others are what people make of these two with the same
weights: `STEMS` has all of them.

Parameters have torchvision's names, with an underscore for each dot: ``layer1_0/conv1``, ``layer2_0/downsample_0``.
"""

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from backdoor_jax.errors import UserError
from backdoor_jax.models.layers import BatchNorm, ReLU, conv, kaiming_fan_out, max_pool, torch_bias, torch_uniform

Stem = Literal["small", "small_pool", "small_stride", "imagenet", "imagenet_no_pool"]
STEMS: dict[Stem, tuple[int, int, bool]] = {
    "small": (3, 1, False),
    "small_pool": (3, 1, True),
    "small_stride": (3, 2, False),
    "imagenet": (7, 2, True),
    "imagenet_no_pool": (7, 2, False),
}
"""Size and stride of the first convolution, and whether max-pooling follows. Shapes of weights show only the size."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 with 4 times the channels, added to the input.

    The last rectifier follows the addition.

    Shapes: ``(B, H, W, I) -> (B, H/s, W/s, features)``, or ``4 * features`` where there is a bottleneck.
    """

    features: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output."""
        steps = [(self.features, 3, self.stride), (self.features, 3, 1)]
        if self.bottleneck:
            steps = [(self.features, 1, 1), (self.features, 3, self.stride), (4 * self.features, 1, 1)]
        out = x
        for number, (features, size, stride) in enumerate(steps, 1):
            if number > 1:
                out = ReLU(name=f"relu{number - 1}")(out)
            out = conv(features, size, stride, name=f"conv{number}", kernel_init=kaiming_fan_out)(out)
            out = BatchNorm(name=f"bn{number}")(out, train)
        if self.stride != 1 or x.shape[-1] != out.shape[-1]:
            x = conv(out.shape[-1], 1, self.stride, name="downsample_0", kernel_init=kaiming_fan_out)(x)
            x = BatchNorm(name="downsample_1")(x, train)
        return ReLU(name=f"relu{len(steps)}")(out + x)


class ResNet(nn.Module):
    """A ResNet of four stages.

    Args:
        num_classes: columns of the head.
        width: channels of the stem; 64 is the published network. Latents have ``8 * width`` entries, or
            ``32 * width`` with bottlenecks.
        blocks: the number of blocks in each stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34 and 50.
        bottleneck: whether blocks have a bottleneck, as in ResNet-50.
        stem: a name in `STEMS`.

    Example:
        >>> net = ResNet(num_classes=10, width=4)
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> logits, _ = jax.eval_shape(lambda key: net.init_with_output(key, images, False), jax.random.key(0))
        >>> logits.shape
        (2, 10)
    """

    num_classes: int
    width: int = 64
    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    bottleneck: bool = False
    stem: Stem = "small"

    def __post_init__(self) -> None:
        if self.stem not in get_args(Stem):
            raise UserError(f"unknown stem {self.stem!r}; known are {', '.join(get_args(Stem))}")
        super().__post_init__()

    @property
    def map_layers(self) -> tuple[tuple[str, ...], ...]:
        """The last block of each stage."""
        return tuple((f"layer{stage + 1}_{count - 1}",) for stage, count in enumerate(self.blocks))

    def setup(self) -> None:
        """Makes the head; Flax calls it."""
        latent = self.width * (32 if self.bottleneck else 8)
        self.fc = nn.Dense(self.num_classes, kernel_init=torch_uniform, bias_init=torch_bias(latent))

    @nn.compact
    def features(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images ``(B, H, W, 3)`` to latents ``(B, D)``."""
        size, stride, pooled = STEMS[self.stem]
        x = conv(self.width, size, stride, name="conv1", kernel_init=kaiming_fan_out)(x)
        x = ReLU(name="relu")(BatchNorm(name="bn1")(x, train))
        if pooled:
            x = max_pool(x, 3, padding=1)
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                name = f"layer{stage + 1}_{block}"
                x = ResidualBlock(self.width * 2**stage, stride, self.bottleneck, name=name)(x, train)
        return jnp.mean(x, axis=(1, 2))

    def head(self, latent: jax.Array) -> jax.Array:
        """Latents ``(B, D)`` to logits ``(B, num_classes)``."""
        return self.fc(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images to logits."""
        return self.head(self.features(x, train))
