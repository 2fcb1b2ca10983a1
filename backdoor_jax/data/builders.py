"""TFDS builders of the benchmark's data sets: official archives in, array_record out, no TensorFlow.

TFDS's own CIFAR builders need TensorFlow to encode an image and to walk through an archive. These open the archives
themselves (`tarfile`, `zipfile`; nothing is unpacked to disk) and hand over Pillow images, which TFDS stores as PNG, or
the JPEG files as they are. The official archives lie in TFDS's manual directory, ``<data_dir>/downloads/manual/``;
`prepare` downloads those that do not. Images keep the official order.

They are called ``backdoor_jax_cifar10`` and so on, so that TFDS's own builders and what they prepared stay as is.
Any program with TFDS reads what they wrote: ``tfds.data_source("backdoor_jax_cifar10", split="train")``.

Example:
    >>> Cifar10.images
    {'train': 50000, 'test': 10000}
    >>> TinyImagenet.archives[0].name
    'tiny-imagenet-200.zip'
"""

import codecs
import contextlib
import csv
import dataclasses
import hashlib
import io
import pickle
import re
import tarfile
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from backdoor_jax.errors import UserError, first_line

Example = tuple[Image.Image | bytes, int]
"""An image, decoded or as its file's bytes, and its label."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        url: where it is published; it ends in the file's name.
        md5: the sum of its bytes, checked on download only.
    """

    url: str
    md5: str

    @property
    def name(self) -> str:
        """What the file is called."""
        return self.url.rpartition("/")[2]

    @contextlib.contextmanager
    def opened(self, folder: Path) -> Iterator[Any]:
        """The open `TarFile` or `ZipFile`; whatever goes wrong with its contents becomes a line that names it."""
        path = Path(folder) / self.name
        try:
            with zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path, "r:gz") as archive:
                yield archive
        except Exception as error:  # Damage shows as many kinds, from EOFError to zlib.error.
            raise UserError(
                f"{path}: cannot be read as the official archive ({first_line(error)}); "
                f"delete it and get it again from {self.url}"
            ) from error

    def download(self, folder: Path) -> None:
        """Gets the archive into a folder, where it appears only when it is whole and has the published sum."""
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.md5(usedforsecurity=False)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            path = Path(partial) / self.name
            with urllib.request.urlopen(self.url, timeout=60) as response, path.open("wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=size or None, desc=self.name, unit="B", unit_scale=True, disable=None) as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        bar.update(len(block))
            if digest.hexdigest() != self.md5:
                raise OSError(f"{self.url} sent a file with MD5 {digest.hexdigest()}, published is {self.md5}")
            path.replace(folder / self.name)


class Official(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders share: images and labels of an official archive, in its order.

    Attributes:
        archives: what must lie in the manual directory.
        images: how many images the official splits hold; others are prepared with a warning.
        shape: of an image.
        encoding: how images are stored, ``png`` or ``jpeg``.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = tfds.core.Path(__file__)  # TFDS 4.9 would look for it with importlib_resources, which it lacks.
    archives: ClassVar[tuple[Archive, ...]]
    images: ClassVar[dict[str, int]]
    shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)
    encoding: ClassVar[str] = "png"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__(skip_registration=True)  # type: ignore[call-arg]  # mypy does not read TFDS.

    def class_names(self, folder: Path) -> list[str]:
        """The names of the classes, in the order of their labels."""
        raise NotImplementedError

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """The images of a split and their labels, read from the archives in a folder."""
        raise NotImplementedError

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(shape=self.shape, encoding_format=self.encoding),
            "label": tfds.features.ClassLabel(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        self.info.features["label"].names = self.class_names(manager.manual_dir)
        return {split: self._generate_examples(manager.manual_dir, split) for split in self.images}

    def _generate_examples(self, folder: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        classes = self.info.features["label"].num_classes
        for number, (image, label) in enumerate(self.examples(folder, split)):
            if not 0 <= label < classes:
                raise UserError(
                    f"{self.name}: {split} image {number} has label {label}, expected 0 to {classes - 1}; "
                    f"get the official archives again: {', '.join(archive.url for archive in self.archives)}"
                )
            yield number, {"image": image, "label": label}

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:
        """Which files TFDS's manual directory must hold."""
        return "\n".join(f"{archive.name} from {archive.url}" for archive in self.archives)


class Cifar(Official):
    """A CIFAR archive: pickled batches of images as planes of red, green and blue.

    Attributes:
        folder: of the archive, where the batches lie.
        batches: of each split, in order.
        meta: the file that names the classes.
        prefix: of the keys of labels and names.
    """

    folder: ClassVar[str]
    batches: ClassVar[dict[str, tuple[str, ...]]]
    meta: ClassVar[str]
    prefix: ClassVar[bytes] = b""

    def class_names(self, folder: Path) -> list[str]:
        """As the archive gives them."""
        with self.archives[0].opened(folder) as archive:
            (meta,) = self._unpickled(archive, (self.meta,))
            return [name.decode() for name in meta[self.prefix + b"label_names"]]

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """Batch after batch."""
        with self.archives[0].opened(folder) as archive:
            for batch in self._unpickled(archive, self.batches[split]):
                images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for image, label in zip(images, batch[self.prefix + b"labels"], strict=True):
                    yield Image.fromarray(image), label

    def _unpickled(self, archive: tarfile.TarFile, names: tuple[str, ...]) -> list[Any]:
        # In one pass, for going back in a .tar.gz means to decompress it from the start.
        files = {}
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if folder == self.folder and name in names and (file := archive.extractfile(member)):
                files[name] = file.read()
        if missing := [name for name in names if name not in files]:
            raise ValueError(f"it lacks {self.folder}/{missing[0]}")
        return [BatchUnpickler(io.BytesIO(files[name]), encoding="bytes").load() for name in names]


class BatchUnpickler(pickle.Unpickler):
    """Reads dictionaries of plain values and NumPy arrays, and refuses whatever else a pickle may ask for.

    A pickle can call anything that can be imported, and these come from the internet.

    Example:
        >>> BatchUnpickler(io.BytesIO(pickle.dumps({"labels": [3, 1]}, protocol=2))).load()
        {'labels': [3, 1]}
        >>> BatchUnpickler(io.BytesIO(pickle.dumps(print, protocol=2))).load()
        Traceback (most recent call last):
        _pickle.UnpicklingError: its pickle asks for __builtin__.print, which no batch of images needs; it was not run
    """

    _reconstruct = np.empty(0).__reduce__()[0]
    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """What an array is made of."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"its pickle asks for {module}.{name}, which no batch of images needs; it was not run"
            )
        return self.allowed[module, name]


class Cifar10(Cifar):
    """CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009): 32x32, 10 classes."""

    name = "backdoor_jax_cifar10"
    archives = (Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),)
    images: ClassVar = {"train": 50_000, "test": 10_000}
    folder = "cifar-10-batches-py"
    batches: ClassVar = {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)}
    meta = "batches.meta"


class Cifar100(Cifar):
    """CIFAR-100 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009): 32x32, 100 fine classes."""

    name = "backdoor_jax_cifar100"
    archives = (
        Archive("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    )
    images: ClassVar = {"train": 50_000, "test": 10_000}
    folder = "cifar-100-python"
    batches: ClassVar = {"train": ("train",), "test": ("test",)}
    meta = "meta"
    prefix = b"fine_"


class Gtsrb(Official):
    """GTSRB (Stallkamp et al., Man vs. computer, Neural Networks 32, 2012): German traffic signs of 43 classes.

    Whole frames of 15 to 250 pixels, not cut to the sign, are resized to 32x32 with Pillow's bilinear filter, as the
    published benchmark does it. Training images in the order of class, track and frame.
    """

    name = "backdoor_jax_gtsrb"
    archives = tuple(
        Archive(f"https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/{name}", md5)
        for name, md5 in (
            ("GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"),
            ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
            ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
        )
    )
    images: ClassVar = {"train": 39_209, "test": 12_630}

    def class_names(self, folder: Path) -> list[str]:
        """The names of the classes' folders; the archives give no others."""
        return [f"{label:05d}" for label in range(43)]

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """Training images by class, track and frame; test images as the table of their classes has them."""
        training_images, test_images, test_table = self.archives
        if split == "train":
            with training_images.opened(folder) as archive:
                for found in _matching(archive, r"GTSRB/Final_Training/Images/(\d{5})/\w+\.ppm"):
                    yield self._resized(archive.read(found[0])), int(found[1])
            return
        with test_table.opened(folder) as archive:
            table = csv.DictReader(io.StringIO(archive.read("GT-final_test.csv").decode()), delimiter=";")
            labels = {row["Filename"]: int(row["ClassId"]) for row in table}
        with test_images.opened(folder) as archive:
            for name, label in labels.items():
                yield self._resized(archive.read(f"GTSRB/Final_Test/Images/{name}")), label

    def _resized(self, file: bytes) -> Image.Image:
        height, width, _ = self.shape
        return Image.open(io.BytesIO(file)).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)


