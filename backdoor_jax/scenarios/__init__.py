"""Scenarios in which a backdoored network is reused: fine-tuned for another task, or as an encoder."""

from backdoor_jax.scenarios.bad_encoder import BadEncoderConfig, ProbeConfig, bad_encoder, probe
from backdoor_jax.scenarios.transfer import TransferScores, evaluate_transfer, replace_head, transfer

__all__ = [
    "BadEncoderConfig",
    "ProbeConfig",
    "TransferScores",
    "bad_encoder",
    "evaluate_transfer",
    "probe",
    "replace_head",
    "transfer",
]
