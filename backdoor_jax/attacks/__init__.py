"""Attacks: each makes a trigger from a key and poisons a training set with it."""

from backdoor_jax.attacks.badnets import BadNets, PatchTrigger
from backdoor_jax.attacks.base import Attack
from backdoor_jax.attacks.blended import Blended, BlendTrigger, random_pattern

ATTACKS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended}
"""The attacks by the names that configurations use."""

__all__ = ["ATTACKS", "Attack", "BadNets", "BlendTrigger", "Blended", "PatchTrigger", "random_pattern"]
