"""Descending a loss for so many epochs, from variables to variables."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from backdoor_jax.data import Augment, Dataset
from backdoor_jax.models import Variables
from backdoor_jax.training.engine import Constants, GradientStep, State, batch_shape, fit


def descend(
    key: jax.Array,
    step: GradientStep,
    variables: Variables,
    data: Dataset,
    constants: Constants,
    *,
    epochs: int,
    batch_size: int,
    name: str,
    augment: Augment | None = None,
    checkpoints: Path | None = None,
) -> tuple[Variables, dict[str, Any]]:
    """Runs a gradient step for so many epochs, and says how many steps that were and what was logged at the end."""
    state: State
    state, history = fit(
        key,
        step,
        step.init(variables, constants),
        data,
        constants,
        epochs=epochs,
        batch_size=batch_size,
        augment=augment,
        name=name,
        checkpoints=checkpoints,
    )
    per_epoch, _ = batch_shape(len(data), batch_size)
    return state.variables, {"steps": epochs * per_epoch, "last_epoch": last_epoch(history, per_epoch)}


def last_epoch(history: dict[str, np.ndarray], steps: int) -> dict[str, float]:
    """Means of what was logged over the last so many steps.

    Example:
        >>> last_epoch({"loss": np.array([9.0, 1.0, 2.0])}, 2)
        {'loss': 1.5}
    """
    return {entry: float(np.mean(values[-steps:])) for entry, values in history.items()}
