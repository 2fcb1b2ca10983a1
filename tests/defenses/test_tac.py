"""TAC reconstruction: the programs against SciPy, the test against simulation, the repair on a constructed backdoor."""

import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, structure, trees_equal
from miniature import Case
from scipy import optimize, stats
from scipy.special import logsumexp

from backdoor_jax import TAC, Classifier, NonFiniteError, Repair, UserError, make_dataset, scan
from backdoor_jax.defenses import tac_program
from backdoor_jax.defenses.tac import tac_loss
from backdoor_jax.defenses.tac_program import Perturbations, class_perturbations, sample_norms
from backdoor_jax.defenses.tac_scan import Scan, balanced_means, balanced_subset, smallest_outlier

SIZES = [(2, 3), (3, 4), (10, 13), (43, 54), (200, 250)]
"""Classes C and latent size D."""


class Program(NamedTuple):
    """Latents ``(n, D)``, kernel ``(D, C)`` and bias ``(C,)``, float32."""

    latent: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    def constraints(self, k: int, margin: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Rows and right-hand sides of the n(C-1) constraints of class k, in float64."""
        latent, kernel, bias = (array.astype(np.float64) for array in self)
        others = np.arange(len(bias)) != k
        rows = (kernel[:, [k]] - kernel)[:, others].T
        sides = (latent @ -rows.T + bias[others] - bias[k] + margin).reshape(len(latent), -1)
        return np.tile(rows, (len(latent), 1)), sides.ravel()

    def compressed(self, k: int, margin: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The tightest sample's constraint of each other class."""
        rows, sides = self.constraints(k, margin)
        count = len(self.bias) - 1
        return rows[:count], sides.reshape(-1, count).max(axis=0)

    def logits(self) -> np.ndarray:
        return tac_program.class_logits(*self)

    def solve(self, margin: float = 0.0) -> Perturbations:
        return class_perturbations(*self, margin)


def draw(classes: int, dimension: int, seed: int, samples: int = 30) -> Program:
    generator = np.random.default_rng(seed)
    shapes = ((samples, dimension), (dimension, classes), (classes,))
    return Program(*(generator.normal(size=shape).astype(np.float32) for shape in shapes))


def circle(pulled: float, bias: float = 0.0) -> Program:
    """Twelve head columns on the unit circle, that of class 3 scaled by ``pulled`` and with a bias.

    The hull of its neighbors is at cos(30 deg) = .866. Inside and without bias, a single sample can still reach the
    tie of all classes at the origin; with a negative bias, none can.
    """
    angles = np.arange(12) * np.pi / 6
    kernel = np.stack([np.cos(angles), np.sin(angles)])
    kernel[:, 3] *= pulled
    latent = np.random.default_rng(0).normal(size=(30, 2))
    biases = np.where(np.arange(12) == 3, bias, 0.0)
    return Program(latent.astype(np.float32), kernel.astype(np.float32), biases.astype(np.float32))


def least_distance(rows: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """The shortest s with rows @ s >= sides, by Lawson and Hanson's reduction to nonnegative least squares."""
    if sides.max() <= 0:
        return np.zeros(rows.shape[1])
    scale = sides.max()
    matrix = np.vstack([rows.T, sides / scale])
    goal = np.zeros(len(matrix))
    goal[-1] = 1
    u, _ = optimize.nnls(matrix, goal, maxiter=100 * len(rows))
    residual = matrix @ u - goal
    return -residual[:-1] / residual[-1] * scale


def sequential(rows: np.ndarray, sides: np.ndarray) -> np.ndarray:
    found = optimize.minimize(
        lambda s: 0.5 * s @ s,
        np.zeros(rows.shape[1]),
        jac=lambda s: s,
        constraints={"type": "ineq", "fun": lambda s: rows @ s - sides, "jac": lambda s: rows},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return found.x


def assert_close(found: Any, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    scale = max(float(np.linalg.norm(expected)), 1e-3)
    assert np.linalg.norm(np.asarray(found, np.float64) - expected) <= tolerance * scale


@pytest.mark.parametrize(("classes", "dimension"), SIZES)
def test_class_perturbations_equal_scipy_in_float64(classes: int, dimension: int) -> None:
    for seed in range(3 if classes <= 10 else 1):
        program = draw(classes, dimension, seed)
        solution = program.solve()
        assert solution.vectors.shape == (classes, dimension)
        assert solution.feasible.all()
        assert solution.converged.all()
        for k in range(classes if classes < 200 else 5):
            expected = (sequential if classes <= 3 else least_distance)(*program.compressed(k))
            assert_close(solution.vectors[k], expected)
            assert float(solution.norms[k]) == pytest.approx(np.linalg.norm(expected), rel=1e-4)


@pytest.mark.parametrize(("classes", "dimension"), SIZES)
def test_solutions_satisfy_the_optimality_conditions_in_float64(classes: int, dimension: int) -> None:
    program = draw(classes, dimension, seed=7)
    solution = program.solve()
    assert np.max(solution.residual) < 1e-4
    for k in range(0, classes, max(1, classes // 20)):
        rows, sides = program.compressed(k)
        s = np.asarray(solution.vectors[k], np.float64)
        u = np.delete(np.asarray(solution.multipliers[k], np.float64), k)
        slack = rows @ s - sides
        scale = max(float(sides.max()), 1e-6)
        assert solution.multipliers[k, k] == 0
        assert (u >= 0).all()
        assert slack.min() >= -1e-4 * scale
        assert np.abs(u * slack).max() <= 1e-4 * max(float(s @ s), 1e-6)
        assert_close(rows.T @ u, s)
        assert s @ s == pytest.approx(u @ sides, rel=1e-4, abs=1e-6)


def recomputed_residual(program: Program, solution: Perturbations, k: int) -> float:
    """`Perturbations.residual` by its definition, with rows of unit length."""
    rows, sides = program.compressed(k)
    lengths = np.linalg.norm(rows, axis=1)
    u = np.delete(solution.multipliers[k], k) * lengths
    s = u @ (rows / lengths[:, None])
    slack = (rows @ s - sides) / lengths
    return (abs(s @ s - u @ (sides / lengths)) - min(slack.min(), 0) * u.sum()) / (s @ s)


@pytest.mark.parametrize("program", [draw(10, 13, 1), draw(43, 54, 2), circle(0.9), circle(0.867)])
def test_the_reported_residual_equals_the_one_recomputed_from_the_definition(program: Program) -> None:
    solution = program.solve()
    expected = [recomputed_residual(program, solution, k) for k in range(len(program.bias))]
    np.testing.assert_allclose(solution.residual, expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("pulled", [0.87, 0.867, 0.8661])
@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_barely_feasible_programs_are_solved_exactly(pulled: float, bias: float) -> None:
    program = circle(pulled, bias)
    solution, samples = program.solve(), sample_norms(program.logits(), program.kernel)
    assert solution.converged.all() and samples.solved.all()
    assert_close(solution.vectors[3], least_distance(*program.compressed(3)), 1e-3)
    singles = [program._replace(latent=program.latent[i : i + 1]).compressed(3) for i in range(30)]
    np.testing.assert_allclose(samples.norms[3], [np.linalg.norm(least_distance(*one)) for one in singles], rtol=1e-3)
    if (pulled, bias) == (0.867, -1.0):
        assert samples.norms[3].mean() == pytest.approx(1025.8, abs=0.1)


def test_programs_without_a_proof_are_counted_and_never_look_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    program = circle(0.867, -1.0)
    exact = sample_norms(program.logits(), program.kernel).norms
    monkeypatch.setattr(tac_program, "least_distance", lambda rows, b: None)
    solution, samples = program.solve(), sample_norms(program.logits(), program.kernel)
    assert np.flatnonzero(~solution.converged).tolist() == np.flatnonzero(~samples.solved.all(axis=1)).tolist() == [3]
    assert solution.residual[3] > tac_program.CONVERGED
    assert (samples.norms[~samples.solved] >= exact[~samples.solved]).all()


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_near_duplicate_head_columns_are_solved_as_exactly_as_others(distance: float) -> None:
    program = draw(10, 32, seed=4, samples=6)
    program.kernel[:, 1] = program.kernel[:, 0] * (1 + distance * np.random.default_rng(0).normal(size=32))
    found = sample_norms(program.logits(), program.kernel)
    assert found.solved.all()
    for i in range(6):
        single = program._replace(latent=program.latent[i : i + 1])
        for k in range(3):
            rows, sides = single.compressed(k)
            lengths = np.linalg.norm(rows, axis=1)
            expected = np.linalg.norm(least_distance(rows / lengths[:, None], sides / lengths))
            assert found.norms[k, i] == pytest.approx(expected, rel=1e-3)


def test_working_sets_give_the_solution_of_all_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    program = draw(43, 20, seed=6, samples=5)
    logits = program.logits()
    complete, samples = program.solve(), sample_norms(logits, program.kernel)
    monkeypatch.setattr(tac_program, "WORKING_SET", 12)
    np.testing.assert_allclose(program.solve().norms, complete.norms, rtol=1e-4)
    np.testing.assert_allclose(sample_norms(logits, program.kernel).norms, samples.norms, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_compressed_constraints_give_the_solution_of_the_full_system(seed: int) -> None:
    program = draw(5, 8, seed, samples=12)
    solution = program.solve()
    for k in range(5):
        rows, sides = program.constraints(k)
        assert rows.shape == (12 * 4, 8)
        assert_close(solution.vectors[k], least_distance(rows, sides))


@pytest.mark.parametrize(("classes", "dimension"), [(3, 4), (10, 13), (43, 54)])
def test_every_clean_sample_ends_in_the_class(classes: int, dimension: int) -> None:
    program = draw(classes, dimension, seed=3)
    latent, kernel, bias = (array.astype(np.float64) for array in program)
    solution = program.solve()
    for k in range(classes):
        logits = (latent + np.asarray(solution.vectors[k], np.float64)) @ kernel + bias
        assert (logits[:, k] >= logits.max(axis=1) - 1e-4 * np.abs(logits).max()).all()


def test_with_a_margin_every_clean_sample_is_classified_as_the_class() -> None:
    program = draw(10, 13, seed=3)
    solution, plain = program.solve(margin=0.1), program.solve()
    for k in range(10):
        logits = (program.latent + np.asarray(solution.vectors[k])) @ program.kernel + program.bias
        assert (logits.argmax(axis=1) == k).all()
        lead = logits[:, [k]] - np.delete(logits, k, axis=1)
        assert lead.min() == pytest.approx(0.1, abs=2e-3)
        assert_close(solution.vectors[k], least_distance(*program.compressed(k, margin=0.1)))
    assert (np.asarray(solution.norms) > np.asarray(plain.norms)).all()


def test_a_class_that_every_sample_is_already_predicted_as_needs_no_change() -> None:
    latent = np.array([[1.0, 0.0, 0.0], [2.0, 0.0, 0.5]])
    solution = class_perturbations(latent, np.eye(3), np.zeros(3))
    assert float(solution.norms[0]) == 0
    assert solution.converged.all()


def test_the_bias_is_part_of_the_program() -> None:
    program = draw(6, 8, seed=5)
    biased, plain = program.solve(), program._replace(bias=np.zeros(6, np.float32)).solve()
    for k in range(6):
        assert_close(biased.vectors[k], least_distance(*program.compressed(k)))
    assert np.abs(np.asarray(biased.norms) / np.asarray(plain.norms) - 1).max() > 0.1


def test_a_bias_common_to_all_classes_changes_nothing() -> None:
    program = draw(6, 8, seed=5)
    np.testing.assert_allclose(
        program._replace(bias=program.bias + 5).solve().vectors, program.solve().vectors, rtol=1e-3, atol=1e-4
    )


def test_more_classes_than_dimensions_are_feasible_where_every_column_is_a_vertex_of_the_hull() -> None:
    program = circle(1.0)
    solution = program.solve()
    assert solution.feasible.all()
    assert solution.converged.all()
    for k in range(12):
        assert_close(solution.vectors[k], least_distance(*program.compressed(k)), 1e-3)


@pytest.mark.parametrize("pulled", [0.0, 0.5, 0.8])
def test_only_a_class_inside_the_hull_is_infeasible(pulled: float) -> None:
    solution = circle(pulled).solve()
    assert np.flatnonzero(~np.asarray(solution.feasible)).tolist() == [3]
    assert not solution.converged[3]
    assert np.isinf(solution.norms[3])
    assert np.isnan(solution.vectors[3]).all()
    assert np.isfinite(np.delete(np.asarray(solution.norms), 3)).all()
    assert np.delete(np.asarray(solution.converged), 3).all()


@pytest.mark.parametrize("pulled", [0.9, 0.88, 0.87, 0.867])
def test_a_class_barely_outside_the_hull_is_never_reported_as_infeasible(pulled: float) -> None:
    assert circle(pulled).solve().feasible.all()


def test_equal_head_columns_leave_only_the_one_of_larger_bias_feasible() -> None:
    program = draw(5, 8, seed=0)
    program.kernel[:, 1] = program.kernel[:, 0]
    program.bias[:2] = 0.0, 1.0
    solution = program.solve()
    assert np.asarray(solution.feasible).tolist() == [False, True, True, True, True]
    assert np.asarray(solution.converged).tolist() == [False, True, True, True, True]


def test_programs_multiply_in_full_float32() -> None:
    gram, rows = jnp.eye(4), jnp.ones((32, 4))
    text = str(jax.make_jaxpr(tac_program._descend_class)(gram, rows[0]))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0
    assert "dot_general[" not in str(jax.make_jaxpr(tac_program._descend)(gram, jnp.zeros((32, 4), int), rows, rows))


def test_sample_norms_equal_programs_of_one_sample() -> None:
    program = draw(6, 8, seed=9, samples=7)
    logits = program.logits()
    found = sample_norms(logits, program.kernel).norms
    assert found.shape == (6, 7)
    for i in range(7):
        single = program._replace(latent=program.latent[i : i + 1])
        np.testing.assert_allclose(found[:, i], single.solve().norms, rtol=1e-4, atol=1e-5)
        expected = [np.linalg.norm(least_distance(*single.compressed(k))) for k in range(6)]
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[logits.argmax(axis=1), np.arange(7)], 0)


def test_sample_norms_never_exceed_the_worst_case() -> None:
    program = draw(10, 13, seed=2)
    each = sample_norms(program.logits(), program.kernel).norms
    assert (each.max(axis=1) <= np.asarray(program.solve().norms) * (1 + 1e-4)).all()


@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_a_sample_that_cannot_reach_a_class_has_no_finite_norm(bias: float) -> None:
    program = circle(0.5, bias)
    found = sample_norms(program.logits(), program.kernel).norms
    singles = [program._replace(latent=program.latent[i : i + 1]).solve() for i in range(len(program.latent))]
    expected = np.stack([single.norms for single in singles], axis=1)
    assert np.isinf(expected[3]).all() == (bias < 0)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)


def grubbs(values: np.ndarray) -> tuple[float, float]:
    """G and its one-sided p-value, from the definition."""
    count = len(values)
    g = (np.mean(values) - np.min(values)) / np.sqrt(np.sum((values - np.mean(values)) ** 2) / (count - 1))
    t = np.sqrt(count * (count - 2) * g**2 / ((count - 1) ** 2 - count * g**2))
    return g, min(1.0, count * float(stats.t(count - 2).sf(t)))


@pytest.mark.parametrize("count", [5, 10, 43, 200])
def test_smallest_outlier_equals_an_independent_computation(count: int) -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).gamma(4, size=count)
        found = smallest_outlier(values)
        g, p = grubbs(values)
        assert found.smallest == int(np.argsort(values)[0])
        assert found.statistic == pytest.approx(g, rel=1e-9)
        assert found.p_value == pytest.approx(p, rel=1e-6)
        middle = np.median(values)
        mad = np.median(np.abs(values - middle)) / stats.norm.ppf(0.75)
        assert found.mad_score == pytest.approx((middle - values.min()) / mad, rel=1e-6)


def test_smallest_outlier_agrees_with_the_published_table_of_grubbs() -> None:
    for count, critical in ((5, 1.672), (10, 2.176), (30, 2.745), (100, 3.207)):  # one-sided 5 %
        spread = np.linspace(-1, 1, count - 1)

        def gap(depth: float, spread: np.ndarray = spread, critical: float = critical) -> float:
            return smallest_outlier(np.append(spread, -depth)).statistic - critical

        depth = optimize.brentq(gap, 1.0, 100.0)
        assert smallest_outlier(np.append(spread, -depth)).p_value == pytest.approx(0.05, abs=5e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fewer_than_five_values_give_no_p_value(count: int) -> None:
    found = smallest_outlier(np.array([5.0, 0.1, 5.2, 5.1])[:count])
    assert found.p_value is None
    assert found.smallest == (1 if count > 1 else 0)


def test_infinite_values_are_left_out() -> None:
    values = np.array([4.0, np.inf, 5.0, 0.1, 5.2, np.inf, 4.8, 5.1, 4.9])
    found, finite = smallest_outlier(values), smallest_outlier(values[np.isfinite(values)])
    assert found.smallest == 3
    assert found[1:] == finite[1:]
    assert smallest_outlier(np.array([1.0, 2.0, 3.0, 4.0, np.inf])).p_value is None
    assert smallest_outlier(np.full(7, np.inf)).p_value is None


def test_constant_values_are_not_flagged() -> None:
    found = smallest_outlier(np.full(10, 3.0))
    assert found.p_value == 1
    assert (found.statistic, found.mad_score) == (0, 0)


def test_a_large_outlier_is_not_flagged_and_a_small_one_is() -> None:
    values = 10 + np.random.default_rng(0).normal(size=43)
    large, small = values.copy(), values.copy()
    large[7], small[7] = 30.0, 2.0
    assert smallest_outlier(values).p_value > 0.05  # type: ignore[operator]
    assert smallest_outlier(large).p_value > 0.05  # type: ignore[operator]
    assert smallest_outlier(small).smallest == 7
    assert smallest_outlier(small).p_value < 0.001  # type: ignore[operator]


NULLS = {
    "normal": lambda generator, shape: 10 + generator.normal(size=shape),
    "gamma": lambda generator, shape: generator.gamma(4.0, size=shape),
    "lognormal": lambda generator, shape: generator.lognormal(0.0, 0.3, size=shape),
}


@pytest.mark.parametrize("classes", [10, 43, 100, 200])
@pytest.mark.parametrize(("null", "draws"), [("normal", 4000), ("gamma", 2000), ("lognormal", 2000)])
def test_false_alarms_are_at_most_six_percent(null: str, draws: int, classes: int) -> None:
    values = NULLS[null](np.random.default_rng(classes), (draws, classes))
    alarms = np.mean([smallest_outlier(row).p_value <= 0.05 for row in values])  # type: ignore[operator]
    assert alarms <= 0.06
    if null == "normal":
        assert alarms >= 0.04


@pytest.mark.parametrize(
    ("null", "expected"),
    [(lambda draw: draw.standard_t(4, size=(1000, 43)), 0.27), (lambda draw: -draw.gamma(4.0, size=(1000, 43)), 0.39)],
    ids=["heavy tails", "left skew"],
)
def test_false_alarms_under_heavy_tails_and_left_skew_are_as_many_as_documented(null: Any, expected: float) -> None:
    values = null(np.random.default_rng(0))
    alarms = np.mean([smallest_outlier(row).p_value <= 0.05 for row in values])  # type: ignore[operator]
    assert alarms == pytest.approx(expected, abs=0.04)


def test_a_large_value_hides_a_small_one_from_the_p_value_but_not_from_the_mad_score() -> None:
    values = 10 + np.random.default_rng(0).normal(size=43)
    values[7] = 2
    shown = smallest_outlier(values)
    hidden = smallest_outlier(np.where(np.arange(43) == 20, 60, values))
    assert shown.p_value is not None and hidden.p_value is not None
    assert shown.p_value < 1e-6 and hidden.p_value > 0.05
    assert hidden.smallest == 7 and hidden.mad_score > 5


class Pixels(nn.Module):
    """One linear layer without bias on flattened images, then a linear head."""

    num_classes: int
    latent: int

    def setup(self) -> None:
        self.extract = nn.Dense(self.latent, use_bias=False)
        self.linear = nn.Dense(self.num_classes)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        return self.extract(x.reshape(x.shape[0], -1))

    def head(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.features(x, train))


TRIGGER_PIXEL = 15


def make_case(target: int | None, classes: int = 10, seed: int = 0) -> Case:
    """Class y lights pixel y of 4x4; one more latent reads pixel 15, dark in clean images, and votes for ``target``."""
    generator = np.random.default_rng(seed)
    labels = np.arange(12 * classes) % classes
    images = np.zeros((len(labels), 16), np.uint8)
    images[:, :classes] = generator.integers(0, 40, (len(labels), classes))
    images[np.arange(len(labels)), labels] = generator.integers(180, 256, len(labels))
    extract = np.zeros((16, classes + 1), np.float32)
    extract[np.arange(classes), np.arange(classes)] = 30.0
    extract[TRIGGER_PIXEL, classes] = 2.0
    head = np.eye(classes + 1, classes, dtype=np.float32)
    if target is not None:
        head[classes, target] = 20.0
    params = {"extract": {"kernel": extract}, "linear": {"kernel": head, "bias": np.zeros(classes, np.float32)}}
    return Case(
        Classifier(Pixels(classes, classes + 1), classes, mean=(0.0,), std=(1.0,)),
        jax.tree.map(jnp.asarray, {"params": params}),
        make_dataset(images.reshape(-1, 4, 4, 1), labels, classes),
    )


def small(**changes: Any) -> TAC:
    return TAC(**{"steps": 100, "batch_size": 60, "crop": 0, **changes})


def run(case: Case, key: int = 0, found: Scan | None = None, **changes: Any) -> Repair:
    return small(**changes).repair(jax.random.key(key), *case, scan=found)


def predictions(case: Case, variables: dict[str, Any], images: jax.Array) -> np.ndarray:
    return np.asarray(case.classifier.logits(variables, images)[0].argmax(axis=-1))


@pytest.fixture(scope="module")
def poisoned() -> Case:
    return make_case(target=4)


@pytest.fixture(scope="module")
def clean() -> Case:
    return make_case(target=None)


@pytest.fixture(scope="module")
def untrained(clean: Case) -> Case:
    return clean._replace(variables=clean.classifier.init(jax.random.key(0), clean.data.images))


def test_scan_flags_the_poisoned_class_by_both_statistics(poisoned: Case) -> None:
    found = scan(*poisoned[:2], poisoned.data.images)
    for statistic in ("worst_case", "per_sample"):
        assert found.flagged(statistic) == 4
        p_value = found.tests[statistic].p_value
        assert p_value is not None and p_value < 1e-3
    assert found.worst_case.argmin() == found.per_sample.argmin() == 4


def test_scan_flags_nothing_in_a_clean_model(clean: Case) -> None:
    found = scan(*clean[:2], clean.data.images)
    assert found.flagged("worst_case") is None
    assert found.flagged("per_sample") is None


def test_scan_reports_class_norms_and_the_mean_norm_of_samples_of_other_classes(poisoned: Case) -> None:
    found = scan(*poisoned[:2], poisoned.data.images)
    kernel, bias = map(np.asarray, poisoned.classifier.head_weights(poisoned.variables))
    latent = np.asarray(poisoned.classifier.features(poisoned.variables, poisoned.data.images)[0])
    logits = tac_program.class_logits(latent, kernel, bias)
    each, predicted = sample_norms(logits, kernel).norms, logits.argmax(axis=-1)
    expected = [np.mean([each[k, predicted == j].mean() for j in range(10) if j != k]) for k in range(10)]
    np.testing.assert_allclose(found.per_sample, expected, rtol=1e-5)
    np.testing.assert_allclose(found.worst_case, class_perturbations(latent, kernel, bias).norms, rtol=1e-5)


def imbalanced(seed: int, frequency: int) -> tuple[np.ndarray, np.ndarray]:
    """Head ``(D, C)`` and logits of a clean model of 20 classes.

    The column of class 0 has a cosine of .8 with that of class 1, which is so many times as frequent as others.
    """
    generator = np.random.default_rng(seed)
    columns = np.linalg.qr(generator.normal(size=(32, 20)))[0]
    columns[:, 0] = 0.8 * columns[:, 1] + 0.6 * columns[:, 0]
    labels = np.repeat(np.arange(20), np.where(np.arange(20) == 1, frequency, 1))
    latent = 10 * columns[:, labels].T + generator.normal(size=(len(labels), 32))
    return columns, latent @ columns


def test_a_class_that_resembles_a_frequent_one_is_not_flagged() -> None:
    def alarm(values: np.ndarray) -> bool:
        p_value = smallest_outlier(values).p_value
        return p_value is not None and p_value <= 0.05

    balanced, plain = [], []
    for seed in range(5):
        kernel, logits = imbalanced(seed, 10)
        norms, predicted = sample_norms(logits, kernel).norms, logits.argmax(axis=1)
        balanced.append(alarm(balanced_means(norms, predicted)))
        plain.append(alarm(np.array([row[predicted != k].mean() for k, row in enumerate(norms)])))
    assert sum(balanced) <= 1 and sum(plain) >= 4


def test_samples_that_are_misclassified_as_a_class_do_not_make_it_look_easy_to_reach() -> None:
    norms = np.ones((6, 12))
    predicted = np.array([0] * 6 + [1, 2, 3, 4, 5, 5])  # Class 0 attracts half of all samples.
    norms[predicted, np.arange(12)] = 0
    np.testing.assert_array_equal(balanced_means(norms, predicted), 1)


def test_classes_without_samples_are_tested_and_a_class_with_all_samples_is_not() -> None:
    norms = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(balanced_means(norms, np.array([1, 1, 2])), [(0.5 + 2) / 2, 5, 6.5, (9.5 + 11) / 2])
    assert np.isinf(balanced_means(norms, np.array([2, 2, 2]))[2])


def test_a_subset_of_samples_is_balanced_over_predicted_classes() -> None:
    predicted = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 20, 3]))
    chosen = balanced_subset(predicted, 23)
    assert np.bincount(predicted[chosen]).tolist() == [10, 10, 3]
    assert balanced_subset(predicted, 100).tolist() == list(range(73))


def test_a_class_that_every_sample_is_already_predicted_as_has_no_mean_norm(clean: Case) -> None:
    params = clean.variables["params"]
    linear = {**params["linear"], "bias": params["linear"]["bias"].at[6].set(1e3)}
    found = scan(clean.classifier, {"params": {**params, "linear": linear}}, clean.data.images)
    assert found.worst_case[6] == 0
    assert np.flatnonzero(~np.isfinite(found.per_sample)).tolist() == [6]


def test_detected_repairs_the_poisoned_class(poisoned: Case) -> None:
    images, labels = poisoned.data.images, np.asarray(poisoned.data.labels)
    flat = images.reshape(len(labels), -1)
    triggered = flat.at[:, TRIGGER_PIXEL].set(255).reshape(images.shape)
    others = labels != 4
    assert (predictions(poisoned, poisoned.variables, triggered) == 4).all()

    repair = run(poisoned, weight_decay=0.0)
    assert repair.target == 4
    assert (repair.changed, repair.why, repair.info["oracle"], repair.info["steps"]) == (True, None, False, 100)
    assert repair.scan is not None and repair.scan["flagged"] == 4
    assert (predictions(poisoned, repair.variables, images) == labels).mean() >= 0.95
    assert (predictions(poisoned, repair.variables, triggered)[others] == 4).mean() <= 0.1

    perturbation = scan(*poisoned[:2], images).perturbations.vectors[4]
    latent, _ = poisoned.classifier.features(repair.variables, images)
    moved = np.asarray(poisoned.classifier.head(repair.variables, latent + perturbation).argmax(axis=-1))
    assert (moved == labels).mean() >= 0.95


def test_detected_returns_the_victim_where_nothing_is_flagged_and_says_why(untrained: Case) -> None:
    repair = run(untrained)
    assert_trees_equal(repair.variables, untrained.variables)
    assert structure(repair.variables) == structure(untrained.variables)
    assert (repair.changed, repair.target, repair.info["steps"]) == (False, None, 0)
    assert repair.why == "nothing flagged"
    assert repair.scan is not None and repair.scan["verdict"] == "nothing flagged"


def test_a_given_class_is_repaired_and_marked_as_an_oracle(clean: Case) -> None:
    before = jax.tree.map(np.array, clean.variables)
    repair = run(clean, target=3)
    assert (repair.target, repair.info["oracle"], repair.changed) == (3, True, True)
    assert repair.info["steps"] == 100
    assert not trees_equal(repair.variables, clean.variables)
    assert_trees_equal(before, clean.variables)


def test_a_given_class_may_be_a_numpy_integer(clean: Case) -> None:
    repair = run(clean, target=np.int64(3))
    assert (repair.target, repair.info["oracle"], repair.changed) == (3, True, True)


@pytest.mark.parametrize("statistic", ["worst_case", "per_sample"])
def test_smallest_repairs_the_class_of_the_smallest_statistic(clean: Case, statistic: Any) -> None:
    repair = run(clean, target="smallest", statistic=statistic)
    assert repair.scan is not None
    expected = int(np.argmin(repair.scan[statistic]))
    assert (repair.target, repair.info["oracle"], repair.changed) == (expected, False, True)
    assert repair.scan["flagged"] is None


def test_the_target_is_chosen_from_a_scan(poisoned: Case, clean: Case) -> None:
    found, nothing = scan(*poisoned[:2], poisoned.data.images), scan(*clean[:2], clean.data.images)
    assert small().choose_target(found) == small(target="smallest").choose_target(found) == 4
    assert small(target=3).choose_target(found) == small(target=3).choose_target(nothing) == 3
    assert small().choose_target(nothing) is None
    assert small(alpha=1e-20).choose_target(found) is None
    for statistic in ("worst_case", "per_sample"):
        smallest = small(target="smallest", statistic=statistic).choose_target(nothing)
        assert smallest == nothing.tests[statistic].smallest


@pytest.mark.parametrize("target", ["detected", "smallest", 3])
def test_a_repair_from_a_scan_equals_the_repair_that_scans_itself(poisoned: Case, clean: Case, target: Any) -> None:
    for case in (poisoned, clean):
        found = scan(*case[:2], case.data.images)
        given, own = run(case, found=found, target=target), run(case, target=target)
        assert_trees_equal(given.variables, own.variables)
        assert (given.changed, given.why, given.target, given.scan) == (own.changed, own.why, own.target, own.scan)
        assert given.info == own.info


def test_a_given_scan_is_used_and_not_made_again(poisoned: Case, clean: Case) -> None:
    repair = run(poisoned, found=scan(*clean[:2], clean.data.images))
    assert (repair.changed, repair.target, repair.why) == (False, None, "nothing flagged")


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_loss_is_the_cross_entropy_of_latents_and_of_perturbed_latents(poisoned: Case, beta: float) -> None:
    change = np.random.default_rng(0).normal(size=11).astype(np.float32)
    batch = poisoned.data.take(slice(20))
    loss, (_, info) = tac_loss(*poisoned[:1], beta, jnp.asarray(change), poisoned.variables, batch, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), poisoned.variables["params"])
    latent = np.asarray(batch.images, np.float64).reshape(20, -1) / 255 @ params["extract"]["kernel"]
    expected = []
    for moved in (latent, latent + change):
        z = moved @ params["linear"]["kernel"] + params["linear"]["bias"]
        expected.append(np.mean(logsumexp(z, axis=1) - z[np.arange(20), np.asarray(batch.labels)]))
    np.testing.assert_allclose([info["clean"], info["perturbed"]], expected, rtol=1e-4, atol=1e-6)
    assert float(loss) == pytest.approx(expected[0] + beta * expected[1], rel=1e-4)


def test_one_key_gives_one_result_and_another_key_another(poisoned: Case) -> None:
    one, same, other = (run(poisoned, key) for key in (0, 0, 1))
    assert_trees_equal(one.variables, same.variables)
    assert one.info == same.info
    assert one.scan == same.scan
    assert not trees_equal(one.variables, other.variables)


def test_without_weight_on_the_perturbed_term_the_backdoor_remains(poisoned: Case) -> None:
    images, labels = poisoned.data.images, np.asarray(poisoned.data.labels)
    triggered = images.reshape(len(labels), -1).at[:, TRIGGER_PIXEL].set(255).reshape(images.shape)
    repair = run(poisoned, weight_decay=0.0, beta=0.0)
    assert (predictions(poisoned, repair.variables, triggered) == 4).mean() >= 0.9


def test_too_few_classes_are_reported_as_too_few() -> None:
    case = make_case(target=2, classes=4)
    repair = run(case)
    assert_trees_equal(repair.variables, case.variables)
    assert repair.changed is False
    assert repair.scan is not None and repair.why == repair.scan["verdict"] == "too few classes to tell"


def test_a_class_that_cannot_be_reached_is_not_repaired_and_the_reason_names_it() -> None:
    case = hull_case()
    repair = run(case, target=3)
    assert_trees_equal(repair.variables, case.variables)
    assert repair.changed is False and repair.target == 3
    assert repair.why is not None and "class 3" in repair.why
    assert repair.scan is not None
    assert repair.scan["infeasible"] == [3]
    assert repair.scan["worst_case"][3] is None


def hull_case() -> Case:
    """Twelve classes on two latents, class 3 inside the hull of the others."""
    program = circle(0.0, bias=-1.0)
    images = np.random.default_rng(1).integers(0, 256, (24, 1, 2, 1)).astype(np.uint8)
    params = {
        "extract": {"kernel": jnp.eye(2)},
        "linear": {"kernel": jnp.asarray(program.kernel), "bias": jnp.asarray(program.bias)},
    }
    classifier = Classifier(Pixels(12, 2), 12, mean=(0.5,), std=(0.25,))
    return Case(classifier, {"params": params}, make_dataset(images, np.arange(24) % 12, 12))


def test_a_class_that_cannot_be_reached_is_never_the_smallest() -> None:
    case = hull_case()
    found = scan(*case[:2], case.data.images)
    assert not np.isfinite(found.worst_case[3])
    assert not np.isfinite(found.per_sample[3])
    assert np.isfinite(np.delete(found.per_sample, 3)).all()


@pytest.mark.parametrize("build", [lambda: make_case(4), lambda: make_case(2, classes=4), hull_case])
def test_scan_and_info_are_plain_json(build: Any) -> None:
    repair = run(build())
    for part in (repair.scan, repair.info):
        assert json.loads(json.dumps(part, allow_nan=False)) == part


def test_a_target_beyond_the_classes_is_an_error_that_names_them(clean: Case) -> None:
    with pytest.raises(UserError, match=r"TAC.target is 10.*0 to 9"):
        run(clean, target=10)


@pytest.mark.parametrize("where", [("extract", "kernel"), ("linear", "kernel"), ("linear", "bias")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_an_error_of_the_scan(
    clean: Case, where: tuple[str, str], value: float
) -> None:
    layer, name = where
    params = dict(clean.variables["params"])
    params[layer] = {**params[layer], name: params[layer][name].at[0].set(value)}
    with pytest.raises(NonFiniteError, match=r"suspect.*not finite"):
        scan(clean.classifier, {"params": params}, clean.data.images, name="suspect")


def test_divergence_of_the_repair_names_method_and_step(poisoned: Case) -> None:
    with pytest.raises(NonFiniteError, match=r"^tac: .*step \d+"):
        run(poisoned, learning_rate=jnp.float32(1e30))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", -1),
        ("target", "biggest"),
        ("statistic", "median"),
        ("alpha", 0.0),
        ("alpha", 1.0),
        ("beta", -1.0),
        ("margin", -0.5),
        ("steps", 0),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"TAC.{field} is .*expected"):
        TAC(**{field: value})


def test_an_integer_in_a_float_field_gives_the_same_result(poisoned: Case) -> None:
    integer, exact = run(poisoned, beta=1), run(poisoned, beta=1.0)
    assert_trees_equal(integer.variables, exact.variables)
