"""Detectors: configurations whose ``examine`` collects evidence about a model, and the verdicts that `judge` gives."""

from backdoor_jax.detectors.activation_clustering import activation_clustering
from backdoor_jax.detectors.base import HEALTHY, Detector, Evidence, Inverted, Verdict, judge
from backdoor_jax.detectors.latent_scan import PerSample, WorstCase, scan_evidence
from backdoor_jax.detectors.loss_ascent import LossAscent
from backdoor_jax.detectors.margins import MMBD
from backdoor_jax.detectors.neural_cleanse import NeuralCleanse
from backdoor_jax.detectors.spectral_signatures import spectral_signatures
from backdoor_jax.detectors.suspicion import SUSPICIONS, suspicious

DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector for detector in (NeuralCleanse, PerSample, WorstCase, MMBD, LossAscent)
}
"""The detectors by the names that the command line uses; the first is the default."""

__all__ = [
    "DETECTORS",
    "HEALTHY",
    "MMBD",
    "SUSPICIONS",
    "Detector",
    "Evidence",
    "Inverted",
    "LossAscent",
    "NeuralCleanse",
    "PerSample",
    "Verdict",
    "WorstCase",
    "activation_clustering",
    "judge",
    "scan_evidence",
    "spectral_signatures",
    "suspicious",
]
