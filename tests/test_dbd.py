"""DBD: its losses against NumPy, which labels it keeps, and a small poisoned set that it survives."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from small_victim import CLASSES, TARGET, SmallNet, equal, leaves_of, made

from backdoor_jax import BadNets, Classifier, Dataset, Scene, TrainConfig, UserError, build_classifier, evaluate
from backdoor_jax.config import numbers
from backdoor_jax.data import Augment
from backdoor_jax.defenses.dbd import DbdConfig, MixMatchLoss, WarmUpLoss, credible, dbd, sharpened
from backdoor_jax.models import Variables

SMALL = DbdConfig(
    pretrain_epochs=1,
    pretrain_batch_size=16,
    warmup_epochs=1,
    warmup_batch_size=16,
    rounds=2,
    round_steps=2,
    batch_size=8,
    crop=1,
)


class Case(NamedTuple):
    classifier: Classifier
    variables: Variables
    data: Dataset

    def probabilities(self, images: jax.Array, train: bool = True) -> np.ndarray:
        return softmax(np.asarray(self.classifier.logits(self.variables, images, train)[0], np.float64), -1)


@pytest.fixture(scope="module")
def case() -> Case:
    classifier, data = build_classifier("small_cnn", CLASSES, width=2), made(1, 32)
    return Case(classifier, classifier.init(jax.random.key(0), data.images), data)


def test_the_warm_up_is_the_symmetric_cross_entropy_with_a_floor_under_labels(case: Case) -> None:
    loss, (variables, _) = WarmUpLoss(case.classifier)(case.variables, case.data, jax.random.key(0), numbers(SMALL))
    p = case.probabilities(case.data.images)
    labels = np.eye(CLASSES)[np.asarray(case.data.labels)]
    want = -0.1 * (labels * np.log(p)).sum(1) - (p * np.log(np.maximum(labels, 1e-4))).sum(1)
    assert float(loss) == pytest.approx(want.mean(), rel=1e-5)
    _, moved = case.classifier.logits(case.variables, case.data.images, train=True)
    assert equal(variables, moved)


@pytest.mark.parametrize("rise", [0.0, 0.4])
def test_mixmatch_is_the_formula_where_nothing_is_mixed(case: Case, rise: float) -> None:
    """At a mixing of next to 0 every share is 1; with one unlabelled image it is known which was drawn."""
    batch, alone = case.data.take(slice(4)), case.data.images[9:10]
    constants = {**numbers(dataclasses.replace(SMALL, mixing=1e-6)), "unlabelled": alone, "rise": jnp.float32(rise)}
    loss, (variables, info) = MixMatchLoss(case.classifier, Augment())(
        case.variables, batch, jax.random.key(0), constants
    )
    four = jnp.repeat(alone, 4, 0)
    guess = case.probabilities(four) ** 2
    guess /= guess.sum(1, keepdims=True)
    images = jnp.concatenate([batch.images, four, four])
    logits, moved = case.classifier.logits(case.variables, images, train=True)
    z, labels = np.asarray(logits, np.float64), np.asarray(batch.labels)
    labelled = -log_softmax(z[:4], -1)[np.arange(4), labels].mean()
    apart = ((softmax(z[4:], -1) - np.concatenate([guess, guess])) ** 2).mean()
    assert float(info["labelled"]) == pytest.approx(labelled, rel=1e-4)
    assert float(info["unlabelled"]) == pytest.approx(apart, rel=1e-3)
    assert float(loss) == pytest.approx(labelled + rise * 15 * apart, rel=1e-4)
    chex.assert_trees_all_close(variables["batch_stats"], moved["batch_stats"], rtol=1e-5)


def test_the_larger_share_of_a_mixture_is_the_image_itself(case: Case) -> None:
    """Black images of one class beside white ones of another: what the network sees is nearer to what it was."""
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
        constants = {**numbers(SMALL), "unlabelled": white, "rise": jnp.float32(1)}
        batch = Dataset(black, jnp.zeros(8, jnp.int32))
        MixMatchLoss(classifier, Augment())(variables, batch, jax.random.key(number), constants)
        means = np.asarray(seen[-1]).mean((1, 2, 3))
        assert (means[:8] <= 0.5 + 1e-5).all() and (means[8:] >= 0.5 - 1e-5).all()
        shares = np.unique(np.round(np.where(means < 0.5, means, 1 - means), 4))
        assert set(shares) <= {0.0, shares.max()}


def test_guesses_hand_no_gradient_back(case: Case) -> None:
    batch = case.data.take(slice(4))
    constants = {**numbers(SMALL), "unlabelled": case.data.images[4:], "rise": jnp.float32(1)}
    loss = MixMatchLoss(case.classifier, Augment())

    def objective(sharpening: jax.Array) -> jax.Array:
        return loss(case.variables, batch, jax.random.key(1), {**constants, "sharpening": sharpening})[0]

    assert float(jax.grad(objective)(jnp.float32(0.5))) == 0


def test_sharpening_keeps_sums_and_order() -> None:
    p = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).standard_normal((50, 6)), jnp.float32))
    for temperature in (0.1, 0.5, 1.0):
        sharp = sharpened(p, temperature)
        np.testing.assert_allclose(sharp.sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(jnp.argsort(sharp, -1), jnp.argsort(p, -1))
        assert (sharp.max(-1) >= p.max(-1) - 1e-6).all()
    np.testing.assert_allclose(sharpened(p, 1.0), p, rtol=1e-5)


def test_the_credible_are_those_whose_label_the_network_finds_likeliest(case: Case) -> None:
    labels = np.asarray(case.data.labels)
    likely = case.probabilities(case.data.images, train=False)[np.arange(32), labels]
    kept = credible(case.classifier, case.variables, case.data, 0.25)
    assert set(kept) == set(np.argsort(-likely)[:8])
    assert (np.diff(kept) > 0).all()


def test_one_key_gives_one_network_whatever_the_victim_and_leaves_it(case: Case) -> None:
    other = jax.tree.map(lambda leaf: leaf + 1, case.variables)
    before = leaves_of(case.variables)
    runs = [dbd(jax.random.key(1), case.classifier, start, case.data, SMALL) for start in (case.variables, other)]
    chex.assert_trees_all_equal(*(run.variables for run in runs))
    chex.assert_trees_all_equal_shapes(runs[0].variables, case.variables)
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves_of(case.variables), strict=True))
    assert runs[0].info["steps"] == 4 and len(runs[0].info["purified_indices"]) == 16
    assert set(runs[0].info["last_epoch"]) == {"loss", "labelled", "unlabelled"}
    different = dbd(jax.random.key(2), case.classifier, case.variables, case.data, SMALL)
    assert not equal(different.variables, runs[0].variables)


@pytest.mark.slow
def test_a_network_trained_anew_learns_the_classes_and_not_the_trigger() -> None:
    classifier = Classifier(SmallNet(), CLASSES, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    attack = BadNets(target=TARGET)
    scene = Scene(classifier, made(1, 320), TrainConfig(epochs=8, batch_size=32, learning_rate=0.02, crop=0))
    planted = attack.plant(jax.random.key(3), jax.random.key(4), scene)
    settings = dataclasses.replace(
        SMALL,
        pretrain_epochs=5,
        pretrain_batch_size=64,
        warmup_epochs=10,
        learning_rate=5e-4,
        rounds=2,
        round_steps=30,
        batch_size=16,
        crop=0,
    )
    repair = dbd(jax.random.key(5), classifier, planted.variables, planted.poisoned.data, settings)
    victim, anew = (
        evaluate(classifier, variables, made(2, 200), planted.trigger, attack.label_map(CLASSES))
        for variables in (planted.variables, repair.variables)
    )
    assert victim.asr is not None and anew.asr is not None
    assert victim.asr > 0.8
    assert anew.asr < 0.3 and anew.acc > 0.85
    kept = np.isin(repair.info["purified_indices"], planted.poisoned.indices).sum()
    assert kept < len(planted.poisoned.indices) / 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"credible": 1.0}, "credible is 1.0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"log_zero": 0.0}, "log_zero is 0.0"),
        ({"mixing": 0.0}, "mixing is 0.0"),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        DbdConfig(**changes)  # type: ignore[arg-type]


def test_too_few_images_are_refused(case: Case) -> None:
    with pytest.raises(UserError, match="give the whole training set"):
        dbd(jax.random.key(0), case.classifier, case.variables, case.data.take(slice(1)), SMALL)


def test_the_benchmarks_preset_pretrains_for_a_tenth() -> None:
    assert DbdConfig.preset("benchmark") == DbdConfig(pretrain_epochs=100)
    with pytest.raises(UserError, match=r"'mine'.*benchmark"):
        DbdConfig.preset("mine")
