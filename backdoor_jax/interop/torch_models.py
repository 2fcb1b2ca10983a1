"""PyTorch modules by name: ``torchvision:NAME``, ``timm:NAME``, or a function in the user's own file.

A file of code is run, because the user named it; a checkpoint is still read as data.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backdoor_jax.errors import UserError, first_line
from backdoor_jax.interop.torch_files import as_array, require_no_level, shared_prefix
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.models.torch_module import EXTRA_STATE, require_shapes, run_module

LIBRARIES = ("torchvision", "timm")
OPTIONAL = ("num_batches_tracked", EXTRA_STATE)
"""What the names end in that a state dict may lack."""
WRAPPERS = ("module", "_orig_mod")
"""The levels that data-parallel training and compilation add to names."""


def names_module(model: str | None) -> bool:
    """Whether a name is that of a PyTorch module, and not of a network of this package.

    Example:
        >>> names_module("timm:resnet26d"), names_module("nets.py:make_net"), names_module("resnet18")
        (True, True, False)
    """
    return model is not None and ":" in model


def load_module(model: str, state: Mapping[str, Any], where: str, num_classes: int | None = None) -> Any:
    """Makes a PyTorch module and loads a state dict into it.

    Args:
        model: ``torchvision:NAME``, ``timm:NAME``, or ``FILE.py:FUNCTION``. The function returns a module; it is called
            with ``num_classes`` where it takes that.
        state: tensors or arrays by name. A prefix that all of them share need not be the module's.
        where: what errors call the state dict.
        num_classes: the number of classes; by default it follows from the shapes.

    Raises:
        UserError: for a module that cannot be made, or the tensors of another one.
    """
    for name, value in state.items():
        if not hasattr(value, "shape") and not name.endswith(EXTRA_STATE):
            as_array(value, name, where)
    module = _make(model, num_classes)
    if not hasattr(module, "state_dict"):
        raise UserError(
            f"--model {model}: makes a {type(module).__name__}, expected a torch.nn.Module; return the network"
        )
    require_shapes(module)
    if num_classes is None and (found := _classes_of(module, state)) is not None:
        module = _make(model, found)
    _load(module, state, model, where)
    return module.eval()


def bounds_of(variables: Variables, classifier: Classifier, bounds: Mapping[str, Any], where: str) -> Variables:
    """The variables with bounds by the name of the module they clip, as `save_torch` stores them."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    places = {rectifier.module: rectifier.path for rectifier in classifier.network.rectifiers}
    unknown = sorted(set(bounds) - set(places))
    if unknown:
        raise UserError(f"{where}: a bound is for {unknown[0]}, which has no rectifier; give the model that was saved")
    leaves = flatten_dict(variables)
    for name, upper in bounds.items():
        leaves["bounds", *places[name]] = np.ravel(as_array(upper, name, where))
    return unflatten_dict(leaves)


def _make(model: str, num_classes: int | None) -> Any:
    """A new module."""
    source, _, name = model.rpartition(":")
    given = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if source in LIBRARIES:
            return _from_library(source, name, given)
        with contextlib.redirect_stdout(sys.stderr):  # What is printed on stdout is the command's result.
            function = getattr(_run_file(Path(source), model), name, None)
            if not callable(function):
                raise UserError(f"{source}: has no function {name!r} that makes the network; give FILE.py:FUNCTION")
            if hasattr(function, "state_dict") and not isinstance(function, type):
                return function  # A network that the file made.
            takes = inspect.signature(function).parameters
            return function(**{key: value for key, value in given.items() if key in takes})
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # The user's own code, or a library's, which raise anything.
        raise UserError(f"--model {model}: cannot be made ({type(error).__name__}: {first_line(error)})") from error


def _from_library(source: str, name: str, given: dict[str, int]) -> Any:
    """A network of torchvision or timm with random weights."""
    try:
        library = importlib.import_module("torchvision.models" if source == "torchvision" else source)
    except ImportError as error:
        raise UserError(f"--model {source}:{name} needs {source}; pip install {source}") from error
    if source == "timm":
        if name not in library.list_models():
            raise UserError(f"timm has no network {name!r}; see timm.list_models()")
        return library.create_model(name, pretrained=False, **given)
    if name not in library.list_models(module=library):
        raise UserError(f"torchvision has no classifier {name!r}; see torchvision.models.list_models()")
    # Networks with auxiliary heads initialize those for seconds, and get their weights from the file anyway.
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return library.get_model(name, weights=None, **extra, **given)


