"""TFDS data sets: those of the benchmark, which are prepared where needed, and any other by its name."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from backdoor_jax.data.dataset import Task, make_dataset
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.files import whole

TFDS_SETS = {
    "cifar10": "CIFAR-10, 32x32, 10 classes; from cifar-10-python.tar.gz",
    "cifar100": "CIFAR-100, 32x32, 100 classes; from cifar-100-python.tar.gz",
    "gtsrb": "German traffic signs resized to 32x32, 43 classes; from GTSRB_Final_*.zip",
    "tiny_imagenet": "Tiny ImageNet, 64x64, 200 classes, tested on its validation set; from tiny-imagenet-200.zip",
}
"""The data sets with a builder of ours, in `backdoor_jax.data.builders`, and a line about each."""

SPLITS = ("train", "test")
CACHE = "decoded.npz"


def tfds_task(name: str, data_dir: Path | None = None) -> Task:
    """Reads the splits ``train`` and ``test`` of a TFDS image classification set.

    A set of `TFDS_SETS` is prepared first if it is not yet, from official archives in TFDS's manual directory or the
    internet, and comes in its official order with the benchmark's normalisation. Any other must lie prepared as
    array_record. Decoded images are kept beside the records in ``decoded.npz`` and made anew when the records change.

    Args:
        name: in `TFDS_SETS`, or as `tfds.builder` takes it.
        data_dir: where TFDS keeps data; by default ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Raises:
        UserError: for a set that is not there and cannot be prepared, or that holds something else.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"tfds:{name} needs the package tensorflow-datasets; pip install tensorflow-datasets"
        ) from error

    mend = f"prepare it as array_record: {_command(name)}"
    try:
        if name in TFDS_SETS:
            from backdoor_jax.data.builders import prepare

            mend = f"delete the folder backdoor_jax_{name} in TFDS's data directory, so that it is prepared again"
            builder = prepare(name, data_dir)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
            _require_readable(name, builder)
        arrays = _decoded(name, builder)
        classes = builder.info.features["label"].num_classes
    except UserError:
        raise
    except Exception as error:  # TFDS raises many kinds; the user needs its line, not its stack.
        raise UserError(f"tfds:{name} cannot be read ({first_line(error)}); {mend}") from error
    train, test = (
        make_dataset(arrays[f"{split}_images"], arrays[f"{split}_labels"], classes, f"tfds:{name} {split}")
        for split in SPLITS
    )
    return Task(name, train, test, classes, name if name in TFDS_SETS else "none", flip=name == "cifar10")


def _command(name: str) -> str:
    return f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"


def _require_readable(name: str, builder: Any) -> None:
    """Refuses a set that is not prepared, that only TensorFlow can read, or that is no image classification set."""
    from tensorflow_datasets.core.file_adapters import FileFormat

    if not builder.is_prepared():
        raise UserError(f"tfds:{name} is not in {builder.data_dir}; prepare it as array_record: {_command(name)}")
    if not builder.info.available_file_formats() & FileFormat.with_random_access():
        raise UserError(
            f"tfds:{name} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which needs "
            f"TensorFlow to be read; delete that folder and prepare it as array_record: {_command(name)}"
        )
    missing = [key for key in ("image", "label") if key not in builder.info.features]
    missing += [split for split in SPLITS if split not in builder.info.splits]
    if missing:
        raise UserError(
            f"tfds:{name} has no {', '.join(missing)}; expected features image and label in splits train and test"
        )


def _decoded(name: str, builder: Any) -> dict[str, np.ndarray]:
    """Images and labels of both splits, from the cache beside the records while that is of these records."""
    folder = Path(builder.data_dir)
    files = [
        (path.name, path.stat()) for path in sorted(folder.iterdir()) if not path.name.startswith(Path(CACHE).stem)
    ]
    records = np.str_([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    try:
        with np.load(folder / CACHE) as cache:
            arrays = dict(cache)
        if arrays.pop("records") == records:
            return arrays
    except Exception:  # Absent or damaged in whatever way: it is made anew.
        pass
    arrays = {}
    for split in SPLITS:
        arrays |= _decode(name, split, builder.as_data_source(split=split))
    # A folder that cannot be written costs the decoding next time, and no more.
    with contextlib.suppress(OSError), whole(folder / CACHE) as place, place.open("wb") as file:
        np.savez(file, records=records, **arrays)
    return arrays


def _decode(name: str, split: str, source: Any) -> dict[str, np.ndarray]:
    first = source[0]["image"]
    images, labels = np.empty((len(source), *first.shape), first.dtype), np.empty(len(source), np.int32)
    for number, example in enumerate(source):
        image = example["image"]
        if image.shape != images.shape[1:]:
            raise UserError(
                f"tfds:{name}: {split} image {number} is {image.shape}, the first {images.shape[1:]}; "
                "expected equal shapes: resize them and give them as a .npz file"
            )
        images[number], labels[number] = image, example["label"]
    return {f"{split}_images": images, f"{split}_labels": labels}
