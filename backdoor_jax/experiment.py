"""Experiments: a typed configuration in, one row for each judged model out.

An experiment trains, for every seed, one victim an attack and an unpoisoned twin, runs every defence on each, and
judges them on the test set, which chooses nothing. Rows go to ``results.jsonl``; a run that is stopped goes on where
it was.
"""

import dataclasses
import json
import os
import platform
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from backdoor_jax.attacks import ATTACKS, Attack, Scene
from backdoor_jax.config import Config
from backdoor_jax.data import Dataset, LabelMap, Poisoned, Task, Trigger, clean_indices, load_task
from backdoor_jax.defenses import DEFENSES, Repair
from backdoor_jax.errors import UserError
from backdoor_jax.interop.checkpoints import load_tree, save_tree
from backdoor_jax.interop.native import DESCRIPTION, describe_folder, save_model
from backdoor_jax.metrics import Scores, defense_effectiveness, evaluate
from backdoor_jax.models import Classifier, Stem, Variables, build_classifier
from backdoor_jax.training import Stopwatch, TrainConfig, train
from backdoor_jax.version import __version__

Row = dict[str, Any]


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
    """

    name: str = "preact_resnet18"
    width: int = 64
    stem: Stem | None = None
    patch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.width > 0, "width", "at least 1 channel")
        self.require(self.patch is None or self.patch > 0, "patch", "at least 1 pixel, or null")

    @property
    def options(self) -> dict[str, Any]:
        """What is chosen besides name and width."""
        chosen = {"stem": self.stem, "patch": self.patch}
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

    def __post_init__(self) -> None:
        self.require(0 < self.clean_ratio <= 1, "clean_ratio", "a share in (0, 1]")
        self.require(len(self.seeds) > 0, "seeds", "at least one")
        self.require(len(self.attacks) > 0, "attacks", "at least one")
        for entries in (self.attacks, self.defenses):
            labels = [entry.label for entry in entries]
            twice = sorted({label for label in labels if labels.count(label) > 1} | ({"none"} & set(labels)))
            if twice:
                raise UserError(f"{self.name}: label {twice[0]!r} is taken; give each entry a label of its own")


class Victim(NamedTuple):
    """A model to be repaired, and the attacker's means to judge it."""

    label: str
    seed: int
    variables: Variables
    scores: Scores
    training_set: Dataset
    poisoned: np.ndarray
    trigger: Trigger | None
    label_map: LabelMap | None
    info: dict[str, Any]
    seconds: float
    compile_seconds: float


class Repaired(NamedTuple):
    """A repair with its cost and its judgement, kept while its victim is at hand."""

    label: str
    repair: Repair
    seconds: float
    compile_seconds: float
    scores: Scores


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    root: Path = Path(),
    report: Callable[[str], None] = print,
    proceed: Callable[[], bool] = lambda: True,
) -> list[Row]:
    """Runs what is not done yet of an experiment.

    Args:
        experiment: what to run.
        out: its folder: ``results.jsonl``, ``experiment.json``, ``victims/``, ``examples/``.
        root: where relative paths of data start.
        report: told a line after each row.
        proceed: asked before each victim and each defence; False ends the run there, to go on another time.

    Returns:
        All rows of the folder, this run's and earlier ones.

    Raises:
        UserError: where the folder holds another experiment, or anything in the configuration cannot be used.

    Example:
        >>> import tempfile
        >>> from backdoor_jax.attacks import BadNets
        >>> from backdoor_jax.defenses import FineTuneConfig
        >>> experiment = Experiment(
        ...     "tiny",
        ...     (AttackEntry("badnets", BadNets()),),
        ...     (DefenseEntry("finetune", "finetune", FineTuneConfig(steps=1)),),
        ...     DataConfig("digits", train_size=64, test_size=32),
        ...     ModelConfig("small_cnn", width=2),
        ...     TrainConfig(epochs=1),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = run_experiment(experiment, Path(folder), report=lambda line: None)
        >>> [(row["attack"], row["defense"]) for row in rows]
        [('badnets', 'none'), ('badnets', 'finetune'), ('none', 'none'), ('none', 'finetune')]
    """
    task = load_task(experiment.data.source, experiment.data.train_size, experiment.data.test_size, root=root)
    model = experiment.model
    classifier = build_classifier(model.name, task.num_classes, model.width, task.normalization, **model.options)
    _check(experiment, task, classifier)
    _claim(experiment, out)
    for record in out.glob("victims/*/timing.json"):
        if not (record.parent / DESCRIPTION).is_file():  # Made by a version whose victims did not say what they were.
            shapes = jax.eval_shape(classifier.init, jax.random.key(0), task.test.images[:1])
            describe_folder(record.parent, classifier, shapes)
    rows = read_rows(out / "results.jsonl")

    def add(row: Row) -> None:
        rows.append(row)
        write_rows(out / "results.jsonl", rows)
        report(line(row))

    attacks: list[AttackEntry | None] = [*experiment.attacks, None]
    for seed in experiment.seeds:
        for entry in attacks:
            label = entry.label if entry else "none"
            done = {row["defense"] for row in rows if (row["attack"], row["seed"]) == (label, seed)}
            wanted = [d for d in experiment.defenses if d.applies(entry.attack if entry else None)]
            missing = [d for d in wanted if d.label not in done]
            if not missing and "none" in done:
                continue
            clean_model = None
            if entry and entry.attack.needs_clean_model:
                if not proceed():
                    return rows
                clean_model = _victim(experiment, task, classifier, None, seed, out).variables
            if not proceed():
                return rows
            victim = _victim(experiment, task, classifier, entry, seed, out, clean_model)
            if "none" not in done:
                add(_victim_row(experiment, task, entry, victim))
            repairs: dict[tuple[str, Config], Repaired] = {}
            for defense in missing:
                if not proceed():
                    return rows
                add(_defend(experiment, task, classifier, entry, victim, defense, repairs))
    return rows


