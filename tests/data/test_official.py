"""Official archives, made here with a few images in each, become TFDS sets and tasks; other TFDS sets."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from backdoor_jax import Task, UserError, files
from backdoor_jax.data import DATASETS, TFDSSet
from backdoor_jax.data.official import Archive, OfficialSet
from backdoor_jax.models import NORMALIZATIONS
from backdoor_jax.pickles import PlainUnpickler

OFFICIAL = {spec.name: spec for spec in DATASETS.values() if isinstance(spec, OfficialSet)}

# Archives in the official layout


class Split(NamedTuple):
    """The expected contents of a split."""

    images: np.ndarray
    labels: list[int]


class Contents(NamedTuple):
    """The expected contents of a data set's archives."""

    train: Split
    test: Split
    class_names: list[str]


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def pickled(value: Any) -> bytes:
    """A pickle as NumPy wrote it in the time of Python 2."""
    return pickle.dumps(value, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def batch(split: Split, prefix: bytes) -> bytes:
    planes = split.images.transpose(0, 3, 1, 2).reshape(-1, 3072)
    return pickled({b"data": np.ascontiguousarray(planes), prefix + b"labels": split.labels, b"filenames": [b"a.png"]})


def cifar10(manual: Path, seed: int = 0) -> Contents:
    names = [f"kind {label}" for label in range(10)]
    train = Split(noise(seed, 15, 32, 32, 3), [(7 * number + seed) % 10 for number in range(15)])
    test = Split(noise(seed, 4, 32, 32, 3), [9, 0, 3, 3])
    parts = {
        f"data_batch_{n}": Split(train.images[3 * n - 3 : 3 * n], train.labels[3 * n - 3 : 3 * n]) for n in range(1, 6)
    }
    files = {"readme.html": b"<p>", "batches.meta": pickled({b"label_names": [name.encode() for name in names]})}
    for name in ("data_batch_4", "test_batch", "data_batch_3", "data_batch_2", "data_batch_5", "data_batch_1"):
        files[name] = batch({**parts, "test_batch": test}[name], b"")
    write_tar(manual / "cifar-10-python.tar.gz", {f"cifar-10-batches-py/{name}": files[name] for name in files})
    return Contents(train, test, names)


def cifar100(manual: Path) -> Contents:
    names = [f"fine {label}" for label in range(100)]
    train = Split(noise(1, 6, 32, 32, 3), [99, 0, 50, 3, 4, 5])
    test = Split(noise(1, 3, 32, 32, 3), [1, 99, 2])
    coarse = {b"coarse_label_names": [b"coarse"], b"fine_label_names": [name.encode() for name in names]}
    files = {"train": batch(train, b"fine_"), "test": batch(test, b"fine_"), "meta": pickled(coarse)}
    write_tar(manual / "cifar-100-python.tar.gz", {f"cifar-100-python/{name}": files[name] for name in files})
    return Contents(train, test, names)


def gtsrb(manual: Path) -> Contents:
    sizes = [(15, 16), (40, 32), (32, 32), (66, 50), (120, 121)]

    def signs(labels: list[int]) -> tuple[list[bytes], Split]:
        frames = [noise(label, *sizes[number % 5], 3) for number, label in enumerate(labels)]
        small = [np.asarray(Image.fromarray(f).resize((32, 32), Image.Resampling.BILINEAR)) for f in frames]
        return [encoded(frame, "PPM") for frame in frames], Split(np.stack(small), labels)

    files, train = signs([0, 0, 0, 2, 2, 42])
    paths = ["00000/00000_00000", "00000/00000_00001", "00000/00001_00000"]
    paths += ["00002/00000_00000", "00002/00000_00001", "00042/00000_00000"]
    training = {f"GTSRB/Final_Training/Images/{path}.ppm": file for path, file in zip(paths, files, strict=True)}
    tables = {f"GTSRB/Final_Training/Images/{label:05d}/GT-{label:05d}.csv": b"Filename" for label in (0, 2, 42)}
    write_zip(manual / "GTSRB_Final_Training_Images.zip", dict(reversed((tables | training).items())))

    files, test = signs([7, 42, 0, 13])
    paths = [f"{number:05d}.ppm" for number in range(4)]
    frames = {f"GTSRB/Final_Test/Images/{path}": file for path, file in zip(paths, files, strict=True)}
    write_zip(manual / "GTSRB_Final_Test_Images.zip", dict(reversed(frames.items())))
    table = io.StringIO()
    rows = csv.writer(table, delimiter=";")
    rows.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
    rows.writerows([path, 30, 30, 5, 5, 25, 25, label] for path, label in zip(paths, test.labels, strict=True))
    write_zip(manual / "GTSRB_Final_Test_GT.zip", {"GT-final_test.csv": table.getvalue().encode()})
    return Contents(train, test, [f"{label:05d}" for label in range(43)])


def tiny_imagenet(manual: Path) -> Contents:
    wnids = ["n02124075", "n01443537", "n12267677"]  # Not sorted, as in the archive.
    sorted_ids = sorted(wnids)

    def photographs(labels: list[int]) -> tuple[list[bytes], Split]:
        """JPEG files, the second one gray."""
        files = [encoded(noise(number, 64, 64, *([] if number == 1 else [3])), "JPEG") for number in range(len(labels))]
        return files, Split(np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files]), labels)

    files, train = photographs([0, 0, 0, 1, 2, 2])
    numbers = (0, 1, 10, 3, 0, 2)
    paths = [
        f"train/{sorted_ids[i]}/images/{sorted_ids[i]}_{n}.JPEG" for i, n in zip(train.labels, numbers, strict=True)
    ]
    entries = dict(reversed(list(zip(paths, files, strict=True))))
    files, test = photographs([2, 0, 1])
    names = [f"val_{number}.JPEG" for number in (0, 1, 10)]
    entries |= {f"val/images/{name}": file for name, file in zip(names, files, strict=True)}
    lines = [f"{name}\t{sorted_ids[i]}\t0\t32\t44\t62\n" for name, i in zip(names, test.labels, strict=True)]
    entries |= {"val/val_annotations.txt": "".join(lines).encode(), "wnids.txt": "\n".join(wnids).encode()}
    write_zip(manual / "tiny-imagenet-200.zip", {f"tiny-imagenet-200/{name}": entries[name] for name in entries})
    return Contents(train, test, sorted_ids)


