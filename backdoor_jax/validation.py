"""The one door for arrays: what every public function checks of its arguments, by their names.

    @checked
    def evaluate(classifier, variables, test, ...): ...

Names mean the same everywhere in the package, so that the name says what to check: ``keys``, ``classifier``,
``images``, ``trigger``, a model's variables under the names in `VARIABLES`, and data sets under those in `DATA`. A
function that has no classifier, such as `backdoor_jax.training.fit`, also takes data of other rows. All other arguments
are checked as `backdoor_jax.arguments` says, which is also the door of functions without any of these. Functions that
run inside compiled code, such as losses, are not decorated.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.arguments import Arguments, Result, door, kind_of, require_keys, require_typed
from backdoor_jax.data import Dataset, LabelMap
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.models import Classifier

DATA = ("data", "test", "train", "triggered")
"""The names of arguments that are data sets."""
VARIABLES = ("variables", "start", "end", "before", "after")
"""The names of arguments that are a model's variables."""
COMPUTED = ("params", "batch_stats", "bounds")
"""The collections that a network computes with; others may hold counters and the like."""


def checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which checks its arguments first and computes under JAX's standard rules.

    Raises:
        UserError: for an argument that cannot be used, naming the function, the argument and the fix.
        NonFiniteError: for weights or statistics that are not finite.

    Example:
        >>> @checked
        ... def draw(key: jax.Array):
        ...     return jax.random.uniform(key)
        >>> draw(3)
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: draw: key is a int, expected a single key; give jax.random.key(0)
    """
    return door(function, partial(_check, classes=True))


def checked_encoder(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`checked` for functions that use the classifier as an encoder: their data may have other classes.

    Example:
        >>> from backdoor_jax.training import pretrain
        >>> pretrain(jax.random.key(0), "resnet18", None)
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: pretrain: classifier is a str; make one with build_classifier
    """
    return door(function, partial(_check, classes=False))


def _check(function: str, given: Mapping[str, Any], signature: inspect.Signature, *, classes: bool) -> None:
    classifier = given.get("classifier")
    if "classifier" in given:
        require_classifier(classifier, f"{function}: classifier")
    method = given.get("self")
    for name, value in given.items():
        where = f"{function}: {name}"
        optional = name in signature.parameters and signature.parameters[name].default is None
        if name in ("self", "classifier") or (value is None and optional):
            continue
        if name == "keys":
            require_keys(value, where)
        elif name in VARIABLES:
            require_variables(value, str(given.get("name", where)))
        elif name in DATA and "keys" in given:
            require_runs(value, classifier, len(given["keys"]), where)
        elif name in DATA and "classifier" not in given:
            require_rows(value, where)
        elif name in DATA:
            empty = getattr(method, "needs", None) == "nothing" or not getattr(method, "needs_images", True)
            require_dataset(value, classifier, where, classes=classes, empty=empty)
        elif name == "step" and not callable(value):
            raise UserError(f"{where} is a {kind_of(value)}, expected a function of state, batch and key")
        elif name in ("state", "states") and not hasattr(value, "step"):
            raise UserError(f"{where} is a {kind_of(value)}, expected what a step's init made of variables")
        elif name == "images":
            require_images(value, classifier, where)
            if not len(value):
                raise UserError(f"{where} are none; give some")
        elif name == "trigger":
            require_trigger(value, where)
        elif name in signature.parameters:
            require_typed(name, value, signature.parameters[name], where)
            if classes and isinstance(value, LabelMap) and classifier and value.num_classes != classifier.num_classes:
                raise UserError(
                    f"{where} is for {value.num_classes} classes, but the classifier has {classifier.num_classes}; "
                    f"give attack.label_map({classifier.num_classes})"
                )


def _is_module(network: object) -> bool:
    """Whether a network is a PyTorch module."""
    return any(base.__module__.startswith("torch.nn") for base in type(network).__mro__)


def _maker(network: object) -> str:
    """What makes a classifier of a network."""
    return "Classifier.from_torch(module, images)" if _is_module(network) else "build_classifier"


def require_classifier(classifier: object, where: str) -> None:
    """Refuses anything but a classifier.

    Raises:
        UserError: for another value.
    """
    if not isinstance(classifier, Classifier):
        raise UserError(f"{where} is a {kind_of(classifier)}; make one with {_maker(classifier)}")


def require_variables(variables: object, where: str) -> None:
    """Refuses what cannot be a network's variables, and weights or statistics that are not finite.

    Raises:
        UserError: for no dictionary with ``params``, leaves that are no arrays of float32 or float64, bounds that are
            not ``(C,)``, and negative variances.
        NonFiniteError: for values that are not finite.
    """
    parts = list(variables.values()) if isinstance(variables, Mapping) else [variables]
    if any(type(part).__module__.partition(".")[0] == "torch" or _is_module(part) for part in parts):
        what = "a PyTorch module" if _is_module(variables) else "PyTorch's tensors"
        raise UserError(
            f"{where} is {what}, expected JAX's variables; make them with classifier, variables = "
            "Classifier.from_torch(module, images)"
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        inner = isinstance(variables, Mapping) and parts and all(isinstance(part, Mapping) for part in parts)
        fix = "give the weights as {'params': weights}" if inner else "see Classifier.init"
        raise UserError(f"{where} is a {kind_of(variables)}, expected a dictionary with params; {fix}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        {part: variables[part] for part in variables if part in COMPUTED}
    ):
        names = [str(getattr(entry, "key", entry)) for entry in path]
        name = "/".join(names)
        dtype = leaf.dtype if isinstance(leaf, np.ndarray | np.generic | jax.Array) else None
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
            found = kind_of(leaf) if dtype is None else dtype
            raise UserError(f"{where}: {name} is {found}, expected an array of float32; cast it")
        values = np.asarray(leaf)
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"{where}: weights {name} are not finite; the training diverged or the checkpoint is damaged"
            )
        if names[0] == "batch_stats" and names[-1] == "var" and (values < 0).any():
            raise UserError(f"{where}: {name} has a variance of {values.min():g}; the checkpoint is damaged")
        if names[0] == "bounds" and values.ndim != 1:
            raise UserError(f"{where}: {name} has shape {values.shape}, expected one bound for each channel")


