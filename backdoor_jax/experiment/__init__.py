"""Experiments: a typed configuration in, one row for each evaluated model out.

For every seed an experiment trains one victim for each attack and a clean model, runs every defense on each, and
evaluates them on the test set, which is used for nothing else. Rows are appended to ``results.jsonl``; re-running
resumes an interrupted experiment.
"""

from backdoor_jax.experiment.rows import RESULT, append_row, format_row, read_rows
from backdoor_jax.experiment.runner import in_order, run_experiment
from backdoor_jax.experiment.settings import (
    AttackEntry,
    DataConfig,
    DefenseEntry,
    Experiment,
    ModelConfig,
    describe,
)
from backdoor_jax.experiment.victims import (
    StoredModel,
    TrainedModel,
    Workspace,
    clean_subset,
    make_workspace,
    prepare_model,
    streams,
)

__all__ = [
    "RESULT",
    "AttackEntry",
    "DataConfig",
    "DefenseEntry",
    "Experiment",
    "ModelConfig",
    "StoredModel",
    "TrainedModel",
    "Workspace",
    "append_row",
    "clean_subset",
    "describe",
    "format_row",
    "in_order",
    "make_workspace",
    "prepare_model",
    "read_rows",
    "run_experiment",
    "streams",
]
