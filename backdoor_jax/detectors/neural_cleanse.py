r"""Neural Cleanse (Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, IEEE S&P 2019): the smallest trigger of every class.

A patch that sends every image to a backdoor's target is much smaller than one that sends every image to another class.
For each class t a mask m and a pattern p are fitted to clean images x,

.. math:: \min_{m, p}\ \mathrm{CE}\bigl(f((1 - m) \odot x + m \odot p),\ t\bigr) + \lambda \|m\|_1 ,

where :math:`\lambda` is doubled while the share of images classified as t is above 99 % and divided by
:math:`2^{3/2}` while it is below; the smallest mask above 99 % counts. The paper's anomaly index is the distance of the
smallest of the C masks below their median in scaled median absolute deviations (MAD), and it calls a model backdoored
where that exceeds 2. That is no test at a level: normal values exceed 2 in half of all sets of 43, and the MAD of ten
values is rough. On models whose state is known (`benchmarks/detection.py`), the plain ratio of the smallest mask to the
median of all told clean and backdoored models apart better than the index and than Grubbs' test, because the spread
that both divide by is estimated from a few classes. So the ratio is the evidence's ``score``, which a verdict compares
with that of clean models; the index and Grubbs' p-value of the logarithms of the mask sizes are reported beside it.

With few clean images every class has a small trigger, since it need work on those only: below `FEWEST_IMAGES` the
evidence supports no verdict.

Sources. From the released code: mask and pattern are :math:`(\tanh(\cdot) + 1) / 2`, Adam with betas 0.5 and 0.9,
:math:`\lambda` from 1e-3 once the threshold has been kept for some rounds, and the multipliers. Ours: a hundred steps
of 16 images, where the code takes up to 31,000 of 32, and therefore Adam at rate 0.2 and no patience; the start is
random but not large; the ratio, and the least number of images.

    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> found = NeuralCleanse(rounds=2, round_steps=1).examine(jax.random.key(1), classifier, victim, clean)
    >>> found.triggers.masks.shape, found.triggers.patterns.shape
    ((10, 16, 16), (10, 16, 16, 3))
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backdoor_jax.compiling import jit
from backdoor_jax.config import Count, NonNegative, Positive, Share
from backdoor_jax.data import Dataset
from backdoor_jax.defenses import smallest_outlier
from backdoor_jax.detectors.base import Detector, Evidence, Inverted
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.progress import progress_bar
from backdoor_jax.stopping import stop_if_asked
from backdoor_jax.training import cross_entropy

SMALLEST = 1e-3
"""Mask size in pixels below which nothing differs."""
FEWEST_IMAGES = 32
"""Clean images below which a mask fits these images and says little about others; ours, see docs/detecting.md."""
MEASURED = 200
"""The most images on which the success of the triggers is measured in the end."""
TOGETHER = 10
"""The most classes whose triggers pass through the network together."""


@dataclasses.dataclass(frozen=True)
class NeuralCleanse(Detector):
    """Neural Cleanse.

    Attributes:
        rounds: how often lambda is adapted; 20, ours.
        round_steps: gradient steps between; 5, ours.
        batch_size: images per step; 16, ours; published 32.
        rate: of Adam; 0.2, ours; published 0.1.
        weight: lambda when it is first set; published 1e-3.
        success: share of images that have to be classified as the class; published 0.99.
        patience: rounds before lambda changes; 1, ours; published 5.
        multiplier: of lambda; published 2.
    """

    name: ClassVar[str] = "neural_cleanse"
    summary: ClassVar[str] = "a class to which a small patch sends all images, with its mask and pattern (the default)"

    rounds: Count = 20
    round_steps: Count = 5
    batch_size: Count = 16
    rate: Positive = 0.2
    weight: NonNegative = 1e-3
    success: Share = 0.99
    patience: Count = 1
    multiplier: Positive = 2.0

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of mask and pattern."""
        return optax.adam(self.rate, b1=0.5, b2=0.9)

    def examine(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Evidence:
        """Fits a trigger for each class and compares the smallest with the others.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: its variables.
            data: clean images; labels are not needed.

        Raises:
            NonFiniteError: where a mask is not finite.
        """
        found = invert_triggers(key, classifier, variables, data.images, self)
        norms = np.asarray(found.mask.sum((1, 2)))
        if not np.isfinite(norms).all():
            raise NonFiniteError("neural_cleanse: masks are not finite; check the checkpoint, or lower its rate")
        smallest = smallest_mask(norms)
        trouble = None
        if smallest.p_value is None:
            trouble = f"{len(norms)} classes are too few for a test"
        elif len(data) < FEWEST_IMAGES:
            trouble = f"{len(data)} clean images are too few to invert triggers ({FEWEST_IMAGES})"
        details = {
            "smallest_to_median": smallest.ratio,
            "anomaly_index": smallest.anomaly_index,
            "success": np.asarray(found.success).round(4).tolist(),
        }
        return Evidence(
            self.name,
            "mask size in pixels",
            norms,
            smallest.target,
            smallest.p_value,
            trouble,
            # The clean models that it is compared with were examined with the defaults.
            score=smallest.ratio if self == NeuralCleanse() else None,
            details=details,
            triggers=Inverted(np.asarray(found.mask), np.asarray(found.pattern)),
        )


class SmallestMask(NamedTuple):
    """The smallest of C masks.

    Attributes:
        target: its class.
        ratio: its size divided by the median of all.
        anomaly_index: the paper's.
        p_value: of Grubbs' test on logarithms; None for fewer than five classes.
    """

    target: int
    ratio: float
    anomaly_index: float
    p_value: float | None


def smallest_mask(norms: np.ndarray) -> SmallestMask:
    """The smallest of the masks' sizes ``(C,)``, and how far it is from the others.

    Example:
        >>> found = smallest_mask(np.array([50.0, 52.0, 48.0, 10.0, 51.0, 50.0]))
        >>> found.target, found.ratio, found.anomaly_index > 2, found.p_value < 0.05
        (3, 0.2, True, True)
    """
    from scipy import stats

    sizes = np.maximum(norms, SMALLEST)
    deviation = stats.median_abs_deviation(norms, scale="normal")
    index = float((np.median(norms) - norms.min()) / deviation) if deviation > 0 else 0.0
    test = smallest_outlier(np.log(sizes))
    return SmallestMask(test.smallest, float(sizes.min() / np.median(sizes)), index, test.p_value)


class Trigger(NamedTuple):
    """A trigger and the share of images that it sends to its class; pixels in [0, 1]."""

    mask: jax.Array
    pattern: jax.Array
    success: jax.Array


class _Search(NamedTuple):
    """The state of one class's search; ``weight`` is lambda, ``above`` and ``below`` count rounds."""

    raw: tuple[jax.Array, jax.Array]
    optimizer: Any
    weight: jax.Array
    above: jax.Array
    below: jax.Array
    best: Trigger


def _trigger(raw: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    mask, pattern = ((jnp.tanh(part) + 1) / 2 for part in raw)
    return mask, pattern


def _put(mask: jax.Array, pattern: jax.Array, images: jax.Array) -> jax.Array:
    return (1 - mask[..., None]) * images + mask[..., None] * 255 * pattern


def invert_triggers(
    key: jax.Array, classifier: Classifier, variables: Variables, images: jax.Array, config: NeuralCleanse
) -> Trigger:
    """Fits a mask and a pattern for each class, `TOGETHER` of them at once.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: its variables.
        images: clean uint8 images, ``(N, H, W, channels)``.
        config: settings.

    Returns:
        Masks ``(C, H, W)``, patterns ``(C, H, W, channels)`` and their success ``(C,)`` on up to `MEASURED` images. The
        search counts the successes of a round's steps, of which the last then moves the mask on, so that a mask which
        counted may succeed less often. Where no mask reached ``config.success``, the last one.
    """
    classes = np.arange(classifier.num_classes)
    groups = -(-len(classes) // TOGETHER)
    size = -(-len(classes) // groups)
    start_key, batch_key = jax.random.split(key)
    found = []
    with progress_bar("neural_cleanse", len(classes) * config.rounds, unit="rounds") as tell:
        tell(0, "compiling")
        for first in classes[::size]:
            # Groups of one size are one program; the last one is filled up with the first classes.
            targets = classes[np.arange(first, first + size) % len(classes)]
            state = _start(start_key, targets, images, classifier, config)
            for number in range(config.rounds):
                state = _search(state, batch_key, number, targets, classifier, variables, images, config)
                smallest = np.asarray(state.best.mask).sum((1, 2)).min()
                tell(min(size, len(classes) - first), f"smallest mask {smallest:.1f} pixels")
                stop_if_asked()
            found.append(jax.device_get(state.best))
    best: Trigger = jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)[: len(classes)]), *found)
    return best._replace(success=_success(best, classifier, variables, images[:: -(-len(images) // MEASURED)]))


@jit
def _start(
    key: jax.Array, targets: jax.Array, images: jax.Array, classifier: Classifier, config: NeuralCleanse
) -> _Search:
    """The searches of some classes before their first round."""
    shape = images.shape[1:]

    def one(key: jax.Array) -> _Search:
        raw = (jax.random.normal(key, shape[:2]), jax.random.normal(jax.random.fold_in(key, 1), shape))
        zero = jnp.int32(0)
        first = Trigger(*_trigger(raw), jnp.float32(0))
        return _Search(raw, config.optimizer.init(raw), jnp.float32(0), zero, zero, first)

    return jax.vmap(one)(jax.random.split(key, classifier.num_classes)[targets])


@jit
def _success(found: Trigger, classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    """The share of images that each class's trigger sends to the class."""

    def one(arguments: tuple[Trigger, jax.Array]) -> jax.Array:
        trigger, target = arguments
        pixels = _put(trigger.mask, trigger.pattern, images.astype(jnp.float32))
        return jnp.mean(jnp.argmax(classifier.logits(variables, pixels)[0], -1) == target)

    return jax.lax.map(one, (found, jnp.arange(len(found.mask))))


@jit
def _search(
    states: _Search,
    key: jax.Array,
    number: int,
    targets: jax.Array,
    classifier: Classifier,
    variables: Variables,
    images: jax.Array,
    config: NeuralCleanse,
) -> _Search:
    """One round for some classes: gradient steps at one lambda, which is then adapted."""
    batch = min(config.batch_size, len(images))
    keys = jax.random.split(key, (config.rounds, config.round_steps))[number]

    def loss(raw: Any, weight: jax.Array, target: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask, pattern = _trigger(raw)
        pixels = _put(mask, pattern, batch)
        logits = classifier.logits(variables, pixels)[0].astype(jnp.float32)
        success = jnp.mean(jnp.argmax(logits, -1) == target)
        return jnp.mean(cross_entropy(logits, jnp.full(len(batch), target))) + weight * jnp.sum(mask), success

    def one(state: _Search, target: jax.Array) -> _Search:
        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            raw, inner = carry
            rows = jax.random.randint(key, (batch,), 0, len(images))
            (_, success), gradient = jax.value_and_grad(loss, has_aux=True)(
                raw, state.weight, target, images[rows].astype(jnp.float32)
            )
            updates, inner = config.optimizer.update(gradient, inner)
            return (optax.apply_updates(raw, updates), inner), success

        (raw, inner), successes = jax.lax.scan(step, (state.raw, state.optimizer), keys)
        success = jnp.mean(successes)
        reached = success >= config.success
        mask, pattern = _trigger(raw)
        better = reached & ((state.best.success < config.success) | (jnp.sum(mask) < jnp.sum(state.best.mask)))
        better |= ~reached & (state.best.success < config.success)
        best = jax.tree.map(partial(jnp.where, better), Trigger(mask, pattern, success), state.best)
        above, below = jnp.where(reached, state.above + 1, 0), jnp.where(reached, 0, state.below + 1)
        up, down = above >= config.patience, below >= config.patience
        raised = jnp.where(state.weight > 0, state.weight * config.multiplier, config.weight)
        weight = jnp.where(up, raised, jnp.where(down, state.weight / config.multiplier**1.5, state.weight))
        above, below = jnp.where(up, 0, above), jnp.where(down, 0, below)
        return _Search(raw, inner, weight, above, below, best)

    return jax.vmap(one)(states, targets)
