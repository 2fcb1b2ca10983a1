r"""SAU, shared adversarial unlearning (Wei, Zhang, Zha, Wu, NeurIPS 2023, arXiv 2307.10562).

A triggered image is an adversarial example of the victim :math:`h_0`, and the backdoor survives in a repaired model
:math:`h` only where the image is an adversarial example of h too, with the same wrong class: a *shared* adversarial
example. SAU searches for such examples near clean images and unlearns them. With p and :math:`p_0` the two models'
probabilities, every step first maximizes, for each image's own perturbation and by signs of gradients,

.. math::
    \max_{\|\delta\|_\infty \le \epsilon}\ \frac{\beta_1}{2} \bigl(\mathrm{CE}_h + \mathrm{CE}_{h_0}\bigr)(x + \delta)
    - \beta_2\, \mathrm{JS}\bigl(p(x + \delta), p_0(x + \delta)\bigr) ,

where a model's CE counts until it is misled, and JS until both are misled to the same class. Then it minimizes

.. math::
    \lambda_1\, \mathrm{CE}_h(x) + \lambda_2\, \mathrm{CE}_h(x + \delta) + \lambda_3
    \bigl[\hat y_0 \ne y,\ \hat y_0 \ne h_0(x)\bigr] \bigl(-\log(1 - p_{\hat y_0}(x + \delta))\bigr),
    \qquad \hat y_0 = h_0(x + \delta) ,

so that the repaired model classifies the image correctly, or at least not as the class the victim is misled to. Both
models are in evaluation mode throughout; the normalization statistics stay the victim's.

Perturbations are in units of pixels scaled to [0, 1], before normalization; x + delta may leave that range.

Sources. All settings and losses are those of the authors' code in the benchmark: epsilon 0.2 in the maximum norm, 5
steps of 0.2 from +0.2 everywhere, beta 0.01 and 1, lambda 1, 0 and 1, AMSGrad at a constant 1e-4, 100 rounds of 2,500
images in batches of 256 without augmentation, neither projection to valid pixels nor weight decay. For Tiny ImageNet
the benchmark does 20 rounds, of 5,000 images (preset ``tiny_imagenet``, 400 steps); for GTSRB 100 rounds are about 800
steps (preset ``gtsrb``).

Deviations. The code stops searching when every example of a batch is shared; such examples have no gradient here and
do not change, which is equivalent. It clamps the probabilities in both losses, and so drops examples whose p is
below 0.001 or within 1e-6 of 1; here both are computed from the logits and need no clamp. The code's own switch to
training mode is left out.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = SAU(steps=1, search_steps=1).repair(jax.random.key(1), classifier, victim, clean)
    >>> 0 <= repair.info["last_epoch"]["misled"] <= 1
    True
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from backdoor_jax.config import Count, LearningRate, NonNegative, Positive, Whole
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import GradientDefense, Repair
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import AMSGrad, GradientStep, LossResult, cross_entropy, unlikelihood


@dataclasses.dataclass(frozen=True)
class SAU(GradientDefense):
    """SAU; the defaults are the published ones.

    Attributes:
        steps: published 100 rounds of 2,500 images in batches of 256.
        learning_rate: AMSGrad's, constant; published 1e-4.
        crop: published 0, no augmentation.
        flip: published False, no augmentation.
        bound: epsilon, the largest change of a pixel in [0, 1]; published 0.2.
        search_steps: steps of the search for examples; published 5.
        search_rate: the size of each; published 0.2.
        beta1: weight of misleading the models in the search; published 0.01.
        beta2: weight of their agreement in the search; published 1.
        lambda1: weight of the cross-entropy on clean images; published 1.
        lambda2: weight of the cross-entropy on the examples; published 0.
        lambda3: weight of unlearning; published 1.
    """

    name: ClassVar[str] = "sau"
    summary: ClassVar[str] = "unlearn perturbations that mislead victim and repaired model alike"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gtsrb": {"steps": 800}, "tiny_imagenet": {"steps": 400}}

    learning_rate: LearningRate = 1e-4
    crop: Whole = 0
    flip: bool | None = False
    bound: Positive = 0.2
    search_steps: Count = 5
    search_rate: Positive = 0.2
    beta1: NonNegative = 0.01
    beta2: NonNegative = 1.0
    lambda1: NonNegative = 1.0
    lambda2: NonNegative = 0.0
    lambda3: NonNegative = 1.0

    @property
    def optimizer(self) -> AMSGrad:
        """AMSGrad at a constant rate."""
        return AMSGrad(self.learning_rate)

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Repairs a model by unlearning shared adversarial examples.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.

        Returns:
            The repaired model. In ``info["last_epoch"]``, ``misled`` is the share of examples that misled the victim,
            and ``shared`` the share that misled the repaired model to the same class.

        Raises:
            NonFiniteError: where the training diverges, naming the step.
        """
        step = GradientStep(Partial(sau_loss, classifier, self, variables), self.optimizer)
        return self.tune(key, step, variables, data)


