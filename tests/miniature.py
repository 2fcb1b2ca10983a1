"""A small problem on which defenses are tried end to end: a backdoored network, its images, and the trigger."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax import BadNets, Classifier, Dataset, TrainConfig, evaluate
from backdoor_jax.attacks import AttackContext
from backdoor_jax.data import LabelMap, Trigger
from backdoor_jax.metrics import Scores
from backdoor_jax.models import SmallCNN, Variables
from backdoor_jax.models.layers import BatchNorm, conv

CLASSES, TARGET = 4, 1
TRACES: list[int] = []
"""Grows by one whenever the Python code of a network below runs: once a trace."""


class TracedCNN(SmallCNN):
    """The package's small network, which counts its traces."""

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        TRACES.append(1)
        return super().features(x, train)


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


def make_images(seed: int, count: int) -> Dataset:
    """Four classes of 12x12 images, each with a soft picture of its own under another one and noise."""
    pictures = smooth(np.random.default_rng(0), CLASSES)
    generator, labels = np.random.default_rng(seed), np.arange(count) % CLASSES
    images = 128 + 25 * pictures[labels] + 20 * smooth(generator, count)
    images += 10 * generator.standard_normal(images.shape)
    return Dataset(jnp.asarray(np.clip(images, 0, 255).astype(np.uint8)), jnp.asarray(labels, jnp.int32))


def make_textured_images(seed: int, count: int) -> Dataset:
    """Four classes of 16x16 images on one textured ground, each with a soft picture under another one and noise."""
    *pictures, ground = smooth(np.random.default_rng(0), CLASSES + 1, 16, 6)
    generator, labels = np.random.default_rng(seed), np.arange(count) % CLASSES
    images = 128 + 20 * np.stack(pictures)[labels] + 30 * ground + 15 * smooth(generator, count, 16, 6)
    images += 10 * generator.standard_normal(images.shape)
    return Dataset(jnp.asarray(np.clip(images, 0, 255).astype(np.uint8)), jnp.asarray(labels, jnp.int32))


class Case(NamedTuple):
    """A model and images."""

    classifier: Classifier
    variables: Variables
    data: Dataset


class Miniature(NamedTuple):
    """A BadNets victim, what its defender has, and what judges the repair."""

    classifier: Classifier
    variables: Variables
    clean: Dataset
    test: Dataset
    trigger: Trigger
    label_map: LabelMap
    before: Scores

    def scores(self, variables: Variables) -> Scores:
        """ACC, ASR and RA of a model."""
        return evaluate(self.classifier, variables, self.test, self.trigger, self.label_map)


@functools.cache
def flat_miniature() -> Miniature:
    """A victim whose head sees where things are, for defenses that need more than pooled latents at this size."""
    classifier, attack = Classifier(SmallNet(), CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3), BadNets(target=TARGET)
    training = TrainConfig(epochs=8, batch_size=32, learning_rate=0.02, crop=0)
    return _attacked(classifier, attack, training, make_images(1, 320), make_images(2, 200), make_images(3, 160))


@functools.cache
def miniature() -> Miniature:
    """The victim that most tests share; its network counts its traces in `TRACES`."""
    classifier, attack = Classifier(TracedCNN(CLASSES, 16), CLASSES), BadNets(target=TARGET)
    training = TrainConfig(epochs=10, batch_size=32, learning_rate=0.05, crop=0)
    data = make_textured_images(1, 480), make_textured_images(2, 400), make_textured_images(5, 160)
    return _attacked(classifier, attack, training, *data)


def _attacked(
    classifier: Classifier, attack: BadNets, training: TrainConfig, train: Dataset, test: Dataset, clean: Dataset
) -> Miniature:
    context = AttackContext(classifier, train, training)
    victim = attack.train_victim_in(context, jax.random.key(3), jax.random.key(4))
    label_map = attack.label_map(CLASSES)
    before = evaluate(classifier, victim.variables, test, victim.trigger, label_map)
    assert before.acc > 0.9 and before.asr is not None and before.asr > 0.8
    return Miniature(classifier, victim.variables, clean, test, victim.trigger, label_map, before)
