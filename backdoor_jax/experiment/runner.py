"""Runs an experiment: trains victims and clean models, runs every defense on each, and writes a row for each model."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from backdoor_jax.analyses import ANALYSES, AnalysisContext, Subject
from backdoor_jax.analyses.base import Finding, Row
from backdoor_jax.data import Dataset, clean_indices
from backdoor_jax.defenses import Defense, Repair
from backdoor_jax.errors import FailedRepairs, UserError
from backdoor_jax.experiment.rows import RESULT, append_row, environment, format_row, rates, read_rows
from backdoor_jax.experiment.settings import AttackEntry, DefenseEntry, Experiment, describe
from backdoor_jax.experiment.victims import (
    TrainedModel,
    Workspace,
    clean_subset,
    judge,
    load_stored,
    make_model,
    make_models,
    make_workspace,
    prepare_model,
    streams,
    trigger_like,
)
from backdoor_jax.files import held, is_leftover, locked_folder, remove_leftovers, write_text
from backdoor_jax.metrics import Scores, is_near_chance
from backdoor_jax.models import Variables
from backdoor_jax.reading import parse_json, parsing, read_text
from backdoor_jax.stopping import stop_if_asked
from backdoor_jax.training import Stopwatch

RESULTS = "results.jsonl"


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    root: Path = Path(),
    report: Callable[[str], None] = print,
    devices: Sequence[jax.Device] | None = None,
) -> list[Row]:
    """Runs what is missing of an experiment.

    Args:
        experiment: what to run.
        out: its folder: ``results.jsonl``, ``experiment.json``, ``victims/``, ``examples/``.
        root: where relative paths of data start.
        report: called with a line of text after each row.
        devices: where there are several, the victims of all seeds are trained at once over them; by default all
            accelerators, or one CPU device, because CPU devices share their cores (`benchmarks/scaling.py` measures
            it).

    Returns:
        All rows of the folder, from this run and others.

    Raises:
        UserError: where the folder holds another experiment, or anything in the configuration cannot be used.
        FailedRepairs: at the end, where a defense failed on a model or left weights that are not finite; such a repair
            has no row.

    Example:
        >>> import tempfile
        >>> from backdoor_jax.attacks import BadNets
        >>> from backdoor_jax.defenses import FineTune
        >>> from backdoor_jax.experiment import DataConfig, ModelConfig
        >>> from backdoor_jax.training import TrainConfig
        >>> experiment = Experiment(
        ...     "tiny",
        ...     (AttackEntry("badnets", BadNets()),),
        ...     (DefenseEntry("finetune", FineTune(steps=1)),),
        ...     DataConfig("digits", train_size=64, test_size=32),
        ...     ModelConfig("small_cnn", width=2),
        ...     TrainConfig(epochs=1),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = run_experiment(experiment, Path(folder), report=lambda line: None)
        >>> [(row["attack"], row["defense"]) for row in rows]
        [('badnets', 'none'), ('badnets', 'finetune'), ('none', 'none'), ('none', 'finetune')]
    """
    workspace = make_workspace(experiment, out, root)
    _check(workspace)
    _require_ours(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created ({error.strerror}); give another --out") from error
    with held(out, [f"seed-{seed}" for seed in experiment.seeds]):
        with locked_folder(out):
            remove_leftovers(out)
            _claim(experiment, out)
        return _run(workspace, report, devices)


def _run(workspace: Workspace, report: Callable[[str], None], devices: Sequence[jax.Device] | None) -> list[Row]:
    """Writes the missing rows of an experiment whose folder is held."""
    experiment, path = workspace.experiment, workspace.folder / RESULTS
    rows = read_rows(path, RESULT)
    without = sum("analyses" not in row for row in rows) if experiment.analyses else 0
    if without:
        report(f"{without} rows were made without analyses; remove them from {path} to make them again")

    attacks: list[AttackEntry | None] = [*experiment.attacks, None]
    if devices is None:
        devices = jax.devices() if jax.default_backend() != "cpu" else jax.devices()[:1]
    if len(devices) > 1 and len(experiment.seeds) > 1:
        for entry in attacks:
            make_models(workspace, entry, devices)
    failed: list[str] = []
    for seed in experiment.seeds:
        context = _analysis_context(workspace, seed)
        for entry in attacks:
            failed += _run_attack(workspace, entry, seed, context, report)
    if failed:
        raise FailedRepairs(f"{len(failed)} repairs failed; {failed[0]}")
    return read_rows(path)


def _run_attack(
    workspace: Workspace,
    entry: AttackEntry | None,
    seed: int,
    context: AnalysisContext,
    report: Callable[[str], None],
) -> list[str]:
    """Writes the missing rows of one victim or clean model and of its repairs; returns what failed."""
    experiment, path = workspace.experiment, workspace.folder / RESULTS
    label, attack = (entry.label, entry.attack) if entry else ("none", None)
    done = {row["defense"] for row in read_rows(path) if (row["attack"], row["seed"]) == (label, seed)}
    missing = [defense for defense in experiment.defenses if defense.applies(attack) and defense.label not in done]
    if not missing and "none" in done:
        return []

    def add(row: Row) -> None:
        append_row(path, row)
        report(format_row(row))
        stop_if_asked()

    clean_model = _clean_model(workspace, seed) if attack and attack.needs_clean_model else None
    model = prepare_model(workspace, entry, seed, clean_model)
    if "none" not in done:
        add(_model_row(workspace, entry, model, _analyze(experiment, context, model)))
    failed = []
    for defense in missing:
        try:
            add(_repair_row(workspace, entry, model, defense, _repair(workspace, entry, model, defense, context)))
        except UserError as error:
            failed.append(f"{defense.label} on {label}-{seed}: {error}")
            report(failed[-1])
    return failed


def _clean_model(workspace: Workspace, seed: int) -> Variables:
    """The variables of the clean model of a seed, trained unless it is stored."""
    make_model(workspace, None, seed)
    return load_stored(workspace, None, seed).variables


def _analysis_context(workspace: Workspace, seed: int) -> AnalysisContext:
    """What the analyses of one seed share."""
    task = workspace.task
    return AnalysisContext(
        workspace.classifier,
        task,
        workspace.experiment.training(None),
        key_for=lambda purpose: streams(seed, purpose)["analysis"],
        load_clean=lambda: task.train.take(clean_subset(workspace, seed)),
        load_clean_model=lambda: _clean_model(workspace, seed),
    )


def _check(workspace: Workspace) -> None:
    """Finds what the data rule out, before anything is trained or written."""
    experiment, task = workspace.experiment, workspace.task
    jax.eval_shape(workspace.classifier.init, jax.random.key(0), task.test.images[:1])
    for entry in experiment.attacks:
        entry.attack.label_map(task.num_classes)
        entry.attack.candidates(task.train.labels)
        trigger_like(entry.attack, task)
    labels = np.asarray(task.train.labels)
    if any(entry.defense.needs == "clean" for entry in experiment.defenses):
        clean_indices(jax.random.key(0), labels, experiment.clean_ratio, task.num_classes, experiment.stratified)
    for defense_entry in experiment.defenses:
        defense: Any = defense_entry.defense
        if defense.targeted and isinstance(defense.target, int) and defense.target >= task.num_classes:
            raise UserError(
                f"{defense_entry.label}: {type(defense).__name__}.target is {defense.target}, "
                f"but the data have classes 0 to {task.num_classes - 1}"
            )


DESCRIBED = "experiment.json"
"""The file that says what a folder's rows are of."""


def _require_ours(out: Path) -> None:
    """Refuses a folder that holds something else, and changes nothing.

    A folder without `DESCRIBED` is ours where it holds only what a run leaves that was killed before it wrote that.
    """
    if (out / DESCRIBED).is_file() or not os.path.lexists(out):
        return
    if not out.is_dir() or not all(
        is_leftover(path) or (path.name.startswith(".seed-") and path.suffix == ".lock") for path in out.iterdir()
    ):
        raise UserError(f"{out} exists and is not the folder of an experiment; give another --out")


def _claim(experiment: Experiment, out: Path) -> None:
    """Marks a folder as this experiment's, or refuses one that holds another; entries and seeds may be added."""
    described = describe(experiment)
    path = out / DESCRIBED
    if path.is_file():
        with parsing(path, "does not describe an experiment", "give another --out"):
            earlier = parse_json(read_text(path, "give another --out"))
            for part in ("name", "data", "model", "victim", "clean_ratio", "stratified"):
                if earlier.get(part) != described[part]:
                    raise UserError(
                        f"{path}: holds another experiment ({part} is {earlier.get(part)}, here {described[part]}); "
                        "give another --out"
                    )
            for part in ("attacks", "defenses"):
                for label in earlier[part].keys() & described[part].keys():
                    if earlier[part][label] != described[part][label]:
                        raise UserError(
                            f"{path}: has {label!r} with other settings; give another --out or another label"
                        )
                described[part] = {**earlier[part], **described[part]}
            for part in ("seeds", "analyses"):
                described[part] = list(dict.fromkeys([*earlier[part], *described[part]]))
    write_text(path, json.dumps(described, indent=1))


class Repaired(NamedTuple):
    """A repair with its cost and its evaluation.

    Attributes:
        defense: with the settings that it was run with.
        repair: what it returned.
        scores: of the repaired model.
        images: how many it received.
        seconds: without compilation.
        compile_seconds: of compilation.
        analyses: what the analyses found in the repaired model.
    """

    defense: Defense
    repair: Repair
    scores: Scores
    images: int
    seconds: float
    compile_seconds: float
    analyses: dict[str, Finding]


def _repair(
    workspace: Workspace,
    entry: AttackEntry | None,
    model: TrainedModel,
    defense_entry: DefenseEntry,
    context: AnalysisContext,
) -> Repaired:
    """Runs a defense on a model and evaluates the repair.

    Raises:
        UserError: where the defense fails, or leaves weights that are not finite.
    """
    task = workspace.task
    defense: Any = defense_entry.defense
    data: Dataset = model.training_set
    if defense.needs == "clean":
        data = context.clean
    elif defense.needs == "nothing":
        data = task.train.take(slice(0))
    changes: dict[str, Any] = {}
    if defense_entry.known_target and entry:
        changes["target"] = entry.attack.target
    if defense.mirrors and defense.flip is None:
        changes["flip"] = task.flip
    defense = dataclasses.replace(defense, **changes)

    key = streams(model.seed, defense.name)["defense"]
    with Stopwatch() as watch:
        repair = defense.repair(key, workspace.classifier, model.variables, data)
        jax.block_until_ready(repair.variables)
    name = f"{defense_entry.label} on {model.label}-{model.seed}"
    scores = judge(workspace, model, repair.variables, name)
    found = _analyze(workspace.experiment, context, model, repair.variables) if repair.changed else {}
    return Repaired(defense, repair, scores, len(data), watch.seconds, watch.compile_seconds, found)


def _analyze(
    experiment: Experiment, context: AnalysisContext, model: TrainedModel, repaired: Variables | None = None
) -> dict[str, Finding]:
    """What the experiment's analyses find in a model, or in its repair."""
    subject = Subject(
        variables=model.variables if repaired is None else repaired,
        original=None if repaired is None else model.variables,
        training_set=model.training_set,
        poisoned=model.poisoned,
        trigger=model.trigger,
        label_map=model.label_map,
    )
    found = {name: ANALYSES[name].compute(context, subject) for name in experiment.analyses}
    return {name: finding for name, finding in found.items() if finding is not None}


def _repair_row(
    workspace: Workspace, entry: AttackEntry | None, model: TrainedModel, defense_entry: DefenseEntry, done: Repaired
) -> Row:
    """The row of a repair."""
    repair, defense = done.repair, done.defense
    info = {"changed": repair.changed, **repair.info}
    if repair.why is not None:
        info["why"] = repair.why
    if repair.scan is not None:
        info["scan"] = repair.scan
    if repair.kept is not None:
        info["purified_poisoned"] = int(np.isin(repair.kept, model.poisoned).sum())
    return {
        **_shared_fields(workspace, entry, model),
        "defense": defense_entry.label,
        "method": defense.name,
        "clean_ratio": workspace.experiment.clean_ratio if defense.needs == "clean" else 0.0,
        "data_used": defense.needs,
        "n_used": done.images,
        **rates(model.scores, done.scores),
        "target": repair.target,
        "seconds": round(done.seconds, 3),
        "compile_seconds": round(done.compile_seconds, 3),
        **environment(),
        "config": {
            "attack": dataclasses.asdict(entry.attack) if entry else None,
            "defense": dataclasses.asdict(defense),
        },
        "info": info,
        **({"analyses": done.analyses} if workspace.experiment.analyses else {}),
    }


def _model_row(
    workspace: Workspace, entry: AttackEntry | None, model: TrainedModel, analyses: dict[str, Finding]
) -> Row:
    """The row of a victim or a clean model itself."""
    experiment = workspace.experiment
    return {
        **_shared_fields(workspace, entry, model),
        "defense": "none",
        "method": "none",
        "clean_ratio": 0.0,
        "data_used": "nothing",
        "n_used": 0,
        **rates(model.scores, model.scores),
        "target": None,
        "seconds": round(model.seconds, 3),
        "compile_seconds": round(model.compile_seconds, 3),
        **environment(),
        "config": {
            "attack": dataclasses.asdict(entry.attack) if entry else None,
            "victim": dataclasses.asdict(experiment.training(entry)),
        },
        "info": {
            "changed": False,
            "trained_on": len(model.training_set),
            "poisoned": len(model.poisoned),
            **model.info,
        },
        **({"analyses": analyses} if experiment.analyses else {}),
    }


def _shared_fields(workspace: Workspace, entry: AttackEntry | None, model: TrainedModel) -> Row:
    """The fields that the rows of a model and of its repairs share."""
    network, labels = workspace.experiment.model, np.asarray(workspace.task.test.labels)
    options = [f"{name}={value}" for name, value in network.options.items()]
    return {
        "experiment": workspace.experiment.name,
        "dataset": workspace.task.name,
        "model": "-".join([f"{network.name}-{network.width}", *options]),
        "attack": model.label,
        "poison_rate": entry.attack.rate if entry else 0.0,
        "seed": model.seed,
        "near_chance": is_near_chance(round(model.scores.acc * len(labels)), labels, workspace.task.num_classes),
    }
