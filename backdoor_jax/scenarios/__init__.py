"""Scenarios: what becomes of a backdoor where a model is not used as it was trained."""

from backdoor_jax.scenarios.transfer import Following, following, transfer, transplant

__all__ = ["Following", "following", "transfer", "transplant"]
