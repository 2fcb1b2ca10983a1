"""`Network`: what a `Classifier` needs of a network, and an adapter for each way of writing one.

A network is two pure functions over a variables tree, images to latents and latents to logits, and a linear layer
between them that defenses can find. `LinenNetwork` and `NNXNetwork` get both from a module that has only a
``__call__``: the latent is the input of the head at ``head_path``, and the logits are that layer's output. What a
module does after its head (a softmax, a temperature) is left out.

Dropout is left out in training as well: a latent is a function of weights and images alone.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from backdoor_jax.errors import UserError

Variables = dict[str, Any]
"""A Flax variables tree: ``params``, ``batch_stats`` where the network normalizes, ``bounds`` where it is clipped."""

Path = tuple[str, ...]
Part = str | Callable[..., Any] | None
"""A part of a module: a method's name, a function that takes the module first, or None for the part around the head."""


class Network(Protocol):
    """Pure functions over a variables tree.

    Hashable, and equal to any network that would compile to the same program.
    """

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """New variables for normalized images ``(B, H, W, channels)``."""

    def features(self, variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` of normalized images, and the variables, with new statistics when training."""

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``."""

    def activations(self, variables: Variables, x: jax.Array) -> Variables:
        """The largest value per channel of each activation that can be bounded, a tree like ``bounds``."""

    def conv_feeding_norm(self, variables: Variables, x: jax.Array) -> dict[Path, Path]:
        """The path in ``params`` of the convolution that feeds each batch normalization, by its own path."""


def linear_head(variables: Variables, path: Path) -> tuple[jax.Array, jax.Array | None]:
    """Kernel ``(D, C)`` and bias ``(C,)``, or None, of the linear layer at a path in ``params``.

    Raises:
        UserError: where there is no such layer, naming the linear layers there are.

    Example:
        >>> linear_head({"params": {"dense": {"kernel": jax.numpy.ones((2, 3))}}}, ("out",))
        Traceback (most recent call last):
        ...
        backdoor_jax.errors.UserError: no linear head at 'out'; give head_path: linear layers lie at dense
    """
    params = flatten_dict(variables.get("params", {}))
    kernel = params.get((*path, "kernel"))
    if kernel is None or kernel.ndim != 2:
        known = ["/".join(found[:-1]) for found, leaf in params.items() if found[-1] == "kernel" and leaf.ndim == 2]
        fix = f"linear layers lie at {', '.join(known)}" if known else "params must hold a kernel (D, C) there"
        raise UserError(f"no linear head at {'/'.join(path)!r}; give head_path: {fix}")
    return kernel, params.get((*path, "bias"))


def _linear(variables: Variables, path: Path, latent: jax.Array) -> jax.Array:
    kernel, bias = linear_head(variables, path)
    logits = latent @ kernel
    return logits if bias is None else logits + bias


def _mode(function: Callable[..., Any], train: bool) -> dict[str, bool]:
    """The arguments that switch a function between training and evaluation, where it has any."""
    switches = {"train": train, "training": train, "is_training": train}
    switches |= {"deterministic": not train, "use_running_average": not train}
    known = inspect.signature(function).parameters
    return {name: value for name, value in switches.items() if name in known}


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """The `Network` of a Linen module.

    Attributes:
        module: the module; equal by value, as Linen modules are.
        head_path: path of the linear head in ``params``.
        latent: the part that computes latents; None uses what the head receives.
        logits: the part that computes logits of latents; None is the linear layer at `head_path`.
    """

    module: nn.Module
    head_path: Path
    latent: Part = None
    logits: Part = None

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """New variables for normalized images, with ``batch_stats`` where the module has some."""
        switch: dict[str, Any] = _mode(type(self.module).__call__, False)
        return dict(self.module.init(key, x, mutable=("params", "batch_stats"), **switch))

    def _latent(self, variables: Variables, x: jax.Array, train: bool, mutable: str) -> tuple[jax.Array, Variables]:
        method = self.latent or "__call__"
        function = getattr(type(self.module), method) if isinstance(method, str) else method
        module: Any = self.module
        inputs: list[jax.Array] = []

        def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, nn.Dropout):
                return args[0]
            if context.module.path == self.head_path and context.method_name == "__call__":
                inputs.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            output, new = module.apply(variables, x, **_mode(function, train), method=method, mutable=[mutable])
        if self.latent is not None:
            return output, new
        if not inputs:
            linear_head(variables, self.head_path)
            raise UserError(f"{type(self.module).__name__} does not call its layer at {'/'.join(self.head_path)!r}")
        return inputs[-1], new

    def features(self, variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` of normalized images, and the variables, with new statistics when training."""
        latent, new = self._latent(variables, x, train, "batch_stats" if train else "unchanged")
        return latent, {**variables, **new} if train else variables

    def maps(
        self, variables: Variables, x: jax.Array, train: bool, layers: tuple[Path, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...], Variables]:
        """What `features` returns, with the outputs of the layers at these paths in ``params`` in between.

        Raises:
            UserError: for a layer that is not called.
        """
        seen: dict[Path, jax.Array] = {}

        def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            if context.method_name == "__call__":
                seen[context.module.path] = out
            return out

        with nn.intercept_methods(watch):
            latent, variables = self.features(variables, x, train)
        for layer in layers:
            if layer not in seen:
                known = ", ".join("/".join(path) for path, out in seen.items() if getattr(out, "ndim", 0) == 4)
                raise UserError(
                    f"{type(self.module).__name__} calls no layer {'/'.join(layer)!r}; maps come from {known}"
                )
        return latent, tuple(seen[layer] for layer in layers), variables

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``."""
        if self.logits is None:
            return _linear(variables, self.head_path, latent)
        module: Any = self.module
        return module.apply(variables, latent, method=self.logits)

    def activations(self, variables: Variables, x: jax.Array) -> Variables:
        """The largest value per channel of every `ReLU` and `GELU` of `backdoor_jax.models.layers`."""
        return self._latent(variables, x, False, "activations")[1].get("activations", {})

    def conv_feeding_norm(self, variables: Variables, x: jax.Array) -> dict[Path, Path]:
        """The path in ``params`` of the convolution that feeds each batch normalization, by its own path.

        Nothing may lie between the two: the normalization receives the very array that the convolution returned.
        """
        params, statistics = (flatten_dict(variables.get(part, {})) for part in ("params", "batch_stats"))
        outputs: list[tuple[Any, Path]] = []
        found: dict[Path, Path] = {}

        def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            output, path = call(*args, **kwargs), context.module.path
            kernel = params.get((*path, "kernel"))
            if context.method_name == "__call__" and kernel is not None and kernel.ndim == 4:
                outputs.append((output, path))
            if context.method_name == "__call__" and args and (*path, "mean") in statistics:
                found.update((path, source) for made, source in outputs if made is args[0])
            return output

        with nn.intercept_methods(watch):
            self._latent(variables, x, False, "unchanged")
        return found


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A value in an NNX module's state; its collection is None where it is no variable."""

    collection: str | None
    path: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: Any


def split_nnx(model: nnx.Module) -> tuple[nnx.GraphDef, tuple[Leaf, ...], Variables]:
    """An NNX module's static graph, the layout of its state, and the state as a tree of dictionaries.

    ``nnx.Param`` goes into ``params``, ``nnx.BatchStat`` into ``batch_stats``, and anything else into ``others``,
    except random streams, which are left out. All names are strings: the third entry of a list is ``"2"``.
    """
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat, None: nnx.RngState, "others": ...}
    graph, *states = nnx.split(model, *kinds.values())
    layout: list[Leaf] = []
    variables = {}
    for collection, state in zip(kinds, states, strict=True):
        for path, value in flatten_dict(nnx.to_pure_dict(state)).items():
            layout.append(Leaf(collection, path, value.shape, value.dtype))
            if collection is not None:
                variables[collection, *map(str, path)] = value
    return graph, tuple(layout), {"params": {}, **unflatten_dict(variables)}


