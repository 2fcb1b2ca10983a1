"""Midway: its ingredients against closed forms and NumPy, the repair on planted backdoors and a clean model."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, assert_near, assert_trees_equal, draw, trees_equal
from flax import nnx
from miniature import CLASSES, TARGET, miniature
from scipy.special import log_softmax

from backdoor_jax import TAC, Classifier, Dataset, FineTune, UserError, scan
from backdoor_jax.defenses import DEFAULT, DEFENSES, Midway, find_defense
from backdoor_jax.defenses.midway import between, distillation_loss, divergence_without, mix_pairs

QUICK = Midway(target=TARGET, steps=60, distillation_steps=40, batch_size=40, learning_rate=0.02, crop=0)


def test_between_is_the_line_through_both_ends() -> None:
    victim, repaired = ({"params": {"w": draw(3, 4, seed=seed)}, "stats": {"m": draw(4, seed=seed)}} for seed in (0, 1))
    assert_trees_equal(between(victim, repaired, 0.0), victim)
    assert_trees_equal(between(victim, repaired, 1.0), repaired)
    expected = jax.tree.map(lambda a, b: np.asarray(a) + 0.3 * (np.asarray(b) - np.asarray(a)), victim, repaired)
    chex.assert_trees_all_close(between(victim, repaired, 0.3), expected, rtol=1e-5, atol=1e-6)


def test_mixed_pairs_lie_between_an_image_and_its_partner() -> None:
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8))
    mixed, partner = mix_pairs(jax.random.key(0), images)
    assert sorted(partner.tolist()) == list(range(50))
    own, other = np.asarray(images, np.float64), np.asarray(images, np.float64)[np.asarray(partner)]
    moved = (np.asarray(partner) != np.arange(50)).nonzero()[0]
    weights = np.sum((mixed - other) * (own - other), (1, 2, 3))[moved] / np.sum((own - other) ** 2, (1, 2, 3))[moved]
    assert weights.min() >= 0.2 - 1e-4
    assert weights.max() <= 0.8 + 1e-4
    assert weights.max() - weights.min() > 0.4
    weight = np.full(50, 0.5)
    weight[moved] = weights
    weight = weight[:, None, None, None]
    assert_near(mixed, weight * own + (1 - weight) * other)


@pytest.mark.parametrize("target", [0, 2, 4])
def test_the_divergence_equals_numpys_over_the_remaining_classes(target: int) -> None:
    teacher, student = 3 * draw(6, 5, seed=1), 3 * draw(6, 5, seed=2)
    p, q = (log_softmax(np.delete(np.asarray(part, np.float64), target, 1), axis=1) for part in (teacher, student))
    assert_near(divergence_without(jnp.asarray(target), teacher, student), np.sum(np.exp(p) * (p - q), 1))


def test_the_divergence_says_nothing_about_the_target() -> None:
    teacher, student = draw(6, 5, seed=1), draw(6, 5, seed=2)
    gradient = jax.grad(lambda logits: jnp.sum(divergence_without(jnp.asarray(3), teacher, logits)))(student)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 3], 0)
    assert np.abs(gradient).max() > 0


def test_the_loss_leaves_out_pairs_with_an_image_of_the_target() -> None:
    case = miniature()
    batch = case.clean.take(np.arange(12))
    key = jax.random.key(5)
    teacher = jax.tree.map(lambda leaf: 1.1 * leaf, case.variables)
    loss, (_, info) = distillation_loss(case.classifier, 0.5, teacher, jnp.asarray(TARGET), case.variables, batch, key)
    mixed, partner = mix_pairs(key, batch.images)
    labels = np.asarray(batch.labels)
    counted = (labels != TARGET) & (labels[np.asarray(partner)] != TARGET)
    assert 0 < counted.sum() < len(labels)
    learned, taught = (
        case.classifier.logits(case.variables, mixed, train=True)[0],
        case.classifier.logits(teacher, mixed)[0],
    )
    p, q = (log_softmax(np.delete(np.asarray(part), TARGET, 1), axis=1)[counted] for part in (taught, learned))
    divergence = np.sum(np.exp(p) * (p - q), 1).mean()
    assert float(info["divergence"]) == pytest.approx(divergence, rel=1e-3)
    assert float(loss) == pytest.approx(float(info["cross_entropy"]) + 0.5 * divergence, rel=1e-3)


def test_a_batch_of_the_target_alone_leaves_cross_entropy() -> None:
    case = miniature()
    batch = case.clean.take(np.flatnonzero(np.asarray(case.clean.labels) == TARGET)[:8])
    target = jnp.asarray(TARGET)
    loss, (_, info) = distillation_loss(
        case.classifier, 1.0, case.variables, target, case.variables, batch, jax.random.key(0)
    )
    assert float(info["divergence"]) == 0
    assert float(loss) == float(info["cross_entropy"])


def test_removes_a_backdoor_and_keeps_accuracy() -> None:
    case = miniature()
    repair = QUICK.repair(jax.random.key(1), case.classifier, case.variables, case.clean)
    after, before = case.scores(repair.variables), case.before
    assert repair.target == TARGET
    assert repair.info["oracle"]
    assert after.asr is not None
    assert after.asr < 0.1
    assert after.acc > before.acc - 0.03


def test_without_distillation_it_is_a_point_on_the_line_to_tac() -> None:
    case, key = miniature(), jax.random.key(1)
    still = dataclasses.replace(QUICK, distillation_steps=1, distillation_rate=1e-12, weight_decay=0.0, share=1.0)
    repair = still.repair(key, case.classifier, case.variables, case.clean)
    method = TAC(target=TARGET, steps=60, batch_size=40, learning_rate=0.02, weight_decay=0.0, crop=0)
    tac = method.repair(jax.random.split(key)[0], case.classifier, case.variables, case.clean)
    chex.assert_trees_all_close(repair.variables["params"], tac.variables["params"], rtol=1e-5, atol=1e-6)


def test_it_keeps_a_share_of_the_distillation() -> None:
    case, key = miniature(), jax.random.key(1)
    ends = [
        dataclasses.replace(QUICK, steps=4, distillation_steps=4, kept=kept)
        .repair(key, case.classifier, case.variables, case.clean)
        .variables
        for kept in (0.25, 0.5, 1.0)
    ]
    chex.assert_trees_all_close(ends[1], between(ends[0], ends[2], 1 / 3), rtol=1e-5, atol=1e-6)
    assert not trees_equal(ends[0], ends[2])


def test_where_no_class_is_named_it_fine_tunes() -> None:
    case, key = miniature(), jax.random.key(1)
    method = dataclasses.replace(QUICK, target="detected", steps=8)
    repair = method.repair(key, case.classifier, case.variables, case.clean)
    tuned = FineTune(steps=8, batch_size=40, learning_rate=0.02, crop=0).repair(
        key, case.classifier, case.variables, case.clean
    )
    assert repair.changed
    assert repair.target is None
    assert repair.scan is not None
    assert repair.scan["verdict"] == "too few classes to tell"
    assert_trees_equal(repair.variables, tuned.variables)


def test_depends_on_the_key_alone() -> None:
    case, method = miniature(), dataclasses.replace(QUICK, steps=4, distillation_steps=4)
    found = scan(case.classifier, case.variables, case.clean.images)
    repair = assert_depends_on_key_alone(
        lambda number: method.repair(jax.random.key(number), case.classifier, case.variables, case.clean, scan=found),
        case.variables,
    )
    assert repair.info["steps"] == 4
    assert repair.info["tac"].keys() >= {"clean", "perturbed"}


def test_a_target_that_does_not_exist_is_refused() -> None:
    case = miniature()
    with pytest.raises(UserError, match=f"target is {CLASSES}"):
        Midway(target=CLASSES).repair(jax.random.key(0), case.classifier, case.variables, case.clean)


def test_auto_is_the_default_repair() -> None:
    assert find_defense("auto") is DEFAULT
    assert DEFAULT is Midway
    assert "auto" not in DEFENSES


class NNXNet(nnx.Module):
    """Pooled colors, a layer and a linear head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x.mean((1, 2)))))


