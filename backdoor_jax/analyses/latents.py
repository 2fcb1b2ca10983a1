"""The latents of clean and triggered images in 2-D, after D3; see `backdoor_jax.metrics.landscape`."""

import dataclasses
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject, model_title
from backdoor_jax.config import Count
from backdoor_jax.metrics import embedding
from backdoor_jax.training import latents


@dataclasses.dataclass(frozen=True)
class Latents(Analysis):
    """Latents of test images, clean and triggered, on their two principal components.

    Attributes:
        images: test images that are drawn; the number is ours.
    """

    name: ClassVar[str] = "latents"
    title: ClassVar[str] = "Latents in 2-D"
    note: ClassVar[str] = (
        "Test images on the two principal components of each model's latents, one color for each class (with many "
        "classes some colors are close); crosses are the same images with the trigger. Where the attack works, the "
        "crosses gather in one place."
    )

    images: Count = 300

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """Projects the latents of any model under attack; None for clean models."""
        if subject.trigger is None:
            return None
        test = context.test.take(slice(0, self.images))
        both = [
            latents(context.classifier, subject.variables, images)
            for images in (test.images, subject.trigger(test.images))
        ]
        clean, triggered = (np.round(points, 3) for points in embedding(*both))
        return {"labels": test.labels, "clean": clean, "triggered": triggered}

    def draw(self, rows: list[Row]) -> Figure | None:
        """One panel for each model: points for clean images, black crosses for triggered ones."""
        found = self.findings(rows)
        if not found:
            return None
        columns = max(map(len, found.values()))
        figure = Figure(figsize=(2.2 * columns, 2.4 * len(found)))
        grid = figure.subplots(len(found), columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for panels, (attack, defenses) in zip(grid, found.items(), strict=True):
            for axes, (defense, seeds) in zip(panels, defenses.items(), strict=False):
                clean, triggered = (np.asarray(seeds[0][name]) for name in ("clean", "triggered"))
                axes.scatter(*clean.T, c=np.asarray(seeds[0]["labels"]), cmap="turbo", s=5, linewidths=0)
                axes.scatter(*triggered.T, c="black", marker="x", s=6, linewidths=0.5)
                axes.set_title(model_title(attack, defense), fontsize=8)
        figure.tight_layout()
        return figure
