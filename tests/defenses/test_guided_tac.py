"""Guided TAC: its loss against its parts, TAC as a special case, the repair on a planted backdoor."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import assert_depends_on_key_alone, assert_trees_equal
from jax.tree_util import Partial
from miniature import TARGET, miniature
from scipy.special import log_softmax

from backdoor_jax import TAC, scan
from backdoor_jax.defenses import GuidedTAC
from backdoor_jax.defenses.guided_tac import guided_loss
from backdoor_jax.defenses.midway import mix_pairs
from backdoor_jax.defenses.tac import tac_loss

QUICK = GuidedTAC(target=TARGET, steps=100, batch_size=40, learning_rate=0.05, crop=0)


def test_the_loss_adds_the_divergence_from_the_victim_on_mixed_pairs() -> None:
    case, key = miniature(), jax.random.key(5)
    batch = case.clean.take(np.arange(12))
    perturbation = jnp.linspace(-1, 1, case.classifier.features(case.variables, batch.images)[0].shape[1])
    victim = jax.tree.map(lambda leaf: 1.1 * leaf, case.variables)
    unlearn = Partial(tac_loss, case.classifier, 0.7, perturbation)
    loss, (updated, info) = guided_loss(
        case.classifier, 0.5, victim, jnp.asarray(TARGET), unlearn, case.variables, batch, key
    )
    without, (expected, _) = unlearn(case.variables, batch, key)

    mixed, partner = mix_pairs(key, batch.images)
    labels = np.asarray(batch.labels)
    counted = (labels != TARGET) & (labels[np.asarray(partner)] != TARGET)
    assert 0 < counted.sum() < len(labels)
    learned = case.classifier.logits(case.variables, mixed, train=True)[0]
    taught = case.classifier.logits(victim, mixed)[0]
    p, q = (log_softmax(np.delete(np.asarray(part), TARGET, 1), axis=1)[counted] for part in (taught, learned))
    divergence = np.sum(np.exp(p) * (p - q), 1).mean()
    assert divergence > 0.01
    assert float(info["divergence"]) == pytest.approx(divergence, rel=1e-3)
    assert float(loss) == pytest.approx(float(without) + 0.5 * divergence, rel=1e-3)
    assert_trees_equal(updated, expected)  # Mixed images leave no trace in the statistics.


def test_without_guide_and_clipping_it_is_tac() -> None:
    case, key = miniature(), jax.random.key(1)
    method = dataclasses.replace(QUICK, steps=8, learning_rate=0.02, mu=0.0, clip=1e9)
    guided = method.repair(key, case.classifier, case.variables, case.clean)
    tac = TAC(target=TARGET, steps=8, batch_size=40, learning_rate=0.02, crop=0)
    tuned = tac.repair(key, case.classifier, case.variables, case.clean)
    chex.assert_trees_all_close(guided.variables, tuned.variables, rtol=1e-4, atol=1e-5)


def test_a_step_is_no_longer_than_the_clip_allows() -> None:
    case = miniature()
    method = dataclasses.replace(QUICK, steps=1, batch_size=70, clip=1e-3, momentum=0.0, weight_decay=0.0)
    repair = method.repair(jax.random.key(1), case.classifier, case.variables, case.clean)
    moved = jax.tree.map(lambda new, old: new - old, repair.variables["params"], case.variables["params"])
    length = float(optax.global_norm(moved))
    steps = repair.info["steps"]
    assert 0 < length <= 1.001 * steps * 0.05 * 1e-3


def test_removes_a_backdoor_and_keeps_accuracy() -> None:
    case = miniature()
    repair = QUICK.repair(jax.random.key(1), case.classifier, case.variables, case.clean)
    after, before = case.scores(repair.variables), case.before
    assert repair.target == TARGET
    assert repair.info["oracle"]
    assert after.asr is not None
    assert after.asr < 0.1
    assert after.acc > before.acc - 0.03


def test_where_no_class_is_named_nothing_changes() -> None:
    case = miniature()
    method = dataclasses.replace(QUICK, target="detected")
    repair = method.repair(jax.random.key(1), case.classifier, case.variables, case.clean)
    assert not repair.changed
    assert repair.why == "too few classes to tell"
    assert repair.variables is case.variables


def test_depends_on_the_key_alone() -> None:
    case, method = miniature(), dataclasses.replace(QUICK, steps=4)
    found = scan(case.classifier, case.variables, case.clean.images)
    repair = assert_depends_on_key_alone(
        lambda number: method.repair(jax.random.key(number), case.classifier, case.variables, case.clean, scan=found),
        case.variables,
    )
    assert repair.info["last_epoch"].keys() >= {"clean", "perturbed", "divergence"}
