r"""Calibrated p-values: how often a clean model is as suspicious to a detector as this one.

A detector's own test knows no other model. Grubbs' test, for one, keeps its level on normal values, and the values of
real models are not normal. So each detector examined clean models (`benchmarks/detection.py`). Their scores
:math:`q_1 \le \ldots \le q_n` are the reference for another model's score :math:`s`; a score is the detector's own
p-value, or what its evidence gives instead, in (0, 1] and smaller for a more suspicious model:

.. math:: \hat p = \frac{1 + \#\{i : q_i \le s\}}{n + 1}, \qquad
    \hat p = \frac{k + 1}{n + 1} \Bigl(\frac{s}{q_k}\Bigr)^{1/\gamma} \text{ where } s < q_k,\ k = \lfloor n/2 \rfloor .

The first is the conformal p-value, whose level is exact where the model is drawn as those were. It cannot be smaller
than 1/(n + 1), so that fewer than 19 models cannot tell 5 %: such a detector keeps its own p-value. The second
continues it to smaller values: the lower half of the :math:`q_i` has a power law's tail, of index
:math:`\gamma = \frac1{k - 1} \sum_{i < k} \log(q_k / q_i)`, Hill's estimate. For p-values it is at least 1, that of a
test that keeps its level. What is smaller than 1/(n + 1) is therefore an extrapolation.

Ours; the estimate of the tail is Hill's (Annals of Statistics 3, 1975).
"""

import json
from functools import cache
from importlib import resources

import numpy as np

FEWEST_MODELS = 19
"""The fewest clean models with which 1/(n + 1) reaches 0.05."""
LEAST = 1e-300
"""Scores below are the same."""


@cache
def clean_models() -> dict[str, tuple[float, ...]]:
    """The scores of each detector on the clean models, ascending, where there are at least `FEWEST_MODELS`.

    Example:
        >>> all(len(found) >= FEWEST_MODELS for found in clean_models().values())
        True
    """
    text = (resources.files("backdoor_jax") / "detectors" / "clean_models.json").read_text(encoding="utf-8")
    found = json.loads(text)["scores"]
    return {name: tuple(sorted(clean)) for name, clean in found.items() if len(clean) >= FEWEST_MODELS}


def calibrated(score: float, clean: tuple[float, ...], least_index: float = 1.0) -> float:
    """The calibrated p-value of a detector's score.

    Args:
        score: the detector's own p-value, or what it gives instead.
        clean: its scores of clean models, ascending, at least four.
        least_index: of the power law; 1 for p-values.

    Example:
        >>> clean = (0.01, 0.1, 0.2, 0.4, 0.6, 0.7, 0.9)
        >>> calibrated(0.5, clean), round(calibrated(0.2, clean), 3), round(calibrated(1e-6, clean), 4)
        (0.625, 0.5, 0.0007)
    """
    count, half = len(clean), len(clean) // 2
    edge = max(clean[half - 1], LEAST)
    if score >= edge:
        return (1 + int(np.sum(np.asarray(clean) <= score))) / (count + 1)
    index = max(least_index, float(np.mean(np.log(edge / np.maximum(clean[: half - 1], LEAST)))))
    # Clean models that all score alike leave no tail: what is below them is as far as can be.
    exponent = 1 / index if index > 0 else np.inf
    return float((half + 1) / (count + 1) * (max(score, LEAST) / edge) ** exponent)
