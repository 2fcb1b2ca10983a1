"""Distillation on mixed images without the target: its ingredients against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_near, assert_trees_equal, draw
from jax.tree_util import Partial
from miniature import TARGET, miniature
from scipy.special import log_softmax

from backdoor_jax.defenses.distillation import distillation_loss, divergence_without, mix_pairs
from backdoor_jax.defenses.tac import tac_loss
from backdoor_jax.training import supervised_loss


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


def test_the_loss_adds_the_divergence_from_the_teacher_on_mixed_pairs() -> None:
    case, key = miniature(), jax.random.key(5)
    batch = case.clean.take(np.arange(12))
    perturbation = jnp.linspace(-1, 1, case.classifier.features(case.variables, batch.images)[0].shape[1])
    teacher = jax.tree.map(lambda leaf: 1.1 * leaf, case.variables)
    task = Partial(tac_loss, case.classifier, 0.7, perturbation)
    loss, (updated, info) = distillation_loss(
        case.classifier, 0.5, teacher, jnp.asarray(TARGET), task, case.variables, batch, key
    )
    without, (expected, _) = task(case.variables, batch, key)

    mixed, partner = mix_pairs(key, batch.images)
    labels = np.asarray(batch.labels)
    counted = (labels != TARGET) & (labels[np.asarray(partner)] != TARGET)
    assert 0 < counted.sum() < len(labels)
    learned = case.classifier.logits(case.variables, mixed, train=True)[0]
    taught = case.classifier.logits(teacher, mixed)[0]
    p, q = (log_softmax(np.delete(np.asarray(part), TARGET, 1), axis=1)[counted] for part in (taught, learned))
    divergence = np.sum(np.exp(p) * (p - q), 1).mean()
    assert divergence > 0.01
    assert float(info["divergence"]) == pytest.approx(divergence, rel=1e-3)
    assert float(loss) == pytest.approx(float(without) + 0.5 * divergence, rel=1e-3)
    assert_trees_equal(updated, expected)  # Mixed images leave no trace in the statistics.


def test_a_batch_of_the_target_alone_leaves_the_tasks_loss() -> None:
    case, key = miniature(), jax.random.key(0)
    batch = case.clean.take(np.flatnonzero(np.asarray(case.clean.labels) == TARGET)[:8])
    task = Partial(supervised_loss, case.classifier)
    teacher = jax.tree.map(lambda leaf: 1.1 * leaf, case.variables)
    loss, (_, info) = distillation_loss(
        case.classifier, 1.0, teacher, jnp.asarray(TARGET), task, case.variables, batch, key
    )
    assert float(info["divergence"]) == 0
    assert float(loss) == float(task(case.variables, batch, key)[0])
