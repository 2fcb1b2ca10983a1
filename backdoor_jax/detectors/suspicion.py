"""Which images of a poisoned training set are most likely poison.

>>> import jax
>>> from backdoor_jax import build_classifier, digits
>>> data = digits().train.take(slice(100))
>>> classifier = build_classifier("small_cnn", 10, width=2)
>>> victim = classifier.init(jax.random.key(0), data.images)
>>> [int(data.labels[index]) for index in suspicious(classifier, victim, data, target=3)[:2]]
[3, 3]
"""

from collections.abc import Callable

import numpy as np

from backdoor_jax.data import Dataset
from backdoor_jax.detectors.activation_clustering import activation_clustering
from backdoor_jax.detectors.spectral_signatures import spectral_signatures
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import latents
from backdoor_jax.validation import checked

SUSPICIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "spectral_signatures": spectral_signatures,
    "activation_clustering": activation_clustering,
}
"""Scores of the images of one class from its latents, by name."""


@checked
def suspicious(
    classifier: Classifier,
    variables: Variables,
    training_set: Dataset,
    *,
    target: int,
    method: str = "spectral_signatures",
) -> np.ndarray:
    """Sorts the images of a class by how likely they are poison.

    Args:
        classifier: the network.
        variables: those of the model that was trained on these images.
        training_set: the poisoned training set, with the labels that the model was trained on.
        target: the class to search, as a detector names it.
        method: a name in `SUSPICIONS`.

    Returns:
        Indices of the class's images in the training set, the most suspicious first.

    Raises:
        UserError: for an unknown method, or a class with fewer than three images.
    """
    if method not in SUSPICIONS:
        raise UserError(f"unknown method {method!r}; known are {', '.join(SUSPICIONS)}")
    indices = np.flatnonzero(np.asarray(training_set.labels) == target)
    if len(indices) < 3:
        raise UserError(f"class {target} has {len(indices)} images in the training set, expected three or more")
    scores = SUSPICIONS[method](np.asarray(latents(classifier, variables, training_set.take(indices).images)))
    return indices[np.argsort(-scores, kind="stable")]
