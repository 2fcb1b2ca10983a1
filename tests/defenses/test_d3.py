"""D3 against an independent float64 computation, and what it guarantees about norms, starts and selections."""

import itertools
from typing import Any

import flax.linen as nn
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_depends_on_key_alone, assert_trees_equal, leaves_of, trees_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from miniature import Case, miniature

from backdoor_jax import D3, Classifier, Repair, UserError, make_dataset
from backdoor_jax.defenses.d3 import d3_loss, distance, initialize
from backdoor_jax.defenses.sphere import project_selected, project_to_sphere
from backdoor_jax.training import GradientStep, split_by_path

HEAD = (("linear", "kernel"),)
LEAVES = (("hidden", "kernel"), ("hidden", "bias"), ("linear", "kernel"), ("linear", "bias"))
INITIALIZATIONS = ["random", "near", "middle", "far", "noise"]
TRACES: list[int] = []
"""Grows by one whenever the network's Python code runs: once a trace."""


class OneHidden(nn.Module):
    """A tanh layer on flattened images, then a linear head."""

    num_classes: int
    width: int = 6

    def setup(self) -> None:
        bias = nn.initializers.normal(0.1)
        self.hidden = nn.Dense(self.width, bias_init=bias)
        self.linear = nn.Dense(self.num_classes, bias_init=bias)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        TRACES.append(1)
        return nn.tanh(self.hidden(x.reshape(x.shape[0], -1)))

    def head(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.features(x, train))


@pytest.fixture(scope="module")
def case() -> Case:
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 4
    images = generator.integers(0, 120, (40, 4, 4, 1)) + 40 * labels[:, None, None, None] * (np.arange(4) == 1)[:, None]
    data = make_dataset(images.clip(0, 255).astype(np.uint8), labels, 4)
    classifier = Classifier(OneHidden(4), 4, mean=(0.3,), std=(0.4,))
    return Case(classifier, classifier.init(jax.random.key(0), data.images), data)


def small(**changes: Any) -> D3:
    return D3(**{"steps": 20, "batch_size": 20, "learning_rate": 0.05, "crop": 0, **changes})


def run(case: Case, key: int = 1, **changes: Any) -> Repair:
    return small(**changes).repair(jax.random.key(key), *case)


def selected(variables: Any, paths: Any = HEAD) -> Any:
    """The selected parameters, a tree like ``params`` with None elsewhere."""
    return split_by_path(variables["params"], paths)[0]


def norm64(w: Any) -> float:
    return float(np.linalg.norm(np.asarray(w, np.float64)))


def build_step(case: Case, defense: D3) -> GradientStep:
    origin = selected(case.variables)
    loss = Partial(d3_loss, case.classifier, defense, origin)
    return GradientStep(loss, defense.optimizer, project=Partial(project_selected, origin))


@pytest.mark.parametrize("penalty", [0.5, 10.0])
@pytest.mark.parametrize("how", ["random", "near", "far"])
def test_every_step_ends_on_the_sphere_of_the_original_norm(case: Case, penalty: float, how: Any) -> None:
    step = build_step(case, small(penalty=penalty, steps=25))
    start = initialize(jax.random.key(3), selected(case.variables), how)["linear"]["kernel"]
    params = {**case.variables["params"], "linear": {**case.variables["params"]["linear"], "kernel": start}}
    state = step.init({**case.variables, "params": params})
    update = jax.jit(step)
    goal = norm64(case.variables["params"]["linear"]["kernel"])
    for number in range(25):
        state, _ = update(state, case.data.take(slice(number % 20, number % 20 + 20)), jax.random.key(0))
        assert abs(norm64(state.variables["params"]["linear"]["kernel"]) / goal - 1) <= 1e-6
    assert not trees_equal(start, state.variables["params"]["linear"]["kernel"])


