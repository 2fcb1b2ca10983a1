"""Model files that describe their contents: architecture, classes, normalization and package version.

A ``.safetensors`` file holds the variables under their paths (``params/conv/kernel``), and the description as JSON in
its header. Any other path is a folder: ``variables``, an Orbax checkpoint, and ``model.json``, the description with the
shape of every array and the digest of every file. A ``.pt`` or ``.pth`` file is PyTorch's and has no description.

A network that is not one of `backdoor_jax.models.MODELS` cannot be described: its file holds the variables, classes
and normalization, and `load_model` needs its `Classifier`.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from backdoor_jax.arguments import typed
from backdoor_jax.array_files import read_safetensors
from backdoor_jax.config import Classes, Positive, Whole, Width
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.files import atomic_folder, atomic_write, settle, write_text
from backdoor_jax.interop.checkpoints import is_tree, load_tree, save_tree, stored_bytes
from backdoor_jax.interop.file_kinds import kind_of
from backdoor_jax.interop.pytorch import load_torch, save_torch
from backdoor_jax.models import Classifier, Stem, Variables, VisionTransformer, build_classifier, describe
from backdoor_jax.reading import (
    DEEPEST,
    element_count,
    file_size,
    parse_json,
    parsing,
    read_text,
    require_budget,
    require_names,
)
from backdoor_jax.validation import checked
from backdoor_jax.version import __version__

TORCH_SUFFIXES = (".pt", ".pth")
FORMAT = 1
HEADER = "backdoor_jax"
"""The entry of a safetensors header that holds the description."""
DESCRIPTION, VARIABLES = "model.json", "variables"
COLLECTIONS = ("params", "batch_stats")
"""What is read of Flax's variables in a ``.msgpack``."""


@checked
def save_model(path: Path | str, classifier: Classifier, variables: Variables) -> None:
    """Writes a model, completely or not at all, and replaces what was there.

    Args:
        path: a ``.safetensors``, ``.pt`` or ``.pth`` (PyTorch) file, or else a folder.
        classifier: the network.
        variables: its variables, bounds included; a tree of dictionaries.

    Raises:
        UserError: where it cannot be written to that path, or not in that format, or its variables are not the
            classifier's.
        NonFiniteError: for weights or statistics that are not finite.

    Example:
        >>> import tempfile
        >>> classifier = build_classifier("preact_resnet18", 10, width=2, normalization="cifar10")
        >>> variables = classifier.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.safetensors"
        ...     save_model(file, classifier, variables)
        ...     load_model(file)[0] == classifier
        True
    """
    from safetensors import SafetensorError

    path = Path(path)
    _require_fit(classifier, variables, describe(classifier) is not None, path)
    try:
        if path.suffix in TORCH_SUFFIXES:
            save_torch(path, classifier, variables)
            return
        described = _described(classifier)
        arrays = {_text(names): np.asarray(array) for names, array in _leaves(variables)}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            with atomic_write(path) as partial:
                save_file(arrays, partial, {HEADER: json.dumps(described)})
            return
        if (path / VARIABLES).exists() and not (path / DESCRIPTION).exists() and not is_tree(path / VARIABLES):
            raise UserError(f"{path}: holds {VARIABLES}, which is no model's; give another path")
        with atomic_folder(path) as partial:
            save_tree(partial / VARIABLES, variables)
            describe_folder(partial, classifier, variables)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); give another path") from error


def describe_folder(path: Path, classifier: Classifier, variables: Variables) -> None:
    """Writes the ``model.json`` of a folder that holds ``variables``; needs only their shapes.

    It has digests because Orbax answers a damaged file with tracebacks from its threads.
    """
    shapes = {_text(names): [str(array.dtype), list(array.shape)] for names, array in _leaves(variables)}
    described = {**_described(classifier), "arrays": shapes, "files": _digests(path / VARIABLES)}
    write_text(path / DESCRIPTION, json.dumps(described, indent=1))


