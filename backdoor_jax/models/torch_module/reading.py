"""Reads a PyTorch module: its graph by ``torch.export``, its head, and where its tensors belong.

The module is exported in evaluation mode. What differs in training mode is batch normalization, which the interpreter
knows; dropout and stochastic depth stay off.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.compiling import full_precision, standard_rules
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.models.network import Path, Variables
from backdoor_jax.models.torch_module.graph import BATCH, BATCH_NORM, INPUT, PYTHON, TENSOR, Graph, Node, Ref
from backdoor_jax.models.torch_module.layouts import ChannelsLast, to_torch
from backdoor_jax.models.torch_module.network import Order, Rectifier, Tensor, TorchNetwork
from backdoor_jax.models.torch_module.operators import find

COUNTER = "num_batches_tracked"
EXTRA_STATE = "_extra_state"
"""The last level of the name under which a state dict has what a layer's ``get_extra_state`` returns."""
BATCH_NORMS = ("_native_batch_norm_legit_no_training",)
IGNORED = ("device", "pin_memory", "layout", "memory_format", "non_blocking", "cudnn_enable", "cudnn_enabled")
"""Arguments that do not change values."""
SAME_CLASS = ("softmax", "_softmax", "log_softmax", "clone", "alias", "detach", "dropout", "view", "flatten", "squeeze")
"""What may follow a linear head and is left out: it does not change which class is the largest."""
SOFTMAX = ("softmax", "_softmax", "log_softmax")
"""Of those, the ones that change values."""
AVERAGES = ("adaptive_avg_pool2d", "mean")
"""What may follow a 1x1 convolution as well: an average over positions is a linear function too."""
WITHOUT_INDICES = ("adaptive_max_pool1d", "adaptive_max_pool2d")
"""Operators whose second result, where each maximum is, is not computed."""
LARGEST_ROUNDING = 1e-2
"""The largest difference from PyTorch's logits, as a share of the largest of them; our choice."""
ACTIVATIONS = ("relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "leaky_relu", "elu", "mish")
"""Activations that can be bounded."""
RECTIFIERS = ("relu", "relu6")
"""Of those, the ones that may be clipped before as well as after."""


def _kind(node: Node) -> str:
    """An operator's name without its overload."""
    return node.operator.partition(".")[0]


class Call(NamedTuple):
    """A call of a module: its path, and which call it is."""

    path: str
    key: str


class Step(NamedTuple):
    """What is known of a node besides the graph: shape, and the calls of modules around it."""

    shape: tuple[Any, ...]
    calls: tuple[Call, ...]


def read_module(
    module: Any, image_shape: tuple[int, int, int], head: str | None = None
) -> tuple[TorchNetwork, Variables, int]:
    """The network of a PyTorch module, its variables, and the number of classes.

    Args:
        module: a ``torch.nn.Module`` from images ``(B, C, H, W)`` to logits; left as it is.
        image_shape: height, width and channels.
        head: the path of the linear head; by default the last linear layer or 1x1 convolution.

    Raises:
        UserError: for a module that cannot be exported, an operator that is not there, or no linear head.
    """
    if not isinstance(head, str | None):
        raise UserError(f"head is a {type(head).__name__}, expected the path of a layer as text, such as 'fc'")
    given, module = module, _plain(module)
    name = type(module).__name__
    exported = _export(module, image_shape, name)
    builder = _Builder(exported, module, name)
    graph, output, steps = builder.build()
    shape = steps[output].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise UserError(
            f"{name} returns a tensor of rank {len(shape)}, expected logits (B, C); wrap it in a module that does"
        )
    found = _find_head(builder, graph, output, head)
    tensors = _tensors(graph, module, exported, found)
    tail = None if found.linear else tuple(steps[found.latent].shape[1:])
    head_path = tuple(found.layer.split("."))
    state = given.state_dict()
    versions = tuple((path, each["version"]) for path, each in state._metadata.items() if "version" in each)
    extra = tuple((path, value) for path, value in state.items() if path.endswith(EXTRA_STATE))
    network = TorchNetwork(
        *(name, graph, tensors, image_shape, head_path, found.latent, output, tail),
        versions=versions,
        prefix=unwrapped(given)[1],
        extra_state=extra,
    )
    if tail is not None:
        _require_own_tail(network)
    variables = network.variables(_arrays(module, exported, tensors))
    network = _with_layers(network, variables, steps)
    _require_same_logits(network, variables, module, found.logits)
    return network, variables, shape[1]


def image_shape(example: Any) -> tuple[int, int, int]:
    """Height, width and channels of images.

    Args:
        example: a PyTorch tensor ``(B, C, H, W)``, an array ``(B, H, W, C)``, or a shape. Where either only the first
            or only the last of the three sizes is 1 or 3, that one is the channels.

    Raises:
        UserError: for anything else.

    Example:
        >>> image_shape((3, 32, 24)), image_shape(np.zeros((8, 32, 24, 1)))
        ((32, 24, 3), (32, 24, 1))
    """
    first = type(example).__module__.partition(".")[0] == "torch"
    found = getattr(example, "shape", example)
    if not isinstance(found, tuple | list):
        raise UserError(
            f"the example is a {type(example).__name__}, expected images or their shape; give some images, or (height, "
            "width, channels)"
        )
    shape = tuple(found)[-3:]
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise UserError(f"the example {shape} is no shape of images; give (height, width, channels) or some images")
    ends = [size in (1, 3) for size in (shape[0], shape[-1])]
    if ends == [True, False] or (first and ends != [False, True]):
        shape = (*shape[1:], shape[0])
    height, width, channels = shape
    return height, width, channels


def _plain(module: Any) -> Any:
    """The module itself, without what data-parallel training puts around it, in float32 or float64."""
    try:
        import torch
    except ImportError as error:
        raise UserError("from_torch needs PyTorch; run pip install 'backdoor_jax[torch]'") from error
    module, _ = unwrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError("TorchScript cannot be exported; give the torch.nn.Module that it was made from")
    if not isinstance(module, torch.nn.Module):
        raise UserError(f"expected a torch.nn.Module, got a {type(module).__name__}; build it and load its state dict")
    require_shapes(module)
    tensors = itertools.chain(module.parameters(), module.buffers())
    if any(tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors):
        return copy.deepcopy(module).float()
    return module


def unwrapped(module: Any) -> tuple[Any, str]:
    """The module inside data-parallel training and compilation, and what these put before its names."""
    import torch

    prefix = ""
    while True:
        parts = getattr(module, "_modules", {})
        if isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            level = "module"
        elif list(parts) == ["_orig_mod"]:
            level = "_orig_mod"
        else:
            return module, prefix
        module, prefix = parts[level], f"{prefix}{level}."


def require_shapes(module: Any) -> None:
    """Refuses a module with lazy layers, whose shapes are not known before its first call.

    Raises:
        UserError: for such a module.
    """
    lazy = [name for name, layer in module.named_modules() if getattr(layer, "has_uninitialized_params", bool)()]
    if lazy:
        raise UserError(
            f"{type(module).__name__}: layer {lazy[0]!r} is lazy and has no shape yet; call the module once on images "
            "before"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is printed during the block: neither by a module's own code nor by PyTorch, which explains at length."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _evaluating(torch: Any, module: Any) -> Iterator[None]:
    """The module in evaluation mode, and attention as plain operators, during the block."""
    modes = {each: each.training for each in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        module.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for each, training in modes.items():
            each.training = training


def run_module(module: Any, images: np.ndarray) -> list[Any]:
    """The tensors that a module returns for images ``(B, H, W, C)`` in evaluation mode; it is left as it is."""
    import torch

    module = _plain(module)
    reference = next(module.parameters(), torch.zeros(()))
    inputs = torch.tensor(images.transpose(0, 3, 1, 2), dtype=reference.dtype, device=reference.device)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}  # A forward may write to them.
    with _evaluating(torch, module), _quiet(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        returned = torch.func.functional_call(module, buffers, (inputs,))
    return [each for each in torch.utils._pytree.tree_leaves(returned) if isinstance(each, torch.Tensor)]


def _export(module: Any, image_shape: tuple[int, int, int], name: str) -> Any:
    """The module's graph for any number of images, without operators that write to their arguments."""
    import torch

    height, width, channels = image_shape
    reference = next(module.parameters(), torch.zeros(()))
    example = torch.zeros(2, channels, height, width, dtype=reference.dtype, device=reference.device)
    dynamic: tuple[Any, ...] = ({0: torch.export.Dim.DYNAMIC},)
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        dynamic = (dynamic,)
    shown = f"{height}x{width}x{channels}"
    try:
        with _evaluating(torch, module), _quiet():
            exported = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            return exported.run_decompositions({})
    except Exception as error:  # PyTorch raises many types.
        if "Constraints violated" in str(error):
            raise UserError(
                f"{name} fixes the number of images (a view or reshape with a number); use x.size(0) or flatten there"
            ) from error
        raise UserError(
            f"{name} cannot be exported by torch.export for images of {shown} ({first_line(error)}); check that it "
            "runs on such images and that its forward does not branch on values"
        ) from error


class _Builder:
    """Builds a graph of what an exported program's output needs."""

    def __init__(self, exported: Any, module: Any, name: str) -> None:
        from torch.export.graph_signature import InputKind

        signature = exported.graph_signature
        kinds = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
        self.fx = exported.graph
        self.inputs = {at: spec for at, spec in kinds.items() if spec.kind == InputKind.USER_INPUT}
        self.canonical = _canonical(module)
        self.targets = {at: self.canonical.get(spec.target, spec.target) for at, spec in kinds.items()}
        self.module = module
        self.name = name
        self.outputs = signature.user_outputs
        self.nodes: list[Node] = []
        self.steps: list[Step] = []
        self.places: dict[Any, int] = {}
        self.names: dict[int, str] = {}
        """The name of the tensor of each node that is one."""

    def build(self) -> tuple[Graph, int, list[Step]]:
        """The graph, the node of the output, and what is known of each node."""
        by_name = {node.name: node for node in self.fx.nodes}
        found = [by_name[each] for each in self.outputs if isinstance(each, str) and each in by_name]
        if len(found) != 1:
            raise UserError(
                f"{self.name} returns {len(found)} tensors, expected logits alone; wrap it in a module that returns "
                "these"
            )
        output = found[0]
        live: set[Any] = set()
        waiting = [output]
        while waiting:
            node = waiting.pop()
            if node not in live:
                live.add(node)
                waiting += node.all_input_nodes
        unknown: dict[str, str] = {}
        for node in self.fx.nodes:
            if node in live:
                self._add(node, unknown)
        if unknown:
            first, layer = next(iter(unknown.items()))
            more = f" and {', '.join(list(unknown)[1:])}" if len(unknown) > 1 else ""
            where, it = (f"layer {layer!r}", "that layer") if layer else ("its forward", "it")
            raise UserError(
                f"{self.name}: {where} uses the operator {first}{more}, which backdoor_jax does not have; replace "
                f"{it}, or add the operator to backdoor_jax/models/torch_module/operators"
            )
        return Graph(tuple(self.nodes)), self.places[output], self.steps

    def _add(self, node: Any, unknown: dict[str, str]) -> None:
        stack = (node.meta.get("nn_module_stack") or {}).items()
        calls = tuple(Call(path, key) for key, (path, _) in stack if path)
        layer = calls[-1].path if calls else ""
        if node.op == "placeholder":
            if node.name in self.inputs:
                made = Node(INPUT)
            else:
                self.names[len(self.nodes)] = self.targets[node.name]
                made = Node(TENSOR, (("name", self.targets[node.name]),))
        else:
            found = self._operation(node, layer, unknown)
            if isinstance(found, int):
                self.places[node] = found
                return
            made = found
        value = node.meta.get("val")
        self.places[node] = len(self.nodes)
        self.nodes.append(made)
        self.steps.append(Step(_shape(value), calls))

    def _operation(self, node: Any, layer: str, unknown: dict[str, str]) -> Node | int:
        """The node of an operator, or the one it is the same as."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            kind = f"{PYTHON}{getattr(node.target, '__name__', node.target)}"
            source = node.args[0] if node.args else None
            if kind == "python.getitem" and self._is_batch_norm(source):
                return self.places[source]
            if find(kind) is None:
                unknown.setdefault(str(node.target), layer)
            made = self.nodes[self.places[source]].operator if source in self.places else ""
            if kind == "python.getitem" and made in WITHOUT_INDICES and node.args[1] == 1:
                unknown.setdefault(f"aten.{made} with indices", layer)
            return Node(kind, tuple((str(at), self._plain(arg)) for at, arg in enumerate(node.args)), layer)
        kind = str(node.target).removeprefix("aten.").removesuffix(".default")
        if kind == "sym_size.int":
            symbol = getattr(getattr(node.meta["val"], "node", None), "expr", None)
            if symbol is not None and symbol.is_Symbol:
                return Node(BATCH)
        given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        arguments = {}
        for argument in schema.arguments:
            value = self._plain(given[argument.name]) if argument.name in given else None
            default = self._plain(argument.default_value) if argument.has_default_value() else None
            if argument.name in given and not (argument.has_default_value() and value == default):
                arguments[argument.name] = value
        arguments = {name: value for name, value in arguments.items() if name not in IGNORED}
        if kind in BATCH_NORMS or (kind == "instance_norm" and not arguments["use_input_stats"]):
            return self._batch_norm(arguments, layer, per_image=kind == "instance_norm")
        found = find(kind)
        if found is None or not set(arguments) <= found.parameters:
            extra = [] if found is None else sorted(set(arguments) - found.parameters)
            unknown.setdefault(f"aten.{kind}" + (f" with {', '.join(extra)}" if extra else ""), layer)
        return Node(kind, tuple(arguments.items()), layer)

    def _is_batch_norm(self, node: Any) -> bool:
        return node in self.places and self.nodes[self.places[node]].operator == BATCH_NORM

    def _batch_norm(self, arguments: dict[str, Any], layer: str, per_image: bool) -> Node:
        mean, var = (self.names[arguments.pop(f"running_{part}").node] for part in ("mean", "var"))
        owner, _, _ = mean.rpartition(".")
        counter = f"{owner}.{COUNTER}" if owner else COUNTER
        counter = self.canonical.get(counter, counter)
        known = not per_image and counter in dict(self.module.named_buffers())
        layer_of = dict(self.module.named_modules()).get(owner)
        momentum = arguments["momentum"]
        if known and getattr(layer_of, "momentum", momentum) is None:
            momentum = None
        values = {
            "input": arguments["input"],
            "weight": arguments.get("weight"),
            "bias": arguments.get("bias"),
            "mean": mean,
            "var": var,
            "counter": counter if known else None,
            "momentum": momentum,
            "eps": arguments["eps"],
            "per_image": per_image,
        }
        return Node(BATCH_NORM, tuple(values.items()), layer)

    def _plain(self, value: Any) -> Any:
        """An argument as a hashable value: results as `Ref`, lists as tuples, types by name."""
        if isinstance(value, list | tuple):
            return tuple(map(self._plain, value))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if value in self.places:
            return Ref(self.places[value])
        return str(value).removeprefix("torch.")


def _shape(value: Any) -> tuple[Any, ...]:
    """The shape of a traced value, or of the first of several; None where it depends on the number of images."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return tuple(size if isinstance(size, int) else None for size in getattr(value, "shape", ()))


# The head


class _Head(NamedTuple):
    """The layer that makes logits.

    Attributes:
        layer: its path in the module.
        weight: the name of its weight, the first of several.
        latent: the node of its input.
        logits: the node of the logits, which a softmax may follow.
        linear: whether they are a linear function of latents, by parameters that nothing else uses.
    """

    layer: str
    weight: str
    latent: int
    logits: int
    linear: bool


def _find_head(builder: "_Builder", graph: Graph, output: int, head: str | None) -> _Head:
    """The layer of this path, or the last linear layer or 1x1 convolution."""
    names, steps, canonical = builder.names, builder.steps, builder.canonical

    def layer_of(at: int) -> str | None:
        node, arguments = graph.nodes[at], dict(graph.nodes[at].arguments)
        weight = arguments.get("weight")
        name = names.get(weight.node) if isinstance(weight, Ref) else None
        known = [each.removesuffix(".weight") for each, first in canonical.items() if first == name]
        known = [each for each in known if f"{each}.weight" in canonical]
        if not known:
            return None
        layer = node.layer if node.layer in known else known[0]
        if node.operator == "linear":
            return layer
        plain = node.operator == "conv2d" and set(arguments) <= {"input", "weight", "bias"}
        return layer if plain and steps[arguments["weight"].node].shape[2:] == (1, 1) else None

    def found(layer: str, at: int, logits: int, linear: bool) -> _Head:
        arguments = dict(graph.nodes[at].arguments)
        weight = names[arguments["weight"].node]
        return _Head(layer, weight, arguments["input"].node, logits, linear)

    at, logits, averaged = output, output, False
    while layer_of(at) is None:
        node = graph.nodes[at]
        if _kind(node) not in SAME_CLASS + AVERAGES or not any(node.refs()):
            break
        averaged |= _kind(node) in AVERAGES
        at = next(node.refs())
        logits = at if _kind(node) in SOFTMAX else logits
    direct = layer_of(at)
    if direct is not None and graph.nodes[at].operator == "linear":
        direct = direct if not averaged and len(steps[at].shape) == 2 else None
    elif direct is not None:
        averages = averaged or steps[at].shape[2:] == (1, 1)
        direct = direct if averages else None
    if direct is not None and head in (None, direct) and _has_own_tensors(builder, graph, at, direct):
        return found(direct, at, logits, True)

    heads = {layer: at for at in range(output + 1) if (layer := layer_of(at)) is not None}
    if head is not None:
        heads = {layer: at for layer, at in heads.items() if layer == head}
    if not heads:
        computed = [
            node.layer or "in its forward"
            for node in graph.nodes
            if node.operator in ("linear", "conv2d") and dict(node.arguments)["weight"].node not in names
        ]
        if computed and head in (None, computed[-1]):
            raise UserError(
                f"{builder.name}: the weight of its head ({computed[-1]}) is computed, as by pruning or weight "
                "normalization; make it a plain one by torch.nn.utils.prune.remove or "
                "parametrize.remove_parametrizations, or end in a linear layer"
            )
        what = "no linear layer or 1x1 convolution" if head is None else f"no such layer {head!r}"
        raise UserError(f"{builder.name} has {what} that could be its head; name it as head, or end in a linear layer")
    layer, at = max(heads.items(), key=lambda item: item[1])
    return found(layer, at, output, False)


def _has_own_tensors(builder: "_Builder", graph: Graph, at: int, layer: str) -> bool:
    """Whether a node alone uses the weight of its layer, with the bias that lies beside it."""
    arguments, used = dict(graph.nodes[at].arguments), Counter(ref for node in graph.nodes for ref in node.refs())
    bias, beside = arguments.get("bias"), builder.canonical.get(f"{layer}.bias")
    if bias is None:
        return used[arguments["weight"].node] == 1 and beside not in builder.names.values()
    own = [used[arguments[part].node] == 1 for part in ("weight", "bias")]
    return all(own) and builder.names.get(bias.node) == beside == f"{layer}.bias"


def _require_own_tail(network: TorchNetwork) -> None:
    """Refuses logits that depend on more than the head's input, or on statistics."""
    nodes = [network.graph.nodes[at] for at in network.graph.needed((network.output,), {network.latent: None})]
    kinds = {node.operator for node in nodes}
    if kinds & {INPUT, BATCH_NORM}:
        what = "a batch normalization follows" if INPUT not in kinds else "something bypasses"
        raise UserError(
            f"{network.name}: {what} the layer {'.'.join(network.head_path)!r}, which was taken for its head; name "
            "another as head, or end in a linear layer"
        )


# Tensors


def _canonical(module: Any) -> dict[str, str]:
    """The first name of each tensor, by any of its names."""
    firsts: dict[int, str] = {}
    return {
        name: firsts.setdefault(id(tensor), name)
        for name, tensor in itertools.chain(
            module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        )
    }


def _tensors(graph: Graph, module: Any, exported: Any, head: _Head) -> tuple[Tensor, ...]:
    """Where each tensor of the module belongs; parameters that the graph does not use are not trained."""
    uses: dict[str, set[tuple[str, str]]] = {}
    statistics: dict[str, str] = {}
    for node in graph.nodes:
        for argument, value in node.arguments:
            source = graph.nodes[value.node] if isinstance(value, Ref) else None
            if source is not None and source.operator == TENSOR:
                uses.setdefault(source.arguments[0][1], set()).add((node.operator, argument))
        if node.operator == BATCH_NORM:
            arguments = dict(node.arguments)
            statistics |= {arguments["mean"]: "mean", arguments["var"]: "var"}

    canonical = _canonical(module)
    parameters, saved = dict(module.named_parameters()), set(module.state_dict())
    constants = {name: value for name, value in exported.constants.items() if canonical.get(name, name) == name}
    found = {}
    for name, value in itertools.chain(parameters.items(), module.named_buffers(), constants.items()):
        if name in found or not hasattr(value, "shape"):
            continue
        *place, leaf = (f"{head.layer}.weight" if name == head.weight else name).split(".")
        used = uses.get(name, set())
        order: Order = "torch"
        if name in statistics:
            collection, leaf = "batch_stats", statistics[name]
        elif name in parameters and used:
            collection = "params"
            if leaf == "weight" and used == {("linear", "weight")}:
                leaf, order = "kernel", "linear"
            elif leaf == "weight" and used == {("conv2d", "weight")}:
                leaf, order = "kernel", "pointwise_conv" if head.linear and name == head.weight else "conv"
            elif leaf == "weight" and used == {(BATCH_NORM, "weight")}:
                leaf = "scale"
        else:
            collection = "buffers"
        aliases = tuple(other for other, first in canonical.items() if first == name and other != name)
        dtype = str(value.dtype).removeprefix("torch.")
        path = (collection, *place, leaf)
        found[name] = Tensor(name, path, tuple(value.shape), dtype, order, aliases, name in saved)
    return tuple(found.values())


def _arrays(module: Any, exported: Any, tensors: tuple[Tensor, ...]) -> Mapping[str, np.ndarray]:
    values = {**exported.constants, **dict(module.named_buffers()), **dict(module.named_parameters())}
    return {tensor.name: values[tensor.name].detach().cpu().numpy() for tensor in tensors}


def _require_same_logits(network: TorchNetwork, variables: Variables, module: Any, logits: int) -> None:
    """Refuses a network whose logits are not the module's, on two images of noise.

    The module is in float32 or float64; rounding changes the logits of deep networks by a thousandth at most.
    """
    images = np.random.default_rng(0).random((2, *network.image_shape), np.float32)
    expected = run_module(module, images)[0].cpu().double().numpy()
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(variables["params"]))
    with standard_rules():
        found, inner, made = map(np.asarray, _logits(network, logits, variables, images.astype(dtype)))
    for one, other in ((expected, found), (inner.reshape(made.shape), made)):
        scale, difference = np.max(np.abs(one)), np.max(np.abs(one - other))
        if np.isfinite(scale) and not difference <= LARGEST_ROUNDING * scale:
            raise UserError(
                f"{network.name}: its logits in JAX differ from PyTorch's by {difference:.2g}, where the largest is "
                f"{scale:.2g}; please report it with the module's code"
            )


@full_precision
@partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def _logits(
    network: TorchNetwork, logits: int, variables: Variables, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the graph returns, its logits, and the same by the head; compiled fast, for one run."""
    (latent, *found), _ = network.run(variables, x, False, (network.latent, network.output, logits))
    return *map(to_torch, found), network.head(variables, network._latent(latent))


# Layers


def _with_layers(network: TorchNetwork, variables: Variables, steps: list[Step]) -> TorchNetwork:
    """The network with its activations that can be bounded and its layers that return maps.

    Traces it once, which also finds an operator that cannot be computed.
    """
    kinds: dict[int, tuple[bool, int]] = {}

    def record(node: int, value: Any) -> Any:
        kinds[node] = isinstance(value, ChannelsLast), len(getattr(value, "shape", ()))
        return value

    def trace(variables: Variables, x: jax.Array) -> jax.Array:
        (latent,), _ = network.run(variables, x, False, (network.latent,), record)
        return network.head(variables, network._latent(latent))

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(variables["params"]))
    jax.eval_shape(trace, variables, jax.ShapeDtypeStruct((3, *network.image_shape), dtype))

    outputs = _outputs(network.graph, steps)
    modules: dict[int, list[str]] = {}
    for path, at in outputs.items():
        modules.setdefault(at, []).append(path)
    users = Counter(source for node in network.graph.nodes for source in node.refs())

    rectifiers, taken = [], set()
    for at, node in enumerate(network.graph.nodes):
        if node.operator not in ACTIVATIONS or at not in kinds:
            continue
        last, rank = kinds[at]
        places = modules.get(at, [])
        source = next(node.refs())
        commutes = node.operator in RECTIFIERS or dict(node.arguments).get("min_val") == 0
        if not places and commutes and users[source] == 1:
            places = modules.get(source, [])
        if places and (path := max(places, key=len)) not in taken:
            taken.add(path)
            rectifiers.append(Rectifier(at, path, not last and rank > 2))

    maps = {path: at for path, at in outputs.items() if kinds.get(at) == (True, 4)}
    ends: dict[tuple[int, int], tuple[int, Path]] = {}
    for path, at in sorted(maps.items(), key=lambda item: (item[1], -len(item[0]))):
        size = steps[at].shape[2:]
        if min(size) > 1:
            ends[size] = (at, tuple(path.split(".")))
    layers = tuple(path for _, path in sorted(ends.values()))
    named = tuple((tuple(path.split(".")), at) for path, at in maps.items())
    return dataclasses.replace(network, rectifiers=tuple(rectifiers), map_nodes=named, map_layers=layers)


def _outputs(graph: Graph, steps: list[Step]) -> dict[str, int]:
    """The node that is the output of each module, of those that are called once and return one tensor."""
    users: dict[int, list[int]] = {}
    for at, node in enumerate(graph.nodes):
        for source in node.refs():
            users.setdefault(source, []).append(at)
    calls: dict[str, set[str]] = {}
    found: dict[str, set[int]] = {}
    for at, step in enumerate(steps):
        for path, key in step.calls:
            calls.setdefault(path, set()).add(key)
            outside = [user for user in users.get(at, []) if (path, key) not in steps[user].calls]
            if outside or at not in users:
                found.setdefault(path, set()).add(at)
    return {path: min(nodes) for path, nodes in found.items() if len(calls[path]) == 1 and len(nodes) == 1}
