"""The scan of TAC reconstruction as detectors: one for each of its two statistics; see `backdoor_jax.defenses.scan`.

>>> from backdoor_jax import build_classifier, digits
>>> clean = digits().train.take(slice(70))
>>> classifier = build_classifier("small_cnn", 10, width=2)
>>> victim = classifier.init(jax.random.key(0), clean.images)
>>> PerSample().examine(jax.random.key(1), classifier, victim, clean).values.shape
(10,)
"""

import dataclasses
from typing import ClassVar

import jax

from backdoor_jax.arguments import typed
from backdoor_jax.config import NonNegative
from backdoor_jax.data import Dataset
from backdoor_jax.defenses import scan
from backdoor_jax.defenses.tac_scan import Scan, Statistic
from backdoor_jax.detectors.base import ALPHA, Detector, Evidence
from backdoor_jax.models import Classifier, Variables


@dataclasses.dataclass(frozen=True)
class LatentScan(Detector):
    """Base of the two.

    Attributes:
        margin: logits by which a class has to lead; 0, the paper's.
    """

    statistic: ClassVar[Statistic]

    margin: NonNegative = 0.0

    def examine(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Evidence:
        """Scans a model; nothing is random, and labels are not needed.

        Args:
            key: not used.
            classifier: the network.
            variables: its variables.
            data: clean images.

        Raises:
            NonFiniteError: where latents or head weights are not finite.
        """
        del key
        return scan_evidence(scan(classifier, variables, data.images, self.margin), self.statistic)


@dataclasses.dataclass(frozen=True)
class PerSample(LatentScan):
    """The mean norm of the smallest latent change of single samples, balanced over classes."""

    name: ClassVar[str] = "per_sample"
    summary: ClassVar[str] = "a class to which single samples are sent by small latent changes"
    statistic: ClassVar[Statistic] = "per_sample"


@dataclasses.dataclass(frozen=True)
class WorstCase(LatentScan):
    """The norm of the one latent change that sends every sample to a class."""

    name: ClassVar[str] = "worst_case"
    summary: ClassVar[str] = "a class to which one small latent change sends all samples (TAC's paper)"
    statistic: ClassVar[Statistic] = "worst_case"


@typed
def scan_evidence(found: Scan, statistic: Statistic) -> Evidence:
    """What a scan says by one of its statistics."""
    test, summary = found.tests[statistic], found.summary(statistic, ALPHA)
    unsolved = len(summary["unsolved"]) if statistic == "worst_case" else summary["unsolved_samples"]
    trouble = None
    if test.p_value is None:
        trouble = "too few classes can be reached for a test"
    elif unsolved:
        trouble = f"{unsolved} of the scan's programs could not be solved"
    values = found.worst_case if statistic == "worst_case" else found.per_sample
    return Evidence(statistic, "norm of latent change", values, test.smallest, test.p_value, trouble, summary)