class TinyImagenet(Official):
    """Tiny ImageNet (Le and Yang, Tiny ImageNet Visual Recognition Challenge, 2015): 64x64, 200 classes.

    Labels number the sorted WordNet ids, and training images are in the order of their paths, both as torchvision's
    ImageFolder and so the published benchmark have them. ``test`` is the official validation set in the order of its
    table, since the official test set has no labels. The JPEG files are kept; grey ones are decoded to RGB.
    """

    name = "backdoor_jax_tiny_imagenet"
    archives = (Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),)
    images: ClassVar = {"train": 100_000, "test": 10_000}
    shape = (64, 64, 3)
    encoding = "jpeg"

    def class_names(self, folder: Path) -> list[str]:
        """The sorted WordNet ids."""
        with self.archives[0].opened(folder) as archive:
            return sorted(archive.read("tiny-imagenet-200/wnids.txt").decode().split())

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """Training images by path; test images as the table of the validation set has them."""
        labels = {name: label for label, name in enumerate(self.class_names(folder))}
        with self.archives[0].opened(folder) as archive:
            if split == "train":
                for found in _matching(archive, r"tiny-imagenet-200/train/(n\d+)/images/\w+\.JPEG"):
                    yield archive.read(found[0]), labels[found[1]]
                return
            table = archive.read("tiny-imagenet-200/val/val_annotations.txt").decode()
            for line in table.splitlines():
                name, wnid, *_ = line.split("\t")
                yield archive.read(f"tiny-imagenet-200/val/images/{name}"), labels[wnid]


