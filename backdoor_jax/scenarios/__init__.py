"""Scenarios in which a backdoored network is reused: fine-tuned for another task, or as an encoder."""

from backdoor_jax.scenarios.bad_encoder import BadEncoderConfig, ProbeConfig, bad_encoder, probe
from backdoor_jax.scenarios.transfer import TransferScores, evaluate_transfer, replace_head, transfer

SCENARIOS = {
    "standalone": "a network that is trained, attacked and repaired (run)",
    "transfer": "a backdoored network that is fine-tuned for another task (benchmarks/transfer.py)",
    "encoder": "a backdoored encoder under classifiers of others (benchmarks/encoder.py)",
}
"""The scenarios, one line each."""

__all__ = [
    "SCENARIOS",
    "BadEncoderConfig",
    "ProbeConfig",
    "TransferScores",
    "bad_encoder",
    "evaluate_transfer",
    "probe",
    "replace_head",
    "transfer",
]
