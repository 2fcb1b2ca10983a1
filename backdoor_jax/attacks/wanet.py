r"""WaNet (Nguyen & Tran, ICLR 2021, arXiv 2102.10369): a smooth warp as trigger, learnt in contrast to noisy warps.

A grid of k x k displacements, uniform in [-1, 1] and scaled to mean absolute value 1, is enlarged to the image
(bicubic) and moves every pixel's place by s / H of the half-width of the image. In every batch a share r is warped and
relabelled; another share, ``cross_ratio`` times as large, is warped by a grid with noise on it and keeps its labels, so
that the model learns this warp and no other.

>>> import jax, jax.numpy as jnp
>>> trigger = WaNet().trigger(jax.random.key(0), (32, 32, 3))
>>> trigger(jnp.full((2, 32, 32, 3), 9, jnp.uint8)).shape
(2, 32, 32, 3)
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.attacks.base import Attack, Planted, Scene
from backdoor_jax.data import Dataset, LabelMap, bilinear_sample, pixel_grid, random_crop, random_flip, rotate
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Constants, Info, SupervisedLoss, train


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WarpTrigger:
    """Reads every pixel from another place.

    Attributes:
        places: float32 ``(H, W, 2)``: row and column to read from.
    """

    places: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)``, warped and rounded."""
        return jnp.round(bilinear_sample(images, self.places)).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class WaNet(Attack):
    """A smooth warp, with noise mode. Trains the victim itself, since warps are drawn anew in every batch.

    Deviations from the published benchmark: the warped share of a batch is drawn, its expectation being r of the
    batch, where the benchmark takes int(r * 128) images; warped images are rounded to uint8 before they are cropped and
    turned; crops and angles are drawn for each image, where the benchmark draws them, and whether there are any, once
    for a batch; a turned image is read bilinearly between pixels, where the benchmark takes the nearest; the learning
    rate falls by a cosine as for every other victim, where the benchmark keeps it constant.

    Attributes:
        grid: displacements along each side, k; published 4.
        strength: s; published 0.5.
        cross_ratio: images warped with noise for each poisoned one; published 2.
        crop: zeros padded before the random crop, which four images in five get (published: batches); published 5. It
            stands for the training's own crop.
        rotation: degrees either way, which half of the images (published: of the batches) get; published 10.
    """

    grid: int = 4
    strength: float = 0.5
    cross_ratio: float = 2.0
    crop: int = 5
    rotation: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.labels != "clean_label", "labels", "all_to_one or all_to_all")
        self.require(self.grid > 1, "grid", "at least 2")
        self.require(self.strength > 0, "strength", "a positive number")
        self.require_shares(self.cross_ratio)
        self.require(self.crop >= 0, "crop", "0 or more pixels")
        self.require(self.rotation >= 0, "rotation", "0 or more degrees")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> WarpTrigger:
        """The warp for images of this shape."""
        height, width, _ = shape
        noise = jax.random.uniform(key, (self.grid, self.grid, 2), minval=-1, maxval=1)
        noise = noise / jnp.mean(jnp.abs(noise))
        field = jnp.einsum("hp,wq,pqd->hwd", _cubic(height, self.grid), _cubic(width, self.grid), noise)
        return WarpTrigger(_keep_inside(pixel_grid(height, width) + self.strength * field * _unit(shape), shape))

    def plant(
        self,
        key: jax.Array,
        train_key: jax.Array,
        scene: Scene,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Planted:
        """See `Attack.plant`; the training set a defender would find has the warp on a fixed share, and no noise."""
        trigger_key, choice_key = jax.random.split(key)
        trigger = self.trigger(trigger_key, scene.shape)
        poisoned = self.stamp(choice_key, scene, trigger)
        loss = WarpLoss(scene.classifier, self.label_map(scene.num_classes), self.crop, scene.flip)
        variables, _ = train(
            train_key,
            scene.classifier,
            scene.data,
            scene.training,
            loss=loss,
            constants={
                "warp": trigger.places,
                "rate": jnp.float32(self.rate),
                "cross": jnp.float32(self.rate * self.cross_ratio),
                "rotation": jnp.float32(np.deg2rad(self.rotation)),
            },
            name=name,
            checkpoints=checkpoints,
        )
        return Planted(variables, trigger, poisoned, {})


@dataclasses.dataclass(frozen=True)
class WarpLoss:
    """Cross-entropy of a batch of which a share is warped and relabelled, and another warped with noise."""

    classifier: Classifier
    label_map: LabelMap
    crop: int
    flip: bool

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        choice_key, noise_key, crop_key, turn_key, flip_key = jax.random.split(key, 5)
        shape, count = batch.images.shape[1:], len(batch)
        drawn = jax.random.uniform(choice_key, (count,))
        poisoned = drawn < constants["rate"]
        noisy = (drawn >= constants["rate"]) & (drawn < constants["rate"] + constants["cross"])

        noise = jax.random.uniform(noise_key, (count, *shape[:2], 2), minval=-1, maxval=1) * _unit(shape)
        warped = jnp.where(_each(poisoned), constants["warp"], pixel_grid(*shape[:2]))
        places = jnp.where(_each(noisy), _keep_inside(constants["warp"] + noise, shape), warped)
        images = jnp.round(bilinear_sample(batch.images, places)).astype(jnp.uint8)
        labels = jnp.where(poisoned, self.label_map(batch.labels), batch.labels)

        crop_key, crop_share_key = jax.random.split(crop_key)
        cropped = jax.random.bernoulli(crop_share_key, 0.8, (count,))
        images = jnp.where(_each(cropped), random_crop(crop_key, images, self.crop), images)
        turn_key, turn_share_key = jax.random.split(turn_key)
        turned = jax.random.bernoulli(turn_share_key, 0.5, (count,))
        angles = constants["rotation"] * jax.random.uniform(turn_key, (count,), minval=-1, maxval=1)
        images = rotate(images, jnp.where(turned, angles, 0.0))
        if self.flip:
            images = random_flip(flip_key, images)
        return SupervisedLoss(self.classifier)(variables, Dataset(images, labels), key, constants)


def _each(mask: jax.Array) -> jax.Array:
    return mask[:, None, None, None]


def _unit(shape: tuple[int, ...]) -> jax.Array:
    """Pixels in 1 / H where the image spans -1 to 1 from centre to centre of its outer pixels: of rows, of columns."""
    return jnp.array([(shape[0] - 1) / 2, (shape[1] - 1) / 2]) / shape[0]


def _keep_inside(places: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.clip(places, 0, jnp.array([shape[0] - 1, shape[1] - 1], jnp.float32))


def _cubic(size: int, coarse: int) -> np.ndarray:
    """Cubic interpolation between aligned corners, a matrix ``(size, coarse)``; PyTorch's -0.75, ends clamped."""
    a = -0.75
    matrix = np.zeros((size, coarse), np.float32)
    for row in range(size):
        place = row * (coarse - 1) / max(size - 1, 1)
        left = int(np.floor(place))
        for tap in range(left - 1, left + 3):
            t = abs(place - tap)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[row, min(max(tap, 0), coarse - 1)] += near if t <= 1 else far if t < 2 else 0
    return matrix
