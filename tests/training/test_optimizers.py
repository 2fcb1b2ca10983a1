"""Optimizers and schedules against NumPy and PyTorch, and what of them is traced."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import structure

from backdoor_jax import UserError
from backdoor_jax.training import (
    SGD,
    Adam,
    AMSGrad,
    Constant,
    Cosine,
    DecayedAdam,
    Optimizer,
    RelativeSGD,
    Schedule,
    Separately,
    Tenths,
    Triangular,
    cosine_in_stages,
    triangular_two_phase,
)

STEPS = 12
GRADIENTS = np.random.default_rng(0).standard_normal((STEPS, 3)) * np.geomspace(1, 1e-2, STEPS)[:, None]
START = np.array([1.0, -2.0, 0.5])


def descend(optimizer: Optimizer, gradients: Any, start: Any) -> list[Any]:
    """The weights after each of some gradients, which have a leading axis of steps."""
    transformation = optimizer.transformation()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    state, found = transformation.init(params), []
    for step in range(len(jax.tree.leaves(gradients)[0])):
        gradient = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf[step], jnp.float32), gradients)
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def numpy_sgd(rates: np.ndarray, momentum: float, decay: float) -> list[np.ndarray]:
    weights, velocity, found = START.copy(), np.zeros(3), []
    for rate, gradient in zip(rates, GRADIENTS, strict=True):
        velocity = momentum * velocity + gradient + decay * weights
        weights = weights - rate * velocity
        found.append(weights)
    return found


def numpy_adam(
    rates: np.ndarray, betas: tuple[float, float] = (0.9, 0.999), decay: float = 0.0, amsgrad: bool = False
) -> list[np.ndarray]:
    """Adam as PyTorch documents it."""
    weights, first, second, largest, found = START.copy(), np.zeros(3), np.zeros(3), np.zeros(3), []
    for step, (rate, gradient) in enumerate(zip(rates, GRADIENTS, strict=True), start=1):
        gradient = gradient + decay * weights
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        largest = np.maximum(largest, second)
        scale = (largest if amsgrad else second) / (1 - betas[1] ** step)
        weights = weights - rate * first / (1 - betas[0] ** step) / (np.sqrt(scale) + 1e-8)
        found.append(weights)
    return found


# Optimizers

CONSTANT = np.full(STEPS, 0.05)
ANNEALED = 0.025 * (1 + np.cos(np.pi * (np.arange(STEPS) // 3) / 4))


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (SGD(0.05), numpy_sgd(CONSTANT, 0.0, 0.0)),
        (SGD(0.05, momentum=0.9), numpy_sgd(CONSTANT, 0.9, 0.0)),
        (SGD(0.05, Cosine(STEPS, 4), 0.9, 0.1), numpy_sgd(ANNEALED, 0.9, 0.1)),
        (Adam(0.05), numpy_adam(CONSTANT)),
        (Adam(0.05, betas=(0.5, 0.9)), numpy_adam(CONSTANT, (0.5, 0.9))),
        (DecayedAdam(0.05, Cosine(STEPS, 4), weight_decay=0.1), numpy_adam(ANNEALED, decay=0.1)),
        (AMSGrad(0.05), numpy_adam(CONSTANT, amsgrad=True)),
        (AMSGrad(0.05, Cosine(STEPS, 4)), numpy_adam(ANNEALED, amsgrad=True)),
    ],
    ids=["sgd", "momentum", "sgd_annealed", "adam", "adam_betas", "decayed_adam", "amsgrad", "amsgrad_annealed"],
)
def test_an_optimizer_equals_its_formula(optimizer: Optimizer, expected: list[np.ndarray]) -> None:
    np.testing.assert_allclose(descend(optimizer, GRADIENTS, START), expected, rtol=1e-4, atol=1e-6)


def test_relative_sgd_is_sgd_at_a_rate_by_the_first_gradient() -> None:
    rate = 0.02 * np.linalg.norm(START) / np.linalg.norm(GRADIENTS[0])
    found = descend(RelativeSGD(0.02, Cosine(STEPS, STEPS), 0.9, 0.01), GRADIENTS, START)
    rates = rate * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS)) / 2
    np.testing.assert_allclose(found, numpy_sgd(rates, 0.9, 0.01), rtol=1e-5)


def test_relative_sgd_waits_for_the_first_gradient_that_is_not_zero() -> None:
    gradients = np.concatenate([np.zeros((1, 3)), GRADIENTS])
    found = descend(RelativeSGD(0.02), gradients, START)
    np.testing.assert_array_equal(found[0], START.astype(np.float32))
    chex.assert_trees_all_close(found[1:], descend(RelativeSGD(0.02), GRADIENTS, START), rtol=1e-6)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_sgd_equals_pytorchs(momentum: float, decay: float) -> None:
    torch = pytest.importorskip("torch")
    matrix, start = np.array([[3.0, 1.0], [1.0, 2.0]], np.float32), np.array([1.0, -2.0], np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.SGD([weight], lr=0.05, momentum=momentum, weight_decay=decay)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=5)
    ours = SGD(0.05, Cosine(5, 5), momentum, decay).transformation()
    params, state = jnp.asarray(start), ours.init(jnp.asarray(start))
    for _ in range(5):
        theirs.zero_grad()
        (0.5 * weight @ torch.tensor(matrix) @ weight).backward()
        theirs.step()
        annealing.step()
        updates, state = ours.update(matrix @ params, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (Adam(0.05), {}),
        (DecayedAdam(0.05, weight_decay=0.1), {"weight_decay": 0.1}),
        (AMSGrad(0.05), {"amsgrad": True}),
    ],
    ids=["adam", "decayed_adam", "amsgrad"],
)
def test_adam_equals_pytorchs_in_all_its_forms(optimizer: Optimizer, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    gradients = np.random.default_rng(0).standard_normal((40, 3)) * np.geomspace(1, 1e-3, 40)[:, None]
    weight = torch.nn.Parameter(torch.zeros(3))
    theirs = torch.optim.Adam([weight], lr=0.05, **options)
    for gradient, params in zip(gradients.astype(np.float32), descend(optimizer, gradients, np.zeros(3)), strict=True):
        weight.grad = torch.tensor(gradient)
        theirs.step()
        np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-4)


def test_two_models_are_optimized_separately() -> None:
    classifier, generator = SGD(0.05, momentum=0.9), Adam(0.01)
    names = ("classifier", "generator")
    found = descend(
        Separately(classifier=classifier, generator=generator),
        {name: {"w": GRADIENTS} for name in names},
        {name: {"w": START} for name in names},
    )
    for name, optimizer in zip(names, (classifier, generator), strict=True):
        np.testing.assert_array_equal([params[name]["w"] for params in found], descend(optimizer, GRADIENTS, START))


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), lambda t: 0.2),
        (Cosine(30, 10), lambda t: 0.1 * (1 + np.cos(np.pi * (t // 3) / 10))),
        (Cosine(25), lambda t: 0.1 * (1 + np.cos(np.pi * (4 * t) / 100))),
        (
            Triangular(peak1=2.2, peak2=0.7, first_phase=0.5, steps=24, up=4, down=2),
            lambda t: np.interp(t % 6, [0, 4, 6], [0.2, 2.2 if t < 12 else 0.7, 0.2]),
        ),
        (Tenths(20), lambda t: 0.2 if t < 8 else 0.02 if t < 16 else 0.002),
    ],
    ids=["constant", "cosine", "cosine_100_stages", "triangular", "tenths"],
)
def test_a_schedule_equals_its_formula_for_a_step_and_an_array_of_steps(
    schedule: Schedule, expected: Callable[[int], float]
) -> None:
    optimizer, rates = SGD(0.2, schedule), [expected(step) for step in range(24)]
    np.testing.assert_allclose([optimizer.rate(step) for step in range(24)], rates, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(optimizer.rate)(jnp.arange(24)), rates, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.broadcast_to(optimizer.rate(jnp.arange(24)), 24), rates, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("epochs", "epoch_steps"), [(100, 10), (7, 3), (1, 5), (4, 1)])
def test_the_cosine_changes_once_per_epoch_like_pytorchs(epochs: int, epoch_steps: int) -> None:
    schedule = cosine_in_stages(0.1, epochs * epoch_steps, epochs)
    found = [float(schedule(count)) for count in range(epochs * epoch_steps)]
    expected = [0.05 * (1 + np.cos(np.pi * number / epochs)) for number in range(epochs) for _ in range(epoch_steps)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert float(schedule(epochs * epoch_steps + 3)) == pytest.approx(0, abs=1e-7)


def test_the_cosine_keeps_its_stages_where_they_do_not_divide_the_steps() -> None:
    schedule = jax.jit(jax.vmap(cosine_in_stages(1.0, 250, 100)))
    expected = [0.5 * (1 + np.cos(np.pi * (count * 100 // 250) / 100)) for count in range(250)]
    np.testing.assert_allclose(schedule(jnp.arange(250)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0.1), (1, 0.6), (4, 2.1), (5, 1.1), (6, 0.1), (10, 2.1), (14, 1.1), (15, 0.4), (16, 0.5), (17, 0.3)],
)
def test_the_triangles_have_known_rates(count: int, expected: float) -> None:
    # Up in 4 steps, down in 2; the high peak until step 15 of 30, in the middle of a rise, then the low one.
    schedule = triangular_two_phase(0.1, 2.1, 0.5, steps=30, up=4, down=2, first_phase=0.5)
    assert float(schedule(count)) == pytest.approx(expected, rel=1e-5)


# Tracing


def test_rates_are_traced_and_integers_betas_and_kinds_are_static() -> None:
    leaves = jax.tree.leaves
    assert leaves(SGD(0.1, Cosine(90, 30), momentum=0.9, weight_decay=0.5)) == [0.1, 0.9, 0.5]
    assert leaves(Adam(0.1, betas=(0.5, 0.9))) == [0.1]
    assert leaves(DecayedAdam(0.1, betas=(0.5, 0.9), weight_decay=0.25)) == [0.1, 0.25]
    assert leaves(AMSGrad(0.1)) == [0.1]
    assert sorted(leaves(SGD(0.1, Triangular(0.3, 0.2, 0.5)))) == [0.0, 0.0, 0.1, 0.2, 0.3, 0.5]

    assert structure(SGD(0.1, Cosine(90))) == structure(SGD(0.2, Cosine(90), momentum=0.5))
    for one, other in (
        (SGD(0.1, Cosine(90)), SGD(0.1, Cosine(80))),
        (SGD(0.1, Cosine(90)), SGD(0.1, Tenths(90))),
        (Adam(0.1), Adam(0.1, betas=(0.5, 0.999))),
        (Adam(0.1), AMSGrad(0.1)),
    ):
        assert structure(one) != structure(other)


def test_one_program_serves_all_rates_of_an_optimizer() -> None:
    traces = []

    @jax.jit
    def rate(optimizer: SGD, step: jax.Array) -> jax.Array:
        traces.append(1)
        return optimizer.rate(step)

    triangular = Triangular(peak1=1.0, peak2=0.5, steps=10, up=1, down=1)
    assert float(rate(SGD(0.1, triangular), jnp.array(1))) == pytest.approx(1.0)
    higher = dataclasses.replace(triangular, peak1=2.0, first_phase=0.2)
    assert float(rate(SGD(0.2, higher), jnp.array(1))) == pytest.approx(2.0)
    assert float(rate(SGD(0.2, higher), jnp.array(3))) == pytest.approx(0.5)
    assert len(traces) == 1
    rate(SGD(0.1, dataclasses.replace(triangular, up=2)), jnp.array(1))
    assert len(traces) == 2


def test_schedules_take_traced_rates() -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def rates(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cosine_in_stages(rate, 10, 10)(5), triangular_two_phase(rate, 2 * rate, rate, 10, 1, 1, 0.5 * rate)(1)

    for rate in (0.5, 1.0):
        np.testing.assert_allclose(rates(jnp.float32(rate)), (rate / 2, 2 * rate), rtol=1e-6)


def test_optimizers_can_be_swept_by_mapping_over_them() -> None:
    rates = jnp.array([0.1, 0.2, 0.4])

    def one_step(optimizer: SGD) -> jax.Array:
        transformation, weight = optimizer.transformation(), jnp.ones(())
        update, _ = transformation.update(jnp.array(2.0), transformation.init(weight), weight)
        return weight + update

    np.testing.assert_allclose(jax.vmap(lambda rate: one_step(SGD(rate)))(rates), 1 - 2 * rates, rtol=1e-6)
    swept = jax.tree.map(lambda leaf: jnp.full(3, leaf), SGD(0.1, Cosine(10)))
    np.testing.assert_allclose(
        jax.vmap(one_step)(dataclasses.replace(swept, learning_rate=rates)), 1 - 2 * rates, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(0.0), "SGD.learning_rate is 0.0, expected a value greater than 0"),
        (lambda: SGD(momentum=-0.1), "SGD.momentum is -0.1, expected a value greater than or equal to 0"),
        (lambda: DecayedAdam(weight_decay=-1.0), "DecayedAdam.weight_decay is -1.0"),
        (lambda: Cosine(0), "Cosine.steps is 0, expected a value greater than or equal to 1"),
        (lambda: Triangular(up=0), "Triangular.up is 0"),
        (
            lambda: Triangular(first_phase=1.5),
            "Triangular.first_phase is 1.5, expected a value less than or equal to 1",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make()
