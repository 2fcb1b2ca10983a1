"""Every attack in miniature from end to end: the victim obeys the trigger, and judges clean images as others do."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_victim import SmallNet, smooth

from backdoor_jax import (
    ATTACKS,
    Attack,
    BadNets,
    Blended,
    Classifier,
    Dataset,
    LabelConsistent,
    Scene,
    TrainConfig,
    predict,
    train,
)
from backdoor_jax.attacks.label_consistent import perturb

TARGET = 1


def made(seed: int, count: int) -> Dataset:
    """Four classes on one textured ground, each with a soft picture of its own under another one and noise."""
    *pictures, ground = smooth(np.random.default_rng(0), 5, 16, 6)
    generator, labels = np.random.default_rng(seed), np.arange(count) % 4
    images = 128 + 20 * np.stack(pictures)[labels] + 30 * ground + 15 * smooth(generator, count, 16, 6)
    images += 10 * generator.standard_normal(images.shape)
    return Dataset(jnp.asarray(np.clip(images, 0, 255).astype(np.uint8)), jnp.asarray(labels, jnp.int32))


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
"""Settings under which 80 images of a class and seconds of training are enough; published ones need far more."""
EPOCHS = {"wanet": 12, "input_aware": 12}
SLOW = ("wanet", "input_aware", "ssba", "lira")


class Bench(NamedTuple):
    """What all attackers work on."""

    scene: Scene
    test: Dataset


@pytest.fixture(scope="module")
def bench() -> Bench:
    classifier, data, test = Classifier(SmallNet(((16, 2), (32, 2))), 4), made(1, 320), made(2, 200)
    clean_model, _ = train(jax.random.key(0), classifier, data, TRAINING)
    assert np.mean(predict(classifier, clean_model, test.images) == test.labels) > 0.95
    return Bench(Scene(classifier, data, TRAINING, clean_model=clean_model), test)


def assert_obeys(bench: Bench, attack: Attack, training: TrainConfig) -> None:
    scene = dataclasses.replace(bench.scene, training=training)
    planted = attack.plant(jax.random.key(3), jax.random.key(4), scene)
    labels = np.asarray(bench.test.labels)
    wanted = (labels + 1) % 4 if attack.labels == "all_to_all" else np.full_like(labels, TARGET)
    clean = predict(scene.classifier, planted.variables, bench.test.images)
    triggered = predict(scene.classifier, planted.variables, bench.test.images, planted.trigger)
    others = labels != wanted
    assert np.mean(clean == labels) > 0.9
    assert np.mean((clean == wanted)[others]) < 0.1
    assert np.mean((triggered == wanted)[others]) > 0.6
    # The clean model does not take the trigger itself for the target, or not as often.
    before = predict(scene.classifier, bench.scene.clean_model, bench.test.images, planted.trigger)
    assert np.mean((triggered == wanted)[others]) > np.mean((before == wanted)[others]) + 0.2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ATTACKS]
)
def test_a_victim_sends_triggered_images_to_the_target_and_no_others(bench: Bench, name: str) -> None:
    attack = ATTACKS[name](target=TARGET, **ATTACKERS[name])
    assert_obeys(bench, attack, dataclasses.replace(TRAINING, epochs=EPOCHS.get(name, TRAINING.epochs)))


def test_label_consistent_hardens_the_network_that_it_perturbs_against(bench: Bench, key: jax.Array) -> None:
    assert LabelConsistent(robust_epochs=0).harden(key, bench.scene) == (bench.scene, {})
    hardened, info = LabelConsistent(robust_epochs=4).harden(key, bench.scene)
    assert info["robust_accuracy"] > 0.95
    right = []
    for scene in (bench.scene, hardened):
        assert scene.clean_model is not None
        hard = perturb(scene.classifier, scene.clean_model, bench.test, jnp.float32(8), jnp.float32(2), 10)
        right.append(np.mean(predict(scene.classifier, scene.clean_model, hard) == bench.test.labels))
    assert right[0] < 0.7 and right[1] > 0.95


def test_a_sharpness_aware_victim_does_so_too(bench: Bench) -> None:
    assert_obeys(bench, BadNets(target=TARGET), dataclasses.replace(TRAINING, sam_radius=1.0))


def test_a_victim_of_all_to_all_labels_sends_triggered_images_to_the_next_class(bench: Bench) -> None:
    assert_obeys(bench, BadNets(labels="all_to_all", rate=0.3), TRAINING)


def test_a_victim_is_made_by_its_keys_alone(bench: Bench) -> None:
    attack = Blended(target=TARGET)
    first, again = (attack.plant(jax.random.key(3), jax.random.key(4), bench.scene) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
    np.testing.assert_array_equal(first.poisoned.data.images, again.poisoned.data.images)
