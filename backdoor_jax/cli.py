"""The command line: parses arguments, calls, and prints."""

import argparse
import contextlib
import inspect
import io
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from backdoor_jax.errors import LONGEST, UserError, first_line, printable
from backdoor_jax.stopping import Stopped, stopping_at_safe_points

if TYPE_CHECKING:
    from backdoor_jax.analyses.base import Row
    from backdoor_jax.app import ScanResult, Suspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 with one line on stderr for what the user can fix; 1 with one line that names a log file for anything else;
        130 or 143 where Ctrl-C or SIGTERM stopped it.

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
    with _safe_output():
        return _run_command(parsed)


def _run_command(parsed: argparse.Namespace) -> int:
    """Runs a parsed command, and turns every error into one line and an exit code."""
    try:
        with stopping_at_safe_points():
            _set_up_jax()
            parsed.command(parsed)
    except UserError as error:
        return _fail(str(error))
    except Stopped as stopped:
        return stopped.code  # The line was printed when the signal came.
    except OSError as error:
        return _fail(_system_error(error))
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="backdoor_jax-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        return _fail(f"{type(error).__name__}: {first_line(error)}; this is a bug, please report it with {log.name}", 1)
    return 0


def _fail(message: str, code: int = 2) -> int:
    """Prints a line on stderr and returns the exit code."""
    with contextlib.suppress(OSError):
        print(printable(f"backdoor-jax: {message}", LONGEST), file=sys.stderr, flush=True)
    return code


def _system_error(error: OSError) -> str:
    """What the operating system refused, and where."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or first_line(error)}; free some space or choose another folder, and run it again"


class _Quiet:
    """A stream that drops what is written once its reader is gone: results are saved, whoever reads the output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, or drops, a text."""
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            # Python flushes again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def _safe_output() -> Iterator[None]:
    """Lets any text be printed in any locale, and a closed pipe pass unnoticed."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            setattr(sys, name, _Quiet(stream))
    try:
        yield
    finally:
        for name, stream in streams.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def _set_up_jax() -> None:
    """Sets JAX to its default rules, whatever the environment says, and finds out whether it has a device."""
    import jax

    config: Any = jax.config
    for name, value in (
        ("jax_numpy_rank_promotion", "allow"),
        ("jax_numpy_dtype_promotion", "standard"),
        ("jax_transfer_guard", "allow"),
        ("jax_disable_jit", False),
    ):
        config.update(name, value)
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(f"JAX finds no device ({first_line(error)}); unset JAX_PLATFORMS, or set it to cpu") from error
    _enable_compilation_cache()


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
    # A folder that cannot be read or written only costs time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)


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
    command.add_argument("--model", metavar="NAME", help="network of a PyTorch file, see list")
    command.add_argument(
        "--normalize",
        metavar="HOW",
        help="for a PyTorch file: a data set's name, MEAN/STD as 0.49,0.48,0.45/0.25,0.24,0.26, or none for [0, 1], "
        "the default",
    )
    command.add_argument("--classes", type=int, help="refuse a model with another number of classes")
    command.add_argument("--force", action="store_true", help="replace what is at --out")


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


def _load_suspect(parsed: argparse.Namespace) -> "Suspect":
    """Loads the model of a command and prints its accuracy."""
    from backdoor_jax.app import load_suspect

    suspect = load_suspect(
        parsed.checkpoint,
        parsed.data,
        test=parsed.test,
        model=parsed.model,
        classes=parsed.classes,
        **parse_normalization(parsed.normalize),
    )
    images = "test images" if suspect.held_out else "images"
    print(f"{suspect.name}: {100 * suspect.accuracy:.1f} % of {len(suspect.test)} {images} classified correctly")
    return suspect


def _defend(parsed: argparse.Namespace) -> None:
    from backdoor_jax.app import repair_model
    from backdoor_jax.config_files import make_defense

    defense = make_defense(parsed.defense, parsed.preset, parsed.overrides)
    suspect = _load_suspect(parsed)
    result = repair_model(
        suspect, defense, parsed.out, training_set=parsed.training_set, seed=parsed.seed, force=parsed.force
    )
    repair, name = result.repair, defense.name
    if repair.target is not None:
        print(f"{name}: repaired class {repair.target}")
    if not repair.changed:
        print(f"{name}: changed nothing ({repair.why or 'nothing to repair'})")
    print(f"{name}: {100 * result.accuracy:.1f} % classified correctly, {100 * suspect.accuracy:.1f} % before")
    if not result.held_out:
        print(f"{name}: these are the images it repaired with; give others (--test) to see what the repair costs")
    print(f"{result.out}: written")


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
    from backdoor_jax.experiment import RESULT, read_rows, run_experiment
    from backdoor_jax.report import write_page

    experiment, failed = load_experiment(config, overrides), None
    try:
        run_experiment(experiment, out, report=lambda line: print(line, flush=True))
    except FailedRepairs as error:
        failed = error
    rows = read_rows(out / "results.jsonl", RESULT)
    page = write_page(rows, out) if rows else None
    print_table(rows)
    if page:
        print(f"{page}: open it in a browser")
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
