"""Attacks: configurations that make or train a trigger, poison a training set, and train a victim on it."""

from backdoor_jax.attacks.adap_blend import AdapBlend
from backdoor_jax.attacks.badnets import BadNets
from backdoor_jax.attacks.base import Attack, AttackContext, Victim
from backdoor_jax.attacks.blended import Blended
from backdoor_jax.attacks.input_aware import InputAware
from backdoor_jax.attacks.label_consistent import LabelConsistent
from backdoor_jax.attacks.lira import LIRA
from backdoor_jax.attacks.low_frequency import LowFrequency
from backdoor_jax.attacks.sig import SIG
from backdoor_jax.attacks.ssba import SSBA
from backdoor_jax.attacks.triggers import AdditiveTrigger, BlendTrigger, PatchTrigger, picture_patch, random_pattern
from backdoor_jax.attacks.trojan_nn import TrojanNN
from backdoor_jax.attacks.wanet import WaNet

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        BadNets,
        Blended,
        SIG,
        LowFrequency,
        WaNet,
        InputAware,
        SSBA,
        LIRA,
        TrojanNN,
        LabelConsistent,
        AdapBlend,
    )
}
"""The attacks by the names that configurations use."""

__all__ = [
    "ATTACKS",
    "LIRA",
    "SIG",
    "SSBA",
    "AdapBlend",
    "AdditiveTrigger",
    "Attack",
    "AttackContext",
    "BadNets",
    "BlendTrigger",
    "Blended",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "PatchTrigger",
    "TrojanNN",
    "Victim",
    "WaNet",
    "picture_patch",
    "random_pattern",
]