def _features(variables: Any, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    del train
    return x.reshape(len(x), -1), variables


def _head(variables: Any, latent: jax.Array) -> jax.Array:
    return latent @ variables["params"]["out"]["kernel"] + variables["params"]["out"]["bias"]


def _foreign(kind: str, clean: Dataset) -> tuple[Classifier, Any]:
    if kind == "nnx":
        return Classifier.from_nnx(NNXNet(nnx.Rngs(0)), CLASSES, ("out",))
    if kind == "linen":
        case = miniature()
        return Classifier.from_linen(case.classifier.network, CLASSES, case.classifier.head_path), case.variables
    classifier = Classifier.from_functions(None, _features, _head, CLASSES, ("out",))
    size = int(np.prod(clean.images.shape[1:]))
    return classifier, {"params": {"out": {"kernel": 0.1 * draw(size, CLASSES), "bias": jnp.zeros(CLASSES)}}}


@pytest.mark.parametrize("kind", ["linen", "nnx", "functions"])
def test_repairs_models_made_elsewhere(kind: str) -> None:
    clean = miniature().clean
    classifier, variables = _foreign(kind, clean)
    method = Midway(target=TARGET, steps=2, distillation_steps=2, crop=0)
    repair = method.repair(jax.random.key(0), classifier, variables, clean)
    chex.assert_trees_all_equal_shapes_and_dtypes(repair.variables, variables)
    logits, _ = classifier.logits(repair.variables, clean.images)
    assert np.isfinite(logits).all()
    assert repair.changed
