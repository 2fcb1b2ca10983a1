"""The verdict of the default detector on a model as it was trained, before anybody repairs it."""

import dataclasses
import math
from typing import ClassVar

from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject
from backdoor_jax.detectors import NeuralCleanse, judge


@dataclasses.dataclass(frozen=True)
class DetectorVerdict(Analysis):
    """Whether the default detector finds a backdoor in victims and clean models, with the defender's clean images.

    A page shows it beside the model's repairs, so it draws no figure of its own.
    """

    name: ClassVar[str] = "verdict"
    title: ClassVar[str] = "Verdict"
    note: ClassVar[str] = "The value of each class, and whether one stands out."

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """The verdict on a victim or a clean model; None for repairs."""
        if subject.original is not None:
            return None
        key = context.key_for("verdict")
        evidence = NeuralCleanse().examine(key, context.classifier, subject.variables, context.clean)
        names = context.task.class_names
        verdict = judge(evidence, class_names=names)
        return {
            **dataclasses.asdict(verdict),
            "words": str(verdict),
            "suspect": evidence.target,
            "quantity": evidence.quantity,
            "values": [value if math.isfinite(value) else None for value in evidence.values.tolist()],
            "class_names": names,
        }

    def draw(self, rows: list[Row]) -> Figure | None:
        """Nothing; see the class."""
        del rows
        return None
