"""The optimisation engine, its losses and schedules."""

from backdoor_jax.training.descent import descend, last_epoch
from backdoor_jax.training.engine import (
    Constants,
    GradientStep,
    Info,
    Loss,
    State,
    Step,
    batch_shape,
    epoch,
    fit,
    merge,
    run_epoch,
    split_by_path,
)
from backdoor_jax.training.inference import latents, map_chunks
from backdoor_jax.training.losses import cross_entropy, smoothed_cross_entropy, symmetric_cross_entropy, unlikelihood
from backdoor_jax.training.many import fit_many, mesh_for, stack, unstack
from backdoor_jax.training.sam import SharpnessAwareStep
from backdoor_jax.training.schedules import cosine_in_stages, torch_amsgrad, torch_sgd, triangular_two_phase
from backdoor_jax.training.simclr import SimCLRConfig, contrast, normalized, pretrain
from backdoor_jax.training.stopwatch import Stopwatch
from backdoor_jax.training.supervised import (
    CosineSGD,
    EpochsConfig,
    SupervisedLoss,
    TrainConfig,
    constant_sgd,
    train,
    train_many,
)

__all__ = [
    "Constants",
    "CosineSGD",
    "EpochsConfig",
    "GradientStep",
    "Info",
    "Loss",
    "SharpnessAwareStep",
    "SimCLRConfig",
    "State",
    "Step",
    "Stopwatch",
    "SupervisedLoss",
    "TrainConfig",
    "batch_shape",
    "constant_sgd",
    "contrast",
    "cosine_in_stages",
    "cross_entropy",
    "descend",
    "epoch",
    "fit",
    "fit_many",
    "last_epoch",
    "latents",
    "map_chunks",
    "merge",
    "mesh_for",
    "normalized",
    "pretrain",
    "run_epoch",
    "smoothed_cross_entropy",
    "split_by_path",
    "stack",
    "symmetric_cross_entropy",
    "torch_amsgrad",
    "torch_sgd",
    "train",
    "train_many",
    "triangular_two_phase",
    "unlikelihood",
    "unstack",
]
