"""Trigger-activated change against NumPy, agreement against its formulas, and the change in a small victim."""

from typing import Any

import jax
import numpy as np
import pytest
from comparison import cache_size
from hypothesis import given
from hypothesis import strategies as st
from miniature import miniature
from scipy import stats

from backdoor_jax import Classifier, Dataset, UserError, scan
from backdoor_jax.defenses.base import replace_params
from backdoor_jax.metrics import agreement, triggered_change
from backdoor_jax.metrics.latent import _changes
from backdoor_jax.models import Variables

scores = st.lists(st.integers(-5, 5), min_size=6, max_size=6).map(np.array)


@jax.tree_util.Partial
def white_corner(images: jax.Array) -> jax.Array:
    return images.at[:, -3:, -3:].set(255)


def test_the_change_is_the_mean_over_images(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    before, after = (
        np.asarray(tiny_classifier.features(tiny_variables, images)[0], np.float64)
        for images in (tiny_data.images, white_corner(tiny_data.images))
    )
    found = triggered_change(tiny_classifier, tiny_variables, tiny_data.images, white_corner)
    np.testing.assert_allclose(found.mean, (after - before).mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.size, np.abs(after - before).mean(0), rtol=1e-4, atol=1e-6)
    assert (found.size >= np.abs(found.mean) - 1e-6).all() and found.size.max() > 0.01


def test_a_trigger_that_does_nothing_changes_nothing(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    nothing = jax.tree_util.Partial(lambda images: images)
    found = triggered_change(tiny_classifier, tiny_variables, tiny_data.images, nothing)
    assert not found.mean.any() and not found.size.any()


def test_changes_are_compiled_once(tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset) -> None:
    triggered_change(tiny_classifier, tiny_variables, tiny_data.images, white_corner)
    compiled = cache_size(_changes)
    triggered_change(
        tiny_classifier, jax.tree.map(lambda leaf: 2 * leaf, tiny_variables), tiny_data.images, white_corner
    )
    assert cache_size(_changes) == compiled


@given(first=scores, second=scores, k=st.integers(1, 6))
def test_agreement_is_the_cosine_the_rank_correlation_and_the_shared_top(
    first: np.ndarray, second: np.ndarray, k: int
) -> None:
    found = agreement(first, second, k)
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    assert found.cosine == pytest.approx(first @ second / norms if norms else 0)
    if np.ptp(first) and np.ptp(second):
        ranks = [stats.rankdata(values) for values in (first, second)]
        assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    else:
        assert found.spearman == 0
    top = [sorted(range(6), key=lambda d: (-values[d], d))[:k] for values in (first, second)]
    assert found.precision == pytest.approx(len(set(top[0]) & set(top[1])) / k)


def test_ranks_depend_on_order_alone_and_the_cosine_on_direction_alone() -> None:
    change = np.random.default_rng(0).uniform(1, 2, 50)
    assert agreement(np.exp(change), change, 5)[1:] == (pytest.approx(1), 1)
    assert agreement(3 * change, change, 5).cosine == pytest.approx(1)
    assert agreement(-change, change, 5) == (pytest.approx(-1), pytest.approx(-1), 0)


def test_random_scores_have_the_precision_and_correlation_of_chance() -> None:
    generator = np.random.default_rng(0)
    found = [agreement(generator.normal(size=40), generator.normal(size=40), 10) for _ in range(300)]
    assert np.mean([one.precision for one in found]) == pytest.approx(0.25, abs=0.02)
    assert np.mean([one.spearman for one in found]) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("first", "second", "k", "message"),
    [
        (np.ones(3), np.ones(4), 1, "shape"),
        (np.ones((2, 2)), np.ones((2, 2)), 1, r"scores are float64 \(2, 2\), expected .* \(N,\)"),
        (np.ones(3), np.ones(3), 4, "k is 4"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(first: Any, second: Any, k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        agreement(first, second, k)
    with pytest.raises(UserError, match="k is 0"):
        agreement(np.ones(3), np.ones(3), 0)


@pytest.mark.slow
def test_neurons_with_the_largest_change_carry_the_backdoor_and_a_scan_recovers_the_change() -> None:
    small = miniature()
    target = small.label_map.target
    others = small.test.images[np.asarray(small.test.labels) != target]
    change = triggered_change(small.classifier, small.variables, others, small.trigger).mean
    kernel = small.variables["params"]["linear"]["kernel"]

    def asr_without(neurons: np.ndarray) -> float:
        asr = small.scores(replace_params(small.variables, {("linear", "kernel"): kernel.at[neurons].set(0)})).asr
        assert asr is not None
        return asr

    order = np.argsort(-change)
    assert asr_without(order[:8]) < 0.1
    assert asr_without(order[-8:]) > 0.9
    vectors = np.asarray(scan(small.classifier, small.variables, small.clean.images).perturbations.vectors)
    found = [agreement(vector, change, 8) for vector in vectors]
    assert found[target].cosine > 0.7 and found[target].spearman > 0.7 and found[target].precision > 0.5
    assert all(other.cosine < 0.3 for other in found[:target] + found[target + 1 :])