def require_images(images: object, classifier: Classifier | None, where: str) -> None:
    """Refuses anything but uint8 images with the classifier's channels.

    Raises:
        UserError: for other arrays.
    """
    dtype: Any = getattr(images, "dtype", None)
    shape: tuple[int, ...] = getattr(images, "shape", ())
    if dtype != np.uint8:
        if type(images).__module__ == "torch":
            raise UserError(f"{where} is a PyTorch tensor, expected a uint8 array; give tensor.numpy(), channels last")
        if isinstance(images, Dataset):
            raise UserError(f"{where} is a Dataset, expected uint8 from 0 to 255; give its images")
        found = kind_of(images) if dtype is None else dtype
        raise UserError(
            f"{where} is {found}, expected uint8 from 0 to 255; multiply values in [0, 1] by 255 and cast with "
            ".astype('uint8')"
        )
    channels = shape[-1:] if classifier is None else (len(classifier.mean),)
    if len(shape) != 4 or 0 in shape[1:] or shape[-1:] != channels:
        number = "channels" if classifier is None else len(classifier.mean)
        first = len(shape) == 4 and shape[1] == number
        fix = "give images.transpose(0, 2, 3, 1)" if first else "as in the model's training"
        raise UserError(f"{where} has shape {shape}, expected (N, height, width, {number}); {fix}")


def require_dataset(
    data: object, classifier: Classifier | None, where: str, *, classes: bool = True, empty: bool = False
) -> None:
    """Refuses a data set of other images, or of labels that are not one class for each image.

    Args:
        data: what should be a `Dataset`.
        classifier: whose images and classes they should be.
        where: what errors call it.
        classes: whether labels must be the classifier's classes.
        empty: whether it may hold no images.

    Raises:
        UserError: for anything else.
    """
    if not isinstance(data, Dataset):
        raise UserError(f"{where} is a {kind_of(data)}, expected a Dataset; make one with make_dataset(images, labels)")
    require_images(data.images, classifier, f"{where}.images")
    if not isinstance(data.labels, np.ndarray | jax.Array):
        raise UserError(f"{where}.labels are a {kind_of(data.labels)}, expected an array; see make_dataset")
    labels = np.asarray(data.labels)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != data.images.shape[:1]:
        raise UserError(
            f"{where}.labels are {labels.dtype} {labels.shape}, expected one integer for each of "
            f"{data.images.shape[0]} images"
        )
    if not len(labels):
        if empty:
            return
        raise UserError(f"{where} holds no images; give some")
    largest = classifier.num_classes - 1 if classifier is not None and classes else np.inf
    if labels.min() < 0 or labels.max() > largest:
        raise UserError(f"{where}.labels run from {labels.min()} to {labels.max()}, expected 0 to {largest}; relabel")


def require_rows(data: object, where: str) -> None:
    """Refuses what is no data set of images, latents or other rows, such as `backdoor_jax.training.fit` takes.

    Raises:
        UserError: for anything else.
    """
    if isinstance(data, Dataset) and np.ndim(data.images) == 4:  # Latents are (N, D), or (N, views, D).
        require_dataset(data, None, where)
        return
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if not dataclasses.is_dataclass(data) or len(lengths) != 1 or lengths <= {(), (0,)}:
        raise UserError(
            f"{where} is a {kind_of(data)} of lengths {sorted(lengths)}, expected a Dataset or another data class of "
            "equally many rows"
        )


def require_runs(data: object, classifier: Classifier | None, runs: int, where: str) -> None:
    """Refuses what is not one data set for each run, in a sequence or stacked along a leading axis.

    Raises:
        UserError: for anything else.
    """
    if classifier is not None:
        if not isinstance(data, Sequence):
            raise UserError(f"{where} is a {kind_of(data)}, expected a list of one Dataset for each key")
        for number, own in enumerate(data):
            require_dataset(own, classifier, f"{where}[{number}]")
        return
    leaves = jax.tree.leaves(data)
    if not dataclasses.is_dataclass(data) or any(np.shape(leaf)[:1] != (runs,) for leaf in leaves):
        raise UserError(
            f"{where} is a {kind_of(data)}, expected one data set for each of {runs} runs; see training.stack"
        )
    for number in range(runs):
        require_rows(jax.tree.map(lambda leaf, number=number: leaf[number], data), f"{where}[{number}]")


def require_trigger(trigger: object, where: str) -> None:
    """Refuses a trigger with numbers that are not finite.

    Raises:
        UserError: for what cannot be called, or holds such numbers.
    """
    if not callable(trigger):
        raise UserError(f"{where} is a {kind_of(trigger)}, expected a function of uint8 images")
    for leaf in jax.tree.leaves(trigger):
        if jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating) and not np.isfinite(leaf).all():
            raise UserError(f"{where} holds numbers that are not finite; make the trigger again")
