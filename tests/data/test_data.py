"""Data sets, their sources, the defender's share, augmentation and poisoning."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoor_jax import Dataset, Task, UserError, digits, load, make_dataset
from backdoor_jax.data import (
    DATASETS,
    SOURCES,
    Augment,
    LabelMap,
    TFDSSet,
    clean_indices,
    npz_task,
    poison,
    random_crop,
)

RANDOM = np.random.default_rng(5)


def noise(count: int, side: int = 6, channels: int = 3) -> np.ndarray:
    shape = (count, side, side, channels)
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


# Data sets


def test_a_dataset_keeps_the_given_images_and_labels() -> None:
    images, labels = noise(4), np.array([2, 0, 1, 2], np.uint8)
    data = make_dataset(images, labels, 3)
    assert (data.images.dtype, data.labels.dtype, len(data)) == (jnp.uint8, jnp.int32, 4)
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)
    part = data.take(np.array([3, 1]))
    np.testing.assert_array_equal(part.images, images[[3, 1]])
    np.testing.assert_array_equal(part.labels, [2, 0])


@pytest.mark.parametrize(
    ("images", "labels", "fix"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, int), "astype"),
        (np.zeros((2, 4, 4, 3), np.int64), np.zeros(2, int), "astype"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int), r"expected \(N, height, width, 1 or 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2, int), r"expected \(N, height, width, 1 or 3\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), "expected integers"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int), r"expected integers of shape \(2,\), one for each image"),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            np.zeros((2, 3), int),
            r"expected integers of shape \(2,\), one for each image",
        ),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, int), "no images"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 3]), "right number of classes"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([-1, 0]), "relabel from 0"),
    ],
)
def test_arrays_that_are_no_dataset_are_refused_with_the_fix(images: np.ndarray, labels: np.ndarray, fix: str) -> None:
    with pytest.raises(UserError, match=f"^suspect: .*{fix}"):
        make_dataset(images, labels, 3, "suspect")


def test_labels_below_zero_are_refused_without_a_class_count() -> None:
    with pytest.raises(UserError, match="relabel from 0"):
        make_dataset(noise(2), np.array([-1, 0]))


# The defender's share


@settings(max_examples=10)
@given(count=st.integers(1, 60), ratio=st.floats(0.05, 1.0))
def test_clean_indices_are_exactly_as_many_as_asked_for_without_duplicates(count: int, ratio: float) -> None:
    expected = round(ratio * count)
    if not expected:
        with pytest.raises(UserError, match="leaves none; take at least"):
            clean_indices(jax.random.key(0), np.zeros(count, int), ratio, 1)
        return
    chosen = clean_indices(jax.random.key(0), np.zeros(count, int), ratio, 1)
    assert len(chosen) == expected
    assert np.all(np.diff(chosen) > 0) and chosen[0] >= 0 and chosen[-1] < count


@settings(max_examples=10)
@given(counts=st.lists(st.integers(1, 12), min_size=2, max_size=4), ratio=st.floats(0.01, 1.0))
def test_a_stratified_share_has_its_part_of_each_class_and_at_least_one_image(counts: list[int], ratio: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    chosen = clean_indices(jax.random.key(0), labels, ratio, len(counts), stratified=True)
    assert np.all(np.diff(chosen) > 0)
    assert np.bincount(labels[chosen]).tolist() == [max(1, round(ratio * count)) for count in counts]


def test_clean_indices_depend_on_the_key(key: jax.Array) -> None:
    labels = np.arange(60) % 3
    for stratified in (False, True):
        first, again, other = (clean_indices(k, labels, 0.2, 3, stratified) for k in (key, key, jax.random.key(9)))
        np.testing.assert_array_equal(first, again)
        assert first.tolist() != other.tolist()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(key: jax.Array, ratio: float) -> None:
    with pytest.raises(UserError, match=r"expected a (share in|finite number)"):
        clean_indices(key, np.zeros(10, int), ratio, 1)


@pytest.mark.parametrize(("labels", "classes", "empty"), [([0, 2, 2], 3, 1), ([0, 1], 3, 2)])
def test_a_stratified_share_of_an_empty_class_is_refused(
    key: jax.Array, labels: list[int], classes: int, empty: int
) -> None:
    with pytest.raises(UserError, match=f"class {empty} has no images.*set stratified to false"):
        clean_indices(key, np.array(labels), 0.5, classes, stratified=True)


# Sources


def test_sources_are_the_records_and_the_open_kinds() -> None:
    assert list(SOURCES) == [*DATASETS, "FILE.npz", "FOLDER", "tfds:NAME"]
    for source, spec in DATASETS.items():
        assert (spec.source, spec.summary) == (source, SOURCES[source])
    assert [source for source, spec in DATASETS.items() if spec.flip] == ["tfds:cifar10"]


def test_digits_are_those_of_scikit_learn_enlarged_and_in_order() -> None:
    from sklearn.datasets import load_digits

    raw, task = load_digits(), digits()
    assert (task.train.images.shape, task.test.images.shape) == ((1400, 16, 16, 3), (397, 16, 16, 3))
    images = np.concatenate([task.train.images, task.test.images])
    assert np.all(images == images[..., :1])
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(images[:, row::2, column::2, 0], np.rint(raw.images / 16 * 255))
    np.testing.assert_array_equal(np.concatenate([task.train.labels, task.test.labels]), raw.target)
    assert (task.num_classes, task.normalization, task.flip) == (10, "none", False)


def arrays(**changes: Any) -> dict[str, Any]:
    entries = {
        "train_images": noise(8),
        "train_labels": np.arange(8) % 4,
        "test_images": noise(4),
        "test_labels": np.arange(4) % 3,
        **changes,
    }
    return {name: value for name, value in entries.items() if value is not None}


def test_an_npz_file_becomes_a_task(tmp_path: Path) -> None:
    entries = arrays()
    np.savez(tmp_path / "mine.npz", **entries)
    task = load("mine.npz", root=tmp_path)
    assert (task.name, task.num_classes, task.normalization, task.flip) == ("mine", 4, "none", False)
    np.testing.assert_array_equal(task.train.images, entries["train_images"])
    np.testing.assert_array_equal(task.train.labels, entries["train_labels"])
    np.testing.assert_array_equal(task.test.images, entries["test_images"])
    np.testing.assert_array_equal(task.test.labels, entries["test_labels"])


def test_an_npz_file_may_give_classes_normalization_and_flip(tmp_path: Path) -> None:
    named = arrays(class_names=np.array(list("abcdef")), normalization=np.str_("cifar10"), flip=np.bool_(True))
    np.savez_compressed(tmp_path / "mine.npz", **named)
    task = npz_task(tmp_path / "mine.npz")
    assert (task.num_classes, task.normalization, task.flip) == (6, "cifar10", True)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"test_images": None, "train_labels": None}, "lacks train_labels, test_images; it must hold"),
        ({"train_images": np.zeros((8, 6, 6, 3), np.float32)}, "train: images are float32, expected uint8"),
        ({"test_labels": np.zeros(4, np.float32)}, "test: labels are float32"),
        ({"train_labels": np.array(["cat"] * 8)}, "train: labels are"),
        ({"class_names": np.array(["a", "b"])}, "train: labels run from 0 to 3, expected 0 to 2 - 1"),
        ({"test_labels": np.full(4, -2)}, "test: labels run from -2"),
        ({"train_labels": np.array([{"a": 1}] * 8, dtype=object)}, "cannot be read as a plain .npz"),
    ],
    ids=["missing", "dtype", "labels_dtype", "labels_text", "too_few_classes", "negative", "pickled"],
)
def test_an_npz_file_with_other_contents_is_refused(tmp_path: Path, changes: dict[str, Any], fix: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays(**changes))
    with pytest.raises(UserError, match=f"bad.npz.*{fix}"):
        npz_task(tmp_path / "bad.npz")


def damaged(kind: str) -> bytes:
    archive, array = io.BytesIO(), io.BytesIO()
    np.savez(archive, **arrays())
    np.save(array, noise(1))
    return {"empty": b"", "text": b"hello", "truncated": archive.getvalue()[:200], "npy": array.getvalue()}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "npy"])
def test_a_damaged_or_foreign_npz_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "bad.npz").write_bytes(damaged(kind))
    with pytest.raises(UserError, match=r"bad\.npz"):
        npz_task(tmp_path / "bad.npz")


def test_a_missing_file_and_an_unknown_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.npz: no such file; give a .npz with train_images"):
        load("absent.npz", root=tmp_path)
    with pytest.raises(UserError, match="unknown data 'cifar'; give 'signs', 'digits'"):
        load("cifar")


def test_part_of_a_task_is_drawn_by_the_seed_in_the_original_order(tmp_path: Path) -> None:
    entries = arrays(train_images=noise(40), train_labels=np.arange(40) % 4)
    np.savez(tmp_path / "mine.npz", **entries)
    first, again, other = (load("mine.npz", 10, 3, seed, tmp_path) for seed in (1, 1, 2))
    assert (len(first.train), len(first.test), first.num_classes) == (10, 3, 4)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)
    originals = [image.tobytes() for image in entries["train_images"]]
    places = [originals.index(np.asarray(image).tobytes()) for image in first.train.images]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(first.train.labels, entries["train_labels"][places])
    assert first.left_out is not None
    assert sorted(originals.index(np.asarray(image).tobytes()) for image in first.left_out.images) == sorted(
        set(range(40)) - set(places)
    )
    assert load("mine.npz", 40, root=tmp_path).left_out is load("mine.npz", root=tmp_path).left_out is None


@pytest.mark.parametrize(("sizes", "field"), [((9, None), "train"), ((None, 5), "test"), ((0, None), "train")])
def test_more_images_than_there_are_is_refused(
    tmp_path: Path, sizes: tuple[int | None, int | None], field: str
) -> None:
    np.savez(tmp_path / "mine.npz", **arrays())
    with pytest.raises(UserError, match=f"{field} images were asked for, there are .*lower {field}_size"):
        load("mine.npz", *sizes, root=tmp_path)


@pytest.fixture(scope="module")
def tfds_examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[np.ndarray, int]]]:
    """The contents of the TFDS set `tiny_noise`, which is prepared as array_record where TFDS looks for data."""
    import tensorflow_datasets as tfds
    from PIL import Image

    pairs = [(image, number % 3) for number, image in enumerate(noise(10))]
    examples = {"train": pairs[:7], "test": pairs[7:]}

    with tfds.core.registered.skip_registration():

        class TinyNoise(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=(6, 6, 3)),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
                return {split: self._generate_examples(split) for split in examples}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
                for number, (image, label) in enumerate(examples[split]):
                    file = io.BytesIO()
                    Image.fromarray(image).save(file, "PNG")
                    yield number, {"image": file.getvalue(), "label": label}

    folder = tmp_path_factory.mktemp("tfds")
    TinyNoise(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    return examples


@pytest.mark.parametrize(
    "read", [lambda name: TFDSSet(name=name).load(), lambda name: load(f"tfds:{name}")], ids=["TFDSSet", "load"]
)
def test_a_tfds_set_is_read_image_by_image(
    tfds_examples: dict[str, list[tuple[np.ndarray, int]]], read: Callable[[str], Task]
) -> None:
    task = read("tiny_noise")
    assert (task.name, task.num_classes, task.normalization, task.flip) == ("tiny_noise", 3, "none", False)
    for split, examples in tfds_examples.items():
        data = getattr(task, split)
        got = [(np.asarray(image).tobytes(), int(label)) for image, label in zip(data.images, data.labels, strict=True)]
        assert sorted(got) == sorted((image.tobytes(), label) for image, label in examples)


def test_an_unknown_tfds_name_is_a_one_line_error() -> None:
    with pytest.raises(UserError, match=r"^tfds:no_such_set_at_all .*not found") as caught:
        load("tfds:no_such_set_at_all")
    assert "\n" not in str(caught.value)


# Augmentation


@pytest.mark.parametrize("channels", [1, 3])
def test_random_crop_cuts_every_window_of_the_padded_image(key: jax.Array, channels: int) -> None:
    images, pad, side = noise(60, channels=channels), 1, 6
    crops = np.asarray(random_crop(key, jnp.asarray(images), pad))
    assert crops.shape == images.shape and crops.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = set()
    for crop, image in zip(crops, padded, strict=True):
        found = [
            (row, column)
            for row in range(2 * pad + 1)
            for column in range(2 * pad + 1)
            if np.array_equal(crop, image[row : row + side, column : column + side])
        ]
        assert len(found) == 1
        corners.update(found)
    assert len(corners) == (2 * pad + 1) ** 2


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others(key: jax.Array) -> None:
    images = noise(64)
    out = np.asarray(Augment(flip=True)(key, jnp.asarray(images)))
    same = np.all(out == images, axis=(1, 2, 3))
    mirrored = np.all(out == images[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 16 < mirrored.sum() < 48


def test_brightness_scales_each_image_by_one_factor_in_range(key: jax.Array) -> None:
    images = noise(40).astype(int)
    out = np.asarray(Augment(brightness=0.4)(key, jnp.asarray(images, jnp.uint8)))
    assert out.dtype == np.uint8
    factors = []
    for image, result in zip(images, out.astype(int), strict=True):
        brightest = np.where(result < 255, image, 0).argmax()
        factor = result.flat[brightest] / image.flat[brightest]
        assert np.abs(result - np.clip(factor * image, 0, 255)).max() <= 1.5
        factors.append(factor)
    assert 0.58 < min(factors) < 0.75 and 1.25 < max(factors) < 1.42


def test_contrast_scales_each_image_about_its_mean_gray_level(key: jax.Array) -> None:
    images = RANDOM.integers(80, 176, (40, 6, 6, 3))
    out = np.asarray(Augment(contrast=0.4)(key, jnp.asarray(images, jnp.uint8)))
    assert out.dtype == np.uint8
    factors = []
    for image, result in zip(images, out.astype(int), strict=True):
        gray = (image @ [0.299, 0.587, 0.114]).mean()
        factor, offset = np.polyfit(image.ravel(), result.ravel(), 1)
        assert np.abs(result - (gray + factor * (image - gray))).max() <= 1.0
        assert offset == pytest.approx((1 - factor) * gray, abs=1.0)
        factors.append(factor)
    assert 0.58 < min(factors) < 0.75 and 1.25 < max(factors) < 1.42


def test_contrast_leaves_a_uniform_gray_image_unchanged(key: jax.Array) -> None:
    plain = jnp.full((5, 6, 6, 1), 77, jnp.uint8)
    np.testing.assert_array_equal(Augment(contrast=0.9)(key, plain), plain)


@pytest.mark.parametrize(
    "augment",
    [Augment(2), Augment(flip=True), Augment(brightness=2.0), Augment(contrast=2.0), Augment(2, True, 0.5, 0.5)],
)
def test_augmentation_depends_on_the_key_and_keeps_shape_and_dtype(key: jax.Array, augment: Augment) -> None:
    images = jnp.asarray(noise(6))
    first, again, other = augment(key, images), jax.jit(augment)(key, images), augment(jax.random.key(9), images)
    assert first.shape == images.shape and first.dtype == jnp.uint8
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_augmentation_is_the_identity(key: jax.Array) -> None:
    images = jnp.asarray(noise(3))
    np.testing.assert_array_equal(Augment()(key, images), images)


# Poisoning


def invert(images: jax.Array) -> jax.Array:
    return 255 - images


@settings(max_examples=10)
@given(count=st.integers(0, 30), seed=st.integers(0, 3), kind=st.sampled_from(["all_to_one", "all_to_all"]))
def test_poisoning_triggers_and_relabels_exactly_its_share_and_nothing_else(count: int, seed: int, kind: Any) -> None:
    clean = make_dataset(noise(30), np.arange(30) % 3, 3)
    poisoned, indices = poison(jax.random.key(seed), clean, invert, LabelMap(kind, 3, target=1), count / 30)
    assert len(indices) == count
    assert np.all(np.diff(indices) > 0) and set(indices) <= set(range(30))
    expected_images, expected_labels = np.array(clean.images), np.array(clean.labels)
    expected_images[indices] = 255 - expected_images[indices]
    expected_labels[indices] = 1 if kind == "all_to_one" else (expected_labels[indices] + 1) % 3
    np.testing.assert_array_equal(poisoned.images, expected_images)
    np.testing.assert_array_equal(poisoned.labels, expected_labels)
    assert (poisoned.images.dtype, poisoned.labels.dtype) == (clean.images.dtype, clean.labels.dtype)


@pytest.mark.parametrize(("rate", "count"), [(0.1, 2), (0.34, 8), (0.999, 24), (0.03, 1)])
def test_a_share_between_integers_is_rounded(key: jax.Array, tiny_data: Dataset, rate: float, count: int) -> None:
    assert len(poison(key, tiny_data, invert, LabelMap("all_to_one", 3), rate).indices) == count


def test_poisoning_depends_on_the_key_and_draws_from_every_class(key: jax.Array) -> None:
    clean = make_dataset(noise(60), np.arange(60) % 3, 3)
    draws = [poison(k, clean, invert, LabelMap("all_to_one", 3), 0.5).indices for k in (key, key, jax.random.key(9))]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert draws[0].tolist() != draws[2].tolist()
    assert set(np.asarray(clean.labels)[draws[0]]) == {0, 1, 2}


def test_a_rate_of_zero_gives_the_clean_set(key: jax.Array, tiny_data: Dataset) -> None:
    poisoned, indices = poison(key, tiny_data, invert, LabelMap("all_to_one", 3), 0.0)
    assert indices.shape == (0,)
    np.testing.assert_array_equal(poisoned.images, tiny_data.images)
    np.testing.assert_array_equal(poisoned.labels, tiny_data.labels)


def test_a_positive_rate_that_poisons_nothing_is_refused(key: jax.Array, tiny_data: Dataset) -> None:
    with pytest.raises(UserError, match=r"0\.02 of 24 images poisons none; give at least"):
        poison(key, tiny_data, invert, LabelMap("all_to_one", 3), 0.02)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_poisoning_rate_outside_its_range_is_refused(key: jax.Array, tiny_data: Dataset, rate: float) -> None:
    with pytest.raises(UserError, match=r"rate is .*(such as 0\.1|a finite number)"):
        poison(key, tiny_data, invert, LabelMap("all_to_one", 3), rate)


@settings(max_examples=10)
@given(classes=st.integers(2, 40))
def test_all_to_all_is_a_permutation_without_fixed_points(classes: int) -> None:
    labels = np.arange(classes)
    label_map = LabelMap("all_to_all", classes)
    mapped = np.asarray(label_map(jnp.asarray(labels)))
    assert sorted(mapped) == labels.tolist() and np.all(mapped != labels)


def test_all_to_one_maps_every_class_to_its_target() -> None:
    assert LabelMap("all_to_one", 4, target=2)(jnp.arange(4)).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_that_is_not_a_class_is_refused(target: int) -> None:
    with pytest.raises(UserError, match=f"target class {target} does not exist; the data have classes 0 to 2"):
        LabelMap("all_to_one", 3, target)


def test_an_unknown_label_map_is_refused() -> None:
    with pytest.raises(UserError, match="everything"):
        LabelMap("everything", 3)  # type: ignore[arg-type]
