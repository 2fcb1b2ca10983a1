"""How little brings back an attack that a repair has disabled; see `backdoor_jax.metrics.reactivation`."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
from jax.tree_util import Partial
from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject, mean_over_seeds
from backdoor_jax.config import Count
from backdoor_jax.data import Dataset, LabelMap, Trigger
from backdoor_jax.drawing import COLORS, legend_beside
from backdoor_jax.metrics import NearbyTrigger, ReinjectConfig, SearchConfig, evaluate, reinject, search_nearby, unlearn
from backdoor_jax.models import Variables

BARS = {"trigger": "trigger", "retuned": "after retuning", "nearby": "perturbed trigger", "alone": "perturbation alone"}
"""What is measured of each model, as the figure calls it; all are attack success rates."""


@dataclasses.dataclass(frozen=True)
class Reactivation(Analysis):
    """Attack success after retuning on a few poisoned images, and under a perturbed trigger found without queries.

    Attributes:
        images: the attacker's images, from the training set; published 1,000.
        poisoned: how many of them are poisoned for retuning; published 5.
        retuning: published 5 epochs at a rate of 0.01; the rest is ours.
        search: see `SearchConfig`.
    """

    name: ClassVar[str] = "reactivation"
    title: ClassVar[str] = "A backdoor reactivated"
    note: ClassVar[str] = (
        "ASR of each repair, and of a clean model as the baseline: under the trigger, after fine-tuning on 1,000 "
        "images of which 5 are poisoned, and under the trigger, or a clean image, with a perturbation of 16 gray "
        "levels that was found on the attacker's own copy of the victim."
    )

    images: Count = 1000
    poisoned: Count = 5
    retuning: ReinjectConfig = ReinjectConfig(rates=(0.005,), epochs=(5,))  # noqa: RUF009
    search: SearchConfig = SearchConfig()  # noqa: RUF009

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """Attack success rates of a repair, or of the clean model where the subject is a victim.

        It is None for clean models and their repairs.
        """
        trigger, labels = subject.trigger, subject.label_map
        if trigger is None or labels is None:
            return None
        if subject.original is None:
            start, variables, victim = "clean", context.clean_model, subject.variables
        else:
            start, variables, victim = "repaired", subject.variables, subject.original
        data = self._attackers_images(context)
        share = min(self.poisoned, len(data)) / len(data)
        retuning = dataclasses.replace(self.retuning, rates=(share,), flip=context.task.flip)
        key, test = context.key_for("reactivation"), context.task.test
        before, *_, retuned = reinject(
            key, context.classifier, {start: variables}, data, test, trigger, labels, retuning
        )
        nearby, surrogate = self._search(context, victim, data, trigger, labels)

        def rate(trigger: Trigger, variables: Variables) -> float | None:
            return evaluate(context.classifier, variables, test, trigger, labels).asr

        return {
            "start": start,
            "images": len(data),
            "trigger": before.scores.asr,
            "retuned": retuned.scores.asr,
            "retuned_acc": retuned.scores.acc,
            "nearby": rate(nearby, variables),
            "alone": rate(dataclasses.replace(nearby, trigger=Partial(lambda images: images)), variables),
            "surrogate": rate(nearby, surrogate),
        }

    def _search(
        self, context: AnalysisContext, victim: Variables, data: Dataset, trigger: Trigger, labels: LabelMap
    ) -> tuple[NearbyTrigger, Variables]:
        """The perturbed trigger and the surrogate it was found on, which all repairs of a victim share."""
        kept, _ = context.kept.get(self.name, (None, None))
        if kept is not victim:
            config = dataclasses.replace(self.search, flip=context.task.flip)
            keys = jax.random.split(context.key_for("search"))
            surrogate = unlearn(keys[0], context.classifier, victim, data, trigger, config)
            nearby = search_nearby(keys[1], context.classifier, surrogate, data, trigger, labels, config)
            context.kept[self.name] = victim, (nearby, surrogate)
        found: tuple[NearbyTrigger, Variables] = context.kept[self.name][1]
        return found

    def _attackers_images(self, context: AnalysisContext) -> Dataset:
        """Images of the training set that the attacker has."""
        train = context.task.train
        order = jax.random.permutation(context.key_for("attacker"), len(train))
        return train.take(np.asarray(order[: self.images]))

    def draw(self, rows: list[Row]) -> Figure | None:
        """A panel for each attack, a group of bars for each model; the clean model comes first."""
        found = self.findings(rows)
        if not found:
            return None
        figure = Figure(figsize=(1.5 + 1.1 * max(map(len, found.values())), 2.6 * len(found)))
        grid = figure.subplots(len(found), 1, squeeze=False)
        for axes, (attack, defenses) in zip(grid.flat, found.items(), strict=True):
            for number, (measure, title) in enumerate(BARS.items()):
                heights = [100 * float(mean_over_seeds(seeds, measure)) for seeds in defenses.values()]
                places = np.arange(len(heights)) + 0.2 * (number - 1.5)
                axes.bar(places, heights, 0.18, color=COLORS[number], label=title)
            names = ["clean model" if defense == "none" else defense for defense in defenses]
            axes.set_xticks(range(len(names)), names, fontsize=8)
            axes.set_ylabel("ASR %", fontsize=8)
            axes.set_title(attack, fontsize=9)
        legend_beside(grid[0, 0], fontsize=8)
        figure.tight_layout()
        return figure
