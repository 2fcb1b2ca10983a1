"""A backdoor injected again into repaired models, after super-fine-tuning; see `backdoor_jax.metrics.sequela`."""

import dataclasses
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject
from backdoor_jax.drawing import COLORS, legend_beside
from backdoor_jax.metrics import ReinjectConfig, reinject

Curve = list[dict[str, float]]
"""One start's rows, by steps."""


@dataclasses.dataclass(frozen=True)
class Reinjection(Analysis):
    """How soon training on poisoned images brings the attack back: from a repair, a clean model and an untrained one.

    Attributes:
        config: how the backdoor is injected; the settings are ours.
    """

    name: ClassVar[str] = "reinjection"
    title: ClassVar[str] = "A backdoor injected again"
    note: ClassVar[str] = (
        "Training continues on the defender's images, some of them poisoned: from each repaired model, from a clean "
        "model, and from an untrained one. The protocol is ours."
    )

    config: ReinjectConfig = ReinjectConfig(rates=(0.01, 0.1), epochs=(1, 2, 5, 10), batch_size=32)  # noqa: RUF009

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """Continues training from a repair, or for a victim from the clean and an untrained model.

        It is None for clean models, and where no rate poisons any of the defender's images.
        """
        if subject.trigger is None or subject.label_map is None:
            return None
        rates = tuple(rate for rate in self.config.rates if round(rate * len(context.clean)))
        if not rates:
            return None
        if subject.original is not None:
            starts = {"repaired": subject.variables}
        else:
            untrained = context.classifier.init(context.key_for("fresh"), context.clean.images[:1])
            starts = {"clean": context.clean_model, "untrained": untrained}
        found = reinject(
            context.key_for("reinjection"),
            context.classifier,
            starts,
            context.clean,
            context.task.test,
            subject.trigger,
            subject.label_map,
            dataclasses.replace(self.config, rates=rates, flip=context.task.flip),
        )
        return {
            "rows": [
                {"start": row.start, "rate": row.rate, "steps": row.steps, "poisoned": row.poisoned}
                | {"acc": row.scores.acc, "asr": row.scores.asr}
                for row in found
            ]
        }

    def draw(self, rows: list[Row]) -> Figure | None:
        """ASR against training steps: a panel for each attack and poisoned share, a curve for each start."""
        found = self.findings(rows)
        panels: dict[tuple[str, float], dict[str, list[Curve]]] = {}
        for attack, defenses in found.items():
            for defense, seeds in defenses.items():
                for seed in seeds:
                    for start, rate in dict.fromkeys((row["start"], row["rate"]) for row in seed["rows"]):
                        curve = [row for row in seed["rows"] if (row["start"], row["rate"]) == (start, rate)]
                        name = defense if start == "repaired" else start
                        panels.setdefault((attack, rate), {}).setdefault(name, []).append(curve)
        if not panels:
            return None
        columns = len({rate for _, rate in panels})
        figure = Figure(figsize=(3.4 * columns + 1.5, 2.6 * len(found)))
        names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
        colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
        grid = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False)
        for axes, ((attack, rate), curves) in zip(grid.flat, panels.items(), strict=False):
            for name, of_seeds in curves.items():
                steps = [row["steps"] for row in of_seeds[0]]
                asr = np.mean([[row["asr"] for row in curve] for curve in of_seeds], axis=0)
                axes.plot(steps, 100 * asr, marker="o", markersize=3, color=colors[name])
            axes.set_title(f"{attack}, {100 * rate:g} % poisoned", fontsize=9)
            axes.set_xlabel("steps", fontsize=8)
            axes.grid(alpha=0.3)
        for axes in grid[:, 0]:
            axes.set_ylabel("ASR %")
        for name, color in colors.items():
            grid[0, -1].plot([], [], color=color, label=name)
        legend_beside(grid[0, -1], fontsize=8)
        figure.tight_layout()
        return figure
