"""How else the images of a model may have been made: a suspect that is hardly accurate is tried on alternatives.

One compiled program serves all of them, since the images are normalized before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.compiling import jit
from backdoor_jax.data import Dataset
from backdoor_jax.models import NORMALIZATIONS, Classifier, Variables

COUNT = 200
"""How many images are tried."""
MARGIN = 0.1
"""By how much an alternative must be better to be named."""


class Trial(NamedTuple):
    """An alternative and what it gives.

    Attributes:
        option: the options of the command line that choose it.
        accuracy: the share of the images classified correctly.
    """

    option: str
    accuracy: float


@jit
def _correct(classifier: Classifier, variables: Variables, x: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(classifier.logits_of_input(variables, x), -1) == labels)


def try_inputs(
    classifier: Classifier, variables: Variables, data: Dataset, any_normalization: bool, order: str
) -> list[Trial]:
    """The accuracies under other normalizations and the other order of channels, the best first.

    Args:
        classifier: the network.
        variables: its variables.
        data: labeled images.
        any_normalization: whether the normalization was assumed; a file of this package has its own.
        order: what the other order of channels is called.
    """
    channels = len(classifier.mean)
    stride = max(1, len(data) // COUNT)
    images = np.asarray(data.images[::stride][:COUNT], np.float32) / 255
    labels = data.labels[::stride][:COUNT]
    ways = {"": (classifier.mean, classifier.std)}
    if any_normalization:
        ways |= {f"--normalize {name}": way for name, way in NORMALIZATIONS.items() if len(way[0]) == channels}
        plain = {"0.5/0.5": (0.5, 0.5), "0/0.00392157": (0.0, 1 / 255)}
        for text, (shift, scale) in plain.items():
            text = "/".join(",".join([part] * channels) for part in text.split("/"))
            ways[f"--normalize {text}"] = (shift,) * channels, (scale,) * channels
    trials = []
    for option, (mean, std) in ways.items():
        for turned in ("", f"--channel-order {order}") if channels == 3 else ("",):
            pixels = images[..., ::-1] if turned else images
            x = jnp.asarray((pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32))
            accuracy = float(_correct(classifier, variables, x, labels))
            trials.append(Trial(" ".join(part for part in (option, turned) if part), accuracy))
    return sorted(trials, key=lambda trial: -trial.accuracy)


def better_input(trials: list[Trial], accuracy: float) -> str:
    """A line that names the best alternative; empty where none is clearly better.

    Example:
        >>> better_input([Trial("--channel-order bgr", 0.95), Trial("", 0.2)], 0.2)
        'with --channel-order bgr it classifies 95.0 % correctly, so its images were probably like that'
    """
    best = trials[0]
    if not best.option or best.accuracy < accuracy + MARGIN:
        return ""
    return (
        f"with {best.option} it classifies {100 * best.accuracy:.1f} % correctly, so its images were probably like that"
    )
