"""How else the images of a model may have been made: a suspect that is hardly accurate is tried on alternatives.

One compiled program serves all of them, since the images are normalized before it. Classes in another order than the
model's are found from the answers: the order that makes most of them correct.
"""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.compiling import jit
from backdoor_jax.data import Dataset
from backdoor_jax.metrics import is_near_chance
from backdoor_jax.models import NORMALIZATIONS, Classifier, Variables

COUNT = 200
"""How many images are tried."""
MARGIN = 0.1
"""By how much an alternative must be better to be named."""
TIE = 0.05
"""By how much alternatives may differ for the one with the fewest changes to be named."""
REORDERED = 0.5
"""The share of correct answers from which another order of classes is named; of guesses a quarter fit the best."""
LONGEST_NAMES = 250
"""How many characters of class names an error shows."""
IMAGES_PER_CLASS = 4
"""How many images of a class are tried at least, on average, to look for another order."""


class Trial(NamedTuple):
    """An alternative and what it gives.

    Attributes:
        option: the options of the command line that choose it.
        accuracy: the share of the images classified correctly.
        reordered: the same where the classes have the best order; the accuracy where there are too few images.
        order: the class of the images for each class that the model answers, in that order.
        near_chance: whether the accuracy is.
    """

    option: str
    accuracy: float
    reordered: float
    order: dict[int, int]
    near_chance: bool


@jit
def _predict(classifier: Classifier, variables: Variables, x: jax.Array) -> jax.Array:
    return jnp.argmax(classifier.logits_of_input(variables, x), -1)


def best_order(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, dict[int, int]]:
    """The share of answers that are correct in the best order of classes, and the label for each answer in it.

    Example:
        >>> best_order(np.array([2, 2, 0, 0, 1]), np.array([0, 0, 1, 1, 1]))
        (0.8, {0: 1, 2: 0})
    """
    from scipy.optimize import linear_sum_assignment

    answers, answer = np.unique(predicted, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(answers), len(classes)), int)
    np.add.at(counts, (answer, label), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    order = {int(answers[i]): int(classes[j]) for i, j in zip(rows, columns, strict=True) if counts[i, j]}
    return float(counts[rows, columns].sum() / len(labels)), order


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
    labels = np.asarray(data.labels[::stride][:COUNT])
    enough = len(labels) >= IMAGES_PER_CLASS * len(np.unique(labels))
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
            predicted = np.asarray(_predict(classifier, variables, x))
            correct = int(np.sum(predicted == labels))
            accuracy = correct / len(labels)
            reordered, fitted = best_order(predicted, labels) if enough else (accuracy, {})
            named = " ".join(part for part in (option, turned) if part)
            near_chance = is_near_chance(correct, labels, classifier.num_classes)
            trials.append(Trial(named, accuracy, reordered, fitted, near_chance))
    return sorted(trials, key=lambda trial: -trial.accuracy)


def better_input(trials: list[Trial], accuracy: float, class_names: Sequence[str] | None = None) -> str:
    """A line that names the best alternative; empty where none is clearly better.

    Args:
        trials: the alternatives, the best first.
        accuracy: that of the model without any.
        class_names: of the images' classes, where they come in folders, whose order an option chooses.

    Example:
        >>> turned, other = Trial("--channel-order bgr", 0.95, 0.95, {}, False), {0: 1, 1: 0}
        >>> better_input([turned, Trial("", 0.2, 0.2, {}, True)], 0.2)
        'with --channel-order bgr it classifies 95.0 % correctly, so its images were probably like that'
        >>> better_input([turned._replace(reordered=1.0), Trial("", 0.03, 0.97, other, True)], 0.03, ("stop", "yield"))
        'with --class-names yield,stop it classifies 97.0 % correctly, so its classes are probably in that order'
    """
    named: list[tuple[float, int, bool, Trial]] = []  # With how many changes, and whether one is another order.
    for trial in trials:
        changes = trial.option.count("--")
        if changes and trial.accuracy >= accuracy + MARGIN and not trial.near_chance:
            named.append((trial.accuracy, changes, False, trial))
        # Another order fits guesses as well, so it must be worth more than the same options without it.
        if trial.reordered >= max(REORDERED, accuracy + MARGIN, trial.accuracy + MARGIN):
            named.append((trial.reordered, changes + 1, True, trial))
    if not named:
        return ""
    reached = max(way[0] for way in named) - TIE
    rate, _, reorders, best = min((way for way in named if way[0] >= reached), key=lambda way: (way[1], -way[0]))
    share = f"{100 * rate:.1f} %"
    if not reorders:
        return f"with {best.option} it classifies {share} correctly, so its images were probably like that"
    if class_names and sorted(best.order) == list(range(len(class_names))):
        names = shlex.quote(",".join(class_names[best.order[number]] for number in range(len(class_names))))
        if len(names) <= LONGEST_NAMES and names.count(",") == len(class_names) - 1:
            options = f"{best.option} --class-names {names}".strip()
            return f"with {options} it classifies {share} correctly, so its classes are probably in that order"
    options = f"{best.option} and " if best.option else ""
    return f"with {options}its classes in another order it classifies {share} correctly; number them as the model does"
