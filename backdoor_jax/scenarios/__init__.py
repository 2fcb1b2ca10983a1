"""Scenarios: what becomes of a backdoor where a model is not used as it was trained."""

from backdoor_jax.scenarios.bad_encoder import BadEncoderConfig, ProbeConfig, bad_encoder, probe
from backdoor_jax.scenarios.transfer import Following, following, transfer, transplant

__all__ = [
    "BadEncoderConfig",
    "Following",
    "ProbeConfig",
    "bad_encoder",
    "following",
    "probe",
    "transfer",
    "transplant",
]
