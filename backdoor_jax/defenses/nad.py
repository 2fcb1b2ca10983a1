r"""NAD, neural attention distillation (Li et al., ICLR 2021, arXiv 2101.05930).

Fine-tuning a copy of the victim gives a teacher that pays less attention to the trigger; the victim, as the student,
is then fine-tuned to attend where the teacher does. For a layer with feature maps :math:`F_c`, one per channel c, the
attention is

.. math::
    A(F) = \frac{a}{\|a\|_2}, \qquad a = \sum_c |F_c|^2,

one number for each position in the image, and the student minimizes

.. math::
    \mathrm{CE} + \sum_l \beta_l\, \mathrm{MSE}\bigl(A(F_l),\, A(F_l^{\text{teacher}})\bigr) ,

the student in training mode, the teacher in evaluation mode.

Sources. Paper and authors' code: attention by squares (p = 2), beta 500, 1000 and 1000 on the three stages of a
WRN-16-1, 5 % of the training set, 10 epochs for the teacher. The benchmark: 10 epochs each for teacher and student,
2,500 images in batches of 256 (100 steps), SGD 0.01 with momentum 0.9 and weight decay 5e-4, constant for the student;
the defaults here. The authors' code has SGD 0.1, weight decay 1e-4, Nesterov momentum and batches of 64.

Deviations. The maps are those of the network's last three stages (`Classifier.map_layers`), the last one before global
pooling. The benchmark takes PreAct-ResNet18's third map after pooling, where there is a single position, A is 1 and the
term vanishes; for ResNet and VGG it takes only one map, so layers and betas differ from network to network, while here
all have three. Its teacher's rate follows the first 10 of 100 epochs of a cosine, which is almost constant; here it is
constant.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = NAD(steps=1, teacher_steps=1).repair(jax.random.key(1), classifier, victim, clean)
    >>> repair.info["layers"]
    ['relu0', 'relu1', 'relu2']
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import optax
from annotated_types import MinLen
from jax.tree_util import Partial

from backdoor_jax.config import Config, Count, NonNegative
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Repair, SGDDefense
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import SGD, GradientStep, LossResult, Path, cross_entropy, fit, supervised_loss


@dataclasses.dataclass(frozen=True)
class NAD(SGDDefense):
    """NAD; the defaults are the benchmark's. The learning rate is constant.

    Attributes:
        steps: the student's; published 10 epochs of 2,500 images in batches of 256.
        teacher_steps: the teacher's; published the same.
        betas: weight of each layer's attention, shallow to deep; published 500, 1000 and 1000.
        layers: paths of the layers, such as ``layer4_1``, one for each beta; by default the network's last stages.
    """

    name: ClassVar[str] = "nad"
    summary: ClassVar[str] = "distill the attention of a fine-tuned copy into the victim"
    limits: ClassVar[str] = "its teacher is a fine-tuned victim, which may still have the backdoor"

    steps: Count = 100
    teacher_steps: Count = 100
    betas: Annotated[tuple[NonNegative, ...], MinLen(1)] = (500.0, 1000.0, 1000.0)
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Checks the fields, and that there is one layer for each beta.

        Raises:
            UserError: for a field out of range, naming it.
        """
        super().__post_init__()
        paths = f"{len(self.betas)} paths, one for each beta, or null"
        self.require(self.layers is None or len(self.layers) == len(self.betas), "layers", paths)

    @property
    def optimizer(self) -> SGD:
        """SGD at a constant rate."""
        return SGD(self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Repairs a model by distilling the attention of its fine-tuned copy into it.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.

        Returns:
            The student. ``info["teacher"]`` has the means of the teacher's last epoch, ``info["layers"]`` the layers
            compared.

        Raises:
            UserError: where the network has no such feature maps, or is no Linen module.
            NonFiniteError: where the training diverges, naming the step.
        """
        named = tuple(tuple(path.split("/")) for path in self.layers or ())
        layers = Layers(named or classifier.map_layers[-len(self.betas) :])
        if len(layers.paths) < len(self.betas):
            raise UserError(
                f"the network names {len(layers.paths)} layers with feature maps and nad compares {len(self.betas)}; "
                "give layers, paths of a Linen module's layers that return maps (B, H, W, channels), and as many betas"
            )
        # Fails on layers without maps before anything is trained.
        jax.eval_shape(lambda model, images: classifier.maps(model, images, layers.paths), variables, data.images[:1])
        teacher_key, student_key = jax.random.split(key)

        teaching = GradientStep(Partial(supervised_loss, classifier), self.optimizer)
        teacher = fit(
            teacher_key,
            teaching,
            teaching.init(variables),
            data,
            steps=self.teacher_steps,
            batch_size=self.batch_size,
            augment=self.augment,
            name=f"{self.name}, teacher",
        )
        betas = jnp.asarray(self.betas, float)
        learning = GradientStep(Partial(nad_loss, classifier, layers, betas, teacher.variables), self.optimizer)
        repair = self.tune(student_key, learning, variables, data)
        repair.info["teacher"] = teacher.last_epoch
        repair.info["layers"] = ["/".join(path) for path in layers.paths]
        return repair


@dataclasses.dataclass(frozen=True)
class Layers(Config):
    """The layers whose attention is compared.

    Attributes:
        paths: names down to each layer in ``params``, shallow to deep.
    """

    paths: tuple[Path, ...] = ()


def attention(feature_map: jax.Array) -> jax.Array:
    """Attention maps ``(B, H * W)`` of norm 1: squares of ``(B, H, W, channels)`` summed over channels.

    Example:
        >>> attention(jnp.array([[[[1.0, 1.0], [0.0, 0.0]]]])).tolist()
        [[1.0, 0.0]]
    """
    energy = jnp.sum(feature_map**2, -1).reshape(len(feature_map), -1)
    return energy / optax.safe_norm(energy, 1e-6, axis=1, keepdims=True)


def nad_loss(
    classifier: Classifier,
    layers: Layers,
    betas: jax.Array,
    teacher: Variables,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """Cross-entropy of one batch, plus the weighted distances between the student's and the teacher's attention.

    Args:
        classifier: the network.
        layers: the layers compared.
        betas: ``(layers,)``, the weight of each layer's distance.
        teacher: the teacher's variables.
        variables: the student's.
        batch: augmented images and labels.
        key: not used.
    """
    del key
    logits, maps, variables = classifier.maps(variables, batch.images, layers.paths, train=True)
    _, taught, _ = classifier.maps(teacher, batch.images, layers.paths)
    distances = [jnp.mean((attention(own) - attention(other)) ** 2) for own, other in zip(maps, taught, strict=True)]
    clean = jnp.mean(cross_entropy(logits, batch.labels))
    distance = betas @ jnp.stack(distances)
    return clean + distance, (variables, {"cross_entropy": clean, "distance": distance})
