"""Midway: its ingredients against closed forms and NumPy, the repair on planted backdoors and a clean model."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, assert_trees_equal, draw, trees_equal
from flax import nnx
from miniature import CLASSES, TARGET, assert_removes_the_backdoor, miniature

from backdoor_jax import TAC, Classifier, Dataset, FineTune, UserError, scan
from backdoor_jax.defenses import DEFAULT, DEFENSES, Midway, find_defense
from backdoor_jax.defenses.midway import between

QUICK = Midway(target=TARGET, steps=60, distillation_steps=40, batch_size=40, crop=0)


def test_between_is_the_line_through_both_ends() -> None:
    victim, repaired = ({"params": {"w": draw(3, 4, seed=seed)}, "stats": {"m": draw(4, seed=seed)}} for seed in (0, 1))
    assert_trees_equal(between(victim, repaired, 0.0), victim)
    assert_trees_equal(between(victim, repaired, 1.0), repaired)
    expected = jax.tree.map(lambda a, b: np.asarray(a) + 0.3 * (np.asarray(b) - np.asarray(a)), victim, repaired)
    chex.assert_trees_all_close(between(victim, repaired, 0.3), expected, rtol=1e-5, atol=1e-6)


def test_removes_a_backdoor_and_keeps_accuracy() -> None:
    assert_removes_the_backdoor(QUICK, miniature())


def test_without_distillation_it_is_a_point_on_the_line_to_tac() -> None:
    case, key = miniature(), jax.random.key(1)
    still = dataclasses.replace(QUICK, distillation_steps=1, distillation_rate=1e-12, weight_decay=0.0, share=1.0)
    repair = still.repair(key, case.classifier, case.variables, case.clean)
    tac = TAC.repair(still, jax.random.split(key)[0], case.classifier, case.variables, case.clean)
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
    tuned = FineTune(steps=8, batch_size=40, crop=0).repair(key, case.classifier, case.variables, case.clean)
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
