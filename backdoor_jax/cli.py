"""The command line: parses arguments, calls, and prints."""

import argparse
import inspect
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoor_jax.errors import UserError

if TYPE_CHECKING:
    from backdoor_jax.analyses.base import Row
    from backdoor_jax.app import Images, ScanResult, Suspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 1 where a repair lost too much accuracy; or 2 with one line on stderr for what the user can fix.

    Example:
        >>> main(["run", "nowhere.yaml"])
        2
    """
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (
        parsed.command not in (_run, _defend) or any(text.startswith("-") or "=" not in text for text in rest)
    ):
        parser.error(f"unknown arguments {' '.join(rest)}; only run and defend take settings, as key=value")
    parsed.overrides = tuple(rest)
    _enable_compilation_cache()
    try:
        code: int | None = parsed.command(parsed)
    except UserError as error:
        print(f"backdoor-jax: {error}", file=sys.stderr)
        return 2
    return code or 0


def _enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX's own settings name one or turn it off."""
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
        prog="backdoor-jax", description="Detects and removes backdoors in image classifiers, and measures how well."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="six defenses on the embedded digits: a table and a page, a few minutes")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for results (default: demo)")
    demo.set_defaults(command=_demo)

    run = commands.add_parser(
        "run",
        help="run an experiment; re-running resumes it",
        usage="backdoor-jax run CONFIG.yaml [--out DIR] [key=value ...]",
        description="key=value changes a setting, with dots for nested keys: victim.epochs=2 seeds=[0]",
    )
    run.add_argument("config", type=Path, help="experiment in YAML, such as configs/gtsrb_small.yaml")
    run.add_argument("--out", type=Path, help="folder for results (default: runs/ and the file's name)")
    run.set_defaults(command=_run)

    defend = commands.add_parser(
        "defend",
        help="repair your own model",
        usage="backdoor-jax defend --checkpoint IN --data CLEAN --defense NAME --out OUT [options] [key=value ...]",
        description="key=value changes a setting of the defense, such as steps=500",
    )
    _add_model_options(defend)
    defend.add_argument("--defense", required=True, metavar="NAME", help="see list")
    defend.add_argument("--preset", metavar="NAME", help="named settings of the defense")
    defend.add_argument("--test", metavar="DATA", help="images to evaluate on (default: test images of --data, or all)")
    defend.add_argument("--training-set", metavar="DATA", help="the poisoned set, for a defense that needs it")
    defend.add_argument(
        "--max-drop",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="write no repair that loses more accuracy, of 1, without --force; exit with 1 (default: 0.05)",
    )
    defend.add_argument("--seed", type=int, default=0, help="of the defense (default: 0)")
    defend.add_argument(
        "--out", type=Path, required=True, help="FILE.safetensors, FILE.pt, FILE.jaxexport, or a folder (Orbax)"
    )
    defend.set_defaults(command=_defend)

    scan = commands.add_parser("scan", help="does a model look backdoored, and towards which class")
    _add_model_options(scan)
    scan.add_argument("--out", type=Path, help="the figure (default: the checkpoint's name and .scan.png)")
    scan.set_defaults(command=_scan, test=None)

    listing = commands.add_parser("list", help="the attacks, defenses, models and data sets, one line each")
    listing.set_defaults(command=_list)
    return parser


