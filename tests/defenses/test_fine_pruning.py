"""Fine-pruning: order and end of the pruning against a loop in NumPy, rows held at zero, and a small victim."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, cache_size, leaves_of, trees_equal
from conftest import TinyNet
from miniature import Case, miniature

from backdoor_jax import Classifier, Dataset, FineTune, NonFiniteError, UserError, make_dataset
from backdoor_jax.defenses import FinePruning, prune_dormant
from backdoor_jax.training.fitting import _compiled_epoch

LATENTS = 12
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 12, "crop": 0}


@pytest.fixture(scope="module")
def case() -> Case:
    """Random weights whose own predictions are four fifths of the labels, so that accuracies differ."""
    generator = np.random.default_rng(0)
    classifier = Classifier(TinyNet(3, width=LATENTS), 3)
    images = generator.integers(0, 256, (60, 1, 1, 3)) // 2 + generator.integers(0, 128, (60, 8, 8, 3))
    images = images.astype(np.uint8)
    variables = classifier.init(jax.random.key(2), jnp.asarray(images))
    own = np.argmax(np.asarray(classifier.logits(variables, jnp.asarray(images))[0]), -1)
    return Case(classifier, variables, make_dataset(images, np.where(np.arange(60) % 5, own, (own + 1) % 3), 3))


def loop(case: Case, tolerance: float, share: float) -> tuple[list[int], float]:
    """Prunes one step more at a time and evaluates each network, until the accuracy leaves the tolerance."""
    latent = np.asarray(case.classifier.features(case.variables, case.data.images)[0], np.float64)
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), case.variables["params"]["linear"])
    order, labels = np.argsort(latent.mean(0)), np.asarray(case.data.labels)
    first: float | None = None
    kept: list[tuple[list[int], float]] = []
    for count in range(0, LATENTS, int(np.ceil(LATENTS * share))):
        kernel = head["kernel"].copy()
        kernel[order[:count]] = 0
        accuracy = float(np.mean(np.argmax(latent @ kernel + head["bias"], -1) == labels))
        first = accuracy if first is None else first
        if abs(accuracy - first) / first >= tolerance:
            break
        kept.append((sorted(order[:count].tolist()), accuracy))
    return kept[-1]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.2, 0.5, 2.0])
def test_pruning_ends_where_a_loop_over_networks_ends(case: Case, tolerance: float, share: float) -> None:
    found = prune_dormant(*case, FinePruning(tolerance=tolerance, share=share))
    pruned, accuracy = loop(case, tolerance, share)
    assert np.flatnonzero(found.kept == 0).tolist() == pruned
    assert found.accuracies[found.chosen] == pytest.approx(accuracy)
    assert found.counts[found.chosen] == len(pruned)


def test_the_tolerances_above_give_different_networks(case: Case) -> None:
    counts = {len(loop(case, tolerance, 0.01)[0]) for tolerance in (0.01, 0.05, 0.2, 0.5, 2.0)}
    assert len(counts) >= 3
    assert max(counts) == LATENTS - 1


def test_a_model_that_is_never_correct_keeps_everything(case: Case) -> None:
    wrong = (np.argmax(np.asarray(case.classifier.logits(case.variables, case.data.images)[0]), -1) + 1) % 3
    data = Dataset(case.data.images, jnp.asarray(wrong, jnp.int32))
    found = prune_dormant(case.classifier, case.variables, data)
    assert found.accuracies[0] == 0
    assert found.kept.all()


def test_a_repair_holds_the_pruned_rows_at_zero_and_moves_the_rest(case: Case) -> None:
    before = leaves_of(case.variables)
    defense = FinePruning(tolerance=0.3, **QUICK)
    repair = defense.repair(jax.random.key(0), *case)
    pruned = repair.info["pruned"]
    assert 0 < len(pruned) < LATENTS
    assert pruned == np.flatnonzero(prune_dormant(*case, defense).kept == 0).tolist()
    kernel = np.asarray(repair.variables["params"]["linear"]["kernel"])
    assert (kernel[pruned] == 0).all()
    assert (np.delete(kernel, pruned, 0) != np.delete(case.variables["params"]["linear"]["kernel"], pruned, 0)).all()
    assert (
        np.asarray(repair.variables["params"]["conv"]["kernel"]) != case.variables["params"]["conv"]["kernel"]
    ).any()
    assert_trees_equal(case.variables, before)
    assert repair.changed
    assert repair.info["latents"] == LATENTS
    assert repair.info["pruned_accuracy"] > 0.7 * repair.info["accuracy"]
    assert json.loads(json.dumps(repair.info)) == repair.info


def test_where_nothing_is_pruned_it_is_fine_tuning(case: Case) -> None:
    key = jax.random.key(3)
    pruned = FinePruning(tolerance=1e-6, share=1.0, **QUICK).repair(key, *case)
    tuned = FineTune(**QUICK).repair(key, *case)
    assert pruned.info["pruned"] == []
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), pruned.variables, tuned.variables)


def test_a_repair_is_deterministic_under_its_key_and_compiled_once(case: Case) -> None:
    defense = FinePruning(tolerance=0.3, **QUICK)
    first = defense.repair(jax.random.key(5), *case).variables
    compiled = cache_size(_compiled_epoch)
    again, other = (defense.repair(jax.random.key(number), *case).variables for number in (5, 6))
    FinePruning(tolerance=0.05, learning_rate=0.02, **QUICK).repair(jax.random.key(5), *case)
    assert cache_size(_compiled_epoch) == compiled
    assert_trees_equal(first, again)
    assert not trees_equal(first, other)


def test_damaged_weights_are_rejected(case: Case) -> None:
    damaged = jax.tree.map(lambda x: x * jnp.nan, case.variables)
    with pytest.raises(NonFiniteError, match=r"fine_pruning: variables: .* not finite"):
        FinePruning().repair(jax.random.key(0), case.classifier, damaged, case.data)


@pytest.mark.parametrize(("field", "value"), [("tolerance", 0.0), ("share", 0.0), ("share", 1.1), ("steps", 0)])
def test_settings_out_of_range_are_rejected_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^FinePruning\.{field} is "):
        FinePruning(**{field: value})


@pytest.mark.slow
def test_a_small_victim_is_repaired_where_fine_tuning_alone_is_not_enough() -> None:
    small = miniature()
    settings: dict[str, Any] = {"steps": 60, "batch_size": 40, "crop": 0, "learning_rate": 0.02}
    victim = (small.classifier, small.variables, small.clean)
    after, tuned = (
        small.scores(defense.repair(jax.random.key(0), *victim).variables)
        for defense in (FinePruning(**settings), FineTune(**settings))
    )
    assert small.before.asr is not None and tuned.asr is not None and after.asr is not None
    assert small.before.asr > 0.9 and tuned.asr > 0.9
    assert after.asr < 0.1
    assert after.acc > small.before.acc - 0.05
