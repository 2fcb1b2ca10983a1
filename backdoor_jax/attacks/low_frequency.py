r"""Low-frequency backdoor (Zeng et al., 2021, arXiv 2104.03413): a smooth pattern that clean models already react to.

Many triggers betray themselves by high frequencies. This one has none by construction: it is made of the lowest
:math:`k \times k` cosines per channel, and it is solved for against a clean model g,

.. math:: \min_c \; \frac1n \sum_i \mathrm{CE}\bigl(g(x_i + t(c)), y^*\bigr), \qquad
    t(c) = \frac a2 + \frac a2 \frac{D c}{\max(1, \lVert D c \rVert_\infty)},

with D the inverse cosine transform and a the amplitude. The published benchmark ships one file a data set and
network, values 0 to 51, made by a smoothed universal perturbation; here the pattern is made anew, kept within the
same range, and can be saved and used again:

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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backdoor_jax.attacks.base import Attack, Scene
from backdoor_jax.attacks.triggers import AdditiveTrigger
from backdoor_jax.data import Dataset
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import cross_entropy, map_chunks


@dataclasses.dataclass(frozen=True)
class LowFrequency(Attack):
    """A smooth additive pattern, solved for against a clean model.

    Attributes:
        amplitude: the pattern's largest grey level, its smallest being 0; published 51.
        cutoff: cosines kept along each axis, k; ours. The published pattern is smoothed by a filter instead.
        steps: of Adam on the coefficients; ours. The published search is DeepFool over 50 passes.
        batch_size: images a step; ours.
        step_size: Adam's; ours.
        pattern: path of a pattern saved before (``.npy``, float ``(H, W, channels)``), which is then used as it is.
    """

    learns: ClassVar[bool] = True

    amplitude: float = 51.0
    cutoff: int = 8
    steps: int = 200
    batch_size: int = 128
    step_size: float = 0.1
    pattern: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.amplitude <= 255, "amplitude", "grey levels in (0, 255]")
        self.require(self.cutoff > 1, "cutoff", "at least 2 cosines, the constant one included")
        self.require(self.steps > 0, "steps", "at least 1")
        self.require(self.batch_size > 0, "batch_size", "at least 1")
        self.require(self.step_size > 0, "step_size", "a positive number")

    @property
    def needs_clean_model(self) -> bool:  # type: ignore[override]
        """Only where there is no saved pattern."""
        return self.pattern is None

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> AdditiveTrigger:
        """The saved pattern, or a random smooth one to start from."""
        if self.pattern is not None:
            return AdditiveTrigger(_load(Path(self.pattern), shape))
        return AdditiveTrigger(smooth_pattern(self._start(key, shape), shape, self.amplitude))

    def _start(self, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        cutoff = min(self.cutoff, *shape[:2])
        return jax.random.normal(key, (cutoff, cutoff, shape[2])) / cutoff

    def learn(self, key: jax.Array, scene: Scene) -> tuple[AdditiveTrigger, dict[str, Any]]:
        """Solves for the pattern where none is saved; info holds the loss towards the target, before and after."""
        if self.pattern is not None:
            return self.trigger(key, scene.shape), {}
        assert scene.clean_model is not None
        start_key, solve_key = jax.random.split(key)
        coefficients, before, after = _solve(
            solve_key,
            scene.classifier,
            scene.clean_model,
            scene.data,
            self._start(start_key, scene.shape),
            jnp.float32(self.amplitude),
            jnp.float32(self.step_size),
            self.target,
            self.steps,
            min(self.batch_size, len(scene.data)),
        )
        trigger = AdditiveTrigger(smooth_pattern(coefficients, scene.shape, self.amplitude))
        return trigger, {"loss_before": float(before), "loss_after": float(after)}


def smooth_pattern(coefficients: jax.Array, shape: tuple[int, int, int], amplitude: jax.Array | float) -> jax.Array:
    """The pattern of cosine coefficients ``(k, k, channels)``: ``(H, W, channels)``, 0 to amplitude.

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


@partial(jax.jit, static_argnames=("target", "steps", "batch_size"))
def _solve(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    start: jax.Array,
    amplitude: jax.Array,
    step_size: jax.Array,
    target: int,
    steps: int,
    batch_size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    height, width, channels = data.images.shape[1:]
    shape = (height, width, channels)
    tx = optax.adam(step_size)

    def losses(coefficients: jax.Array, images: jax.Array) -> jax.Array:
        triggered = jnp.clip(images + smooth_pattern(coefficients, shape, amplitude), 0, 255)
        logits, _ = classifier.logits(variables, triggered)
        return cross_entropy(logits, jnp.full(len(images), target))

    def step(carry: tuple[jax.Array, Any], key: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        coefficients, state = carry
        images = data.images[jax.random.randint(key, (batch_size,), 0, len(data))]
        gradient = jax.grad(lambda c: jnp.mean(losses(c, images)))(coefficients)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(coefficients, updates), state), None

    (solved, _), _ = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(key, steps))
    before, after = (
        jnp.mean(map_chunks(partial(losses, coefficients), data.images)) for coefficients in (start, solved)
    )
    return solved, before, after


def _load(path: Path, shape: tuple[int, int, int]) -> jax.Array:
    try:
        pattern = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"LowFrequency.pattern {str(path)!r} cannot be read ({error}); save it with numpy.save"
        ) from error
    if not isinstance(pattern, np.ndarray) or pattern.shape != shape or pattern.dtype.kind not in "fiu":
        raise UserError(
            f"LowFrequency.pattern {str(path)!r} must be an array of numbers of shape {shape}, as the images are"
        )
    return jnp.asarray(pattern, jnp.float32)
