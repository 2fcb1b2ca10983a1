"""Networks, and the `Classifier` through which they are used."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from backdoor_jax.arguments import typed
from backdoor_jax.config import MOST_CLASSES
from backdoor_jax.errors import UserError
from backdoor_jax.models.classifier import NORMALIZATIONS, Classifier, Variables
from backdoor_jax.models.network import Network
from backdoor_jax.models.preact_resnet import PreActResNet18
from backdoor_jax.models.precision import Precision
from backdoor_jax.models.resnet import STEMS, ResNet, Stem
from backdoor_jax.models.small_cnn import SmallCNN
from backdoor_jax.models.vgg import VGG19
from backdoor_jax.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network that can be chosen by name.

    Attributes:
        build: makes it from a class count, a width, and its options by name.
        summary: one line about it.
        head_path: path of its linear head in ``params``.
        options: what can be chosen besides the width.
    """

    build: Callable[..., nn.Module]
    summary: str
    head_path: tuple[str, ...] = ("linear",)
    options: tuple[str, ...] = ()


def _resnet(depth: int, build: Callable[..., nn.Module]) -> Architecture:
    return Architecture(build, f"ResNet-{depth}; stem {', '.join(STEMS)}; the first is the default", ("fc",), ("stem",))


MODELS: dict[str, Architecture] = {
    "preact_resnet18": Architecture(
        PreActResNet18, "PreAct-ResNet18 as in the published benchmark; width 64 is the full network"
    ),
    "resnet10": _resnet(10, partial(ResNet, blocks=(1, 1, 1, 1))),
    "resnet18": _resnet(18, ResNet),
    "resnet34": _resnet(34, partial(ResNet, blocks=(3, 4, 6, 3))),
    "resnet50": _resnet(50, partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True)),
    "vgg19_bn": Architecture(VGG19, "VGG19 with batch normalization, for images of 32x32 or larger", ("classifier_6",)),
    "vit_tiny": Architecture(
        VisionTransformer,
        "ViT-Tiny: 12 layers of 3 heads, width channels each; patch 4 by default",
        ("heads_head",),
        ("patch",),
    ),
    "small_cnn": Architecture(SmallCNN, "three convolutions, for examples and quick trials"),
}


@typed
def build_classifier(
    model: str,
    num_classes: int,
    width: int = 64,
    normalization: str = "none",
    *,
    stem: Stem | None = None,
    patch: int | None = None,
    dtype: Precision = "float32",
) -> Classifier:
    """Makes the `Classifier` of a named network.

    Args:
        model: a name in `MODELS`.
        num_classes: the number of classes, at least 2.
        width: channels of the first layer, or of an attention head; 64 is the published network for each.
        normalization: a name in `NORMALIZATIONS`.
        stem: a name in `STEMS`, for a network with that option; by default the network's own default.
        patch: side of a patch in pixels, for a network with that option; by default the network's own default.
        dtype: what it computes in; see `Classifier`.

    Raises:
        UserError: for an unknown name, or an option that the network does not have.

    Example:
        >>> build_classifier("preact_resnet18", 10, width=8).num_classes
        10
        >>> build_classifier("resnet50", 10, width=8, stem="imagenet").head_path
        ('fc',)
    """
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}; known are {', '.join(sorted(MODELS))}")
    if not (_whole(num_classes, 2, MOST_CLASSES) and _whole(width, 1, 2**12)):
        raise UserError(
            f"{num_classes!r} classes and width {width!r} make no classifier; give 2 to {MOST_CLASSES} classes "
            f"and a width of 1 to {2**12}"
        )
    if normalization not in NORMALIZATIONS:
        raise UserError(f"unknown normalization {normalization!r}; known are {', '.join(sorted(NORMALIZATIONS))}")
    options = {name: value for name, value in (("stem", stem), ("patch", patch)) if value is not None}
    for name in options:
        if name not in MODELS[model].options:
            owners = ", ".join(sorted(owner for owner, known in MODELS.items() if name in known.options))
            raise UserError(f"model {model!r} has no {name}; leave it out, or choose a model that has one: {owners}")
    network = MODELS[model].build(num_classes, width, **options)
    return Classifier(network, num_classes, *NORMALIZATIONS[normalization], MODELS[model].head_path, dtype)


def _whole(value: object, lowest: int, highest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


@typed
def describe(classifier: Classifier) -> dict[str, Any] | None:
    """The ``model``, ``width`` and ``options`` for which `build_classifier` makes a classifier's network.

    Returns:
        Plain values, or None for a network that it cannot make.

    Example:
        >>> describe(build_classifier("vit_tiny", 10, width=8, patch=2))
        {'model': 'vit_tiny', 'width': 8, 'options': {'patch': 2}}
    """
    network = classifier.network
    for name, architecture in MODELS.items():
        options = {option: getattr(network, option, None) for option in architecture.options}
        width = getattr(network, "width", None)
        if width is None or None in options.values() or classifier.head_path != architecture.head_path:
            continue
        if architecture.build(classifier.num_classes, width, **options) == network:
            return {"model": name, "width": width, "options": options}
    return None


__all__ = [
    "MODELS",
    "NORMALIZATIONS",
    "STEMS",
    "VGG19",
    "Architecture",
    "Classifier",
    "Network",
    "PreActResNet18",
    "Precision",
    "ResNet",
    "SmallCNN",
    "Stem",
    "Variables",
    "VisionTransformer",
    "build_classifier",
    "describe",
]
