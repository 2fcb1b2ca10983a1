"""Fine-pruning: order and stop against a loop in NumPy, rows held at zero, and a small victim."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TinyNet
from miniature import miniature

from backdoor_jax import (
    Classifier,
    Dataset,
    FinePruningConfig,
    NonFiniteError,
    UserError,
    fine_pruning,
    finetune,
    make_dataset,
)
from backdoor_jax.defenses import FineTuneConfig
from backdoor_jax.defenses.fine_pruning import prune_dormant
from backdoor_jax.models import Variables
from backdoor_jax.training.engine import run_epoch

LATENTS = 12
QUICK = {"steps": 4, "batch_size": 12, "crop": 0}


class Case(NamedTuple):
    classifier: Classifier
    variables: Variables
    data: Dataset


@pytest.fixture(scope="module")
def case() -> Case:
    """Random weights whose own predictions are the labels but for one in five, so that accuracies differ."""
    generator = np.random.default_rng(0)
    classifier = Classifier(TinyNet(3, width=LATENTS), 3)
    images = generator.integers(0, 256, (60, 1, 1, 3)) // 2 + generator.integers(0, 128, (60, 8, 8, 3))
    images = images.astype(np.uint8)
    variables = classifier.init(jax.random.key(2), jnp.asarray(images))
    own = np.argmax(np.asarray(classifier.logits(variables, jnp.asarray(images))[0]), -1)
    return Case(classifier, variables, make_dataset(images, np.where(np.arange(60) % 5, own, (own + 1) % 3), 3))


def leaves(tree: Any) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(tree)}


def loop(case: Case, tolerance: float, share: float) -> tuple[list[int], float]:
    """One channel more at a time, each network judged anew, until the accuracy leaves the tolerance."""
    latent = np.asarray(case.classifier.features(case.variables, case.data.images)[0], np.float64)
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), case.variables["params"]["linear"])
    order, labels = np.argsort(latent.mean(0)), np.asarray(case.data.labels)
    first, kept = None, []
    for count in range(0, LATENTS, int(np.ceil(LATENTS * share))):
        kernel = head["kernel"].copy()
        kernel[order[:count]] = 0
        accuracy = np.mean(np.argmax(latent @ kernel + head["bias"], -1) == labels)
        first = accuracy if first is None else first
        if abs(accuracy - first) / first >= tolerance:
            break
        kept.append((sorted(order[:count].tolist()), accuracy))
    return kept[-1]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.2, 0.5, 2.0])
def test_pruning_ends_where_a_loop_over_networks_ends(case: Case, tolerance: float, share: float) -> None:
    found = prune_dormant(*case, FinePruningConfig(tolerance=tolerance, share=share))
    pruned, accuracy = loop(case, tolerance, share)
    assert np.flatnonzero(found.kept == 0).tolist() == pruned
    assert found.accuracies[found.chosen] == pytest.approx(accuracy)
    assert found.counts[found.chosen] == len(pruned)


def test_tolerances_of_the_test_above_come_to_different_networks(case: Case) -> None:
    counts = {len(loop(case, tolerance, 0.01)[0]) for tolerance in (0.01, 0.05, 0.2, 0.5, 2.0)}
    assert len(counts) >= 3
    assert max(counts) == LATENTS - 1


def test_a_model_that_is_never_right_keeps_everything(case: Case) -> None:
    wrong = (np.argmax(np.asarray(case.classifier.logits(case.variables, case.data.images)[0]), -1) + 1) % 3
    data = Dataset(case.data.images, jnp.asarray(wrong, jnp.int32))
    found = prune_dormant(case.classifier, case.variables, data)
    assert found.accuracies[0] == 0
    assert found.kept.all()


def test_a_repair_holds_the_pruned_rows_at_zero_and_moves_the_rest(case: Case) -> None:
    before = leaves(case.variables)
    config = FinePruningConfig(tolerance=0.3, **QUICK)
    repair = fine_pruning(jax.random.key(0), *case, config)
    pruned = repair.info["pruned"]
    assert 0 < len(pruned) < LATENTS
    assert pruned == np.flatnonzero(prune_dormant(*case, config).kept == 0).tolist()
    kernel = np.asarray(repair.variables["params"]["linear"]["kernel"])
    assert (kernel[pruned] == 0).all()
    assert (np.delete(kernel, pruned, 0) != np.delete(case.variables["params"]["linear"]["kernel"], pruned, 0)).all()
    assert (
        np.asarray(repair.variables["params"]["conv"]["kernel"]) != case.variables["params"]["conv"]["kernel"]
    ).any()
    assert leaves(case.variables) == before
    assert repair.info["latents"] == LATENTS
    assert repair.info["pruned_accuracy"] > 0.7 * repair.info["accuracy"]
    assert json.loads(json.dumps(repair.info)) == repair.info


def test_without_anything_pruned_it_is_fine_tuning(case: Case) -> None:
    key = jax.random.key(3)
    ours = fine_pruning(key, *case, FinePruningConfig(tolerance=1e-6, share=1.0, **QUICK))
    plain = finetune(key, *case, FineTuneConfig(**QUICK))
    assert ours.info["pruned"] == []
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours.variables, plain.variables)


def test_a_repair_is_deterministic_under_its_key_and_compiled_once(case: Case) -> None:
    config = FinePruningConfig(tolerance=0.3, **QUICK)
    first = fine_pruning(jax.random.key(5), *case, config).variables
    compiled = run_epoch._cache_size()
    again, other = (fine_pruning(jax.random.key(number), *case, config).variables for number in (5, 6))
    fine_pruning(jax.random.key(5), *case, FinePruningConfig(tolerance=0.05, learning_rate=0.02, **QUICK))
    assert run_epoch._cache_size() == compiled
    assert leaves(first) == leaves(again)
    assert leaves(first) != leaves(other)


def test_what_cannot_be_used_is_refused(case: Case) -> None:
    with pytest.raises(NonFiniteError, match="fine_pruning: logits are not finite"):
        fine_pruning(jax.random.key(0), case.classifier, jax.tree.map(lambda x: x * jnp.nan, case.variables), case.data)
    for field, value in (("tolerance", 0.0), ("share", 0.0), ("share", 1.1), ("steps", 0)):
        with pytest.raises(UserError, match=rf"^FinePruningConfig\.{field} is "):
            FinePruningConfig(**{field: value})


@pytest.mark.slow
def test_a_small_victim_is_repaired_where_fine_tuning_alone_is_not_enough() -> None:
    small = miniature()
    settings = {"steps": 60, "batch_size": 40, "crop": 0, "learning_rate": 0.02}
    victim = (small.classifier, small.variables, small.clean)
    repair = fine_pruning(jax.random.key(0), *victim, FinePruningConfig(**settings))
    after = small.scores(repair.variables)
    plain = small.scores(finetune(jax.random.key(0), *victim, FineTuneConfig(**settings)).variables)
    assert small.before.asr > 0.9 and plain.asr > 0.9
    assert after.asr < 0.1
    assert after.acc > small.before.acc - 0.05
