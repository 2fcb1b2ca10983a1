"""A small problem on which repairs are tried from end to end: a backdoored network, its images, and the trigger."""

import functools
from typing import NamedTuple

import jax
from test_victims import TARGET, made

from backdoor_jax import BadNets, Classifier, Dataset, Scene, TrainConfig, evaluate
from backdoor_jax.data import LabelMap, Trigger
from backdoor_jax.metrics import Scores
from backdoor_jax.models import SmallCNN, Variables


class Miniature(NamedTuple):
    """A victim, what its defender has, and what judges the repair."""

    classifier: Classifier
    variables: Variables
    clean: Dataset
    test: Dataset
    trigger: Trigger
    label_map: LabelMap
    before: Scores

    def scores(self, variables: Variables) -> Scores:
        return evaluate(self.classifier, variables, self.test, self.trigger, self.label_map)


@functools.cache
def miniature() -> Miniature:
    classifier, attack = Classifier(SmallCNN(4, 16), 4), BadNets(target=TARGET)
    scene = Scene(classifier, made(1, 480), TrainConfig(epochs=10, batch_size=32, learning_rate=0.05, crop=0))
    planted = attack.plant(jax.random.key(3), jax.random.key(4), scene)
    test, label_map = made(2, 400), attack.label_map(4)
    before = evaluate(classifier, planted.variables, test, planted.trigger, label_map)
    return Miniature(classifier, planted.variables, made(5, 160), test, planted.trigger, label_map, before)
