"""Losses along the line between two models, how far weights moved, and latents in 2-D."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import cache_size
from hypothesis import given
from hypothesis import strategies as st
from miniature import miniature

from backdoor_jax import Classifier, Dataset, FineTune, NonFiniteError, UserError, evaluate
from backdoor_jax.data import LabelMap
from backdoor_jax.metrics import embedding, loss_along_line, weight_change
from backdoor_jax.metrics.landscape import _evaluate_model
from backdoor_jax.models import Variables


@jax.tree_util.Partial
def white_corner(images: jax.Array) -> jax.Array:
    return images.at[:, -3:, -3:].set(255)


def test_the_line_passes_through_both_models_and_their_mean(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    end = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), tiny_variables)
    label_map = LabelMap("all_to_one", 3, 1)
    line = loss_along_line(tiny_classifier, tiny_variables, end, tiny_data, white_corner, label_map, (0.0, 0.5, 1.0))
    middle = jax.tree.map(lambda a, b: (a + b) / 2, tiny_variables, end)
    one, other = (np.asarray(model["batch_stats"]["bn"]["var"]) + 1e-5 for model in (tiny_variables, end))
    middle["batch_stats"]["bn"]["var"] = np.sqrt(one * other) - 1e-5
    labels = np.asarray(tiny_data.labels)
    for at, variables in enumerate((tiny_variables, middle, end)):
        scores = evaluate(tiny_classifier, variables, tiny_data, white_corner, label_map)
        assert (line.acc[at], line.asr[at]) == pytest.approx((scores.acc, scores.asr))
        for found, images, targets, counted in (
            (line.clean_loss, tiny_data.images, labels, labels >= 0),
            (line.backdoor_loss, white_corner(tiny_data.images), np.ones_like(labels), labels != 1),
        ):
            logits = np.asarray(tiny_classifier.logits(variables, images)[0], np.float64)
            losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), targets]
            assert found[at] == pytest.approx(losses[counted].mean(), rel=1e-4)


def test_the_models_of_a_line_share_one_program(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    label_map = LabelMap("all_to_one", 3)
    loss_along_line(tiny_classifier, tiny_variables, tiny_variables, tiny_data, white_corner, label_map, (0.0,))
    compiled = cache_size(_evaluate_model)
    loss_along_line(
        tiny_classifier, tiny_variables, tiny_variables, tiny_data, white_corner, label_map, (0.25, 2.0, -1.0)
    )
    assert cache_size(_evaluate_model) == compiled


def test_variances_stay_positive_beyond_the_models_and_models_that_are_not_finite_have_no_rates(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    label_map = LabelMap("all_to_one", 3)

    def with_variance(value: float) -> Variables:
        statistics = {
            "bn": {
                **tiny_variables["batch_stats"]["bn"],
                "var": jnp.full_like(tiny_variables["batch_stats"]["bn"]["var"], value),
            }
        }
        return {**tiny_variables, "batch_stats": statistics}

    end = with_variance(0.01)
    start = with_variance(1.0)
    line = loss_along_line(tiny_classifier, start, end, tiny_data, white_corner, label_map, (0.0, 1.0, 2.0))
    wide = evaluate(tiny_classifier, with_variance(1e-4), tiny_data, white_corner, label_map)
    assert (line.acc[2], line.asr[2]) == pytest.approx((wide.acc, wide.asr), abs=1e-6)

    broken = {**start, "params": jax.tree.map(lambda leaf: leaf * 1e30, start["params"])}
    with pytest.raises(NonFiniteError, match="logits at position 1 are not finite"):
        loss_along_line(tiny_classifier, start, broken, tiny_data, white_corner, label_map, (0.0, 1.0))


def test_fine_tuning_a_small_victim_stays_where_both_losses_are_low() -> None:
    case = miniature()
    tuned = FineTune(steps=20, crop=0).repair(jax.random.key(0), case.classifier, case.variables, case.clean)
    line = loss_along_line(
        case.classifier, case.variables, tuned.variables, case.test, case.trigger, case.label_map, (0, 0.5, 1)
    )
    assert (line.acc > 0.95).all() and (line.asr > 0.95).all()
    assert (line.backdoor_loss < 0.5).all()


@given(st.floats(-3, 3).filter(lambda factor: abs(factor) > 0.01))
def test_the_distance_of_a_scaled_weight_is_the_factor_minus_one(factor: float) -> None:
    kernel = np.random.default_rng(0).standard_normal((4, 3))
    before, after = ({"params": {"out": {"kernel": part}}} for part in (kernel, factor * kernel))
    found = weight_change(before, after, ("out", "kernel"))
    assert found.distance == pytest.approx(abs(factor - 1), abs=1e-12)
    assert found.cosine == pytest.approx(np.sign(factor))
    np.testing.assert_allclose(found.difference, (factor - 1) * kernel, atol=1e-12)


def test_weights_at_zero_have_no_direction() -> None:
    zero, one = ({"params": {"w": np.full(2, value)}} for value in (0.0, 1.0))
    assert weight_change(zero, one, ("w",))[1:] == (1.0, 0.0)
    assert weight_change(one, zero, ("w",))[1:] == (1.0, 0.0)
    assert weight_change(zero, zero, ("w",))[1:] == (0.0, 0.0)


def test_the_embedding_keeps_the_distances_of_planar_latents() -> None:
    generator = np.random.default_rng(0)
    flat = generator.standard_normal((30, 2)) * (5, 2)
    turn, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    first, second = embedding(flat[:10] @ turn[:2] + 3, flat[10:] @ turn[:2] + 3)
    together = np.concatenate([first, second])
    distances = [np.linalg.norm(part[:, None] - part[None], axis=-1) for part in (together, flat)]
    np.testing.assert_allclose(distances[0], distances[1], atol=1e-9)
    assert together.std(0)[0] > together.std(0)[1]
    np.testing.assert_allclose(together.mean(0), 0, atol=1e-9)


def test_the_largest_entry_of_a_component_is_positive() -> None:
    latents = np.random.default_rng(1).standard_normal((40, 5)) * (1, 1, 7, 1, 3)
    for sign in (1, -1):
        (found,) = embedding(sign * latents)
        components = np.linalg.lstsq(found, sign * (latents - latents.mean(0)), rcond=None)[0]
        assert (components[[0, 1], np.abs(components).argmax(1)] > 0).all()


def test_tsne_keeps_clusters_apart_and_is_the_same_in_every_run() -> None:
    generator = np.random.default_rng(0)
    sets = [generator.standard_normal((12, 8)) + 20 * np.eye(8)[number] for number in range(3)]
    once, again = (embedding(*sets, method="tsne") for _ in range(2))
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one, other)
    centers = np.stack([points.mean(0) for points in once])
    for number, points in enumerate(once):
        assert points.shape == (12, 2)
        assert (np.linalg.norm(points[:, None] - centers, axis=-1).argmin(1) == number).all()
    with pytest.raises(UserError, match="at least 4, or use pca"):
        embedding(np.eye(3), method="tsne")
    with pytest.raises(UserError, match="method is 'umap', expected 'pca' or 'tsne'"):
        embedding(np.eye(5), method="umap")  # type: ignore[arg-type]


def test_errors_name_what_is_wrong(tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset) -> None:
    label_map = LabelMap("all_to_one", 3)
    bounded = {**tiny_variables, "bounds": {"relu": {"upper": jnp.ones(4)}}}
    with pytest.raises(UserError, match="both without bounds"):
        loss_along_line(tiny_classifier, tiny_variables, bounded, tiny_data, white_corner, label_map)
    only = tiny_data.take(np.flatnonzero(np.asarray(tiny_data.labels) == 0))
    with pytest.raises(UserError, match="outside the target class"):
        loss_along_line(tiny_classifier, tiny_variables, tiny_variables, only, white_corner, label_map)
    with pytest.raises(UserError, match="no parameters at 'linear/weight'"):
        weight_change(tiny_variables, tiny_variables, ("linear", "weight"))
    with pytest.raises(UserError, match="no parameters at 'linear'"):
        weight_change(tiny_variables, tiny_variables, ("linear",))
    with pytest.raises(UserError, match=r"shapes \(2,\) and \(3,\)"):
        weight_change({"params": {"w": np.ones(2)}}, {"params": {"w": np.ones(3)}}, ("w",))
    with pytest.raises(UserError, match=r"expected \(N, D\) with one D"):
        embedding(np.ones((3, 2)), np.ones((3, 4)))
    for latents in (np.ones((3, 1)), np.ones((1, 3))):
        with pytest.raises(UserError, match="no two components"):
            embedding(latents)
