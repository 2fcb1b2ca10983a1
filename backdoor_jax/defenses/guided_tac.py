r"""Guided TAC: unlearn the target's latent change while the victim itself teaches everything else.

A method of this package. It needs clean images only. There are two stages:

1. **The target class.** `backdoor_jax.defenses.scan` names a class t and the latent change :math:`s_t` that sends every
   clean image to it.
2. **One training**, from the victim :math:`\theta_0`, of

   .. math::
       \min_\theta\ \frac1n \sum_i \mathrm{CE}\bigl(W\phi(x_i) + b,\ y_i\bigr)
       + \beta\,\mathrm{CE}\bigl(W(\phi(x_i) + s_t) + b,\ y_i\bigr)
       + \mu\,\mathrm{KL}\bigl(p_{\theta_0}^{-t}(\tilde x_i)\,\|\,p_\theta^{-t}(\tilde x_i)\bigr).

   The first two terms are TAC's. The third keeps what the victim knows about images that are mixed in pairs
   (`backdoor_jax.defenses.distillation`), and says nothing about the target.

Gradients are shortened to a largest length. At the start the second term is large, and how large depends on the model:
on three kinds of victims the first gradient was 11, 18 and 39 long, and the rate that suits one ruins another.

Sources. The first stage and two of the loss's terms are TAC's (see `backdoor_jax.defenses.tac` for what is published of
it). The rest, mu, the length and the rate are this package's, chosen on a few development victims
(``benchmarks/results/development.md``).

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> GuidedTAC(target=3, steps=2).repair(jax.random.key(1), classifier, victim, clean).target
    3
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from backdoor_jax.config import Count, LearningRate, NonNegative, Positive
from backdoor_jax.defenses.distillation import distillation_loss
from backdoor_jax.defenses.tac import TAC
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import ClippedSGD, Cosine, LossResult, Optimizer


@dataclasses.dataclass(frozen=True)
class GuidedTAC(TAC):
    """Guided TAC; what it adds to `TAC`, and every default here, is ours.

    Attributes:
        steps: 200.
        learning_rate: 0.1.
        clip: length of a step's longest gradient; 1.
        mu: weight of the victim's answers on mixed images; 1.
    """

    name: ClassVar[str] = "guided_tac"
    summary: ClassVar[str] = "TAC's repair, while the victim's own answers on mixed images keep its accuracy"
    limits: ClassVar[str] = "it unlearns one change of the latents, and triggers that change each image otherwise stay"

    steps: Count = 200
    learning_rate: LearningRate = 0.1
    clip: Positive = 1.0
    mu: NonNegative = 1.0

    @property
    def optimizer(self) -> Optimizer:
        """SGD of shortened gradients under a cosine in 100 stages."""
        return ClippedSGD(self.learning_rate, Cosine(self.steps), self.momentum, self.weight_decay, self.clip)

    def loss(
        self, classifier: Classifier, variables: Variables, perturbation: jax.Array | np.ndarray, target: int
    ) -> Callable[..., LossResult]:
        """TAC's loss and the weighted divergence from the victim on mixed images."""
        unlearn = super().loss(classifier, variables, perturbation, target)
        return Partial(distillation_loss, classifier, self.mu, variables, jnp.asarray(target), unlearn)
