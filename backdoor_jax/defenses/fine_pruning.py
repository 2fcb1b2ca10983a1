r"""Fine-pruning (Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018, arXiv 1805.12185).

A backdoor may live in channels that clean images leave dormant. Two stages:

1. `prune_dormant`: the last convolutional layer's channels, here the entries of the latent :math:`\phi`, are sorted by
   mean activation on clean images and pruned from the smallest on, a share s of them at a time, for as long as the
   clean accuracy stays close to the victim's:

   .. math:: k^* = \max\bigl\{k :\ |\mathrm{acc}_j - \mathrm{acc}_0| < \tau\,\mathrm{acc}_0\ \ \forall j \le k\bigr\},
       \qquad j, k \in \{0, s, 2s, \dots\} .

   A latent is pruned by zeroing its row of the head's kernel, which is what the linear head makes of a zero.
2. The rest is fine-tuned with cross-entropy, and the pruned rows are held at zero.

Only the head depends on what is pruned, so the latents are computed once and all steps are judged at once.

Sources. The stages are the paper's. The share of 1 %, the tolerance of 10 % (relative, as above), the order by signed
mean, the latents of the head as the place, and the fine-tuning (`TuneConfig`) are the benchmark's.

Deviations. The benchmark watches the accuracy on the *test set*; here it is that on the defender's own images, as in
the paper. It prunes one channel less than it counts, and goes on with the network of the step that exceeded the
tolerance; here it is the last one within. In PreAct-ResNet18 latents are not rectified, so the smallest mean may be a
strongly negative one and not a dormant channel; the benchmark does the same.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = fine_pruning(jax.random.key(1), classifier, victim, clean, FinePruningConfig(steps=2))
    >>> repair.info["latents"], repair.info["steps"]
    (4, 2)
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from backdoor_jax.config import numbers
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Repair, TuneConfig, replaced, tune
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import Constants, CosineSGD, GradientStep, SupervisedLoss, latents

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FinePruningConfig(TuneConfig):
    """Settings of fine-pruning; those of the fine-tuning are `TuneConfig`'s.

    Attributes:
        tolerance: relative change of the clean accuracy at which pruning ends; the benchmark's 0.1.
        share: of the channels, pruned at a time; the benchmark's 0.01.
    """

    tolerance: float = 0.1
    share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.tolerance > 0, "tolerance", "a positive number")
        self.require(0 < self.share <= 1, "share", "a share in (0, 1]")


class Pruned(NamedTuple):
    """What the first stage came to.

    Attributes:
        kept: ``(D,)``, 1 for latents that are kept and 0 for the pruned.
        counts: how many are pruned at each step.
        accuracies: on the images at hand, at each step.
        chosen: which step.
    """

    kept: np.ndarray
    counts: np.ndarray
    accuracies: np.ndarray
    chosen: int


@jax.jit
def _accuracies(
    classifier: Classifier, variables: Variables, latent: jax.Array, labels: jax.Array, masks: jax.Array
) -> jax.Array:
    def one(mask: jax.Array) -> jax.Array:
        return jnp.mean(jnp.argmax(classifier.head(variables, latent * mask), -1) == labels)

    return jax.lax.map(one, masks)


def prune_dormant(
    classifier: Classifier, variables: Variables, data: Dataset, config: FinePruningConfig = FinePruningConfig()
) -> Pruned:
    """Stage 1: which latents go.

    Args:
        classifier: the network.
        variables: the victim's.
        data: clean images.
        config: settings.

    Raises:
        NonFiniteError: where a logit is not finite.
    """
    latent = latents(classifier, variables, data.images)
    if not bool(jnp.all(jnp.isfinite(classifier.head(variables, latent)))):
        raise NonFiniteError("fine_pruning: logits are not finite; the victim's weights are damaged")
    mean = np.asarray(jnp.mean(latent, 0))
    counts = np.arange(0, len(mean), int(np.ceil(len(mean) * config.share)))
    rank = np.argsort(np.argsort(mean, kind="stable"), kind="stable")
    masks = (rank >= counts[:, None]).astype(latent.dtype)
    accuracies = np.asarray(_accuracies(classifier, variables, latent, data.labels, jnp.asarray(masks)))
    within = np.abs(accuracies - accuracies[0]) < config.tolerance * accuracies[0]
    chosen = max(0, int(np.argmin(np.append(within, False))) - 1)
    return Pruned(masks[chosen], counts, accuracies, chosen)


@dataclasses.dataclass(frozen=True)
class HoldAtZero:
    """Puts the pruned rows of a kernel back to zero; reads ``constants["kept"]``."""

    kernel: Path

    def __call__(self, params: Any, constants: Constants) -> Any:
        """All parameters, those rows zero."""
        return _pruned({"params": params}, self.kernel, constants["kept"])["params"]


def _pruned(variables: Variables, path: Path, kept: jax.Array) -> Variables:
    return replaced(variables, {path: flatten_dict(variables["params"])[path] * kept[:, None]})


def fine_pruning(
    key: jax.Array,
    classifier: Classifier,
    variables: Variables,
    data: Dataset,
    config: FinePruningConfig = FinePruningConfig(),
) -> Repair:
    """Prunes what is dormant on clean images and fine-tunes the rest.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; left as they are.
        data: clean images.
        config: settings.

    Returns:
        The repaired model. ``info["pruned"]`` are the latents that went, of ``info["latents"]``;
        ``info["pruned_accuracy"]`` is the accuracy on the images at hand before the fine-tuning.

    Raises:
        NonFiniteError: where a logit is not finite.
    """
    classifier.head_weights(variables)
    found = prune_dormant(classifier, variables, data, config)
    kept, kernel = jnp.asarray(found.kept), (*classifier.head_path, "kernel")
    step = GradientStep(SupervisedLoss(classifier), CosineSGD(config.steps), project=HoldAtZero(kernel))
    constants = {**numbers(config), "kept": kept}
    repaired, info = tune(key, step, _pruned(variables, kernel, kept), data, constants, config, "fine_pruning")
    pruned = {
        "pruned": np.flatnonzero(found.kept == 0).tolist(),
        "latents": len(found.kept),
        "accuracy": float(found.accuracies[0]),
        "pruned_accuracy": float(found.accuracies[found.chosen]),
    }
    return Repair(repaired, {**info, **pruned})


DEFENSE = Defense("prune what clean images leave dormant, then fine-tune", "clean", FinePruningConfig, fine_pruning)
