"""Runs an experiment: victims, then every defence on each, and a row for each judged model."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from backdoor_jax.config import Config
from backdoor_jax.data import Task, clean_indices
from backdoor_jax.defenses import DEFENSES, Repair
from backdoor_jax.errors import FailedRepairs, UserError
from backdoor_jax.experiment.analyses import Laboratory
from backdoor_jax.experiment.rows import Row, judgement, line, read_rows, where, write_rows
from backdoor_jax.experiment.settings import (
    AttackEntry,
    DataConfig,
    DefenseEntry,
    Experiment,
    ModelConfig,
    describe,
)
from backdoor_jax.experiment.victims import (
    RECORD,
    Victim,
    prepare_task,
    prepare_together,
    prepare_victim,
    streams,
    trigger_like,
)
from backdoor_jax.files import write_text
from backdoor_jax.interop.native import DESCRIPTION, describe_folder
from backdoor_jax.metrics import Scores, evaluate
from backdoor_jax.models import Classifier
from backdoor_jax.training import Stopwatch, TrainConfig


class Repaired(NamedTuple):
    """A repair with its cost and its judgement, kept while its victim is at hand."""

    label: str
    repair: Repair
    seconds: float
    compile_seconds: float
    scores: Scores
    found: dict[str, Any]


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    root: Path = Path(),
    report: Callable[[str], None] = print,
    proceed: Callable[[], bool] = lambda: True,
    devices: Sequence[jax.Device] | None = None,
) -> list[Row]:
    """Runs what is not done yet of an experiment.

    Args:
        experiment: what to run.
        out: its folder: ``results.jsonl``, ``experiment.json``, ``victims/``, ``examples/``.
        root: where relative paths of data start.
        report: told a line after each row.
        proceed: asked before each victim and each defence; False ends the run there, to go on another time.
        devices: where there are several, victims of all seeds are trained at once over them; by default all
            accelerators, or one CPU device: cores are shared by whatever runs (`benchmarks/scaling.py` measures it).

    Returns:
        All rows of the folder, this run's and earlier ones.

    Raises:
        UserError: where the folder holds another experiment, or anything in the configuration cannot be used.
        FailedRepairs: at the end, where a defence could not repair a model, or left it without finite weights; there is
            no row of that.

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
    task, classifier = prepare_task(experiment, root)
    _check(experiment, task, classifier)
    _claim(experiment, out)
    for record in out.glob(f"victims/*/{RECORD}"):
        if not (record.parent / DESCRIPTION).is_file():  # Made by a version whose victims did not say what they were.
            shapes = jax.eval_shape(classifier.init, jax.random.key(0), task.test.images[:1])
            describe_folder(record.parent, classifier, shapes)
    path = out / "results.jsonl"
    rows = read_rows(path)
    unseen = sum("analyses" not in row for row in rows) if experiment.analyses else 0
    if unseen:
        report(
            f"{unseen} rows were made before analyses were asked for; take them out of {path} to have them made again"
        )
    failed: list[str] = []

    def add(row: Row) -> None:
        # Another process may have written rows of other seeds meanwhile.
        rows[:] = [*read_rows(path), row]
        write_rows(path, rows)
        report(line(row))

    attacks: list[AttackEntry | None] = [*experiment.attacks, None]
    if devices is None:
        devices = jax.devices() if jax.default_backend() != "cpu" else jax.devices()[:1]
    if len(devices) > 1 and len(experiment.seeds) > 1:
        for entry in attacks:
            if not proceed():
                return rows
            prepare_together(experiment, task, classifier, entry, out, devices)
    for seed in experiment.seeds:
        laboratory = Laboratory(experiment, seed, classifier, task, out)
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
                clean_model = prepare_victim(experiment, task, classifier, None, seed, out).variables
            if not proceed():
                return rows
            victim = prepare_victim(experiment, task, classifier, entry, seed, out, clean_model)
            if "none" not in done:
                add(_victim_row(experiment, task, entry, victim, laboratory))
            repairs: dict[tuple[str, Config], Repaired] = {}
            for defense in missing:
                if not proceed():
                    return rows
                try:
                    add(_defend(experiment, task, classifier, entry, victim, defense, repairs, laboratory))
                except UserError as error:
                    failed.append(f"{defense.label} on {label}-{seed}: {error}")
                    report(failed[-1])
    if failed:
        raise FailedRepairs(f"{len(failed)} repairs could not be made; {failed[0]}")
    return rows


