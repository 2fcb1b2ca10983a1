"""Attacks: each makes or learns a trigger from a key, and plants it in a victim."""

from backdoor_jax.attacks.adap_blend import AdapBlend
from backdoor_jax.attacks.badnets import BadNets
from backdoor_jax.attacks.base import Attack, Planted, Scene
from backdoor_jax.attacks.blended import Blended
from backdoor_jax.attacks.input_aware import InputAware
from backdoor_jax.attacks.label_consistent import LabelConsistent
from backdoor_jax.attacks.lira import LIRA
from backdoor_jax.attacks.low_frequency import LowFrequency
from backdoor_jax.attacks.sig import SIG
from backdoor_jax.attacks.ssba import SSBA
from backdoor_jax.attacks.triggers import AdditiveTrigger, BlendTrigger, PatchTrigger, random_pattern
from backdoor_jax.attacks.trojan_nn import TrojanNN
from backdoor_jax.attacks.wanet import WaNet

ATTACKS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "blended": Blended,
    "sig": SIG,
    "low_frequency": LowFrequency,
    "wanet": WaNet,
    "input_aware": InputAware,
    "ssba": SSBA,
    "lira": LIRA,
    "trojan_nn": TrojanNN,
    "label_consistent": LabelConsistent,
    "adap_blend": AdapBlend,
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
    "BadNets",
    "BlendTrigger",
    "Blended",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "PatchTrigger",
    "Planted",
    "Scene",
    "TrojanNN",
    "WaNet",
    "random_pattern",
]