class Numpy64:
    """D3 on `OneHidden` written out by hand: forward, gradients, SGD with momentum, projection."""

    def __init__(self, params: Any, origin: Any, config: D3) -> None:
        self.w = [np.asarray(params[layer][name], np.float64) for layer, name in LEAVES]
        self.velocity = [np.zeros_like(w) for w in self.w]
        self.origin = np.asarray(origin, np.float64)
        self.config = config
        self.steps = 0

    def step(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        config, n = self.config, len(labels)
        a, a0, w, w0 = self.w
        x = ((images / 255.0 - 0.3) / 0.4).reshape(n, -1)
        h = np.tanh(x @ a + a0)
        z = h @ w + w0
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses = -np.log(p[np.arange(n), labels])
        above = losses > config.epsilon
        hinge = np.where(above, losses - config.epsilon, 0.0).mean()
        away = w - self.origin
        length = np.sqrt((away**2).sum())
        scale = config.penalty + 1 if config.penalty > 1 else 1.0
        loss = (config.penalty * hinge - length) / scale

        dz = config.penalty * above[:, None] * (p - np.eye(z.shape[1])[labels]) / n
        dw = h.T @ dz - (away / length if length > 0 else 0.0)
        dh = (dz @ w.T) * (1 - h**2)
        gradients = [x.T @ dh, dh.sum(0), dw, dz.sum(0)]

        stage = min(self.steps * 100 // config.steps, 100)
        rate = config.learning_rate / 2 * (1 + np.cos(np.pi * stage / 100))
        for i, gradient in enumerate(gradients):
            gradient = gradient / scale + config.weight_decay * self.w[i]
            self.velocity[i] = config.momentum * self.velocity[i] + gradient
            self.w[i] = self.w[i] - rate * self.velocity[i]
        self.w[2] = self.w[2] * np.sqrt((self.origin**2).sum()) / np.sqrt((self.w[2] ** 2).sum())
        self.steps += 1
        return {"loss": loss, "hinge": hinge, "distance": length, "cross_entropy": losses.mean(), "above": above}


@pytest.mark.parametrize("penalty", [0.5, 10.0])
@pytest.mark.parametrize("how", ["random", "near"])
def test_steps_equal_an_independent_float64_computation(case: Case, penalty: float, how: Any) -> None:
    config = small(penalty=penalty, epsilon=1.3, steps=3, momentum=0.9, weight_decay=0.02)
    step = build_step(case, config)
    start = initialize(jax.random.key(5), selected(case.variables), how)["linear"]["kernel"]
    params = {**case.variables["params"], "linear": {**case.variables["params"]["linear"], "kernel": start}}
    reference = Numpy64(params, case.variables["params"]["linear"]["kernel"], config)
    state = step.init({"params": params})
    update = jax.jit(step)
    for number in range(4):
        batch = case.data.take(np.arange(number, number + 20))
        state, info = update(state, batch, jax.random.key(0))
        expected = reference.step(np.asarray(batch.images, np.float64), np.asarray(batch.labels))
        assert 0 < expected["above"].sum() < 20  # so a hinge on the mean loss would give another result
        for name in ("loss", "hinge", "distance", "cross_entropy"):
            assert float(info[name]) == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name
        found = state.variables["params"]
        for w, (layer, name) in zip(reference.w, LEAVES, strict=True):
            np.testing.assert_allclose(found[layer][name], w, rtol=1e-4, atol=3e-6, err_msg=f"{layer} {name}")


@pytest.mark.parametrize("how", INITIALIZATIONS)
def test_every_initialization_gives_twenty_finite_steps_on_the_sphere(case: Case, how: Any) -> None:
    repair = run(case, initialization=how)
    assert repair.info["steps"] == 20
    assert all(np.isfinite(leaf).all() for leaf in leaves_of(repair.variables))
    assert all(np.isfinite(value) for value in repair.info["last_epoch"].values())
    kernel, origin = repair.variables["params"]["linear"]["kernel"], case.variables["params"]["linear"]["kernel"]
    assert abs(norm64(kernel) / norm64(origin) - 1) <= 1e-6
    assert repair.info["norm_ratio"] == pytest.approx(1, abs=1e-6)
    expected = norm64(np.asarray(kernel, np.float64) - np.asarray(origin, np.float64)) / norm64(origin)
    assert repair.info["distance"] == pytest.approx(expected, rel=1e-5)
    assert 0 < repair.info["distance"] <= 2 + 1e-6


@pytest.mark.parametrize("how", ["random", "near", "far", "noise"])
def test_initializations_start_on_the_sphere(case: Case, how: Any) -> None:
    origin = selected(case.variables, (("hidden",), ("linear",)))
    start = initialize(jax.random.key(2), origin, how)
    for w, w0 in zip(leaves_of(start), leaves_of(origin), strict=True):
        assert norm64(w) == pytest.approx(norm64(w0), rel=1e-6)


def test_near_starts_at_distance_zero_with_a_finite_gradient(case: Case) -> None:
    origin = selected(case.variables)
    start = initialize(jax.random.key(2), origin, "near")
    assert float(distance(start, origin)) == 0
    np.testing.assert_array_equal(jax.grad(distance)(start, origin)["linear"]["kernel"], 0)
    loss = Partial(d3_loss, case.classifier, small(), origin)
    gradient = jax.grad(lambda v: loss(v, case.data, jax.random.key(0))[0])(case.variables)
    assert all(np.isfinite(leaf).all() for leaf in leaves_of(gradient))
    assert max(np.abs(leaf).max() for leaf in leaves_of(gradient)) > 0


def test_far_starts_at_the_greatest_distance(case: Case) -> None:
    origin = selected(case.variables)
    start = initialize(jax.random.key(2), origin, "far")
    assert float(distance(start, origin)) == pytest.approx(2 * norm64(origin["linear"]["kernel"]), rel=1e-6)
    np.testing.assert_allclose(start["linear"]["kernel"], -origin["linear"]["kernel"], rtol=1e-6)


def test_middle_starts_at_zero_and_the_projection_keeps_it(case: Case) -> None:
    origin = selected(case.variables)
    start = initialize(jax.random.key(2), origin, "middle")
    np.testing.assert_array_equal(start["linear"]["kernel"], 0)
    params = {**case.variables["params"], "linear": {"kernel": start["linear"]["kernel"], "bias": jnp.ones(4)}}
    projected = project_selected(origin, params)
    np.testing.assert_array_equal(projected["linear"]["kernel"], 0)
    np.testing.assert_array_equal(projected["linear"]["bias"], 1)
    assert_trees_equal(projected["hidden"], case.variables["params"]["hidden"])


def test_random_and_noise_starts_depend_on_the_key(case: Case) -> None:
    origin = selected(case.variables)
    for how in ("random", "noise"):
        one, same, other = (initialize(jax.random.key(k), origin, how) for k in (0, 0, 1))
        assert_trees_equal(one, same)
        assert not trees_equal(one, other)
        assert 0 < float(distance(one, origin)) < 2 * norm64(origin["linear"]["kernel"])


entries = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(hnp.arrays(np.float32, (5, 3), elements=entries), hnp.arrays(np.float32, (5, 3), elements=entries))
def test_projection_rescales_to_the_original_norm(w: np.ndarray, origin: np.ndarray) -> None:
    projected = np.asarray(project_to_sphere(jnp.asarray(w), jnp.asarray(origin)))
    if not w.any():
        np.testing.assert_array_equal(projected, 0)
        return
    assert norm64(projected) == pytest.approx(norm64(origin), rel=2e-6)
    direction = w.astype(np.float64) / norm64(w)
    np.testing.assert_allclose(projected, direction * norm64(origin), rtol=1e-5, atol=1e-6 * max(norm64(origin), 1e-3))
    again = np.asarray(project_to_sphere(jnp.asarray(projected), jnp.asarray(origin)))
    np.testing.assert_allclose(again, projected, rtol=2e-6)


def test_projection_is_exact_to_a_millionth_for_a_full_size_head() -> None:
    w, origin = (jnp.asarray(np.random.default_rng(seed).normal(size=(512, 200)), jnp.float32) for seed in (0, 1))
    assert abs(norm64(project_to_sphere(w, 3 * origin)) / norm64(3 * origin) - 1) <= 1e-6


@pytest.mark.parametrize(
    ("select", "held", "free"),
    [
        (LEAVES[:1], LEAVES[:1], LEAVES[2:3]),
        (LEAVES[::2], LEAVES[::2], LEAVES[1:2]),
        ((("hidden",),), LEAVES[:2], LEAVES[2:3]),
    ],
)
def test_any_weights_can_be_selected_by_path(case: Case, select: Any, held: Any, free: Any) -> None:
    paths = tuple("/".join(path) for path in select)
    repair = run(case, select=paths)
    before, after = case.variables["params"], repair.variables["params"]
    away = 0.0
    for layer, name in held:
        assert abs(norm64(after[layer][name]) / norm64(before[layer][name]) - 1) <= 1e-6
        away += norm64(np.asarray(after[layer][name], np.float64) - np.asarray(before[layer][name], np.float64))
    for layer, name in free:
        assert abs(norm64(after[layer][name]) / norm64(before[layer][name]) - 1) > 1e-4
    assert repair.info["selected"] == list(paths)
    total = sum(norm64(before[layer][name]) for layer, name in held)
    assert repair.info["distance"] == pytest.approx(away / total, rel=1e-5)


def test_selecting_the_head_by_name_is_the_default(case: Case) -> None:
    assert_trees_equal(run(case, select=("linear/kernel",)).variables, run(case).variables)


@pytest.mark.parametrize("path", ["nowhere", "linear/weight"])
def test_a_path_that_does_not_exist_is_an_error_that_lists_the_parameters(case: Case, path: str) -> None:
    with pytest.raises(UserError, match=path) as caught:
        run(case, select=(path,))
    assert "hidden" in str(caught.value)
    assert "linear" in str(caught.value)


def test_presets_are_the_released_code_and_the_paper() -> None:
    assert D3.preset("released") == D3()
    released = D3()
    assert (released.penalty, released.epsilon, released.initialization) == (0.5, 0.1, "random")
    assert (released.steps, released.batch_size, released.learning_rate) == (1000, 256, 0.01)
    assert (released.momentum, released.weight_decay) == (0.9, 0.0)
    assert D3.preset("paper") == D3(penalty=10.0)
    assert D3.preset("paper", steps=7) == D3(penalty=10.0, steps=7)
    assert D3.preset("paper", penalty=3.0).penalty == 3.0


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"mine.*released.*paper"):
        D3.preset("mine")


@pytest.mark.parametrize("how", ["random", "near", "far"])
def test_a_repair_starts_where_its_initialization_says(case: Case, how: Any) -> None:
    defense = D3(steps=1, learning_rate=1e-12, initialization=how, crop=0)
    repaired = defense.repair(jax.random.key(3), *case).variables["params"]["linear"]["kernel"]
    origin = case.variables["params"]["linear"]["kernel"]
    expected = initialize(jax.random.split(jax.random.key(3))[0], {"kernel": origin}, how)["kernel"]
    np.testing.assert_allclose(repaired, expected, atol=1e-6)


def test_a_planted_backdoor_is_removed_and_accuracy_is_kept() -> None:
    small = miniature()
    defense = D3.preset("paper", steps=40, batch_size=32, learning_rate=0.05, crop=0)
    repair = defense.repair(jax.random.key(1), small.classifier, small.variables, small.clean)
    after = small.scores(repair.variables)
    assert after.asr is not None and after.asr < 0.15
    assert after.acc > small.before.acc - 0.08
    assert repair.info["norm_ratio"] == pytest.approx(1, abs=1e-5) and repair.info["distance"] > 0.5


def test_one_key_gives_one_result_and_the_victim_is_unchanged(case: Case) -> None:
    repair = assert_depends_on_key_alone(lambda key: run(case, key), case.variables)
    assert not trees_equal(repair.variables["params"], case.variables["params"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("penalty", 0.0),
        ("penalty", -1.0),
        ("penalty", float("nan")),
        ("epsilon", -0.1),
        ("select", ()),
        ("initialization", "somewhere"),
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("crop", -1),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"D3.{field} is .*expected"):
        D3(**{field: value})


def test_integers_in_float_fields_give_the_same_result(case: Case) -> None:
    integers, exact = run(case, penalty=10, weight_decay=0), run(case, penalty=10.0, weight_decay=0.0)
    assert_trees_equal(integers.variables, exact.variables)


def test_other_floats_do_not_trace_again(case: Case) -> None:
    run(case, penalty=0.5)
    traced = len(TRACES)
    equal_case = case._replace(classifier=Classifier(OneHidden(4), 4, mean=(0.3,), std=(0.4,)))
    results = [
        run(equal_case, penalty=p, epsilon=e, learning_rate=r)
        for p, e, r in ((0.25, 0.1, 0.05), (1.0, 0.1, 0.05), (10.0, 0.1, 0.05), (10.0, 0.3, 0.02))
    ]
    assert len(TRACES) == traced
    kernels = [np.asarray(result.variables["params"]["linear"]["kernel"]) for result in results]
    assert all(np.abs(a - b).max() > 1e-5 for a, b in itertools.pairwise(kernels))


def test_another_integer_traces_again(case: Case) -> None:
    run(case)
    traced = len(TRACES)
    run(case, steps=10)
    assert len(TRACES) > traced
    traced = len(TRACES)
    run(case, steps=10, penalty=3.0)
    assert len(TRACES) == traced


def test_vmap_over_stacked_configs_is_a_sweep(case: Case) -> None:
    configs = [small(penalty=penalty, epsilon=epsilon) for penalty, epsilon in ((0.5, 0.1), (1.0, 0.2), (10.0, 0.0))]
    moved = jax.tree.map(lambda w: 1.5 * w, case.variables)
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *configs)

    def loss(config: D3) -> jax.Array:
        return d3_loss(case.classifier, config, selected(case.variables), moved, case.data, jax.random.key(0))[0]

    alone = jax.jit(loss)
    expected = [float(alone(config)) for config in configs]
    traced = len(TRACES)
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(stacked), expected, rtol=1e-5)
    assert len(TRACES) == traced + 1
    assert len(set(expected)) == 3
