"""The numbers that judge a model and a repair."""

from backdoor_jax.metrics.accuracy import Scores, defense_effectiveness, evaluate, predict, success_rates
from backdoor_jax.metrics.detection import Detection, MarginConfig, largest_margin, maximum_margins, mm_bd

__all__ = [
    "Detection",
    "MarginConfig",
    "Scores",
    "defense_effectiveness",
    "evaluate",
    "largest_margin",
    "maximum_margins",
    "mm_bd",
    "predict",
    "success_rates",
]