def _run_file(path: Path, model: str) -> Any:
    """The module of a Python file, whose neighbors it can import."""
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--model {model}: no such file {path}; give torchvision:NAME, timm:NAME or FILE.py:FUNCTION")
    name = f"_users_{path.stem}"  # A file may be called as a library is, which must not be replaced.
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        spec.loader.exec_module(loaded)
    finally:
        sys.path.pop(0)
    return loaded


def classes_and_channels(module: Any, size: tuple[int, int], model: str) -> tuple[int, int]:
    """The number of classes of a module, and of channels of its images, by what it returns for one of this size.

    Raises:
        UserError: where it returns nothing for images of as many channels as its first convolution, 3 or 1.
    """
    import torch

    known = [each.in_channels for each in module.modules() if isinstance(each, torch.nn.Conv2d)][:1]
    causes = {}
    for channels in dict.fromkeys((*known, 3, 1)):
        try:
            tensors = run_module(module, np.zeros((1, *size, channels), np.float32))
            return tensors[0].shape[-1], channels
        except Exception as error:  # The user's own code, or a library's, which raise anything.
            causes[channels] = first_line(error)
    channels, cause = next(iter(causes.items()))
    raise UserError(
        f"--model {model}: cannot run on images of {size[0]}x{size[1]} with {' or '.join(map(str, causes))} channels "
        f"({cause}); give images of the size it takes (--size)"
    )


def _classes_of(module: Any, state: Mapping[str, Any]) -> int | None:
    """The number of classes with which a network must be made again to fit the tensors."""
    own = module.state_dict()
    counts = set()
    for name, found in _by_own_names(state, own).items():
        expected, shape = (tuple(getattr(each, "shape", ())) for each in (own.get(name), found))
        if expected != shape and expected and shape:
            counts.add((expected[0], shape[0]))
    return next(iter(counts))[1] if len(counts) == 1 else None


def _by_own_names(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors under the names that a module has for them, whatever wraps it or its layers here or there."""

    def bare(name: str) -> str:
        return ".".join(level for level in name.split(".") if level not in WRAPPERS)

    mine, theirs = shared_prefix(own), shared_prefix(state)
    found = {f"{mine}{name.removeprefix(theirs)}": value for name, value in state.items()}
    names = {bare(name): name for name in own}
    renamed = {names.get(bare(name), name): value for name, value in found.items()}
    return renamed if (len(names), len(renamed)) == (len(own), len(found)) else found


def _plain_state(value: Any, name: str, where: str) -> Any:
    """A layer's extra state, with tensors for arrays.

    Raises:
        UserError: where it is no plain data.
    """
    import torch

    if value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, list | tuple):
        return type(value)(_plain_state(each, name, where) for each in value)
    if isinstance(value, dict):
        return {key: _plain_state(each, name, where) for key, each in value.items()}
    raise UserError(
        f"{where}: {name}, the extra state of a layer, holds a {type(value).__name__.strip('_')}, expected plain data; "
        "leave it out of the state dict"
    )


def _load(module: Any, state: Mapping[str, Any], model: str, where: str) -> None:
    """Loads tensors into a module, all of which it must have, and no others."""
    import torch

    own = module.state_dict()
    mine, found = shared_prefix(own), _by_own_names(state, own)
    missing = sorted(name for name in set(own) - set(found) if not name.endswith(OPTIONAL))
    extra = sorted(set(found) - set(own))
    if missing:
        require_no_level((name.removeprefix(mine) for name in own if not name.endswith(OPTIONAL)), state, model, where)
    for name in missing:
        layer, _, leaf = name.rpartition(".")
        parts = (f"{name}_orig", f"{name}_g", f"{layer}.parametrizations.{leaf}.original")
        source = next((each for each in found if each.removesuffix("0") in parts), None)
        if source is None:
            continue
        raise UserError(
            f"{where}: holds {source}, of which {name} is computed, as by pruning or weight normalization; give the "
            "function that makes the network with it, or save the state dict after torch.nn.utils.prune.remove or "
            "parametrize.remove_parametrizations"
        )
    for kind, names in (("lacks", missing), ("has the unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{where}: is not a state dict of {model}: it {kind} {', '.join(names[:3])}{more}; give the model it "
                "was saved from as torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
            )
    for name, value in found.items():
        if name.endswith(EXTRA_STATE):
            own[name] = _plain_state(value, name, where)
            continue
        if tuple(value.shape) != tuple(own[name].shape):
            raise UserError(
                f"{where}: {name} has shape {tuple(value.shape)}, in {model} it is {tuple(own[name].shape)}; give the "
                "model it was saved from, or its number of classes (--classes)"
            )
        own[name] = torch.tensor(as_array(value, name, where) if own[name].is_floating_point() else np.asarray(value))
    module.load_state_dict(own)  # It names the versions of layers, which some of them ask for.
