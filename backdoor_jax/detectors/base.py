"""What detectors have in common: the evidence that they return, and the verdict in words that it supports.

>>> evidence = Evidence("a test", "norm", np.array([3.0, 1.0, 3.1, 2.9, 3.0]), 1, p_value=1e-4)
>>> print(judge(evidence, class_names=("go", "stop", "left", "right", "slow")))
backdoored, class 1 (stop)
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from backdoor_jax.arguments import typed
from backdoor_jax.config import Config
from backdoor_jax.data import Dataset
from backdoor_jax.detectors.calibration import calibrated, clean_models
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.validation import checked

Outcome = Literal["backdoored", "no sign of a backdoor", "cannot tell"]
ALPHA = 0.05
"""The level at which a p-value becomes a verdict, fixed in advance."""
HEALTHY = 0.7
"""The accuracy below which a model is not as in its training, so that nothing can be said; ours. Models near it are
rarely trained to the end."""


class Inverted(NamedTuple):
    """Triggers that a detector reconstructed, one for each class, in pixels of [0, 1].

    Attributes:
        masks: ``(C, H, W)``, how much of each pixel is replaced.
        patterns: ``(C, H, W, channels)``, by what.
    """

    masks: np.ndarray
    patterns: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a detector found out about a model.

    Attributes:
        detector: its name.
        quantity: what the values are, for tables and figures.
        values: ``(C,)``, the quantity of each class; infinite where there is none.
        target: the most suspicious class.
        p_value: the chance of a class as suspicious as this in a clean model, by the detector's own test; None without
            one.
        trouble: the reason why the values support no verdict, if there is one.
        details: further results in plain Python values.
        triggers: the triggers that the detector reconstructed, if it does.
        score: what `judge` compares with the clean models, smaller for a more suspicious model, in (0, 1]; the p-value
            where it is None.
    """

    detector: str
    quantity: str
    values: np.ndarray
    target: int
    p_value: float | None = None
    trouble: str | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    triggers: Inverted | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Detector(Config):
    """Base class of the detectors: a configuration with the method that runs it.

    Class attributes:
        name: what registries and the command line call it.
        summary: one line about it.
        needs_images: whether it needs clean images; one that does not only reads their shape.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_images: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes every detector check what its `examine` receives."""
        super().__init_subclass__(**kwargs)
        if "examine" in vars(cls):
            cls.examine = checked(cls.examine)  # type: ignore[method-assign]

    def examine(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Evidence:
        """Collects evidence about a model.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: its variables.
            data: clean images; empty for a detector that needs none.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A verdict in words.

    Attributes:
        outcome: ``backdoored``, ``no sign of a backdoor`` or ``cannot tell``.
        target: the class that triggered images are sent to; None unless backdoored.
        class_name: its name, where classes have names.
        detector: the detector whose evidence this is.
        p_value: how often a clean model is as suspicious, see `backdoor_jax.detectors.calibration`; the test's own for
            a detector that is not calibrated; None without a test.
        strength: of the evidence for a backdoor: ``none``, ``moderate`` (p at most .05), ``strong`` (.001) or ``very
            strong`` (1e-6).
        why: why nothing can be said; None otherwise.
        advice: what to do next.
    """

    outcome: Outcome
    target: int | None
    class_name: str | None
    detector: str
    p_value: float | None
    strength: Literal["none", "moderate", "strong", "very strong"]
    why: str | None
    advice: str

    def __str__(self) -> str:
        """The outcome, with the class or the reason."""
        if self.outcome == "backdoored":
            return f"backdoored, class {self.target}" + (
                f" ({self.class_name})" if self.class_name not in (None, "", str(self.target)) else ""
            )
        return self.outcome + (f": {self.why}" if self.why else "")


@typed
def judge(
    evidence: Evidence,
    *,
    accuracy: float = math.nan,
    healthy: float = HEALTHY,
    class_names: tuple[str, ...] | None = None,
    alpha: float = ALPHA,
) -> Verdict:
    """The verdict that evidence supports.

    Args:
        evidence: a detector's.
        accuracy: share of clean images that the model classifies correctly; NaN where that is not known.
        healthy: the accuracy that a healthy model reaches on such images.
        class_names: names of all classes.
        alpha: level of the test.

    Example:
        >>> few = Evidence("a test", "norm", np.array([1.0, 2.0]), 0, trouble="two classes are too few for a test")
        >>> print(judge(few))
        cannot tell: two classes are too few for a test
    """
    why, p_value, target = evidence.trouble, evidence.p_value, evidence.target
    clean, score = clean_models().get(evidence.detector), evidence.score
    if p_value is not None and clean is not None:
        p_value = calibrated(p_value, clean) if score is None else calibrated(score, clean, least_index=0)
    if accuracy < healthy:
        why = (
            f"{100 * accuracy:.1f} % of the images classified correctly is less than a healthy model reaches "
            f"({100 * healthy:.0f} %, --healthy)"
        )
    elif why is None and p_value is None:
        why = f"{evidence.detector} has no test"
    if why is not None:
        advice = "Check normalization and labels, give more clean images, or try another detector."
        return Verdict("cannot tell", None, None, evidence.detector, p_value, "none", why, advice)
    assert p_value is not None
    if p_value > alpha:
        advice = (
            "This is no proof of a clean model: SIG, several targets and weak triggers are missed. Try a second "
            "detector before relying on it, and do not repair without a reason: a repair costs accuracy."
        )
        return Verdict("no sign of a backdoor", None, None, evidence.detector, p_value, "none", None, advice)
    name = None if class_names is None else class_names[target]
    strength: Literal["moderate", "strong", "very strong"] = (
        "very strong" if p_value <= 1e-6 else "strong" if p_value <= 1e-3 else "moderate"
    )
    advice = (
        f"Look at the training images of class {target} if you have them: mistakes in the labels look the same. "
        f"Then repair the model with target={target}."
    )
    return Verdict("backdoored", target, name, evidence.detector, p_value, strength, None, advice)
