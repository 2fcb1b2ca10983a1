r"""Fine-pruning (Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018, arXiv 1805.12185).

A backdoor may live in channels that are dormant on clean images. Two stages:

1. `prune_dormant`: the channels of the last convolutional layer, here the entries of the latent :math:`\phi`, are
   sorted by mean activation on clean images and pruned in ascending order, a share s of them at a time, for as long as
   the clean accuracy stays close to the victim's:

   .. math:: k^* = \max\bigl\{k :\ |\mathrm{acc}_j - \mathrm{acc}_0| < \tau\,\mathrm{acc}_0\ \ \forall j \le k\bigr\},
       \qquad j, k \in \{0, s, 2s, \ldots\} .

   A latent is pruned by zeroing its row of the head's kernel, which has the same effect on the linear head as a latent
   of zero.
2. The rest is fine-tuned with cross-entropy, and the pruned rows are held at zero.

Only the head depends on what is pruned, so the latents are computed once and all steps are evaluated at once.

Sources. The stages are the paper's. The share of 1 %, the tolerance of 10 % (relative, as above), the order by signed
mean, the latents of the head as the place, and the fine-tuning (`SGDDefense`) are the benchmark's.

Deviations. The benchmark prunes by the activations of augmented images, here of the images as they are. It watches the
accuracy on the *test set*; here it is that on the defender's own images, as in the paper. The benchmark prunes one
channel less than it counts, and continues with the network of the step that exceeded the tolerance; here it is the last
network within the tolerance. In PreAct-ResNet18 latents are not rectified, so the smallest mean may be a strongly
negative one and not a dormant channel; the same holds for the benchmark.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = FinePruning(steps=2).repair(jax.random.key(1), classifier, victim, clean)
    >>> repair.info["latents"], repair.info["steps"]
    (4, 2)
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial

from backdoor_jax.config import Positive, Share
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Repair, SGDDefense
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import GradientStep, latents, supervised_loss
from backdoor_jax.validation import checked


@dataclasses.dataclass(frozen=True)
class FinePruning(SGDDefense):
    """Fine-pruning; the settings of the fine-tuning are `SGDDefense`'s.

    Attributes:
        tolerance: relative change of the clean accuracy at which pruning ends; the benchmark's 0.1.
        share: of the channels, pruned at a time; the benchmark's 0.01.
    """

    name: ClassVar[str] = "fine_pruning"
    summary: ClassVar[str] = "prune what clean images leave dormant, then fine-tune"
    limits: ClassVar[str] = "it removes neurons that clean images leave dormant; wide triggers use the others"

    tolerance: Positive = 0.1
    share: Share = 0.01

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Prunes what is dormant on clean images and fine-tunes the rest.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.

        Returns:
            The repaired model. ``info["pruned"]`` are the indices of the pruned latents, of ``info["latents"]`` in all;
            ``info["accuracy"]`` is the victim's accuracy on these images, ``info["pruned_accuracy"]`` that after
            pruning, before the fine-tuning.

        Raises:
            NonFiniteError: where a logit is not finite, or the training diverges.
        """
        classifier.head_weights(variables)
        found = prune_dormant(classifier, variables, data, self)
        kept = jnp.asarray(found.kept)
        pruned = {**variables, "params": zero_pruned_rows(classifier, kept, variables["params"])}
        step = GradientStep(
            Partial(supervised_loss, classifier), self.optimizer, project=Partial(zero_pruned_rows, classifier, kept)
        )
        repair = self.tune(key, step, pruned, data)
        repair.info["pruned"] = np.flatnonzero(found.kept == 0).tolist()
        repair.info["latents"] = len(found.kept)
        repair.info["accuracy"] = float(found.accuracies[0])
        repair.info["pruned_accuracy"] = float(found.accuracies[found.chosen])
        return repair


class Pruned(NamedTuple):
    """Which latents the first stage prunes, and what it tried.

    Attributes:
        kept: ``(D,)``, 1 for latents that are kept and 0 for the pruned.
        counts: the number of latents pruned at each step.
        accuracies: on the images given, at each step.
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


@checked
def prune_dormant(
    classifier: Classifier, variables: Variables, data: Dataset, config: FinePruning = FinePruning()
) -> Pruned:
    """Stage 1: chooses the latents to prune.

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


def zero_pruned_rows(classifier: Classifier, kept: jax.Array, params: Any) -> Any:
    """All parameters, the rows of the head's kernel that belong to pruned latents zero.

    Args:
        classifier: the network.
        kept: ``(D,)``, 1 for latents that are kept and 0 for the pruned.
        params: its parameters.
    """
    leaves, kernel = flatten_dict(params), (*classifier.head_path, "kernel")
    return unflatten_dict({**leaves, kernel: leaves[kernel] * kept[:, None]})
