"""Guided TAC: TAC as a special case, the length of a step, the repair of a planted backdoor."""

import dataclasses

import chex
import jax
import numpy as np
from comparison import assert_depends_on_key_alone
from miniature import TARGET, assert_removes_the_backdoor, miniature

from backdoor_jax import TAC, scan
from backdoor_jax.defenses import GuidedTAC

QUICK = GuidedTAC(target=TARGET, steps=100, batch_size=40, learning_rate=0.05, crop=0)


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
    length = np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved)]))
    steps = repair.info["steps"]
    assert 0 < length <= 1.001 * steps * 0.05 * 1e-3


def test_removes_a_backdoor_and_keeps_accuracy() -> None:
    assert_removes_the_backdoor(QUICK, miniature())


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
