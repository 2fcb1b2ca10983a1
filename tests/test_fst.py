"""FST: its loss against float64 NumPy, its sphere and its start, and a miniature victim repaired."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_victim import TRACES, Bench, bench, equal, leaves_of

from backdoor_jax import Classifier, FstConfig, UserError, fst
from backdoor_jax.config import numbers
from backdoor_jax.defenses.fst import FstLoss, fresh_head
from backdoor_jax.defenses.sphere import SphereProjection
from backdoor_jax.training import CosineSGD, GradientStep, split_by_path

KERNEL = (("linear", "kernel"),)


@pytest.fixture(scope="module")
def case() -> Bench:
    return bench()


def small(**changes: Any) -> FstConfig:
    return FstConfig(**{"steps": 10, "batch_size": 32, "crop": 0, **changes})


def kernel(variables: Any) -> np.ndarray:
    return np.asarray(variables["params"]["linear"]["kernel"], np.float64)


def run(case: Bench, key: int = 1, **changes: Any) -> Any:
    return fst(jax.random.key(key), case.classifier, case.victim, case.clean, small(**changes))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_descends_cross_entropy_plus_overlap_and_returns_to_the_sphere(case: Bench, alpha: float) -> None:
    config = small(alpha=alpha, momentum=0.0)
    params = case.victim["params"]
    start = {**case.victim, "params": {**params, "linear": fresh_head(jax.random.key(5), params["linear"])}}
    origin, _ = split_by_path(params, KERNEL)
    step = GradientStep(FstLoss(case.classifier), CosineSGD(10, 10), project=SphereProjection(KERNEL))
    constants = {**numbers(config), "origin": origin}
    state, info = jax.jit(step)(step.init(start, constants), case.clean, jax.random.key(0), constants)

    latent, _ = case.classifier.features(start, case.clean.images, train=True)
    h, y = np.asarray(latent, np.float64), np.asarray(case.clean.labels)
    w, b, w0 = kernel(start), np.asarray(start["params"]["linear"]["bias"], np.float64), kernel(case.victim)
    z = h @ w + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    losses = -np.log(p[np.arange(len(y)), y])
    assert float(info["cross_entropy"]) == pytest.approx(losses.mean(), rel=1e-4)
    assert float(info["overlap"]) == pytest.approx(np.sum(w * w0), rel=1e-4)
    assert float(info["loss"]) == pytest.approx(losses.mean() + alpha * np.sum(w * w0), rel=1e-4)
    dz = (p - np.eye(4)[y]) / len(y)
    moved = w - 0.01 * (h.T @ dz + alpha * w0)
    moved *= np.linalg.norm(w0) / np.linalg.norm(moved)
    np.testing.assert_allclose(kernel(state.variables), moved, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.variables["params"]["linear"]["bias"], b - 0.01 * dz.sum(0), rtol=1e-3, atol=1e-6)


def test_the_fresh_head_is_uniform_within_one_over_root_d() -> None:
    head = {"linear": {"kernel": jnp.ones((400, 50)), "bias": jnp.ones(50)}, "body": None}
    fresh = fresh_head(jax.random.key(0), head)
    assert jax.tree.structure(fresh) == jax.tree.structure(head)
    w, b = np.asarray(fresh["linear"]["kernel"]), np.asarray(fresh["linear"]["bias"])
    assert np.abs(w).max() <= 0.05 and np.abs(b).max() <= 0.05
    assert np.std(w) == pytest.approx(0.05 / np.sqrt(3), rel=0.02)
    assert np.abs(w.mean()) < 1e-3
    assert not np.array_equal(w[0], b)


def test_the_kernel_keeps_its_norm_and_info_tells_the_angle(case: Bench) -> None:
    repair = run(case)
    w, w0 = kernel(repair.variables), kernel(case.victim)
    assert np.linalg.norm(w) / np.linalg.norm(w0) == pytest.approx(1, abs=1e-6)
    assert repair.info["norm_ratio"] == pytest.approx(1, abs=1e-6)
    expected = np.sum(w * w0) / np.linalg.norm(w) / np.linalg.norm(w0)
    assert repair.info["cosine"] == pytest.approx(expected, abs=1e-5)


def test_a_larger_alpha_ends_further_away(case: Bench) -> None:
    assert run(case, alpha=1.0).info["cosine"] < run(case, alpha=0.0).info["cosine"] - 0.05


def test_one_key_gives_one_result_and_the_victim_stays(case: Bench) -> None:
    before = leaves_of(case.victim)
    one, same, other = (run(case, key) for key in (1, 1, 2))
    assert equal(before, case.victim)
    assert equal(one.variables, same.variables) and one.info == same.info
    assert not equal(one.variables["params"], other.variables["params"])
    assert jax.tree.structure(one.variables) == jax.tree.structure(case.victim)


def test_a_sweep_traces_once(case: Bench) -> None:
    run(case)
    traced = len(TRACES)
    ends = [kernel(run(case, alpha=alpha, learning_rate=rate).variables) for alpha, rate in ((0.2, 0.01), (0.4, 0.02))]
    assert len(TRACES) == traced
    assert np.abs(ends[0] - ends[1]).max() > 1e-4


def test_the_backdoor_goes_and_accuracy_stays(case: Bench) -> None:
    before = case.scores(case.victim)
    after = case.scores(run(case, steps=100, learning_rate=0.02, alpha=0.1).variables)
    assert before.asr is not None and after.asr is not None
    assert after.asr < before.asr - 0.5
    assert after.acc > before.acc - 0.1


@pytest.mark.parametrize(("field", "value"), [("alpha", -0.1), ("alpha", float("nan")), ("steps", 0)])
def test_a_bad_setting_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"FstConfig.{field} is .*expected"):
        FstConfig(**{field: value})


def test_a_head_path_that_leads_nowhere_names_what_there_is(case: Bench) -> None:
    elsewhere = dataclasses.replace(case.classifier, head_path=("out",))
    assert isinstance(elsewhere, Classifier)
    with pytest.raises(UserError, match=r"no linear head at 'out'.*linear"):
        fst(jax.random.key(0), elsewhere, case.victim, case.clean, small())
