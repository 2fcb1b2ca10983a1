"""What an analysis is, what it works with, and what its figures are drawn from.

Curves and bars of figures are means over seeds; clouds of points are those of an attack's first seed.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib.figure import Figure

from backdoor_jax.config import Config
from backdoor_jax.data import Dataset, LabelMap, Task, Trigger
from backdoor_jax.metrics import shadow_model
from backdoor_jax.metrics.sequela import Shadow
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import TrainConfig

Row = dict[str, Any]
"""A row of results."""
Finding = dict[str, Any]
"""What an analysis found in one model, in plain values and arrays."""
Findings = dict[str, dict[str, list[Finding]]]
"""What an analysis found, by attack and defense, a list over seeds."""


@dataclasses.dataclass(frozen=True)
class AnalysisContext:
    """What the models of one seed are analyzed with; what takes time is made on first use.

    Attributes:
        classifier: the network.
        task: the data.
        training: how the clean model of this seed is trained.
        key_for: a `jax.random` key for each purpose.
        load_clean: returns the defender's images.
        load_clean_model: returns the variables of the clean model of this seed.
        kept: what analyses keep for the next model, under their names.
    """

    classifier: Classifier
    task: Task
    training: TrainConfig
    key_for: Callable[[str], jax.Array]
    load_clean: Callable[[], Dataset]
    load_clean_model: Callable[[], Variables]
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def clean(self) -> Dataset:
        """The defender's images."""
        return self.load_clean()

    @cached_property
    def clean_model(self) -> Variables:
        """The variables of the clean model."""
        return self.load_clean_model()

    @cached_property
    def test(self) -> Dataset:
        """The test set in random order, so that any part of it holds all classes."""
        order = jax.random.permutation(self.key_for("test"), len(self.task.test))
        return self.task.test.take(np.asarray(order))

    @cached_property
    def shadow(self) -> Shadow:
        """A model that a membership attacker trains on half of the first half of the test set."""
        known = self.test.take(slice(0, len(self.test) // 2))
        return shadow_model(self.key_for("shadow"), self.classifier, known, self.training, flip=self.task.flip)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to analyze.

    Attributes:
        variables: the model's.
        original: what a defense repaired to make it; None for a model as it was trained.
        training_set: what it was trained on.
        poisoned: indices of the poisoned images in it.
        trigger: the attacker's; None for a clean model.
        label_map: the attacker's; None for a clean model.
    """

    variables: Variables
    original: Variables | None
    training_set: Dataset
    poisoned: np.ndarray
    trigger: Trigger | None
    label_map: LabelMap | None


@dataclasses.dataclass(frozen=True)
class Analysis(Config):
    """Base of the analyses: what to compute for each model, and how to draw it.

    Class attributes:
        name: what configurations and results call it.
        title: the heading of its section of a page.
        note: what its figure shows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    note: ClassVar[str]

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """What the analysis finds in a model; None where it does not apply to it."""
        raise NotImplementedError

    def draw(self, rows: list[Row]) -> Figure | None:
        """The figure of all rows with its findings; None where there are none."""
        raise NotImplementedError

    def findings(self, rows: list[Row]) -> Findings:
        """What rows hold of it, in their order.

        Example:
            >>> from backdoor_jax.analyses import Latents
            >>> row = {"attack": "badnets", "defense": "d3", "analyses": {"latents": {"labels": [0, 1]}}}
            >>> Latents().findings([row, {"attack": "badnets", "defense": "finetune"}])
            {'badnets': {'d3': [{'labels': [0, 1]}]}}
        """
        found: Findings = {}
        for row in rows:
            if self.name in row.get("analyses", {}):
                found.setdefault(row["attack"], {}).setdefault(row["defense"], []).append(row["analyses"][self.name])
        return found


def model_title(attack: str, defense: str) -> str:
    """What a figure calls a model.

    Example:
        >>> model_title("badnets", "none"), model_title("badnets", "d3")
        ('victim, badnets', 'd3, badnets')
        >>> model_title("none", "none"), model_title("none", "d3")
        ('clean', 'd3, clean')
    """
    if attack == "none":
        return "clean" if defense == "none" else f"{defense}, clean"
    return f"{'victim' if defense == 'none' else defense}, {attack}"


def mean_over_seeds(findings: list[Finding], *path: str) -> np.ndarray:
    """The mean over seeds of the entry at a path.

    Example:
        >>> mean_over_seeds([{"a": {"b": [1, 2]}}, {"a": {"b": [3, 4]}}], "a", "b").tolist()
        [2.0, 3.0]
    """
    values = []
    for finding in findings:
        value: Any = finding
        for name in path:
            value = value[name]
        values.append(value)
    return np.mean(np.asarray(values, np.float64), axis=0)
