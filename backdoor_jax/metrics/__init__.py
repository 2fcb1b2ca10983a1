"""Metrics of models, repairs, detectors and neuron scores."""

from backdoor_jax.metrics.accuracy import (
    SIGNIFICANT,
    Scores,
    chance_level,
    defense_effectiveness,
    evaluate,
    is_near_chance,
    predict,
    success_rates,
)
from backdoor_jax.metrics.detection import Detection, MarginConfig, largest_margin, maximum_margins, mm_bd
from backdoor_jax.metrics.landscape import Line, WeightChange, embedding, loss_along_line, weight_change
from backdoor_jax.metrics.latent import Agreement, Change, agreement, triggered_change
from backdoor_jax.metrics.reactivation import NearbyTrigger, SearchConfig, search_nearby, unlearn
from backdoor_jax.metrics.sequela import (
    Membership,
    ReinjectConfig,
    confidence_signal,
    loss_signal,
    membership,
    reinject,
    shadow_model,
    shadow_signal,
)

__all__ = [
    "SIGNIFICANT",
    "Agreement",
    "Change",
    "Detection",
    "Line",
    "MarginConfig",
    "Membership",
    "NearbyTrigger",
    "ReinjectConfig",
    "Scores",
    "SearchConfig",
    "WeightChange",
    "agreement",
    "chance_level",
    "confidence_signal",
    "defense_effectiveness",
    "embedding",
    "evaluate",
    "is_near_chance",
    "largest_margin",
    "loss_along_line",
    "loss_signal",
    "maximum_margins",
    "membership",
    "mm_bd",
    "predict",
    "reinject",
    "search_nearby",
    "shadow_model",
    "shadow_signal",
    "success_rates",
    "triggered_change",
    "unlearn",
    "weight_change",
]
