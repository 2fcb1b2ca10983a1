"""Where images come from: the embedded digits, plain .npz files, and TFDS data sets."""

import dataclasses
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from backdoor_jax.data.dataset import Dataset, Task, make_dataset
from backdoor_jax.data.tfds_sets import TFDS_SETS, tfds_task
from backdoor_jax.errors import UserError

SOURCES = {
    "digits": "scikit-learn's 1,797 handwritten digits, embedded",
    "FILE.npz": "train_images, train_labels, test_images, test_labels",
    **{f"tfds:{name}": summary for name, summary in TFDS_SETS.items()},
    "tfds:NAME": "any other TFDS set of images in classes that is prepared as array_record",
}
"""What `load_task` takes, and a line about each."""

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
DIGITS_TRAIN = 1400


def load_task(
    source: str, train_size: int | None = None, test_size: int | None = None, seed: int = 0, root: Path = Path()
) -> Task:
    """Loads a data set by what it is called.

    Args:
        source: ``digits``, the path of a ``.npz`` file (relative to `root`), or ``tfds:NAME``; see `SOURCES`.
        train_size: keep that many training images, drawn with `seed`, and the others as `left_out`; all by default.
        test_size: likewise for the test set.
        seed: of the draw.
        root: where relative paths start.

    Raises:
        UserError: for an unknown source, a missing or foreign file, or more images wanted than there are.

    Example:
        >>> load_task("digits").num_classes
        10
    """
    if source == "digits":
        task = digits()
    elif source.startswith("tfds:"):
        task = tfds_task(source.removeprefix("tfds:"))
    elif source.endswith(".npz"):
        task = npz_task(root / source)
    else:
        raise UserError(f"unknown data {source!r}; give 'digits', the path of a .npz file, or 'tfds:NAME'")
    generator = np.random.default_rng(seed)

    def drawn(part: str, size: int) -> tuple[Dataset, Dataset | None]:
        whole: Dataset = getattr(task, part)
        if not 0 < size <= len(whole):
            raise UserError(f"{source}: {size} {part} images wanted, there are {len(whole)}; lower {part}_size")
        kept, rest = np.split(generator.permutation(len(whole)), [size])
        return whole.take(np.sort(kept)), whole.take(np.sort(rest)) if len(rest) else None

    if train_size is not None:
        train, left_out = drawn("train", train_size)
        task = dataclasses.replace(task, train=train, left_out=left_out)
    if test_size is not None:
        task = dataclasses.replace(task, test=drawn("test", test_size)[0])
    return task


def digits() -> Task:
    """scikit-learn's 1,797 handwritten digits, embedded in that package: no network, no files.

    8x8 grey levels 0 to 16 become 16x16 RGB images of uint8: scaled to 255, every pixel doubled. 1,400 images train,
    397 test, in the set's own order (writers of the two do not overlap much).

    Example:
        >>> digits().train.images.shape
        (1400, 16, 16, 3)
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = np.round(raw.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey.repeat(2, 1).repeat(2, 2)[..., None], 3, axis=-1)
    labels = raw.target
    return Task(
        "digits",
        make_dataset(images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN], 10, "digits"),
        make_dataset(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:], 10, "digits"),
        num_classes=10,
    )


def npz_task(path: Path) -> Task:
    """Reads ``train_images, train_labels, test_images, test_labels`` from a plain ``.npz``.

    Optional entries: ``class_names`` (their number is C, else the largest label + 1) and ``normalization`` (a name).
    """
    arrays = read_npz(path, NPZ_KEYS)
    missing = [key for key in NPZ_KEYS if key not in arrays]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; it must hold {', '.join(NPZ_KEYS)}")
    if "class_names" in arrays:
        classes = len(arrays["class_names"])
    else:
        labels = [
            arrays[key] for key in ("train_labels", "test_labels") if np.issubdtype(arrays[key].dtype, np.integer)
        ]
        classes = int(max((part.max(initial=0) for part in labels), default=0)) + 1
    return Task(
        path.stem,
        make_dataset(arrays["train_images"], arrays["train_labels"], classes, f"{path} train"),
        make_dataset(arrays["test_images"], arrays["test_labels"], classes, f"{path} test"),
        classes,
        str(arrays.get("normalization", "none")),
        bool(arrays.get("flip", False)),
    )


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of a plain ``.npz``; `keys` are what errors say it should hold.

    Raises:
        UserError: where there is no such file, or it is no plain ``.npz``.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .npz with {', '.join(keys)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as a plain .npz ({error}); write it with numpy.savez") from error
