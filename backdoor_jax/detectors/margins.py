"""Maximum-margin detection (MM-BD) as a detector that needs no image; see `backdoor_jax.metrics.mm_bd`.

>>> from backdoor_jax import build_classifier, digits
>>> clean = digits().train.take(slice(0))
>>> classifier = build_classifier("small_cnn", 10, width=2)
>>> victim = classifier.init(jax.random.key(0), clean.images)
>>> MMBD(starts=1, steps=1).examine(jax.random.key(1), classifier, victim, clean).values.shape
(10,)
"""

import dataclasses
from typing import ClassVar

import jax

from backdoor_jax.data import Dataset
from backdoor_jax.detectors.base import Detector, Evidence
from backdoor_jax.metrics import MarginConfig, mm_bd
from backdoor_jax.models import Classifier, Variables


@dataclasses.dataclass(frozen=True)
class MMBD(MarginConfig, Detector):
    """MM-BD; its settings are `MarginConfig`'s."""

    name: ClassVar[str] = "mm_bd"
    summary: ClassVar[str] = "a class that some image reaches by a large margin; needs no data"
    needs_images: ClassVar[bool] = False

    def examine(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Evidence:
        """Searches for the largest margin of each class and tests whether the largest is an outlier.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: its variables.
            data: tells the shape of an image.

        Raises:
            NonFiniteError: where a margin is not finite.
        """
        height, width, channels = data.images.shape[1:]
        found = mm_bd(key, classifier, variables, (height, width, channels), self)
        few = f"{len(found.margins)} classes are too few for a test" if found.p_value is None else None
        details = {"mad_score": found.mad_score}
        return Evidence(self.name, "largest margin", found.margins, found.target, found.p_value, few, details)