def _check(experiment: Experiment, task: Task, classifier: Classifier) -> None:
    """Finds what the data rule out before anything is trained or written."""
    jax.eval_shape(classifier.init, jax.random.key(0), task.test.images[:1])
    for entry in experiment.attacks:
        entry.attack.label_map(task.num_classes)
        entry.attack.candidates(task.train.labels)
        trigger_like(entry.attack, task)
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
        for part in ("seeds", "analyses"):
            described[part] = list(dict.fromkeys([*earlier.get(part, []), *described[part]]))
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not the folder of an experiment; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); give another --out") from error
    write_text(path, json.dumps(described, indent=1))


def _defend(
    experiment: Experiment,
    task: Task,
    classifier: Classifier,
    entry: AttackEntry | None,
    victim: Victim,
    defense: DefenseEntry,
    repairs: dict[tuple[str, Config], Repaired],
    laboratory: Laboratory,
) -> Row:
    """Runs one defence on one victim, or takes over the repair of another entry that came to the same configuration."""
    method = DEFENSES[defense.defense]
    keys = streams(victim.seed, defense.defense)
    data = victim.training_set
    if method.needs == "clean":
        data = laboratory.clean
    elif method.needs == "nothing":
        data = task.train.take(slice(0))
    config: Any = defense.config
    if defense.known_target and entry:
        config = dataclasses.replace(config, target=entry.attack.target)
    if hasattr(config, "flip") and config.flip is None:
        config = dataclasses.replace(config, flip=task.flip)

    name = f"{defense.label} on {victim.label}-{victim.seed}"
    concrete: Any = config
    found: dict[str, Any] = {}
    with Stopwatch() as choosing:
        if method.choose is not None:
            concrete, found = method.choose(classifier, victim.variables, data, config)
    if concrete is None:
        done = Repaired(defense.label, Repair(victim.variables, {}), choosing.seconds, 0.0, victim.scores, {})
    elif (defense.defense, concrete) in repairs:
        done = repairs[defense.defense, concrete]
        found["same_repair_as"] = done.label
    else:
        with Stopwatch() as watch:
            repair = method.run(keys["defense"], classifier, victim.variables, data, concrete)
            jax.block_until_ready(repair.variables)
        scores = evaluate(classifier, repair.variables, task.test, victim.trigger, victim.label_map, name)
        found_inside = laboratory.look(victim, repair.variables)
        done = Repaired(defense.label, repair, watch.seconds, watch.compile_seconds, scores, found_inside)
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
        **judgement(victim.scores, done.scores),
        "target": info.get("target"),
        # A repair makes its choice itself, so that the one above is not to be counted again.
        "seconds": round(done.seconds, 3),
        "compile_seconds": round(done.compile_seconds + choosing.compile_seconds, 3),
        **where(),
        "config": {
            "attack": dataclasses.asdict(entry.attack) if entry else None,
            "defense": dataclasses.asdict(config),
        },
        "info": info,
        **({"analyses": done.found} if experiment.analyses else {}),
    }


def _victim_row(
    experiment: Experiment, task: Task, entry: AttackEntry | None, victim: Victim, laboratory: Laboratory
) -> Row:
    return {
        **_common(experiment, task, entry, victim),
        "defense": "none",
        "clean_ratio": 0.0,
        "data_used": "nothing",
        "n_used": 0,
        **judgement(victim.scores, victim.scores),
        "target": None,
        "seconds": round(victim.seconds, 3),
        "compile_seconds": round(victim.compile_seconds, 3),
        **where(),
        "config": {
            "attack": dataclasses.asdict(entry.attack) if entry else None,
            "victim": dataclasses.asdict(experiment.training(entry)),
        },
        "info": {
            "changed": False,
            "trained_on": len(victim.training_set),
            "poisoned": len(victim.poisoned),
            **victim.info,
        },
        **({"analyses": laboratory.look(victim)} if experiment.analyses else {}),
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
