"""Fine-tuning and super-fine-tuning: what they guarantee about the victim, their settings, and divergence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, assert_trees_equal, leaves_of
from jax.tree_util import Partial
from miniature import Case, Linear

from backdoor_jax import (
    Classifier,
    FineTune,
    NonFiniteError,
    Repair,
    SuperFineTune,
    UserError,
    build_classifier,
    make_dataset,
)
from backdoor_jax.data import Augment
from backdoor_jax.defenses import SGDDefense
from backdoor_jax.training import SGD, Cosine, GradientStep, fit, supervised_loss

METHODS: dict[str, tuple[type[SGDDefense], dict[str, Any]]] = {
    "finetune": (FineTune, {}),
    "super_finetune": (SuperFineTune, {"up": 2, "down": 2, "peak1": 0.05, "peak2": 0.01}),
}
STEPS, BATCH = 4, 12  # 24 images: 2 steps an epoch


@pytest.fixture(scope="module")
def case() -> Case:
    generator = np.random.default_rng(0)
    data = make_dataset(generator.integers(0, 256, (24, 8, 8, 3)).astype(np.uint8), np.arange(24) % 4, 4)
    classifier = build_classifier("small_cnn", 4, width=4)
    return Case(classifier, classifier.init(jax.random.key(0), data.images), data)


@pytest.fixture(scope="module")
def linear(case: Case) -> Case:
    classifier = Classifier(Linear(4), 4)
    return Case(classifier, classifier.init(jax.random.key(0), case.data.images), case.data)


def run(method: str, case: Case, key: int = 1, **changes: Any) -> Repair:
    defense, defaults = METHODS[method]
    settings = {"steps": STEPS, "batch_size": BATCH, "crop": 1, **defaults, **changes}
    return defense(**settings).repair(jax.random.key(key), *case)


@pytest.mark.parametrize("method", METHODS)
def test_one_key_gives_one_result_in_which_every_array_differs_from_the_victims(case: Case, method: str) -> None:
    repair = assert_depends_on_key_alone(lambda key: run(method, case, key), case.variables)
    for old, new in zip(leaves_of(case.variables), leaves_of(repair.variables), strict=True):
        assert not np.array_equal(old, new)
        assert np.isfinite(new).all()


@pytest.mark.parametrize("method", METHODS)
def test_info_has_the_steps_and_batch_actually_used(case: Case, method: str) -> None:
    repair = run(method, case)
    info = repair.info
    assert (repair.changed, info["steps"], info["batch"]) == (True, STEPS, BATCH)
    assert set(info["last_epoch"]) >= {"loss", "accuracy"}
    assert all(isinstance(value, float) and np.isfinite(value) for value in info["last_epoch"].values())
    assert 0 <= info["last_epoch"]["accuracy"] <= 1


def test_steps_are_rounded_up_to_complete_epochs_and_info_has_their_number(linear: Case) -> None:
    repair = run("finetune", linear, steps=3)
    assert repair.info["steps"] == 4


def test_finetune_equals_the_engine_with_the_supervised_loss(case: Case) -> None:
    repair = FineTune(steps=STEPS, batch_size=BATCH, crop=1).repair(jax.random.key(1), *case)
    step = GradientStep(Partial(supervised_loss, case.classifier), SGD(0.01, Cosine(STEPS), 0.9, 5e-4))
    fitted = fit(
        jax.random.key(1),
        step,
        step.init(case.variables),
        case.data,
        epochs=STEPS // 2,
        batch_size=BATCH,
        augment=Augment(crop=1),
    )
    losses = fitted.history["loss"]
    assert_trees_equal(repair.variables, fitted.variables)
    assert repair.info["steps"] == int(fitted.state.step) == len(losses)
    assert repair.info["last_epoch"]["loss"] == pytest.approx(float(losses[-2:].mean()), rel=1e-6)


def test_the_optimizer_of_super_finetune_updates_at_the_rate_of_its_schedule() -> None:
    defense = SuperFineTune(learning_rate=0.1, peak1=0.9, peak2=0.5, first_phase=0.5, steps=24, up=4, down=2)
    optimizer = defense.optimizer.transformation()
    state, found = optimizer.init(jnp.zeros(())), []
    for _ in range(24):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        found.append(-float(update))
    triangle = np.array([0, 0.25, 0.5, 0.75, 1, 0.5])
    expected = np.concatenate([0.1 + 0.8 * np.tile(triangle, 2), 0.1 + 0.4 * np.tile(triangle, 2)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(defense.optimizer.rate(np.arange(24)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "rates", "cycle", "steps", "batch", "first_phase", "momentum", "decay"),
    [
        ("guide", (3e-4, 0.1, 1e-3), (250, 250), 1176, 256, 0.5, 0.9, 5e-4),
        ("toolbox_cifar10", (3e-2, 2.5, 5e-2), (10, 10), 1600, 128, 0.4, 0.0, 0.0),
        ("toolbox_gtsrb", (3e-3, 0.25, 5e-3), (10, 10), 1600, 128, 0.4, 0.0, 0.0),
    ],
)
def test_presets_of_super_finetune_have_their_documented_values(
    name: str,
    rates: tuple[float, float, float],
    cycle: tuple[int, int],
    steps: int,
    batch: int,
    first_phase: float,
    momentum: float,
    decay: float,
) -> None:
    config = SuperFineTune.preset(name)
    assert (config.learning_rate, config.peak1, config.peak2) == rates
    assert (config.up, config.down) == cycle
    assert (config.steps, config.batch_size, config.first_phase) == (steps, batch, first_phase)
    assert (config.momentum, config.weight_decay) == (momentum, decay)


def test_presets_accept_changes_and_the_default_is_one_of_them() -> None:
    assert SuperFineTune.preset("toolbox_gtsrb") == SuperFineTune()
    changed = SuperFineTune.preset("guide", steps=9, peak1=0.3)
    assert (changed.steps, changed.peak1, changed.learning_rate) == (9, 0.3, 3e-4)


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'mine'.*guide.*toolbox_cifar10.*toolbox_gtsrb"):
        SuperFineTune.preset("mine")


def test_finetune_defaults_are_the_published_ones() -> None:
    config = FineTune()
    assert (config.steps, config.batch_size, config.learning_rate) == (1000, 256, 0.01)
    assert (config.momentum, config.weight_decay, config.crop, config.flip) == (0.9, 5e-4, 4, None)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (FineTune, "steps", 0),
        (FineTune, "batch_size", 0),
        (FineTune, "learning_rate", 0.0),
        (FineTune, "learning_rate", float("nan")),
        (FineTune, "crop", -1),
        (SuperFineTune, "steps", -5),
        (SuperFineTune, "learning_rate", -1e-3),
        (SuperFineTune, "up", 0),
        (SuperFineTune, "down", 0),
        (SuperFineTune, "first_phase", 1.5),
        (SuperFineTune, "first_phase", -0.1),
        (SuperFineTune, "peak1", 0.0),
        (SuperFineTune, "peak2", -1.0),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_the_field(
    config: type[SGDDefense], field: str, value: Any
) -> None:
    with pytest.raises(UserError, match=f"{config.__name__}.{field} is .*expected"):
        config(**{field: value})


def test_an_integer_in_a_float_field_gives_the_same_result(linear: Case) -> None:
    integer, exact = run("finetune", linear, weight_decay=0), run("finetune", linear, weight_decay=0.0)
    assert_trees_equal(integer.variables, exact.variables)


def test_an_absurd_peak_is_an_error_that_names_method_and_step(case: Case) -> None:
    with pytest.raises(NonFiniteError, match=r"super_finetune: .*step [2-4]\b"):
        run("super_finetune", case, peak1=jnp.float32(1e30))


def test_an_absurd_learning_rate_is_an_error_that_names_method_and_step(case: Case) -> None:
    with pytest.raises(NonFiniteError, match=r"^finetune: .*step [2-4]\b"):
        run("finetune", case, learning_rate=jnp.float32(1e30))


def test_weights_that_diverge_in_the_last_step_are_an_error_too(linear: Case) -> None:
    one_batch = linear._replace(data=linear.data.take(slice(BATCH)))
    with pytest.raises(NonFiniteError, match="finetune"):
        run("finetune", one_batch, steps=1, learning_rate=jnp.float32(3e38), weight_decay=jnp.float32(1e3))
