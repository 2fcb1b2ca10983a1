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
    """Latents of test images, clean and triggered, on their two principal components and by t-SNE.

    Attributes:
        images: test images that are drawn; the number is ours.
    """

    name: ClassVar[str] = "latents"
    title: ClassVar[str] = "Latents in 2-D"
    note: ClassVar[str] = (
        "Test images on the two principal components of each model's latents, and below by t-SNE, which shows who is "
        "near whom; one color for each class (with many classes some colors are close). Crosses are the same images "
        "with the trigger. Where the attack works, the crosses gather in one place."
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
        near = [np.round(points, 3) for points in embedding(*both, method="tsne")]
        return {"labels": test.labels, "clean": clean, "triggered": triggered, "tsne": near}

    def draw(self, rows: list[Row]) -> Figure | None:
        """Two panels for each model: points for clean images, black crosses for triggered ones.

        Rows measured before t-SNE was drawn have only the principal components.
        """
        found = self.findings(rows)
        if not found:
            return None
        columns = max(map(len, found.values()))
        levels = 1 + any("tsne" in seeds[0] for defenses in found.values() for seeds in defenses.values())
        figure = Figure(figsize=(2.2 * columns, 2.3 * levels * len(found)))
        grid = figure.subplots(levels * len(found), columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for number, (attack, defenses) in enumerate(found.items()):
            for column, (defense, seeds) in enumerate(defenses.items()):
                panels, first = grid[levels * number :, column], seeds[0]
                panels[0].set_title(model_title(attack, defense), fontsize=8)
                drawn = [(first["clean"], first["triggered"]), *([first["tsne"]] if "tsne" in first else [])]
                for axes, points in zip(panels, drawn, strict=False):
                    clean, triggered = map(np.asarray, points)
                    axes.scatter(*clean.T, c=np.asarray(first["labels"]), cmap="turbo", s=5, linewidths=0)
                    axes.scatter(*triggered.T, c="black", marker="x", s=6, linewidths=0.5)
        figure.tight_layout()
        return figure
