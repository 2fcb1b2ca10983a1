"""A backdoored classifier small enough to be made in seconds, for tests of defences from end to end."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax import BadNets, Classifier, Dataset, Scene, Scores, TrainConfig, evaluate
from backdoor_jax.data import Trigger
from backdoor_jax.models import Variables
from backdoor_jax.models.layers import BatchNorm, conv

CLASSES, TARGET = 4, 1
TRACES: list[int] = []
"""Grows by one whenever the Python code of a network below runs: once a trace."""


class SmallNet(nn.Module):
    """Convolutions, of these channels and strides, and a linear head that sees where things are."""

    layers: tuple[tuple[int, int], ...] = ((16, 1), (16, 2), (32, 2))

    def setup(self) -> None:
        self.convolutions = [conv(channels, 3, stride) for channels, stride in self.layers]
        self.norms = [BatchNorm() for _ in self.layers]
        self.linear = nn.Dense(CLASSES)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        TRACES.append(1)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.relu(norm(convolution(x), train))
        return x.reshape(len(x), -1)

    def head(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.features(x, train))


class Linear(nn.Module):
    """A linear head on flattened images."""

    num_classes: int

    def setup(self) -> None:
        self.linear = nn.Dense(self.num_classes)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        TRACES.append(1)
        return x.reshape(len(x), -1)

    def head(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.features(x, train))


def smooth(generator: np.random.Generator, count: int, size: int = 12, coarse: int = 5) -> np.ndarray:
    """Random soft square pictures with mean 0 and deviation 1, from coarser noise."""
    noise = generator.standard_normal((count, coarse, coarse, 3))
    pictures = np.asarray(jax.image.resize(jnp.asarray(noise), (count, size, size, 3), "cubic"))
    return (pictures - pictures.mean((1, 2, 3), keepdims=True)) / pictures.std((1, 2, 3), keepdims=True)


def made(seed: int, count: int) -> Dataset:
    """Four classes, each with a soft picture of its own under another one and noise."""
    pictures = smooth(np.random.default_rng(0), CLASSES)
    generator, labels = np.random.default_rng(seed), np.arange(count) % CLASSES
    images = 128 + 25 * pictures[labels] + 20 * smooth(generator, count)
    images += 10 * generator.standard_normal(images.shape)
    return Dataset(jnp.asarray(np.clip(images, 0, 255).astype(np.uint8)), jnp.asarray(labels, jnp.int32))


class Bench(NamedTuple):
    """A victim, what its attacker knows, and what its defender has."""

    classifier: Classifier
    victim: Variables
    trigger: Trigger
    clean: Dataset
    test: Dataset

    def scores(self, variables: Variables) -> Scores:
        """ACC and ASR of a model."""
        return evaluate(self.classifier, variables, self.test, self.trigger, BadNets(target=TARGET).label_map(CLASSES))


@functools.cache
def bench() -> Bench:
    """A BadNets victim, and clean images of its own."""
    classifier = Classifier(SmallNet(), CLASSES, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    scene = Scene(classifier, made(1, 320), TrainConfig(epochs=8, batch_size=32, learning_rate=0.02, crop=0))
    planted = BadNets(target=TARGET).plant(jax.random.key(3), jax.random.key(4), scene)
    made_bench = Bench(classifier, planted.variables, planted.trigger, made(3, 160), made(2, 200))
    before = made_bench.scores(planted.variables)
    assert before.acc > 0.9 and before.asr is not None and before.asr > 0.8
    return made_bench


def leaves_of(tree: object) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def equal(one: object, other: object) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves_of(one), leaves_of(other), strict=True))