@typed
def load_model(
    path: Path | str,
    model: str | None = None,
    *,
    classifier: Classifier | None = None,
    key: str | None = None,
    stem: Stem | None = None,
    normalization: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Classifier, Variables]:
    """Reads a model that `save_model` wrote, or a PyTorch one.

    Args:
        path: a file or folder of `save_model`; or PyTorch's weights, or Flax's ``.msgpack``, in a file of any name.
        model: a name in `MODELS`; needed for PyTorch's files, while those of `save_model` have it.
        classifier: for a network that is not in `MODELS`, and for ``.msgpack``: the classifier it was saved with.
        key: for PyTorch's files: which state dict to take, of a file that holds several.
        stem: for PyTorch's files, of a ResNet: see `load_torch`.
        normalization: for PyTorch's files: the normalization of pixels in [0, 1], by name; ``none`` by default.
        mean: of each channel, instead of a name.
        std: the standard deviation of each channel, instead of a name.

    Returns:
        The classifier, and its variables.

    Raises:
        UserError: where there is no such file, or it is damaged, holds another model or was written by another program.
    """
    path = Path(path)
    settle(path)
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such model; give a file .safetensors or .pt, or a folder with {DESCRIPTION}")
    described: Description | None = None
    arrays: dict[str, np.ndarray] = {}
    if os.path.isdir(path):
        described = _folder_description(path)
    elif (kind := kind_of(path)) == "safetensors":
        described, arrays = _read_safetensors(path)
    elif kind == "msgpack":
        if (model, key, stem, normalization, mean, std) != (None,) * 6:
            raise UserError(f"{path}: is Flax's msgpack, for which the classifier says everything; give that alone")
        return _read_msgpack(path, classifier)

    if described is None:
        if classifier is not None:
            raise UserError(f"{path}: holds PyTorch's weights, which go into a model by name; leave out the classifier")
        if model is None:
            raise UserError(
                f"{path}: does not say which network it holds; give it as model (--model): a name that list shows, "
                "torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
            )
        return load_torch(path, model, key=key, stem=stem, normalization=normalization or "none", mean=mean, std=std)
    if key is not None:
        raise UserError(f"{path}: holds one model; leave out the key (--key)")
    if (normalization, mean, std) != (None, None, None):
        raise UserError(f"{path}: has its own normalization; leave out yours (--normalize)")
    if stem is not None:
        raise UserError(f"{path}: has its own stem; leave out yours (--stem)")
    if model is not None and model != described.model:
        raise UserError(f"{path}: holds {described.model or 'a custom network'}, not {model}; leave out the name")

    loaded = _classifier(described, classifier, path)
    if os.path.isdir(path):
        like = _abstract(described.arrays, path)
        files = [file for file in (path / VARIABLES).rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        require_budget(sum(element_count(leaf.shape) * leaf.dtype.itemsize for _, leaf in _leaves(like)), size, path)
        _require_fit(loaded, like, classifier is None, path)
        found = _digests(path / VARIABLES)
        if found != described.files:
            raise UserError(
                f"{path}: variables lacks files, or some are damaged or belong to another model; copy or save it again"
            )
        try:
            require_budget(stored_bytes(path / VARIABLES), size, path)
            return loaded, load_tree(path / VARIABLES, like)
        except UserError as error:
            cause = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else error
            raise UserError(
                f"{path}: its variables are damaged or belong to another model ({cause}); copy or save it again"
            ) from error
    with parsing(path, "its arrays are no model's", "save the model again"):
        variables = _nest({name: jnp.asarray(array) for name, array in arrays.items()})
    _require_fit(loaded, variables, classifier is None, path)
    return loaded, variables


def _described(classifier: Classifier) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": __version__,
        "classes": classifier.num_classes,
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "head_path": list(classifier.head_path),
        **(describe(classifier) or {"model": None}),
    }


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file says about its model, checked before anything is built from it."""

    format: int
    version: str
    model: str | None
    classes: Classes
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    head_path: tuple[str, ...] = ()
    width: Width | None = None
    options: dict[str, str | int] = dataclasses.field(default_factory=dict)
    arrays: dict[str, tuple[str, tuple[Whole, ...]]] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def _parse(text: str, path: Path, *needed: str) -> Description:
    """A description, checked to have everything that is needed."""
    import pydantic

    try:
        described = parse_json(text)
        later = described["format"] > FORMAT
        missing = [name for name in ("version", "model", "classes", "mean", "std", *needed) if name not in described]
        if described.get("model") is not None:
            missing += [name for name in ("width", "options") if name not in described]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its description is damaged or another program's; save the model again") from error
    if later:
        raise UserError(
            f"{path}: written by backdoor_jax {described.get('version')}, later than {__version__}; update backdoor_jax"
        )
    if missing:
        raise UserError(f"{path}: its description lacks {', '.join(missing)}; save the model again")
    try:
        return pydantic.TypeAdapter(Description).validate_json(text, strict=True)
    except pydantic.ValidationError as errors:
        first = errors.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: its description is damaged and cannot be used ({at}: {first['msg']}); save the model again"
        ) from errors


def _folder_description(path: Path) -> Description:
    fix = "it is not a model's folder; save the model again with backdoor_jax.save_model, or resume its experiment"
    try:
        text = read_text(path / DESCRIPTION, fix)
    except UserError as error:
        raise UserError(f"{path}: has no readable {DESCRIPTION} ({error.__cause__ or 'no file'}), so {fix}") from error
    return _parse(text, path / DESCRIPTION, "arrays", "files")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by its relative path.

    Raises:
        UserError: where something lies there that is neither a file nor a folder itself: Orbax would open it.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        file_size(path, "copy or save the model again")
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _read_safetensors(path: Path) -> tuple[Description | None, dict[str, np.ndarray]]:
    """The description, None where another program wrote the file, and the arrays."""
    metadata, arrays = read_safetensors(path)
    return (_parse(metadata[HEADER], path), arrays) if HEADER in metadata else (None, {})


def _read_msgpack(path: Path, classifier: Classifier | None) -> tuple[Classifier, Variables]:
    """The variables that Flax wrote with ``serialization.to_bytes``, for a given classifier."""
    from flax.serialization import msgpack_restore

    if classifier is None:
        raise UserError(
            f"{path}: is Flax's msgpack, which does not say which network it holds; load it in Python with "
            "load_model(path, classifier=Classifier.from_linen(module, classes, head_path))"
        )
    with parsing(path, "not a complete msgpack file of Flax", "copy or save it again"):
        tree = msgpack_restore(path.read_bytes())
        tree = tree if not isinstance(tree, Mapping) or "params" in tree else {"params": tree}
        arrays = _leaves(tree)
        variables = _nest({_text(names): jnp.asarray(array) for names, array in arrays if names[0] in COLLECTIONS})
    _require_fit(classifier, variables, False, path)
    return classifier, variables


def _classifier(described: Description, given: Classifier | None, path: Path) -> Classifier:
    """The classifier of a description, or the given one for a network that cannot be described."""
    if given is not None:
        if given.num_classes != described.classes:
            raise UserError(f"{path}: has {described.classes} classes, the given classifier {given.num_classes}")
        return given
    if described.model is None or described.width is None:
        raise UserError(f"{path}: holds a custom network, which no file can describe; give load_model its classifier")
    options: dict[str, Any] = described.options
    with parsing(path, "its description cannot be used", "save the model again"):
        classifier = build_classifier(described.model, described.classes, described.width, **options)
        return dataclasses.replace(classifier, mean=described.mean, std=described.std)


def _require_fit(classifier: Classifier, variables: Variables, described: bool, path: Path) -> None:
    """Refuses variables (or their shapes) that are not the classifier's."""
    if not described:
        try:
            classifier.head_weights(variables)
        except UserError as error:
            raise UserError(f"{path}: its variables are not those of the given classifier ({error})") from error
        return
    side, network = 32, classifier.network
    if isinstance(network, VisionTransformer):
        embedding = variables.get("params", {}).get("pos_embedding")
        if embedding is not None:
            side = network.patch * math.isqrt(max(embedding.shape[1] - 1, 1)) if embedding.ndim == 3 else side
    image = jax.ShapeDtypeStruct((1, side, side, len(classifier.mean)), jnp.uint8)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), image)
    expected = {_text(names): leaf.shape for names, leaf in _leaves(shapes)}
    found = {_text(names): leaf.shape for names, leaf in _leaves(variables)}
    bounds = {name for name in found if name.startswith("bounds/")}
    wrong = [name for name in expected if name not in found]
    wrong += [name for name in found if name not in bounds and expected.get(name) != found[name]]
    if not wrong and bounds:
        known = {"bounds": jax.eval_shape(classifier.activations, shapes, image)}
        allowed = {_text(names): leaf.shape for names, leaf in _leaves(known)}
        wrong = [name for name in bounds if allowed.get(name) != found[name]]
    if wrong:
        difference = (
            f"{wrong[0]} is {found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'something else')}"
        )
        raise UserError(
            f"{path}: its variables are not those of the network it names ({difference}); save this network's own"
        )


