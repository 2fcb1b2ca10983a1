"""Labeled images in any form: a ``.npz``, a folder of class folders, or a data set by name."""

import dataclasses
import os
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.array_files import read_npz
from backdoor_jax.config import Count
from backdoor_jax.data.dataset import Dataset, make_dataset
from backdoor_jax.data.folders import STRETCHED, SUFFIXES, class_folders, inner_folder, read_folder, resized, splits_of
from backdoor_jax.data.layouts import as_images, as_labels
from backdoor_jax.data.loading import load
from backdoor_jax.data.specs import DATASETS
from backdoor_jax.errors import LONGEST, UserError, printable
from backdoor_jax.reading import as_path, file_size, image_pixels

PARTS = {
    "": (("images", "labels"), ("x", "y"), ("X", "Y"), ("X", "y"), ("data", "labels"), ("arr_0", "arr_1")),
    "train_": (("train_images", "train_labels"), ("x_train", "y_train"), ("X_train", "y_train")),
    "test_": (("test_images", "test_labels"), ("x_test", "y_test"), ("X_test", "y_test"), ("val_images", "val_labels")),
}
"""The names of images and labels in a ``.npz``: of all of them, those to work with, and those to evaluate on."""

LARGEST = 10_000
"""Pixels to which images are resized at most."""


class Labeled(NamedTuple):
    """Labeled images.

    Attributes:
        data: the images to work with.
        test: separate images to evaluate on, where the source has some.
        class_names: names of the classes, where the source has some, as they are printed.
        files: of the images in `data`, where they come from a folder, as they are printed.
        notes: what was passed over or converted, one line each.
    """

    data: Dataset
    test: Dataset | None = None
    class_names: tuple[str, ...] | None = None
    files: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@typed
