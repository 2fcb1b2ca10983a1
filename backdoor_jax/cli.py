"""The command line: parses arguments, calls, and prints."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import logging
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import shtab

from backdoor_jax.errors import LONGEST, UserError, first_line, printable
from backdoor_jax.progress import hidden_bars
from backdoor_jax.stopping import Stopped, stopping_at_safe_points

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from distributed import Client

    from backdoor_jax.analyses.base import Row
    from backdoor_jax.app import Images, ModelFile, RepairResult, ScanResult, Suspect

FIRST_STEPS = """\
backdoor-jax detects and removes backdoors in image classifiers. Start with one of these:

  backdoor-jax demo                                      see it work, on models that it trains itself
  backdoor-jax scan --checkpoint MODEL --data IMAGES     does a model look backdoored, and towards which class
  backdoor-jax defend --checkpoint MODEL --data IMAGES   repair it
  backdoor-jax list                                      attacks, defenses, detectors, models and data sets

MODEL is FILE.safetensors, FILE.pt or a folder; IMAGES are clean, in FILE.npz or a folder for each class.
`backdoor-jax COMMAND --help` has all options; `backdoor-jax --print-completion bash` prints a completion script.
"""
RANGES = {
    "seed": (0, 2**32 - 1),
    "healthy": (0, 1),
    "max_drop": (0, 1),
    "list_images": (1, 10**6),
    "classes": (2, 2**16),
}
"""The least and the largest value of options; other seeds make no key of `jax.random`."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and ends the command."""
        raise SystemExit(_fail(f"{message}; see {self.prog} --help"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 with one line on stderr for what the user can fix; 1 where a repair lost too much accuracy, and with one
        line that names a log file for anything else; 130 or 143 where Ctrl-C or SIGTERM stopped it.

    Example:
        >>> main(["run", "nowhere.yaml"])
        2
    """
    with _safe_output() as refused:
        code = _parse_and_run(arguments)
    return _fail(f"the output could not be printed ({first_line(refused[0])}); results are saved") if refused else code


def _parse_and_run(arguments: Sequence[str] | None) -> int:
    """Runs a command; its output goes to safe streams."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command is None and not rest:
        print(FIRST_STEPS, end="")
        return 0
    if rest and (
        parsed.command not in (_run, _defend) or any(text.startswith("-") or "=" not in text for text in rest)
    ):
        parser.error(f"unknown arguments {' '.join(rest)}; only run and defend take settings, as key=value")
    parsed.overrides = tuple(rest)
    try:
        with stopping_at_safe_points(), _quiet_libraries():
            _check_options(parsed)
            _set_up_jax(distributes=_cluster_option(parsed) is not None)
            with hidden_bars() if parsed.quiet or parsed.json else contextlib.nullcontext():
                code: int | None = parsed.command(parsed)
    except UserError as error:
        return _fail(str(error))
    except Stopped as stopped:
        return stopped.code  # The line was printed when the signal came.
    except OSError as error:
        return _fail(_system_error(error))
    except Exception as error:
        name = "what you ran"
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile("w", prefix="backdoor_jax-", suffix=".log", delete=False) as log,
        ):
            traceback.print_exc(file=log)
            name = log.name
        return _fail(f"{type(error).__name__}: {first_line(error)}; this is a bug, please report it with {name}", 1)
    return code or 0


def _check_options(parsed: argparse.Namespace) -> None:
    """Refuses empty text and numbers out of range, before anything is read, and makes paths of texts that are some."""
    for name, value in vars(parsed).items():
        if value == "":
            raise UserError(f"{name.replace('_', '-')} is empty; give it a value, or leave it out")
        if name in ("config", "checkpoint", "out", "slurm") and value is not None:
            setattr(parsed, name, Path(value))
        if name in RANGES and value is not None:
            least, largest = RANGES[name]
            if not least <= value <= largest:
                raise UserError(f"{name.replace('_', '-')} is {value}, expected {least} to {largest}")


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
    """A stream that drops what cannot be written, as where its reader is gone: results are saved, whoever reads it.

    Attributes:
        refused: what the system said where the reader is not gone, such as that a disk is full.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.refused: list[OSError] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, or drops, a text."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.refused.append(error)
            # What is buffered is written again later, at the latest when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def _safe_output() -> Iterator[list[OSError]]:
    """Lets any text be printed in any locale, and a closed pipe or stream pass unnoticed.

    At its end the list holds why text on stdout could not be written, where that is not for want of a reader.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    refused: list[OSError] = []
    for name, stream in streams.items():
        if stream is None:  # It was closed before the command began.
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            setattr(sys, name, _Quiet(stream))
    try:
        yield refused
    finally:
        for name, stream in streams.items():
            safe = getattr(sys, name)
            safe.flush()
            if name == "stdout":
                refused += getattr(safe, "refused", [])
            setattr(sys, name, stream)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps the notes that libraries write for their own developers from the user's terminal."""
    logger = logging.getLogger("absl")  # Of Orbax and TensorFlow Datasets too.
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for library in ("orbax", "flax", "tensorflow_datasets", "jaxopt"):
                warnings.filterwarnings("ignore", module=rf"{library}\b")
            yield
    finally:
        logger.setLevel(level)


def _set_up_jax(distributes: bool) -> None:
    """Sets JAX to its default rules, whatever the environment says, and finds out whether it has a device.

    A process whose workers do the work leaves accelerators to them.
    """
    import jax

    from backdoor_jax.compiling import use_program_cache

    config: Any = jax.config
    for name, value in (
        ("jax_numpy_rank_promotion", "allow"),
        ("jax_numpy_dtype_promotion", "standard"),
        ("jax_transfer_guard", "allow"),
        ("jax_disable_jit", False),
    ):
        config.update(name, value)
    if distributes:
        config.update("jax_platforms", "cpu")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The latter for a platform that was not installed.
        raise UserError(f"JAX finds no device ({first_line(error)}); unset JAX_PLATFORMS, or set it to cpu") from error
    use_program_cache()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="backdoor-jax", description="Detects and removes backdoors in image classifiers, and measures how well."
    )
    shtab.add_argument_to(parser, help="print a completion script for a shell")
    parser.set_defaults(command=None, quiet=False, json=False)
    commands = parser.add_subparsers(metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="finds and removes backdoors in models that it trains itself: a table and a page, four minutes"
    )
    demo.add_argument("--out", default="demo", help="folder for results (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="of the models (default: 0)")
    _add_output_options(demo)
    demo.set_defaults(command=_demo)

    run = commands.add_parser(
        "run",
        help="run an experiment; re-running resumes it",
        usage="backdoor-jax run CONFIG.yaml [--out DIR] [--workers N | --scheduler ADDRESS | --slurm PROFILE.yaml] "
        "[key=value ...]",
        description="key=value changes a setting, with dots for nested keys: victim.epochs=2 seeds=[0]",
    )
    run.add_argument("config", help="experiment in YAML, such as configs/gtsrb_small.yaml")
    run.add_argument("--out", help="folder for results (default: runs/ and the file's name)")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="work in N processes, each on one core or GPU")
    where.add_argument("--scheduler", metavar="ADDRESS", help="or on the workers of a Dask scheduler")
    where.add_argument("--slurm", metavar="PROFILE.yaml", help="or in SLURM jobs; see docs/scaling.md")
    _add_output_options(run)
    run.set_defaults(command=_run)

    defend = commands.add_parser(
        "defend",
        help="repair your own model",
        usage="backdoor-jax defend --checkpoint IN --data CLEAN [--defense NAME] [--out OUT] [options] [key=value ...]",
        description="key=value changes a setting of the defense, such as steps=500",
    )
    _add_model_options(defend)
    defend.add_argument(
        "--defense", default="auto", metavar="NAME", help="see list (default: auto, the default repair)"
    )
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
        "--out", help="FILE.safetensors, FILE.pt, FILE.jaxexport, or a folder (Orbax) (default: NAME-repaired)"
    )
    _add_output_options(defend)
    defend.set_defaults(command=_defend)

    scan = commands.add_parser("scan", help="does a model look backdoored, and towards which class")
    _add_model_options(scan, data_required=False)
    scan.add_argument("--detector", metavar="NAME", default="per_sample", help="see list (default: per_sample)")
    scan.add_argument("--seed", type=int, default=0, help="of the detector (default: 0)")
    scan.add_argument("--training-set", metavar="DATA", help="the training set, for --list-images")
    scan.add_argument("--list-images", type=int, metavar="N", help="the N images of the suspicious class to look at")
    scan.add_argument("--by", metavar="METHOD", default="spectral_signatures", help="or activation_clustering")
    _add_output_options(scan)
    scan.add_argument("--out", help="the figure (default: the checkpoint's name and .scan.png)")
    scan.set_defaults(command=_scan, test=None)

    listing = commands.add_parser(
        "list", help="the attacks, defenses, detectors, scenarios, models and data sets, one line each"
    )
    _add_output_options(listing)
    listing.set_defaults(command=_list)
    return parser