BUILDERS: dict[str, type[Official]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "gtsrb": Gtsrb,
    "tiny_imagenet": TinyImagenet,
}
"""The builders by what `load_task` calls their data sets after ``tfds:``."""


def prepare(name: str, data_dir: Path | None = None) -> Official:
    """Makes a data set ready to be read, from archives in the manual directory or the internet.

    Args:
        name: of the data set, in `BUILDERS`.
        data_dir: where TFDS keeps data; by default ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Returns:
        The builder, prepared; ``as_data_source`` reads.

    Raises:
        UserError: for archives that are neither there nor can be downloaded, or that hold something else.
    """
    builder = BUILDERS[name](data_dir=data_dir, file_format="array_record")
    if builder.is_prepared():
        return builder
    manual = Path(builder.data_dir_root) / "downloads" / "manual"
    for archive in builder.archives:
        if not (manual / archive.name).is_file():
            try:
                archive.download(manual)
            except (OSError, HTTPException) as error:
                missing = [a for a in builder.archives if not (manual / a.name).is_file()]
                raise UserError(
                    f"tfds:{name} is not prepared, and {archive.name} cannot be downloaded ({first_line(error)}); "
                    f"put into {manual}: {', '.join(f'{a.name} from {a.url}' for a in missing)}"
                ) from error
    builder.download_and_prepare()
    held = {split: builder.info.splits[split].num_examples for split in builder.images}
    if held != builder.images:
        warnings.warn(f"tfds:{name}: the archives hold {held} images, the official ones {builder.images}", stacklevel=2)
    return builder


def _matching(archive: zipfile.ZipFile, pattern: str) -> list[re.Match[str]]:
    """The files whose path matches, sorted by path."""
    matches = [found for name in sorted(archive.namelist()) if (found := re.fullmatch(pattern, name))]
    if not matches:
        raise ValueError(f"it holds no file like {pattern}")
    return matches
