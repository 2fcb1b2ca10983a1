"""Membership inference before and after a repair, after super-fine-tuning; see `backdoor_jax.metrics.sequela`."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject, mean_over_seeds, model_title
from backdoor_jax.data import Dataset
from backdoor_jax.drawing import COLORS, legend_beside
from backdoor_jax.metrics import confidence_signal, loss_signal, membership, shadow_signal
from backdoor_jax.models import Classifier, Variables

Signal = Callable[[Classifier, Variables, Dataset], jax.Array]
"""What an attacker sees of each image."""


@dataclasses.dataclass(frozen=True)
class MembershipInference(Analysis):
    """Three membership attacks on a model: its clean training images against the second half of the test set.

    Where the test set comes from another source, that alone may give its images away. So where training images were
    left out, the loss is also judged against those.
    """

    name: ClassVar[str] = "membership"
    title: ClassVar[str] = "Membership inference"
    note: ClassVar[str] = (
        "How well an attacker tells training images from test images, before and after a repair, and from images of "
        "the same source that were left out of the training set, where there are some. The protocol is ours."
    )

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """Evaluates the attacks on any model."""
        classifier, variables, test = context.classifier, subject.variables, context.test
        others = test.take(slice(len(test) // 2, len(test)))
        clean = np.setdiff1d(np.arange(len(subject.training_set)), subject.poisoned)
        draw_key, *keys = jax.random.split(context.key_for("membership"), 4)
        drawn = np.asarray(jax.random.permutation(draw_key, clean))[: len(others)]
        members = subject.training_set.take(drawn)

        def of(signal: Signal) -> list[jax.Array]:
            return [signal(classifier, variables, part) for part in (members, others)]

        def shadowed(classifier: Classifier, variables: Variables, data: Dataset) -> jax.Array:
            return shadow_signal(classifier, context.shadow, variables, data)

        pairs = {"loss": of(loss_signal), "confidence": of(confidence_signal), "shadow": of(shadowed)}
        if (left_out := context.task.left_out) is not None:
            pairs["loss, left-out images"] = [pairs["loss"][0], loss_signal(classifier, variables, left_out)]
            keys.append(context.key_for("left_out"))
        return {
            name: {measure: list(interval) for measure, interval in membership(key, *pair)._asdict().items()}
            for key, (name, pair) in zip(keys, pairs.items(), strict=True)
        }

    def draw(self, rows: list[Row]) -> Figure | None:
        """The AUC of each attack on each model, with bootstrap intervals; 0.5 is guessing."""
        found = [
            (model_title(attack, defense), seeds)
            for attack, defenses in self.findings(rows).items()
            for defense, seeds in defenses.items()
        ]
        if not found:
            return None
        figure = Figure(figsize=(7.5, 0.8 + 0.32 * len(found)))
        axes: Axes = figure.subplots()
        places = np.arange(len(found))
        signals = list(found[0][1][0])
        for number, signal in enumerate(signals):
            intervals = np.array([mean_over_seeds(seeds, signal, "auc") for _, seeds in found])
            value, low, high = intervals.T
            axes.errorbar(
                value,
                places + 0.2 * (number - (len(signals) - 1) / 2),
                xerr=np.maximum([value - low, high - value], 0),
                fmt="o",
                markersize=4,
                color=COLORS[number],
                label=signal,
            )
        axes.axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axes.set_yticks(places, [title for title, _ in found], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("AUC: chance that a training image's signal exceeds another image's")
        legend_beside(axes, fontsize=8)
        figure.tight_layout()
        return figure
