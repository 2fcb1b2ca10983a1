"""DBD: its losses against NumPy, which labels it keeps, and a small poisoned set without a backdoor in the result."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, leaves_of, trees_equal
from miniature import CLASSES, TARGET, SmallNet, make_images
from scipy.special import log_softmax, softmax

from backdoor_jax import BadNets, Classifier, Dataset, TrainConfig, UserError, build_classifier, evaluate
from backdoor_jax.attacks import AttackContext
from backdoor_jax.defenses import DBD, dbd
from backdoor_jax.defenses.dbd import credible_indices, mixmatch_loss, sharpened, warm_up_loss
from backdoor_jax.models import Variables
from backdoor_jax.training.fitting import Fitted

SMALL = DBD(
    pretrain_epochs=1,
    pretrain_batch_size=16,
    warmup_epochs=1,
    warmup_batch_size=16,
    rounds=2,
    round_steps=2,
    batch_size=8,
    crop=1,
)
PLAIN = dataclasses.replace(SMALL, crop=0)
"""Without augmentation."""


class Case(NamedTuple):
    classifier: Classifier
    variables: Variables
    data: Dataset

    def probabilities(self, images: jax.Array, train: bool = True) -> np.ndarray:
        return softmax(np.asarray(self.classifier.logits(self.variables, images, train)[0], np.float64), -1)


@pytest.fixture(scope="module")
def case() -> Case:
    classifier, data = build_classifier("small_cnn", CLASSES, width=2), make_images(1, 32)
    return Case(classifier, classifier.init(jax.random.key(0), data.images), data)


def test_the_warm_up_is_the_symmetric_cross_entropy_with_a_floor_under_labels(case: Case) -> None:
    loss, (variables, _) = warm_up_loss(case.classifier, SMALL, case.variables, case.data, jax.random.key(0))
    p = case.probabilities(case.data.images)
    labels = np.eye(CLASSES)[np.asarray(case.data.labels)]
    expected = -0.1 * (labels * np.log(p)).sum(1) - (p * np.log(np.maximum(labels, 1e-4))).sum(1)
    assert float(loss) == pytest.approx(expected.mean(), rel=1e-5)
    _, moved = case.classifier.logits(case.variables, case.data.images, train=True)
    assert_trees_equal(variables, moved)


@pytest.mark.parametrize("rise", [0.0, 0.4])
def test_mixmatch_is_the_formula_where_nothing_is_mixed(case: Case, rise: float) -> None:
    """With a near 0 every share is 1, and with one unlabeled image it is known which was drawn."""
    batch, alone = case.data.take(slice(4)), case.data.images[9:10]
    config = dataclasses.replace(PLAIN, mixing=1e-6)
    loss, (variables, info) = mixmatch_loss(
        case.classifier, config, alone, rise, case.variables, batch, jax.random.key(0)
    )
    four = jnp.repeat(alone, 4, 0)
    guess = case.probabilities(four) ** 2
    guess /= guess.sum(1, keepdims=True)
    images = jnp.concatenate([batch.images, four, four])
    logits, moved = case.classifier.logits(case.variables, images, train=True)
    z, labels = np.asarray(logits, np.float64), np.asarray(batch.labels)
    labeled = -log_softmax(z[:4], -1)[np.arange(4), labels].mean()
    unlabeled = ((softmax(z[4:], -1) - np.concatenate([guess, guess])) ** 2).mean()
    assert float(info["labeled"]) == pytest.approx(labeled, rel=1e-4)
    assert float(info["unlabeled"]) == pytest.approx(unlabeled, rel=1e-3)
    assert float(loss) == pytest.approx(labeled + rise * 15 * unlabeled, rel=1e-4)
    for found, expected in zip(*map(leaves_of, (variables["batch_stats"], moved["batch_stats"])), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_larger_share_of_a_mixture_is_the_image_itself(case: Case) -> None:
    """Black images mixed with white ones: every mixture is closer to the image that it is listed under."""
    black, white = jnp.zeros((8, 12, 12, 3), jnp.uint8), jnp.full((1, 12, 12, 3), 255, jnp.uint8)
    seen: list[jax.Array] = []

    class Watched(SmallNet):
        def features(self, x: jax.Array, train: bool) -> jax.Array:
            seen.append(x)
            return super().features(x, train)

    classifier = Classifier(Watched(), CLASSES, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    variables = classifier.init(jax.random.key(0), black)
    for number in range(20):
        seen.clear()
        batch = Dataset(black, jnp.zeros(8, jnp.int32))
        mixmatch_loss(classifier, PLAIN, white, 1.0, variables, batch, jax.random.key(number))
        means = np.asarray(seen[-1]).mean((1, 2, 3))
        assert (means[:8] <= 0.5 + 1e-5).all() and (means[8:] >= 0.5 - 1e-5).all()
        shares = np.unique(np.round(np.where(means < 0.5, means, 1 - means), 4))
        assert set(shares) <= {0.0, shares.max()}


def test_no_gradient_flows_through_the_guesses(case: Case) -> None:
    batch = case.data.take(slice(4))

    def objective(config: DBD) -> jax.Array:
        return mixmatch_loss(
            case.classifier, config, case.data.images[4:], 1.0, case.variables, batch, jax.random.key(1)
        )[0]

    gradient = jax.grad(objective)(jax.tree.map(jnp.float32, PLAIN))
    assert float(gradient.sharpening) == 0
    assert float(gradient.unlabeled_weight) > 0


def test_sharpening_preserves_sums_and_order() -> None:
    p = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).standard_normal((50, 6)), jnp.float32))
    for temperature in (0.1, 0.5, 1.0):
        sharp = sharpened(p, temperature)
        np.testing.assert_allclose(sharp.sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(jnp.argsort(sharp, -1), jnp.argsort(p, -1))
        assert (sharp.max(-1) >= p.max(-1) - 1e-6).all()
    np.testing.assert_allclose(sharpened(p, 1.0), p, rtol=1e-5)


def test_the_credible_images_are_those_whose_label_is_most_probable(case: Case) -> None:
    labels = np.asarray(case.data.labels)
    likely = case.probabilities(case.data.images, train=False)[np.arange(32), labels]
    kept = credible_indices(case.classifier, case.variables, case.data, 0.25)
    assert set(kept) == set(np.argsort(-likely)[:8])
    assert (np.diff(kept) > 0).all()


def test_one_key_gives_one_network_for_any_victim_and_leaves_it_unchanged(case: Case) -> None:
    other = jax.tree.map(lambda leaf: leaf + 1, case.variables)
    before = leaves_of(case.variables)
    one, same = (
        SMALL.repair(jax.random.key(1), case.classifier, victim, case.data) for victim in (case.variables, other)
    )
    assert_trees_equal(one.variables, same.variables)
    assert jax.tree.map(jnp.shape, one.variables) == jax.tree.map(jnp.shape, case.variables)
    assert_trees_equal(case.variables, before)
    assert one.changed and one.info["steps"] == 4
    assert one.kept is not None and len(one.kept) == 16
    assert set(one.info["last_epoch"]) == {"loss", "labeled", "unlabeled"}
    different = SMALL.repair(jax.random.key(2), case.classifier, case.variables, case.data)
    assert not trees_equal(different.variables, one.variables)


@pytest.mark.slow
def test_a_network_trained_from_scratch_learns_the_classes_and_not_the_trigger() -> None:
    classifier = Classifier(SmallNet(), CLASSES, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    attack = BadNets(target=TARGET)
    training = TrainConfig(epochs=8, batch_size=32, learning_rate=0.02, crop=0)
    context = AttackContext(classifier, make_images(1, 320), training)
    victim = attack.train_victim_in(context, jax.random.key(3), jax.random.key(4))
    defense = dataclasses.replace(
        PLAIN,
        pretrain_epochs=5,
        pretrain_batch_size=64,
        warmup_epochs=10,
        learning_rate=5e-4,
        rounds=2,
        ramp=2,
        round_steps=30,
        batch_size=16,
    )
    repair = defense.repair(jax.random.key(5), classifier, victim.variables, victim.poisoned.data)
    before, after = (
        evaluate(classifier, variables, make_images(2, 200), victim.trigger, attack.label_map(CLASSES))
        for variables in (victim.variables, repair.variables)
    )
    assert before.asr is not None and after.asr is not None and repair.kept is not None
    assert before.asr > 0.8
    assert after.asr < 0.3 and after.acc > 0.85
    kept = np.isin(repair.kept, victim.poisoned.indices).sum()
    assert kept < len(victim.poisoned.indices) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credible": 1.0}, "DBD.credible is 1.0"),
        ({"rounds": 0}, "DBD.rounds is 0"),
        ({"log_zero": 0.0}, "DBD.log_zero is 0.0"),
        ({"mixing": 0.0}, "DBD.mixing is 0.0"),
        ({"unlabeled_weight": -1.0}, "DBD.unlabeled_weight is -1.0"),
    ],
)
def test_settings_out_of_range_are_rejected_by_name(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DBD(**changes)  # type: ignore[arg-type]


def test_too_few_images_are_rejected(case: Case) -> None:
    with pytest.raises(UserError, match="give the complete training set"):
        SMALL.repair(jax.random.key(0), case.classifier, case.variables, case.data.take(slice(1)))


def test_lambda_u_increases_over_the_ramp_and_not_over_the_rounds(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rises: list[float] = []

    def fitted(key: Any, step: Any, state: Any, *rest: Any, **options: Any) -> Any:
        if "round" in options["name"]:
            rises.append(step.loss.args[-1])
        return Fitted(state, {}, 1, 1)

    monkeypatch.setattr(dbd, "fit", fitted)
    monkeypatch.setattr(dbd, "pretrain", lambda *rest, **options: (case.variables, {}))
    monkeypatch.setattr(Fitted, "info", {})
    dataclasses.replace(SMALL, warmup_epochs=2, rounds=5, ramp=4).repair(jax.random.key(0), *case)
    assert rises == [0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_benchmarks_presets() -> None:
    assert DBD.preset("benchmark") == DBD(pretrain_epochs=100, rounds=100)
    expected = DBD(pretrain_epochs=100, rounds=100, unlabeled_weight=6, ramp=80)
    assert DBD.preset("benchmark_cifar100") == expected
    with pytest.raises(UserError, match=r"'mine'.*benchmark"):
        DBD.preset("mine")