LAYOUTS: dict[str, Callable[[Path], Contents]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "gtsrb": gtsrb,
    "tiny_imagenet": tiny_imagenet,
}


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    """The manual directory of the data directory `tmp_path`."""
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refused)


def task_of(name: str, data_dir: Path) -> Task:
    """The task of an official set, or of another TFDS set, in a data directory."""
    return dataclasses.replace(OFFICIAL.get(name, TFDSSet(name=name)), data_dir=data_dir).load()


def load(name: str, data_dir: Path) -> Task:
    """The task, without the warning that the archives are small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return task_of(name, data_dir)


def assert_split(got: Any, expected: Split) -> None:
    np.testing.assert_array_equal(got.images, expected.images)
    np.testing.assert_array_equal(got.labels, expected.labels)


def refusal(name: str, data_dir: Path) -> str:
    """The error of a set that must not load; nothing may be prepared in part."""
    with pytest.raises(UserError) as caught:
        load(name, data_dir)
    assert "\n" not in str(caught.value)
    assert not list(data_dir.glob(f"backdoor_jax_{name}/*"))
    return str(caught.value)


# Reading


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_archives_become_a_task_and_a_tfds_set(name: str, tmp_path: Path, manual: Path) -> None:
    expected = LAYOUTS[name](manual)
    with pytest.warns(UserWarning, match=rf"^tfds:{name}: the archives hold .* images, the official ones "):
        task = task_of(name, tmp_path)
    assert (task.name, task.num_classes, task.normalization) == (name, len(expected.class_names), name)
    assert task.flip is (name == "cifar10")
    assert NORMALIZATIONS[task.normalization] == OFFICIAL[name].normalization

    info = tfds.builder(f"backdoor_jax_{name}", data_dir=tmp_path).info
    assert info.features["label"].names == expected.class_names
    assert info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    for part, split in (("train", expected.train), ("test", expected.test)):
        assert_split(getattr(task, part), split)
        source = tfds.data_source(f"backdoor_jax_{name}", split=part, data_dir=tmp_path)
        np.testing.assert_array_equal([example["image"] for example in source], split.images)
        assert [example["label"] for example in source] == split.labels


def test_a_set_is_found_through_the_environment_and_needs_no_tensorflow(tmp_path: Path, manual: Path) -> None:
    expected = cifar10(manual)
    program = """
