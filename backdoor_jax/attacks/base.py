"""What an attack is: a trigger made from a key, and a label map."""

import dataclasses
from typing import Literal

import jax

from backdoor_jax.config import Config
from backdoor_jax.data import Dataset, LabelMap, Poisoned, Trigger, poison


@dataclasses.dataclass(frozen=True)
class Attack(Config):
    """Base of the attacks' configurations.

    Attributes:
        rate: poisoned share of all training images; published 0.1.
        labels: ``all_to_one`` or ``all_to_all``.
        target: the target class of ``all_to_one``; published 0.
    """

    rate: float = 0.1
    labels: Literal["all_to_one", "all_to_all"] = "all_to_one"
    target: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.rate <= 1, "rate", "a share in (0, 1]")
        self.require(self.target >= 0, "target", "a class from 0")

    def trigger(self, key: jax.Array, shape: tuple[int, int, int]) -> Trigger:
        """The trigger for images of this ``(height, width, channels)``."""
        raise NotImplementedError

    def label_map(self, num_classes: int) -> LabelMap:
        """The attacker's label map."""
        return LabelMap(self.labels, num_classes, self.target)

    def poison(self, key: jax.Array, data: Dataset, num_classes: int) -> tuple[Poisoned, Trigger]:
        """A poisoned copy of a training set, and the trigger that poisoned it."""
        trigger_key, choice_key = jax.random.split(key)
        height, width, channels = data.images.shape[1:]
        trigger = self.trigger(trigger_key, (height, width, channels))
        return poison(choice_key, data, trigger, self.label_map(num_classes), self.rate), trigger
