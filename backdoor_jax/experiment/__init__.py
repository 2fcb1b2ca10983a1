"""Experiments: a typed configuration in, one row for each judged model out.

An experiment trains, for every seed, one victim an attack and an unpoisoned twin, runs every defence on each, and
judges them on the test set, which chooses nothing. Rows go to ``results.jsonl``; a run that is stopped goes on where
it was.
"""

from backdoor_jax.experiment.rows import Row, line, read_rows, write_rows
from backdoor_jax.experiment.runner import run_experiment
from backdoor_jax.experiment.settings import (
    AttackEntry,
    DataConfig,
    DefenseEntry,
    Experiment,
    ModelConfig,
    attack_name,
    describe,
)

__all__ = [
    "AttackEntry",
    "DataConfig",
    "DefenseEntry",
    "Experiment",
    "ModelConfig",
    "Row",
    "attack_name",
    "describe",
    "line",
    "read_rows",
    "run_experiment",
    "write_rows",
]
