"""The model, images and trigger that a command's options describe."""

import argparse
import itertools
import shlex
from typing import TYPE_CHECKING, Any

from backdoor_jax.errors import UserError

if TYPE_CHECKING:
    from backdoor_jax.app import Images, ModelFile, Suspect


UNSEEN = (
    (("target", "triggered", "patch", "position", "blend", "strength", "healthy"), ("data",)),
    (("resize", "class_names", "channel_order"), ("data", "training_set")),
)
"""Options of a model's images, and the sources of images one of which they need."""


MODEL_OPTIONS = (
    "checkpoint",
    "model",
    "key",
    "stem",
    "normalize",
    "classes",
    "data",
    "class_names",
    "channel_order",
    "size",
    "resize",
    "healthy",
    "triggered",
    "patch",
    "position",
    "blend",
    "strength",
    "target",
)
"""Options with a value that all commands on your own model share."""


def repair_command(parsed: argparse.Namespace, target: int) -> str:
    """The command that repairs a class of the model of another command.

    Example:
        >>> given = {"checkpoint": "my model.pt", "model": "resnet18", "data": "clean.npz"}
        >>> repair_command(argparse.Namespace(**dict.fromkeys(MODEL_OPTIONS) | given), 8)
        "backdoor-jax defend --checkpoint 'my model.pt' --model resnet18 --data clean.npz target=8"
    """
    given = {name: getattr(parsed, name) for name in MODEL_OPTIONS} | {"data": parsed.data or "CLEAN_IMAGES"}
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
    return shlex.join(["backdoor-jax", "defend", *itertools.chain(*options), f"target={target}"])


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


def model_of(parsed: argparse.Namespace) -> "ModelFile":
    """The model of a command."""
    from backdoor_jax.app import ModelFile

    given = {name: getattr(parsed, name) for name in ("model", "key", "stem", "classes")}
    return ModelFile(parsed.checkpoint, **given, **parse_normalization(parsed.normalize))


def images_of(parsed: argparse.Namespace) -> "Images":
    """How a command reads images."""
    from backdoor_jax.app import Images

    names = tuple(name.strip() for name in parsed.class_names.split(",")) if parsed.class_names else None
    return Images(parse_size(parsed.size), parsed.resize, names, parsed.channel_order or "rgb")


def require_used(parsed: argparse.Namespace) -> None:
    """Refuses options that nothing reads, since their user expects that they do something.

    Raises:
        UserError: with what they need.
    """
    from backdoor_jax.data import names_classes

    sources = {name: getattr(parsed, name, None) for name in ("data", "test", "training_set", "triggered")}
    for options, needed in UNSEEN:
        if all(sources[name] is None for name in needed):
            unread = [name for name in options if getattr(parsed, name) is not None]
            if unread:
                option = unread[0].replace("_", "-")
                raise UserError(f"--{option} is not used without images; give clean ones by --data, or leave it out")
    if parsed.class_names is not None and not any(map(names_classes, filter(None, sources.values()))):
        raise UserError("--class-names names the folders of classes, and no images lie in a folder; leave it out")


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


def suspect_of(parsed: argparse.Namespace) -> "Suspect":
    """Loads the model of a command, with images."""
    from backdoor_jax.app import load_suspect
    from backdoor_jax.detectors import HEALTHY

    return load_suspect(
        model_of(parsed),
        parsed.data,
        test=parsed.test,
        hold_out=parsed.hold_out,
        images=images_of(parsed),
        healthy=HEALTHY if parsed.healthy is None else parsed.healthy,
        triggered=_trigger(parsed),
        target=parsed.target,
    )


def judged_on(suspect: "Suspect") -> str:
    """How many images of which kind a model is judged on."""
    return f"{len(suspect.test)} {'test images' if suspect.held_out else 'images'}"


def print_accuracy(suspect: "Suspect") -> None:
    """Prints how good a model is, what was assumed about it, and its attack success rate where it is known."""
    print(f"{suspect.name}: {100 * suspect.accuracy:.1f} % of {judged_on(suspect)} classified correctly")
    for note in suspect.notes:
        print(note)
    rate = suspect.success_rate(suspect.variables)
    if rate is not None:
        print(f"{suspect.name}: {100 * rate:.1f} % of the triggered images classified as {suspect.target}")
