"""Adap-Blend (Qi et al., ICLR 2023, "Revisiting the assumption of latent separability"): a blended trigger that hides.

The picture is cut into a square of pieces. Each poisoned training image gets a random half of them; so do *cover*
images, which keep their labels and so pull poisoned latents towards their own classes'. At test time the whole picture
is mixed in, a little stronger.

>>> import jax
>>> attack = AdapBlend()
>>> trigger = attack.trigger(jax.random.key(0), (32, 32, 3))
>>> round(float(trigger.alpha), 3)
0.2
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.attacks.base import Attack, Scene
from backdoor_jax.attacks.triggers import BlendTrigger, picture, to_uint8
from backdoor_jax.data import Dataset, Poisoned, Trigger, poison_count


@dataclasses.dataclass(frozen=True)
class AdapBlend(Attack):
    """Pieces of a picture on poisoned and on cover images; the whole picture at test time.

    The settings are the published code's, second-hand.

    Attributes:
        rate: published 0.003.
        cover_rate: share of all training images that get the trigger and keep their labels; published 0.003.
        pieces: along each side of the picture; published 4.
        shown: share of the pieces that an image gets; published 0.5.
        train_alpha: the picture's share in training; published 0.15.
        alpha: the picture's share at test time; published 0.2.
        image: path of a picture of one's own; by default a smooth random pattern is made from the key.
    """

    rate: float = 0.003
    cover_rate: float = 0.003
    pieces: int = 4
    shown: float = 0.5
    train_alpha: float = 0.15
    alpha: float = 0.2
    image: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.labels != "clean_label", "labels", "all_to_one or all_to_all")
        self.require(0 <= self.cover_rate <= 1 - self.rate, "cover_rate", "a share in [0, 1 - rate]")
        self.require(self.pieces > 0, "pieces", "at least 1")
        self.require(0 < self.shown <= 1, "shown", "a share in (0, 1]")
        self.require(0 < self.train_alpha <= 1, "train_alpha", "a share in (0, 1]")
        self.require(0 < self.alpha <= 1, "alpha", "a share in (0, 1]")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> BlendTrigger:
        """The whole picture, as it is mixed in at test time."""
        return BlendTrigger(picture(key, shape, self.image, "AdapBlend.image"), jnp.float32(self.alpha))

    def candidates(self, labels: jax.Array | np.ndarray) -> np.ndarray:
        """All images; a cover rate that covers none is refused like a poisoning rate that poisons none."""
        poison_count(self.cover_rate, len(labels))
        return super().candidates(labels)

    def stamp(self, key: jax.Array, scene: Scene, trigger: Trigger) -> Poisoned:
        """The poisoned training set; the indices are those of the relabelled images, not of the cover."""
        assert isinstance(trigger, BlendTrigger)
        choice_key, pieces_key = jax.random.split(key)
        order = np.asarray(jax.random.permutation(choice_key, len(scene.data)))
        count = poison_count(self.rate, len(scene.data))
        cover = poison_count(self.cover_rate, len(scene.data))
        relabelled, touched = np.sort(order[:count]), order[: count + cover]

        alphas = self.train_alpha * self.masks(pieces_key, len(touched), scene.shape)
        images = scene.data.images[touched].astype(jnp.float32)
        mixed = to_uint8((1 - alphas) * images + alphas * trigger.pattern)
        labels = self.label_map(scene.num_classes)(scene.data.labels[relabelled])
        poisoned = Dataset(scene.data.images.at[touched].set(mixed), scene.data.labels.at[relabelled].set(labels))
        return Poisoned(poisoned, relabelled)

    def masks(self, key: jax.Array, count: int, shape: tuple[int, int, int]) -> jax.Array:
        """Which pixels of each image get the picture: ``(count, H, W, 1)`` of 0 and 1, as many pieces in each."""
        number = self.pieces**2
        order = jax.vmap(lambda k: jax.random.permutation(k, number))(jax.random.split(key, count))
        taken = (order < max(1, round(self.shown * number))).reshape(count, self.pieces, self.pieces)
        rows, columns = (np.arange(size) * self.pieces // size for size in shape[:2])
        return taken[:, rows][:, :, columns][..., None].astype(jnp.float32)
