"""The numbers that judge a model and a repair."""

from backdoor_jax.metrics.accuracy import Scores, defense_effectiveness, evaluate, predict, success_rates

__all__ = ["Scores", "defense_effectiveness", "evaluate", "predict", "success_rates"]
