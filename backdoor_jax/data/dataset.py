"""`Dataset`, images and labels on the device; `Task` and `DatasetSpec`, what experiments know of one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.compiling import one_program
from backdoor_jax.config import MOST_CLASSES, is_whole
from backdoor_jax.errors import UserError, first_line


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labeled images on the device; a pytree.

    Attributes:
        images: uint8 ``(N, H, W, channels)``, 0 to 255.
        labels: int32 ``(N,)``, from 0.
    """

    images: jax.Array
    labels: jax.Array

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, indices: jax.Array | np.ndarray | slice) -> "Dataset":
        """The images and labels at ``indices``, in that order.

        Raises:
            UserError: for indices of no image; inside compiled code JAX takes the nearest one instead.
        """
        if isinstance(indices, slice):
            return Dataset(self.images[indices], self.labels[indices])
        if not isinstance(indices, np.ndarray | jax.Array) or indices.ndim != 1:
            raise UserError("take: indices are no array (N,); give whole numbers, as in numpy.arange(10), or a slice")
        if indices.dtype == bool and len(indices) == len(self):
            return Dataset(self.images[indices], self.labels[indices])
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise UserError(f"take: indices are {indices.dtype}, expected whole numbers, or a bool for each image")
        if not isinstance(indices, jax.core.Tracer) and len(indices):
            least, largest = int(indices.min()), int(indices.max())
            if least < -len(self) or largest >= len(self):
                raise UserError(f"take: indices run from {least} to {largest}, expected those of {len(self)} images")
        return _taken(self, indices)


@one_program
def _taken(data: Dataset, indices: jax.Array) -> Dataset:
    return Dataset(data.images[indices], data.labels[indices])


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set as an experiment uses it.

    Attributes:
        name: what it is called in results.
        train: images to train on.
        test: images to evaluate on; nothing is chosen by them.
        num_classes: the number of classes C.
        normalization: the name of the input normalization, from `backdoor_jax.models.NORMALIZATIONS`.
        flip: whether a mirrored image keeps its class, so that training may mirror images.
        left_out: images from the same source as `train` that nothing trains on, where only some of them are used.
        class_names: names of the classes, where the source has some.
        notes: what was passed over or converted, one line each.
    """

    name: str
    train: Dataset
    test: Dataset
    num_classes: int
    normalization: str = "none"
    flip: bool = False
    left_out: Dataset | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


class Splits(NamedTuple):
    """Images to train on, images to evaluate on, the number of classes C and, where they have some, their names."""

    train: Dataset
    test: Dataset
    num_classes: int
    class_names: tuple[str, ...] | None = None


Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The record of a data set: everything the package knows about it.

    A subclass says in `read` how a kind of data set is read; `backdoor_jax.data.specs` has one record for each.

    Attributes:
        name: what it is called in results; its normalization has the same name.
        summary: one line about it.
        normalization: its published normalization; None leaves pixels in [0, 1] as they are.
        flip: whether a mirrored image keeps its class, so that training may mirror images.
    """

    name: str
    summary: str = ""
    normalization: Normalization | None = None
    flip: bool = False

    @property
    def source(self) -> str:
        """What `load` calls it."""
        return self.name

    def read(self) -> Splits:
        """The images and labels.

        Raises:
            UserError: where they are not there or cannot be read.
        """
        raise NotImplementedError

    def load(self) -> Task:
        """The data set as a task.

        Raises:
            UserError: where it is not there or cannot be read.
        """
        train, test, num_classes, class_names = self.read()
        normalization = self.name if self.normalization else "none"
        return Task(self.name, train, test, num_classes, normalization, self.flip, class_names=class_names)


def make_dataset(
    images: np.ndarray, labels: np.ndarray, num_classes: int | None = None, where: str = "data"
) -> Dataset:
    """Checks arrays and puts them on the device.

    Args:
        images: uint8 ``(N, H, W, channels)``.
        labels: integers ``(N,)`` from 0.
        num_classes: the number of classes C, which labels must be below; not checked by default.
        where: what errors call the arrays.

    Raises:
        UserError: for a wrong dtype or shape, an empty set, or labels out of range.

    Example:
        >>> len(make_dataset(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), 4))
        4
    """
    if num_classes is not None and not is_whole(num_classes):
        raise UserError(f"{where}: num_classes is {num_classes!r}, expected a whole number, such as 10")
    images, labels = (_array(values, f"{where}: {name}") for name, values in (("images", images), ("labels", labels)))
    if images.dtype != np.uint8:
        raise UserError(
            f"{where}: images are {images.dtype}, expected uint8 from 0 to 255; multiply values in [0, 1] by 255 and "
            "cast with .astype('uint8')"
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:3]:
        raise UserError(
            f"{where}: images have shape {images.shape}, expected (N, height, width, 1 or 3); "
            "transpose(0, 2, 3, 1) where channels come first"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{where}: labels are {labels.dtype} {labels.shape}, expected integers of shape {images.shape[:1]}, one "
            "for each image"
        )
    if not len(labels):
        raise UserError(f"{where}: there are no images")
    if labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes):
        raise UserError(
            f"{where}: labels run from {labels.min()} to {labels.max()}, expected 0 to "
            f"{'C' if num_classes is None else num_classes} - 1; relabel from 0 or give the right number of classes"
        )
    if num_classes is not None and num_classes > MOST_CLASSES:
        raise UserError(f"{where}: has {num_classes} classes, at most {MOST_CLASSES} are possible; check the labels")
    return Dataset(jnp.asarray(images), jnp.asarray(labels.astype(np.int32)))


def _array(values: Any, where: str) -> np.ndarray:
    """Values as an array, those of PyTorch's tensors included."""
    try:
        return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except Exception as error:  # NumPy and PyTorch raise many types.
        raise UserError(f"{where} make no array ({first_line(error)}); give one array of all of them") from error


@typed
def clean_indices(
    key: jax.Array, labels: jax.Array | np.ndarray, ratio: float, num_classes: int, stratified: bool = False
) -> np.ndarray:
    """Draws the share of a clean set that a defender has.

    Args:
        key: a `jax.random` key.
        labels: ``(N,)``.
        ratio: in (0, 1]; round(ratio * N) images are drawn.
        num_classes: the number of classes C.
        stratified: draw round(ratio * N_c) images, at least one, of each class instead. The published benchmark does
            not.

    Returns:
        Sorted indices into ``labels``.

    Raises:
        UserError: for a ratio outside (0, 1], one that leaves no image, or a class without images when stratified.

    Example:
        >>> clean_indices(jax.random.key(0), np.arange(100) % 10, 0.1, 10, stratified=True).shape
        (10,)
    """
    if not 0 < ratio <= 1:
        raise UserError(f"clean ratio is {ratio}, expected a share in (0, 1], such as 0.05")
    labels = np.asarray(labels)
    order = np.asarray(jax.random.permutation(key, len(labels)))
    if not stratified:
        count = round(ratio * len(labels))
        if not count:
            raise UserError(
                f"clean ratio {ratio} of {len(labels)} images leaves none; take at least {1 / len(labels):.2g}"
            )
        return np.sort(order[:count])
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise UserError(
            f"class {int(np.argmin(counts))} has no images, so a stratified subset cannot be drawn; set "
            "stratified to false"
        )
    taken = [order[labels[order] == c][: max(1, round(ratio * counts[c]))] for c in range(num_classes)]
    return np.sort(np.concatenate(taken))
