"""What each model answers for a few test images, clean and triggered."""

import dataclasses
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject
from backdoor_jax.data import Dataset
from backdoor_jax.metrics import predict

SHOWN = 8
"""Images; ours."""


@dataclasses.dataclass(frozen=True)
class Answers(Analysis):
    """The classes that victims and repairs give to the images of `shown_images`.

    A page shows them below the images, so it draws no figure of its own.
    """

    name: ClassVar[str] = "answers"
    title: ClassVar[str] = "Answers"
    note: ClassVar[str] = "Test images with the trigger, and what each model takes them for."

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """Answers of any model under attack; None for clean models."""
        if subject.trigger is None:
            return None
        shown = shown_images(context.task.test)
        clean, triggered = (
            predict(context.classifier, subject.variables, images)
            for images in (shown.images, subject.trigger(shown.images))
        )
        return {
            "labels": shown.labels,
            "clean": clean,
            "triggered": triggered,
            "class_names": context.task.class_names,
        }

    def draw(self, rows: list[Row]) -> Figure | None:
        """Nothing; see the class."""
        del rows
        return None


def shown_images(test: Dataset) -> Dataset:
    """The first test image of each of the first `SHOWN` classes to appear.

    Example:
        >>> from backdoor_jax import digits
        >>> shown_images(digits().test).labels.tolist()
        [2, 8, 5, 7, 9, 4, 0, 1]
    """
    labels = np.asarray(test.labels)
    _, first = np.unique(labels, return_index=True)
    return test.take(np.sort(first)[:SHOWN])