def _leaves(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Paths and arrays of a tree of dictionaries."""
    if not isinstance(tree, Mapping):
        if not hasattr(tree, "shape") or not hasattr(tree, "dtype"):
            raise UserError(f"{'/'.join(at)} is a {type(tree).__name__}; only dictionaries of arrays can be saved")
        return [(at, tree)]
    return [found for name, inner in tree.items() for found in _leaves(inner, (*at, str(name)))]


def _text(names: tuple[str, ...]) -> str:
    """A path as text, in which names may contain any character.

    Example:
        >>> _text(("params", "net/~/linear"))
        'params/net%2F~%2Flinear'
    """
    return "/".join(quote(name, safe="") for name in names)


def _nest(arrays: dict[str, Any]) -> Variables:
    """The tree of dictionaries with these arrays at these paths."""
    paths = {tuple(map(unquote, name.split("/"))): array for name, array in arrays.items()}
    inner = {path[:depth] for path in paths for depth in range(1, min(len(path), DEEPEST))}
    if inner & paths.keys() or any(len(path) > DEEPEST for path in paths):
        raise ValueError("its names make no tree of a model's depth")
    return unflatten_dict(paths)


def _abstract(arrays: Mapping[str, tuple[str, tuple[int, ...]]], path: Path) -> Variables:
    """The tree of shapes in a folder's description."""
    with parsing(path, f"the shapes in {DESCRIPTION} are damaged", "save the model again"):
        require_names(list(arrays), path)
        for _, shape in arrays.values():
            element_count(shape)
        return _nest({name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (dtype, shape) in arrays.items()})