def _add_output_options(command: argparse.ArgumentParser) -> None:
    """Adds the options for how much a command prints."""
    command.add_argument("--quiet", action="store_true", help="print the result only: no progress, no notes")
    command.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _add_model_options(command: argparse.ArgumentParser, data_required: bool = True) -> None:
    """Adds the options of a command on your own model."""
    command.add_argument(
        "--checkpoint", required=True, metavar="IN", help="FILE.safetensors, FILE.pt, a folder, or zoo:NAME"
    )
    command.add_argument(
        "--data",
        required=data_required,
        help="clean images: FILE.npz, a folder of class folders, signs, digits or tfds:NAME",
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
    command.add_argument("--size", metavar="HxW", help="of the model's images, such as 32x32; others are resized")
    command.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="scale the shorter side to this before the center of --size is cut out, as torchvision's Resize and "
        "CenterCrop (default: stretch)",
    )
    command.add_argument("--class-names", metavar="A,B,...", help="the folders of classes 0, 1, ... (default: sorted)")
    command.add_argument(
        "--healthy",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="the accuracy, of 1, that a healthy model reaches; below it there is no verdict (default: 0.7)",
    )
    command.add_argument("--triggered", metavar="DATA", help="images with the trigger under their true labels")
    command.add_argument("--patch", metavar="PICTURE", help="or the trigger as a patch, in its own size")
    command.add_argument("--position", metavar="ROW,COLUMN", help="of the patch (default: the lower right corner)")
    command.add_argument("--blend", metavar="PICTURE", help="or the trigger as a picture that is mixed in")
    command.add_argument("--strength", type=float, metavar="SHARE", help="of the mixed in picture (default: 0.2)")
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
    known = all(len(side) <= 4 and side.isascii() and side.isdigit() and 0 < int(side) <= 4096 for side in sides)
    if len(sides) not in (1, 2) or not known:
        raise UserError(f"--size {text!r} is no size; give height and width, such as 224x224")
    return int(sides[0]), int(sides[-1])


