r"""Midway: stop part of the way to TAC's repair, where the backdoor is weakest, and win clean accuracy back from there.

A method of this package, and its default. It needs clean images only. There are five stages:

1. **The target class.** `backdoor_jax.defenses.scan` names a class t and the latent change :math:`s_t` that sends every
   clean image to it.
2. **TAC's repair.** From the victim :math:`\theta_0`, `TAC` tunes to :math:`\theta_1`, which keeps the true labels
   under :math:`s_t`.
3. **The point between.** On the line from one to the other,

   .. math:: \bar\theta = \theta_0 + a\,(\theta_1 - \theta_0),

   for weights and normalization statistics alike. On development victims of Blended, low-frequency and TrojanNN the
   attack success rate was zero over a wide range of a where it was up to 65 % at the end; clean accuracy is up to four
   points below the victim's.
4. **Distillation on mixed images.** From :math:`\bar\theta`, at a small learning rate,

   .. math::
       \min_\theta\ \frac1n \sum_i \mathrm{CE}_\theta(x_i, y_i)
       + \mu\,\mathrm{KL}\bigl(p_{\bar\theta}^{-t}(\tilde x_i)\,\|\,p_\theta^{-t}(\tilde x_i)\bigr), \qquad
       \tilde x_i = \lambda_i x_i + (1 - \lambda_i)\,x_{\pi(i)}, \quad \lambda_i \sim \mathrm{U}(0.2, 0.8),

   where :math:`\pi` is a permutation of the batch, :math:`p^{-t}` are the probabilities among the classes other than t,
   and the second term counts where neither image of a pair is of class t. Few clean images overfit; mixed images show
   the tuned model more of what its teacher does between them, and without the target's logit they say nothing about
   the target.
5. **The average.** That stage brings a little of some backdoors back, and most of what it does for accuracy it does on
   the first half of the way. So what is returned lies between again: :math:`\bar\theta + b\,(\hat\theta - \bar\theta)`,
   with :math:`\hat\theta` the distilled model.

Where the scan names no class there is nothing to repair, and the model is fine-tuned for `steps` instead. That was not
chosen by measurement; fine-tuning leaves most backdoors.

Sources. The first two stages are TAC's (see `backdoor_jax.defenses.tac` for what is published of it). That models
between two of one basin classify well is known from work on weight averaging (Izmailov et al., UAI 2018); mixed images
are those of mixup (Zhang et al., ICLR 2018). Their use here, a, b, the steps and the rates are this package's, chosen
on development victims (``benchmarks/results/development.md``).

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> Midway(target=3, steps=2).repair(jax.random.key(1), classifier, victim, clean).target
    3
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from backdoor_jax.config import Count, LearningRate, NonNegative, Share
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Repair
from backdoor_jax.defenses.tac import TAC
from backdoor_jax.defenses.tac_scan import Scan
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import GradientStep, LossResult, cross_entropy, supervised_loss

MIXED = (0.2, 0.8)
"""The range of an image's weight in a mixed pair; ours."""


@dataclasses.dataclass(frozen=True)
class Midway(TAC):
    """Midway, whose second stage is `TAC` with its settings; every other default is ours.

    Attributes:
        steps: of TAC's repair; 200. Fine-tuning, where no class is named, takes as many.
        share: a, how far to go from the victim to TAC's repair; 0.6.
        distillation_steps: of the distillation; 200.
        distillation_rate: its learning rate; 0.003.
        mu: weight of the distillation; 1.
        kept: b, how far to go from there to the distilled model; 0.5.
    """

    name: ClassVar[str] = "midway"
    summary: ClassVar[str] = "stop part of the way to TAC's repair, win accuracy back from there (the default)"
    limits: ClassVar[str] = "it stops short of TAC's repair, and what is left there stays"

    steps: Count = 200
    share: Share = 0.6
    distillation_steps: Count = 200
    distillation_rate: LearningRate = 0.003
    mu: NonNegative = 1.0
    kept: Share = 0.5

    def repair(
        self,
        key: jax.Array,
        classifier: Classifier,
        variables: Variables,
        data: Dataset,
        *,
        scan: Scan | None = None,
    ) -> Repair:
        """Finds the poisoned class and removes its backdoor, or fine-tunes where no class is named.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.
            scan: the result of `backdoor_jax.defenses.scan` on this model; by default the scan is run here.

        Returns:
            The repaired model. ``target`` is the class repaired, None where none is named; ``scan`` the scan's complete
            result; ``info["tac"]`` has the means of TAC's last epoch.

        Raises:
            UserError: for a target class that does not exist.
            NonFiniteError: where the victim's latents or head are not finite, or a training diverges.
        """
        tac_key, distillation_key = jax.random.split(key)
        tac = super().repair(tac_key, classifier, variables, data, scan=scan)
        if not tac.changed:
            tuned = self.tune(key, GradientStep(Partial(supervised_loss, classifier), self.optimizer), variables, data)
            return dataclasses.replace(tuned, scan=tac.scan, info={**tuned.info, "repaired": tac.why})

        middle = between(variables, tac.variables, self.share)
        loss = Partial(distillation_loss, classifier, self.mu, middle, jnp.asarray(tac.target))
        last = dataclasses.replace(self, steps=self.distillation_steps, learning_rate=self.distillation_rate)
        repair = last.tune(distillation_key, GradientStep(loss, last.optimizer), middle, data)
        average = between(middle, repair.variables, self.kept)
        info = {**repair.info, "oracle": tac.info["oracle"], "tac": tac.info["last_epoch"]}
        return dataclasses.replace(repair, variables=average, target=tac.target, scan=tac.scan, info=info)


