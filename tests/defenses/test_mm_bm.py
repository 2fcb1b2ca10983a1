"""MM-BM: which images and places it uses, what it shares with PAD, and a small victim."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, cache_size, leaves_of, random_variables, trees_equal
from flax.traverse_util import flatten_dict
from miniature import Case, miniature

from backdoor_jax import Classifier, Dataset, UserError, build_classifier
from backdoor_jax.defenses import MMBM, BoundConfig, bound_activations
from backdoor_jax.models import Variables
from backdoor_jax.training.fitting import _compiled_epoch

QUICK: dict[str, Any] = {"places": None, "bound_epochs": 3, "bound_batch_size": 6}


@pytest.fixture(scope="module")
def case(tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset) -> Case:
    """A third of the labels are the victim's own predictions, the others are wrong."""
    own = jnp.argmax(tiny_classifier.logits(tiny_variables, tiny_data.images)[0], -1)
    labels = jnp.where(jnp.arange(24) % 3, (own + 1) % 3, own).astype(jnp.int32)
    return Case(tiny_classifier, tiny_variables, Dataset(tiny_data.images, labels))


def test_bounds_are_fitted_on_the_correctly_classified_images(case: Case) -> None:
    key = jax.random.key(0)
    repair = MMBM(**QUICK).repair(key, *case)
    right = case.data.take(np.arange(0, 24, 3))
    expected, _ = bound_activations(key, case.classifier, case.variables, right, BoundConfig(**QUICK, bound_weight=0.5))
    assert repair.info["right"] == 8
    assert_trees_equal(repair.variables, expected)
    largest = case.classifier.activations(case.variables, right.images)["relu"]["upper"]
    assert (repair.variables["bounds"]["relu"]["upper"] <= largest * (1 + 1e-6)).all()


def test_a_repair_adds_bounds_and_changes_nothing_else(case: Case) -> None:
    before = leaves_of(case.variables)
    repair = MMBM(**QUICK).repair(jax.random.key(0), *case)
    assert_trees_equal(case.variables, before)
    assert set(flatten_dict(repair.variables["bounds"], sep="/")) == {"relu/upper"}
    assert_trees_equal({name: part for name, part in repair.variables.items() if name != "bounds"}, case.variables)
    assert repair.changed
    assert json.loads(json.dumps(repair.info)) == repair.info


def test_a_repair_is_deterministic_under_its_key_and_compiled_once(case: Case) -> None:
    first = MMBM(**QUICK).repair(jax.random.key(5), *case).variables
    compiled = cache_size(_compiled_epoch)
    again, other = (MMBM(**QUICK).repair(jax.random.key(n), *case).variables for n in (5, 6))
    MMBM(**QUICK, bound_weight=0.1, bound_learning_rate=0.01).repair(jax.random.key(5), *case)
    assert cache_size(_compiled_epoch) == compiled
    assert_trees_equal(first, again)
    assert not trees_equal(first, other)


@pytest.mark.slow
def test_the_three_places_are_the_default_and_unknown_ones_are_rejected(case: Case, tiny_data: Dataset) -> None:
    with pytest.raises(UserError, match=r"no rectifier at layer1_0/relu1, .* there are relu"):
        MMBM().repair(jax.random.key(0), *case)
    classifier = build_classifier("preact_resnet18", 3, width=2)
    variables = random_variables(classifier, tiny_data.images)
    repair = MMBM(bound_epochs=1).repair(jax.random.key(0), classifier, variables, tiny_data)
    assert {"/".join((stage, *inner)) for stage, inner in repair.variables["bounds"].items()} == {
        "layer1_0/relu1", "layer2_0/relu1", "layer3_0/relu1",
    }  # fmt: skip


def test_a_model_that_is_never_correct_cannot_be_clipped(case: Case) -> None:
    own = jnp.argmax(case.classifier.logits(case.variables, case.data.images)[0], -1)
    wrong = Dataset(case.data.images, ((own + 1) % 3).astype(jnp.int32))
    with pytest.raises(UserError, match="mm_bm: the model classifies none of the images correctly"):
        MMBM(**QUICK).repair(jax.random.key(0), case.classifier, case.variables, wrong)


@pytest.mark.parametrize(
    ("field", "value"), [("places", ()), ("bound_epochs", 0), ("bound_weight", -1.0), ("bound_factor", 0.5)]
)
def test_settings_out_of_range_are_rejected_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^MMBM\.{field} is "):
        MMBM(**{field: value})


@pytest.mark.slow
def test_a_small_victim_is_repaired() -> None:
    small = miniature()
    defense = MMBM(places=("relu0", "relu1"), bound_batch_size=40)
    repair = defense.repair(jax.random.key(0), small.classifier, small.variables, small.clean)
    after = small.scores(repair.variables)
    assert small.before.asr is not None and small.before.asr > 0.9
    assert after.asr is not None and after.asr < 0.4
    assert after.acc > small.before.acc - 0.05
