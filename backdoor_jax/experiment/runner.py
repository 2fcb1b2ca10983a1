"""Runs an experiment: trains victims and clean models, runs every defense on each, and writes a row for each model."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from backdoor_jax.analyses import AnalysisContext
from backdoor_jax.analyses.base import Row
from backdoor_jax.data import clean_indices
from backdoor_jax.errors import LONGEST, FailedRepairs, UserError, printable
from backdoor_jax.experiment.cells import analysis_context, label_of, load_cell_model, make_row, missing
from backdoor_jax.experiment.distributed import Place, make_rows
from backdoor_jax.experiment.rows import RESULT, append_row, format_row, read_rows
from backdoor_jax.experiment.settings import AttackEntry, Experiment, describe
from backdoor_jax.experiment.victims import Workspace, make_models, make_workspace, trigger_like
from backdoor_jax.files import held, is_leftover, locked_folder, remove_leftovers, write_text
from backdoor_jax.reading import parse_json, parsing, read_text
from backdoor_jax.stopping import stop_if_asked

if TYPE_CHECKING:
    from distributed import Client

RESULTS = "results.jsonl"


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    root: Path = Path(),
    report: Callable[[str], None] = print,
    devices: Sequence[jax.Device] | None = None,
    client: "Client | None" = None,
) -> list[Row]:
    """Runs what is missing of an experiment.

    Args:
        experiment: what to run.
        out: its folder: ``results.jsonl``, ``experiment.json``, ``victims/``, ``examples/``.
        root: where relative paths of data start.
        report: called with a line of text for each note on the data and after each row.
        devices: where there are several, the victims of all seeds are trained at once over them; by default all
            accelerators, or one CPU device, because CPU devices share their cores (`benchmarks/scaling.py` measures
            it).
        client: of a Dask cluster whose workers do the work, such as one of `backdoor_jax.experiment.workers`; they
            must see ``out`` under the same path. By default this process does it.

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
        >>> from backdoor_jax.experiment import DataConfig, DefenseEntry, ModelConfig
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
        for note in workspace.task.notes:
            report(printable(note, LONGEST))
        rows = read_rows(out / RESULTS, RESULT, experiment.name)
        without = sum("analyses" not in row for row in rows) if experiment.analyses else 0
        if without:
            report(f"{without} rows were made without analyses; remove them from {out / RESULTS} to make them again")
        if client:
            failed = make_rows(client, Place(experiment, out.resolve(), root.resolve()), out / RESULTS, report)
        else:
            failed = _run(workspace, report, devices)
    if failed:
        raise FailedRepairs(f"{len(failed)} repairs failed; {failed[0]}")
    return in_order(read_rows(out / RESULTS), experiment)


def in_order(rows: list[Row], experiment: Experiment) -> list[Row]:
    """Rows in the order of an experiment, whatever order they were made in; those that it does not name come last."""
    seeds = list(experiment.seeds)
    attacks = [*(entry.label for entry in experiment.attacks), "none"]
    defenses = ["none", *(entry.label for entry in experiment.defenses)]

    def place(row: Row) -> tuple[int, ...]:
        fields = (("seed", seeds), ("attack", attacks), ("defense", defenses))
        return tuple(known.index(row[name]) if row[name] in known else len(known) for name, known in fields)

    return sorted(rows, key=place)


def _run(workspace: Workspace, report: Callable[[str], None], devices: Sequence[jax.Device] | None) -> list[str]:
    """Writes the missing rows of an experiment whose folder is held; returns what failed."""
    experiment = workspace.experiment
    attacks: list[AttackEntry | None] = [*experiment.attacks, None]
    if devices is None:
        devices = jax.devices() if jax.default_backend() != "cpu" else jax.devices()[:1]
    if len(devices) > 1 and len(experiment.seeds) > 1:
        for entry in attacks:
            make_models(workspace, entry, devices)
    failed: list[str] = []
    for seed in experiment.seeds:
        context = analysis_context(workspace, seed)
        for entry in attacks:
            failed += _run_attack(workspace, entry, seed, context, report)
    return failed


def _run_attack(
    workspace: Workspace,
    entry: AttackEntry | None,
    seed: int,
    context: AnalysisContext,
    report: Callable[[str], None],
) -> list[str]:
    """Writes the missing rows of one victim or clean model and of its repairs; returns what failed."""
    path = workspace.folder / RESULTS
    absent = missing(workspace.experiment, entry, seed, read_rows(path))
    if not absent:
        return []
    model = load_cell_model(workspace, entry, seed)
    failed = []
    for defense in absent:
        try:
            row = make_row(workspace, entry, model, defense, context)
        except UserError as error:
            if defense is None:
                raise
            failed.append(f"{defense.label} on {label_of(entry)}-{seed}: {error}")
            report(failed[-1])
            continue
        append_row(path, row)
        report(format_row(row))
        stop_if_asked()
    return failed


def _check(workspace: Workspace) -> None:
    """Finds what the data rule out, before anything is trained or written."""
    experiment, task = workspace.experiment, workspace.task
    jax.eval_shape(workspace.classifier.init, jax.random.key(0), task.test.images[:1])
    for entry in experiment.attacks:
        entry.attack.label_map(task.num_classes)
        entry.attack.candidates(task.train.labels)
        trigger_like(entry.attack, task)
    side = min(task.train.images.shape[1:3])
    trained = [("victim", experiment.victim), *((entry.label, entry.victim) for entry in experiment.attacks)]
    for name, config in [*trained, *((entry.label, entry.defense) for entry in experiment.defenses)]:
        crop = getattr(config, "crop", 0)
        if crop >= side:
            raise UserError(f"{name}: crop is {crop} for images with a side of {side}, expected less; lower it")
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
    """Marks a folder as this experiment's, or refuses one that holds another; entries and seeds may be added.

    A run that made nothing has no claim; the lock of another seed is that of a run which may yet.
    """
    described = describe(experiment)
    path = out / DESCRIBED
    own = {DESCRIBED, *(f".seed-{seed}.lock" for seed in experiment.seeds)}
    made = any(file.name not in own for file in out.rglob("*") if not file.is_dir())
    if path.is_file():
        with parsing(path, "does not describe an experiment", "give another --out"):
            earlier = parse_json(read_text(path, "give another --out"))
            if made or set(earlier) != set(described):
                _join(described, earlier, path)
    write_text(path, json.dumps(described, indent=1))


def _join(described: dict[str, Any], earlier: dict[str, Any], path: Path) -> None:
    """Adds the entries and seeds of a folder's description to another one, which must be of the same experiment."""
    for part in ("name", "data", "model", "victim", "clean_ratio", "stratified"):
        if earlier.get(part) != described[part]:
            raise UserError(
                f"{path}: holds another experiment ({part} is {earlier.get(part)}, here {described[part]}); "
                "give another --out"
            )
    for part in ("attacks", "defenses"):
        for label in earlier[part].keys() & described[part].keys():
            if earlier[part][label] != described[part][label]:
                raise UserError(f"{path}: has {label!r} with other settings; give another --out or another label")
        described[part] = {**earlier[part], **described[part]}
    for part in ("seeds", "analyses"):
        described[part] = list(dict.fromkeys([*earlier[part], *described[part]]))
