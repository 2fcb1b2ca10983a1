"""``backdoor-jax run`` and ``demo``: experiments, their table and their page."""

import argparse
import contextlib
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from backdoor_jax.cli.streams import print_wide
from backdoor_jax.errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from distributed import Client

    from backdoor_jax.analyses.base import Row


def demo(parsed: argparse.Namespace) -> None:
    """Runs the experiment that comes with the package."""
    with resources.as_file(resources.files("backdoor_jax") / "demo.yaml") as config:
        _experiment(parsed, config, parsed.out, (f"seeds=[{parsed.seed}]",))


def run(parsed: argparse.Namespace) -> None:
    """Runs the experiment of a file."""
    out = parsed.out or Path("runs") / parsed.config.stem
    _experiment(parsed, parsed.config, out, parsed.overrides, _cluster(parsed, out))


def cluster_option(parsed: argparse.Namespace) -> str | None:
    """The option by which a command asks for a cluster, where it does."""
    options = ("workers", "scheduler", "slurm")
    return next((name for name in options if getattr(parsed, name, None) is not None), None)


def _cluster(parsed: argparse.Namespace, out: Path) -> "AbstractContextManager[Client | None]":
    """The cluster that a command asks for, or none."""
    option = cluster_option(parsed)
    if option is None:
        return contextlib.nullcontext()
    try:
        from backdoor_jax.experiment.workers import local_workers, slurm_workers, workers_of
    except ImportError as error:
        raise UserError(f"--{option} needs Dask; pip install 'backdoor_jax[distributed]'") from error
    if option == "workers":
        return local_workers(parsed.workers)
    if option == "scheduler":
        return workers_of(parsed.scheduler)
    # The keys of its connections lie beside the folder, which holds results alone.
    return slurm_workers(parsed.slurm, out.parent)


def _experiment(
    parsed: argparse.Namespace,
    config: Path,
    out: Path,
    overrides: tuple[str, ...],
    cluster: "AbstractContextManager[Client | None]" = contextlib.nullcontext(),
) -> None:
    """Runs an experiment, and prints its rows, their table and where the page is."""
    from backdoor_jax.config_files import load_experiment
    from backdoor_jax.errors import FailedRepairs
    from backdoor_jax.experiment import RESULT, in_order, read_rows, run_experiment
    from backdoor_jax.report import lead, summarize, write_page

    def report(line: str) -> None:
        if not (parsed.quiet or parsed.json):
            print(line, flush=True)

    experiment, failed = load_experiment(config, overrides), None
    with cluster as client:
        try:
            run_experiment(experiment, out, report=report, client=client)
        except FailedRepairs as error:
            failed = error
    rows = in_order(read_rows(out / "results.jsonl", RESULT, experiment.name), experiment)
    page = write_page(rows, out) if rows else None
    if parsed.json:
        results = [summary._asdict() for summary in summarize(rows)]
        print(json.dumps({"answer": lead(rows), "results": results, "page": str(page)}, indent=2))
    else:
        print_table(rows)
        print("\n".join([*lead(rows), f"{page}: open it in a browser"]))
    if failed:
        raise failed


def print_table(rows: "list[Row]") -> None:
    """Prints the table of an experiment."""
    from rich.table import Table
    from rich.text import Text

    from backdoor_jax.report.table import COLUMNS, cells, summarize

    table = Table(title="What each defense did to each model")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("attack", "defense", "data") else "right", no_wrap=True)
    last = None
    for summary in summarize(rows):
        if last not in (None, summary.attack):
            table.add_section()
        last = summary.attack
        table.add_row(*map(Text, cells(summary)))
    print_wide(table)
