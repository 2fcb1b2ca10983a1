"""Detects and removes backdoors in trained image classifiers, in JAX, and measures how well it did.

>>> import jax
>>> import backdoor_jax as bj
>>> task = bj.digits()
>>> classifier = bj.build_classifier("small_cnn", task.num_classes, width=2)
>>> suspect = classifier.init(jax.random.key(0), task.train.images)
>>> repair = bj.D3(steps=2).repair(jax.random.key(1), classifier, suspect, task.train.take(slice(70)))
>>> repair.changed
True

The names below are those one usually needs. The rest are in `backdoor_jax.attacks`, `backdoor_jax.defenses`,
`backdoor_jax.detectors`, `backdoor_jax.metrics`, `backdoor_jax.models`, `backdoor_jax.data`,
`backdoor_jax.training` and `backdoor_jax.zoo`.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"]:  # Python is looking for the module of ``python -m backdoor_jax``, which is the command.
    from backdoor_jax_command import prepare

    prepare()

from backdoor_jax import attacks, data, defenses, detectors, metrics, models, training
from backdoor_jax.attacks import ATTACKS, BadNets, Blended
from backdoor_jax.data import Dataset, Task, digits, load, make_dataset, signs
from backdoor_jax.defenses import D3, DEFENSES, PADFT, TAC, FineTune, Repair, SuperFineTune, scan
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.interop import load_torch, save_torch
from backdoor_jax.interop.export import export_model
from backdoor_jax.interop.native import load_model, save_model
from backdoor_jax.metrics import evaluate, predict
from backdoor_jax.models import MODELS, Classifier, build_classifier
from backdoor_jax.training import TrainConfig, train
from backdoor_jax.version import __version__

if TYPE_CHECKING:
    from backdoor_jax import zoo

__all__ = [
    "ATTACKS",
    "D3",
    "DEFENSES",
    "MODELS",
    "PADFT",
    "TAC",
    "BadNets",
    "Blended",
    "Classifier",
    "Dataset",
    "FineTune",
    "NonFiniteError",
    "Repair",
    "SuperFineTune",
    "Task",
    "TrainConfig",
    "UserError",
    "__version__",
    "attacks",
    "build_classifier",
    "data",
    "defenses",
    "detectors",
    "digits",
    "evaluate",
    "export_model",
    "load",
    "load_model",
    "load_torch",
    "make_dataset",
    "metrics",
    "models",
    "predict",
    "save_model",
    "save_torch",
    "scan",
    "signs",
    "train",
    "training",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """Imports the zoo on first use: it needs what experiments need, which takes longer than all the rest."""
    if name == "zoo":
        return importlib.import_module("backdoor_jax.zoo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