import sys
import backdoor_jax
print("tensorflow_datasets" in sys.modules)
task = backdoor_jax.load("tfds:cifar10", train_size=4)
print("tensorflow" in sys.modules, len(task.train), *task.test.labels.tolist())
"""
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "False"
    assert lines[-1] == " ".join(map(str, ["False", 4, *expected.test.labels]))


def test_tfds_keeps_its_own_builders(tmp_path: Path) -> None:
    assert type(tfds.builder("cifar10", data_dir=tmp_path)).__module__.startswith("tensorflow_datasets.")
    assert not set(tfds.core.registered.list_imported_builders()) & {f"backdoor_jax_{name}" for name in OFFICIAL}


def test_every_official_set_has_a_layout_here() -> None:
    assert list(OFFICIAL) == list(LAYOUTS)


# The cache of decoded images


@pytest.fixture
def prepared(tmp_path: Path, manual: Path) -> Contents:
    """CIFAR-10, prepared and decoded in `tmp_path`."""
    contents = cifar10(manual)
    load("cifar10", tmp_path)
    return contents


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "backdoor_jax_cifar10" / "1.0.0" / "decoded.npz"


def test_decoded_images_are_read_again_without_decoding(
    tmp_path: Path, prepared: Contents, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", None)
    task = task_of("cifar10", tmp_path)
    assert_split(task.train, prepared.train)
    assert_split(task.test, prepared.test)
    assert [path.name for path in cache.parent.glob("*npz*")] == ["decoded.npz"]


def damaged(kind: str, good: bytes) -> bytes:
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    return {"empty": b"", "text": b"hello", "truncated": good[:middle], "flipped": flipped}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "flipped"])
def test_a_damaged_cache_is_written_again(kind: str, tmp_path: Path, prepared: Contents, cache: Path) -> None:
    good = cache.read_bytes()
    cache.write_bytes(damaged(kind, good))
    assert_split(task_of("cifar10", tmp_path).train, prepared.train)
    with np.load(cache) as arrays:
        np.testing.assert_array_equal(arrays["train_images"], prepared.train.images)


@pytest.mark.usefixtures("prepared")
def test_a_cache_of_other_records_is_not_used(tmp_path: Path, manual: Path, cache: Path) -> None:
    old = cache.read_bytes()
    shutil.rmtree(cache.parent)
    expected = cifar10(manual, seed=1)
    load("cifar10", tmp_path)
    cache.write_bytes(old)
    assert_split(task_of("cifar10", tmp_path).train, expected.train)


def test_a_folder_that_is_not_writable_is_read_without_a_cache(
    tmp_path: Path, prepared: Contents, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError("read-only")

    cache.unlink()
    monkeypatch.setattr(files.os, "replace", refused)
    assert_split(task_of("cifar10", tmp_path).train, prepared.train)
    assert not list(cache.parent.glob("*npz*"))


# Archives that cannot be used


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, manual: Path) -> None:
    files = {"batches.meta": pickled({b"label_names": [b"a"], b"extra": Attack(tmp_path / "ran")})}
    write_tar(manual / "cifar-10-python.tar.gz", {f"cifar-10-batches-py/{name}": files[name] for name in files})
    line = refusal("cifar10", tmp_path)
    assert "cifar-10-python.tar.gz: cannot be read" in line and "its pickle asks for " in line
    assert not (tmp_path / "ran").exists()


def test_strings_of_python_2_are_read_as_bytes() -> None:
    written = b"\x80\x02}U\x06labels]K\x03as."
    assert PlainUnpickler(written, encoding="bytes").load() == {b"labels": [3]}


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("gtsrb", "GTSRB_Final_Training_Images.zip"),
        ("gtsrb", "GTSRB_Final_Test_GT.zip"),
        ("tiny_imagenet", "tiny-imagenet-200.zip"),
    ],
)
def test_a_damaged_archive_is_a_one_line_error_and_leaves_nothing_behind(
    kind: str, name: str, file: str, tmp_path: Path, manual: Path
) -> None:
    LAYOUTS[name](manual)
    (manual / file).write_bytes(damaged(kind, (manual / file).read_bytes()))
    line = refusal(name, tmp_path)
    assert line.startswith(f"{manual / file}: cannot be read as the official archive (")
    assert f"delete it and download it again from {url(name, file)}" in line


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_archive_with_other_contents_is_refused(name: str, tmp_path: Path, manual: Path) -> None:
    LAYOUTS[name](manual)
    file = OFFICIAL[name].archives[0].name
    write = write_zip if file.endswith(".zip") else write_tar
    write(manual / file, {"holiday/beach.jpg": b"sea"})
    assert refusal(name, tmp_path).startswith(f"{manual / file}: cannot be read as the official archive (")


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_without_a_class_is_refused(label: int, tmp_path: Path, manual: Path) -> None:
    cifar10(manual)
    with tarfile.open(manual / "cifar-10-python.tar.gz") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    files["cifar-10-batches-py/test_batch"] = batch(Split(noise(0, 2, 32, 32, 3), [0, label]), b"")
    write_tar(manual / "cifar-10-python.tar.gz", files)
    assert f"test image 1 has label {label}, expected 0 to 9" in refusal("cifar10", tmp_path)


# Missing archives


def url(name: str, file: str) -> str:
    return next(archive.url for archive in OFFICIAL[name].archives if archive.name == file)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", OFFICIAL)
def test_without_a_network_the_error_says_which_files_to_put_where(name: str, tmp_path: Path) -> None:
    line = refusal(name, tmp_path)
    assert line.startswith(f"tfds:{name} is not prepared, and {OFFICIAL[name].archives[0].name} cannot be")
    assert "no route" in line and str(tmp_path / "downloads" / "manual") in line
    assert all(
        archive.name in line and archive.url.removesuffix(archive.name) in line for archive in OFFICIAL[name].archives
    )
    assert not list((tmp_path / "downloads" / "manual").iterdir())


@pytest.mark.usefixtures("offline")
def test_the_error_asks_only_for_missing_archives(tmp_path: Path, manual: Path) -> None:
    gtsrb(manual)
    (manual / "GTSRB_Final_Test_GT.zip").unlink()
    line = refusal("gtsrb", tmp_path)
    assert "GTSRB_Final_Test_GT.zip from https://" in line and "Images.zip" not in line


@pytest.mark.parametrize("published", ["correct", "wrong"])
def test_an_archive_is_downloaded_and_its_checksum_checked(
    published: str, tmp_path: Path, manual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cifar10(tmp_path)
    served = tmp_path / "cifar-10-python.tar.gz"
    md5 = hashlib.md5(served.read_bytes()).hexdigest() if published == "correct" else "0" * 32
    changed = dataclasses.replace(OFFICIAL["cifar10"], archives=(Archive(served.as_uri(), md5),))
    monkeypatch.setitem(OFFICIAL, "cifar10", changed)
    if published == "correct":
        assert_split(load("cifar10", tmp_path).test, expected.test)
        assert [path.name for path in manual.iterdir()] == [served.name]
    else:
        line = refusal("cifar10", tmp_path)
        assert f"published is {md5}" in line and served.name in line
        assert not list(manual.iterdir())


# Other TFDS sets


def write_set(data_dir: Path, examples: dict[str, list[dict[str, Any]]], features: dict[str, Any]) -> None:
    """Prepares the TFDS set ``foreign`` as array_record."""

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            return {split: self._generate_examples(split) for split in examples}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from enumerate(examples[split])

    Foreign(data_dir=data_dir, file_format="array_record").download_and_prepare()


def examples(*shapes: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [{"image": Image.fromarray(noise(0, *shape)), "label": 1} for shape in shapes]


LABELED = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, {"train": examples((6, 6, 3), (5, 7, 3)), "test": examples((6, 6, 3))}, LABELED)
    with pytest.raises(UserError, match=r"^tfds:foreign: train image 1 is .*, the first .*expected equal shapes"):
        task_of("foreign", tmp_path)


def test_a_set_without_labels_or_a_test_split_is_refused(tmp_path: Path) -> None:
    images = [{"image": example["image"]} for example in examples((6, 6, 3))]
    write_set(tmp_path, {"train": images}, {"image": tfds.features.Image()})
    with pytest.raises(UserError, match=r"^tfds:foreign has no label, test; expected features image and label"):
        task_of("foreign", tmp_path)


def test_tfrecord_without_tensorflow_is_a_one_line_error_that_says_how_to_prepare(tmp_path: Path) -> None:
    write_set(tmp_path, {split: examples((6, 6, 3)) for split in ("train", "test")}, LABELED)
    assert len(task_of("foreign", tmp_path).train) == 1
    path = tmp_path / "foreign" / "1.0.0" / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fileFormat": "tfrecord"}))
    with pytest.raises(
        UserError, match=r"^tfds:foreign is prepared in .* as tfrecord, which only TensorFlow can read"
    ) as caught:
        task_of("foreign", tmp_path)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)
    assert "tfds.builder('foreign', file_format='array_record').download_and_prepare()" in str(caught.value)


def test_a_tfds_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tfds:mnist is not in .*; prepare it as array_record: tfds.builder\('mnist'"):
        task_of("mnist", tmp_path)
