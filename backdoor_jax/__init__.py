"""Removes backdoors from image classifiers after training, in JAX, and measures how well it did.

>>> import jax
>>> import backdoor_jax as bj
>>> task = bj.digits()
>>> classifier = bj.build_classifier("preact_resnet18", task.num_classes, width=2)
>>> suspect = classifier.init(jax.random.key(0), task.train.images)
>>> repair = bj.d3(jax.random.key(1), classifier, suspect, task.train.take(slice(70)), bj.D3Config(steps=2))
>>> repair.info["changed"]
True
"""

from backdoor_jax.attacks import (
    ATTACKS,
    LIRA,
    SIG,
    SSBA,
    AdapBlend,
    Attack,
    BadNets,
    Blended,
    InputAware,
    LabelConsistent,
    LowFrequency,
    Planted,
    Scene,
    TrojanNN,
    WaNet,
)
from backdoor_jax.config import Config
from backdoor_jax.data import Augment, Dataset, LabelMap, Task, clean_indices, digits, load_task, make_dataset, poison
from backdoor_jax.defenses import (
    DEFENSES,
    D3Config,
    FineTuneConfig,
    FstConfig,
    FtSamConfig,
    IBauConfig,
    NadConfig,
    PadConfig,
    PadFtConfig,
    Repair,
    SauConfig,
    SuperFineTuneConfig,
    TacConfig,
    d3,
    finetune,
    fst,
    ft_sam,
    i_bau,
    nad,
    pad,
    pad_ft,
    sau,
    scan,
    super_finetune,
    tac,
)
from backdoor_jax.errors import NonFiniteError, UserError
from backdoor_jax.interop import load_torch, save_torch
from backdoor_jax.interop.export import export_model
from backdoor_jax.interop.native import load_model, save_model
from backdoor_jax.metrics import Scores, defense_effectiveness, evaluate, predict
from backdoor_jax.models import MODELS, Classifier, build_classifier
from backdoor_jax.training import TrainConfig, train
from backdoor_jax.version import __version__

__all__ = [
    "ATTACKS",
    "DEFENSES",
    "LIRA",
    "MODELS",
    "SIG",
    "SSBA",
    "AdapBlend",
    "Attack",
    "Augment",
    "BadNets",
    "Blended",
    "Classifier",
    "Config",
    "D3Config",
    "Dataset",
    "FineTuneConfig",
    "FstConfig",
    "FtSamConfig",
    "IBauConfig",
    "InputAware",
    "LabelConsistent",
    "LabelMap",
    "LowFrequency",
    "NadConfig",
    "NonFiniteError",
    "PadConfig",
    "PadFtConfig",
    "Planted",
    "Repair",
    "SauConfig",
    "Scene",
    "Scores",
    "SuperFineTuneConfig",
    "TacConfig",
    "Task",
    "TrainConfig",
    "TrojanNN",
    "UserError",
    "WaNet",
    "__version__",
    "build_classifier",
    "clean_indices",
    "d3",
    "defense_effectiveness",
    "digits",
    "evaluate",
    "export_model",
    "finetune",
    "fst",
    "ft_sam",
    "i_bau",
    "load_model",
    "load_task",
    "load_torch",
    "make_dataset",
    "nad",
    "pad",
    "pad_ft",
    "poison",
    "predict",
    "sau",
    "save_model",
    "save_torch",
    "scan",
    "super_finetune",
    "tac",
    "train",
]
