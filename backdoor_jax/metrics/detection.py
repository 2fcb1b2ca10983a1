r"""MM-BD (Wang, Xiang, Miller, Kesidis, IEEE S&P 2024, arXiv 2205.06900): is a model backdoored, told without an image.

A backdoor makes its class win by more than any other class can. For each class t the largest margin over all images is
sought,

.. math:: r_t = \max_{x \in [0, 1]^{H \times W \times c}}\ f_t(x) - \max_{j \ne t} f_j(x) ,

by gradient ascent from random images, whatever the trigger may be. Is the largest of the C values an outlier among
them? The other C - 1 are taken to come from a gamma distribution F, and

.. math:: p = 1 - F(\max_t r_t)^C

is the chance that the largest of C such values is at least as large. The paper says backdoored where p <= 0.05.

A limit. The fit leaves out the largest value whether or not it is an outlier, so the tail comes out too thin and the
test is not of its level: of 200 sets of C gamma values without any outlier it flags 54 % (C = 5), 28 % (C = 10) and
16 % (C = 43) at 0.05. Judge a p-value beside those of models known to be clean.

Sources, all from the released code: 30 uniform images a class, SGD with rate 0.01 (the momentum it names never acts),
at most 300 steps and fewer where the summed margin changes by less than a share of 1e-5; pixels are clipped inside the
network's input and not after the step; the gamma has shape, place and scale fitted by maximum likelihood; the exponent
is C. It also prints the deviation from the median in scaled median absolute deviations, which is `mad_score` here.

With fewer than five classes there is no p-value (ours): three parameters cannot be fitted to so few values.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.config import Config
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.models import Classifier, Variables

FEWEST_CLASSES = 5
AT_ONCE = 10
"""Classes whose images go through the network together."""


@dataclasses.dataclass(frozen=True)
class MarginConfig(Config):
    """Settings of the ascent; the defaults are the released code's.

    Attributes:
        starts: random images a class; 30.
        steps: of the ascent at most; 300.
        rate: of the ascent; 0.01.
        tolerance: relative change of the summed margin below which a class is done; 1e-5.
    """

    starts: int = 30
    steps: int = 300
    rate: float = 0.01
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.starts > 0, "starts", "at least 1")
        self.require(self.steps > 0, "steps", "at least 1")
        self.require(self.rate > 0, "rate", "a positive number")
        self.require(self.tolerance >= 0, "tolerance", "0 or more")


class Detection(NamedTuple):
    """What was found.

    Attributes:
        target: the class of the largest margin.
        p_value: of the largest margin; None where there are too few classes to tell.
        mad_score: its deviation from the median, in scaled median absolute deviations.
        margins: ``(C,)``, the maximum margins.
    """

    target: int
    p_value: float | None
    mad_score: float
    margins: np.ndarray

    def flagged(self, alpha: float = 0.05) -> int | None:
        """The class that is said to be a backdoor's target, or None."""
        return self.target if self.p_value is not None and self.p_value <= alpha else None


@partial(jax.jit, static_argnames=("shape", "starts", "steps"))
def _ascend(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    shape: tuple[int, int, int],
    starts: int,
    steps: int,
    rate: jax.Array,
    tolerance: jax.Array,
) -> jax.Array:
    def margins(images: jax.Array, target: jax.Array) -> jax.Array:
        logits, _ = classifier.logits(variables, 255 * jnp.clip(images, 0, 1))
        own = jnp.arange(classifier.num_classes) == target
        return logits[:, target] - jnp.max(jnp.where(own, -jnp.inf, logits), -1)

    def one(target_and_key: tuple[jax.Array, jax.Array]) -> jax.Array:
        target, key = target_and_key

        def total(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = margins(images, target).astype(jnp.float32)
            return jnp.sum(found), found

        def step(carry: Any) -> Any:
            count, images, last, _, _ = carry
            (summed, found), gradient = jax.value_and_grad(total, has_aux=True)(images)
            settled = jnp.abs(last - summed) < tolerance * jnp.abs(last)
            return count + 1, images + rate * gradient, summed, found, settled

        images = jax.random.uniform(key, (starts, *shape))
        start = (jnp.int32(0), images, jnp.float32(jnp.inf), jnp.full(starts, -jnp.inf), jnp.bool(False))
        *_, found, _ = jax.lax.while_loop(lambda carry: (carry[0] < steps) & ~carry[-1], step, start)
        return jnp.max(found)

    targets = jnp.arange(classifier.num_classes)
    return jax.lax.map(one, (targets, jax.random.split(key, len(targets))), batch_size=AT_ONCE)


def maximum_margins(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    shape: tuple[int, int, int],
    config: MarginConfig = MarginConfig(),
) -> np.ndarray:
    """The largest margin found for each class, ``(C,)``; a lower bound of the true one.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: its variables.
        shape: height, width and channels of an image.
        config: settings.

    Raises:
        NonFiniteError: where a margin is not finite.
    """
    rate, tolerance = jnp.float32(config.rate), jnp.float32(config.tolerance)
    found = np.asarray(_ascend(key, classifier, variables, shape, config.starts, config.steps, rate, tolerance))
    if not np.isfinite(found).all():
        raise NonFiniteError("mm_bd: margins are not finite; check the checkpoint, or lower MarginConfig.rate")
    return found


def largest_margin(margins: np.ndarray) -> Detection:
    """The test of the largest of C margins.

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
        # Values that do not differ have no gamma distribution: the largest is one of them, or beyond all.
        fitted = stats.gamma.fit(rest) if np.ptp(rest) else None
        above = stats.gamma.sf(margins[target], *fitted) if fitted else float(margins[target] == rest[0])
        with np.errstate(divide="ignore"):
            p_value = float(-np.expm1(len(margins) * np.log1p(-above)))
    return Detection(target, p_value, score, margins)


def mm_bd(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    shape: tuple[int, int, int],
    config: MarginConfig = MarginConfig(),
) -> Detection:
    """Says whether a model looks backdoored, and towards which class.

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
