"""PyTorch state dicts to Flax variables and back.

PreAct-ResNet18 has the published benchmark's names (``conv1``, ``layer1.0.bn1``, ``layer2.0.shortcut.0``, ``linear``),
ResNet and VGG19-BN have torchvision's. The map is derived from the variables: a level of the tree is a dot, and so is
an underscore in a layer's name.

=====================  ============================  ==========================================
Flax                   PyTorch                       layout
=====================  ============================  ==========================================
``kernel``             ``weight``                    ``(h, w, I, O)`` to ``(O, I, h, w)``, ``(I, O)`` to ``(O, I)``
``scale``, ``bias``    ``weight``, ``bias``          unchanged
``mean``, ``var``      ``running_mean``, ``_var``    unchanged; both have the unbiased variance
``bounds``             none                          beside the weights, by the module they clip
=====================  ============================  ==========================================

``num_batches_tracked`` counts steps and matters only where a BatchNorm has no momentum, which does not happen here: it
is skipped on reading and written as 0. Half precision becomes float32.
"""

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from backdoor_jax.arguments import typed
from backdoor_jax.errors import UserError
from backdoor_jax.files import atomic_write
from backdoor_jax.interop.torch_files import BOUNDS, as_array, import_torch, read, require_no_level, unwrap
from backdoor_jax.models import (
    MODELS,
    NORMALIZATIONS,
    STEMS,
    VGG19,
    Classifier,
    PreActResNet18,
    ResNet,
    Stem,
    Variables,
    build_classifier,
)
from backdoor_jax.models.torch_module import TorchNetwork
from backdoor_jax.reading import as_path
from backdoor_jax.validation import checked

FIRST = {PreActResNet18: "stem", ResNet: "conv1", VGG19: "features_0"}
"""The name in Flax of the first convolution of each network that has a PyTorch counterpart."""

RENAMED: dict[type[nn.Module], dict[str, str]] = {PreActResNet18: {"stem": "conv1", "shortcut": "shortcut.0"}}
"""Layers whose PyTorch names differ by more than a dot for each underscore."""

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"
SIZES: dict[int, Stem] = {3: "small", 7: "imagenet"}
"""The stem that is assumed, by the size of the first convolution."""


@typed
def load_torch(
    source: Path | str | Mapping[str, Any] | Any,
    model: str,
    *,
    key: str | None = None,
    stem: Stem | None = None,
    normalization: str = "none",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Classifier, Variables]:
    """Reads a PyTorch model.

    Width, class count, image channels and a ResNet's stem follow from the shapes. Where the first convolution of a
    ResNet is 3x3, no pooling is assumed to follow it.

    Args:
        source: a ``.safetensors`` file, or one that ``torch.save`` wrote; or a mapping of names to arrays or tensors.
            It is a state dict, or holds one or more. Names may share a prefix.
        model: the network's name in `backdoor_jax.models.MODELS`; for any other network see `Classifier.from_torch`.
        key: which state dict to take, of a file that holds several.
        stem: of a ResNet, a name in `backdoor_jax.models.STEMS`; by default what is usual for the size of its first
            convolution. Shapes do not show strides and pooling.
        normalization: the normalization of the model's input, a name in `NORMALIZATIONS`.
        mean: of each channel, of pixels scaled to [0, 1], instead of a name.
        std: the standard deviation of each channel, of pixels scaled to [0, 1], instead of a name.

    Returns:
        The classifier, and its variables: ``params``, ``batch_stats``, and ``bounds`` where `save_torch` stored them.

    Raises:
        UserError: for a file that is missing, damaged or contains code, the tensors of another architecture, or a
            network without a PyTorch counterpart.

    Example:
        >>> made = build_classifier("preact_resnet18", 10, width=2)
        >>> state = torch_state(made, zeros(made))
        >>> state["layer2.0.shortcut.0.weight"].shape
        (4, 2, 1, 1)
        >>> classifier, variables = load_torch(state, "preact_resnet18")
        >>> classifier == made, variables["params"]["layer2_0"]["shortcut"]["kernel"].shape
        (True, (1, 1, 2, 4))
    """
    if model not in _supported():
        raise UserError(
            f"model {model!r} has no PyTorch counterpart here; those that have one are {', '.join(_supported())}; "
            "others are given as torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
        )
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    if not isinstance(source, Mapping | str | Path):
        raise UserError(
            f"load_torch: source is a {type(source).__name__}, expected a file or a state dict; give a module to "
            "Classifier.from_torch(module, images), or module.state_dict() here"
        )
    found = source if isinstance(source, Mapping) else read(as_path(source, "load_torch: source"))
    state, bounds = unwrap(found, where, key)

    classifier, shapes = _classifier_of(state, model, where, stem)
    expected = {name: (path, leaf.shape) for name, path, leaf in _tensors(classifier.network, shapes)}
    leaves = {}
    for name, (path, shape) in expected.items():
        array = as_array(state[name], name, where)
        expected_shape = tuple(shape[axis] for axis in _to_torch(len(shape)))
        if array.shape != expected_shape:
            raise UserError(
                f"{where}: {name} has shape {array.shape}, expected {expected_shape} in a {model} of "
                f"{classifier.num_classes} classes with this width of the first convolution; give a network of the "
                "published proportions"
            )
        leaves[path] = array.transpose(_to_flax(array.ndim))
    classifier = _with_normalization(classifier, normalization, mean, std)
    rectifiers = _rectifiers(classifier, shapes) if bounds else {}
    for module, upper in bounds.items():
        if module not in rectifiers:
            known = _few(list(rectifiers))
            raise UserError(f"{where}: a bound is for {module}, which has no rectifier; modules with one are {known}")
        leaves[BOUNDS, *rectifiers[module]] = as_array(upper, module, where)
    # Copies: PyTorch may change the tensors later.
    return classifier, jax.tree.map(jnp.array, unflatten_dict(leaves))


