r"""Calibrated p-values: how often a clean model is as suspicious to a detector as this one.

A detector's own test knows no other model. Grubbs' test, for one, keeps its level on normal values, and the values of
real models are not normal. So each detector examined clean models (`benchmarks/detection.py`), and their own p-values
:math:`q_1 \le \ldots \le q_n` are the reference for another model's own p-value :math:`p`:

.. math:: \hat p = \frac{1 + \#\{i : q_i \le p\}}{n + 1}, \qquad
    \hat p = \frac{k + 1}{n + 1} \Bigl(\frac{p}{q_k}\Bigr)^{1/\gamma} \text{ where } p < q_k,\ k = \lfloor n/2 \rfloor .

The first is the conformal p-value, whose level is exact where the model is drawn as those were. It cannot be smaller
than 1/(n + 1), so that fewer than 19 models cannot tell 5 %: such a detector keeps its own p-value. The second
continues it to smaller values: the lower half of the :math:`q_i` has a power law's tail, of index
:math:`\gamma = \frac1{k - 1} \sum_{i < k} \log(q_k / q_i)`, Hill's estimate, but at least 1, that of a test that keeps
its level. What is smaller than 1/(n + 1) is therefore an extrapolation.

Ours; the estimate of the tail is Hill's (Annals of Statistics 3, 1975).
"""

import json
from functools import cache
from importlib import resources

import numpy as np

FEWEST_MODELS = 19
"""The fewest clean models with which 1/(n + 1) reaches 0.05."""
LEAST = 1e-300
"""Own p-values below are the same."""


@cache
def clean_models() -> dict[str, tuple[float, ...]]:
    """The own p-values of each detector on the clean models, ascending, where there are at least `FEWEST_MODELS`.

    Example:
        >>> all(len(found) >= FEWEST_MODELS for found in clean_models().values())
        True
    """
    text = (resources.files("backdoor_jax") / "detectors" / "clean_models.json").read_text(encoding="utf-8")
    found = json.loads(text)["p_values"]
    return {name: tuple(sorted(clean)) for name, clean in found.items() if len(clean) >= FEWEST_MODELS}


def calibrated(p_value: float, clean: tuple[float, ...]) -> float:
    """The calibrated p-value of a detector's own.

    Args:
        p_value: the detector's own.
        clean: its own p-values of clean models, ascending, at least four.

    Example:
        >>> clean = (0.01, 0.1, 0.2, 0.4, 0.6, 0.7, 0.9)
        >>> calibrated(0.5, clean), round(calibrated(0.2, clean), 3), round(calibrated(1e-6, clean), 4)
        (0.625, 0.5, 0.0007)
    """
    count, half = len(clean), len(clean) // 2
    edge = max(clean[half - 1], LEAST)
    if p_value >= edge:
        return (1 + int(np.sum(np.asarray(clean) <= p_value))) / (count + 1)
    tail = max(1.0, float(np.mean(np.log(edge / np.maximum(clean[: half - 1], LEAST)))))
    return float((half + 1) / (count + 1) * (max(p_value, LEAST) / edge) ** (1 / tail))
