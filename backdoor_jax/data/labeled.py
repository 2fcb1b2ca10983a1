"""Labeled images in any form: a ``.npz``, a folder of class folders, or a data set by name."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from backdoor_jax.array_files import read_npz
from backdoor_jax.data.dataset import Dataset, make_dataset
from backdoor_jax.data.loading import load
from backdoor_jax.data.specs import DATASETS
from backdoor_jax.errors import UserError
from backdoor_jax.reading import as_path, file_size, image_pixels, parsing, require_budget

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
"""The files of a class folder that are images; others are ignored."""


class Labeled(NamedTuple):
    """Labeled images.

    Attributes:
        data: the images to work with.
        test: separate images to evaluate on, where the source has some.
        class_names: names of the classes, where the source has some.
        files: of the images in `data`, where they come from a folder.
    """

    data: Dataset
    test: Dataset | None = None
    class_names: tuple[str, ...] | None = None
    files: tuple[str, ...] | None = None


def load_labeled(source: str, num_classes: int, channels: int = 3) -> Labeled:
    """Reads labeled images.

    - ``FILE.npz`` with ``images`` and ``labels``: all of them. With ``train_images``, ``train_labels`` and, if it has
      them, ``test_images``, ``test_labels``: the training part to work with, the test part to evaluate on. Also
      ``class_names``, if it has them.
    - A folder with one folder for each class: the sorted folder names are classes 0, 1, ... (``"10"`` comes before
      ``"2"``, as in torchvision); a class without images keeps an empty folder. All images need one shape, and become
      RGB or gray.
    - ``digits`` and ``tfds:NAME``, as in `load`: the split ``train`` to work with, ``test`` to evaluate on.

    Args:
        source: one of these.
        num_classes: the model's number of classes C.
        channels: what image files are converted to, 1 or 3 channels.

    Raises:
        UserError: where the source does not exist, or does not hold images of these classes.

    Example:
        >>> len(load_labeled("digits", 10).data)
        1400
    """
    path = as_path(source, "data (--data)")
    if source in DATASETS or source.startswith("tfds:"):
        task = load(source)
        if task.num_classes != num_classes:
            raise UserError(
                f"{source} has {task.num_classes} classes, the model {num_classes}; give images of its classes"
            )
        return Labeled(task.train, task.test)
    if os.path.isdir(path):
        return _folder(path, num_classes, channels)
    if path.suffix != ".npz":
        raise UserError(f"unknown data {source!r}; give a .npz file, a folder of class folders, or tfds:NAME")
    arrays = read_npz(path, "images, labels")
    parts = {}
    for prefix in ("", "train_", "test_"):
        images, labels = f"{prefix}images", f"{prefix}labels"
        if images in arrays and labels in arrays:
            parts[prefix] = make_dataset(arrays[images], arrays[labels], num_classes, f"{path} {images}")
    data = parts.get("", parts.get("train_"))
    if data is None:
        raise UserError(f"{path}: lacks images and labels; it must hold these, or train_images and train_labels")
    test = None if "" in parts else parts.get("test_")
    names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None
    if names is not None and len(names) != num_classes:
        raise UserError(f"{path}: has {len(names)} class_names, the model {num_classes} classes; give one for each")
    return Labeled(data, test, names)


def _folder(path: Path, num_classes: int, channels: int) -> Labeled:
    """The images of a folder of class folders."""
    with parsing(path, "cannot be read", "give a folder with one folder for each class"):
        classes = sorted(inner.name for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    if len(classes) != num_classes:
        raise UserError(
            f"{path}: has {len(classes)} class folders, the model {num_classes} classes; give one folder for each "
            "class, empty where there are no images"
        )
    with parsing(path, "cannot be read", "check the permissions of its folders"):
        files = [
            (label, file)
            for label, name in enumerate(classes)
            for file in sorted((path / name).iterdir())
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        ]
    if not files:
        raise UserError(f"{path}: its class folders hold no images ({', '.join(SUFFIXES)})")
    sizes = [file_size(file, "remove it") for _, file in files]
    images, labels = [], []
    for (label, file), size in zip(files, sizes, strict=True):
        pixels = np.asarray(image_pixels(file, file, "L" if channels == 1 else "RGB", size))
        images.append(pixels.reshape(*pixels.shape[:2], channels))
        labels.append(label)
        if images[-1].shape != images[0].shape:
            (height, width), (h, w) = images[-1].shape[:2], images[0].shape[:2]
            raise UserError(f"{file}: is {height}x{width}, the images before it {h}x{w}; resize all to one shape")
        if len(images) == 1:
            require_budget(len(files) * images[0].nbytes, sum(sizes), path)
    data = make_dataset(np.stack(images), np.asarray(labels), num_classes, str(path))
    return Labeled(data, None, tuple(classes), tuple(f"{file.parent.name}/{file.name}" for _, file in files))
