"""`load`, the one entry for every source: the embedded sets, plain .npz files, and TFDS data sets."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.array_files import read_npz
from backdoor_jax.config import Count, Seed
from backdoor_jax.data.dataset import Dataset, Task, make_dataset
from backdoor_jax.data.folders import inner_folder, read_folder, splits_of
from backdoor_jax.data.specs import DATASETS, Signs
from backdoor_jax.data.tfds_sets import TFDSSet
from backdoor_jax.errors import UserError
from backdoor_jax.reading import as_path

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@typed
def load(
    source: str,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: Seed = 0,
    root: Path = Path(),
    image_size: Count | None = None,
) -> Task:
    """Loads a data set.

    Args:
        source: ``signs``, ``digits``, the path of a ``.npz`` file or of a folder of class folders (relative to `root`),
            or ``tfds:NAME``; see `SOURCES`.
        train_size: keep that many training images, drawn with `seed`, and the others as `left_out`; all by default.
        test_size: keep that many test images, drawn with `seed`; all by default.
        seed: of the draw.
        root: where relative paths start.
        image_size: of a folder: side in pixels to which images are resized; by default they need one size.

    Raises:
        UserError: for an unknown source, a missing or foreign file, or a size larger than the number of images.

    Example:
        >>> load("digits").num_classes
        10
    """
    source = str(as_path(source, "load: source"))
    if source in DATASETS:
        task = DATASETS[source].load()
    elif source.startswith("tfds:"):
        task = TFDSSet(name=source.removeprefix("tfds:")).load()
    elif source.lower().endswith(".npz"):
        task = npz_task(root / source)
    elif os.path.isdir(root / source):
        task = folder_task(root / source, image_size, seed)
    else:
        raise UserError(
            f"unknown data {source!r}; give 'signs', 'digits', the path of a .npz file or of a folder of class folders,"
            " or 'tfds:NAME'"
        )
    if image_size is not None and not os.path.isdir(root / source):
        raise UserError(f"{source}: image_size is for a folder of images; leave it out")
    generator = np.random.default_rng(seed)

    def drawn(part: str, size: int) -> tuple[Dataset, Dataset | None]:
        data: Dataset = getattr(task, part)
        if not 0 < size <= len(data):
            raise UserError(f"{source}: {size} {part} images were asked for, there are {len(data)}; lower {part}_size")
        kept, rest = np.split(generator.permutation(len(data)), [size])
        return data.take(np.sort(kept)), data.take(np.sort(rest)) if len(rest) else None

    if train_size is not None:
        train, left_out = drawn("train", train_size)
        task = dataclasses.replace(task, train=train, left_out=left_out)
    if test_size is not None:
        task = dataclasses.replace(task, test=drawn("test", test_size)[0])
    return task


def digits() -> Task:
    """scikit-learn's 1,797 handwritten digits, as 16x16 RGB images: 1,400 to train on, 397 to test on.

    Example:
        >>> digits().train.images.shape
        (1400, 16, 16, 3)
    """
    return DATASETS["digits"].load()


def signs(key: jax.Array | None = None) -> Task:
    """Synthetic traffic signs, drawn in seconds: 6,000 images of 16 classes to train on, 2,000 to test on.

    They are 32x32 in color; see `backdoor_jax.data.traffic_signs`. Results on them say nothing about photographs.

    Args:
        key: a `jax.random` key, of which everything random is made; by default ``jax.random.key(0)``, as in
            ``load("signs")``.

    Example:
        >>> task = signs()
        >>> task.train.images.shape, task.class_names[:2]
        ((6000, 32, 32, 3), ('limit 30', 'limit 50'))
    """
    return Signs(name="signs", key=key).load()


TEST_SHARE = 0.2
"""The share of a folder without splits that is drawn to evaluate on."""


@typed
def folder_task(path: Path, image_size: Count | None = None, seed: Seed = 0) -> Task:
    """Reads a folder of class folders, or one with ``train`` and ``test`` (or ``val``) in which these lie.

    Without splits a fifth of the images is drawn to evaluate on.

    Args:
        path: the folder.
        image_size: side in pixels to which images are resized; by default they need one size.
        seed: of the draw.

    Raises:
        UserError: where images cannot be read, have several sizes, or the splits have other classes.
    """
    size = None if image_size is None else (image_size, image_size)
    name = path.name
    path, outer = inner_folder(path)
    splits = splits_of(path)
    if splits is not None:
        known = read_folder(path / splits[0], size=size)
        other = read_folder(path / splits[1], size=size, class_names=known.classes)
        parts = [(known.images, known.labels), (other.images, other.labels)]
        notes = (*known.notes, *other.notes)
    else:
        known = read_folder(path, size=size)
        notes = known.notes
        order = np.random.default_rng(seed).permutation(len(known.labels))
        count = max(1, round(TEST_SHARE * len(order)))
        parts = [(known.images[at], known.labels[at]) for at in (np.sort(order[count:]), np.sort(order[:count]))]
    classes = len(known.classes)
    train_data, test_data = (make_dataset(images, labels, classes, str(path)) for images, labels in parts)
    if train_data.images.shape[1:] != test_data.images.shape[1:]:
        raise UserError(f"{path}: images to train and to test on have several sizes; give image_size")
    return Task(name, train_data, test_data, classes, class_names=known.classes, notes=(*outer, *notes))


@typed
def npz_task(path: Path) -> Task:
    """Reads ``train_images, train_labels, test_images, test_labels`` from a plain ``.npz``.

    Optional entries: ``class_names`` (their number is C, by default the largest label + 1), ``normalization`` (a name)
    and ``flip`` (whether training may mirror images).

    Raises:
        UserError: where there is no such file, or it holds something else.
    """
    arrays = read_npz(path, ", ".join(NPZ_KEYS))
    missing = [key for key in NPZ_KEYS if key not in arrays]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; it must hold {', '.join(NPZ_KEYS)}")
    names = None
    if "class_names" in arrays:
        if arrays["class_names"].ndim != 1:
            shape = arrays["class_names"].shape
            raise UserError(f"{path}: class_names has shape {shape}, expected one name for each class")
        names = tuple(map(str, arrays["class_names"]))
        classes = len(names)
    else:
        labels = [
            arrays[key] for key in ("train_labels", "test_labels") if np.issubdtype(arrays[key].dtype, np.integer)
        ]
        classes = int(max((part.max(initial=0) for part in labels), default=0)) + 1
    for key, kind, expected in (("normalization", "U", "a name"), ("flip", "b", "True or False")):
        if key in arrays and (arrays[key].ndim or arrays[key].dtype.kind != kind):
            found = arrays[key]
            raise UserError(f"{path}: {key} is {found.dtype} of shape {found.shape}, expected {expected}")
    train, test = (
        make_dataset(arrays[f"{part}_images"], arrays[f"{part}_labels"], classes, f"{path} {part}")
        for part in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = ("x".join(map(str, part.images.shape[1:])) for part in (train, test))
        raise UserError("{}: images to train on are {}, those to test on {}; give one shape".format(path, *shapes))
    return Task(
        path.stem,
        train,
        test,
        classes,
        str(arrays.get("normalization", "none")),
        bool(arrays.get("flip", False)),
        class_names=names,
    )