def _check(experiment: Experiment, task: Task, classifier: Classifier) -> None:
    """Finds what the data rule out before anything is trained or written."""
    jax.eval_shape(classifier.init, jax.random.key(0), task.test.images[:1])
    for entry in experiment.attacks:
        entry.attack.label_map(task.num_classes)
        entry.attack.candidates(task.train.labels)
        _trigger_like(entry.attack, task)
    labels = np.asarray(task.train.labels)
    if any(DEFENSES[entry.defense].needs == "clean" for entry in experiment.defenses):
        clean_indices(jax.random.key(0), labels, experiment.clean_ratio, task.num_classes, experiment.stratified)
    for defense in experiment.defenses:
        target = getattr(defense.config, "target", None)
        if isinstance(target, int) and target >= task.num_classes:
            raise UserError(
                f"{defense.label}: {type(defense.config).__name__}.target is {target}, "
                f"but the data have classes 0 to {task.num_classes - 1}"
            )


def _trigger_like(attack: Attack, task: Task) -> Trigger:
    """The structure and shapes of an attack's trigger."""
    height, width, channels = task.train.images.shape[1:]
    return jax.eval_shape(lambda key: attack.trigger(key, (height, width, channels)), jax.random.key(0))


def _claim(experiment: Experiment, out: Path) -> None:
    """Marks a folder as this experiment's, or refuses one that holds another; entries and seeds may be added."""
    described = describe(experiment)
    path = out / "experiment.json"
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            earlier = None
        if not isinstance(earlier, dict):
            raise UserError(f"{path} is not an experiment's; give another --out")
        for part, kind in (("data", DataConfig), ("model", ModelConfig), ("victim", TrainConfig)):
            # A setting that an older version did not have was at its default.
            if isinstance(earlier.get(part), dict):
                earlier[part] = {**dataclasses.asdict(kind()), **earlier[part]}
        for part in ("name", "data", "model", "victim", "clean_ratio", "stratified"):
            if earlier.get(part) != described[part]:
                raise UserError(
                    f"{out} holds another experiment ({part} is {earlier.get(part)}, here {described[part]}); "
                    "give another --out"
                )
        for part in ("attacks", "defenses"):
            for label in earlier.get(part, {}).keys() & described[part].keys():
                if earlier[part][label] != described[part][label]:
                    raise UserError(f"{out} holds {label!r} with other settings; give another --out or another label")
            described[part] = {**earlier.get(part, {}), **described[part]}
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not the folder of an experiment; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); give another --out") from error
    _write(path, json.dumps(described, indent=1))


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


def _keys(seed: int, label: str) -> dict[str, jax.Array]:
    """One stream of randomness a purpose; the poison's depends on the attack, weights and clean subset do not."""
    key = jax.random.key(seed)
    streams = {
        name: jax.random.fold_in(key, number) for number, name in enumerate(("clean", "victim", "poison", "defense"))
    }
    for name in ("poison", "defense"):
        streams[name] = jax.random.fold_in(streams[name], zlib.crc32(label.encode()))
    return streams