def between(victim: Variables, repaired: Variables, share: jax.Array | float) -> Variables:
    """The variables on the line from the victim's (share 0) to the repaired model's (1), statistics included.

    Example:
        >>> between({"params": {"w": jnp.array([0.0, 2.0])}}, {"params": {"w": jnp.array([1.0, 0.0])}}, 0.5)
        {'params': {'w': Array([0.5, 1. ], dtype=float32)}}
    """
    return jax.tree.map(lambda start, end: (1 - share) * start + share * end, victim, repaired)


def mix_pairs(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images ``(B, H, W, channels)`` mixed in random pairs, in float32, and each one's partner ``(B,)``.

    Example:
        >>> mixed, partner = mix_pairs(jax.random.key(0), jnp.full((2, 8, 8, 3), 100, jnp.uint8))
        >>> round(float(mixed.max()), 3), sorted(partner.tolist())
        (100.0, [0, 1])
    """
    weight_key, pair_key = jax.random.split(key)
    weight = jax.random.uniform(weight_key, (len(images), 1, 1, 1), minval=MIXED[0], maxval=MIXED[1])
    partner = jax.random.permutation(pair_key, len(images))
    return weight * images + (1 - weight) * images[partner], partner


def divergence_without(target: jax.Array, logits: jax.Array, others: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence ``(B,)`` from the first to the second of two models, among classes but the target.

    Args:
        target: the class that is left out.
        logits: ``(B, C)`` of the first, the teacher.
        others: ``(B, C)`` of the second, the student.

    Example:
        >>> logits = jnp.array([[0.0, 0.0, 9.0]])
        >>> divergence_without(jnp.asarray(2), logits, jnp.array([[0.0, 0.0, -9.0]])).tolist()
        [0.0]
    """
    left_out = jnp.arange(logits.shape[-1]) == target
    p, q = (jax.nn.log_softmax(jnp.where(left_out, -jnp.inf, part)) for part in (logits, others))
    return jnp.sum(jnp.where(left_out, 0, jnp.exp(p) * (p - q)), -1)


def distillation_loss(
    classifier: Classifier,
    mu: jax.Array | float,
    teacher: Variables,
    target: jax.Array,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """Cross-entropy of one batch, plus the weighted divergence from the teacher on its mixed pairs.

    The normalization statistics come from the clean images; the mixed ones are normalized by their own.

    Args:
        classifier: the network.
        mu: weight of the divergence.
        teacher: the teacher's variables.
        target: the class whose logit and images are left out of the divergence.
        variables: the student's.
        batch: augmented images and labels.
        key: for the pairs.
    """
    mixed, partner = mix_pairs(key, batch.images)
    counted = (batch.labels != target) & (batch.labels[partner] != target)
    logits, updated = classifier.logits(variables, batch.images, train=True)
    learned, _ = classifier.logits(variables, mixed, train=True)
    taught, _ = classifier.logits(teacher, mixed)
    divergences = jnp.where(counted, divergence_without(target, taught, learned), 0)
    clean = jnp.mean(cross_entropy(logits, batch.labels))
    divergence = jnp.sum(divergences) / jnp.maximum(jnp.sum(counted), 1)
    return clean + mu * divergence, (updated, {"cross_entropy": clean, "divergence": divergence})
