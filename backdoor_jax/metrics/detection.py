r"""MM-BD (Wang, Xiang, Miller, Kesidis, IEEE S&P 2024, arXiv 2205.06900): detects a backdoor without any image.

A backdoored model can classify an image as the target class by a larger margin than as any other class. For each class
t the largest margin over all images,

.. math:: r_t = \max_{x \in [0, 1]^{H \times W \times c}}\ f_t(x) - \max_{j \ne t} f_j(x) ,

is estimated by gradient ascent from random images, whatever the trigger may be. The test asks whether the largest of
the C values is an outlier: with a gamma distribution F fitted to the other C - 1 values,

.. math:: p = 1 - F(\max_t r_t)^C

is the chance that the largest of C such values is at least as large. The paper calls a model backdoored where
p <= 0.05.

Limitation. The fit leaves out the largest value whether or not it is an outlier, so the fitted tail is too thin and the
test does not keep its level: of 200 sets of C gamma values without any outlier it flags 54 % (C = 5), 28 % (C = 10) and
16 % (C = 43) at 0.05. Compare a p-value with those of models known to be clean.

Sources, all from the released code: 30 uniform images per class, SGD at rate 0.01 (the momentum in the code has no
effect), at most 300 steps and fewer where the summed margin changes by less than a share of 1e-5; pixels are clipped in
the network's input and not after the step; the shape, location and scale of the gamma are fitted by maximum likelihood;
the exponent is C. The code also prints the deviation from the median in scaled median absolute deviations, which is
`mad_score` here.

With fewer than five classes there is no p-value (our choice): three parameters cannot be fitted to so few values.

    >>> import jax
    >>> from backdoor_jax import build_classifier
    >>> classifier = build_classifier("small_cnn", 5, width=2)
    >>> victim = classifier.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 3), "uint8"))
    >>> found = mm_bd(jax.random.key(1), classifier, victim, (8, 8, 3), MarginConfig(starts=2, steps=2))
    >>> found.margins.shape, 0 <= found.p_value <= 1
    ((5,), True)
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.compiling import jit
from backdoor_jax.config import Config, Count, LearningRate, NonNegative
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.memory import largest_array, require_batch_memory
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.progress import progress_bar
from backdoor_jax.stopping import stop_if_asked
from backdoor_jax.validation import checked

FEWEST_CLASSES = 5
AT_ONCE = 10
"""Classes whose images pass through the network together."""
BLOCK = 10
"""Steps of the ascent between two signs of progress."""


@dataclasses.dataclass(frozen=True)
class MarginConfig(Config):
    """Settings of the gradient ascent; the defaults are the released code's.

    Attributes:
        starts: random images per class; 30.
        steps: the most steps of the ascent; 300.
        rate: the step size; 0.01.
        tolerance: relative change of the summed margin below which a class is finished; 1e-5.
    """

    starts: Count = 30
    steps: Count = 300
    rate: LearningRate = 0.01
    tolerance: NonNegative = 1e-5


class Detection(NamedTuple):
    """The result of the test.

    Attributes:
        target: the class of the largest margin.
        p_value: of the largest margin; None where there are too few classes.
        mad_score: its deviation from the median, in scaled median absolute deviations.
        margins: ``(C,)``, the maximum margins.
    """

    target: int
    p_value: float | None
    mad_score: float
    margins: np.ndarray

    def flagged(self, alpha: float = 0.05) -> int | None:
        """The class that the test calls a backdoor's target at this level, or None."""
        return self.target if self.p_value is not None and self.p_value <= alpha else None


class _Ascent(NamedTuple):
    """The search of one class: its images, the summed margin before, and the margins found."""

    images: jax.Array
    last: jax.Array
    found: jax.Array
    converged: jax.Array


@partial(jit, static_argnames="shape")
def _start(
    key: jax.Array, targets: jax.Array, classifier: Classifier, shape: tuple[int, int, int], config: MarginConfig
) -> _Ascent:
    """The searches of some classes before their first step."""

    def one(key: jax.Array) -> _Ascent:
        images = jax.random.uniform(key, (config.starts, *shape))
        return _Ascent(images, jnp.float32(jnp.inf), jnp.full(config.starts, -jnp.inf), jnp.bool(False))

    return jax.vmap(one)(jax.random.split(key, classifier.num_classes)[targets])