def _victim(
    experiment: Experiment,
    task: Task,
    classifier: Classifier,
    entry: AttackEntry | None,
    seed: int,
    out: Path,
    clean_model: Variables | None = None,
) -> Victim:
    """Makes a victim or unpoisoned twin where there is none yet, and loads it."""
    label = entry.label if entry else "none"
    keys = _keys(seed, label)
    scene = Scene(classifier, task.train, _training(experiment, entry), task.flip, clean_model)
    folder = out / "victims" / f"{label}-{seed}"
    record = folder / "timing.json"
    if not record.is_file():
        name, checkpoints, info = f"{label}-{seed}", folder / "training", {}
        with Stopwatch() as watch:
            if entry:
                planted = entry.attack.plant(keys["poison"], keys["victim"], scene, name=name, checkpoints=checkpoints)
                variables, info = planted.variables, planted.info
            else:
                variables, _ = train(
                    keys["victim"],
                    classifier,
                    task.train,
                    scene.training,
                    flip=task.flip,
                    name=name,
                    checkpoints=checkpoints,
                )
            jax.block_until_ready(variables)
        save_model(folder, classifier, variables)
        if entry and entry.attack.learns:
            save_tree(folder / "trigger", planted.trigger)
            _save_poisoned(folder / "poisoned.npz", planted.poisoned, task.train)
        made = {"seconds": watch.seconds, "compile_seconds": watch.compile_seconds, "info": info}
        _write(record, json.dumps(made, default=_plain))

    like = jax.eval_shape(classifier.init, keys["victim"], task.test.images[:1])
    variables = load_tree(folder / "variables", like)
    poisoned, trigger, label_map = Poisoned(task.train, np.empty(0, np.int64)), None, None
    if entry:
        label_map = entry.attack.label_map(task.num_classes)
        if entry.attack.learns:
            trigger = load_tree(folder / "trigger", _trigger_like(entry.attack, task))
            poisoned = _load_poisoned(folder / "poisoned.npz", task.train)
        else:
            poisoned, trigger, _ = entry.attack.poison(keys["poison"], scene)
        _save_example(out, label, task.test.images[:1], trigger)
    scores = evaluate(classifier, variables, task.test, trigger, label_map, f"victim {label}-{seed}")
    made = json.loads(record.read_text(encoding="utf-8"))
    return Victim(
        label,
        seed,
        variables,
        scores,
        poisoned.data,
        poisoned.indices,
        trigger,
        label_map,
        made.get("info", {}),
        made["seconds"],
        made["compile_seconds"],
    )


def _training(experiment: Experiment, entry: AttackEntry | None) -> TrainConfig:
    return (entry and entry.victim) or experiment.victim


def _save_poisoned(path: Path, poisoned: Poisoned, clean: Dataset) -> None:
    """Writes what a poisoned set has other than the clean one."""
    images, labels = np.asarray(poisoned.data.images), np.asarray(poisoned.data.labels)
    changed = np.flatnonzero(
        np.any(images != np.asarray(clean.images), axis=(1, 2, 3)) | (labels != np.asarray(clean.labels))
    )
    partial = path.with_name(f"{path.stem}.partial.npz")
    np.savez(partial, indices=poisoned.indices, changed=changed, images=images[changed], labels=labels[changed])
    os.replace(partial, path)


def _load_poisoned(path: Path, clean: Dataset) -> Poisoned:
    with np.load(path) as arrays:
        changed = arrays["changed"]
        data = Dataset(clean.images.at[changed].set(arrays["images"]), clean.labels.at[changed].set(arrays["labels"]))
        return Poisoned(data, arrays["indices"])


def _defend(
    experiment: Experiment,
    task: Task,
    classifier: Classifier,
    entry: AttackEntry | None,
    victim: Victim,
    defense: DefenseEntry,
    repairs: dict[tuple[str, Config], Repaired],
) -> Row:
    """Runs one defence on one victim, or takes over the repair of another entry that came to the same configuration."""
    method = DEFENSES[defense.defense]
    keys = _keys(victim.seed, defense.defense)
    data = victim.training_set
    if method.needs == "clean":
        chosen = clean_indices(
            keys["clean"], task.train.labels, experiment.clean_ratio, task.num_classes, experiment.stratified
        )
        data = task.train.take(chosen)
    elif method.needs == "nothing":
        data = task.train.take(slice(0))
    config: Any = defense.config
    if defense.known_target and entry:
        config = dataclasses.replace(config, target=entry.attack.target)

    name = f"{defense.label} on {victim.label}-{victim.seed}"
    concrete: Any = config
    found: dict[str, Any] = {}
    with Stopwatch() as choosing:
        if method.choose is not None:
            concrete, found = method.choose(classifier, victim.variables, data, config)
    if concrete is None:
        done = Repaired(defense.label, Repair(victim.variables, {}), 0.0, 0.0, victim.scores)
    elif (defense.defense, concrete) in repairs:
        done = repairs[defense.defense, concrete]
        found["same_repair_as"] = done.label
    else:
        with Stopwatch() as watch:
            repair = method.run(keys["defense"], classifier, victim.variables, data, concrete)
            jax.block_until_ready(repair.variables)
        scores = evaluate(classifier, repair.variables, task.test, victim.trigger, victim.label_map, name)
        done = Repaired(defense.label, repair, watch.seconds, watch.compile_seconds, scores)
        repairs[defense.defense, concrete] = done

    info = {**done.repair.info, **found}
    if "purified_indices" in info:
        info["purified_poisoned"] = int(np.isin(info.pop("purified_indices"), victim.poisoned).sum())
    return {
        **_common(experiment, task, entry, victim),
        "defense": defense.label,
        "clean_ratio": experiment.clean_ratio if method.needs == "clean" else 0.0,
        "data_used": method.needs,
        "n_used": len(data),
        **_judgement(victim.scores, done.scores),
        "target": info.get("target"),
        "seconds": round(done.seconds + choosing.seconds, 3),
        "compile_seconds": round(done.compile_seconds + choosing.compile_seconds, 3),
        **_where(),
        "config": {
            "attack": dataclasses.asdict(entry.attack) if entry else None,
            "defense": dataclasses.asdict(config),
        },
        "info": info,
    }


