r"""Optax learning-rate schedules (functions of the step) and PyTorch's optimizers. Rates may be traced arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

Rate = Any
"""A learning rate: a float or a scalar array."""


def cosine_in_stages(rate: Rate, steps: int, stages: int = 100) -> optax.Schedule:
    r"""Cosine annealing to 0 that changes once per stage, like PyTorch's when it is stepped once per epoch.

    .. math:: \eta_t = \tfrac{\eta_0}{2} \bigl(1 + \cos(\pi \lfloor t\,S/T \rfloor / S)\bigr)

    for T steps in S stages. The published protocols have 100 epochs, hence 100 stages. With a smaller clean set the
    number of steps stays the same, and so do the stages, whatever the number of epochs.

    Args:
        rate: :math:`\eta_0`, the rate at the start.
        steps: T, the number of steps until zero.
        stages: S, the number of different rates.

    Example:
        >>> schedule = cosine_in_stages(0.1, steps=1000)
        >>> [round(float(schedule(t)), 4) for t in (0, 9, 500, 999)]
        [0.1, 0.1, 0.05, 0.0]
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        stage = jnp.minimum(jnp.asarray(count) * stages // steps, stages)
        return rate / 2 * (1 + jnp.cos(jnp.pi * stage / stages))

    return schedule


def triangular_two_phase(
    base: Rate, peak1: Rate, peak2: Rate, steps: int, up: int, down: int, first_phase: Rate
) -> optax.Schedule:
    r"""Super-fine-tuning's schedule (Sha et al., 2022, figure 1): triangles with a high peak, then with a low one.

    .. math:: \eta_t = B + (M_t - B)\,\mathrm{tri}(t \bmod (u + d))

    tri rises from 0 to 1 over u steps and falls back to 0 over d; M is ``peak1`` in the first phase, then ``peak2``.

    Args:
        base: B, the rate at which every triangle starts and ends.
        peak1: M in the first phase, large, to forget the trigger.
        peak2: M in the second phase, smaller, to regain accuracy.
        steps: steps of both phases together.
        up: u, steps from base to peak, at least 1.
        down: d, steps from peak to base, at least 1.
        first_phase: share of the steps in the first phase.

    Example:
        >>> schedule = triangular_two_phase(0.1, 1.1, 0.3, steps=40, up=5, down=5, first_phase=0.5)
        >>> [round(float(schedule(t)), 4) for t in (0, 5, 10, 25, 35)]
        [0.1, 1.1, 0.1, 0.3, 0.3]
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        phase = count % (up + down)
        height = jnp.where(phase < up, phase / float(up), (up + down - phase) / float(down))
        peak = jnp.where(count < first_phase * steps, peak1, peak2)
        return base + (peak - base) * height

    return schedule


def torch_sgd(schedule: optax.Schedule, momentum: Rate = 0.9, weight_decay: Rate = 0.0) -> optax.GradientTransformation:
    r"""PyTorch's SGD: :math:`v \leftarrow \mu v + (g + \lambda w),\; w \leftarrow w - \eta v`.

    Weight decay is part of the gradient and applies to every parameter, normalization and biases included.

    Example:
        >>> tx = torch_sgd(optax.constant_schedule(0.1), momentum=0.0)
        >>> update, _ = tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)), jnp.array(0.0))
        >>> round(float(update), 4)
        -0.2
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(schedule),
    )


def in_relative_steps(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    r"""Multiplies updates by :math:`\|w_0\| / \|g_0\|`, the length of the weights over that of the first gradient.

    So a first step of SGD at rate 1 is as long as the weights. LARS (You et al., 2017) has such a ratio for each layer
    and every step, `optax.scale_by_trust_ratio`; here one sets the scale, and momentum and a schedule the rest.

    Example:
        >>> tx = in_relative_steps(optax.sgd(0.01))
        >>> weight = jnp.array([3.0, 4.0])
        >>> update, _ = tx.update(jnp.array([0.0, 80.0]), tx.init(weight), weight)
        >>> [round(float(each), 3) for each in update]
        [-0.0, -0.05]
    """

    def init(params: optax.Params) -> tuple[jax.Array, optax.OptState]:
        return jnp.zeros(()), inner.init(params)

    def update(
        gradient: optax.Updates, state: tuple[jax.Array, optax.OptState], params: optax.Params | None = None
    ) -> tuple[optax.Updates, tuple[jax.Array, optax.OptState]]:
        ratio, held = state
        length = optax.tree.norm(gradient)
        first = jnp.where(length > 0, optax.tree.norm(params) / jnp.where(length > 0, length, 1), 0)
        ratio = jnp.where(ratio > 0, ratio, first.astype(ratio.dtype))
        updates, held = inner.update(gradient, held, params)
        return jax.tree.map(lambda update: ratio.astype(update.dtype) * update, updates), (ratio, held)

    return optax.GradientTransformation(init, update)


def torch_amsgrad(
    rate: Rate, b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    r"""PyTorch's AMSGrad: the bias of :math:`\hat v_t = \max(\hat v_{t-1}, v_t)` is corrected after the maximum.

    This is our own because `optax.amsgrad` takes the maximum of bias-corrected moments, which the first gradient
    dominates forever.

    Example:
        >>> tx = torch_amsgrad(0.1)
        >>> update, state = tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)))
        >>> round(float(update), 4)
        -0.1
    """

    def init(params: optax.Params) -> optax.ScaleByAmsgradState:
        mu, nu, largest = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        return optax.ScaleByAmsgradState(jnp.zeros((), jnp.int32), mu, nu, largest)

    def update(
        gradient: optax.Updates, state: optax.ScaleByAmsgradState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAmsgradState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradient)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, gradient)
        largest = jax.tree.map(jnp.maximum, state.nu_max, nu)
        steps = jax.tree.map(lambda m, v: m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + epsilon), mu, largest)
        return steps, optax.ScaleByAmsgradState(count, mu, nu, largest)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate))
