r"""The scan of TAC reconstruction: searches for a class to which a small latent change sends every sample.

Two statistics are computed for each class from the solutions of `tac_program`, and both are always reported:

- ``worst_case``, the paper's: the norm of the one change that works for every clean sample; a single hard sample can
  inflate it.
- ``per_sample``, ours: the mean norm of the smallest change for each clean sample of another class by itself, averaged
  within each predicted class first and then over these classes. Otherwise a class that resembles a frequent class would
  look easy to reach.

*Predictions* say of which class a sample is, not labels: the programs see nothing but latents, and a sample that the
model takes for class k needs no change to get there, whatever its label. Such samples are left out for class k, or a
class into which many images are misclassified would look easy to reach.

A class is flagged as poisoned where its statistic is an outlier on the small side (`smallest_outlier`).

    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> found = scan(classifier, victim, clean.images)
    >>> found.worst_case.shape, found.per_sample.shape
    ((10,), (10,))
"""

from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.config import NonNegative
from backdoor_jax.defenses.tac_program import Perturbations, class_logits, class_perturbations, sample_norms
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import latents
from backdoor_jax.validation import checked

Statistic = Literal["worst_case", "per_sample"]
FEWEST_CLASSES = 5
"""With fewer classes there is no p-value."""
MOST_PROGRAMS = 200_000
"""Programs of single samples in a scan, classes times samples; half a minute for 1,000 classes on two cores.

Where there are more, samples are left out, evenly over the predicted classes.
"""


class Outlier(NamedTuple):
    """The result of testing whether the smallest of C values is an outlier.

    Attributes:
        smallest: index of the smallest value.
        statistic: its distance below the mean in standard deviations (Grubbs' G).
        p_value: p-value of the one-sided Grubbs test; None where there are too few values.
        mad_score: its distance below the median in scaled median absolute deviations, for comparison.
    """

    smallest: int
    statistic: float
    p_value: float | None
    mad_score: float


class Scan(NamedTuple):
    """The result of a scan.

    Attributes:
        perturbations: the solution of each class's program.
        worst_case: ``(C,)``, norm of the change that sends every clean sample to the class; infinite where none does.
        per_sample: ``(C,)``, mean norm of the smallest change for each sample not predicted as the class, balanced
            over predicted classes; infinite where there is no such sample, or one that cannot reach the class.
        unsolved: ``(C,)``, how many of the single samples' programs have an upper bound in place of the norm.
        tests: the outlier test of each statistic.
    """

    perturbations: Perturbations
    worst_case: np.ndarray
    per_sample: np.ndarray
    unsolved: np.ndarray
    tests: dict[str, Outlier]

    def flagged(self, statistic: Statistic = "per_sample", alpha: float = 0.05) -> int | None:
        """The class that the test flags, or None."""
        test = self.tests[statistic]
        return test.smallest if test.p_value is not None and test.p_value <= alpha else None

    def summary(self, statistic: Statistic, alpha: float) -> dict[str, Any]:
        """The complete result in plain Python values, with the verdict in words."""
        flagged = self.flagged(statistic, alpha)
        few = self.tests[statistic].p_value is None
        feasible = self.perturbations.feasible
        verdict = "too few classes to tell" if few else "nothing flagged" if flagged is None else f"class {flagged}"
        return {
            "verdict": verdict,
            "flagged": flagged,
            "statistic": statistic,
            "alpha": alpha,
            "tests": {name: test._asdict() for name, test in self.tests.items()},
            "worst_case": [float(norm) if np.isfinite(norm) else None for norm in self.worst_case],
            "per_sample": [float(norm) if np.isfinite(norm) else None for norm in self.per_sample],
            "infeasible": np.flatnonzero(~feasible).tolist(),
            "unsolved": np.flatnonzero(feasible & ~self.perturbations.converged).tolist(),
            "unsolved_samples": int(self.unsolved.sum()),
            "residual": float(np.max(self.perturbations.residual[feasible], initial=0)),
            "sweeps": int(np.max(self.perturbations.sweeps)),
        }


