"""The cells of an experiment on the workers of a Dask cluster, while this process alone writes rows.

The graph: every victim and clean model is a task, and its row and those of its repairs are tasks that follow it.
Workers keep models in the experiment's folder, which all of them see, and return rows. A task whose worker is lost is
run again on another, where a training resumes at its last checkpoint.
"""

import contextlib
import functools
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backdoor_jax.analyses import AnalysisContext
from backdoor_jax.analyses.base import Row
from backdoor_jax.compiling import use_program_cache
from backdoor_jax.errors import UserError
from backdoor_jax.experiment.cells import (
    analysis_context,
    label_of,
    load_cell_model,
    make_cell_model,
    make_row,
    missing,
)
from backdoor_jax.experiment.live import LiveTable, Position
from backdoor_jax.experiment.rows import append_row, format_row, plain, read_rows
from backdoor_jax.experiment.settings import AttackEntry, Experiment
from backdoor_jax.experiment.victims import TrainedModel, Workspace, make_workspace
from backdoor_jax.files import locked_folder
from backdoor_jax.progress import hidden_bars
from backdoor_jax.stopping import stop_if_asked

if TYPE_CHECKING:
    from distributed import Client, Future

SECONDS = 0.5
"""How often a request to stop is looked for, and the table renewed."""
LOST = ("cancelled", "lost")
"""States of a task whose scheduler is gone."""


class Place(NamedTuple):
    """What a worker needs to open a workspace: the experiment, its folder, and where relative paths of data start."""

    experiment: Experiment
    folder: Path
    root: Path


def make_rows(client: "Client", place: Place, path: Path, report: Callable[[str], None]) -> list[str]:
    """Makes the missing rows of an experiment on a cluster; returns what failed.

    Args:
        client: of the cluster.
        place: the experiment; its folder is held by this process.
        path: the file of rows.
        report: called with a line of text after each row.

    Raises:
        UserError: where a victim cannot be made, a task loses worker after worker, or the scheduler is gone.
    """
    failed: list[str] = []
    pending = submit_cells(client, place, read_rows(path))
    with LiveTable(list(pending.values())) as table:
        while pending:
            _wait(list(pending))
            for future in [future for future in pending if future.status != "pending"]:
                cell = pending.pop(future)
                found = _result(future, cell)
                if isinstance(found, str):
                    failed.append(f"{cell[1]} on {cell[0]}: {found}")
                    report(failed[-1])
                elif found is not None:
                    append_row(path, found)
                    report(format_row(found))
                table.end(cell, _text(found))
            if table.shown and pending:
                running = {key for keys in client.processing().values() for key in keys}
                table.run([cell for future, cell in pending.items() if future.key in running])
            stop_if_asked()
    return failed


def submit_cells(client: "Client", place: Place, rows: list[Row]) -> "dict[Future, Position]":
    """Submits what is missing, seed by seed: each model, then its row and those of its repairs."""
    experiment = place.experiment
    tasks: dict[Future, Position] = {}
    run = secrets.token_hex(4)  # A cluster may remember the tasks of an earlier run.

    def submit(kind: str, name: str, column: str, function: Callable[..., Any], *words: Any) -> "Future":
        task = client.submit(function, place, *words, key=f"{kind} {name} {column} {run}", pure=False)
        tasks[task] = (name, column)
        return task

    # The attacks whose tasks read the clean model of their seed.
    readers = {entry.label for entry in experiment.attacks if experiment.analyses or entry.attack.needs_clean_model}
    for seed in experiment.seeds:
        absent = {label_of(entry): missing(experiment, entry, seed, rows) for entry in [None, *experiment.attacks]}
        clean: list[Future] = []
        for label, defenses in absent.items():
            if not defenses and not (label == "none" and any(absent[reader] for reader in readers)):
                continue
            name, before = f"{label}-{seed}", clean if label in readers else []
            model = submit("model", name, "none", train_model, label, seed, before)
            if label == "none":
                clean = [model]
            for defense in defenses:
                chosen = defense.label if defense else "none"
                submit("row", name, chosen, find_row, label, seed, chosen, [model, *before])
    return tasks


@hidden_bars()  # Workers may share a terminal.
def train_model(place: Place, label: str, seed: int, before: Sequence[None]) -> None:
    """A task: trains and stores a victim or a clean model, unless it is stored.

    Args:
        place: the experiment.
        label: the attack's, or ``none``.
        seed: the model's.
        before: results of the tasks that this one follows.
    """
    del before
    workspace = _workspace(place)
    folder = workspace.model_folder(label, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder):  # A worker that was given up may be working still.
        make_cell_model(workspace, _entry(place, label), seed)


@hidden_bars()
def find_row(place: Place, label: str, seed: int, defense: str, before: Sequence[None]) -> Row | str:
    """A task: the row of a model or of its repair, or what failed.

    Args:
        place: the experiment.
        label: the attack's, or ``none``.
        seed: the model's.
        defense: its label, or ``none``.
        before: results of the tasks that this one follows.

    Raises:
        UserError: where the model itself cannot be used.
    """
    del before
    workspace, model = _workspace(place), _model(place, label, seed)
    chosen = next((entry for entry in place.experiment.defenses if entry.label == defense), None)
    try:
        row = make_row(workspace, _entry(place, label), model, chosen, _context(place, seed))
    except UserError as error:
        if chosen is None:
            raise
        return str(error)
    return dict(json.loads(json.dumps(row, default=plain)))


def _entry(place: Place, label: str) -> AttackEntry | None:
    return next((entry for entry in place.experiment.attacks if entry.label == label), None)


@functools.lru_cache(maxsize=1)
def _workspace(place: Place) -> Workspace:
    use_program_cache()
    return make_workspace(*place)


@functools.lru_cache(maxsize=1)
def _model(place: Place, label: str, seed: int) -> TrainedModel:
    return load_cell_model(_workspace(place), _entry(place, label), seed)


@functools.lru_cache(maxsize=1)
def _context(place: Place, seed: int) -> AnalysisContext:
    return analysis_context(_workspace(place), seed)


def _wait(tasks: "list[Future]") -> None:
    """Waits until a task ends, at most so long that the table and a request to stop are not forgotten."""
    from distributed import CancelledError, wait

    with contextlib.suppress(TimeoutError, CancelledError):
        wait(tasks, timeout=SECONDS, return_when="FIRST_COMPLETED")


def _result(task: "Future", cell: Position) -> Row | str | None:
    """A row, what failed, or None for a model that is stored.

    Raises:
        UserError: what the task raised, or where its workers or the scheduler were lost.
    """
    from distributed.scheduler import KilledWorker

    if task.status in LOST:
        raise UserError("the scheduler is gone; run this again, which resumes")
    try:
        found: Row | str | None = task.result()
    except KilledWorker as error:
        raise UserError(
            f"{cell[1]} on {cell[0]}: its worker was lost {error.allowed_failures + 1} times, most likely for want of "
            "memory; give fewer workers, and run this again, which resumes"
        ) from error
    return found


def _text(found: Row | str | None) -> str:
    """What the live table shows of an ended task."""
    if found is None:
        return "trained"
    if isinstance(found, str):
        return "failed"
    return " / ".join("-" if found[name] is None else f"{100 * found[name]:.1f}" for name in ("acc", "asr"))
