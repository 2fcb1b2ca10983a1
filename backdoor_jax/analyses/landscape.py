"""The loss landscape between a victim and its repair, after D3; see `backdoor_jax.metrics.landscape`."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject, mean_over_seeds, model_title
from backdoor_jax.config import Count
from backdoor_jax.drawing import COLORS, use_logarithmic_scale
from backdoor_jax.metrics import loss_along_line, weight_change


@dataclasses.dataclass(frozen=True)
class Landscape(Analysis):
    """Losses and rates on the line from a victim to its repair and beyond, and how far the head has moved.

    Attributes:
        images: test images that are evaluated; the number is ours.
    """

    name: ClassVar[str] = "landscape"
    title: ClassVar[str] = "Loss landscape of a repair"
    note: ClassVar[str] = (
        "Losses and rates on the line from the victim (0) to the repaired model (1) and beyond. Both losses stay low "
        "along the way where the repair remains in the victim's valley; a ridge of clean loss in between means that it "
        "left that valley."
    )

    images: Count = 500

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """Evaluates a repair; None for other models, and where the repair added variables such as bounds."""
        if subject.original is None or subject.trigger is None or subject.label_map is None:
            return None
        if jax.tree.map(jnp.shape, subject.original) != jax.tree.map(jnp.shape, subject.variables):
            return None
        test = context.test.take(slice(0, self.images))
        line = loss_along_line(
            context.classifier, subject.original, subject.variables, test, subject.trigger, subject.label_map
        )
        head = weight_change(subject.original, subject.variables, (*context.classifier.head_path, "kernel"))

        def plain(values: np.ndarray) -> list[float | None]:
            return [round(float(value), 5) if np.isfinite(value) else None for value in values]

        return {
            **{name: plain(np.asarray(values)) for name, values in line._asdict().items()},
            "head": {"distance": head.distance, "cosine": head.cosine},
        }

    def draw(self, rows: list[Row]) -> Figure | None:
        """Losses above, rates below; a pair of panel rows for each attack, a column for each defense."""
        found = self.findings(rows)
        if not found:
            return None
        columns = max(map(len, found.values()))
        figure = Figure(figsize=(2.4 * columns + 0.8, 4.2 * len(found)), layout="constrained")
        grid = figure.subplots(2 * len(found), columns, sharey="row", squeeze=False)
        for pair, (attack, defenses) in zip(grid.reshape(len(found), 2, columns), found.items(), strict=True):
            for (above, below), (defense, seeds) in zip(pair.T, defenses.items(), strict=False):
                positions = mean_over_seeds(seeds, "positions")
                for axes, names, scale in ((above, ("clean_loss", "backdoor_loss"), 1), (below, ("acc", "asr"), 100)):
                    for name, color in zip(names, COLORS[:2], strict=True):
                        curve = scale * mean_over_seeds(seeds, name)
                        axes.plot(positions, curve, color=color, label=name.replace("_", " "))
                    for position in (0, 1):
                        axes.axvline(position, color="gray", linewidth=0.7, linestyle=":")
                    axes.tick_params(labelsize=7)
                use_logarithmic_scale(above)
                distance, cosine = (mean_over_seeds(seeds, "head", name) for name in ("distance", "cosine"))
                head = f"head: distance {distance:.2f}, cosine {cosine:.2f}"
                above.set_title(f"{model_title(attack, defense)}\n{head}", fontsize=8)
                below.set_xlabel("t", fontsize=8)
            for axes in pair[:, len(defenses) :].flat:
                axes.axis("off")
            for axes, unit in zip(pair[:, 0], ("loss", "%"), strict=True):
                axes.set_ylabel(unit)
                axes.legend(fontsize=7, frameon=False)
        return figure
