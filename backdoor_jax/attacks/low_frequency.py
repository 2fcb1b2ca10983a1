r"""Low-frequency backdoor (Zeng et al., 2021, arXiv 2104.03413): a smooth pattern that clean models already react to.

Many triggers can be recognized by their high frequencies. This one has none by construction: it consists of the lowest
:math:`k \times k` cosines per channel, and it is optimized against a clean model g,

.. math:: \min_c \; \frac1n \sum_i \mathrm{CE}\bigl(g(x_i + t(c)), y^*\bigr), \qquad
    t(c) = \frac a2 + \frac a2 \frac{D c}{\max(1, \lVert D c \rVert_\infty)},

with D the inverse cosine transform and a the amplitude. The published benchmark ships one file for each data set and
network, with values from 0 to 51, made by a smoothed universal perturbation. Here the pattern is computed, stays within
the same range, and can be saved and reused:

>>> import jax, jax.numpy as jnp, tempfile
>>> from pathlib import Path
>>> attack = LowFrequency(amplitude=51)
>>> trigger = attack.trigger(jax.random.key(0), (32, 32, 3))
>>> bool(trigger.pattern.min() >= 0), bool(trigger.pattern.max() <= 51)
(True, True)
>>> with tempfile.TemporaryDirectory() as folder:
...     jnp.save(Path(folder) / "pattern.npy", trigger.pattern)
...     again = LowFrequency(pattern=f"{folder}/pattern.npy").trigger(jax.random.key(1), (32, 32, 3))
>>> bool((again.pattern == trigger.pattern).all())
True
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Le

from backdoor_jax.array_files import read_npy
from backdoor_jax.attacks.base import Attack, AttackContext
from backdoor_jax.attacks.triggers import AdditiveTrigger
from backdoor_jax.config import Count, Positive
from backdoor_jax.data import Dataset
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import cross_entropy, map_chunks


@dataclasses.dataclass(frozen=True)
class LowFrequency(Attack):
    """A smooth additive pattern, optimized against a clean model.

    Attributes:
        amplitude: the pattern's largest gray level, its smallest being 0; published 51.
        cutoff: cosines kept along each axis, the constant one included, k; ours. The published pattern is smoothed by a
            filter instead.
        steps: of Adam on the coefficients; ours. The published search is DeepFool over 50 passes.
        batch_size: images in a step; ours.
        step_size: Adam's learning rate; ours.
        pattern: path of a saved pattern (``.npy``, numbers ``(H, W, channels)``), which is then used unchanged.
    """

    name: ClassVar[str] = "low_frequency"
    fits_trigger: ClassVar[bool] = True

    amplitude: Annotated[float, Gt(0), Le(255)] = 51.0
    cutoff: Annotated[int, Ge(2)] = 8
    steps: Count = 200
    batch_size: Count = 128
    step_size: Positive = 0.1
    pattern: str | None = None

    @property
    def needs_clean_model(self) -> bool:
        """Only if there is no saved pattern."""
        return self.pattern is None

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """The saved pattern, or the random smooth one that the optimization starts from.

        Raises:
            UserError: if the saved pattern cannot be read, or does not have the images' shape.
        """
        if self.pattern is not None:
            return AdditiveTrigger(_load(Path(self.pattern), shape))
        return AdditiveTrigger(smooth_pattern(self._start(key, shape), shape, self.amplitude))

    def _start(self, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        cutoff = min(self.cutoff, *shape[:2])
        return jax.random.normal(key, (cutoff, cutoff, shape[2])) / cutoff

    def fit_trigger(self, key: jax.Array, context: AttackContext) -> tuple[AdditiveTrigger, dict[str, Any]]:
        """Optimizes the pattern unless one is saved; info has the loss towards the target before and after."""
        if self.pattern is not None:
            return self.trigger(key, context.shape), {}
        assert context.clean_model is not None
        start_key, solve_key = jax.random.split(key)
        start = self._start(start_key, context.shape)
        solved, before, after = _solve(solve_key, context.classifier, context.clean_model, context.data, self, start)
        trigger = AdditiveTrigger(smooth_pattern(solved, context.shape, self.amplitude))
        return trigger, {"loss_before": float(before), "loss_after": float(after)}


def smooth_pattern(coefficients: jax.Array, shape: tuple[int, int, int], amplitude: jax.Array | float) -> jax.Array:
    """The pattern with the given cosine coefficients, with values from 0 to the amplitude.

    Args:
        coefficients: ``(k, k, channels)``.
        shape: ``(height, width, channels)`` of the pattern.
        amplitude: the largest gray level.

    Returns:
        float32 of that shape.

    Example:
        >>> flat = smooth_pattern(jnp.zeros((4, 4, 1)), (8, 8, 1), 50.0)
        >>> bool((flat == 25).all())
        True
    """
    rows, columns = _cosines(shape[0], coefficients.shape[0]), _cosines(shape[1], coefficients.shape[1])
    wave = jnp.einsum("hp,wq,pqc->hwc", rows, columns, coefficients)
    return amplitude / 2 * (1 + wave / jnp.maximum(1.0, jnp.max(jnp.abs(wave))))


def _cosines(size: int, count: int) -> np.ndarray:
    """The DCT-II basis ``(size, count)``."""
    return np.cos(np.pi * (np.arange(size)[:, None] + 0.5) * np.arange(count) / size).astype(np.float32)


@jax.jit
def _solve(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    config: LowFrequency,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The coefficients that Adam finds, and the mean loss towards the target before and after."""
    height, width, channels = data.images.shape[1:]
    shape, batch_size = (height, width, channels), min(config.batch_size, len(data))
    optimizer = optax.adam(config.step_size)

    def losses(coefficients: jax.Array, images: jax.Array) -> jax.Array:
        triggered = jnp.clip(images + smooth_pattern(coefficients, shape, config.amplitude), 0, 255)
        logits, _ = classifier.logits(variables, triggered)
        return cross_entropy(logits, jnp.full(len(images), config.target))

    def step(carry: tuple[jax.Array, Any], key: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        coefficients, state = carry
        images = data.images[jax.random.randint(key, (batch_size,), 0, len(data))]
        gradient = jax.grad(lambda c: jnp.mean(losses(c, images)))(coefficients)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(coefficients, updates), state), None

    (solved, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, config.steps))
    before, after = (
        jnp.mean(map_chunks(partial(losses, coefficients), data.images)) for coefficients in (start, solved)
    )
    return solved, before, after


def _load(path: Path, shape: tuple[int, int, int]) -> jax.Array:
    try:
        pattern = read_npy(path)
    except UserError as error:
        raise UserError(f"LowFrequency.pattern: {error}") from error
    if pattern.shape != shape or pattern.dtype.kind not in "fiu" or not np.isfinite(pattern).all():
        raise UserError(
            f"LowFrequency.pattern {path} must be an array of finite numbers of shape {shape}, as the images are"
        )
    return jnp.asarray(pattern, jnp.float32)