def _add_model_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of a command on your own model."""
    command.add_argument(
        "--checkpoint", type=Path, required=True, metavar="IN", help="FILE.safetensors, FILE.pt, or a folder"
    )
    command.add_argument(
        "--data", required=True, help="clean images: FILE.npz, a folder of class folders, digits or tfds:NAME"
    )
    command.add_argument(
        "--model",
        metavar="NAME",
        help="network of a PyTorch file: a name that list shows, torchvision:NAME, timm:NAME, or FILE.py:FUNCTION, "
        "which is run",
    )
    command.add_argument("--key", metavar="NAME", help="which model of a PyTorch file that holds several")
    command.add_argument("--stem", metavar="NAME", help="of a ResNet in a PyTorch file, see list")
    command.add_argument(
        "--normalize",
        metavar="HOW",
        help="for a PyTorch file: a data set's name, MEAN/STD as 0.49,0.48,0.45/0.25,0.24,0.26, or none for [0, 1], "
        "the default",
    )
    command.add_argument("--channel-order", choices=("rgb", "bgr"), default="rgb", help="bgr: as OpenCV reads images")
    command.add_argument("--size", metavar="HxW", help="resize images to this height and width, such as 224x224")
    command.add_argument("--class-names", metavar="A,B,...", help="the folders of classes 0, 1, ... (default: sorted)")
    command.add_argument(
        "--healthy",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="the accuracy, of 1, that a healthy model reaches; below it there is no verdict (default: 0.7)",
    )
    command.add_argument("--triggered", metavar="DATA", help="images with the trigger under their true labels")
    command.add_argument("--target", type=int, metavar="CLASS", help="the class that the trigger leads to")
    command.add_argument("--classes", type=int, help="refuse a model with another number of classes")
    command.add_argument("--force", action="store_true", help="replace what is at --out; repair in spite of warnings")


def parse_normalization(text: str | None) -> dict[str, Any]:
    """The normalization of pixels in [0, 1], as `backdoor_jax.load_model` takes it.

    Args:
        text: a name in `backdoor_jax.models.NORMALIZATIONS`, ``none`` for [0, 1] as they are, or means and standard
            deviations of the channels as ``0.49,0.48,0.45/0.25,0.24,0.26``; None for the default.

    Raises:
        UserError: for other text.

    Example:
        >>> parse_normalization("0.5/0.25"), parse_normalization("gtsrb")
        ({'mean': (0.5,), 'std': (0.25,)}, {'normalization': 'gtsrb'})
    """
    from backdoor_jax.models import NORMALIZATIONS

    if text is None:
        return {}
    if text in NORMALIZATIONS:
        return {"normalization": text}
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
    except ValueError as error:
        raise UserError(
            f"--normalize {text!r} is neither {', '.join(sorted(NORMALIZATIONS))} nor MEAN/STD, such as "
            "0.49,0.48,0.45/0.25,0.24,0.26"
        ) from error
    return {"mean": mean, "std": std}


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width of a text such as ``224x224``, or ``224`` for both.

    Raises:
        UserError: for other text.

    Example:
        >>> parse_size("32x48"), parse_size("32"), parse_size(None)
        ((32, 48), (32, 32), None)
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdigit() and 0 < int(side) <= 4096 for side in sides):
        raise UserError(f"--size {text!r} is no size; give height and width, such as 224x224")
    return int(sides[0]), int(sides[-1])


def _load_suspect(parsed: argparse.Namespace) -> "Suspect":
    """Loads the model of a command and prints its accuracy."""
    from backdoor_jax.app import load_suspect

    suspect = load_suspect(
        parsed.checkpoint,
        parsed.data,
        test=parsed.test,
        model=parsed.model,
        key=parsed.key,
        stem=parsed.stem,
        classes=parsed.classes,
        images=_images(parsed),
        healthy=parsed.healthy,
        triggered=parsed.triggered,
        target=parsed.target,
        **parse_normalization(parsed.normalize),
    )
    images = "test images" if suspect.held_out else "images"
    print(f"{suspect.name}: {100 * suspect.accuracy:.1f} % of {len(suspect.test)} {images} classified correctly")
    for note in suspect.notes:
        print(note)
    rate = suspect.success_rate(suspect.variables)
    if rate is not None:
        print(f"{suspect.name}: {100 * rate:.1f} % of the triggered images classified as {suspect.target}")
    return suspect


def _images(parsed: argparse.Namespace) -> "Images":
    """How a command reads images."""
    from backdoor_jax.app import Images

    names = tuple(parsed.class_names.split(",")) if parsed.class_names else None
    return Images(parse_size(parsed.size), names, parsed.channel_order)


def _defend(parsed: argparse.Namespace) -> int:
    from backdoor_jax.app import loading_line, repair_model
    from backdoor_jax.config_files import make_defense

    defense = make_defense(parsed.defense, parsed.preset, parsed.overrides)
    suspect = _load_suspect(parsed)
    result = repair_model(
        suspect,
        defense,
        parsed.out,
        training_set=parsed.training_set,
        seed=parsed.seed,
        force=parsed.force,
        max_drop=parsed.max_drop,
        training_images=_images(parsed),
    )
    repair, name = result.repair, defense.name
    if repair.target is not None:
        print(f"{name}: repaired class {repair.target}")
    if not repair.changed:
        print(f"{name}: changed nothing ({repair.why or 'nothing to repair'})")
    print(f"{name}: {100 * result.accuracy:.1f} % classified correctly, {100 * suspect.accuracy:.1f} % before")
    rate, before = (suspect.success_rate(variables) for variables in (repair.variables, suspect.variables))
    if rate is not None and before is not None:
        triggered = f"{100 * rate:.1f} % of the triggered images classified as {suspect.target}"
        print(f"{name}: {triggered}, {100 * before:.1f} % before")
    if not result.held_out:
        print(f"{name}: these are the images it repaired with; give others (--test) to see what the repair costs")
    drop = suspect.accuracy - result.accuracy
    if drop > parsed.max_drop:
        what = "not written, unless with --force" if result.out is None else "written because of --force"
        print(f"{name}: warning: it lost {100 * drop:.1f} % of accuracy, more than --max-drop allows; {what}")
    if result.out is not None:
        print(f"{result.out}: written; load it by {loading_line(suspect, repair, result.out)}")
    return 1 if drop > parsed.max_drop else 0


def _scan(parsed: argparse.Namespace) -> None:
    from backdoor_jax.app import scan_model

    suspect = _load_suspect(parsed)
    result = scan_model(suspect, parsed.out or Path(f"{parsed.checkpoint.name}.scan.png"), force=parsed.force)
    _print_scan(suspect, result)
    print(f"{result.figure}: written")


def _print_scan(suspect: "Suspect", result: "ScanResult") -> None:
    """Prints the norms of all classes, the tests and the verdict."""
    from rich.console import Console
    from rich.table import Table

    summary, tests = result.summary, result.scan.tests
    table = Table("class", "per sample", "worst case", title="smallest latent change towards each class")
    for number, norms in enumerate(zip(summary["per_sample"], summary["worst_case"], strict=True)):
        shown = ["-" if norm is None else f"{norm:.3g}" for norm in norms]
        smallest = number == tests[summary["statistic"]].smallest
        table.add_row(str(number), *shown, style="bold" if smallest else None)
    Console(soft_wrap=True).print(table)
    for name, test in tests.items():
        p_value = "too few classes" if test.p_value is None else f"p = {test.p_value:.2g}"
        used = " (verdict)" if name == summary["statistic"] else ""
        print(f"{name.replace('_', ' ')}{used}: class {test.smallest} is smallest, {p_value}")
    flagged = result.flagged
    if not result.certain:
        print(
            f"{suspect.name}: cannot tell, since {100 * suspect.accuracy:.1f} % correct is less than a healthy model "
            f"reaches ({100 * suspect.healthy:.0f} %, --healthy)"
        )
        return
    likely = f"likely backdoored towards class {flagged}" if flagged is not None else summary["verdict"]
    print(f"{suspect.name}: {likely} (one-sided Grubbs test at {summary['alpha']})")


def _demo(parsed: argparse.Namespace) -> None:
    with resources.as_file(resources.files("backdoor_jax") / "demo.yaml") as config:
        _experiment(config, parsed.out, ())


def _run(parsed: argparse.Namespace) -> None:
    _experiment(parsed.config, parsed.out or Path("runs") / parsed.config.stem, parsed.overrides)


def _experiment(config: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """Runs an experiment, and prints its rows, their table and where the page is."""
    from backdoor_jax.config_files import load_experiment
    from backdoor_jax.errors import FailedRepairs
    from backdoor_jax.experiment import read_rows, run_experiment
    from backdoor_jax.report import write_page

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


def print_table(rows: "list[Row]") -> None:
    """Prints the table of an experiment, wider than the terminal if necessary, so that no number is truncated."""
    from rich.console import Console
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
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=500)).maximum
    Console(width=max(console.width, needed)).print(table)


def _list(parsed: argparse.Namespace) -> None:
    del parsed
    from rich.console import Console
    from rich.table import Table

    from backdoor_jax.attacks import ATTACKS
    from backdoor_jax.data import SOURCES
    from backdoor_jax.defenses import DEFENSES
    from backdoor_jax.models import MODELS

    def first_line(thing: object) -> str:
        return (inspect.getdoc(thing) or "").splitlines()[0]

    sections = {
        "attacks": [(name, first_line(attack)) for name, attack in ATTACKS.items()],
        "defenses": [(name, f"{d.summary} (needs: {d.needs.replace('_', ' ')})") for name, d in DEFENSES.items()],
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