@dataclasses.dataclass(frozen=True)
class NNXNetwork:
    """The `Network` of an NNX module, split once into a static graph and a variables tree.

    Attributes:
        graph: the module without its state; hashable.
        layout: what belongs where in its state.
        head_path: path of the linear head in ``params``.
        latent: the part that computes latents; None uses what the head receives.
        logits: the part that computes logits of latents; None is the linear layer at `head_path`.
        make: makes a new module from a key, for `init`.
    """

    graph: nnx.GraphDef
    layout: tuple[Leaf, ...]
    head_path: Path
    latent: Part = None
    logits: Part = None
    make: Callable[[jax.Array], nnx.Module] | None = None

    def model(self, variables: Variables) -> Any:
        """The NNX module with these variables; its random streams start at zero.

        Raises:
            UserError: where a variable is missing.
        """
        values, state = flatten_dict(variables), {}
        for leaf in self.layout:
            place = (leaf.collection, *map(str, leaf.path))
            if leaf.collection is None:
                state[leaf.path] = jax.lax.full(leaf.shape, 0, leaf.dtype)
            elif place in values:
                state[leaf.path] = values[place]
            else:
                where = "/".join(map(str, place))
                raise UserError(f"the variables lack {where}; give those of Classifier.from_nnx, or of the same module")
        return nnx.merge(self.graph, unflatten_dict(state))

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """The variables of a new module; their shapes are the module's, whatever the images'."""
        del x
        if self.make is None:
            raise UserError("an NNX module holds its variables; give from_nnx make=lambda key: ... for new ones")
        return split_nnx(self.make(key))[2]

    def features(self, variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` of normalized images, and the variables, with new statistics when training."""
        model = self.model(variables)
        model.set_attributes(deterministic=True, use_running_average=not train, raise_if_not_found=False)
        inputs = [] if self.latent else _watch(model, self.head_path)
        method = self.latent or "__call__"
        function = getattr(type(model), method) if isinstance(method, str) else method
        latent = function(model, x, **_mode(function, train))
        if self.latent is None:
            if not inputs:
                raise UserError(f"{type(model).__name__} does not call its layer at {'/'.join(self.head_path)!r}")
            latent = inputs[-1]
        if not train:
            return latent, variables
        statistics = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
        if not statistics:
            return latent, variables
        named = {tuple(map(str, path)): value for path, value in statistics.items()}
        return latent, {**variables, "batch_stats": unflatten_dict(named)}

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``."""
        if self.logits is None:
            return _linear(variables, self.head_path, latent)
        model = self.model(variables)
        return getattr(model, self.logits)(latent) if isinstance(self.logits, str) else self.logits(model, latent)

    def activations(self, variables: Variables, x: jax.Array) -> Variables:
        """Empty: its activations cannot be bounded."""
        del variables, x
        return {}

    def conv_feeding_norm(self, variables: Variables, x: jax.Array) -> dict[Path, Path]:
        """Empty: which layer feeds which is not known."""
        del variables, x
        return {}


def _watch(model: nnx.Module, path: Path) -> list[jax.Array]:
    """A list that will hold the inputs of the layer at a path."""
    parent: Any = None
    layer: Any = model
    for name in path:
        parent = layer
        try:
            layer = layer[int(name)] if name.isdigit() else getattr(layer, name, None) or layer[name]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{type(model).__name__} has no layer at {'/'.join(path)!r}; give head_path") from error
    inputs: list[jax.Array] = []

    def watched(x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        inputs.append(x)
        return layer(x, *args, **kwargs)

    if path[-1].isdigit():
        parent[int(path[-1])] = watched
    else:
        setattr(parent, path[-1], watched)
    return inputs


@dataclasses.dataclass(frozen=True)
class FunctionNetwork:
    """The `Network` of plain functions; equal to another only where the functions are the same objects.

    Attributes:
        make: ``(key, x) -> variables``, or None where nothing is trained from scratch.
        latent: ``(variables, x, train) -> (latent, variables)``.
        logits: ``(variables, latent) -> logits``.
    """

    make: Callable[[jax.Array, jax.Array], Variables] | None
    latent: Callable[[Variables, jax.Array, bool], tuple[jax.Array, Variables]]
    logits: Callable[[Variables, jax.Array], jax.Array]

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """New variables for normalized images, as `make` makes them."""
        if self.make is None:
            raise UserError("this classifier was made without init; give from_functions one to train from scratch")
        return self.make(key, x)

    def features(self, variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` of normalized images, and the variables, with new statistics when training."""
        latent, new = self.latent(variables, x, train)
        return latent, new if train else variables

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``."""
        return self.logits(variables, latent)

    def activations(self, variables: Variables, x: jax.Array) -> Variables:
        """Empty: its activations cannot be bounded."""
        del variables, x
        return {}

    def conv_feeding_norm(self, variables: Variables, x: jax.Array) -> dict[Path, Path]:
        """Empty: which layer feeds which is not known."""
        del variables, x
        return {}


def require_latents(latent: jax.Array) -> jax.Array:
    """The latents, which must be ``(B, D)`` for a linear head.

    Raises:
        UserError: where they are not.
    """
    if latent.ndim != 2:
        raise UserError(f"latents have shape {latent.shape}, expected (B, D); pool or flatten them before the head")
    return latent
