"""Data sets prepared from their official archives as TFDS sets in array_record, without TensorFlow.

TFDS's own CIFAR builders need TensorFlow to encode an image and to walk through an archive. Here the archives are
opened directly (`tarfile`, `zipfile`; nothing is unpacked to disk), and TFDS receives Pillow images, which it stores as
PNG, or JPEG files as they are. The official archives are looked for in TFDS's manual directory,
``<data_dir>/downloads/manual/``, and downloaded to it where they are missing. Images keep the official order.

The prepared sets are called ``backdoor_jax_cifar10`` and so on, so that TFDS's own builders and what they prepared stay
as they are. Any program with TFDS can read them: ``tfds.data_source("backdoor_jax_cifar10", split="train")``.

Example:
    >>> from backdoor_jax.data import DATASETS
    >>> DATASETS["tfds:tiny_imagenet"].archives[0].name
    'tiny-imagenet-200.zip'
"""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import re
import tarfile
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from backdoor_jax.data.tfds_sets import TFDSSet
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.files import atomic_write
from backdoor_jax.pickles import PlainUnpickler
from backdoor_jax.progress import progress_bar
from backdoor_jax.reading import file_size, image_pixels, parsing, require_budget, require_deflated
from backdoor_jax.stopping import stop_if_asked

Example = tuple[Any, int]
"""An image, as Pillow's or as its file's bytes, and its label."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        url: where it is published; it ends in the file's name.
        md5: the checksum of its bytes, checked when the set is prepared.
    """

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]

    @contextlib.contextmanager
    def opened(self, folder: Path) -> Iterator[Any]:
        """The open `TarFile`, for one pass, or `ZipFile`; any error with its contents becomes a `UserError`."""
        path = Path(folder) / self.name
        fix = f"delete it and download it again from {self.url}"
        size = file_size(path, fix)
        with parsing(path, "cannot be read as the official archive", fix), contextlib.ExitStack() as closing:
            if path.suffix == ".zip":
                archive = closing.enter_context(zipfile.ZipFile(path))
                require_deflated(archive)
                yield archive
            else:
                stream: Any = BoundedReader(closing.enter_context(gzip.open(path)), path, size)
                yield closing.enter_context(tarfile.open(fileobj=stream, mode="r|"))

    def warn_unless_official(self, folder: Path) -> None:
        """Warns of an archive with another checksum than the published one."""
        with (folder / self.name).open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != self.md5:
            warnings.warn(
                f"{folder / self.name} is not the official archive (its MD5 is {found}, published is {self.md5}); it "
                "is read as data",
                stacklevel=3,
            )

    def download(self, folder: Path) -> None:
        """Downloads the archive; it appears in the folder only when complete and with the published checksum."""
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.md5(usedforsecurity=False)
        with atomic_write(folder / self.name) as path:
            with urllib.request.urlopen(self.url, timeout=60) as response, path.open("wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                with progress_bar(self.name, size or None, unit="bytes") as advance:
                    while block := response.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        advance(len(block))
                        stop_if_asked()
            if digest.hexdigest() != self.md5:
                raise OSError(f"what was sent has MD5 {digest.hexdigest()}, published is {self.md5}")


class BoundedReader:
    """The decompressed bytes of an archive, which end with an error beyond the budget of `reading.require_budget`."""

    def __init__(self, file: gzip.GzipFile, path: Path, size: int) -> None:
        self._file, self._path, self._size, self._count = file, path, size, 0

    def read(self, count: int) -> bytes:
        """The next bytes."""
        self._count += count
        require_budget(self._count, self._size, self._path)
        return self._file.read(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialSet(TFDSSet):
    """A data set that is prepared from its official archives.

    Attributes:
        reference: the publication.
        archives: what the manual directory must hold.
        images: how many images the official splits hold; another number is prepared with a warning.
        shape: of an image.
        encoding: how images are stored, ``png`` or ``jpeg``.
    """

    reference: str
    archives: tuple[Archive, ...]
    images: Mapping[str, int]
    shape: tuple[int, int, int] = (32, 32, 3)
    encoding: str = "png"

    def class_names(self, folder: Path) -> list[str]:
        """The names of the classes, in the order of their labels, read from the archives in a folder."""
        raise NotImplementedError

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """The images of a split and their labels, read from the archives in a folder."""
        raise NotImplementedError

    @property
    def fix(self) -> str:
        """How a prepared set that cannot be read is repaired, for errors."""
        return f"delete the folder backdoor_jax_{self.name} in TFDS's data directory, so that it is prepared again"

    def builder(self) -> Any:
        """The TFDS builder, prepared from archives in the manual directory or from downloaded ones.

        Raises:
            UserError: for archives that are neither there nor can be downloaded, or that hold something else.
        """
        builder = _tfds_builder(self)
        if builder.is_prepared():
            return builder
        manual = Path(builder.data_dir_root) / "downloads" / "manual"
        for archive in self.archives:
            if (manual / archive.name).is_file():
                archive.warn_unless_official(manual)
            else:
                try:
                    archive.download(manual)
                except (OSError, HTTPException) as error:
                    missing = [a for a in self.archives if not (manual / a.name).is_file()]
                    raise UserError(
                        f"{self.source} is not prepared, and {archive.name} cannot be downloaded "
                        f"({first_line(error)}); put into {manual} {', '.join(a.name for a in missing)} from "
                        f"{' and '.join(dict.fromkeys(a.url.removesuffix(a.name) for a in missing))}"
                    ) from error
        builder.download_and_prepare()
        found = {split: builder.info.splits[split].num_examples for split in self.images}
        if found != self.images:
            warnings.warn(
                f"{self.source}: the archives hold {found} images, the official ones {self.images}", stacklevel=2
            )
        return builder


def _tfds_builder(spec: OfficialSet) -> Any:
    """The TFDS builder of a data set with official archives."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = f"backdoor_jax_{spec.name}"
        VERSION = tfds.core.Version("1.0.0")
        code_path = tfds.core.Path(__file__)  # TFDS 4.9 would look for it with importlib_resources, which it lacks.
        MANUAL_DOWNLOAD_INSTRUCTIONS = "\n".join(f"{archive.name} from {archive.url}" for archive in spec.archives)

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=spec.shape, encoding_format=spec.encoding),
                "label": tfds.features.ClassLabel(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{spec.summary} ({spec.reference})",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            self.info.features["label"].names = spec.class_names(manager.manual_dir)
            return {split: self._generate_examples(manager.manual_dir, split) for split in spec.images}

        def _generate_examples(self, folder: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            classes = self.info.features["label"].num_classes
            for number, (image, label) in enumerate(spec.examples(folder, split)):
                if not 0 <= label < classes:
                    raise UserError(
                        f"{spec.source}: {split} image {number} has label {label}, expected 0 to {classes - 1}; "
                        f"download the official archives again: {', '.join(archive.url for archive in spec.archives)}"
                    )
                yield number, {"image": image, "label": label}

    return Builder(data_dir=spec.data_dir, file_format="array_record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar(OfficialSet):
    """A CIFAR archive: pickled batches of images as planes of red, green and blue.

    Attributes:
        folder: the folder in the archive that holds the batches.
        batches: the files of each split, in order.
        meta: the file that names the classes.
        prefix: of the keys of labels and names.
    """

    folder: str
    batches: Mapping[str, tuple[str, ...]]
    meta: str
    prefix: bytes = b""

    def class_names(self, folder: Path) -> list[str]:
        """The names that the archive gives, in the order of their labels."""
        with self.archives[0].opened(folder) as archive:
            (meta,) = self._unpickled(archive, (self.meta,))
            return [name.decode() for name in meta[self.prefix + b"label_names"]]

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """The images of a split and their labels, batch after batch."""
        from PIL import Image

        with self.archives[0].opened(folder) as archive:
            for batch in self._unpickled(archive, self.batches[split]):
                images = batch[b"data"].array.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for image, label in zip(images, batch[self.prefix + b"labels"], strict=True):
                    yield Image.fromarray(image), label

    def _unpickled(self, archive: tarfile.TarFile, names: tuple[str, ...]) -> list[Any]:
        # In one pass, because going back in a .tar.gz means decompressing it from the start.
        files = {}
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if folder == self.folder and name in names and (file := archive.extractfile(member)):
                files[name] = file.read()
        if missing := [name for name in names if name not in files]:
            raise ValueError(f"it lacks {self.folder}/{missing[0]}")
        return [PlainUnpickler(files[name], encoding="bytes").load() for name in names]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GTSRB(OfficialSet):
    """The archives of GTSRB: German traffic signs of 43 classes.

    Full frames of 15 to 250 pixels, not cropped to the sign, are resized to 32x32 with Pillow's bilinear filter, as in
    the published benchmark. Training images are in the order of class, track and frame.
    """

    def class_names(self, folder: Path) -> list[str]:
        """The names of the classes' folders; the archives give no others."""
        return [f"{label:05d}" for label in range(43)]

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """Training images by class, track and frame; test images in the order of the table of their classes."""
        training_images, test_images, test_table = self.archives
        if split == "train":
            with training_images.opened(folder) as archive:
                for found in _matching(archive, r"GTSRB/Final_Training/Images/(\d{5})/\w+\.ppm"):
                    yield self._resized(_member(archive, found[0])), int(found[1])
            return
        with test_table.opened(folder) as archive:
            table = csv.DictReader(io.StringIO(_member(archive, "GT-final_test.csv").decode()), delimiter=";")
            labels = {row["Filename"]: int(row["ClassId"]) for row in table}
        with test_images.opened(folder) as archive:
            for name, label in labels.items():
                yield self._resized(_member(archive, f"GTSRB/Final_Test/Images/{name}")), label

    def _resized(self, file: bytes) -> Any:
        from PIL import Image

        height, width, _ = self.shape
        image = image_pixels(io.BytesIO(file), "an image", "RGB", len(file)).pixels
        return image.resize((width, height), Image.Resampling.BILINEAR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyImageNet(OfficialSet):
    """The archive of Tiny ImageNet.

    Labels number the sorted WordNet ids, and training images are in the order of their paths, as in torchvision's
    ImageFolder and so in the published benchmark. ``test`` is the official validation set in the order of its table,
    since the official test set has no labels. The JPEG files are kept; gray ones are decoded to RGB.
    """

    def class_names(self, folder: Path) -> list[str]:
        """The sorted WordNet ids."""
        with self.archives[0].opened(folder) as archive:
            return sorted(_member(archive, "tiny-imagenet-200/wnids.txt").decode().split())

    def examples(self, folder: Path, split: str) -> Iterator[Example]:
        """Training images by path; test images in the order of the validation set's table."""
        labels = {name: label for label, name in enumerate(self.class_names(folder))}
        with self.archives[0].opened(folder) as archive:
            if split == "train":
                for found in _matching(archive, r"tiny-imagenet-200/train/(n\d+)/images/\w+\.JPEG"):
                    yield _member(archive, found[0]), labels[found[1]]
                return
            table = _member(archive, "tiny-imagenet-200/val/val_annotations.txt").decode()
            for line in table.splitlines():
                name, wnid, *_ = line.split("\t")
                yield _member(archive, f"tiny-imagenet-200/val/images/{name}"), labels[wnid]


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of an archive."""
    found = archive.getinfo(name)
    require_budget(found.file_size, found.compress_size, name)
    return archive.read(found)


def _matching(archive: zipfile.ZipFile, pattern: str) -> list[re.Match[str]]:
    """The files whose path matches, sorted by path."""
    matches = [found for name in sorted(archive.namelist()) if (found := re.fullmatch(pattern, name))]
    if not matches:
        raise ValueError(f"it holds no file like {pattern}")
    return matches
