r"""WaNet (Nguyen & Tran, ICLR 2021, arXiv 2102.10369): a smooth warp as trigger, trained in contrast to noisy warps.

A grid of k x k displacements, uniform in [-1, 1] and scaled to mean absolute value 1, is enlarged to the image
(bicubic). It moves every pixel's place by s / H of the half-width of the image. In every batch a share r is warped and
relabeled. Another share, ``cross_ratio`` times as large, is warped with noise on the displacements and keeps its
labels, so that the model reacts to this warp and no other.

>>> import jax, jax.numpy as jnp
>>> trigger = WaNet().trigger(jax.random.key(0), (32, 32, 3))
>>> trigger(jnp.full((2, 32, 32, 3), 9, jnp.uint8)).shape
(2, 32, 32, 3)
"""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jax.tree_util import Partial

from backdoor_jax.attacks.base import Attack, AttackContext, Victim
from backdoor_jax.config import Config, Fraction, NonNegative, Positive, Share, Whole
from backdoor_jax.data import Dataset, LabelMap, bilinear_sample, pixel_grid, random_crop, random_flip, rotate
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import LossResult, supervised_loss, train


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WarpTrigger:
    """Reads every pixel from another place.

    Attributes:
        places: float32 ``(H, W, 2)``, the row and column to read each pixel from.
    """

    places: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 images ``(B, H, W, channels)``, warped and rounded."""
        return jnp.round(bilinear_sample(images, self.places)).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class WaNet(Attack):
    """A smooth warp as trigger, with noise mode. Trains the victim itself, since every batch is warped in a new way.

    Deviations from the published benchmark: the number of warped images in a batch is random, with expectation r times
    the batch, where the benchmark takes int(r * 128) images; warped images are rounded to uint8 before they are cropped
    and rotated; crops and angles, and whether there are any, are drawn for each image, where the benchmark draws them
    once for a batch; a rotated image is interpolated bilinearly, where the benchmark takes the nearest pixel; the
    learning rate is annealed by a cosine, as for every other victim, where the benchmark keeps it constant; what a crop
    or a rotation brings in is black. A defender's poisoned training set has no images warped with noise, which the
    benchmark saves with it.

    Attributes:
        labels: ``all_to_one`` or ``all_to_all``.
        grid: displacements along each side, k; published 4.
        strength: s; published 0.5.
        cross_ratio: images warped with noise for each poisoned one; published 2.
        crop: zeros padded before the random crop, which four images in five get (published: batches); published 5. It
            replaces the training's own crop.
        rotation: the largest angle in degrees, in either direction, by which half of the images (published: of the
            batches) are rotated; published 10.
    """

    name: ClassVar[str] = "wanet"
    trains_victim: ClassVar[bool] = True

    labels: Literal["all_to_one", "all_to_all"] = "all_to_one"
    grid: Annotated[int, Ge(2)] = 4
    strength: Positive = 0.5
    cross_ratio: NonNegative = 2.0
    crop: Whole = 5
    rotation: NonNegative = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_shares(self.cross_ratio)

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> WarpTrigger:
        """The warp for images of this shape."""
        height, width, _ = shape
        noise = jax.random.uniform(key, (self.grid, self.grid, 2), minval=-1, maxval=1)
        noise = noise / jnp.mean(jnp.abs(noise))
        field = jnp.einsum("hp,wq,pqd->hwd", _cubic(height, self.grid), _cubic(width, self.grid), noise)
        return WarpTrigger(_keep_inside(pixel_grid(height, width) + self.strength * field * _unit(shape), shape))

    def train_victim_in(
        self,
        context: AttackContext,
        key: jax.Array,
        train_key: jax.Array,
        *,
        name: str = "victim",
        checkpoints: Path | None = None,
    ) -> Victim:
        """Trains a victim on the clean images, of which `warp_loss` warps other ones in every step.

        The training set that a defender would find has the warp on a fixed share of the images, and no noise.

        Args:
            context: the network, the data and the training settings.
            key: for the warp and for the choice of images.
            train_key: for the initial weights, the order of images, the choice of warped ones and augmentation.
            name: what progress and errors call the run.
            checkpoints: a folder for checkpoints of the training; a killed run resumes from there.

        Raises:
            UserError: for a target or rate that the data do not allow.
            NonFiniteError: if the training diverges.
        """
        trigger_key, choice_key = jax.random.split(key)
        trigger = self.trigger(trigger_key, context.shape)
        poisoned = self.poison_data(choice_key, context, trigger)
        mixture = WarpMixture(
            warped=self.rate,
            noisy=self.rate * self.cross_ratio,
            crop=self.crop,
            rotation=float(np.deg2rad(self.rotation)),
            flip=context.flip,
        )
        trained = train(
            train_key,
            context.classifier,
            context.data,
            context.training,
            loss=Partial(warp_loss, context.classifier, mixture, self.label_map(context.num_classes), trigger),
            name=name,
            checkpoints=checkpoints,
        )
        return Victim(trained.variables, trigger, poisoned, {})


@dataclasses.dataclass(frozen=True)
class WarpMixture(Config):
    """What `warp_loss` does to a batch.

    Attributes:
        warped: share of the images that are warped and relabeled.
        noisy: share of the images that are warped with noise and keep their labels.
        crop: zeros padded before the random crop.
        rotation: the largest angle, in radians.
        flip: mirror half of the images.
    """

    warped: Share = 0.1
    noisy: Fraction = 0.2
    crop: Whole = 5
    rotation: NonNegative = 0.0
    flip: bool = False


def warp_loss(
    classifier: Classifier,
    mixture: WarpMixture,
    label_map: LabelMap,
    trigger: WarpTrigger,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """Mean cross-entropy of a batch with warped, relabeled images and with images warped with noise.

    Args:
        classifier: the network.
        mixture: the shares of these images, and the augmentation.
        label_map: gives the labels of the warped images.
        trigger: the warp.
        variables: the model's variables.
        batch: clean uint8 images ``(B, H, W, channels)`` and labels ``(B,)``.
        key: for the choice of images, the noise and augmentation.
    """
    choice_key, noise_key, crop_key, turn_key, flip_key = jax.random.split(key, 5)
    shape, count = batch.images.shape[1:], len(batch)
    drawn = jax.random.uniform(choice_key, (count,))
    poisoned = drawn < mixture.warped
    noisy = (drawn >= mixture.warped) & (drawn < mixture.warped + mixture.noisy)

    noise = jax.random.uniform(noise_key, (count, *shape[:2], 2), minval=-1, maxval=1) * _unit(shape)
    warped = jnp.where(_each(poisoned), trigger.places, pixel_grid(*shape[:2]))
    places = jnp.where(_each(noisy), _keep_inside(trigger.places + noise, shape), warped)
    images = jnp.round(bilinear_sample(batch.images, places)).astype(jnp.uint8)
    labels = jnp.where(poisoned, label_map(batch.labels), batch.labels)

    crop_key, crop_share_key = jax.random.split(crop_key)
    cropped = jax.random.bernoulli(crop_share_key, 0.8, (count,))
    images = jnp.where(_each(cropped), random_crop(crop_key, images, mixture.crop), images)
    turn_key, turn_share_key = jax.random.split(turn_key)
    turned = jax.random.bernoulli(turn_share_key, 0.5, (count,))
    angles = mixture.rotation * jax.random.uniform(turn_key, (count,), minval=-1, maxval=1)
    images = rotate(images, jnp.where(turned, angles, 0.0))
    if mixture.flip:
        images = random_flip(flip_key, images)
    return supervised_loss(classifier, variables, Dataset(images, labels), key)


def _each(mask: jax.Array) -> jax.Array:
    """A mask over images ``(B,)`` that broadcasts against their pixels."""
    return mask[:, None, None, None]


def _unit(shape: tuple[int, ...]) -> jax.Array:
    """1 / H in pixels, of rows and of columns, if the centers of the outermost pixels lie at -1 and 1."""
    return jnp.array([(shape[0] - 1) / 2, (shape[1] - 1) / 2]) / shape[0]


def _keep_inside(places: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Places moved to the nearest ones inside the image."""
    return jnp.clip(places, 0, jnp.array([shape[0] - 1, shape[1] - 1], jnp.float32))


def _cubic(size: int, coarse: int) -> np.ndarray:
    """Cubic interpolation with aligned corners, as a matrix ``(size, coarse)``; PyTorch's: a = -0.75, ends clamped."""
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
