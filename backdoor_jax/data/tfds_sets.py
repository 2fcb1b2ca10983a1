"""Data sets of TensorFlow Datasets (TFDS), read without TensorFlow from array_record files."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from backdoor_jax.array_files import read_npz
from backdoor_jax.data.dataset import DatasetSpec, Splits, make_dataset
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.files import atomic_write

SPLITS = ("train", "test")
CACHE = "decoded.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDSSet(DatasetSpec):
    """The splits ``train`` and ``test`` of a TFDS image classification set.

    It must be prepared as array_record. Decoded images are cached beside the records in ``decoded.npz`` until the
    records change.

    Attributes:
        name: as `tfds.builder` takes it.
        data_dir: where TFDS keeps data; by default ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
    """

    data_dir: Path | None = None

    @property
    def source(self) -> str:
        """The name with the prefix that tells a TFDS set."""
        return f"tfds:{self.name}"

    @property
    def fix(self) -> str:
        """How a set that cannot be read is repaired, for errors."""
        return f"prepare it as array_record: {_command(self.name)}"

    def builder(self) -> Any:
        """The TFDS builder of a prepared set.

        Raises:
            UserError: where the set is not prepared, needs TensorFlow, or is no image classification set.
        """
        import tensorflow_datasets as tfds

        builder = tfds.builder(self.name, data_dir=self.data_dir)
        _require_readable(self.name, builder)
        return builder

    def read(self) -> Splits:
        """The decoded images and their labels.

        Raises:
            UserError: for a set that is not there and cannot be prepared, or that holds something else.
        """
        try:
            import tensorflow_datasets  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{self.source} needs the package tensorflow-datasets; pip install tensorflow-datasets"
            ) from error
        try:
            builder = self.builder()
            arrays = _decoded(self.source, builder)
            label = builder.info.features["label"]
            classes, names = label.num_classes, tuple(label.names)
        except UserError:
            raise
        except Exception as error:  # TFDS raises many kinds; the user needs its message, not its stack.
            raise UserError(f"{self.source} cannot be read ({first_line(error)}); {self.fix}") from error
        train, test = (
            make_dataset(arrays[f"{split}_images"], arrays[f"{split}_labels"], classes, f"{self.source} {split}")
            for split in SPLITS
        )
        return Splits(train, test, classes, names)


def _command(name: str) -> str:
    return f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"


def _require_readable(name: str, builder: Any) -> None:
    """Refuses a set that is not prepared, needs TensorFlow, or is no image classification set."""
    from tensorflow_datasets.core.file_adapters import FileFormat

    if not builder.is_prepared():
        raise UserError(f"tfds:{name} is not in {builder.data_dir}; prepare it as array_record: {_command(name)}")
    if not builder.info.available_file_formats() & FileFormat.with_random_access():
        raise UserError(
            f"tfds:{name} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which only TensorFlow "
            f"can read; delete that folder and prepare it as array_record: {_command(name)}"
        )
    missing = [key for key in ("image", "label") if key not in builder.info.features]
    missing += [split for split in SPLITS if split not in builder.info.splits]
    if missing:
        raise UserError(
            f"tfds:{name} has no {', '.join(missing)}; expected features image and label in splits train and test"
        )


def _decoded(source: str, builder: Any) -> dict[str, np.ndarray]:
    """Images and labels of both splits, from the cache where it was made from these records."""
    folder = Path(builder.data_dir)
    files = [
        (path.name, path.stat()) for path in sorted(folder.iterdir()) if not path.name.startswith(Path(CACHE).stem)
    ]
    records = np.str_([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    try:
        cached = read_npz(folder / CACHE, "decoded images")
        if cached.pop("records") == records:
            return cached
    except Exception:  # It is missing or damaged, in whatever way: it is written again.
        pass
    arrays: dict[str, Any] = {}
    for split in SPLITS:
        arrays |= _decode(source, split, builder.as_data_source(split=split))
    # In a folder that is not writable the images are decoded again next time.
    with contextlib.suppress(OSError), atomic_write(folder / CACHE) as partial, partial.open("wb") as file:
        np.savez(file, records=records, **arrays)
    return arrays


def _decode(source: str, split: str, examples: Any) -> dict[str, np.ndarray]:
    first = examples[0]["image"]
    images, labels = np.empty((len(examples), *first.shape), first.dtype), np.empty(len(examples), np.int32)
    for number, example in enumerate(examples):
        image = example["image"]
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{source}: {split} image {number} is {image.shape}, the first {images.shape[1:]}; "
                "expected equal shapes: resize them and give them as a .npz file"
            )
        images[number], labels[number] = image, example["label"]
    return {f"{split}_images": images, f"{split}_labels": labels}
