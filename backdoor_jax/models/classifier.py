"""`Classifier`: the one interface through which attacks, defenses and metrics use a network."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import FlaxError

from backdoor_jax.compiling import standard_rules
from backdoor_jax.config import is_number, is_whole
from backdoor_jax.data import DATASETS, Normalization
from backdoor_jax.errors import NoLinearHead, UserError, first_line, printable
from backdoor_jax.models.network import (
    FunctionNetwork,
    LinenNetwork,
    Network,
    NNXNetwork,
    Part,
    Path,
    Variables,
    linear_head,
    require_latents,
    split_nnx,
)
from backdoor_jax.models.precision import HalfPrecision, Precision
from backdoor_jax.models.torch_module import TorchNetwork, image_shape, read_module

NORMALIZATIONS: dict[str, Normalization] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    **{spec.name: spec.normalization for spec in DATASETS.values() if spec.normalization},
}
"""Mean and standard deviation of pixels in [0, 1], by the name of the data set; ``none`` leaves them as they are.

Those of ``imagenet`` are torchvision's.
"""
LONGEST_VALUE = 80
"""Characters of a value in an error."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network with its input normalization; pure methods over a variables tree.

    Equal and hashable by value and registered as static, so that jitted code may close over it or take it as an
    argument without compiling again for an equal one. Its methods take uint8 images ``(B, H, W, channels)``.

    Args:
        network: a Linen module with methods ``features(x, train)`` and ``head(latent)``, or any `Network`;
            `from_linen`, `from_nnx` and `from_functions` make one of other modules and of functions.
        num_classes: the number of classes C.
        mean: of each channel, of pixels scaled to [0, 1].
        std: the standard deviation of each channel, of pixels scaled to [0, 1]; positive.
        head_path: path of the linear head in ``params``; it has a ``kernel`` (D, C) and a ``bias`` (C,).
        dtype: what the network computes in up to its latents; ``bfloat16`` leaves weights, batch normalization, the
            head, losses and everything computed from latents in float32. ``float32`` is float64 for such weights.

    Example:
        >>> from backdoor_jax.models.preact_resnet import PreActResNet18
        >>> classifier = Classifier(PreActResNet18(10, width=4), 10)
        >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
        >>> variables = classifier.init(jax.random.key(0), images)
        >>> latent, _ = classifier.features(variables, images)
        >>> latent.shape, classifier.head(variables, latent).shape
        ((2, 32), (2, 10))
    """

    network: Any
    num_classes: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    head_path: tuple[str, ...] = ("linear",)
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Precision):
            found = printable(repr(self.dtype), LONGEST_VALUE)
            raise UserError(f"unknown dtype {found}; known are {', '.join(get_args(Precision))}")
        if not is_whole(self.num_classes) or self.num_classes < 1:
            found = printable(repr(self.num_classes), LONGEST_VALUE)
            raise UserError(f"Classifier.num_classes is {found}, expected a whole number, such as 10")
        for name in ("mean", "std"):  # Lists, arrays and tensors as tuples, which can be hashed.
            value = getattr(self, name)
            value = value.tolist() if hasattr(value, "tolist") else value
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        mean, std = (part if isinstance(part, Sequence) else () for part in (self.mean, self.std))
        numbers = (*mean, *std)
        finite = all(map(is_number, numbers)) and max(map(abs, numbers), default=0) < np.finfo(np.float32).max
        if not finite or not len(mean) == len(std) > 0 or min(std) < np.finfo(np.float32).tiny:
            shown, scale = (printable(str(part), LONGEST_VALUE) for part in (self.mean, self.std))
            raise UserError(
                f"mean {shown} and std {scale} must name the same channels with std > 0; give one pair of "
                "finite numbers for each channel"
            )
        if max(mean) > 1:
            raise UserError(f"mean {self.mean} is that of pixels up to 255; divide mean and std by 255")

    def normalize(self, images: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """uint8 images to the network's input: ``(images / 255 - mean) / std``."""
        scale = 1 / (255 * np.asarray(self.std, dtype))
        shift = np.asarray(self.mean, dtype) / np.asarray(self.std, dtype)
        return images.astype(dtype) * scale - shift

    @contextlib.contextmanager
    def _computing(self, shape: tuple[int, ...], what: str = "images") -> Iterator[None]:
        """JAX's standard rules, and one line for what Flax and JAX raise where shapes do not fit."""
        try:
            with standard_rules():
                yield
        except (FlaxError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, UserError):
                raise
            shown = "x".join(map(str, shape[1:]))
            raise UserError(
                f"the network cannot take {what} of {shown} with these variables ({first_line(error)}); give variables "
                "of this network, and images as in its training"
            ) from error

    def _input(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Normalized images in the precision of the weights, at least float32."""
        return self.normalize(images, self._precision(variables))

    def _precision(self, variables: Variables) -> jax.typing.DTypeLike:
        return jnp.result_type(jnp.float32, *jax.tree.leaves(variables.get("params")))

    @classmethod
    def from_linen(
        cls,
        module: nn.Module,
        num_classes: int,
        head_path: tuple[str, ...],
        features: Part = None,
        head: Part = None,
        *,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> "Classifier":
        """The classifier of any Linen module that ends in a linear layer.

        A parameter ``train``, ``training``, ``is_training``, ``deterministic`` or ``use_running_average`` of the module
        is set according to the mode. Activation bounds need `backdoor_jax.models.layers.ReLU` or ``GELU`` in it.

        Args:
            module: the module, without variables.
            num_classes: the number of classes C.
            head_path: names down to its linear head in ``params``, such as ``("Dense_1",)``.
            features: what computes latents ``(B, D)`` of normalized images: a method's name, or a function of the
                module and the images (define it once: functions are equal only to themselves). By default the latents
                are what the head receives when the module is called.
            head: what computes logits of latents: a method's name, or a function of the module and the latents; by
                default the layer at `head_path`.
            mean: of each channel, of pixels in [0, 1].
            std: the standard deviation of each channel, of pixels in [0, 1].

        Example:
            >>> class Net(nn.Module):
            ...     @nn.compact
            ...     def __call__(self, x):
            ...         x = nn.relu(nn.Dense(5)(x.mean((1, 2))))
            ...         return nn.Dense(3, name="out")(x)
            >>> classifier = Classifier.from_linen(Net(), 3, ("out",))
            >>> images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
            >>> latent, _ = classifier.features(classifier.init(jax.random.key(0), images), images)
            >>> latent.shape
            (2, 5)
        """
        if not isinstance(module, nn.Module):
            raise UserError(
                f"from_linen: module is a {type(module).__name__}, expected a flax.linen.Module; others go through "
                "from_torch, from_nnx or from_functions"
            )
        return cls(LinenNetwork(module, head_path, features, head), num_classes, mean, std, head_path)

    @classmethod
    def from_nnx(
        cls,
        model: nnx.Module,
        num_classes: int,
        head_path: tuple[str, ...],
        features: Part = None,
        head: Part = None,
        *,
        make: Callable[[jax.Array], nnx.Module] | None = None,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> tuple["Classifier", Variables]:
        """The classifier of an NNX module that ends in a linear layer, and the variables the module holds.

        ``classifier.network.model(variables)`` is an NNX module again.

        Args:
            model: the module; left as it is.
            num_classes: the number of classes C.
            head_path: names down to its ``nnx.Linear``; an entry of a list by its number, such as ``("layers", "2")``.
            features: what computes latents, as in `from_linen`.
            head: what computes logits of latents, as in `from_linen`.
            make: makes a new module from a key, such as ``lambda key: Net(nnx.Rngs(key))``; only needed for training
                from scratch.
            mean: of each channel, of pixels in [0, 1].
            std: the standard deviation of each channel, of pixels in [0, 1].

        Example:
            >>> class Net(nnx.Module):
            ...     def __init__(self, rngs):
            ...         self.out = nnx.Linear(3, 4, rngs=rngs)
            ...     def __call__(self, x):
            ...         return self.out(x.mean((1, 2)))
            >>> classifier, variables = Classifier.from_nnx(Net(nnx.Rngs(0)), 4, ("out",))
            >>> classifier.logits(variables, jnp.zeros((2, 8, 8, 3), jnp.uint8))[0].shape
            (2, 4)
        """
        graph, layout, variables = split_nnx(model)
        network = NNXNetwork(graph, layout, head_path, features, head, make)
        return cls(network, num_classes, mean, std, head_path), variables

    @classmethod
    def from_functions(
        cls,
        init: Callable[[jax.Array, jax.Array], Variables] | None,
        features: Callable[[Variables, jax.Array, bool], tuple[jax.Array, Variables]],
        head: Callable[[Variables, jax.Array], jax.Array],
        num_classes: int,
        head_path: tuple[str, ...],
        *,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> "Classifier":
        """The classifier of functions over a variables tree; define them once, since equality is identity.

        Args:
            init: ``(key, x) -> variables``, dictionaries with ``params`` in them; or None where nothing is trained from
                scratch.
            features: ``(variables, x, train) -> (latent (B, D), variables)``.
            head: ``(variables, latent) -> logits (B, C)``; linear, for TAC.
            num_classes: the number of classes C.
            head_path: path in ``params`` of the head, with a ``kernel`` (D, C) and a ``bias`` (C,).
            mean: of each channel, of pixels in [0, 1].
            std: the standard deviation of each channel, of pixels in [0, 1].

        Example:
            >>> def features(variables, x, train):
            ...     return x.mean((1, 2)), variables
            >>> def head(variables, latent):
            ...     return latent @ variables["params"]["out"]["kernel"]
            >>> classifier = Classifier.from_functions(None, features, head, 4, ("out",))
            >>> variables = {"params": {"out": {"kernel": jnp.ones((3, 4))}}}
            >>> classifier.logits(variables, jnp.zeros((2, 8, 8, 3), jnp.uint8))[0].shape
            (2, 4)

        Raises:
            UserError: for anything but functions.
        """
        for name, part in (("init", init), ("features", features), ("head", head)):
            if not callable(part) and (name, part) != ("init", None):
                raise UserError(f"from_functions: {name} is a {type(part).__name__}, expected a function")
        return cls(FunctionNetwork(init, features, head), num_classes, mean, std, head_path)

    @classmethod
    def from_torch(
        cls,
        module: Any,
        example: Any,
        head: str | None = None,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> tuple["Classifier", Variables]:
        """The classifier of any PyTorch module that makes logits of images, and the variables the module holds.

        The module is exported by ``torch.export`` in evaluation mode, for any number of images of one shape, and its
        operators are computed in JAX. In training mode batch normalizations use and update statistics as in PyTorch,
        and dropout stays off. `backdoor_jax.save_torch` writes a state dict that loads into the same module.

        Args:
            module: a ``torch.nn.Module`` from images ``(B, C, H, W)`` to logits; left as it is.
            example: images, of which only the shape is used: a tensor ``(B, C, H, W)``, an array ``(B, H, W, C)``, or
                a shape ``(H, W, C)`` or ``(C, H, W)``.
            head: the path of the linear head, such as ``"fc"``; by default the module's last linear layer or 1x1
                convolution. Latents are what it receives.
            mean: of each channel, of pixels in [0, 1], as in the module's training; 0 by default.
            std: the standard deviation of each channel, of pixels in [0, 1]; 1 by default.

        Raises:
            UserError: for a module that cannot be exported, an operator that is not there, naming it and its layer, or
                a module without a linear head.

        Example:
            >>> import torch  # doctest: +SKIP
            >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))  # doctest: +SKIP
            >>> classifier, variables = Classifier.from_torch(net, (8, 8, 3))  # doctest: +SKIP
            >>> classifier.logits(variables, jnp.zeros((2, 8, 8, 3), jnp.uint8))[0].shape  # doctest: +SKIP
            (2, 10)
        """
        shape = image_shape(_readable(example))
        network, variables, num_classes = read_module(module, shape, head)
        mean = (0.0,) * shape[-1] if mean is None else mean
        std = (1.0,) * shape[-1] if std is None else std
        classifier = cls(network, num_classes, mean, std, network.head_path)
        if len(classifier.mean) != shape[-1]:
            raise UserError(
                f"from_torch: mean and std have {len(classifier.mean)} channels, the images {shape[-1]}; give one pair "
                "of numbers for each channel"
            )
        return classifier, variables

    @property
    def _network(self) -> Network:
        network: Network = self.network
        if isinstance(self.network, nn.Module):
            network = LinenNetwork(self.network, self.head_path, "features", "head")
        return HalfPrecision(network, self.head_path) if self.dtype == "bfloat16" else network

    def init(self, key: jax.Array, images: jax.Array) -> Variables:
        """New variables for images of this shape.

        Of the images only the shape is used. The initialization is compiled, unless it is being traced.

        Raises:
            UserError: for anything but a key and images.
        """
        if not isinstance(key, jax.Array):
            raise UserError(f"init: key is a {type(key).__name__}, expected a single key; give jax.random.key(0)")
        if getattr(images, "ndim", 0) != 4:
            raise UserError(
                f"init: images are {getattr(images, 'shape', type(images).__name__)}, expected (N, height, width, "
                "channels)"
            )
        if isinstance(key, jax.core.Tracer):
            return self._network.init(key, self.normalize(images[:1]))
        return _initialized(self, key, images[:1])

    def features(self, variables: Variables, images: jax.Array, train: bool = False) -> tuple[jax.Array, Variables]:
        """Latents ``(B, D)`` of images ``(B, H, W, channels)``, and the variables with new statistics.

        In evaluation mode the variables are returned unchanged, in training mode with the batch's statistics.
        """
        with self._computing(images.shape):
            latent, variables = self._network.features(variables, self._input(variables, images), train)
            return require_latents(latent), variables

    def head(self, variables: Variables, latent: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of latents ``(B, D)``, in the precision of the weights, at least float32."""
        with self._computing(latent.shape, "latents"):
            logits = self._network.head(variables, latent)
        if logits.shape[-1] != self.num_classes:
            raise UserError(
                f"the head at {'/'.join(self.head_path)!r} gives {logits.shape[-1]} logits for {self.num_classes} "
                "classes; give the head's own path and number of classes"
            )
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def logits(self, variables: Variables, images: jax.Array, train: bool = False) -> tuple[jax.Array, Variables]:
        """Logits ``(B, C)`` of images, and the variables as `features` returns them."""
        latent, variables = self.features(variables, images, train)
        return self.head(variables, latent), variables

    def logits_of_input(self, variables: Variables, x: jax.Array) -> jax.Array:
        """Logits ``(B, C)`` of images that are normalized already, in evaluation mode."""
        with self._computing(x.shape):
            latent, _ = self._network.features(variables, x.astype(self._precision(variables)), False)
            return self.head(variables, require_latents(latent))

    @property
    def map_layers(self) -> tuple[Path, ...]:
        """The last layer at each resolution, down to the one before pooling; empty where none are named."""
        network = self._network
        return getattr(network, "map_layers", getattr(getattr(network, "module", None), "map_layers", ()))

    def maps(
        self, variables: Variables, images: jax.Array, layers: tuple[Path, ...], train: bool = False
    ) -> tuple[jax.Array, tuple[jax.Array, ...], Variables]:
        """Logits ``(B, C)``, the feature maps of layers, and the variables as `features` returns them.

        The maps are ``(B, H, W, channels)``.

        Args:
            variables: the network's.
            images: uint8 images.
            layers: names down to each layer in ``params``, such as `map_layers`.
            train: whether to compute in training mode.

        Raises:
            UserError: where the network is neither a Linen nor a PyTorch module, calls no such layer, or the layer's
                output is no map.
        """
        network: Any = self._network
        if not hasattr(network, "maps") or getattr(network, "module", self) is None:
            raise UserError(f"{type(self.network).__name__} has no layers that can be observed; give a Linen module")
        with self._computing(images.shape):
            latent, maps, variables = network.maps(variables, self._input(variables, images), train, layers)
        for layer, found in zip(layers, maps, strict=True):
            if found.ndim != 4:
                raise UserError(
                    f"the output of layer {'/'.join(layer)!r} is {found.shape}, expected a map (B, H, W, channels)"
                )
        return self.head(variables, require_latents(latent)), maps, variables

    def activations(self, variables: Variables, images: jax.Array) -> Variables:
        """The largest value per channel of each activation that can be bounded, a tree like ``bounds``.

        It is taken over the batch. Empty where the network has no `backdoor_jax.models.layers.ReLU` or ``GELU``.
        """
        with self._computing(images.shape):
            return self._network.activations(variables, self._input(variables, images))

    def conv_feeding_norm(self, variables: Variables, images: jax.Array) -> dict[tuple[str, ...], tuple[str, ...]]:
        """The path in ``params`` of the convolution that feeds each batch normalization, by its own path.

        Nothing may lie between the two. Only the images' shape is used, and nothing is computed. Empty where the
        network is not a Linen module or has no such pair.
        """
        found: dict[tuple[str, ...], tuple[str, ...]] = {}

        def trace(variables: Variables, image: jax.Array) -> None:
            found.update(self._network.conv_feeding_norm(variables, self._input(variables, image)))

        jax.eval_shape(trace, variables, jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype))
        return found

    def head_weights(self, variables: Variables) -> tuple[jax.Array, jax.Array]:
        """The linear head's kernel ``(D, C)`` and bias ``(C,)``.

        Raises:
            NoLinearHead: where more follows the layer at ``head_path``.
            UserError: where there is no linear layer there.
        """
        if isinstance(self.network, TorchNetwork) and self.network.tail is not None:
            raise NoLinearHead(
                f"this needs a linear head with weights of its own, and in this {self.network.name} more follows the "
                f"layer {'/'.join(self.head_path)!r}, or it shares its weights"
            )
        kernel, bias = linear_head(variables, self.head_path)
        return kernel, jnp.zeros(self.num_classes) if bias is None else bias


