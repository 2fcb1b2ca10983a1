"""The settings of an experiment: data, network, attacks, defenses, seeds."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from backdoor_jax.analyses import ANALYSES
from backdoor_jax.attacks import Attack
from backdoor_jax.config import Config, Count, Seed, Share, Width
from backdoor_jax.defenses import Defense
from backdoor_jax.errors import UserError
from backdoor_jax.models import Precision, Stem
from backdoor_jax.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """The data.

    Attributes:
        source: ``signs``, ``digits``, a ``.npz`` file, a folder of class folders, or ``tfds:NAME``; see
            `backdoor_jax.data.load`.
        image_size: of a folder: side in pixels to which images are resized; by default they need one size.
        train_size: number of training images to keep, drawn once; all by default.
        test_size: number of test images to keep, drawn once; all by default.
    """

    source: str = "digits"
    image_size: Count | None = None
    train_size: Count | None = None
    test_size: Count | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The network.

    Attributes:
        name: from `backdoor_jax.models.MODELS`.
        width: channels of the first layer, or of an attention head.
        stem: of a network that has this option; the network's default by default.
        patch: side of a patch in pixels, of a network that has this option; the network's default by default.
        dtype: what it computes in; ``bfloat16`` leaves weights, statistics and losses in float32.
    """

    name: str = "preact_resnet18"
    width: Width = 64
    stem: Stem | None = None
    patch: Count | None = None
    dtype: Precision = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """What is chosen besides name and width."""
        chosen = {"stem": self.stem, "patch": self.patch, "dtype": None if self.dtype == "float32" else self.dtype}
        return {name: value for name, value in chosen.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class AttackEntry(Config):
    """An attack and its label.

    Attributes:
        label: what results call it.
        attack: the attack.
        victim: how its victims are trained, where that differs from the experiment's other victims.
    """

    label: str
    attack: Attack
    victim: TrainConfig | None = None


@dataclasses.dataclass(frozen=True)
class DefenseEntry(Config):
    """A defense and its label.

    Attributes:
        label: what results call it.
        defense: the defense.
        known_target: give it the attacker's target class, for a defense that is ``targeted``; it is then an oracle, and
            is not run on clean models, which have no target.
    """

    label: str
    defense: Defense
    known_target: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self.known_target or self.defense.targeted, "known_target", "False: the defense has no target")

    def applies(self, attack: Attack | None) -> bool:
        """Whether the defense can be run: an oracle needs an attack with one target class."""
        return not self.known_target or (attack is not None and attack.labels != "all_to_all")


@dataclasses.dataclass(frozen=True)
class Experiment(Config):
    """An experiment.

    Attributes:
        name: what results call it.
        attacks: each trains one victim for each seed.
        defenses: each repairs every victim and every clean model.
        data: the data.
        model: the network.
        victim: how victims are trained.
        clean_ratio: the defender's share of the clean training set; published 0.05.
        stratified: whether that share is drawn from each class; the benchmark draws from all together.
        seeds: each has its own poison, weights and clean subset.
        analyses: what new rows hold besides rates, from `backdoor_jax.analyses.ANALYSES`.
    """

    name: str
    attacks: tuple[AttackEntry, ...]
    defenses: tuple[DefenseEntry, ...]
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    victim: TrainConfig = TrainConfig()  # noqa: RUF009
    clean_ratio: Share = 0.05
    stratified: bool = False
    seeds: tuple[Seed, ...] = (0,)
    analyses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < len(self.seeds) == len(set(self.seeds)), "seeds", "at least one, and each once")
        self.require(len(self.attacks) > 0, "attacks", "at least one")
        known, once = set(self.analyses) <= ANALYSES.keys(), len(self.analyses) == len(set(self.analyses))
        self.require(known and once, "analyses", f"some of {', '.join(ANALYSES)}, each once")
        self._require_labels([entry.label for entry in self.attacks])
        self._require_labels([entry.label for entry in self.defenses])

    def _require_labels(self, labels: Sequence[str]) -> None:
        """Checks that labels differ from each other and from ``none``, which stands for no attack or no defense."""
        taken = {"none"}
        for label in labels:
            if label in taken:
                raise UserError(f"{self.name}: label {label!r} is taken; give each entry its own label")
            taken.add(label)

    def training(self, entry: AttackEntry | None) -> TrainConfig:
        """How victims of an attack are trained, or the clean models where there is none."""
        return (entry and entry.victim) or self.victim


def describe(experiment: Experiment) -> dict[str, Any]:
    """The experiment in plain values, with its entries by label."""
    plain = json.loads(json.dumps(dataclasses.asdict(experiment)))
    plain["attacks"] = {
        entry.label: {"name": entry.attack.name, **described["attack"]}
        | ({"victim": described["victim"]} if entry.victim else {})
        for entry, described in zip(experiment.attacks, plain["attacks"], strict=True)
    }
    plain["defenses"] = {
        entry.label: {"name": entry.defense.name, **described["defense"], "known_target": entry.known_target}
        for entry, described in zip(experiment.defenses, plain["defenses"], strict=True)
    }
    return plain
