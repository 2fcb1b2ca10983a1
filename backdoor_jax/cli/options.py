"""The options of every command."""

import argparse
from pathlib import Path
from typing import NoReturn

import shtab

from backdoor_jax.cli.streams import fail
from backdoor_jax.errors import UserError

RANGES = {
    "seed": (0, 2**32 - 1),
    "healthy": (0, 1),
    "max_drop": (0, 1),
    "hold_out": (0, 1),
    "list_images": (1, 10**6),
    "classes": (2, 2**16),
}
"""The least and the largest value of options; other seeds make no key of `jax.random`."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and ends the command."""
        raise SystemExit(fail(f"{message}; see {self.prog} --help"))


def check_options(parsed: argparse.Namespace) -> None:
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


def make_parser() -> argparse.ArgumentParser:
    """The parser; what it returns names its command."""
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
    demo.set_defaults(command="demo")

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
    run.set_defaults(command="run")

    defend = commands.add_parser(
        "defend",
        help="repair your own model",
        usage="backdoor-jax defend --checkpoint IN --data CLEAN [--defense NAME] [--out OUT] [options] [key=value ...]",
        description="key=value changes a setting of the defense, such as steps=500",
    )
    _add_model_options(defend)
    defend.add_argument(
        "--defense",
        default="auto",
        metavar="NAME",
        help="see list (default: auto, the default repair); NAME,NAME,... compares several",
    )
    defend.add_argument("--preset", metavar="NAME", help="named settings of the defense")
    defend.add_argument("--test", metavar="DATA", help="images to evaluate on (default: test images of --data, or all)")
    defend.add_argument(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="share of --data, such as 0.2, to evaluate on and not to repair with, where there are no test images",
    )
    defend.add_argument("--training-set", metavar="DATA", help="the poisoned set, for a defense that needs it")
    defend.add_argument(
        "--max-drop",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="refuse a repair that loses more accuracy, of 1: write it as OUT-refused, exit with 1 (default: 0.05)",
    )
    defend.add_argument("--seed", type=int, default=0, help="of the defense (default: 0)")
    defend.add_argument(
        "--out",
        help="FILE.safetensors, FILE.pt, FILE.jaxexport, or a folder (Orbax) (default: NAME-repaired); with several "
        "defenses each adds its name",
    )
    _add_output_options(defend)
    defend.set_defaults(command="defend")

    scan = commands.add_parser("scan", help="does a model look backdoored, and towards which class")
    _add_model_options(scan, data_required=False)
    scan.add_argument("--detector", metavar="NAME", default="neural_cleanse", help="see list (default: neural_cleanse)")
    scan.add_argument("--seed", type=int, default=0, help="of the detector (default: 0)")
    scan.add_argument("--training-set", metavar="DATA", help="the training set, for --list-images")
    scan.add_argument("--list-images", type=int, metavar="N", help="the N images of the suspicious class to look at")
    scan.add_argument("--by", metavar="METHOD", help="how: spectral_signatures, the default, or activation_clustering")
    _add_output_options(scan)
    scan.add_argument("--out", help="the figure (default: the checkpoint's name and .scan.png)")
    scan.set_defaults(command="scan", test=None, hold_out=None)

    listing = commands.add_parser(
        "list", help="the attacks, defenses, detectors, scenarios, models and data sets, one line each"
    )
    _add_output_options(listing)
    listing.set_defaults(command="list")
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
    command.add_argument("--channel-order", choices=("rgb", "bgr"), help="bgr: as OpenCV reads images")
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
