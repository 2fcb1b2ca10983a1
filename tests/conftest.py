"""What all tests share: eight virtual devices, a key, and a network and data too small to be slow."""

import gc
import os
import signal
from collections.abc import Iterator
from importlib.metadata import version

# Eight devices for the sharding tests, and less work for the compiler, which would take most of the suite's time
# (later versions do not know the last flag). A later flag wins, so what is set outside stays.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + ("--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith(("0.9.", "0.10.")) else "")
    + os.environ.get("XLA_FLAGS", "")
)
# Compiled programs are not kept for the next suite: what a test compiles it pays for.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
os.environ["MPLBACKEND"] = os.environ.get("MPLBACKEND", "Agg")

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backdoor_jax import Classifier, Dataset, make_dataset, progress
from backdoor_jax.compiling import make_room
from backdoor_jax.models import Variables
from backdoor_jax.models.layers import BatchNorm, ReLU, conv

# Tracing makes many objects that live long: looked through every 700 new ones, they take a twentieth of the time.
gc.set_threshold(20_000, 20)
# A job in a shell's background ignores Ctrl-C, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("suite", deadline=None, database=None, derandomize=True, max_examples=20)
hypothesis.settings.load_profile("suite")


class Programs:
    """Makes room between files, of which none needs more than 10,000 regions: many compile without training."""

    @pytest.fixture(autouse=True, scope="module")
    @classmethod
    def forgotten(cls) -> Iterator[None]:
        yield
        make_room()


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin it reaches the doctests too, which are not under this folder."""
    config.pluginmanager.register(Programs())


# On a slow machine a test takes long enough for a line on progress, and many expect an empty stderr.
progress.EVERY = float("inf")


class TinyNet(nn.Module):
    """One convolution, normalization and rectifier, then pooling and a linear head."""

    num_classes: int
    width: int = 4

    def setup(self) -> None:
        self.conv = conv(self.width, 3)
        self.bn = BatchNorm()
        self.relu = ReLU()
        self.linear = nn.Dense(self.num_classes)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        return jnp.mean(self.relu(self.bn(self.conv(x), train)), axis=(1, 2))

    def head(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.features(x, train))


@pytest.fixture(scope="session")
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def tiny_classifier() -> Classifier:
    return Classifier(TinyNet(3), 3)


@pytest.fixture(scope="session")
def tiny_data() -> Dataset:
    """24 images of 8x8 in 3 classes; each class is brightest in a color of its own, so that it can be learned."""
    generator = np.random.default_rng(0)
    labels = np.arange(24) % 3
    images = generator.integers(0, 128, (24, 8, 8, 3), dtype=np.uint8)
    images[np.arange(24), :, :, labels] += 100
    return make_dataset(images, labels, 3)


@pytest.fixture(scope="session")
def tiny_variables(tiny_classifier: Classifier, tiny_data: Dataset) -> Variables:
    return tiny_classifier.init(jax.random.key(1), tiny_data.images)
