"""The losses against their formulas in float64, and the rankings they give."""

from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from backdoor_jax.training import cross_entropy, symmetric_cross_entropy

ROWS, CLASSES = 12, 5
batched_cross_entropy = jax.jit(cross_entropy)
batched_symmetric = jax.jit(symmetric_cross_entropy)


def exact_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``log(1 + sum_{j != y} exp(z_j - z_y))`` in float64."""
    margins = logits.astype(np.float64) - np.take_along_axis(logits.astype(np.float64), labels[:, None], 1)
    np.put_along_axis(margins, labels[:, None], -np.inf, 1)
    return np.logaddexp(0.0, np.logaddexp.reduce(margins, axis=1))


def exact_symmetric(logits: np.ndarray, labels: np.ndarray, alpha: float, log_zero: float) -> np.ndarray:
    forward = exact_cross_entropy(logits, labels)
    return forward - alpha * log_zero * -np.expm1(-forward)


def confident_batch() -> tuple[np.ndarray, np.ndarray]:
    """Distinct margins of the labeled class from -40 to 40; one other class is the strongest rival."""
    margins = np.linspace(-40, 40, 161)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, CLASSES, len(margins))
    logits = generator.uniform(-3, -1, (len(margins), CLASSES))
    rival = (labels + 1) % CLASSES
    logits[np.arange(len(margins)), rival] = 0.0
    logits[np.arange(len(margins)), labels] = margins
    return logits.astype(np.float32), labels


def separated(values: np.ndarray, relative: float = 1e-4) -> np.ndarray:
    """Pairs (a, b) with a clearly below b; other pairs may round to either order in float32."""
    low, high = values[:, None], values[None]
    return low < high * (1 - relative) - 1e-30


def test_cross_entropy_of_two_classes_equals_the_formula_by_hand() -> None:
    value = float(cross_entropy(jnp.array([np.log(3.0), 0.0]), jnp.array(0)))
    assert value == pytest.approx(np.log(4 / 3), rel=1e-6)


def test_symmetric_cross_entropy_equals_the_formula_by_hand() -> None:
    logits, label = jnp.array([np.log(3.0), 0.0, 0.0]), jnp.array(0)  # p = 3/5, 1/5, 1/5
    value = float(symmetric_cross_entropy(logits, label, alpha=0.5, log_zero=-6.0))
    assert value == pytest.approx(-np.log(0.6) + 0.5 * 6 * 0.4, rel=1e-6)


def test_symmetric_cross_entropy_is_cross_entropy_plus_swapped_cross_entropy() -> None:
    logits, labels = np.random.default_rng(1).normal(size=(ROWS, CLASSES)), np.arange(ROWS) % CLASSES
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    q = np.eye(CLASSES)[labels]
    log_q = np.where(q > 0, 0.0, -4.0)
    expected = -(q * np.log(p)).sum(1) + 2.0 * -(p * log_q).sum(1)
    found = symmetric_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), alpha=2.0, log_zero=-4.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cross_entropy_is_accurate_for_margins_up_to_40() -> None:
    logits, labels = confident_batch()
    found = np.asarray(batched_cross_entropy(logits, labels))
    np.testing.assert_allclose(found, exact_cross_entropy(logits, labels), rtol=2e-5)
    assert (found > 0).all()
    assert len(np.unique(found)) == len(found)


def test_symmetric_cross_entropy_is_accurate_for_margins_up_to_40() -> None:
    logits, labels = confident_batch()
    found = np.asarray(batched_symmetric(logits, labels, 1.5, -4.0))
    np.testing.assert_allclose(found, exact_symmetric(logits, labels, 1.5, -4.0), rtol=2e-5)
    assert (found > 0).all()
    assert len(np.unique(found)) == len(found)


def test_low_precision_logits_give_a_float32_loss() -> None:
    found = cross_entropy(jnp.array([[30.0, 0.0], [31.0, 0.0]], jnp.bfloat16), jnp.zeros(2, jnp.int32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.exp([-30.0, -31.0]), rtol=1e-5)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    logits=hnp.arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-20, 20, width=32)),
    labels=hnp.arrays(np.int32, (ROWS,), elements=st.integers(0, CLASSES - 1)),
    alpha=st.floats(0, 10, width=32),
    log_zero=st.floats(-10, -0.5, width=32),
)
def test_ranking_by_symmetric_cross_entropy_is_ranking_by_probability_of_the_label(
    logits: np.ndarray, labels: np.ndarray, alpha: float, log_zero: float
) -> None:
    found = np.asarray(batched_symmetric(logits, labels, alpha, log_zero))
    exact = logits.astype(np.float64)
    own = np.take_along_axis(exact, labels[:, None], 1)
    np.put_along_axis(exact, labels[:, None], -np.inf, 1)
    against = np.exp(exact - own).sum(1)  # (1 - p_y) / p_y, which decreases in p_y and is accurate near p_y = 1
    below = separated(against) & separated(exact_symmetric(logits, labels, alpha, log_zero))
    assume(below.any())
    assert (found[:, None] < found[None])[below].all()


@pytest.mark.parametrize("log_zero", [-1.0, -9.21])
def test_alpha_does_not_change_the_ranking(log_zero: float) -> None:
    logits, labels = confident_batch()
    order = np.argsort(exact_cross_entropy(logits, labels))
    for alpha in (0.0, 0.1, 1.0, 6.0, 100.0):
        np.testing.assert_array_equal(np.argsort(batched_symmetric(logits, labels, alpha, log_zero)), order)


def test_gradient_equals_that_of_log_softmax_for_ordinary_logits() -> None:
    generator = np.random.default_rng(2)
    logits = jnp.asarray(generator.uniform(-8, 8, (40, CLASSES)), jnp.float32)
    labels = jnp.asarray(generator.integers(0, CLASSES, 40))

    def reference(z: jax.Array) -> jax.Array:
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1))

    found = jax.grad(lambda z: jnp.sum(cross_entropy(z, labels)))(logits)
    np.testing.assert_allclose(found, jax.grad(reference)(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, symmetric_cross_entropy])
@pytest.mark.parametrize("margin", [-1e4, -100.0, -40.0, 0.0, 40.0, 100.0, 1e4])
def test_gradient_is_finite_however_confident_the_model(loss: Callable[..., jax.Array], margin: float) -> None:
    logits = jnp.array([margin, 0.0, -1.0])
    gradient = jax.grad(lambda z: loss(z, jnp.array(0)))(logits)
    assert np.isfinite(gradient).all()
    assert float(jnp.abs(jnp.sum(gradient))) < 1e-6


@pytest.mark.parametrize("loss", [cross_entropy, symmetric_cross_entropy])
def test_mapped_over_samples_equals_batched(loss: Callable[..., jax.Array]) -> None:
    logits, labels = map(jnp.asarray, confident_batch())
    np.testing.assert_allclose(
        jax.vmap(loss)(logits, labels),
        loss(logits, labels),
        rtol=1e-6,
    )
