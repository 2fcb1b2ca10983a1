r"""Learning-rate schedules as Optax has them: a step count to a rate. Rates may be traced arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

Rate = Any
"""A learning rate: a float or a scalar array."""


def cosine_in_stages(rate: Rate, steps: int, stages: int = 100) -> optax.Schedule:
    r"""Cosine annealing to 0 that moves once a stage, as PyTorch's does when it is stepped once an epoch.

    .. math:: \eta_t = \tfrac{\eta_0}{2} \bigl(1 + \cos(\pi \lfloor t\,S/T \rfloor / S)\bigr)

    for T steps in S stages. The published protocols have 100 epochs, so 100 stages; a smaller clean set keeps the steps
    and with them the stages, whatever its own epochs are.

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
    r"""Super-fine-tuning's schedule (Sha et al., 2022, figure 1): triangles under a high, then under a low peak.

    .. math:: \eta_t = B + (M_t - B)\,\mathrm{tri}(t \bmod (u + d))

    tri climbs from 0 to 1 over u steps and falls back over d; M is ``peak1`` for the first share of the steps, then
    ``peak2``.

    Args:
        base: B, where every triangle starts and ends.
        peak1: M in the first phase, large, to forget the trigger.
        peak2: M in the second, smaller, to regain accuracy.
        steps: of both phases together.
        up: steps from base to peak, at least 1.
        down: steps back, at least 1.
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
    r"""SGD as PyTorch has it: :math:`v \leftarrow \mu v + (g + \lambda w),\; w \leftarrow w - \eta v`.

    Weight decay is part of the gradient and applies to every parameter, normalisation and biases included.

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
