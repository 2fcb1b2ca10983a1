"""Scenarios: what becomes of a backdoor where a model is not used as it was trained."""

from backdoor_jax.scenarios.bad_encoder import BadEncoderConfig, ProbeConfig, bad_encoder, probe
from backdoor_jax.scenarios.simclr import SimCLRConfig, contrast, pretrain
from backdoor_jax.scenarios.transfer import Following, following, transfer, transplant

__all__ = [
    "BadEncoderConfig",
    "Following",
    "ProbeConfig",
    "SimCLRConfig",
    "bad_encoder",
    "contrast",
    "following",
    "pretrain",
    "probe",
    "transfer",
    "transplant",
]
