"""Scan a model for a backdoor, and list the images that may have planted it."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax

from backdoor_jax.app.loading import Images, Suspect, require_numbered
from backdoor_jax.app.outputs import require_free_figure
from backdoor_jax.detectors import Detector, Evidence, NeuralCleanse, Verdict, judge, suspicious
from backdoor_jax.errors import NoLinearHead, UserError


@dataclasses.dataclass(frozen=True)
class ScanResult:
    """What a scan found.

    Attributes:
        verdict: in words.
        evidence: what it rests on.
        figure: where the figure was written.
    """

    verdict: Verdict
    evidence: Evidence
    figure: Path


def scan_model(
    suspect: Suspect, out: Path, detector: Detector = NeuralCleanse(), *, seed: int = 0, force: bool = False
) -> ScanResult:
    """Scans a model for a backdoor and draws a figure.

    Args:
        suspect: the model.
        out: the figure, ``.png``, ``.pdf`` or ``.svg``.
        detector: what to scan with.
        seed: of the detector.
        force: whether an existing file may be replaced.

    Raises:
        UserError: where the detector needs images and there are none, or the figure cannot be written.
        NonFiniteError: where latents are not finite.
    """
    from backdoor_jax.drawing import save_figure
    from backdoor_jax.report.figures import evidence_figure

    if detector.needs_images and not len(suspect.data):
        raise UserError(f"{detector.name} needs clean images; give --data")
    require_free_figure(out, force)
    try:
        evidence = detector.examine(jax.random.key(seed), suspect.classifier, suspect.variables, suspect.data)
    except NoLinearHead as error:
        raise UserError(
            f"{error.problem}; choose a detector that needs none, such as neural_cleanse (--detector neural_cleanse)"
        ) from error
    verdict = judge(evidence, accuracy=suspect.accuracy, healthy=suspect.healthy, class_names=suspect.class_names)
    try:
        save_figure(evidence_figure(evidence, suspect.name, str(verdict)), out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    return ScanResult(verdict, evidence, out)


class Listing(NamedTuple):
    """The images of a class that are most likely poison.

    Attributes:
        images: file names, or else indices.
        notes: what was converted or passed over in the training set, one line each.
    """

    images: list[str]
    notes: tuple[str, ...]


def list_suspicious(
    suspect: Suspect, training_set: str, target: int, method: str, count: int, images: Images = Images()
) -> Listing:
    """The images of a class in a training set that are most likely poison.

    Args:
        suspect: the model that was trained on them.
        training_set: see `backdoor_jax.data.load_labeled`.
        target: the class.
        method: a name in `backdoor_jax.detectors.SUSPICIONS`.
        count: how many images.
        images: how they are read.

    Raises:
        UserError: for a training set that cannot be used.
    """
    classifier = suspect.classifier
    labeled = images.load(training_set, classifier.num_classes, len(classifier.mean), suspect.class_names)
    require_numbered(suspect, labeled, training_set, images)
    indices = suspicious(classifier, suspect.variables, labeled.data, target=target, method=method)[:count]
    names = [str(index) if labeled.files is None else labeled.files[index] for index in indices]
    return Listing(names, labeled.notes)