def _victim_row(experiment: Experiment, task: Task, entry: AttackEntry | None, victim: Victim) -> Row:
    return {
        **_common(experiment, task, entry, victim),
        "defense": "none",
        "clean_ratio": 0.0,
        "data_used": "nothing",
        "n_used": 0,
        **_judgement(victim.scores, victim.scores),
        "target": None,
        "seconds": round(victim.seconds, 3),
        "compile_seconds": round(victim.compile_seconds, 3),
        **_where(),
        "config": {
            "attack": dataclasses.asdict(entry.attack) if entry else None,
            "victim": dataclasses.asdict(_training(experiment, entry)),
        },
        "info": {
            "changed": False,
            "trained_on": len(victim.training_set),
            "poisoned": len(victim.poisoned),
            **victim.info,
        },
    }


def _common(experiment: Experiment, task: Task, entry: AttackEntry | None, victim: Victim) -> Row:
    model = experiment.model
    return {
        "experiment": experiment.name,
        "dataset": task.name,
        "model": "-".join([f"{model.name}-{model.width}", *(f"{key}={value}" for key, value in model.options.items())]),
        "attack": victim.label,
        "poison_rate": entry.attack.rate if entry else 0.0,
        "seed": victim.seed,
    }


def _judgement(before: Scores, after: Scores) -> Row:
    rates = {**after._asdict(), "der": defense_effectiveness(before, after)}
    rates |= {f"{name}_before": value for name, value in before._asdict().items()}
    return {name: None if value is None else round(value, 6) for name, value in rates.items()}


def _where() -> Row:
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return {
        "device": f"{device.device_kind}{cores}",
        "versions": {"backdoor_jax": __version__}
        | {name: version(name) for name in ("jax", "flax", "optax")}
        | {"python": platform.python_version()},
    }


def line(row: Row) -> str:
    """A row in a line, for the terminal.

    Example:
        >>> rates = {"acc": 0.9, "asr": 0.01, "ra": 0.8, "der": None}
        >>> line({"attack": "badnets", "seed": 0, "defense": "d3", **rates, "seconds": 2})
        'badnets-0      d3               ACC  90.0  ASR   1.0  RA  80.0  DER     -  2.0 s'
    """
    rates = "  ".join(
        f"{name.upper()} {'    -' if row[name] is None else f'{100 * row[name]:5.1f}'}"
        for name in ("acc", "asr", "ra", "der")
    )
    return f"{row['attack'] + '-' + str(row['seed']):14} {row['defense']:16} {rates}  {row['seconds']:.1f} s"


def read_rows(path: Path) -> list[Row]:
    """Rows of a ``results.jsonl``; none where there is no such file.

    Raises:
        UserError: where a line is not JSON.
    """
    if not path.is_file():
        return []
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [json.loads(text)] if text.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}); mend or remove the file") from error
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes all rows, or leaves the old file."""
    _write(path, "".join(json.dumps(row, default=_plain) + "\n" for row in rows))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} in a results row")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _save_example(out: Path, label: str, image: jax.Array, trigger: Trigger) -> None:
    """One test image, clean and triggered, for the report."""
    path = out / "examples" / f"{label}.npz"
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{label}.partial.npz")
    np.savez(partial, clean=np.asarray(image[0]), triggered=np.asarray(trigger(image)[0]))
    os.replace(partial, path)