@typed
def smallest_outlier(values: np.ndarray) -> Outlier:
    r"""One-sided Grubbs test of the smallest value.

    .. math:: G = \frac{\bar v - \min v}{\mathrm{sd}(v)}, \qquad
        p = \min\Bigl(1,\ C\,\Pr\bigl(T_{C-2} > \sqrt{\tfrac{C(C-2)G^2}{(C-1)^2 - C G^2}}\bigr)\Bigr)

    The factor C accounts for selecting the smallest value. Infinite values are left out; with fewer than five left
    there is no p-value.

    Limits. The level holds for normal values, and for values with a heavier right tail. For Student's t with 4 degrees
    of freedom a test at 5 % flags 12 % of sets of 10, 27 % of 43 and 46 % of 100, for a mirrored gamma distribution
    (shape 4) 20, 39 and 55 %. A large value hides a small one, because it widens the deviation; `mad_score` does not
    have this fault.

    Example:
        >>> smallest_outlier(np.array([5.0, 5.1, 4.9, 5.2, 1.0, 4.8])).smallest
        4
    """
    from scipy import special

    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    count = len(finite)
    if not count:
        return Outlier(0, 0.0, None, 0.0)
    index, least = int(np.argmin(np.where(np.isfinite(values), values, np.inf))), finite.min()
    spread = finite.std(ddof=1) if count > 1 else 0.0
    grubbs = (finite.mean() - least) / spread if spread > 0 else 0.0
    median = np.median(finite)
    mad = np.median(np.abs(finite - median)) / special.ndtri(0.75)
    score = (median - least) / mad if mad > 0 else 0.0
    p_value = None
    if count >= FEWEST_CLASSES:
        rest = max((count - 1) ** 2 - count * grubbs**2, 0.0)
        t = np.sqrt(count * (count - 2) * grubbs**2 / rest) if rest else np.inf
        p_value = float(min(1.0, count * special.stdtr(count - 2, -t)))
    return Outlier(index, float(grubbs), p_value, float(score))


@checked
def scan(
    classifier: Classifier, variables: Variables, images: jax.Array, margin: NonNegative = 0.0, name: str = "scan"
) -> Scan:
    """Scans a model for a class to which a small latent change sends every sample.

    Args:
        classifier: the network.
        variables: its variables.
        images: clean uint8 images, ``(n, H, W, channels)``; labels are not needed.
        margin: logits by which a class has to lead.
        name: what errors call the model.

    Raises:
        NonFiniteError: where latents or head weights are not finite.

    Example:
        >>> from backdoor_jax import build_classifier, digits
        >>> clean = digits().train.take(slice(70))
        >>> classifier = build_classifier("small_cnn", 10, width=2)
        >>> found = scan(classifier, classifier.init(jax.random.key(0), clean.images), clean.images)
        >>> 0 <= found.tests["per_sample"].smallest < 10
        True
    """
    latent, margin = np.asarray(latents(classifier, variables, images)), float(margin)
    kernel, bias = map(np.asarray, classifier.head_weights(variables))
    if not all(np.isfinite(part).all() for part in (latent, kernel, bias)):
        raise NonFiniteError(
            f"{name}: latents or head weights are not finite, so nothing can be scanned; check the checkpoint"
        )
    perturbations = class_perturbations(latent, kernel, bias, margin)
    logits = class_logits(latent, kernel, bias)
    logits = logits[balanced_subset(logits.argmax(axis=1), MOST_PROGRAMS // classifier.num_classes)]
    samples = sample_norms(logits, kernel, margin)
    per_sample = balanced_means(samples.norms, logits.argmax(axis=1))
    tests = {"worst_case": smallest_outlier(perturbations.norms), "per_sample": smallest_outlier(per_sample)}
    return Scan(perturbations, perturbations.norms, per_sample, np.sum(~samples.solved, axis=1), tests)


def balanced_means(norms: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The mean norm of the samples of other classes, within each predicted class and then over classes.

    Args:
        norms: ``(C, n)``.
        predicted: ``(n,)``, the class that each sample is predicted as.

    Returns:
        ``(C,)``, infinite where every sample is predicted as the class.

    Example:
        >>> balanced_means(np.array([[0.0, 1.0, 1.0, 4.0]]), np.array([0, 1, 1, 2])).tolist()
        [2.5]
    """
    present, counts = np.unique(predicted, return_counts=True)
    sums = np.stack([norms[:, predicted == k].sum(axis=1) for k in present], axis=1)
    others = present != np.arange(len(norms))[:, None]
    return np.where(others.any(1), np.sum(sums / counts, axis=1, where=others) / np.maximum(others.sum(1), 1), np.inf)


def balanced_subset(predicted: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most ``count`` samples, in order, as evenly over predicted classes as they allow.

    Example:
        >>> balanced_subset(np.array([0, 0, 0, 0, 1, 1, 2]), 4).tolist()
        [0, 1, 4, 6]
    """
    turn = np.zeros(len(predicted), int)
    for k in np.unique(predicted):
        turn[predicted == k] = np.arange(np.sum(predicted == k))
    return np.sort(np.lexsort((predicted, turn))[: max(count, 1)])
