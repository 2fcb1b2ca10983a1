"""`Classifier`: the one door through which attacks, defences and metrics see a network."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from backdoor_jax.errors import UserError

Variables = dict[str, Any]
"""A Flax variables tree: ``params``, ``batch_stats`` where the network normalises, ``bounds`` where it is clipped."""

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation of pixels in [0, 1], per data set, as the published benchmark has them."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network with its input normalisation; pure methods over a variables tree.

    Equal and hashable by value and registered as static, so that jitted code may close over it or take it as an
    argument without compiling again for an equal one. Everybody else sees uint8 images ``(B, H, W, channels)``.

    Args:
        network: a Linen module with methods ``features(x, train)`` and ``head(latent)``.
        num_classes: the number of classes C.
        mean: per channel, of pixels scaled to [0, 1].
        std: likewise; positive.
        head_path: where the linear head lies in ``params``; it holds ``kernel`` (D, C) and ``bias`` (C,).

    Example:
        >>> from backdoor_jax.models.preact_resnet import PreActResNet18
        >>> classifier = Classifier(PreActResNet18(10, width=4), 10)
        >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
        >>> variables = classifier.init(jax.random.key(0), images)
        >>> latent, _ = classifier.features(variables, images)
        >>> latent.shape, classifier.head(variables, latent).shape
        ((2, 32), (2, 10))
    """

    network: nn.Module
    num_classes: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    head_path: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError(
                f"mean {self.mean} and std {self.std} must name the same channels with std > 0; give one pair a channel"
            )

    def normalize(self, images: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """uint8 images to the network's input: ``(images / 255 - mean) / std``."""
        scale = 1 / (255 * jnp.asarray(self.std, dtype))
        shift = jnp.asarray(self.mean, dtype) / jnp.asarray(self.std, dtype)
        return images.astype(dtype) * scale - shift

    def _input(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Normalised images in the precision of the weights, at least float32."""
        return self.normalize(images, jnp.result_type(jnp.float32, *jax.tree.leaves(variables.get("params"))))

    def _apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        return self.network.apply(variables, *args, **kwargs)

    def init(self, key: jax.Array, images: jax.Array) -> Variables:
        """Fresh variables for images of this shape; only their shape matters."""
        variables = self.network.init(key, self.normalize(images[:1]), train=False, mutable=("params", "batch_stats"))
        return dict(variables)

    def features(self, variables: Variables, images: jax.Array, train: bool = False) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` of images ``(B, H, W, channels)``, and the variables with the statistics of the batch.

        In evaluation mode the variables come back as they went in.
        """
        x = self._input(variables, images)
        if not train:
            return self._apply(variables, x, train=False, method="features"), variables
        latent, new = self._apply(variables, x, train=True, method="features", mutable=["batch_stats"])
        return latent, {**variables, **new}

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``, in float32 or the weights' own precision if that is higher."""
        logits = self._apply(variables, latent, method="head")
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def logits(self, variables: Variables, images: jax.Array, train: bool = False) -> tuple[jax.Array, Variables]:
        """Logits ``(B, C)`` of images, and the variables as `features` returns them."""
        latent, variables = self.features(variables, images, train)
        return self.head(variables, latent), variables

    def activations(self, variables: Variables, images: jax.Array) -> Variables:
        """Each bounded activation's largest value per channel over the batch, in the tree of the ``bounds``.

        Empty where the network has no `ReLU` or `GELU` of ours.
        """
        _, sown = self._apply(
            variables, self._input(variables, images), train=False, method="features", mutable=["activations"]
        )
        return sown.get("activations", {})

    def head_weights(self, variables: Variables) -> tuple[jax.Array, jax.Array]:
        """The linear head's kernel ``(D, C)`` and bias ``(C,)``."""
        layer = variables["params"]
        for name in self.head_path:
            layer = layer[name]
        return layer["kernel"], layer.get("bias", jnp.zeros(self.num_classes))
