r"""Loss ascent: unlearns the clean task, and names the class that the ruined model still predicts.

Gradient ascent on the cross-entropy of clean images,

.. math:: \max_\theta\ \frac1n \sum_i \mathrm{CE}(f_\theta(x_i), y_i) ,

takes away what a model knows of the clean task first; a backdoored model tends to be left with its target class. The
class of largest mean probability over the clean images is taken for the target. Any model ends in some class, so this
localizes a target and does not test for one: there is no p-value.

Sources. The observation is that of Reconstructive Neuron Pruning (Li, Lyu, Ma, Koren, Lyu, Li, Jiang, ICML 2023, arXiv
2305.14876), which unlearns in the same way: SGD at rate 0.01 with momentum 0.9 and weight decay 5e-4, batches of 128,
gradients clipped to norm 20, until the accuracy on clean images is at most 20 %. The most steps, 200, are ours, and so
is a check in every step, on its batch, where the code checks once an epoch.

    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> found = LossAscent(steps=2).examine(jax.random.key(1), classifier, victim, clean)
    >>> bool(np.isclose(found.values.sum(), 1)), found.p_value
    (True, None)
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backdoor_jax.compiling import jit
from backdoor_jax.config import Count, Fraction, NonNegative, Positive
from backdoor_jax.data import Dataset
from backdoor_jax.detectors.base import Detector, Evidence
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.progress import progress_bar
from backdoor_jax.stopping import stop_if_asked
from backdoor_jax.training import cross_entropy, latents

BLOCK = 10
"""Steps of the ascent between two signs of progress."""


@dataclasses.dataclass(frozen=True)
class LossAscent(Detector):
    """Loss ascent.

    Attributes:
        steps: the most gradient steps; 200, ours.
        batch_size: images per step; published 128.
        learning_rate: published 0.01.
        momentum: published 0.9.
        weight_decay: published 5e-4.
        clip: largest norm of a gradient; published 20.
        accuracy: of a batch, at which the ascent ends; published 0.2.
    """

    name: ClassVar[str] = "loss_ascent"
    summary: ClassVar[str] = "the class that is left when the clean task is unlearned; names a class, tests nothing"

    steps: Count = 200
    batch_size: Count = 128
    learning_rate: Positive = 0.01
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    clip: Positive = 20.0
    accuracy: Fraction = 0.2

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Ascent with momentum, weight decay and clipped gradients."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale(-1.0),
            optax.add_decayed_weights(self.weight_decay),
            optax.sgd(self.learning_rate, self.momentum),
        )

    def examine(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Evidence:
        """Unlearns the clean images and reads off the class that is left.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: its variables; left as they are.
            data: clean labeled images.

        Raises:
            NonFiniteError: where a probability is not finite.
        """
        unlearned, steps = ascend(key, classifier, variables, data, self)
        logits = classifier.head(unlearned, latents(classifier, unlearned, data.images))
        means = np.asarray(jnp.mean(jax.nn.softmax(logits.astype(jnp.float32)), axis=0))
        if not np.isfinite(means).all():
            raise NonFiniteError("loss_ascent: probabilities are not finite; check the checkpoint, or lower its rate")
        trouble = "loss ascent names the likeliest target but does not test for one"
        target = int(means.argmax())
        return Evidence(self.name, "mean probability", means, target, None, trouble, {"steps": steps})


def ascend(
    key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset, config: LossAscent
) -> tuple[Variables, int]:
    """Ascends the loss until a batch's accuracy is low enough; returns the variables and the steps taken."""
    state = _Ascent(variables, config.optimizer.init(variables["params"]), jnp.int32(0), jnp.bool(False))
    count = 0
    with progress_bar("loss_ascent", config.steps) as tell:
        tell(0, "compiling")
        while count < config.steps and not state.done:
            state = _ascend(state, key, classifier, data, config)
            before, count = count, int(state.taken)
            tell(count - before)
            stop_if_asked()
    return state.variables, count


class _Ascent(NamedTuple):
    """The state of the ascent; ``taken`` counts its steps."""

    variables: Variables
    optimizer: Any
    taken: jax.Array
    done: jax.Array


@jit
def _ascend(state: _Ascent, key: jax.Array, classifier: Classifier, data: Dataset, config: LossAscent) -> _Ascent:
    """At most `BLOCK` more steps."""
    optimizer, batch = config.optimizer, min(config.batch_size, len(data))

    def loss(params: Any, variables: Variables, images: jax.Array, labels: jax.Array) -> Any:
        logits, variables = classifier.logits({**variables, "params": params}, images, train=True)
        return jnp.mean(cross_entropy(logits, labels)), (variables, jnp.mean(jnp.argmax(logits, -1) == labels))

    keys = jax.random.split(key, config.steps)

    def step(ascent: _Ascent) -> _Ascent:
        variables, state, count, done = ascent
        rows = jax.random.randint(keys[count], (batch,), 0, len(data))
        taken = data.images[rows], data.labels[rows]
        gradient, (moved, accuracy) = jax.grad(loss, has_aux=True)(variables["params"], variables, *taken)
        updates, inner = optimizer.update(gradient, state, variables["params"])
        moved = {**moved, "params": optax.apply_updates(variables["params"], updates)}
        done |= accuracy <= config.accuracy
        variables, state = jax.tree.map(partial(jnp.where, done), (variables, state), (moved, inner))
        return _Ascent(variables, state, count + ~done, done)

    until = jnp.minimum(state.taken + BLOCK, config.steps)
    return jax.lax.while_loop(lambda ascent: (ascent.taken < until) & ~ascent.done, step, state)
