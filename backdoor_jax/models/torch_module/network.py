"""`TorchNetwork`: a PyTorch module's graph as a `Network`, over variables with the names of its state dict."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from backdoor_jax.errors import UserError
from backdoor_jax.models.network import Path, Variables, linear_head
from backdoor_jax.models.torch_module.graph import BATCH_NORM, INPUT, Graph, Ref
from backdoor_jax.models.torch_module.layouts import ChannelsLast, to_torch

Order = Literal["torch", "linear", "conv", "pointwise_conv"]
"""How a tensor lies in the variables: as in PyTorch; ``(O, I)`` as ``(I, O)``; ``(O, I, h, w)`` as ``(h, w, I, O)``; or
``(O, I, 1, 1)`` as ``(I, O)``."""
BOUNDS = "bounds"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter, buffer or constant of a module.

    Attributes:
        name: in the state dict.
        path: in the variables, with the collection.
        shape: in PyTorch.
        dtype: in PyTorch.
        order: how it lies in the variables.
        aliases: other names of the same tensor in the state dict.
        saved: whether it is in the state dict.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    order: Order = "torch"
    aliases: tuple[str, ...] = ()
    saved: bool = True

    def leaf(self, leaves: Mapping[Path, Any]) -> Any:
        """Its array in flat variables.

        Raises:
            UserError: where these are another module's.
        """
        if self.path not in leaves:
            raise UserError(
                f"the variables lack {'/'.join(self.path)}; give those of Classifier.from_torch, or of the same module"
            )
        return leaves[self.path]

    def from_torch(self, array: Any) -> Any:
        """The array as it lies in the variables."""
        if self.order == "linear":
            return array.T
        if self.order == "pointwise_conv":
            return array[:, :, 0, 0].T
        return array.transpose(2, 3, 1, 0) if self.order == "conv" else array

    def to_torch(self, array: Any) -> Any:
        """The array as PyTorch has it."""
        if self.order == "linear":
            return array.T
        if self.order == "pointwise_conv":
            return array.T[:, :, None, None]
        return array.transpose(3, 2, 0, 1) if self.order == "conv" else array


@dataclasses.dataclass(frozen=True)
class Rectifier:
    """An activation that can be bounded.

    Attributes:
        node: in the graph.
        module: the path of the PyTorch module whose output a bound clips, with the same effect.
        last: whether in PyTorch its channels are the last axis, and not the second.
    """

    node: int
    module: str
    last: bool

    @property
    def path(self) -> Path:
        """The path of its bound in the collection ``bounds``."""
        return (*self.module.split("."), "upper")


@dataclasses.dataclass(frozen=True)
class TorchNetwork:
    """The `Network` of a PyTorch module that was exported for images of one shape.

    ``params`` has the parameters under the module's own names, split at the dots, and with Flax's names for what
    defenses look for: a ``weight`` of a linear layer or a convolution is a ``kernel``, that of a batch normalization a
    ``scale``. ``batch_stats`` has running statistics; ``buffers`` everything else that is not trained.

    Attributes:
        name: the module's type, for messages.
        graph: what it computes.
        tensors: what belongs where.
        image_shape: height, width and channels.
        head_path: path of the linear head in ``params``.
        latent: the node that the head receives.
        output: the node of the logits.
        tail: the shape of a latent in the graph, where something other than a linear layer makes logits of it.
        rectifiers: the activations that can be bounded.
        map_nodes: nodes of maps by the path of the module that returns them.
        map_layers: the last layer at each resolution.
        versions: of the layers' state dicts, by path; PyTorch saves them, and some layers load none without.
        prefix: what the state dict has before all names, where the module was given inside another.
        extra_state: what layers add to the state dict besides tensors, by name.
    """

    name: str
    graph: Graph
    tensors: tuple[Tensor, ...]
    image_shape: tuple[int, int, int]
    head_path: Path
    latent: int
    output: int
    tail: tuple[int, ...] | None
    rectifiers: tuple[Rectifier, ...] = ()
    map_nodes: tuple[tuple[Path, int], ...] = ()
    map_layers: tuple[Path, ...] = ()
    versions: tuple[tuple[str, int], ...] = ()
    prefix: str = ""
    extra_state: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), compare=False)

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """Refused: the module holds its variables."""
        raise UserError(
            f"{self.name} is a PyTorch module, which holds its weights; new ones are made in PyTorch, so choose a "
            "defense that does not train from scratch"
        )

    def run(
        self, variables: Variables, x: jax.Array, train: bool = False, nodes: tuple[int, ...] = (), after: Any = None
    ) -> tuple[list[Any], dict[str, jax.Array]]:
        """Results of some nodes for normalized images, bounds applied, and new statistics by name."""
        if x.shape[1:] != self.image_shape:
            expected, found = ("x".join(map(str, shape)) for shape in (self.image_shape, x.shape[1:]))
            raise UserError(
                f"{self.name} was exported for images of {expected}, these are {found}; resize them (--size), or make "
                "the classifier with an example of that shape"
            )
        leaves = flatten_dict(variables)
        bounded = {r.node: leaves[BOUNDS, *r.path] for r in self.rectifiers if (BOUNDS, *r.path) in leaves}

        def clip(node: int, value: Any) -> Any:
            if node in bounded:
                value = _clipped(value, bounded[node])
            return after(node, value) if after is not None else value

        images = next(at for at, node in enumerate(self.graph.nodes) if node.operator == INPUT)
        return self.graph.run(
            nodes, {images: ChannelsLast(x)}, self._reader(leaves), batch=x.shape[0], train=train, after=clip
        )

    def _reader(self, leaves: Mapping[Path, jax.Array]) -> Any:
        by_name = {tensor.name: tensor for tensor in self.tensors}

        def read(name: str) -> jax.Array:
            return by_name[name].to_torch(by_name[name].leaf(leaves))

        return read

    def _latent(self, value: Any) -> jax.Array:
        """The head's input as ``(B, D)``."""
        if self.tail is not None:
            array: jax.Array = to_torch(value)
            return array.reshape(array.shape[0], -1)
        if isinstance(value, ChannelsLast):
            return jnp.mean(value.array, (1, 2))
        return jnp.mean(value, tuple(range(2, value.ndim))) if value.ndim > 2 else value

    def features(self, variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` of normalized images, and the variables, with new statistics when training."""
        (latent,), statistics = self.run(variables, x, train, (self.latent,))
        return self._latent(latent), self._updated(variables, statistics)

    def _updated(self, variables: Variables, statistics: dict[str, jax.Array]) -> Variables:
        if not statistics:
            return variables
        paths = {tensor.name: tensor.path for tensor in self.tensors}
        leaves = flatten_dict(variables)
        new = {paths[name]: value.astype(leaves[paths[name]].dtype) for name, value in statistics.items()}
        return unflatten_dict({**leaves, **new})

    def maps(
        self, variables: Variables, x: jax.Array, train: bool, layers: tuple[Path, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...], Variables]:
        """What `features` returns, with the outputs of the modules at these paths in between.

        Raises:
            UserError: for a module that returns no map.
        """
        known = dict(self.map_nodes)
        for layer in layers:
            if layer not in known:
                names = ", ".join("/".join(path) for path in known)
                raise UserError(f"{self.name} has no layer {'/'.join(layer)!r} with a map; maps come from {names}")
        nodes = (self.latent, *(known[layer] for layer in layers))
        (latent, *maps), statistics = self.run(variables, x, train, nodes)
        return self._latent(latent), tuple(each.array for each in maps), self._updated(variables, statistics)

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``."""
        if self.tail is None:
            kernel, bias = linear_head(variables, self.head_path)
            logits = latent @ kernel
            return logits if bias is None else logits + bias
        leaves = flatten_dict(variables)
        given = {self.latent: latent.reshape(latent.shape[0], *self.tail)}
        (logits,), _ = self.graph.run((self.output,), given, self._reader(leaves), batch=latent.shape[0])
        return to_torch(logits)

    def activations(self, variables: Variables, x: jax.Array) -> Variables:
        """The largest value per channel of every activation that can be bounded, or 0 where that is larger."""
        found: dict[Path, jax.Array] = {}
        paths = {rectifier.node: rectifier.path for rectifier in self.rectifiers}

        def record(node: int, value: Any) -> Any:
            if node in paths:
                array = value.array if isinstance(value, ChannelsLast) else value
                found[paths[node]] = jnp.maximum(jnp.max(array, tuple(range(array.ndim - 1))), 0)
            return value

        self.run(variables, x, False, (self.latent,), record)
        return unflatten_dict(found)

    def conv_feeding_norm(self, variables: Variables, x: jax.Array) -> dict[Path, Path]:
        """The path in ``params`` of the convolution that feeds each batch normalization, by its own path."""
        del variables, x
        nodes, paths = self.graph.nodes, {tensor.name: tensor.path for tensor in self.tensors}
        found = {}
        for node in nodes:
            arguments = dict(node.arguments)
            if node.operator != BATCH_NORM:
                continue
            source = nodes[arguments["input"].node]
            weight = dict(source.arguments).get("weight")
            if source.operator.startswith("conv2d") and isinstance(weight, Ref):
                kernel = paths[dict(nodes[weight.node].arguments)["name"]]
                if kernel[-1] == "kernel":
                    found[paths[arguments["mean"]][1:-1]] = kernel[1:-1]
        return found

    # State dicts

    def variables(self, state: Mapping[str, Any]) -> Variables:
        """The variables of tensors as NumPy arrays, by name, those that are in no state dict included."""
        leaves = {}
        for tensor in self.tensors:
            array = np.asarray(state[tensor.name])
            if np.issubdtype(array.dtype, np.integer):  # PyTorch's 64 bits hold indices here, and counts.
                array = array.astype(np.int32)
            leaves[tensor.path] = jnp.array(tensor.from_torch(array))
        return {"params": {}, **unflatten_dict(leaves)}

    def state_dict(self, variables: Variables) -> dict[str, np.ndarray]:
        """The state dict of variables, as NumPy arrays."""
        leaves, state = flatten_dict(variables), {}
        for tensor in self.tensors:
            if tensor.saved:
                array = np.asarray(tensor.leaf(leaves))
                array = array.astype(tensor.dtype) if not np.issubdtype(array.dtype, np.floating) else array
                for name in (tensor.name, *tensor.aliases):
                    state[f"{self.prefix}{name}"] = np.array(
                        tensor.to_torch(array), order="C"
                    )  # A copy, which keeps rank 0.
        return state

    def bounds_by_module(self, variables: Variables) -> dict[str, np.ndarray]:
        """Upper bounds by the path of the module they clip: ``(C,)``, or ``(1, C)`` where channels are the last axis.

        That is what `backdoor_jax.interop.apply_bounds` takes.
        """
        leaves = flatten_dict(variables.get(BOUNDS, {}))
        found = {}
        for rectifier in self.rectifiers:
            if rectifier.path in leaves:
                upper = np.array(leaves[rectifier.path])
                found[rectifier.module] = upper[None] if rectifier.last else upper
        return found


def _clipped(value: Any, upper: jax.Array) -> Any:
    """An activation, clipped; not by `jnp.minimum`, whose gradient is lost where the result is computed twice."""
    if isinstance(value, ChannelsLast):
        return ChannelsLast(_clipped(value.array, upper))
    upper = upper.astype(value.dtype)
    return jnp.where(value >= upper, upper, value)
