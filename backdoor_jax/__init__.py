"""Removes backdoors from image classifiers after training, in JAX, and measures how well it did."""

from backdoor_jax.attacks import ATTACKS, Attack, BadNets, Blended
from backdoor_jax.data import Augment, Dataset, LabelMap, Task, clean_indices, digits, load_task, make_dataset, poison
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.metrics import Scores, defense_effectiveness, evaluate, predict
from backdoor_jax.models import Classifier, build_classifier
from backdoor_jax.training import TrainConfig, train

__version__ = "0.1.0"