def sau_loss(
    classifier: Classifier, config: SAU, victim: Variables, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    """The unlearning loss of one batch, at the adversarial examples that it searches for first.

    Args:
        classifier: the network.
        config: the defense.
        victim: the victim's variables.
        variables: the model's.
        batch: images and labels.
        key: not used.
    """
    del key
    perturbation = shared_perturbations(classifier, config, victim, jax.lax.stop_gradient(variables), batch)
    examples = batch.images + 255 * perturbation
    logits, _ = classify(classifier, variables, batch.images)
    perturbed, found = classify(classifier, variables, examples)
    _, before = classify(classifier, victim, batch.images)
    _, target = classify(classifier, victim, examples)

    misled = (target != batch.labels) & (target != before)
    clean = jnp.mean(cross_entropy(logits, batch.labels))
    robust = jnp.mean(cross_entropy(perturbed, batch.labels))
    unlearning = jnp.mean(jnp.where(misled, unlikelihood(perturbed, target), 0))
    loss = config.lambda1 * clean + config.lambda2 * robust + config.lambda3 * unlearning
    shared = jnp.mean(misled & (found == target))
    return loss, (variables, {"cross_entropy": clean, "misled": jnp.mean(misled), "shared": shared})


def shared_perturbations(
    classifier: Classifier, config: SAU, victim: Variables, variables: Variables, batch: Dataset
) -> jax.Array:
    """Perturbations ``(B, H, W, channels)`` of pixels in [0, 1] that mislead the model and the victim alike.

    Args:
        classifier: the network.
        config: gives ``bound``, ``search_steps``, ``search_rate``, ``beta1`` and ``beta2``.
        victim: the victim's variables.
        variables: the model's.
        batch: images and labels.
    """
    models = (variables, victim)
    clean = [classify(classifier, model, batch.images)[1] for model in models]

    def objective(perturbation: jax.Array) -> jax.Array:
        images = batch.images + 255 * perturbation
        (logits, found), (others, found0) = (classify(classifier, model, images) for model in models)
        misled, misled0 = found != clean[0], found0 != clean[1]
        shared = misled & misled0 & (found == found0)
        doubt = jnp.where(misled, 0, cross_entropy(logits, batch.labels))
        doubt0 = jnp.where(misled0, 0, cross_entropy(others, batch.labels))
        divergence = jnp.where(shared, 0, jensen_shannon(logits, others))
        return jnp.sum(config.beta1 * (doubt + doubt0) / 2 - config.beta2 * divergence)

    def climb(_: int, perturbation: jax.Array) -> jax.Array:
        ahead = perturbation + config.search_rate * jnp.sign(jax.grad(objective)(perturbation))
        return jnp.clip(ahead, -config.bound, config.bound)

    start = jnp.full(batch.images.shape, config.bound, jnp.float32)
    return jax.lax.fori_loop(0, config.search_steps, climb, start)


def jensen_shannon(logits: jax.Array, others: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence ``(B,)`` of the class probabilities that two models' logits ``(B, C)`` define.

    Example:
        >>> jensen_shannon(jnp.array([[90.0, 0.0]]), jnp.array([[0.0, 90.0]])).round(4).tolist()
        [0.6930999755859375]
    """
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    middle = jnp.logaddexp(p, q) - jnp.log(2)
    return jnp.sum(jnp.exp(p) * (p - middle) + jnp.exp(q) * (q - middle), -1) / 2


def classify(classifier: Classifier, variables: Variables, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits ``(B, C)`` in evaluation mode and the predicted classes ``(B,)``."""
    logits, _ = classifier.logits(variables, images)
    return logits, jnp.argmax(logits, -1)
