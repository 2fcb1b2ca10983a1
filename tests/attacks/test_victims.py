"""Every attack in miniature, end to end: the victim assigns triggered images to the target, and others correctly."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from comparison import assert_trees_equal
from miniature import CLASSES, TARGET, SmallNet, make_textured_images

from backdoor_jax import Classifier, Dataset, TrainConfig, predict, train
from backdoor_jax.attacks import ATTACKS, Attack, AttackContext, BadNets, Blended, LabelConsistent
from backdoor_jax.attacks.label_consistent import perturb

TRAINING = TrainConfig(epochs=8, batch_size=32, learning_rate=0.02, crop=0)
ATTACKERS: dict[str, dict[str, Any]] = {
    "badnets": {},
    "blended": {},
    "sig": {"rate": 0.24, "delta": 70.0},
    "low_frequency": {"steps": 50},
    "wanet": {"rate": 0.4, "cross_ratio": 0.25, "strength": 4.0, "crop": 0, "rotation": 0.0},
    "input_aware": {
        "rate": 0.3, "cross_ratio": 0.25, "mask_epochs": 4, "mask_density": 0.3, "norm_weight": 1.0,
        "channels": 4, "depth": 1,
    },
    "ssba": {"rate": 0.2, "bits": 4, "epochs": 4, "image_weight": 10.0, "channels": 4, "depth": 1},
    "lira": {"epsilon": 0.1, "joint_epochs": 4, "generator_rate": 3e-3, "channels": 4, "depth": 1},
    "trojan_nn": {"steps": 50},
    "label_consistent": {"robust_epochs": 4, "rate": 0.24, "steps": 10, "epsilon": 32.0, "step_size": 5.0},
    "adap_blend": {"rate": 0.05, "cover_rate": 0.05, "train_alpha": 0.25, "alpha": 0.3},
}  # fmt: skip
"""Settings for which 80 images per class and seconds of training are enough; published ones need far more."""
EPOCHS = {"wanet": 12, "input_aware": 12}
SLOW = ("wanet", "input_aware", "ssba", "lira")


class Problem(NamedTuple):
    """What all attackers work with, and test images."""

    context: AttackContext
    test: Dataset


@pytest.fixture(scope="module")
def problem() -> Problem:
    classifier = Classifier(SmallNet(((16, 2), (32, 2))), CLASSES)
    data, test = make_textured_images(1, 320), make_textured_images(2, 200)
    clean_model = train(jax.random.key(0), classifier, data, TRAINING).variables
    assert np.mean(predict(classifier, clean_model, test.images) == test.labels) > 0.95
    return Problem(AttackContext(classifier, data, TRAINING, clean_model=clean_model), test)


def assert_attack_succeeds(problem: Problem, attack: Attack, training: TrainConfig) -> None:
    context = dataclasses.replace(problem.context, training=training)
    victim = attack.train_victim_in(context, jax.random.key(3), jax.random.key(4))
    labels = np.asarray(problem.test.labels)
    targets = (labels + 1) % CLASSES if attack.labels == "all_to_all" else np.full_like(labels, TARGET)
    clean = predict(context.classifier, victim.variables, problem.test.images)
    triggered = predict(context.classifier, victim.variables, problem.test.images, victim.trigger)
    others = labels != targets
    assert np.mean(clean == labels) > 0.9
    assert np.mean((clean == targets)[others]) < 0.1
    assert np.mean((triggered == targets)[others]) > 0.6
    # The clean model does not assign triggered images to the target, or less often.
    assert context.clean_model is not None
    before = predict(context.classifier, context.clean_model, problem.test.images, victim.trigger)
    assert np.mean((triggered == targets)[others]) > np.mean((before == targets)[others]) + 0.2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ATTACKS]
)
def test_a_victim_assigns_triggered_images_to_the_target_and_no_others(problem: Problem, name: str) -> None:
    attack = ATTACKS[name](target=TARGET, **ATTACKERS[name])
    assert_attack_succeeds(problem, attack, dataclasses.replace(TRAINING, epochs=EPOCHS.get(name, TRAINING.epochs)))


def test_label_consistent_hardens_the_network_that_it_perturbs_against(problem: Problem, key: jax.Array) -> None:
    assert LabelConsistent(robust_epochs=0).harden(key, problem.context) == (problem.context, {})
    hardened, info = LabelConsistent(robust_epochs=4).harden(key, problem.context)
    assert info["robust_accuracy"] > 0.95
    ascent, accuracies = LabelConsistent(epsilon=8, step_size=2, steps=10), []
    for context in (problem.context, hardened):
        assert context.clean_model is not None
        perturbed = perturb(context.classifier, context.clean_model, ascent, problem.test)
        accuracies.append(np.mean(predict(context.classifier, context.clean_model, perturbed) == problem.test.labels))
    assert accuracies[0] < 0.7 and accuracies[1] > 0.95


def test_the_attack_on_a_sharpness_aware_victim_succeeds(problem: Problem) -> None:
    assert_attack_succeeds(problem, BadNets(target=TARGET), dataclasses.replace(TRAINING, sam_radius=1.0))


def test_a_victim_of_all_to_all_labels_assigns_triggered_images_to_the_next_class(problem: Problem) -> None:
    assert_attack_succeeds(problem, BadNets(labels="all_to_all", rate=0.3), TRAINING)


def test_a_victim_depends_on_its_keys_only(problem: Problem) -> None:
    attack = Blended(target=TARGET)
    first, second = (attack.train_victim_in(problem.context, jax.random.key(3), jax.random.key(4)) for _ in range(2))
    assert_trees_equal(first[:3], second[:3])
