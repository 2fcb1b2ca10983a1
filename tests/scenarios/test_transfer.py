"""The transfer-based scenario: new heads, the scores, and backdoors that survive fine-tuning for another task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, random_variables, trees_equal
from miniature import CLASSES, TARGET, SmallNet, make_images, smooth

from backdoor_jax import (
    BadNets,
    Classifier,
    Dataset,
    FineTune,
    SuperFineTune,
    TrainConfig,
    UserError,
    build_classifier,
    evaluate,
    train,
)
from backdoor_jax.attacks import AttackContext
from backdoor_jax.data import Trigger
from backdoor_jax.models import Variables
from backdoor_jax.scenarios import evaluate_transfer, replace_head, transfer


def test_a_replaced_head_is_new_and_everything_else_is_kept() -> None:
    classifier = build_classifier("preact_resnet18", 43, width=2, normalization="gtsrb")
    images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    variables = random_variables(classifier, images)
    before = jax.tree.map(np.array, variables)
    other, replaced = replace_head(jax.random.key(1), classifier, variables, 10, images)
    assert (other.num_classes, other.network.num_classes, other.std) == (10, 10, classifier.std)
    assert replaced["params"].pop("linear")["kernel"].shape == (16, 10)
    assert_trees_equal(variables, before)
    variables["params"].pop("linear")
    assert_trees_equal(replaced, variables)
    assert not trees_equal(
        replace_head(jax.random.key(2), classifier, before, 10, images)[1]["params"]["linear"],
        replace_head(jax.random.key(3), classifier, before, 10, images)[1]["params"]["linear"],
    )


def test_a_network_with_a_fixed_number_of_classes_is_refused() -> None:
    fixed, images = Classifier(SmallNet(), CLASSES), make_images(3, 2).images
    variables = fixed.init(jax.random.key(0), images)
    with pytest.raises(UserError, match="SmallNet cannot be built for 3 classes; give a Linen module with num_classes"):
        replace_head(jax.random.key(0), fixed, variables, 3, images)


def test_the_target_is_the_class_predicted_for_most_triggered_training_images() -> None:
    # Classes are by brightness: dark is 0, gray 1, bright 2; the trigger makes every image bright.
    def features(variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
        return x.mean((1, 2)), variables

    def head(variables: Variables, latent: jax.Array) -> jax.Array:
        return -jnp.abs(latent[:, :1] - jnp.array([0.0, 0.5, 1.0]))

    classifier = Classifier.from_functions(None, features, head, 3, ("out",))
    images = np.repeat(np.array([0, 128, 255, 0, 128], np.uint8), 12).reshape(5, 2, 2, 3)
    data = Dataset(jnp.asarray(images), jnp.array([0, 1, 2, 1, 2]))
    trigger = jax.tree_util.Partial(lambda images: jnp.full_like(images, 255))
    found = evaluate_transfer(classifier, {"params": {}}, data, data, trigger)
    assert found == (3 / 5, 2, 1.0, 0.0, 0.0)
    # A trigger that makes only dark images gray.
    partial_trigger = jax.tree_util.Partial(lambda images: jnp.where(images == 0, jnp.uint8(128), images))
    found = evaluate_transfer(classifier, {"params": {}}, data, data, partial_trigger)
    assert found == (3 / 5, 1, 2 / 3, 1 / 3, 1 / 3)


class Pretrained(NamedTuple):
    """A backdoored classifier with its trigger, a clean one, and the data of another task."""

    classifier: Classifier
    trigger: Trigger
    victim: Variables
    clean_model: Variables
    train: Dataset
    test: Dataset


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    classifier, attack = build_classifier("small_cnn", CLASSES, width=8), BadNets(target=TARGET)
    context = AttackContext(
        classifier, make_images(1, 320), TrainConfig(epochs=25, batch_size=32, learning_rate=0.02, crop=0)
    )
    victim = attack.train_victim_in(context, jax.random.key(3), jax.random.key(4))
    clean_model = train(jax.random.key(4), classifier, context.data, context.training).variables
    before = evaluate(classifier, victim.variables, make_images(2, 200), victim.trigger, attack.label_map(CLASSES))
    assert before.acc > 0.9 and before.asr is not None and before.asr > 0.8

    def other(seed: int, count: int) -> Dataset:
        generator, labels = np.random.default_rng(seed), np.arange(count) % 3
        images = 128 + 25 * smooth(np.random.default_rng(9), 3)[labels] + 20 * smooth(generator, count)
        return Dataset(jnp.asarray(np.clip(images, 0, 255).astype(np.uint8)), jnp.asarray(labels, jnp.int32))

    return Pretrained(classifier, victim.trigger, victim.variables, clean_model, other(5, 240), other(6, 120))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defense", "survives"),
    [
        (FineTune(steps=40, learning_rate=0.005, crop=0), True),
        (FineTune(steps=60, crop=0), False),
        (SuperFineTune(steps=60, crop=0), False),
    ],
    ids=["gentle", "finetune", "super_finetune"],
)
def test_a_backdoor_survives_gentle_tuning_for_another_task_and_not_thorough_tuning(
    pretrained: Pretrained, defense: FineTune | SuperFineTune, survives: bool
) -> None:
    classifier, trigger, victim, clean_model, data, test = pretrained
    before = jax.tree.map(np.array, victim)
    (other, tuned), (_, tuned_clean_model) = (
        transfer(jax.random.key(5), classifier, variables, data, 3, defense) for variables in (victim, clean_model)
    )
    assert_trees_equal(victim, before)
    found, without = (
        evaluate_transfer(other, repair.variables, data, test, trigger) for repair in (tuned, tuned_clean_model)
    )
    assert found.acc > 0.9 and without.acc > 0.9
    assert found.asr > 0.7 if survives else found.asr < 0.4
    assert found.unprovoked < 0.1 and without.asr < 0.1

    def classes(images: jax.Array) -> np.ndarray:
        return np.asarray(other.logits(tuned.variables, images)[0]).argmax(1)

    labels, clean, triggered = np.asarray(test.labels), classes(test.images), classes(trigger(test.images))
    target = np.bincount(classes(trigger(data.images)), minlength=3).argmax()
    counted = labels != target
    assert found == pytest.approx(
        (
            np.mean(clean == labels),
            target,
            np.mean(triggered[counted] == target),
            np.mean(clean[counted] == target),
            np.mean(triggered[counted] == labels[counted]),
        )
    )
