"""Poisoning a training set: which images get the trigger, and which labels they get."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.compiling import one_program
from backdoor_jax.config import is_whole
from backdoor_jax.data.dataset import Dataset
from backdoor_jax.errors import UserError, first_line

CHUNK = 500
"""Images that a trigger receives at once."""

Trigger = Callable[[jax.Array], jax.Array]
"""uint8 images ``(B, H, W, channels)`` to triggered uint8 images of the same shape, on the device; a pytree."""


def is_plain(trigger: Trigger) -> bool:
    """Whether a trigger is a plain function, which compiled code does not take as an argument."""
    return jax.tree_util.all_leaves([trigger])


def triggered(trigger: Trigger, images: jax.Array) -> jax.Array:
    """The images with the trigger, in chunks: a trigger may be a network, whose memory grows with them.

    Raises:
        UserError: where the trigger makes anything but uint8 images of the same shape.

    Example:
        >>> triggered(lambda images: images / 255, jnp.zeros((2, 8, 8, 3), jnp.uint8))
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: trigger makes float32 (2, 8, 8, 3) of uint8 (2, 8, 8, 3), expected uint8 images
        of the same shape
    """
    parts = [apply_trigger(trigger, images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
    return jnp.concatenate(parts)


def apply_trigger(trigger: Trigger, images: jax.Array) -> jax.Array:
    """The images of one batch with the trigger, checked; see `triggered`."""
    try:
        made = trigger(images)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(
            f"trigger cannot be applied to uint8 {images.shape} ({first_line(error)}); give a function of such images"
        ) from error
    found = f"{getattr(made, 'dtype', type(made).__name__)} {getattr(made, 'shape', '')}".rstrip()
    if found != f"uint8 {images.shape}":
        raise UserError(f"trigger makes {found} of uint8 {images.shape}, expected uint8 images of the same shape")
    return made


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LabelMap:
    """What the attacker turns labels into.

    Attributes:
        kind: ``all_to_one`` maps every label to `target`; ``all_to_all`` maps y to (y + 1) mod C.
        num_classes: the number of classes C.
        target: the target class of ``all_to_one``.

    Example:
        >>> LabelMap("all_to_all", 3)(jnp.arange(3)).tolist()
        [1, 2, 0]
    """

    kind: Literal["all_to_one", "all_to_all"]
    num_classes: int
    target: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("all_to_one", "all_to_all"):
            raise UserError(f"label map {self.kind!r} is not known; give 'all_to_one' or 'all_to_all'")
        for name in ("num_classes", "target"):
            if not is_whole(getattr(self, name)):
                raise UserError(f"LabelMap.{name} is {getattr(self, name)!r}, expected a whole number, such as 3")
        if not 0 <= self.target < self.num_classes:
            raise UserError(
                f"target class {self.target} does not exist; the data have classes 0 to {self.num_classes - 1}"
            )

    def __call__(self, labels: jax.Array) -> jax.Array:
        """The attacker's labels ``(B,)`` for images with these true labels."""
        if self.kind == "all_to_all":
            return (labels + 1) % self.num_classes
        return jnp.full_like(labels, self.target)


class Poisoned(NamedTuple):
    """A poisoned training set.

    Attributes:
        data: all images in their original order, the poisoned ones triggered and relabeled.
        indices: which ones are poisoned, sorted; the ground truth that no defense sees.
    """

    data: Dataset
    indices: np.ndarray


@typed
def poison_count(rate: float, images: int) -> int:
    """How many of the training images a rate poisons.

    Raises:
        UserError: for a rate outside [0, 1], or one above 0 that poisons none.

    Example:
        >>> poison_count(0.1, 1400)
        140
    """
    if not 0 <= rate <= 1:
        raise UserError(f"poisoning rate is {rate}, expected a share in [0, 1], such as 0.1")
    count = round(rate * images)
    if rate and not count:
        raise UserError(f"poisoning rate {rate} of {images} images poisons none; give at least {1 / images:.2g}")
    return count


@typed
def draw_poisoned(key: jax.Array, rate: float, images: int, candidates: np.ndarray | None = None) -> np.ndarray:
    """Draws which images to poison: round(rate * images) candidates, uniformly without replacement.

    Returns:
        Sorted indices.

    Example:
        >>> draw_poisoned(jax.random.key(0), 0.5, 4, np.array([1, 2])).tolist()
        [1, 2]
    """
    candidates = np.arange(images) if candidates is None else candidates
    order = np.asarray(jax.random.permutation(key, len(candidates)))
    return np.sort(candidates[order[: poison_count(rate, images)]])


@typed
def poison(
    key: jax.Array,
    data: Dataset,
    trigger: Trigger,
    labels: LabelMap,
    rate: float,
    candidates: np.ndarray | None = None,
) -> Poisoned:
    """Puts the trigger on a share of the training images and relabels them.

    As in the published benchmark: round(rate * N) images are drawn uniformly without replacement from all classes, the
    target included, and the trigger is put on uint8 pixels before any augmentation.

    Args:
        key: a `jax.random` key.
        data: the clean training set.
        trigger: uint8 images to uint8 images.
        labels: the attacker's label map.
        rate: poisoned share of all images, in [0, 1].
        candidates: indices of the images to draw from; all by default.

    Raises:
        UserError: for a rate outside [0, 1].

    Example:
        >>> from backdoor_jax.data import digits
        >>> white = lambda images: images.at[:, -3:, -3:].set(255)
        >>> poisoned = poison(jax.random.key(0), digits().train, white, LabelMap("all_to_one", 10), rate=0.1)
        >>> len(poisoned.indices)
        140
    """
    indices = draw_poisoned(key, rate, len(data), candidates)
    if not len(indices):
        return Poisoned(data, indices)
    chosen = data.take(indices)
    return Poisoned(_replaced(data, indices, triggered(trigger, chosen.images), labels(chosen.labels)), indices)


@one_program
def _replaced(data: Dataset, indices: jax.Array, images: jax.Array, labels: jax.Array) -> Dataset:
    return Dataset(data.images.at[indices].set(images), data.labels.at[indices].set(labels))
