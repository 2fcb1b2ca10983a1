"""VGG19 with batch normalization (Simonyan and Zisserman, 2015, arXiv 1409.1556) as in torchvision.

Sixteen 3x3 convolutions in five groups, with 1, 2, 4, 8 and 8 times `width` channels, each with bias, normalization and
rectifier; 2x2 max-pooling with stride 2 after every group; adaptive average pooling to 7x7; two hidden layers of
``64 * width`` units. BackdoorBench uses torchvision's network, large hidden layers included, for 32x32 images, whose
last map is 1x1 and is repeated to 7x7.

Weights are initialized as in torchvision: convolutions normal with variance 2/fan-out, linear layers normal with
standard deviation 0.01, biases zero. torchvision's dropout after each hidden layer is left out: here a latent is a
function of weights and images alone. That changes training but not evaluation.

Parameters have torchvision's names, with an underscore for each dot: ``features_0`` to ``features_50`` and
``classifier_0``, ``classifier_3``, ``classifier_6``. The 7x7 map is flattened channels first, so that the kernels of
``classifier_0`` correspond too.
"""

from itertools import accumulate

import flax.linen as nn
import jax

from backdoor_jax.errors import UserError
from backdoor_jax.models.layers import BatchNorm, ReLU, adaptive_avg_pool, conv, kaiming_fan_out, max_pool

GROUPS = (2, 2, 4, 4, 4)
"""Convolutions before each pooling."""


def _linear(features: int, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.normal(0.01), name=name)


class VGG19(nn.Module):
    """VGG19-BN.

    Args:
        num_classes: columns of the head.
        width: channels of the first convolution; 64 is the published network, and latents have ``64 * width`` entries.

    Example:
        >>> net = VGG19(num_classes=10, width=1)
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> logits, _ = jax.eval_shape(lambda key: net.init_with_output(key, images, False), jax.random.key(0))
        >>> logits.shape
        (2, 10)
    """

    num_classes: int
    width: int = 64

    @property
    def map_layers(self) -> tuple[tuple[str, ...], ...]:
        """The last rectifier before each pooling."""
        return tuple((f"features_{end - 2}",) for end in accumulate(3 * count + 1 for count in GROUPS))

    def setup(self) -> None:
        """Makes the head; Flax calls it."""
        self.classifier_6 = _linear(self.num_classes)

    @nn.compact
    def features(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images ``(B, H, W, 3)``, 32x32 or larger, to latents ``(B, 64 * width)``."""
        height, width = x.shape[1:3]
        if min(height, width) < 32:
            raise UserError(f"VGG19 halves images five times, and {height}x{width} are too small; give 32x32 or larger")
        index = 0
        for group, convolutions in enumerate(GROUPS):
            channels = self.width * min(2**group, 8)
            for _ in range(convolutions):
                x = conv(channels, 3, name=f"features_{index}", use_bias=True, kernel_init=kaiming_fan_out)(x)
                x = BatchNorm(name=f"features_{index + 1}")(x, train)
                x = ReLU(name=f"features_{index + 2}")(x)
                index += 3
            x = max_pool(x, 2)
            index += 1
        x = adaptive_avg_pool(x, 7).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for index in (0, 3):
            x = _linear(64 * self.width, name=f"classifier_{index}")(x)
            x = ReLU(name=f"classifier_{index + 1}")(x)
        return x

    def head(self, latent: jax.Array) -> jax.Array:
        """Latents ``(B, D)`` to logits ``(B, num_classes)``."""
        return self.classifier_6(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images to logits."""
        return self.head(self.features(x, train))
