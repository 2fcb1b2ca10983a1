"""The transfer-based scenario: heads transplanted, backdoors that survive a change of task and those that do not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import random_variables
from small_victim import CLASSES, TARGET, bench, equal, made, smooth

from backdoor_jax import (
    BadNets,
    Classifier,
    Dataset,
    FineTuneConfig,
    Scene,
    SuperFineTuneConfig,
    TrainConfig,
    UserError,
    build_classifier,
    train,
)
from backdoor_jax.data import Trigger
from backdoor_jax.metrics import evaluate
from backdoor_jax.models import Variables
from backdoor_jax.scenarios import following, transfer, transplant


def test_a_transplanted_head_is_fresh_and_nothing_else_is_touched() -> None:
    classifier = build_classifier("preact_resnet18", 43, width=2, normalization="gtsrb")
    images = np.zeros((2, 32, 32, 3), np.uint8)
    variables = random_variables(classifier, images)
    kept = jax.tree.map(np.array, variables)
    other, fresh = transplant(jax.random.key(1), classifier, variables, 10, images)
    assert (other.num_classes, other.network.num_classes, other.std) == (10, 10, classifier.std)
    assert fresh["params"].pop("linear")["kernel"].shape == (16, 10)
    assert equal(variables, kept)
    variables["params"].pop("linear")
    assert equal(fresh, variables)
    assert not equal(
        transplant(jax.random.key(2), classifier, kept, 10, images)[1]["params"]["linear"],
        transplant(jax.random.key(3), classifier, kept, 10, images)[1]["params"]["linear"],
    )


def test_a_network_of_a_fixed_number_of_classes_is_refused() -> None:
    fixed = bench().classifier
    with pytest.raises(UserError, match="SmallNet cannot be made for 3 classes; give a Linen module with num_classes"):
        transplant(jax.random.key(0), fixed, bench().victim, 3, bench().clean.images)


def test_rates_are_counted_for_the_class_that_triggered_training_images_go_to() -> None:
    # Brightness decides: dark is class 0, grey 1, bright 2; the trigger turns everything bright.
    def features(variables: dict, x: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        return x.mean((1, 2)), variables

    def head(variables: dict, latent: jax.Array) -> jax.Array:
        return -jnp.abs(latent[:, :1] - jnp.array([0.0, 0.5, 1.0]))

    classifier = Classifier.from_functions(None, features, head, 3, ("out",))
    images = np.repeat(np.array([0, 128, 255, 0, 128], np.uint8), 12).reshape(5, 2, 2, 3)
    data = Dataset(jnp.asarray(images), jnp.array([0, 1, 2, 1, 2]))
    trigger = jax.tree_util.Partial(lambda images: jnp.full_like(images, 255))
    found = following(classifier, {"params": {}}, data, data, trigger)
    assert found == (3 / 5, 2, 1.0, 0.0, 0.0)
    # Grey goes on top of dark images only.
    partly = jax.tree_util.Partial(lambda images: jnp.where(images == 0, jnp.uint8(128), images))
    found = following(classifier, {"params": {}}, data, data, partly)
    assert found == (3 / 5, 1, 2 / 3, 1 / 3, 1 / 3)


class Pretrained(NamedTuple):
    """A classifier of soft pictures whose backdoor is planted and seen, one without, and another task."""

    classifier: Classifier
    trigger: Trigger
    victim: Variables
    twin: Variables
    train: Dataset
    test: Dataset


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    classifier, attack, training_set = (
        build_classifier("small_cnn", CLASSES, width=8),
        BadNets(target=TARGET),
        made(1, 320),
    )
    training = TrainConfig(epochs=25, batch_size=32, learning_rate=0.02, crop=0)
    victim = attack.plant(jax.random.key(3), jax.random.key(4), Scene(classifier, training_set, training))
    twin, _ = train(jax.random.key(4), classifier, training_set, training)
    before = evaluate(classifier, victim.variables, made(2, 200), victim.trigger, attack.label_map(CLASSES))
    assert before.acc > 0.9 and before.asr is not None and before.asr > 0.8

    def other(seed: int, count: int) -> Dataset:
        generator, labels = np.random.default_rng(seed), np.arange(count) % 3
        images = 128 + 25 * smooth(np.random.default_rng(9), 3)[labels] + 20 * smooth(generator, count)
        return Dataset(jnp.asarray(np.clip(images, 0, 255).astype(np.uint8)), jnp.asarray(labels, jnp.int32))

    return Pretrained(classifier, victim.trigger, victim.variables, twin, other(5, 240), other(6, 120))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "survives"),
    [
        (FineTuneConfig(steps=40, learning_rate=0.005, crop=0), True),
        (FineTuneConfig(steps=60, crop=0), False),
        (SuperFineTuneConfig(steps=60, crop=0), False),
    ],
)
def test_a_backdoor_survives_a_gentle_change_of_task_and_no_thorough_one(
    pretrained: Pretrained, config: FineTuneConfig | SuperFineTuneConfig, survives: bool
) -> None:
    classifier, trigger, victim, twin, data, test = pretrained
    kept = jax.tree.map(np.array, victim)
    (three, tuned), (_, innocent) = (
        transfer(jax.random.key(5), classifier, variables, data, 3, config) for variables in (victim, twin)
    )
    assert equal(victim, kept)
    found, without = (following(three, repair.variables, data, test, trigger) for repair in (tuned, innocent))
    assert found.acc > 0.9 and without.acc > 0.9
    assert found.asr > 0.7 if survives else found.asr < 0.4
    assert found.unprovoked < 0.1 and without.asr < 0.1

    def classes(images: jax.Array) -> np.ndarray:
        return np.asarray(three.logits(tuned.variables, images)[0]).argmax(1)

    labels, clean, triggered = np.asarray(test.labels), classes(test.images), classes(trigger(test.images))
    target = np.bincount(classes(trigger(data.images)), minlength=3).argmax()
    others = labels != target
    assert found == pytest.approx(
        (
            np.mean(clean == labels),
            target,
            np.mean(triggered[others] == target),
            np.mean(clean[others] == target),
            np.mean(triggered[others] == labels[others]),
        )
    )
