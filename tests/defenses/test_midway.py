"""Midway: its ingredients against closed forms and NumPy, the repair on planted backdoors and a clean model."""

import dataclasses
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, assert_trees_equal, draw, trees_equal
from flax import nnx
from jax.flatten_util import ravel_pytree
from miniature import CLASSES, TARGET, miniature

from backdoor_jax import TAC, Classifier, Dataset, UserError, scan
from backdoor_jax.defenses import DEFAULT, DEFENSES, Midway, Repair, find_defense
from backdoor_jax.defenses.midway import between, every_class_loss
from backdoor_jax.models import Variables
from backdoor_jax.training import cross_entropy

QUICK = Midway(target=TARGET, steps=100, batch_size=40, crop=0)


def test_between_is_the_line_through_both_ends() -> None:
    victim, repaired = ({"params": {"w": draw(3, 4, seed=seed)}, "stats": {"m": draw(4, seed=seed)}} for seed in (0, 1))
    assert_trees_equal(between(victim, repaired, 0.0), victim)
    assert_trees_equal(between(victim, repaired, 1.0), repaired)
    expected = jax.tree.map(lambda a, b: np.asarray(a) + 0.3 * (np.asarray(b) - np.asarray(a)), victim, repaired)
    chex.assert_trees_all_close(between(victim, repaired, 0.3), expected, rtol=1e-5, atol=1e-6)


def test_removes_a_backdoor_and_keeps_accuracy() -> None:
    case = miniature()
    repair = QUICK.repair(jax.random.key(1), case.classifier, case.variables, case.clean)
    after = case.scores(repair.variables)
    assert repair.target == TARGET
    assert repair.info["oracle"]
    assert after.asr is not None
    assert after.asr < 0.1
    assert after.acc > case.before.acc - 0.03


def test_it_is_a_point_on_the_line_to_the_end_of_its_training() -> None:
    case, key = miniature(), jax.random.key(1)
    found = scan(case.classifier, case.variables, case.clean.images)
    end, part = (
        dataclasses.replace(QUICK, steps=4, share=share).repair(
            key, case.classifier, case.variables, case.clean, scan=found
        )
        for share in (1.0, 0.25)
    )
    assert not trees_equal(end.variables, case.variables)
    expected = between(case.variables, end.variables, 0.25)
    chex.assert_trees_all_close(part.variables, expected, rtol=1e-6, atol=1e-7)


def test_without_guide_it_is_tac_at_the_rate_of_its_first_step() -> None:
    case, key = miniature(), jax.random.key(1)
    images = len(case.clean)
    tac = TAC(target=TARGET, steps=1, batch_size=images, momentum=0.0, weight_decay=0.0, crop=0)
    ours = Midway(
        target=TARGET,
        steps=1,
        batch_size=images,
        momentum=0.0,
        weight_decay=0.0,
        crop=0,
        first_step=0.01,
        mu=0.0,
        share=1.0,
    )
    moved = difference(ours.repair(key, case.classifier, case.variables, case.clean), case.variables)
    expected = difference(tac.repair(key, case.classifier, case.variables, case.clean), case.variables)
    length = np.linalg.norm(ravel_pytree(case.variables["params"])[0])
    np.testing.assert_allclose(np.linalg.norm(moved), 0.01 * length, rtol=1e-3)
    np.testing.assert_allclose(moved / np.linalg.norm(moved), expected / np.linalg.norm(expected), atol=1e-3)


def difference(repair: Repair, variables: Variables) -> np.ndarray:
    """By how much a repair moved the parameters."""
    return np.asarray(ravel_pytree(repair.variables["params"])[0] - ravel_pytree(variables["params"])[0])


def test_where_no_class_is_named_it_unlearns_all_of_them() -> None:
    case = miniature()
    method = dataclasses.replace(QUICK, target="detected")
    repair = method.repair(jax.random.key(1), case.classifier, case.variables, case.clean)
    after = case.scores(repair.variables)
    assert repair.changed
    assert repair.target is None
    assert repair.scan is not None
    assert repair.scan["verdict"] == repair.info["untargeted"] == "too few classes to tell"
    assert after.asr is not None and case.before.asr is not None
    assert after.asr < 0.3 < case.before.asr
    assert after.acc > case.before.acc - 0.03


def test_every_image_is_changed_towards_a_class_of_its_own() -> None:
    case = miniature()
    batch = case.clean.take(slice(3))
    latent, _ = case.classifier.features(case.variables, batch.images, train=True)
    changes = 3 * draw(2, latent.shape[-1])
    towards = np.array([cross_entropy(case.classifier.head(case.variables, latent + s), batch.labels) for s in changes])
    clean = float(jnp.mean(cross_entropy(case.classifier.head(case.variables, latent), batch.labels)))
    possible = {
        choice: clean + 0.5 * towards[choice, range(3)].mean() for choice in itertools.product(range(2), repeat=3)
    }
    met = set()
    for number in range(12):
        key = jax.random.key(number)
        found, _ = every_class_loss(case.classifier, 0.5, jnp.asarray(changes), case.variables, batch, key)
        choice, nearest = min(possible.items(), key=lambda item: abs(item[1] - float(found)))
        np.testing.assert_allclose(found, nearest, rtol=1e-4)
        met.add(choice)
    assert len(met) > 3


def test_where_no_change_is_feasible_nothing_changes() -> None:
    case = miniature()
    found = scan(case.classifier, case.variables, case.clean.images)
    none = np.zeros(CLASSES, bool)
    found = found._replace(perturbations=found.perturbations._replace(feasible=none))
    repair = QUICK.repair(jax.random.key(1), case.classifier, case.variables, case.clean, scan=found)
    assert not repair.changed
    assert_trees_equal(repair.variables, case.variables)


def test_depends_on_the_key_alone() -> None:
    case, method = miniature(), dataclasses.replace(QUICK, steps=4)
    found = scan(case.classifier, case.variables, case.clean.images)
    repair = assert_depends_on_key_alone(
        lambda number: method.repair(jax.random.key(number), case.classifier, case.variables, case.clean, scan=found),
        case.variables,
    )
    assert repair.info["steps"] == 4
    assert repair.info["last_epoch"].keys() >= {"clean", "perturbed", "divergence"}


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
    method = Midway(target=TARGET, steps=2, crop=0)
    repair = method.repair(jax.random.key(0), classifier, variables, clean)
    chex.assert_trees_all_equal_shapes_and_dtypes(repair.variables, variables)
    logits, _ = classifier.logits(repair.variables, clean.images)
    assert np.isfinite(logits).all()
    assert repair.changed