@checked
def save_torch(path: Path | str, classifier: Classifier, variables: Variables) -> None:
    """Writes a model for PyTorch, by suffix ``.pt``, ``.pth`` or ``.safetensors``.

    A ``.pt`` file is a plain state dict, for ``load_state_dict``. Activation bounds cannot be part of one: a bounded
    model's file holds ``model``, the state dict, and ``bounds``, the upper bounds ``(C,)`` by the name of the module
    whose output they clip; safetensors, which are flat, hold those under ``bounds.`` and the name. `apply_bounds` puts
    them into a PyTorch network, and `load_torch` reads both.

    Args:
        path: the file; folders are created, and an older file is replaced once the new one is complete.
        classifier: of a network with a PyTorch counterpart, or of `Classifier.from_torch`.
        variables: its variables.

    Raises:
        UserError: for another network, another suffix, ``.pt`` without PyTorch, or variables that cannot be used.
        NonFiniteError: for weights or statistics that are not finite.

    Example:
        >>> import tempfile
        >>> made = build_classifier("resnet18", 10, width=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.safetensors"
        ...     save_torch(file, made, zeros(made))
        ...     load_torch(file, "resnet18")[0] == made
        True
    """
    path = Path(path)
    state, bounds = torch_state(classifier, variables), _bounds_by_module(classifier, variables)
    extra = dict(classifier.network.extra_state) if isinstance(classifier.network, TorchNetwork) else {}
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise UserError(f"{path}: unknown suffix {path.suffix!r}; give .pt, .pth or .safetensors")
    torch = None if path.suffix == ".safetensors" else import_torch(path)
    if torch is None and extra:
        raise UserError(f"{path}: {next(iter(extra))} is no tensor, which such a file cannot hold; give .pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        if torch is None:
            from safetensors.numpy import save_file

            flat = {**state, **{f"{BOUNDS}.{module}": upper for module, upper in bounds.items()}}
            save_file(flat, partial, {"format": "pt"})
        else:
            weights, uppers = (
                OrderedDict((name, torch.tensor(array)) for name, array in tree.items()) for tree in (state, bounds)
            )
            weights.update(extra)
            if isinstance(classifier.network, TorchNetwork):
                versions = {path: {"version": version} for path, version in classifier.network.versions}
                vars(weights)["_metadata"] = versions
            torch.save({"model": weights, BOUNDS: uppers} if uppers else weights, partial)


def require_counterpart(classifier: Classifier) -> None:
    """Refuses a network that has no PyTorch counterpart.

    Raises:
        UserError: for such a network.
    """
    if type(classifier.network) not in (*FIRST, TorchNetwork):
        raise UserError(
            f"a {type(classifier.network).__name__} has no PyTorch counterpart here; save it as .safetensors or in a "
            "folder, with backdoor_jax.save_model"
        )


@checked
def torch_state(classifier: Classifier, variables: Variables) -> dict[str, np.ndarray]:
    """The variables under PyTorch's names and in its layouts, without bounds.

    Args:
        classifier: of a network with a PyTorch counterpart.
        variables: its variables.

    Raises:
        UserError: for another network.

    Example:
        >>> made = build_classifier("vgg19_bn", 10, width=1)
        >>> state = torch_state(made, zeros(made))
        >>> state["classifier.6.weight"].shape, int(state["features.1.num_batches_tracked"])
        ((10, 64), 0)
    """
    require_counterpart(classifier)
    if isinstance(classifier.network, TorchNetwork):
        return classifier.network.state_dict(variables)
    state = {}
    for name, path, leaf in _tensors(classifier.network, variables):
        array = np.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
        state[name] = np.ascontiguousarray(array.transpose(_to_torch(array.ndim)))
        if path[-1] == "var":
            state[f"{name.rpartition('.')[0]}.{COUNTER}"] = np.array(0)
    return state


# Names and layouts


def _to_torch(rank: int) -> tuple[int, ...]:
    return {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[rank]


def _to_flax(rank: int) -> tuple[int, ...]:
    return {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[rank]


def _dotted(network: nn.Module, layers: tuple[str, ...]) -> str:
    renamed = RENAMED.get(type(network), {})
    return ".".join(renamed.get(layer, layer.replace("_", ".")) for layer in layers)


def _tensors(network: nn.Module, variables: Variables) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """The PyTorch name, the Flax path and the array of every tensor of a state dict."""
    for path, leaf in flatten_dict({kind: variables[kind] for kind in ("params", "batch_stats")}).items():
        yield f"{_dotted(network, path[1:-1])}.{LEAVES[path[-1]]}", path, leaf


def _clipped_module(network: nn.Module, rectifier: tuple[str, ...]) -> str:
    """The PyTorch module whose output a bound on a rectifier clips.

    For a rectifier that is a module it is that module (VGG19); for one that ends a residual block, the block; any other
    comes directly after a normalization, which is clipped: ``relu(min(x, z)) = min(relu(x), z)`` for every bound z of 0
    or more.
    """
    *block, name = rectifier
    if isinstance(network, VGG19):
        return _dotted(network, rectifier)
    if isinstance(network, ResNet) and name == ("relu3" if network.bottleneck else "relu2"):
        return _dotted(network, tuple(block))
    return _dotted(network, (*block, "bn1" if name == "relu" else name.replace("relu", "bn")))


def _bounds_by_module(classifier: Classifier, variables: Variables) -> dict[str, np.ndarray]:
    if isinstance(classifier.network, TorchNetwork):
        return classifier.network.bounds_by_module(variables)
    found = {}
    for path, leaf in flatten_dict(variables.get(BOUNDS, {})).items():
        upper = np.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
        if not (upper >= 0).all():
            raise UserError(
                f"bounds of {'/'.join(path[:-1])} are not all 0 or more, as a rectifier's values are; fix them first"
            )
        found[_clipped_module(classifier.network, path[:-1])] = upper
    return found


def _rectifiers(classifier: Classifier, shapes: Variables) -> dict[str, tuple[str, ...]]:
    """The Flax path of every bound, by the PyTorch module it clips."""
    images = jax.ShapeDtypeStruct((1, 32, 32, len(classifier.mean)), jnp.uint8)
    bounds = jax.eval_shape(classifier.activations, shapes, images)
    return {_clipped_module(classifier.network, path[:-1]): path for path in flatten_dict(bounds)}


# The network of a state dict


@functools.cache
def _supported() -> tuple[str, ...]:
    return tuple(name for name, known in MODELS.items() if type(known.build(2, 1)) in FIRST)


def zeros(classifier: Classifier) -> Variables:
    """The variables of a network, all zero.

    Example:
        >>> zeros(build_classifier("preact_resnet18", 10, width=2))["params"]["linear"]["kernel"].shape
        (16, 10)
    """
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), _shapes(classifier))


def _shapes(classifier: Classifier) -> Variables:
    images = jax.ShapeDtypeStruct((1, 32, 32, len(classifier.mean)), jnp.uint8)
    return jax.eval_shape(classifier.init, jax.random.key(0), images)


@functools.cache
def _names(model: str) -> frozenset[str]:
    """The names of all tensors, which depend on neither width nor classes."""
    classifier = build_classifier(model, 2, 1)
    return frozenset(name for name, _, _ in _tensors(classifier.network, _shapes(classifier)))


def _classifier_of(state: Mapping[str, Any], model: str, where: str, stem: Stem | None) -> tuple[Classifier, Variables]:
    """The network that first convolution and head belong to, and the shapes of its variables."""
    _require_same_names(set(_names(model)), set(state), model, where)
    network = MODELS[model].build(2, 1)
    first, head = (f"{_dotted(network, path)}.weight" for path in ((FIRST[type(network)],), MODELS[model].head_path))
    ends = {name: as_array(state[name], name, where).shape for name in (first, head)}
    if stem is not None and not isinstance(network, ResNet):
        raise UserError(f"{where}: a stem is chosen for a ResNet, and {model} has its own; leave it out (--stem)")
    assumed = SIZES.get(ends[first][-1]) if len(ends[first]) == 4 else None
    if stem is not None and assumed is not None and STEMS[stem][0] != STEMS[assumed][0]:
        fitting = ", ".join(name for name, (size, _, _) in STEMS.items() if size == STEMS[assumed][0])
        raise UserError(
            f"{where}: {first} is of size {ends[first][-1]}, which stem {stem!r} has not; give one of {fitting}"
        )
    stem = stem or assumed
    if stem is None or len(ends[head]) != 2 or ends[first][1] not in (1, 3):
        raise UserError(
            f"{where}: {first} has shape {ends[first]} and {head} {ends[head]}, expected (width, 1 or 3, size, size) "
            "with size 3 or 7, and (classes, latent); give an image classifier"
        )
    (width, channels), classes = ends[first][:2], ends[head][0]
    classifier = build_classifier(model, classes, width, stem=stem if isinstance(network, ResNet) else None)
    if channels == 1:
        classifier = Classifier(classifier.network, classes, (0.0,), (1.0,), classifier.head_path)
    return classifier, _shapes(classifier)


def _with_normalization(
    classifier: Classifier, name: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Classifier:
    """The classifier with an input normalization, which must have its number of channels."""
    if (mean is None) != (std is None):
        raise UserError("mean and std go together; give both, or neither and a normalization by name")
    if mean is None or std is None:
        if name == "none":
            return classifier
        if name not in NORMALIZATIONS:
            raise UserError(f"unknown normalization {name!r}; known are {', '.join(sorted(NORMALIZATIONS))}")
        mean, std = NORMALIZATIONS[name]
    if len(mean) != len(classifier.mean):
        raise UserError(
            f"the model is for images of {len(classifier.mean)} channels, the normalization for {len(mean)}; give mean "
            "and std with one value for each channel"
        )
    return Classifier(classifier.network, classifier.num_classes, tuple(mean), tuple(std), classifier.head_path)


def _require_same_names(expected: set[str], found: set[str], model: str, where: str) -> None:
    missing = sorted(expected - found)
    extra = sorted(name for name in found - expected if not name.endswith(COUNTER))
    if not missing and not extra:
        return
    if missing:
        require_no_level(expected, found, model, where)
    seen = frozenset(name for name in found if not name.endswith(COUNTER))
    others = [other for other in _supported() if _names(other) == seen]
    fix = (
        f"they are those of {others[0]}, so give that as model"
        if others
        else (
            "give the module it was saved from: --model torchvision:NAME, timm:NAME or FILE.py:FUNCTION, or "
            "Classifier.from_torch"
        )
    )
    wrong = [f"{kind} {_few(names)}" for kind, names in (("missing", missing), ("unknown", extra)) if names]
    raise UserError(f"{where}: the tensors are not those of {model}: {', '.join(wrong)}; {fix}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
