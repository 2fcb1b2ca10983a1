r"""D3, distance-driven detoxification (Wei, Liu, Zha, ICCV 2025, arXiv 2411.09585).

Fine-tuning stays in a valley where clean loss and backdoor loss are both low. D3 leaves it: it moves selected weights
:math:`\theta_s` away from their original values, on the sphere of their original norm, while the clean loss stays
below a threshold:

.. math::
    \min_{\theta:\ \|W_l\| = \|W_l^0\|\ \forall l \in s}\quad
    \frac{1}{c}\Bigl(\lambda\,\frac1n \sum_i \max(0, \mathrm{CE}_i - \epsilon) - \sum_{l \in s} \|W_l - W_l^0\|_F\Bigr),
    \qquad c = \begin{cases}\lambda + 1 & \lambda > 1\\ 1 & \text{else.}\end{cases}

All parameters are optimized; only the selected ones enter the distance and are projected, by
:math:`W \leftarrow W\,\|W^0\| / \|W\|` after every update. The hinge is taken per sample, as in the released code (in
the paper's text it is taken on the mean loss). The norm's gradient is set to zero where the distance is zero.

Sources. Released code: selection = the head's kernel, epsilon 0.1, lambda 0.5, random start, SGD 0.01 with momentum 0.9
and no weight decay, cosine, 100 epochs of 256. A reading note of the paper (second-hand): lambda 10
(``D3.preset("paper")``). The five initializations are the released code's; its range of the random one, +-0.5,
does not matter after rescaling. The paper's feasible set (ball or sphere) is not known; the sphere is the code's.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = D3(steps=2).repair(jax.random.key(1), classifier, victim, clean)
    >>> round(repair.info["norm_ratio"], 4), 0 < repair.info["distance"] <= 2
    (1.0, True)
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from annotated_types import MinLen
from jax.tree_util import Partial

from backdoor_jax.config import Decay, NonNegative, Positive
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Repair, SGDDefense
from backdoor_jax.defenses.sphere import paths_of, project_selected, project_to_sphere
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.rectifier import relu
from backdoor_jax.training import GradientStep, LossResult, cross_entropy, merge, split_by_path

Initialization = Literal["random", "near", "middle", "far", "noise"]


@dataclasses.dataclass(frozen=True)
class D3(SGDDefense):
    """D3; the defaults are the released code's.

    Attributes:
        penalty: lambda, the weight of the hinge; released 0.5, paper (second-hand) 10.
        epsilon: the threshold on the clean loss, per sample; 0.1 in both.
        initialization: how the selected weights start: ``random`` uniform (released), ``near`` unchanged, ``middle``
            zero, ``far`` negated, ``noise`` unchanged plus normal noise of their own standard deviation. They are then
            projected.
        select: paths of the selected weights, such as ``layer4_1/conv2/kernel``, or ``layer4_1`` for everything under
            it; the head's kernel by default (released).
        weight_decay: 0 (the released code's configuration has 5e-4 but does not use it).
    """

    name: ClassVar[str] = "d3"
    summary: ClassVar[str] = "move the head away from its original weights while clean loss stays low"
    limits: ClassVar[str] = "the head moves away, but in few steps the features that carry the trigger may stay"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {}, "paper": {"penalty": 10.0}}

    weight_decay: Decay = 0.0
    penalty: Positive = 0.5
    epsilon: NonNegative = 0.1
    initialization: Initialization = "random"
    select: Annotated[tuple[str, ...], MinLen(1)] | None = None

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Repairs a model with D3.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.

        Returns:
            The repaired model. ``info["distance"]`` is the distance in units of the original norm (at most 2),
            ``info["norm_ratio"]`` the selected weights' norm over their original norm.

        Raises:
            UserError: for a selected path under which no parameters lie.
            NonFiniteError: where the training diverges, naming the step.
        """
        select = tuple(tuple(path.split("/")) for path in self.select or ()) or ((*classifier.head_path, "kernel"),)
        origin, others = split_by_path(variables["params"], select)
        init_key, tune_key = jax.random.split(key)
        start = {**variables, "params": merge(initialize(init_key, origin, self.initialization), others)}

        loss = Partial(d3_loss, classifier, self, origin)
        step = GradientStep(loss, self.optimizer, project=Partial(project_selected, origin))
        repair = self.tune(tune_key, step, start, data)

        selected, _ = split_by_path(repair.variables["params"], select)
        norm = total_norm(origin)
        repair.info["norm_ratio"] = total_norm(selected) / norm if norm else 1.0
        repair.info["distance"] = float(distance(selected, origin)) / norm if norm else 0.0
        repair.info["selected"] = ["/".join(path) for path in select]
        return repair


def d3_loss(
    classifier: Classifier, config: D3, origin: Any, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    """The penalized objective of one batch.

    Args:
        classifier: the network.
        config: gives ``penalty`` and ``epsilon``.
        origin: the selected weights of the victim, a tree like ``params`` with None elsewhere.
        variables: the model's.
        batch: augmented images and labels.
        key: not used.
    """
    del key
    selected, _ = split_by_path(variables["params"], paths_of(origin))
    logits, variables = classifier.logits(variables, batch.images, train=True)
    losses = cross_entropy(logits, batch.labels)
    hinge = jnp.mean(relu(losses - config.epsilon))
    away = distance(selected, origin)
    loss = (config.penalty * hinge - away) / jnp.where(config.penalty > 1, config.penalty + 1, 1.0)
    return loss, (variables, {"hinge": hinge, "distance": away, "cross_entropy": jnp.mean(losses)})


def distance(weights: Any, origin: Any) -> jax.Array:
    """Sum over layers of the Frobenius norm of the difference; its gradient at zero distance is zero.

    Example:
        >>> float(distance({"w": jnp.array([[3.0, 4.0]])}, {"w": jnp.zeros((1, 2))}))
        5.0
    """
    parts = jax.tree.map(lambda w, w0: optax.safe_norm(w - w0, 0.0), weights, origin)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def total_norm(weights: Any) -> float:
    """Sum over layers of the Frobenius norm."""
    return sum(float(jnp.linalg.norm(w)) for w in jax.tree.leaves(weights))


def initialize(key: jax.Array, weights: Any, how: Initialization) -> Any:
    """The selected weights that D3 starts from, each layer rescaled to its original norm (zero stays zero)."""
    leaves, treedef = jax.tree.flatten(weights)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
    starts = {
        "random": lambda key, w: jax.random.uniform(key, w.shape, w.dtype, -0.5, 0.5),
        "near": lambda key, w: w,
        "middle": lambda key, w: jnp.zeros_like(w),
        "far": lambda key, w: -w,
        "noise": lambda key, w: w + jnp.std(w) * jax.random.normal(key, w.shape, w.dtype),
    }
    return project_to_sphere(jax.tree.map(starts[how], keys, weights), weights)
