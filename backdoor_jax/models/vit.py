"""Vision transformers (Dosovitskiy et al., 2021, arXiv 2010.11929) as in torchvision.

A linear map turns patches into tokens; a class token is put before them and position embeddings are added to all; then
come pre-norm encoder layers of self-attention and an MLP of 4 times the width, a last normalization, and a linear head
on the class token. Attention heads have 64 channels in ViT-Tiny (3 heads; Touvron et al., 2021, arXiv 2012.12877),
ViT-Small (6) and ViT-Base (12), all of depth 12: so `width` is the channels of an attention head here, and ``heads``
chooses among them. Published patches are 16x16 on 224x224 images; 4x4, for 32x32 images, is this package's choice.

Weights are initialized as in torchvision: the patches' map normal with variance 1/fan-in, queries, keys, values and MLP
Glorot-uniform, the attention's output uniform on +-1/sqrt(fan-in), position embeddings normal with standard deviation
0.02, MLP biases normal with standard deviation 1e-6; class token, other biases and the head zero. torchvision's dropout
is 0 by default, and there is none here.

Parameters correspond to torchvision's one for one: ``encoder_layer_0`` to ``encoder_layer_11`` hold ``ln_1``,
``in_proj`` (queries, keys and values side by side), ``out_proj``, ``ln_2``, ``mlp_0`` and ``mlp_3``.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from backdoor_jax.errors import UserError
from backdoor_jax.models.conv import conv_general_dilated
from backdoor_jax.models.layers import GELU, torch_uniform


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-6, use_fast_variance=False, name=name)


class EncoderLayer(nn.Module):
    """Self-attention, then an MLP, each on normalized tokens and added to them.

    Shapes: ``(B, T, D) -> (B, T, D)``.

    Example:
        >>> layer, tokens = EncoderLayer(heads=2, mlp_ratio=4), jnp.zeros((2, 5, 8))
        >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), tokens)[0].shape
        (2, 5, 8)
    """

    heads: int
    mlp_ratio: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer's output."""
        glorot = nn.initializers.xavier_uniform()
        tiny = nn.initializers.normal(1e-6)
        batch, tokens, width = x.shape

        y = nn.Dense(3 * width, kernel_init=glorot, name="in_proj")(_norm("ln_1")(x))
        query, key, value = jnp.moveaxis(y.reshape(batch, tokens, 3, self.heads, -1), 2, 0)
        y = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        x += nn.Dense(width, kernel_init=torch_uniform, name="out_proj")(y)

        y = nn.Dense(self.mlp_ratio * width, kernel_init=glorot, bias_init=tiny, name="mlp_0")(_norm("ln_2")(x))
        return x + nn.Dense(width, kernel_init=glorot, bias_init=tiny, name="mlp_3")(GELU(name="gelu")(y))


class VisionTransformer(nn.Module):
    """A vision transformer for square images of one size.

    The size is that of the images it is initialized with; other sizes then raise an error that names both.

    Args:
        num_classes: columns of the head.
        width: channels of an attention head; 64 in the published networks. Latents have ``heads * width`` entries.
        patch: side of a patch in pixels.
        depth: encoder layers.
        heads: attention heads of each layer.
        mlp_ratio: hidden units of the MLP for each of its inputs.

    Example:
        >>> net = VisionTransformer(num_classes=10, width=4, depth=2)
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> logits, _ = jax.eval_shape(lambda key: net.init_with_output(key, images, False), jax.random.key(0))
        >>> logits.shape
        (2, 10)
    """

    num_classes: int
    width: int = 64
    patch: int = 4
    depth: int = 12
    heads: int = 3
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise UserError(f"patches of {self.patch} pixels cannot be cut; give patch 1 or more")
        super().__post_init__()

    def setup(self) -> None:
        """Makes the head; Flax calls it."""
        self.heads_head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)

    @nn.compact
    def features(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images ``(B, S, S, 3)`` to latents ``(B, heads * width)``; both modes are the same."""
        del train
        batch, height, width, _ = x.shape
        size, latent = (self.patch, self.patch), self.heads * self.width
        if height != width or height % self.patch:
            raise UserError(
                f"patches of {self.patch}x{self.patch} need square images that they divide, got {height}x{width}; "
                "resize the images, or give another patch"
            )
        tokens = 1 + (height // self.patch) ** 2
        if self.has_variable("params", "pos_embedding"):
            made = self.patch * math.isqrt(self.get_variable("params", "pos_embedding").shape[1] - 1)
            if made != height:
                raise UserError(
                    f"this network is for images of {made}x{made}, got {height}x{width}; "
                    f"resize them, or make and train one for {height}x{width}"
                )
        x = nn.Conv(
            latent,
            size,
            size,
            padding="VALID",
            kernel_init=nn.initializers.variance_scaling(1, "fan_in", "normal"),
            conv_general_dilated=conv_general_dilated,
            name="conv_proj",
        )(x)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, latent))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, latent)), x.reshape(batch, -1, latent)], axis=1)
        x += self.param("pos_embedding", nn.initializers.normal(0.02), (1, tokens, latent))
        for layer in range(self.depth):
            x = EncoderLayer(self.heads, self.mlp_ratio, name=f"encoder_layer_{layer}")(x)
        return _norm("ln")(x[:, 0])

    def head(self, latent: jax.Array) -> jax.Array:
        """Latents ``(B, D)`` to logits ``(B, num_classes)``."""
        return self.heads_head(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalized images to logits."""
        return self.head(self.features(x, train))