def _readable(example: Any) -> Any:
    """An example of images of which `image_shape` finds the shape.

    Raises:
        UserError: for what is no shape, and for channels that seem to come first where they should come last.

    Example:
        >>> _readable((np.int64(8), 8, 3)), _readable((3, 8, 8))
        ((8, 8, 3), (3, 8, 8))
    """
    if type(example).__module__.partition(".")[0] == "torch":
        return example
    if isinstance(example, np.ndarray) and example.ndim == 1:
        example = example.tolist()
    if isinstance(example, tuple | list):
        if not all(is_whole(size) for size in example):
            kinds = ", ".join(type(part).__name__ for part in example[:3])
            raise UserError(
                f"from_torch: the example is a {type(example).__name__} of {kinds or 'nothing'}, expected images or "
                "their shape; give the images alone, or (height, width, channels)"
            )
        example = tuple(map(int, example))
    shape = example if isinstance(example, tuple) else getattr(example, "shape", ())
    first, height, width = shape[-3:] if len(shape) >= 3 else (1, 1, 1)
    if first not in (1, 3) and first < height == width != 3:
        raise UserError(
            f"from_torch: the example of shape {printable(str(shape), LONGEST_VALUE)} seems to have channels first; "
            f"give channels last, as {(height, width, first)}, or a PyTorch tensor"
        )
    return example


# With optimization the generators of all layers take ten times as long to compile, for a program that runs once.
@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _initialized(classifier: Classifier, key: jax.Array, images: jax.Array) -> Variables:
    return classifier.init(key, images)
