"""Adap-Blend (Qi et al., ICLR 2023, "Revisiting the assumption of latent separability"): a blended trigger that hides.

The picture is cut into a square grid of pieces. Each poisoned training image gets a random half of them. So do *cover*
images, which keep their labels and thereby pull the latents of poisoned images towards their own classes'. At test time
the whole picture is mixed in, with a larger share.

>>> import jax
>>> attack = AdapBlend()
>>> trigger = attack.trigger(jax.random.key(0), (32, 32, 3))
>>> round(float(trigger.alpha), 3)
0.2
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.attacks.base import Attack, AttackContext
from backdoor_jax.attacks.triggers import BlendTrigger, picture, to_uint8
from backdoor_jax.config import Count, Fraction, Share
from backdoor_jax.data import Dataset, Poisoned, Trigger, poison_count


@dataclasses.dataclass(frozen=True)
class AdapBlend(Attack):
    """Pieces of a picture on poisoned and on cover images; the whole picture at test time.

    The settings are the published code's, second-hand.

    Attributes:
        rate: published 0.003.
        labels: ``all_to_one`` or ``all_to_all``.
        cover_rate: share of all training images that get the trigger and keep their labels; published 0.003.
        pieces: along each side of the picture; published 4.
        shown: share of the pieces that an image gets; published 0.5.
        train_alpha: the picture's share in training; published 0.15.
        alpha: the picture's share at test time; published 0.2.
        image: path of a custom picture; by default a smooth random pattern is made from the key.
    """

    name: ClassVar[str] = "adap_blend"

    rate: Share = 0.003
    labels: Literal["all_to_one", "all_to_all"] = "all_to_one"
    cover_rate: Fraction = 0.003
    pieces: Count = 4
    shown: Share = 0.5
    train_alpha: Share = 0.15
    alpha: Share = 0.2
    image: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.cover_rate <= 1 - self.rate, "cover_rate", "a share in [0, 1 - rate]")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> BlendTrigger:
        """The whole picture, with its share at test time.

        Raises:
            UserError: if the picture cannot be read.
        """
        return BlendTrigger(picture(key, shape, self.image, "AdapBlend.image"), jnp.float32(self.alpha))

    def candidates(self, labels: jax.Array | np.ndarray) -> np.ndarray:
        """Indices of all images, any of which may be poisoned.

        Raises:
            UserError: if the poisoning rate poisons no image, or the cover rate covers none.
        """
        poison_count(self.cover_rate, len(labels))
        return super().candidates(labels)

    def poison_data(self, key: jax.Array, context: AttackContext, trigger: Trigger) -> Poisoned:
        """The training set with poisoned and cover images; the indices are those of the poisoned, relabeled ones."""
        assert isinstance(trigger, BlendTrigger)
        choice_key, pieces_key = jax.random.split(key)
        order = np.asarray(jax.random.permutation(choice_key, len(context.data)))
        count = poison_count(self.rate, len(context.data))
        cover = poison_count(self.cover_rate, len(context.data))
        relabeled, touched = np.sort(order[:count]), order[: count + cover]

        alphas = self.train_alpha * self.masks(pieces_key, len(touched), context.shape)
        images = context.data.images[touched].astype(jnp.float32)
        mixed = to_uint8((1 - alphas) * images + alphas * trigger.pattern)
        labels = self.label_map(context.num_classes)(context.data.labels[relabeled])
        poisoned = Dataset(context.data.images.at[touched].set(mixed), context.data.labels.at[relabeled].set(labels))
        return Poisoned(poisoned, relabeled)

    def masks(self, key: jax.Array, count: int, shape: tuple[int, int, int]) -> jax.Array:
        """Masks ``(count, H, W, 1)`` of 0 and 1: the pixels of each image that get the picture.

        Every mask has the same number of pieces, `shown` of them all but at least one, drawn at random.
        """
        number = self.pieces**2
        order = jax.vmap(lambda k: jax.random.permutation(k, number))(jax.random.split(key, count))
        taken = (order < max(1, round(self.shown * number))).reshape(count, self.pieces, self.pieces)
        rows, columns = (np.arange(size) * self.pieces // size for size in shape[:2])
        return taken[:, rows][:, :, columns][..., None].astype(jnp.float32)
