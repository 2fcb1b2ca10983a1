"""Networks, and the `Classifier` they are used through."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn

from backdoor_jax.errors import UserError
from backdoor_jax.models.classifier import NORMALIZATIONS, Classifier, Variables
from backdoor_jax.models.preact_resnet import PreActResNet18


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network that can be named: how to build it from a class count and a width, and a line about it."""

    build: Callable[[int, int], nn.Module]
    summary: str


MODELS: dict[str, Architecture] = {
    "preact_resnet18": Architecture(
        lambda classes, width: PreActResNet18(classes, width),
        "PreAct-ResNet18 as the published benchmark has it; width 64 is the full network",
    ),
}


def build_classifier(model: str, num_classes: int, width: int = 64, normalization: str = "none") -> Classifier:
    """Makes the `Classifier` of a named network.

    Args:
        model: a name in `MODELS`.
        num_classes: the number of classes, at least 2.
        width: channels of the first layer.
        normalization: a name in `NORMALIZATIONS`.

    Raises:
        UserError: for an unknown name.

    Example:
        >>> build_classifier("preact_resnet18", 10, width=8).num_classes
        10
    """
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}; known are {', '.join(sorted(MODELS))}")
    if num_classes < 2 or width < 1:
        raise UserError(
            f"{num_classes} classes and width {width} make no classifier; give 2 classes and width 1 or more"
        )
    if normalization not in NORMALIZATIONS:
        raise UserError(f"unknown normalization {normalization!r}; known are {', '.join(sorted(NORMALIZATIONS))}")
    mean, std = NORMALIZATIONS[normalization]
    return Classifier(MODELS[model].build(num_classes, width), num_classes, mean, std)


__all__ = ["MODELS", "NORMALIZATIONS", "Architecture", "Classifier", "PreActResNet18", "Variables", "build_classifier"]
