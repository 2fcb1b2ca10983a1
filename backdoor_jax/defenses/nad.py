r"""NAD, neural attention distillation (Li et al., ICLR 2021, arXiv 2101.05930).

Fine-tuning a copy of the victim gives a teacher that attends less to the trigger; the victim, as the student, is then
fine-tuned to attend where the teacher does. Where a layer puts out maps :math:`F_c` of channels c, its attention is

.. math::
    A(F) = \frac{a}{\|a\|_2}, \qquad a = \sum_c |F_c|^2,

one number for each place of the image, and the student descends

.. math::
    \mathrm{CE} + \sum_l \beta_l\, \mathrm{MSE}\bigl(A(F_l),\, A(F_l^{\text{teacher}})\bigr) .

Student in training mode, teacher in evaluation mode.

Sources. Paper and authors' code: attention by squares (p = 2), beta 500, 1000 and 1000 on the three stages of a
WRN-16-1, 5 % of the training set, 10 epochs for the teacher. The benchmark: 10 epochs each for teacher and student,
2,500 images in 256s (100 steps), SGD 0.01 with momentum 0.9 and weight decay 5e-4, constant for the student; the
defaults here. The authors' code has SGD 0.1, weight decay 1e-4, Nesterov momentum and batches of 64.

Deviations. The maps are those of the network's last three stages (`Classifier.map_layers`), the last one before global
pooling. The benchmark takes PreAct-ResNet18's third map after it, where there is one place, A is 1 and the term
vanishes; for ResNet and VGG it takes but one map. Its teacher's rate follows a cosine of 100 epochs for 10 of them,
which is all but constant; here it is constant.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = nad(jax.random.key(1), classifier, victim, clean, NadConfig(steps=1, teacher_steps=1))
    >>> repair.info["layers"]
    ['relu0', 'relu1', 'relu2']
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Repair, TuneConfig, tune
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Constants, GradientStep, Info, SupervisedLoss, constant_sgd, cross_entropy


@dataclasses.dataclass(frozen=True)
class NadConfig(TuneConfig):
    """Settings of NAD; the defaults are the benchmark's. The learning rate is constant.

    Attributes:
        steps: of the student; published 10 epochs of 2,500 images in 256s.
        teacher_steps: of the teacher; likewise.
        betas: weight of each layer's attention, shallow to deep; published 500, 1000 and 1000.
        layers: paths of the layers, such as ``layer4_1``, as many as there are betas; by default the network's last
            stages.
    """

    steps: int = 100
    teacher_steps: int = 100
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.teacher_steps > 0, "teacher_steps", "at least 1")
        self.require(len(self.betas) > 0 and all(beta >= 0 for beta in self.betas), "betas", "numbers from 0")
        self.require(
            self.layers is None or len(self.layers) == len(self.betas), "layers", f"{len(self.betas)} paths, or null"
        )

    def schedule(self) -> optax.Schedule:
        """See `StepsConfig.schedule`."""
        return optax.constant_schedule(self.learning_rate)


def attention(feature_map: jax.Array) -> jax.Array:
    """Where a layer looks: squares of its map ``(B, H, W, channels)`` summed over channels, ``(B, H * W)`` of norm 1.

    Example:
        >>> attention(jnp.array([[[[1.0, 1.0], [0.0, 0.0]]]])).tolist()
        [[1.0, 0.0]]
    """
    energy = jnp.sum(feature_map**2, -1).reshape(len(feature_map), -1)
    return energy / optax.safe_norm(energy, 1e-6, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class NadLoss:
    """The student's objective of one batch; reads ``constants["teacher"]`` and ``constants["betas"]``."""

    classifier: Classifier
    layers: tuple[tuple[str, ...], ...]

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key
        logits, maps, variables = self.classifier.maps(variables, batch.images, self.layers, train=True)
        _, taught, _ = self.classifier.maps(constants["teacher"], batch.images, self.layers)
        apart = [jnp.mean((attention(own) - attention(other)) ** 2) for own, other in zip(maps, taught, strict=True)]
        clean = jnp.mean(cross_entropy(logits, batch.labels))
        distance = constants["betas"] @ jnp.stack(apart)
        return clean + distance, (variables, {"cross_entropy": clean, "distance": distance})


def nad(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    config: NadConfig = NadConfig(),
) -> Repair:
    """Repairs a model by distilling the attention of its fine-tuned copy into it.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: clean images.
        config: settings.

    Returns:
        The student. ``info["teacher"]`` has the last epoch of the teacher, ``info["layers"]`` the layers compared.

    Raises:
        UserError: where the network has no such feature maps, or is no Linen module.
    """
    named = tuple(tuple(path.split("/")) for path in config.layers or ())
    layers = named or classifier.map_layers[-len(config.betas) :]
    if len(layers) < len(config.betas):
        raise UserError(
            f"the network names {len(layers)} layers with feature maps and nad compares {len(config.betas)}; give "
            "layers, paths of a Linen module's layers that put out maps (B, H, W, channels), and as many betas"
        )
    jax.eval_shape(lambda variables, images: classifier.maps(variables, images, layers), variables, data.images[:1])
    constants = numbers(config)
    teacher_key, student_key = jax.random.split(key)

    teaching = GradientStep(SupervisedLoss(classifier), constant_sgd)
    steps = dataclasses.replace(config, steps=config.teacher_steps)
    teacher, taught = tune(teacher_key, teaching, variables, data, constants, steps, "nad, teacher")

    learning = GradientStep(NadLoss(classifier, layers), constant_sgd)
    constants = {**constants, "teacher": teacher, "betas": jnp.asarray(config.betas, float)}
    student, info = tune(student_key, learning, variables, data, constants, config, "nad")
    info["teacher"] = taught["last_epoch"]
    info["layers"] = ["/".join(layer) for layer in layers]
    return Repair(student, info)


DEFENSE = Defense("distil the attention of a fine-tuned copy into the victim", "clean", NadConfig, nad)