@jit
def _ascend(
    states: _Ascent,
    steps: int,
    targets: jax.Array,
    classifier: Classifier,
    variables: Variables,
    config: MarginConfig,
) -> _Ascent:
    """So many more steps for some classes."""

    def margins(images: jax.Array, target: jax.Array) -> jax.Array:
        logits, _ = classifier.logits(variables, 255 * jnp.clip(images, 0, 1))
        own = jnp.arange(classifier.num_classes) == target
        return logits[:, target] - jnp.max(jnp.where(own, -jnp.inf, logits), -1)

    def one(state: _Ascent, target: jax.Array) -> _Ascent:
        def total(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = margins(images, target).astype(jnp.float32)
            return jnp.sum(found), found

        def step(carry: tuple[jax.Array, _Ascent]) -> tuple[jax.Array, _Ascent]:
            count, ascent = carry
            (summed, found), gradient = jax.value_and_grad(total, has_aux=True)(ascent.images)
            converged = jnp.abs(ascent.last - summed) < config.tolerance * jnp.abs(ascent.last)
            return count + 1, _Ascent(ascent.images + config.rate * gradient, summed, found, converged)

        _, state = jax.lax.while_loop(
            lambda carry: (carry[0] < steps) & ~carry[1].converged, step, (jnp.int32(0), state)
        )
        return state

    return jax.vmap(one)(states, targets)


@checked
def maximum_margins(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    shape: tuple[int, int, int],
    config: MarginConfig = MarginConfig(),
) -> np.ndarray:
    """Searches for the largest margin of each class.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: its variables.
        shape: height, width and channels of an image.
        config: settings.

    Returns:
        The largest margins found, ``(C,)``, each a lower bound of the true one.

    Raises:
        UserError: for images so large that there is no memory for them.
        NonFiniteError: where a margin is not finite.
    """
    batch = jax.ShapeDtypeStruct((min(AT_ONCE, classifier.num_classes) * config.starts, *shape), jnp.float32)
    needed = largest_array(lambda images: classifier.logits(variables, images)[0], batch)
    require_batch_memory(needed, batch.shape, "mm_bd")
    classes, margins = np.arange(classifier.num_classes), []
    with progress_bar("mm_bd", len(classes) * config.steps) as tell:
        tell(0, "compiling")
        for first in classes[::AT_ONCE]:
            targets = classes[first : first + AT_ONCE]
            states = _start(key, targets, classifier, shape, config)
            for done in range(0, config.steps, BLOCK):
                steps = min(BLOCK, config.steps - done)
                states = _ascend(states, steps, targets, classifier, variables, config)
                finished = np.asarray(states.converged).all()
                tell(steps * len(targets))
                stop_if_asked()
                if finished:
                    break
            margins.append(np.asarray(states.found).max(1))
    found = np.concatenate(margins)
    if not np.isfinite(found).all():
        raise NonFiniteError("mm_bd: margins are not finite; check the checkpoint, or lower MarginConfig.rate")
    return found


@typed
def largest_margin(margins: np.ndarray) -> Detection:
    """Tests whether the largest of C margins is an outlier.

    Args:
        margins: ``(C,)``.

    Example:
        >>> found = largest_margin(np.array([5.0, 5.4, 4.8, 19.0, 5.2, 5.1]))
        >>> found.target, found.p_value < 0.05, found.mad_score > 3.5
        (3, True, True)
    """
    from scipy import stats

    margins = np.asarray(margins, np.float64)
    target = int(np.argmax(margins))
    mad = stats.median_abs_deviation(margins, scale="normal")
    score = float((margins[target] - np.median(margins)) / mad) if mad > 0 else 0.0
    p_value = None
    if len(margins) >= FEWEST_CLASSES:
        rest = np.delete(margins, target)
        # A gamma distribution cannot be fitted to equal values: the largest either equals them or exceeds them all.
        fitted = stats.gamma.fit(rest) if np.ptp(rest) else None
        above = stats.gamma.sf(margins[target], *fitted) if fitted else float(margins[target] == rest[0])
        with np.errstate(divide="ignore"):
            p_value = float(-np.expm1(len(margins) * np.log1p(-above)))
    return Detection(target, p_value, score, margins)


@checked
def mm_bd(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    shape: tuple[int, int, int],
    config: MarginConfig = MarginConfig(),
) -> Detection:
    """Tests whether a model is backdoored, and which class is the target.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: its variables.
        shape: height, width and channels of an image.
        config: settings.

    Raises:
        NonFiniteError: where a margin is not finite.
    """
    return largest_margin(maximum_margins(key, classifier, variables, shape, config))
