"""The optimization engine, its optimizers and losses."""

from backdoor_jax.training.engine import (
    GradientStep,
    Info,
    Loss,
    LossResult,
    Path,
    State,
    Step,
    batch_shape,
    epoch,
    merge,
    split_by_path,
)
from backdoor_jax.training.fitting import Fitted, fit, fit_many, mesh_for, stack, unstack
from backdoor_jax.training.inference import latents, map_chunks, run_chunks
from backdoor_jax.training.losses import cross_entropy, smoothed_cross_entropy, symmetric_cross_entropy, unlikelihood
from backdoor_jax.training.optimizers import (
    SGD,
    Adam,
    AMSGrad,
    Constant,
    Cosine,
    DecayedAdam,
    Optimizer,
    Schedule,
    Separately,
    Tenths,
    Triangular,
)
from backdoor_jax.training.sam import SharpnessAwareStep
from backdoor_jax.training.schedules import cosine_in_stages, torch_amsgrad, torch_sgd, triangular_two_phase
from backdoor_jax.training.simclr import SimCLRConfig, contrast, pretrain, unit_rows
from backdoor_jax.training.stopwatch import Stopwatch
from backdoor_jax.training.supervised import EpochsConfig, TrainConfig, supervised_loss, train, train_many

__all__ = [
    "SGD",
    "AMSGrad",
    "Adam",
    "Constant",
    "Cosine",
    "DecayedAdam",
    "EpochsConfig",
    "Fitted",
    "GradientStep",
    "Info",
    "Loss",
    "LossResult",
    "Optimizer",
    "Path",
    "Schedule",
    "Separately",
    "SharpnessAwareStep",
    "SimCLRConfig",
    "State",
    "Step",
    "Stopwatch",
    "Tenths",
    "TrainConfig",
    "Triangular",
    "batch_shape",
    "contrast",
    "cosine_in_stages",
    "cross_entropy",
    "epoch",
    "fit",
    "fit_many",
    "latents",
    "map_chunks",
    "merge",
    "mesh_for",
    "pretrain",
    "run_chunks",
    "smoothed_cross_entropy",
    "split_by_path",
    "stack",
    "supervised_loss",
    "symmetric_cross_entropy",
    "torch_amsgrad",
    "torch_sgd",
    "train",
    "train_many",
    "triangular_two_phase",
    "unit_rows",
    "unlikelihood",
    "unstack",
]
