r"""D3, distance-driven detoxification (Wei, Liu, Zha, ICCV 2025, arXiv 2411.09585).

Fine-tuning stays in a valley where clean loss and backdoor loss are both low. D3 leaves it: it drives selected weights
:math:`\theta_s` away from where they were, on the sphere of their original norm, while the clean loss stays below a
threshold:

.. math::
    \min_{\theta:\ \|W_l\| = \|W_l^0\|\ \forall l \in s}\quad
    \frac{1}{c}\Bigl(\lambda\,\frac1n \sum_i \max(0, \mathrm{CE}_i - \epsilon) - \sum_{l \in s} \|W_l - W_l^0\|_F\Bigr),
    \qquad c = \begin{cases}\lambda + 1 & \lambda > 1\\ 1 & \text{else.}\end{cases}

All parameters are optimised; only the selected ones are measured and projected, by
:math:`W \leftarrow W\,\|W^0\| / \|W\|` after every update. The hinge is taken per sample, as in the released code (the
paper's text has it on the mean loss). The norm has gradient zero where the distance is zero.

Sources. Released code: selection = the head's kernel, epsilon 0.1, lambda 0.5, random start, SGD 0.01 with momentum 0.9
and no weight decay, cosine, 100 epochs of 256. A reading note of the paper (second-hand): lambda 10
(``D3Config.preset("paper")``). The five initialisations are the released code's; its range of the random one, +-0.5,
does not matter after rescaling. The paper's feasible set (ball or sphere) is not known; the sphere is the code's.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = d3(jax.random.key(1), classifier, victim, clean, D3Config(steps=2))
    >>> round(repair.info["norm_ratio"], 4), 0 < repair.info["distance"] <= 2
    (1.0, True)
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from backdoor_jax.config import from_preset, numbers
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Repair, TuneConfig, tune
from backdoor_jax.defenses.sphere import Paths, SphereProjection, project_to_sphere
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import (
    Constants,
    CosineSGD,
    GradientStep,
    Info,
    cross_entropy,
    merge,
    split_by_path,
)

Initialization = Literal["random", "near", "middle", "far", "noise"]


@dataclasses.dataclass(frozen=True)
class D3Config(TuneConfig):
    """Settings of D3; the defaults are the released code's.

    Attributes:
        penalty: lambda, the weight of the hinge; released 0.5, paper (second-hand) 10.
        epsilon: the clean loss that is good enough, per sample; 0.1 in both.
        initialization: where the selected weights start: ``random`` uniform (released), ``near`` unchanged, ``middle``
            zero, ``far`` negated, ``noise`` unchanged plus normal noise of their own standard deviation. Then
            projected.
        select: paths of the weights measured and projected, such as ``layer4_1/conv2/kernel`` or, for all under it,
            ``layer4_1``; the head's kernel by default (released).
        weight_decay: 0 (the released code's file names 5e-4 and does not use it).
    """

    weight_decay: float = 0.0
    penalty: float = 0.5
    epsilon: float = 0.1
    initialization: Initialization = "random"
    select: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.penalty > 0, "penalty", "a positive number")
        self.require(self.epsilon >= 0, "epsilon", "0 or more")
        self.require(self.select is None or len(self.select) > 0, "select", "at least one path, or null for the head")

    @classmethod
    def preset(cls, name: Literal["released", "paper"], **changes: Any) -> "D3Config":
        """``released`` (lambda 0.5) or ``paper`` (lambda 10, second-hand), with changes."""
        presets: dict[str, dict[str, Any]] = {"released": {}, "paper": {"penalty": 10.0}}
        return from_preset(cls, "d3", presets, name, changes)


def distance(weights: Any, origin: Any) -> jax.Array:
    """Sum over layers of the Frobenius norm of the difference; its gradient at zero distance is zero.

    Example:
        >>> float(distance({"w": jnp.array([[3.0, 4.0]])}, {"w": jnp.zeros((1, 2))}))
        5.0
    """
    parts = jax.tree.map(lambda w, w0: optax.safe_norm(w - w0, 0.0), weights, origin)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def initialize(key: jax.Array, weights: Any, how: Initialization) -> Any:
    """The selected weights where D3 starts, each layer rescaled to its original norm (zero stays zero)."""
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


@dataclasses.dataclass(frozen=True)
class D3Loss:
    """The penalised objective of one batch."""

    classifier: Classifier
    select: Paths

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key
        selected, _ = split_by_path(variables["params"], self.select)
        logits, variables = self.classifier.logits(variables, batch.images, train=True)
        losses = cross_entropy(logits, batch.labels)
        hinge = jnp.mean(jax.nn.relu(losses - constants["epsilon"]))
        away = distance(selected, constants["origin"])
        penalty = constants["penalty"]
        loss = (penalty * hinge - away) / jnp.where(penalty > 1, penalty + 1, 1.0)
        return loss, (variables, {"hinge": hinge, "distance": away, "cross_entropy": jnp.mean(losses)})


def d3(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    config: D3Config = D3Config(),
) -> Repair:
    """Repairs a model with D3.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: clean images.
        config: settings.

    Returns:
        The repaired model. ``info["distance"]`` is the distance in units of the original norm (2 at most),
        ``info["norm_ratio"]`` the selected weights' norm over the original.

    Raises:
        UserError: for a selected path under which no parameters lie.
    """
    select = tuple(tuple(path.split("/")) for path in config.select or ()) or ((*classifier.head_path, "kernel"),)
    origin, others = split_by_path(variables["params"], select)
    init_key, tune_key = jax.random.split(key)
    start = {**variables, "params": merge(initialize(init_key, origin, config.initialization), others)}

    step = GradientStep(D3Loss(classifier, select), CosineSGD(config.steps), project=SphereProjection(select))
    constants = {**numbers(config), "origin": origin}
    repaired, info = tune(tune_key, step, start, data, constants, config, "d3")

    selected, _ = split_by_path(repaired["params"], select)
    norm = sum(float(jnp.linalg.norm(w)) for w in jax.tree.leaves(origin))
    info["norm_ratio"] = sum(float(jnp.linalg.norm(w)) for w in jax.tree.leaves(selected)) / norm if norm else 1.0
    info["distance"] = float(distance(selected, origin)) / norm if norm else 0.0
    info["selected"] = ["/".join(path) for path in select]
    return Repair(repaired, info)


DEFENSE = Defense("drive the head away from its origin while clean loss stays low", "clean", D3Config, d3)
