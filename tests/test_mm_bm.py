"""MM-BM: which images and places, what is shared with PAD, and a small victim."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import random_variables
from miniature import miniature

from backdoor_jax import Classifier, Dataset, MmBmConfig, UserError, build_classifier, mm_bm
from backdoor_jax.defenses import BoundConfig, bound_activations
from backdoor_jax.models import Variables
from backdoor_jax.training import run_epoch

QUICK: dict[str, Any] = {"places": None, "bound_epochs": 3, "bound_batch_size": 6}


class Case(NamedTuple):
    classifier: Classifier
    variables: Variables
    data: Dataset


@pytest.fixture(scope="module")
def case(tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset) -> Case:
    """A third of the labels are the victim's own predictions, the others are wrong."""
    own = jnp.argmax(tiny_classifier.logits(tiny_variables, tiny_data.images)[0], -1)
    labels = jnp.where(jnp.arange(24) % 3, (own + 1) % 3, own).astype(jnp.int32)
    return Case(tiny_classifier, tiny_variables, Dataset(tiny_data.images, labels))


def leaves(tree: Any) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(tree)}


def test_bounds_are_those_of_the_images_that_the_victim_has_right(case: Case) -> None:
    key = jax.random.key(0)
    repair = mm_bm(key, *case, MmBmConfig(**QUICK))
    right = case.data.take(np.arange(0, 24, 3))
    want, _ = bound_activations(key, case.classifier, case.variables, right, BoundConfig(**QUICK, bound_weight=0.5))
    assert repair.info["right"] == 8
    assert leaves(repair.variables) == leaves(want)
    largest = case.classifier.activations(case.variables, right.images)["relu"]["upper"]
    assert (repair.variables["bounds"]["relu"]["upper"] <= largest * (1 + 1e-6)).all()


def test_a_repair_adds_bounds_and_changes_nothing_else(case: Case) -> None:
    before = leaves(case.variables)
    repair = mm_bm(jax.random.key(0), *case, MmBmConfig(**QUICK))
    after = leaves(repair.variables)
    assert leaves(case.variables) == before
    assert after.keys() == before.keys() | {"['bounds']['relu']['upper']"}
    assert all(after[path] == before[path] for path in before)
    assert json.loads(json.dumps(repair.info)) == repair.info


def test_a_repair_is_deterministic_under_its_key_and_compiled_once(case: Case) -> None:
    first = leaves(mm_bm(jax.random.key(5), *case, MmBmConfig(**QUICK)).variables)
    compiled = run_epoch._cache_size()
    again, other = (leaves(mm_bm(jax.random.key(n), *case, MmBmConfig(**QUICK)).variables) for n in (5, 6))
    mm_bm(jax.random.key(5), *case, MmBmConfig(**QUICK, bound_weight=0.1, bound_learning_rate=0.01))
    assert run_epoch._cache_size() == compiled
    assert first == again
    assert first != other


@pytest.mark.slow
def test_the_three_places_are_the_default_and_unknown_ones_are_refused(case: Case, tiny_data: Dataset) -> None:
    with pytest.raises(UserError, match=r"no rectifier at layer1_0/relu1, .* there are relu"):
        mm_bm(jax.random.key(0), *case)
    classifier = build_classifier("preact_resnet18", 3, width=2)
    variables = random_variables(classifier, tiny_data.images)
    repair = mm_bm(jax.random.key(0), classifier, variables, tiny_data, MmBmConfig(bound_epochs=1))
    assert {"/".join((stage, *inner)) for stage, inner in repair.variables["bounds"].items()} == {
        "layer1_0/relu1", "layer2_0/relu1", "layer3_0/relu1",
    }  # fmt: skip


def test_a_model_that_is_never_right_cannot_be_clipped(case: Case) -> None:
    own = jnp.argmax(case.classifier.logits(case.variables, case.data.images)[0], -1)
    wrong = Dataset(case.data.images, ((own + 1) % 3).astype(jnp.int32))
    with pytest.raises(UserError, match="mm_bm: the model classifies none of the images rightly"):
        mm_bm(jax.random.key(0), case.classifier, case.variables, wrong, MmBmConfig(**QUICK))


def test_settings_out_of_range_are_refused_by_name() -> None:
    for field, value in {"places": (), "bound_epochs": 0, "bound_weight": -1.0, "bound_factor": 0.5}.items():
        with pytest.raises(UserError, match=rf"^MmBmConfig\.{field} is "):
            MmBmConfig(**{field: value})


@pytest.mark.slow
def test_a_small_victim_is_repaired() -> None:
    small = miniature()
    config = MmBmConfig(places=("relu0", "relu1"), bound_batch_size=40)
    after = small.scores(mm_bm(jax.random.key(0), small.classifier, small.variables, small.clean, config).variables)
    assert small.before.asr > 0.9
    assert after.asr < 0.4
    assert after.acc > small.before.acc - 0.05
