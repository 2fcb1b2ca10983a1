"""FST: its loss and projection against float64 NumPy, its random head, and a miniature victim repaired."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, structure
from jax.tree_util import Partial
from miniature import CLASSES, TRACES, Miniature, miniature

from backdoor_jax import Classifier, Repair, UserError
from backdoor_jax.defenses import FST
from backdoor_jax.defenses.fst import fst_loss, random_head
from backdoor_jax.defenses.sphere import project_selected
from backdoor_jax.training import GradientStep, split_by_path


@pytest.fixture(scope="module")
def case() -> Miniature:
    return miniature()


def small(**changes: Any) -> FST:
    return FST(**{"steps": 10, "batch_size": 32, "crop": 0, **changes})


def kernel(variables: Any) -> np.ndarray:
    return np.asarray(variables["params"]["linear"]["kernel"], np.float64)


def run(case: Miniature, key: int = 1, **changes: Any) -> Repair:
    return small(**changes).repair(jax.random.key(key), case.classifier, case.variables, case.clean)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_descends_cross_entropy_plus_overlap_and_projects_to_the_sphere(case: Miniature, alpha: float) -> None:
    defense = small(alpha=alpha, momentum=0.0)
    params = case.variables["params"]
    start = {**case.variables, "params": {**params, "linear": random_head(jax.random.key(5), params["linear"])}}
    origin, _ = split_by_path(params, (("linear", "kernel"),))
    loss = Partial(fst_loss, case.classifier, defense.alpha, params["linear"]["kernel"])
    step = GradientStep(loss, defense.optimizer, project=Partial(project_selected, origin))
    state, info = jax.jit(step)(step.init(start), case.clean, jax.random.key(0))

    latent, _ = case.classifier.features(start, case.clean.images, train=True)
    h, y = np.asarray(latent, np.float64), np.asarray(case.clean.labels)
    w, b, w0 = kernel(start), np.asarray(start["params"]["linear"]["bias"], np.float64), kernel(case.variables)
    z = h @ w + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    losses = -np.log(p[np.arange(len(y)), y])
    assert float(info["cross_entropy"]) == pytest.approx(losses.mean(), rel=1e-4)
    assert float(info["overlap"]) == pytest.approx(np.sum(w * w0), rel=1e-4)
    assert float(info["loss"]) == pytest.approx(losses.mean() + alpha * np.sum(w * w0), rel=1e-4)
    dz = (p - np.eye(CLASSES)[y]) / len(y)
    expected = w - 0.01 * (h.T @ dz + alpha * w0)
    expected *= np.linalg.norm(w0) / np.linalg.norm(expected)
    np.testing.assert_allclose(kernel(state.variables), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.variables["params"]["linear"]["bias"], b - 0.01 * dz.sum(0), rtol=1e-3, atol=1e-6)


def test_the_random_head_is_uniform_within_one_over_root_d() -> None:
    head = {"linear": {"kernel": jnp.ones((400, 50)), "bias": jnp.ones(50)}, "body": None}
    drawn = random_head(jax.random.key(0), head)
    assert structure(drawn) == structure(head)
    w, b = np.asarray(drawn["linear"]["kernel"]), np.asarray(drawn["linear"]["bias"])
    assert np.abs(w).max() <= 0.05 and np.abs(b).max() <= 0.05
    assert np.std(w) == pytest.approx(0.05 / np.sqrt(3), rel=0.02)
    assert np.abs(w.mean()) < 1e-3
    assert not np.array_equal(w[0], b)


def test_a_repair_starts_from_a_fresh_head_on_the_sphere(case: Miniature) -> None:
    found = run(case, key=3, learning_rate=1e-12).variables["params"]["linear"]
    head = case.variables["params"]["linear"]
    drawn = random_head(jax.random.split(jax.random.key(3))[0], {"linear": head})["linear"]
    scale = np.linalg.norm(head["kernel"]) / np.linalg.norm(drawn["kernel"])
    np.testing.assert_allclose(found["kernel"], np.asarray(drawn["kernel"]) * scale, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["bias"], drawn["bias"], rtol=1e-5, atol=1e-7)


def test_the_kernel_keeps_its_norm_and_info_reports_the_angle(case: Miniature) -> None:
    repair = run(case)
    w, w0 = kernel(repair.variables), kernel(case.variables)
    assert np.linalg.norm(w) / np.linalg.norm(w0) == pytest.approx(1, abs=1e-6)
    assert repair.info["norm_ratio"] == pytest.approx(1, abs=1e-6)
    expected = np.sum(w * w0) / np.linalg.norm(w) / np.linalg.norm(w0)
    assert repair.info["cosine"] == pytest.approx(expected, abs=1e-5)


def test_a_larger_alpha_ends_farther_from_the_original_head(case: Miniature) -> None:
    assert run(case, alpha=1.0).info["cosine"] < run(case, alpha=0.0).info["cosine"] - 0.05


def test_one_key_gives_one_result_and_the_victim_is_unchanged(case: Miniature) -> None:
    assert_depends_on_key_alone(lambda key: run(case, key), case.variables)


def test_other_floats_do_not_trace_again(case: Miniature) -> None:
    run(case)
    traced = len(TRACES)
    ends = [kernel(run(case, alpha=alpha, learning_rate=rate).variables) for alpha, rate in ((0.2, 0.01), (0.4, 0.02))]
    assert len(TRACES) == traced
    assert np.abs(ends[0] - ends[1]).max() > 1e-4


def test_the_backdoor_is_removed_and_accuracy_is_kept(case: Miniature) -> None:
    after = case.scores(run(case, steps=100, learning_rate=0.02, alpha=0.1).variables)
    assert case.before.asr is not None and after.asr is not None
    assert after.asr < case.before.asr - 0.5
    assert after.acc > case.before.acc - 0.1


@pytest.mark.parametrize(("field", "value"), [("alpha", -0.1), ("alpha", float("nan")), ("steps", 0)])
def test_a_setting_out_of_range_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"FST.{field} is .*expected"):
        FST(**{field: value})


def test_a_head_path_that_does_not_exist_is_an_error_that_lists_the_parameters(case: Miniature) -> None:
    elsewhere = dataclasses.replace(case.classifier, head_path=("out",))
    assert isinstance(elsewhere, Classifier)
    with pytest.raises(UserError, match=r"no linear head at 'out'.*linear"):
        small().repair(jax.random.key(0), elsewhere, case.variables, case.clean)
