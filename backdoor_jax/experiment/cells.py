"""Cells of an experiment: a victim or a clean model, or one repair of it, and the row that each gives."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from backdoor_jax.analyses import ANALYSES, AnalysisContext, Subject
from backdoor_jax.analyses.base import Finding, Row
from backdoor_jax.data import Dataset
from backdoor_jax.defenses import Defense, Repair
from backdoor_jax.experiment.rows import environment, rates
from backdoor_jax.experiment.settings import AttackEntry, DefenseEntry, Experiment
from backdoor_jax.experiment.victims import (
    TrainedModel,
    Workspace,
    clean_subset,
    judge,
    load_stored,
    make_model,
    prepare_model,
    streams,
)
from backdoor_jax.metrics import Scores, is_near_chance
from backdoor_jax.models import Variables
from backdoor_jax.training import Stopwatch


def label_of(entry: AttackEntry | None) -> str:
    """What results call an attack; ``none`` where there is none."""
    return entry.label if entry else "none"


def missing(experiment: Experiment, entry: AttackEntry | None, seed: int, rows: list[Row]) -> list[DefenseEntry | None]:
    """The defenses that have no row yet on a model; None, first, for the model itself."""
    done = {row["defense"] for row in rows if (row["attack"], row["seed"]) == (label_of(entry), seed)}
    attack = entry.attack if entry else None
    absent = [defense for defense in experiment.defenses if defense.applies(attack) and defense.label not in done]
    return [*([] if "none" in done else [None]), *absent]


def make_cell_model(workspace: Workspace, entry: AttackEntry | None, seed: int) -> None:
    """Trains and stores the victim or clean model that cells work on, unless it is stored."""
    make_model(workspace, entry, seed, _needed_clean_model(workspace, entry, seed))


def load_cell_model(workspace: Workspace, entry: AttackEntry | None, seed: int) -> TrainedModel:
    """The victim or clean model that cells work on, made unless it is stored."""
    return prepare_model(workspace, entry, seed, _needed_clean_model(workspace, entry, seed))


def _needed_clean_model(workspace: Workspace, entry: AttackEntry | None, seed: int) -> Variables | None:
    """The clean model of a seed, for an attack that uses it."""
    return _clean_model(workspace, seed) if entry and entry.attack.needs_clean_model else None


def make_row(
    workspace: Workspace,
    entry: AttackEntry | None,
    model: TrainedModel,
    defense: DefenseEntry | None,
    context: AnalysisContext,
) -> Row:
    """The row of a model, or of its repair where there is a defense.

    Raises:
        UserError: where the defense fails, or leaves weights that are not finite.
    """
    if defense is None:
        return _row_of_model(workspace, entry, model, _analyze(workspace.experiment, context, model))
    return _row_of_repair(workspace, entry, model, defense, _repair(workspace, entry, model, defense, context))


def _clean_model(workspace: Workspace, seed: int) -> Variables:
    """The variables of the clean model of a seed, trained unless it is stored."""
    make_model(workspace, None, seed)
    return load_stored(workspace, None, seed).variables


def analysis_context(workspace: Workspace, seed: int) -> AnalysisContext:
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


def _row_of_repair(
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


def _row_of_model(
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
