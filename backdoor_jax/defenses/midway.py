r"""Midway: unlearn the target's latent change while the victim teaches everything else, and stop part of the way.

A method of this package, and its default. It needs clean images only. There are three stages:

1. **The target class.** `backdoor_jax.defenses.scan` names a class t and the latent change :math:`s_t` that sends every
   clean image to it.
2. **One training**, from the victim :math:`\theta_0` to :math:`\theta_1`, of

   .. math::
       \min_\theta\ \frac1n \sum_i \mathrm{CE}\bigl(W\phi(x_i) + b,\ y_i\bigr)
       + \beta\,\mathrm{CE}\bigl(W(\phi(x_i) + s_t) + b,\ y_i\bigr)
       + \mu\,\mathrm{KL}\bigl(p_{\theta_0}^{-t}(\tilde x_i)\,\|\,p_\theta^{-t}(\tilde x_i)\bigr).

   The first two terms are TAC's. The third keeps what the victim knows about images that are mixed in pairs
   (`backdoor_jax.defenses.distillation`), and says nothing about the target. The learning rate is such that the first
   step is c times as long as the weights (`backdoor_jax.training.schedules.in_relative_steps`): the first gradient's
   length differs between kinds of victims, and a rate that suits one leaves another's backdoor or ruins the model.
3. **A point on the way.** On the line from one to the other,

   .. math:: \bar\theta = \theta_0 + a\,(\theta_1 - \theta_0),

   for weights and normalization statistics alike. On the way the backdoor is weakest: of the low-frequency attack a
   development victim kept 2.2 % at .8, and 9.8 % at the end.

Where the scan names no class, all classes are unlearned at once: each image's latent receives the change towards a
class that is drawn at random at every step, the victim teaches all classes, and the first step is shorter, since twice
as long a one ruined a model of 43 classes. It does not stop on the way. So a backdoor that the scan misses is met too.

Sources. The first stage and two of the loss's terms are TAC's (see `backdoor_jax.defenses.tac` for what is published of
it). That models between two of one basin classify well is known from work on weight averaging (Izmailov et al., UAI
2018). The rest, a, c, mu and the steps, is this package's, chosen on development victims
(``benchmarks/results/development.md``).

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> Midway(target=3, steps=2).repair(jax.random.key(1), classifier, victim, clean).target
    3
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from backdoor_jax.config import Count, NonNegative, Positive, Share
from backdoor_jax.data import Dataset
from backdoor_jax.defenses import tac_scan
from backdoor_jax.defenses.base import Repair
from backdoor_jax.defenses.distillation import distillation_loss
from backdoor_jax.defenses.tac import TAC, tac_loss
from backdoor_jax.defenses.tac_scan import Scan
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Cosine, GradientStep, LossResult, Optimizer, RelativeSGD

NO_CLASS = -1
"""In place of a target, so that the victim teaches all classes."""


@dataclasses.dataclass(frozen=True)
class Midway(TAC):
    """Midway; what it adds to `TAC`, and every default here, is ours.

    Attributes:
        steps: 200.
        batch_size: 128.
        first_step: c, the length of the first step relative to that of the weights; 0.011.
        untargeted_step: the same where no class is named; 0.004.
        mu: weight of the victim's answers on mixed images; 1.
        share: a, how far to go from the victim to the end of the training; 0.8.
    """

    name: ClassVar[str] = "midway"
    summary: ClassVar[str] = "part of the way to TAC's repair, guided by the victim's own answers (the default)"

    steps: Count = 200
    batch_size: Count = 128
    first_step: Positive = 0.011
    untargeted_step: Positive = 0.004
    mu: NonNegative = 1.0
    share: Share = 0.8

    @property
    def optimizer(self) -> Optimizer:
        """SGD by the length of its first step, under a cosine in 100 stages."""
        return RelativeSGD(self.first_step, Cosine(self.steps), self.momentum, self.weight_decay)

    def loss(
        self, classifier: Classifier, variables: Variables, perturbation: jax.Array | np.ndarray, target: int
    ) -> Callable[..., LossResult]:
        """TAC's loss and the weighted divergence from the victim on mixed images."""
        unlearn = super().loss(classifier, variables, perturbation, target)
        return Partial(distillation_loss, classifier, self.mu, variables, jnp.asarray(target), unlearn)

    def repair(
        self,
        key: jax.Array,
        classifier: Classifier,
        variables: Variables,
        data: Dataset,
        *,
        scan: Scan | None = None,
    ) -> Repair:
        """Finds the poisoned class and removes its backdoor, or unlearns every class where none is named.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.
            scan: the result of `backdoor_jax.defenses.scan` on this model; by default the scan is run here.

        Returns:
            The repaired model. ``target`` is the class repaired, or None, and then ``info["untargeted"]`` says why;
            ``scan`` is the scan's complete result. Where no latent change sends all images to any class, the victim's
            own variables.

        Raises:
            UserError: for a target class that does not exist.
            NonFiniteError: where the victim's latents or head are not finite, or the training diverges.
        """
        if scan is None:
            scan = tac_scan.scan(classifier, variables, data.images, self.margin, self.name)
        end = super().repair(key, classifier, variables, data, scan=scan)
        if end.changed:
            return dataclasses.replace(end, variables=between(variables, end.variables, self.share))
        changes = scan.perturbations.vectors[scan.perturbations.feasible]
        if not len(changes):
            return end
        unlearn = Partial(every_class_loss, classifier, self.beta, changes)
        loss = Partial(distillation_loss, classifier, self.mu, variables, jnp.asarray(NO_CLASS), unlearn)
        careful = dataclasses.replace(self, first_step=self.untargeted_step)
        tuned = careful.tune(key, GradientStep(loss, careful.optimizer), variables, data)
        return dataclasses.replace(tuned, scan=end.scan, info={**tuned.info, "untargeted": end.why})


def every_class_loss(
    classifier: Classifier,
    beta: jax.Array | float,
    perturbations: jax.Array,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """TAC's loss where each latent is changed towards a class of its own, drawn at random.

    Args:
        classifier: the network.
        beta: weight of the perturbed term.
        perturbations: ``(K, D)``, the changes towards K classes.
        variables: the model's.
        batch: augmented images and labels.
        key: for the classes.
    """
    drawn = jax.random.randint(key, (len(batch.labels),), 0, len(perturbations))
    return tac_loss(classifier, beta, perturbations[drawn], variables, batch, key)


def between(victim: Variables, repaired: Variables, share: jax.Array | float) -> Variables:
    """The variables on the line from the victim's (share 0) to the repaired model's (1), statistics included.

    Example:
        >>> between({"params": {"w": jnp.array([0.0, 2.0])}}, {"params": {"w": jnp.array([1.0, 0.0])}}, 0.5)
        {'params': {'w': Array([0.5, 1. ], dtype=float32)}}
    """
    return jax.tree.map(lambda start, end: (1 - share) * start + share * end, victim, repaired)
