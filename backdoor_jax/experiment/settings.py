"""What an experiment is: data, network, attacks, defences, seeds."""

import dataclasses
import json
from typing import Any, Literal, get_args

from backdoor_jax.attacks import ATTACKS, Attack
from backdoor_jax.config import Config
from backdoor_jax.defenses import DEFENSES
from backdoor_jax.errors import UserError
from backdoor_jax.models import Precision, Stem
from backdoor_jax.training import TrainConfig

Analysis = Literal["landscape", "latents", "neurons", "membership", "reinjection"]
"""What can be looked into besides rates; see `backdoor_jax.experiment.analyses`."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """Which data.

    Attributes:
        source: ``digits``, a ``.npz`` file, or ``tfds:NAME``; see `backdoor_jax.data.load_task`.
        train_size: keep that many training images, drawn once; all by default.
        test_size: likewise for the test set.
    """

    source: str = "digits"
    train_size: int | None = None
    test_size: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """Which network.

    Attributes:
        name: from `backdoor_jax.models.MODELS`.
        width: channels of the first layer, or of an attention head.
        stem: of a network that has it as an option; the network's default by default.
        patch: likewise.
        dtype: what it computes in; ``bfloat16`` leaves weights, statistics and losses in float32.
    """

    name: str = "preact_resnet18"
    width: int = 64
    stem: Stem | None = None
    patch: int | None = None
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.width > 0, "width", "at least 1 channel")
        self.require(self.patch is None or self.patch > 0, "patch", "at least 1 pixel, or null")

    @property
    def options(self) -> dict[str, Any]:
        """What is chosen besides name and width."""
        chosen = {"stem": self.stem, "patch": self.patch, "dtype": None if self.dtype == "float32" else self.dtype}
        return {name: value for name, value in chosen.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class AttackEntry(Config):
    """An attack under the name that results show.

    Attributes:
        label: what results show.
        attack: the attack.
        victim: how this one's victims are trained, where it is not as the experiment's others are.
    """

    label: str
    attack: Attack
    victim: TrainConfig | None = None


@dataclasses.dataclass(frozen=True)
class DefenseEntry(Config):
    """A defence under the name that results show.

    Attributes:
        label: what results show.
        defense: from `backdoor_jax.defenses.DEFENSES`.
        config: its configuration.
        known_target: tell it the attacker's target class (an oracle; only for a defence with a `target`). It is then
            not run on the unpoisoned twin, which has none.
    """

    label: str
    defense: str
    config: Config
    known_target: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.defense in DEFENSES, "defense", f"one of {', '.join(DEFENSES)}")
        kind = DEFENSES[self.defense].config
        self.require(isinstance(self.config, kind), "config", f"a {kind.__name__}")
        self.require(not self.known_target or hasattr(self.config, "target"), "known_target", "False for this method")

    def applies(self, attack: Attack | None) -> bool:
        """Whether there is anything to run: an oracle needs an attack with one target class."""
        return not self.known_target or (attack is not None and attack.labels != "all_to_all")


@dataclasses.dataclass(frozen=True)
class Experiment(Config):
    """Everything an experiment is made of.

    Attributes:
        name: what results call it.
        attacks: each trains one victim a seed.
        defenses: each repairs every victim and every twin.
        data: which data.
        model: which network.
        victim: how victims are trained.
        clean_ratio: the defender's share of the clean training set; published 0.05.
        stratified: whether that share is drawn class by class; the benchmark does not.
        seeds: each makes its own poison, weights and clean subset.
        analyses: what rows hold besides rates, of those made from now on.
    """

    name: str
    attacks: tuple[AttackEntry, ...]
    defenses: tuple[DefenseEntry, ...]
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    victim: TrainConfig = TrainConfig()  # noqa: RUF009
    clean_ratio: float = 0.05
    stratified: bool = False
    seeds: tuple[int, ...] = (0,)
    analyses: tuple[Analysis, ...] = ()

    def __post_init__(self) -> None:
        self.require(0 < self.clean_ratio <= 1, "clean_ratio", "a share in (0, 1]")
        self.require(len(self.seeds) > 0, "seeds", "at least one")
        self.require(len(self.attacks) > 0, "attacks", "at least one")
        known = get_args(Analysis)
        self.require(set(self.analyses) <= set(known), "analyses", f"some of {', '.join(known)}")
        for entries in (self.attacks, self.defenses):
            labels = [entry.label for entry in entries]
            twice = sorted({label for label in labels if labels.count(label) > 1} | ({"none"} & set(labels)))
            if twice:
                raise UserError(f"{self.name}: label {twice[0]!r} is taken; give each entry a label of its own")

    def training(self, entry: AttackEntry | None) -> TrainConfig:
        """How victims of an attack are trained, or the unpoisoned twins where there is none."""
        return (entry and entry.victim) or self.victim


def describe(experiment: Experiment) -> dict[str, Any]:
    """An experiment as plain values, entries by label."""
    plain = json.loads(json.dumps(dataclasses.asdict(experiment)))
    plain["attacks"] = {
        entry.label: {"name": attack_name(entry.attack), **dataclasses.asdict(entry.attack)}
        | ({"victim": dataclasses.asdict(entry.victim)} if entry.victim else {})
        for entry in experiment.attacks
    }
    plain["defenses"] = {entry["label"]: entry for entry in plain["defenses"]}
    return plain


def attack_name(attack: Attack) -> str:
    """The registry's name of an attack."""
    return next(name for name, kind in ATTACKS.items() if type(attack) is kind)