def load_labeled(
    source: str,
    num_classes: int,
    channels: int = 3,
    *,
    size: tuple[Count, Count] | None = None,
    resize: int | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Labeled:
    """Reads labeled images.

    - ``FILE.npz`` with ``images`` and ``labels``: all of them. With ``train_images``, ``train_labels`` and, if it has
      them, ``test_images``, ``test_labels``: the training part to work with, the test part to evaluate on. Also
      ``class_names``, if it has them. Other usual names are in `PARTS`; `as_images` and `as_labels` convert other
      layouts.
    - A folder with one folder for each class; see `read_folder`. Or one with ``train`` and ``test`` (or ``val``) in
      which these lie, as parts to work with and to evaluate on; or one that holds such a folder alone.
    - ``signs``, ``digits`` and ``tfds:NAME``, as in `load`: the split ``train`` to work with, ``test`` to evaluate on.

    Args:
        source: one of these.
        num_classes: the model's number of classes C.
        channels: the model's, 1 or 3; images of a folder are converted, others must have them.
        size: height and width to which images are resized; by default they stay as they are.
        resize: pixels of the shorter side to which they are scaled first, before the center of `size` is cut out, as by
            torchvision's ``Resize`` and ``CenterCrop``; by default they are stretched.
        class_names: the folders of classes 0, 1, ...; by default their sorted names.

    Raises:
        UserError: where the source does not exist, or does not hold images of these classes.

    Example:
        >>> len(load_labeled("digits", 10).data)
        1400
    """
    path = as_path(source, "data (--data)")
    if channels not in (1, 3):
        raise UserError(f"{source}: the model takes images of {channels} channels, expected 1 or 3; give another model")
    if resize is not None and (size is None or not max(size) <= resize <= LARGEST):
        fix = "give --size as well, such as --size 224x224" if size is None else f"give {max(size)} to {LARGEST} pixels"
        raise UserError(f"--resize {resize} is the shorter side before the center of --size is cut out; {fix}")
    if _is_named(source):
        if class_names is not None:
            raise UserError(f"{source} has its own classes; leave class names out")
        task = load(source)
        height, width = task.train.images.shape[1:3]
        if size not in (None, (height, width)) or resize not in (None, height):
            raise UserError(f"{source} has its own size, {height}x{width}; leave out another one (--size, --resize)")
        if task.num_classes != num_classes:
            raise UserError(
                f"{source} has {task.num_classes} classes, the model {num_classes}; give images of its classes"
            )
        require_channels(task.train, channels, source)
        return Labeled(task.train, task.test, task.class_names)
    if os.path.isdir(path):
        read = partial(read_folder, channels=channels, num_classes=num_classes, size=size, resize=resize)
        root, outer = (path, ()) if num_classes == 1 else inner_folder(path)
        folders = [root] if (splits := splits_of(root)) is None else [root / split for split in splits]
        found = read(folders[0], class_names=class_names)
        data, test = make_dataset(found.images, found.labels, num_classes, str(path)), None
        notes = (*outer, *found.notes)
        for folder in folders[1:]:
            other = read(folder, class_names=found.classes)
            test = make_dataset(other.images, other.labels, num_classes, str(folder))
            notes = (f"{path}: works with {folders[0].name} and evaluates on {folder.name}", *notes, *other.notes)
        return Labeled(data, test, _shown(found.classes), _shown(found.files), _shown(notes))
    if path.suffix.lower() != ".npz":
        there = "unknown data" if path.exists() else "no such data"
        raise UserError(f"{there} {source!r}; give a .npz file, a folder of class folders, or tfds:NAME")
    if class_names is not None:
        raise UserError(f"{path}: class names are for a folder of class folders; leave them out")
    arrays = read_npz(path, "images, labels")
    parts, changed = {}, []
    for prefix, names in PARTS.items():
        for x, y in names:
            if x in arrays and y in arrays and prefix not in parts:
                where = f"{path} {x}"
                images, changes = as_images(arrays[x], where)
                labels, more = as_labels(arrays[y], f"{path} {y}")
                changed += [f"{where}: {change}" for change in (*changes, *more)]
                if size is not None and len(images) and (resize is not None or images.shape[1:3] != size):
                    height, width = images.shape[1:3]
                    if resize is None and width * size[0] != height * size[1]:
                        changed.append(f"{where}: stretched from {height}x{width} to {size[0]}x{size[1]}; {STRETCHED}")
                    images = resized(images, size, resize, where)
                parts[prefix] = make_dataset(images, labels, num_classes, where)
                require_channels(parts[prefix], channels, where)
    whole = parts.get("", parts.get("train_"))
    if whole is None:
        raise UserError(
            f"{path}: lacks images and labels; it must hold these, or train_images and train_labels, or x_train and "
            f"y_train; it holds {', '.join(arrays) or 'nothing'}"
        )
    named = _shown(np.ravel(arrays["class_names"])) if "class_names" in arrays else None
    if named is not None and len(named) != num_classes:
        raise UserError(f"{path}: has {len(named)} class_names, the model {num_classes} classes; give one for each")
    return Labeled(whole, None if "" in parts else parts.get("test_"), named, None, _shown(changed))


@typed
def image_size(source: str, size: tuple[Count, Count] | None = None) -> tuple[int, int]:
    """Height and width of the images that `load_labeled` returns; 32x32 where it will refuse the source.

    Args:
        source: as there.
        size: as there.

    Raises:
        UserError: where the source cannot be read.

    Example:
        >>> image_size("digits"), image_size("digits", (32, 24))
        ((16, 16), (32, 24))
    """
    path = as_path(source, "data (--data)")
    shape: tuple[int, ...] = (32, 32)
    if size is not None:
        return size
    if _is_named(source):
        shape = load(source).train.images.shape[1:3]
    elif os.path.isdir(path):
        root, _ = inner_folder(path)
        folder = root if (splits := splits_of(root)) is None else root / splits[0]
        files = (file for name in class_folders(folder) for file in (folder / name).rglob("[!.]*"))
        if first := next((file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()), None):
            picture = image_pixels(first, first, "L", file_size(first, "remove it")).pixels
            shape = picture.height, picture.width
    elif path.suffix.lower() == ".npz":
        arrays = read_npz(path, "images, labels")
        names = [x for pairs in PARTS.values() for x, y in pairs if x in arrays and y in arrays]
        if names:
            shape = as_images(arrays[names[0]], f"{path} {names[0]}")[0].shape[1:3]
    height, width = shape
    return height, width


def _is_named(source: str) -> bool:
    """Whether a source is a data set by name."""
    return source in DATASETS or source.startswith("tfds:")


def names_classes(source: str) -> bool:
    """Whether a source takes names of classes: no file and no data set by name, but a folder, or what is missing.

    Example:
        >>> names_classes("digits"), names_classes("images/")
        (False, True)
    """
    return not (_is_named(source) or os.path.isfile(source))


def in_order(found: Labeled, class_names: tuple[str, ...], source: str) -> Labeled:
    """Labeled images whose classes have the numbers that the names have elsewhere; as they are where they lack names.

    Args:
        found: the images.
        class_names: the names of classes 0, 1, ... elsewhere.
        source: what errors call the images.

    Raises:
        UserError: where their classes have other names.

    Example:
        >>> data = make_dataset(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), 2)
        >>> np.asarray(in_order(Labeled(data, class_names=("a", "b")), ("b", "a"), "images").data.labels)
        array([1, 0], dtype=int32)
    """
    own = found.class_names
    if own is None or own == class_names or len(set(own)) < len(own) or len(set(class_names)) < len(class_names):
        return found
    if set(own) != set(class_names):
        here, there = (sorted(set(a) - set(b))[0] for a, b in ((own, class_names), (class_names, own)))
        fix = "as --class-names" if names_classes(source) else "as its class_names"
        raise UserError(
            f"{source}: has the class {here!r}, which --data has not, and lacks {there!r}; use the same names, or give "
            f"its own in the order of the model's classes {fix}"
        )
    numbers = np.array([class_names.index(name) for name in own])

    def renumbered(data: Dataset) -> Dataset:
        return dataclasses.replace(data, labels=jnp.asarray(numbers[np.asarray(data.labels)]))

    note = printable(f"{source}: its classes are numbered as those of --data, by their names", LONGEST)
    test = found.test and renumbered(found.test)
    return found._replace(data=renumbered(found.data), test=test, class_names=class_names, notes=(*found.notes, note))


def _shown(names: Iterable[object]) -> tuple[str, ...]:
    """Names and notes as they are printed: what is in a file does not write to the terminal."""
    return tuple(printable(str(name), LONGEST) for name in names)


def require_channels(data: Dataset, channels: int, where: str) -> None:
    """Refuses images with other channels than a model's, which would be broadcast.

    Raises:
        UserError: for such images.
    """
    found = data.images.shape[-1]
    if found != channels:
        fix = "repeat the channel three times" if found == 1 else "convert them to gray"
        raise UserError(f"{where}: images have {found} channel(s), the model takes {channels}; {fix}")
