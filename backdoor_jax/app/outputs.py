"""Where models and figures may be written."""

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from backdoor_jax.errors import UserError
from backdoor_jax.files import behind_link, beside
from backdoor_jax.interop.export import SUFFIX as EXPORT_SUFFIX
from backdoor_jax.interop.native import DESCRIPTION, TORCH_SUFFIXES

NEEDED_PACKAGES = {**dict.fromkeys(TORCH_SUFFIXES, "torch"), EXPORT_SUFFIX: "flatbuffers"}
"""The package that writing a file needs, by its suffix."""
MODEL_SUFFIXES = (".safetensors", *NEEDED_PACKAGES)
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


def repaired_path(checkpoint: Path) -> Path:
    """Where a repaired model goes by default: in the current folder, as the kind of file that it came from.

    Example:
        >>> repaired_path(Path("models/suspect.pt")).name, repaired_path(Path("models/suspect.tar")).name
        ('suspect-repaired.pt', 'suspect-repaired.safetensors')
    """
    if checkpoint.is_dir():
        return Path(f"{checkpoint.name}-repaired")
    suffix = checkpoint.suffix if checkpoint.suffix in (".safetensors", *TORCH_SUFFIXES) else ".safetensors"
    return Path(f"{checkpoint.stem}-repaired{suffix}")


def marked(out: Path, mark: str) -> Path:
    """A path beside another, with a mark in its name.

    Example:
        >>> marked(Path("models/suspect.pt"), "d3").name, marked(Path("models/suspect"), "d3").name
        ('suspect-d3.pt', 'suspect-d3')
    """
    suffix = out.suffix if out.suffix in MODEL_SUFFIXES else ""
    return out.with_name(f"{out.name.removesuffix(suffix)}-{mark}{suffix}")


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    """Turns what the operating system refuses inside into one line about an output path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error


def require_free_figure(out: Path, force: bool) -> None:
    """Refuses a path where no figure may be written; see `require_free`."""
    if out.suffix not in FIGURE_SUFFIXES:
        raise UserError(f"{out}: unknown suffix {out.suffix!r} for a figure; give .png, .pdf or .svg")
    require_free(out, force, FIGURE_SUFFIXES)


def require_free(out: Path, force: bool, known: tuple[str, ...]) -> None:
    """Refuses an output path that is taken, or where nothing can be written.

    Args:
        out: the path.
        force: whether what is there may be replaced.
        known: suffixes of files; anything else is a folder.

    Raises:
        UserError: where something is there and may not be replaced, the suffix is unknown or needs a package, or no
            file can be written there.
    """
    with _writable(out):
        out = behind_link(out)
    if out.suffix[1:2].isalpha() and out.suffix not in known:
        raise UserError(
            f"{out}: unknown suffix {out.suffix!r}; give .safetensors, .pt, {EXPORT_SUFFIX}, or a folder without one"
        )
    package = NEEDED_PACKAGES.get(out.suffix)
    if package is not None and find_spec(package) is None:
        raise UserError(f"{out}: needs the package {package}; pip install {package}")
    with _writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = beside(out, "partial", out.suffix)
        probe.touch(exist_ok=False)
        probe.unlink()
    if os.path.lexists(out) and not (out.is_file() or out.is_dir()):  # A link that leads to itself, a pipe, a device.
        raise UserError(f"{out}: is neither a file nor a folder; give another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir()) and out.suffix not in known):
        return
    if out.is_dir() and (out.suffix in known or not (out / DESCRIPTION).is_file()):
        raise UserError(f"{out}: is a folder that holds no model; give another --out")
    if not out.is_dir() and out.suffix not in known:
        raise UserError(f"{out}: is a file, but a model without suffix is a folder; give another --out")
    if not force:
        raise UserError(f"{out}: exists; give another --out, or --force to replace it")
