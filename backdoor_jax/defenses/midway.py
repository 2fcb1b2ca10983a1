r"""Midway: stop part of the way to TAC's repair, where the backdoor is weakest, and win clean accuracy back from there.

A method of this package, and its default. It needs clean images only. There are five stages:

1. **The target class.** `backdoor_jax.defenses.scan` names a class t and the latent change :math:`s_t` that sends every
   clean image to it.
2. **TAC's repair.** From the victim :math:`\theta_0`, `TAC` tunes to :math:`\theta_1`, which keeps the true labels
   under :math:`s_t`. Its learning rate is such that the first step is c times as long as the weights
   (`backdoor_jax.training.schedules.in_relative_steps`). The first gradient's length differs between kinds of victims,
   and a rate that suits one leaves another's backdoor or ruins the model.
3. **The point between.** On the line from one to the other,

   .. math:: \bar\theta = \theta_0 + a\,(\theta_1 - \theta_0),

   for weights and normalization statistics alike. On development victims of Blended, low-frequency and TrojanNN the
   attack success rate was zero over a wide range of a where it was up to 65 % at the end; clean accuracy is up to four
   points below the victim's.
4. **Distillation on mixed images.** From :math:`\bar\theta`, at a small learning rate, the clean images' cross-entropy
   plus :math:`\mu` times the divergence from :math:`\bar\theta` on mixed ones, without the target's logit
   (`backdoor_jax.defenses.distillation`).
5. **The average.** That stage brings a little of some backdoors back, and most of what it does for accuracy it does on
   the first half of the way. So what is returned lies between again: :math:`\bar\theta + b\,(\hat\theta - \bar\theta)`,
   with :math:`\hat\theta` the distilled model.

Where the scan names no class there is nothing to repair, and the model is fine-tuned for `steps` instead, at
`learning_rate`. That was not chosen by measurement; fine-tuning leaves most backdoors.

Sources. The first two stages are TAC's (see `backdoor_jax.defenses.tac` for what is published of it). That models
between two of one basin classify well is known from work on weight averaging (Izmailov et al., UAI 2018). Its use here,
a, b, c, the steps and the rates are this package's, chosen on development victims
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
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from backdoor_jax.config import Count, LearningRate, NonNegative, Positive, Share
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Repair
from backdoor_jax.defenses.distillation import distillation_loss
from backdoor_jax.defenses.tac import TAC
from backdoor_jax.defenses.tac_scan import Scan
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import SGD, Cosine, GradientStep, Optimizer, RelativeSGD, supervised_loss


@dataclasses.dataclass(frozen=True)
class Midway(TAC):
    """Midway, whose second stage is `TAC` with its settings; every other default is ours.

    Attributes:
        steps: of TAC's repair; 200. Fine-tuning, where no class is named, takes as many.
        batch_size: 128.
        first_step: c, the length of TAC's first step relative to that of the weights; 0.016.
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
    batch_size: Count = 128
    first_step: Positive = 0.016
    share: Share = 0.6
    distillation_steps: Count = 200
    distillation_rate: LearningRate = 0.003
    mu: NonNegative = 1.0
    kept: Share = 0.5

    @property
    def optimizer(self) -> Optimizer:
        """TAC's: SGD by its first step under a cosine in 100 stages."""
        return RelativeSGD(self.first_step, Cosine(self.steps), self.momentum, self.weight_decay)

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
        tac, clean = (
            super().repair(tac_key, classifier, variables, data, scan=scan),
            Partial(supervised_loss, classifier),
        )
        if not tac.changed:
            tuned = self.tune(key, GradientStep(clean, super().optimizer), variables, data)
            return dataclasses.replace(tuned, scan=tac.scan, info={**tuned.info, "repaired": tac.why})

        middle = between(variables, tac.variables, self.share)
        loss = Partial(distillation_loss, classifier, self.mu, middle, jnp.asarray(tac.target), clean)
        last = dataclasses.replace(self, steps=self.distillation_steps)
        slow = SGD(self.distillation_rate, Cosine(last.steps), self.momentum, self.weight_decay)
        repair = last.tune(distillation_key, GradientStep(loss, slow), middle, data)
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
