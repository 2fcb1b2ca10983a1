"""The records of the data sets: one `DatasetSpec` each, with everything the package knows about it.

Normalizations are the published benchmark's. To add a data set, add its record here.

    >>> cifar10 = DATASETS["tfds:cifar10"]
    >>> cifar10.flip, cifar10.normalization
    (True, ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)))
"""

import dataclasses
import functools

import jax
import numpy as np

from backdoor_jax.data.dataset import DatasetSpec, Splits, make_dataset
from backdoor_jax.data.official import GTSRB, Archive, Cifar, TinyImageNet
from backdoor_jax.data.traffic_signs import SIGNS, draw_signs

DIGITS_TRAIN = 1400
SIGNS_TRAIN, SIGNS_TEST = 6000, 2000


class Digits(DatasetSpec):
    """scikit-learn's handwritten digits, embedded in that package: no network, no files.

    8x8 gray levels 0 to 16 become 16x16 RGB images of uint8: scaled to 255, every pixel doubled. 1,400 images are for
    training, 397 for testing, in the set's own order, in which the writers of the two hardly overlap.
    """

    def read(self) -> Splits:
        """The images and labels."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        gray = np.round(raw.images * (255 / 16)).astype(np.uint8)
        images = np.repeat(gray.repeat(2, 1).repeat(2, 2)[..., None], 3, axis=-1)
        train, test = (
            make_dataset(images[part], raw.target[part], 10, "digits")
            for part in (slice(DIGITS_TRAIN), slice(DIGITS_TRAIN, None))
        )
        return Splits(train, test, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signs(DatasetSpec):
    """Synthetic traffic signs, drawn from a key; 6,000 images are for training, 2,000 for testing.

    Attributes:
        key: a `jax.random` key; ``jax.random.key(0)`` by default.
    """

    key: jax.Array | None = None

    def read(self) -> Splits:
        """The images and labels."""
        key = jax.random.key(0) if self.key is None else self.key
        images, labels = _drawn_signs(tuple(np.asarray(jax.random.key_data(key)).ravel().tolist()))
        train, test = (
            make_dataset(images[part], labels[part], len(SIGNS), "signs")
            for part in (slice(SIGNS_TRAIN), slice(SIGNS_TRAIN, None))
        )
        return Splits(train, test, len(SIGNS), tuple(sign.name for sign in SIGNS))


@functools.lru_cache(maxsize=2)
def _drawn_signs(words: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from the words of a key, drawn once a process."""
    return draw_signs(np.random.default_rng(words), SIGNS_TRAIN + SIGNS_TEST)


SPECS: tuple[DatasetSpec, ...] = (
    Signs(name="signs", summary="synthetic traffic signs, 32x32, 16 classes, drawn in seconds"),
    Digits(name="digits", summary="scikit-learn's 1,797 handwritten digits, embedded"),
    Cifar(
        name="cifar10",
        summary="CIFAR-10, 32x32, 10 classes; from cifar-10-python.tar.gz",
        reference="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        normalization=((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        flip=True,
        archives=(
            Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        ),
        images={"train": 50_000, "test": 10_000},
        folder="cifar-10-batches-py",
        batches={"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
    ),
    Cifar(
        name="cifar100",
        summary="CIFAR-100, 32x32, 100 classes; from cifar-100-python.tar.gz",
        reference="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; the fine classes",
        normalization=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        archives=(
            Archive("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        ),
        images={"train": 50_000, "test": 10_000},
        folder="cifar-100-python",
        batches={"train": ("train",), "test": ("test",)},
        meta="meta",
        prefix=b"fine_",
    ),
    GTSRB(
        name="gtsrb",
        summary="German traffic signs resized to 32x32, 43 classes; from GTSRB_Final_*.zip",
        reference="Stallkamp et al., Man vs. computer, Neural Networks 32, 2012",
        normalization=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        archives=tuple(
            Archive(f"https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/{name}", md5)
            for name, md5 in (
                ("GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"),
                ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
                ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
            )
        ),
        images={"train": 39_209, "test": 12_630},
    ),
    TinyImageNet(
        name="tiny_imagenet",
        summary="Tiny ImageNet, 64x64, 200 classes, tested on its validation set; from tiny-imagenet-200.zip",
        reference="Le and Yang, Tiny ImageNet Visual Recognition Challenge, 2015",
        normalization=((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        archives=(Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
        images={"train": 100_000, "test": 10_000},
        shape=(64, 64, 3),
        encoding="jpeg",
    ),
)

DATASETS: dict[str, DatasetSpec] = {spec.source: spec for spec in SPECS}
"""The data sets by what `load` calls them."""

SOURCES: dict[str, str] = {
    **{source: spec.summary for source, spec in DATASETS.items()},
    "FILE.npz": "train_images, train_labels, test_images, test_labels",
    "FOLDER": "one folder of images for each class, or train and test (or val) with these in them",
    "tfds:NAME": "any other TFDS set of images in classes that is prepared as array_record",
}
"""What `load` takes, and a line about each."""