def _model_file(parsed: argparse.Namespace) -> "ModelFile":
    """The model of a command."""
    from backdoor_jax.app import ModelFile

    given = {name: getattr(parsed, name) for name in ("model", "key", "stem", "classes")}
    return ModelFile(parsed.checkpoint, **given, **parse_normalization(parsed.normalize))


def _load_suspect(parsed: argparse.Namespace) -> "Suspect":
    """Loads the model of a command, with images."""
    from backdoor_jax.app import load_suspect

    return load_suspect(
        _model_file(parsed),
        parsed.data,
        test=parsed.test,
        images=_images(parsed),
        healthy=parsed.healthy,
        triggered=_trigger(parsed),
        target=parsed.target,
    )


def _trigger(parsed: argparse.Namespace) -> Any:
    """The user's trigger: images that carry it, or what makes it for images of a shape."""
    import jax

    from backdoor_jax.attacks import Blended, picture_patch

    given = [f"--{name}" for name in ("triggered", "patch", "blend") if getattr(parsed, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are several triggers; give one")
    for option, whole in (("position", "patch"), ("strength", "blend")):
        if getattr(parsed, option) is not None and getattr(parsed, whole) is None:
            raise UserError(f"--{option} belongs to --{whole}; give both")
    if parsed.patch is not None:
        position = parse_position(parsed.position)
        return lambda shape: picture_patch(parsed.patch, shape, position, "--patch")
    if parsed.blend is not None:
        blended = Blended(alpha=0.2 if parsed.strength is None else parsed.strength, image=parsed.blend)
        return lambda shape: blended.trigger(jax.random.key(0), shape)
    return parsed.triggered


def parse_position(text: str | None) -> tuple[int, int] | None:
    """Row and column of a text such as ``28,28``.

    Raises:
        UserError: for other text.

    Example:
        >>> parse_position("0,29"), parse_position(None)
        ((0, 29), None)
    """
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(len(part) <= 4 and part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--position {text!r} is no position; give row and column of the upper left pixel, as 28,28")
    return int(parts[0]), int(parts[1])


def _images_of(suspect: "Suspect") -> str:
    """How many images of which kind a model is judged on."""
    return f"{len(suspect.test)} {'test images' if suspect.held_out else 'images'}"


def _print_accuracy(suspect: "Suspect") -> None:
    print(f"{suspect.name}: {100 * suspect.accuracy:.1f} % of {_images_of(suspect)} classified correctly")
    for note in suspect.notes:
        print(note)
    rate = suspect.success_rate(suspect.variables)
    if rate is not None:
        print(f"{suspect.name}: {100 * rate:.1f} % of the triggered images classified as {suspect.target}")


def _images(parsed: argparse.Namespace) -> "Images":
    """How a command reads images."""
    from backdoor_jax.app import Images

    names = tuple(parsed.class_names.split(",")) if parsed.class_names else None
    return Images(parse_size(parsed.size), parsed.resize, names, parsed.channel_order)


def _defend(parsed: argparse.Namespace) -> int:
    from backdoor_jax.app import change_line, loading_line, repair_model, repaired_path
    from backdoor_jax.config_files import make_defense

    defense = make_defense(parsed.defense, parsed.preset, parsed.overrides)
    suspect = _load_suspect(parsed)
    if not (parsed.quiet or parsed.json):
        _print_accuracy(suspect)
    result = repair_model(
        suspect,
        defense,
        parsed.out or repaired_path(parsed.checkpoint),
        training_set=parsed.training_set,
        seed=parsed.seed,
        force=parsed.force,
        max_drop=parsed.max_drop,
        training_images=_images(parsed),
    )
    repair, name = result.repair, defense.name
    drop = suspect.accuracy - result.accuracy
    if parsed.json:
        print(_repair_as_json(suspect, name, result))
        return 1 if drop > parsed.max_drop else 0
    if repair.target is not None:
        print(f"{name}: repaired class {repair.target}")
    elif repair.changed and repair.scan is not None:
        print(f"{name}: the scan names no class ({repair.scan['verdict']})")
    if not repair.changed:
        print(f"{name}: changed nothing ({repair.why or 'nothing to repair'})")
    else:
        print(f"{name}: {change_line(suspect.variables, repair.variables)}")
    print(
        f"{name}: {100 * result.accuracy:.1f} % of {_images_of(suspect)} classified correctly, "
        f"{100 * suspect.accuracy:.1f} % before"
    )
    rate, before = (suspect.success_rate(variables) for variables in (repair.variables, suspect.variables))
    if rate is not None and before is not None:
        triggered = f"{100 * rate:.1f} % of the triggered images classified as {suspect.target}"
        print(f"{name}: {triggered}, {100 * before:.1f} % before")
    if not result.held_out:
        print(f"{name}: these are the images it repaired with; give others (--test) to see what the repair costs")
    if drop > parsed.max_drop:
        what = "not written, unless with --force" if result.out is None else "written because of --force"
        print(f"{name}: warning: it lost {100 * drop:.1f} % of accuracy, more than --max-drop allows; {what}")
    if result.out is not None:
        print(f"{result.out}: written; load it by {loading_line(suspect, repair, result.out)}")
    return 1 if drop > parsed.max_drop else 0


def _repair_as_json(suspect: "Suspect", defense: str, result: "RepairResult") -> str:
    """A repair as JSON."""
    repair = result.repair
    return json.dumps(
        {
            "model": suspect.name,
            "notes": suspect.notes,
            "defense": defense,
            "changed": repair.changed,
            "why": repair.why,
            "target": repair.target,
            "accuracy_before": suspect.accuracy,
            "accuracy": result.accuracy,
            "success_rate_before": suspect.success_rate(suspect.variables),
            "success_rate": suspect.success_rate(repair.variables),
            "held_out": result.held_out,
            "out": None if result.out is None else str(result.out),
        },
        indent=2,
        allow_nan=False,
    )


def _scan(parsed: argparse.Namespace) -> None:
    from backdoor_jax.app import list_suspicious, load_unseen, scan_model
    from backdoor_jax.detectors import DETECTORS

    if parsed.detector not in DETECTORS:
        raise UserError(f"unknown detector {parsed.detector!r}; known are {', '.join(DETECTORS)}")
    if (parsed.list_images is None) != (parsed.training_set is None):
        raise UserError("--list-images N and --training-set DATA belong together; give both")
    if parsed.data is None:
        size = parse_size(parsed.size)
        if size is None:
            raise UserError("give the size of the model's images as --size 32x32, or clean images by --data")
        suspect = load_unseen(_model_file(parsed), size)
    else:
        suspect = _load_suspect(parsed)
    if not (parsed.quiet or parsed.json) and len(suspect.test):
        _print_accuracy(suspect)
    figure = parsed.out or Path(f"{parsed.checkpoint.name}.scan.png")
    result = scan_model(suspect, figure, DETECTORS[parsed.detector](), seed=parsed.seed, force=parsed.force)
    images = None
    if parsed.list_images is not None:
        target = result.evidence.target
        images = list_suspicious(suspect, parsed.training_set, target, parsed.by, parsed.list_images, _images(parsed))
    if parsed.json:
        print(_as_json(suspect, result, images))
        return
    _print_scan(suspect, result)
    if images is not None:
        print(f"most suspicious images of class {result.evidence.target} by {parsed.by}: {' '.join(images)}")
    print(f"{result.figure}: written")


def _as_json(suspect: "Suspect", result: "ScanResult", images: list[str] | None) -> str:
    """A scan as JSON; values that are not finite are null."""
    evidence = result.evidence
    return json.dumps(
        {
            "model": suspect.name,
            "accuracy": None if math.isnan(suspect.accuracy) else suspect.accuracy,
            "notes": suspect.notes,
            "success_rate": suspect.success_rate(suspect.variables),
            "verdict": dataclasses.asdict(result.verdict),
            "own_p_value": evidence.p_value,
            "quantity": evidence.quantity,
            "values": [value if math.isfinite(value) else None for value in evidence.values.tolist()],
            "details": evidence.details,
            "images": images,
            "figure": str(result.figure),
        },
        indent=2,
        allow_nan=False,
    )


def _print_scan(suspect: "Suspect", result: "ScanResult") -> None:
    """Prints the values of all classes, the verdict and what to do next."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    evidence, verdict = result.evidence, result.verdict
    names = suspect.class_names or [""] * len(evidence.values)
    table = Table("class", "name", evidence.quantity, title=f"{evidence.detector}, every class")
    for number, (name, value) in enumerate(zip(names, evidence.values, strict=True)):
        shown = f"{value:.3g}" if math.isfinite(value) else "-"
        table.add_row(str(number), Text(name), shown, style="bold" if number == evidence.target else None)
    Console(soft_wrap=True).print(table)
    p_value = "no p-value" if verdict.p_value is None else f"p = {verdict.p_value:.2g}"
    print(f"{suspect.name}: {verdict}")
    print(f"evidence: {verdict.strength}; class {evidence.target} stands out most, {p_value} ({evidence.detector})")
    print(verdict.advice)


def _demo(parsed: argparse.Namespace) -> None:
    with resources.as_file(resources.files("backdoor_jax") / "demo.yaml") as config:
        _experiment(parsed, config, parsed.out, (f"seeds=[{parsed.seed}]",))


def _run(parsed: argparse.Namespace) -> None:
    out = parsed.out or Path("runs") / parsed.config.stem
    _experiment(parsed, parsed.config, out, parsed.overrides, _cluster(parsed, out))


def _cluster_option(parsed: argparse.Namespace) -> str | None:
    """The option by which a command asks for a cluster, where it does."""
    options = ("workers", "scheduler", "slurm")
    return next((name for name in options if getattr(parsed, name, None) is not None), None)


def _cluster(parsed: argparse.Namespace, out: Path) -> "AbstractContextManager[Client | None]":
    """The cluster that a command asks for, or none."""
    option = _cluster_option(parsed)
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
    rows = in_order(read_rows(out / "results.jsonl", RESULT), experiment)
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
    from rich.console import Console
    from rich.table import Table

    from backdoor_jax.attacks import ATTACKS
    from backdoor_jax.data import SOURCES
    from backdoor_jax.defenses import DEFENSES
    from backdoor_jax.detectors import DETECTORS
    from backdoor_jax.models import MODELS
    from backdoor_jax.scenarios import SCENARIOS

    def first_line(thing: object) -> str:
        return (inspect.getdoc(thing) or "").splitlines()[0]

    sections = {
        "attacks": [(name, first_line(attack)) for name, attack in ATTACKS.items()],
        "defenses": [(name, f"{d.summary} (needs: {d.needs.replace('_', ' ')})") for name, d in DEFENSES.items()],
        "detectors": [(name, detector.summary) for name, detector in DETECTORS.items()],
        "scenarios": list(SCENARIOS.items()),
        "models": [(name, model.summary) for name, model in MODELS.items()],
        "data": list(SOURCES.items()),
    }
    if parsed.json:
        print(json.dumps({title: dict(entries) for title, entries in sections.items()}, indent=2))
        return
    console = Console(soft_wrap=True)
    for title, entries in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, text in entries:
            table.add_row(name, text)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
