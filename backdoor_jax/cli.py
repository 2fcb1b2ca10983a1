"""The command line; it parses, calls and prints."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from backdoor_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, or 2 with one line on stderr for what the user can mend.

    Example:
        >>> main(["run", "nowhere.yaml"])
        2
    """
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (
        parsed.command not in (_run, _defend) or any(text.startswith("-") or "=" not in text for text in rest)
    ):
        parser.error(f"unknown arguments {' '.join(rest)}; settings are given as key=value to run and defend")
    parsed.overrides = tuple(rest)
    _keep_programs()
    try:
        parsed.command(parsed)
    except UserError as error:
        print(f"backdoor-jax: {error}", file=sys.stderr)
        return 2
    return 0


def _keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, where JAX's own settings do not say where, or not to."""
    import jax
    from platformdirs import user_cache_path

    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        config.update("jax_compilation_cache_dir", str(user_cache_path("backdoor_jax", False) / "programs"))
        # A command compiles nearly a hundred small programs, two seconds in all.
        config.update("jax_persistent_cache_min_compile_time_secs", 0)
        # On a CPU jaxlib 0.12 cannot write programs that call oneDNN; those are compiled in every run.
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry", UserWarning)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="backdoor-jax", description="Removes backdoors from image classifiers and measures how well it did."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="six defences on the embedded digits: a table and a page, a few minutes")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for results (default: demo)")
    demo.set_defaults(command=_demo)

    run = commands.add_parser(
        "run",
        help="an experiment; run again, it goes on where it was",
        usage="backdoor-jax run CONFIG.yaml [--out DIR] [key=value ...]",
        description="key=value changes a setting, with dots for what lies deeper: victim.epochs=2 seeds=[0]",
    )
    run.add_argument("config", type=Path, help="experiment in YAML, such as configs/gtsrb_small.yaml")
    run.add_argument("--out", type=Path, help="folder for results (default: runs/ and the file's name)")
    run.set_defaults(command=_run)

    defend = commands.add_parser(
        "defend",
        help="repair a model of your own",
        usage="backdoor-jax defend --checkpoint IN --data CLEAN --defense NAME --out OUT [options] [key=value ...]",
        description="key=value changes a setting of the defence, such as steps=500",
    )
    _suspect(defend)
    defend.add_argument("--defense", required=True, metavar="NAME", help="see list")
    defend.add_argument("--preset", metavar="NAME", help="named settings of the defence")
    defend.add_argument("--test", metavar="DATA", help="images to judge on (default: test images of --data, or all)")
    defend.add_argument("--training-set", metavar="DATA", help="the poisoned set, for a defence that needs it")
    defend.add_argument("--seed", type=int, default=0, help="of the defence (default: 0)")
    defend.add_argument(
        "--out", type=Path, required=True, help="FILE.safetensors, FILE.pt, FILE.jaxexport, or a folder (Orbax)"
    )
    defend.set_defaults(command=_defend)

    scan = commands.add_parser("scan", help="does a model look backdoored, and towards which class")
    _suspect(scan)
    scan.add_argument("--out", type=Path, help="the figure (default: the checkpoint's name and .scan.png)")
    scan.set_defaults(command=_scan)

    listing = commands.add_parser("list", help="the attacks, defences, models and data sets, with a line each")
    listing.set_defaults(command=_list)
    return parser


def _suspect(command: argparse.ArgumentParser) -> None:
    """What a command on a model of one's own takes."""
    command.add_argument(
        "--checkpoint", type=Path, required=True, metavar="IN", help="FILE.safetensors, FILE.pt, or a folder"
    )
    command.add_argument(
        "--data", required=True, help="clean images: FILE.npz, a folder of class folders, digits or tfds:NAME"
    )
    command.add_argument("--model", metavar="NAME", help="network of a PyTorch file, see list")
    command.add_argument(
        "--normalize",
        metavar="HOW",
        help="for a PyTorch file: a data set's name, MEAN/STD as 0.49,0.48,0.45/0.25,0.24,0.26, or none for [0, 1], "
        "the default",
    )
    command.add_argument("--classes", type=int, help="refuse a model with another number of classes")
    command.add_argument("--force", action="store_true", help="replace what is at --out")


def _given(parsed: argparse.Namespace, *names: str) -> dict[str, Any]:
    shared = ("checkpoint", "data", "model", "normalize", "classes", "out", "force")
    return {name: getattr(parsed, name) for name in (*shared, *names)}


def _defend(parsed: argparse.Namespace) -> None:
    from backdoor_jax.commands import defend

    defend(**_given(parsed, "defense", "preset", "test", "training_set", "seed", "overrides"))


def _scan(parsed: argparse.Namespace) -> None:
    from backdoor_jax.commands import scan

    scan(**_given(parsed))


def _demo(parsed: argparse.Namespace) -> None:
    with resources.as_file(resources.files("backdoor_jax") / "demo.yaml") as config:
        _experiment(config, parsed.out, ())


def _run(parsed: argparse.Namespace) -> None:
    _experiment(parsed.config, parsed.out or Path("runs") / parsed.config.stem, parsed.overrides)


def _experiment(config: Path, out: Path, overrides: tuple[str, ...]) -> None:
    from backdoor_jax.config_files import load_experiment
    from backdoor_jax.errors import FailedRepairs
    from backdoor_jax.experiment import run_experiment
    from backdoor_jax.experiment.rows import read_rows
    from backdoor_jax.report import print_table, write_page

    experiment, failed = load_experiment(config, overrides), None
    try:
        run_experiment(experiment, out, report=lambda line: print(line, flush=True))
    except FailedRepairs as error:
        failed = error
    rows = read_rows(out / "results.jsonl")
    print_table(rows)
    print(f"{write_page(rows, out)}: open it in a browser")
    if failed:
        raise failed


def _list(parsed: argparse.Namespace) -> None:
    del parsed
    from rich.console import Console
    from rich.table import Table

    from backdoor_jax.attacks import ATTACKS
    from backdoor_jax.data import SOURCES
    from backdoor_jax.defenses import DEFENSES
    from backdoor_jax.models import MODELS

    def first_line(thing: object) -> str:
        return (thing.__doc__ or "").strip().splitlines()[0]

    sections = {
        "attacks": [(name, first_line(attack)) for name, attack in ATTACKS.items()],
        "defences": [(name, f"{d.summary} (needs: {d.needs.replace('_', ' ')})") for name, d in DEFENSES.items()],
        "models": [(name, model.summary) for name, model in MODELS.items()],
        "data": list(SOURCES.items()),
    }
    console = Console(soft_wrap=True)
    for title, entries in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, text in entries:
            table.add_row(name, text)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
