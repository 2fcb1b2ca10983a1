r"""SAU, shared adversarial unlearning (Wei, Zhang, Zha, Wu, NeurIPS 2023, arXiv 2307.10562).

A triggered image is an adversarial example of the victim :math:`h_0`, and the backdoor lives on in a repaired model
:math:`h` only where it is one of h too, with the same wrong class: a *shared* adversarial example. SAU looks for such
examples near clean images and unlearns them. With p and :math:`p_0` the two models' probabilities, every step first
maximises over each image's own perturbation, by signs of gradients,

.. math::
    \max_{\|\delta\|_\infty \le \epsilon}\ \frac{\beta_1}{2} \bigl(\mathrm{CE}_h + \mathrm{CE}_{h_0}\bigr)(x + \delta)
    - \beta_2\, \mathrm{JS}\bigl(p(x + \delta), p_0(x + \delta)\bigr) ,

where a model's CE counts until it is misled, and JS until both are misled to one class. Then it descends

.. math::
    \lambda_1\, \mathrm{CE}_h(x) + \lambda_2\, \mathrm{CE}_h(x + \delta) + \lambda_3
    \bigl[\hat y_0 \ne y,\ \hat y_0 \ne h_0(x)\bigr] \bigl(-\log(1 - p_{\hat y_0}(x + \delta))\bigr),
    \qquad \hat y_0 = h_0(x + \delta) ,

so that the repaired model is right about the image, or at least wrong in another way than the victim. Both models are
in evaluation mode throughout; the statistics of normalisation stay the victim's.

Perturbations are in units of pixels scaled to [0, 1], before normalisation; x + delta may leave that range.

Sources. Constants and losses are those of the authors' code in the benchmark: epsilon 0.2 in the maximum norm, 5 steps
of 0.2 from +0.2 everywhere, beta 0.01 and 1, lambda 1, 0 and 1, AMSGrad at a constant 1e-4, 100 rounds of 2,500 images
in 256s without augmentation, neither projection to valid pixels nor weight decay.

Deviations. The code stops searching when every example of a batch is shared; such examples have no gradient here and
stay where they are, which is the same. It clamps the probabilities in both losses, and so drops examples whose p is
under 0.001 or within 1e-6 of 1; here both are computed from the logits and need no clamp. The code's own switch to
training mode is left out.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = sau(jax.random.key(1), classifier, victim, clean, SauConfig(steps=1, search_steps=1))
    >>> 0 <= repair.info["last_epoch"]["misled"] <= 1
    True
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Repair, StepsConfig, tune
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Constants, GradientStep, Info, cross_entropy, torch_amsgrad, unlikelihood


@dataclasses.dataclass(frozen=True)
class SauConfig(StepsConfig):
    """Settings of SAU; the defaults are the published ones.

    Attributes:
        steps: published 100 rounds of 2,500 images in 256s.
        learning_rate: of AMSGrad, constant; published 1e-4.
        crop: published 0, no augmentation.
        flip: likewise not.
        bound: epsilon, the largest change of a pixel in [0, 1]; published 0.2.
        search_steps: steps of the search for examples; published 5.
        search_rate: the size of each; published 0.2.
        beta1: weight of misleading in the search; published 0.01.
        beta2: weight of agreement in the search; published 1.
        lambda1: weight of clean images; published 1.
        lambda2: weight of the true labels of the examples; published 0.
        lambda3: weight of unlearning; published 1.
    """

    learning_rate: float = 1e-4
    crop: int = 0
    flip: bool | None = False
    bound: float = 0.2
    search_steps: int = 5
    search_rate: float = 0.2
    beta1: float = 0.01
    beta2: float = 1.0
    lambda1: float = 1.0
    lambda2: float = 0.0
    lambda3: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.bound > 0, "bound", "a positive share of the pixel range")
        self.require(self.search_steps >= 1, "search_steps", "at least 1")
        self.require(self.search_rate > 0, "search_rate", "a positive share of the pixel range")
        for name in ("beta1", "beta2", "lambda1", "lambda2", "lambda3"):
            self.require(getattr(self, name) >= 0, name, "0 or more")


def amsgrad(constants: Constants) -> optax.GradientTransformation:
    """PyTorch's AMSGrad at the constant rate ``constants["learning_rate"]``."""
    return torch_amsgrad(constants["learning_rate"])


def jensen_shannon(logits: jax.Array, others: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence ``(B,)`` of the classes that two models' logits ``(B, C)`` stand for.

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


@dataclasses.dataclass(frozen=True)
class SauLoss:
    """The unlearning loss of one batch, at the examples that it finds first; reads ``constants["victim"]``."""

    classifier: Classifier
    search_steps: int

    def search(self, variables: Variables, batch: Dataset, constants: Constants) -> jax.Array:
        """Perturbations ``(B, H, W, channels)`` of pixels in [0, 1] that mislead the model and the victim alike."""
        models = (variables, constants["victim"])
        clean = [classify(self.classifier, model, batch.images)[1] for model in models]

        def objective(perturbation: jax.Array) -> jax.Array:
            images = batch.images + 255 * perturbation
            (logits, found), (others, found0) = (classify(self.classifier, model, images) for model in models)
            misled, misled0 = found != clean[0], found0 != clean[1]
            shared = misled & misled0 & (found == found0)
            doubt = jnp.where(misled, 0, cross_entropy(logits, batch.labels))
            doubt0 = jnp.where(misled0, 0, cross_entropy(others, batch.labels))
            apart = jnp.where(shared, 0, jensen_shannon(logits, others))
            return jnp.sum(constants["beta1"] * (doubt + doubt0) / 2 - constants["beta2"] * apart)

        def climb(_: int, perturbation: jax.Array) -> jax.Array:
            ahead = perturbation + constants["search_rate"] * jnp.sign(jax.grad(objective)(perturbation))
            return jnp.clip(ahead, -constants["bound"], constants["bound"])

        start = jnp.full(batch.images.shape, constants["bound"], jnp.float32)
        return jax.lax.fori_loop(0, self.search_steps, climb, start)

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key
        perturbation = self.search(jax.lax.stop_gradient(variables), batch, constants)
        examples = batch.images + 255 * perturbation
        logits, _ = classify(self.classifier, variables, batch.images)
        perturbed, found = classify(self.classifier, variables, examples)
        _, before = classify(self.classifier, constants["victim"], batch.images)
        _, target = classify(self.classifier, constants["victim"], examples)

        misled = (target != batch.labels) & (target != before)
        clean = jnp.mean(cross_entropy(logits, batch.labels))
        robust = jnp.mean(cross_entropy(perturbed, batch.labels))
        unlearnt = jnp.mean(jnp.where(misled, unlikelihood(perturbed, target), 0))
        loss = constants["lambda1"] * clean + constants["lambda2"] * robust + constants["lambda3"] * unlearnt
        shared = jnp.mean(misled & (found == target))
        return loss, (variables, {"cross_entropy": clean, "misled": jnp.mean(misled), "shared": shared})


def sau(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    config: SauConfig = SauConfig(),
) -> Repair:
    """Repairs a model by unlearning shared adversarial examples.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: clean images.
        config: settings.

    Returns:
        The repaired model. Of the last epoch's examples, ``misled`` is the share that misled the victim, and ``shared``
        the share that misled the repaired model to the same class.
    """
    step = GradientStep(SauLoss(classifier, config.search_steps), amsgrad)
    constants = {**numbers(config), "victim": variables}
    return Repair(*tune(key, step, variables, data, constants, config, "sau"))


DEFENSE = Defense("unlearn perturbations that mislead victim and repaired model alike", "clean", SauConfig, sau)
