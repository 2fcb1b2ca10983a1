"""Scan or repair a model in a file, given some labeled images: the work of ``backdoor-jax scan`` and ``defend``.

    suspect = load_suspect(Path("model.pt"), "clean.npz", model="resnet18")
    print(scan_model(suspect, Path("scan.png")).verdict)
    repair_model(suspect, D3(), Path("repaired.pt")).accuracy

`load_suspect` evaluates the model and refuses one near chance: that is what a model looks like whose images are not
normalized as in its training, and neither a scan nor a repair of it means anything.
"""

import dataclasses
import math
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.data import Dataset, load_labeled
from backdoor_jax.defenses import Defense, Repair
from backdoor_jax.detectors import Detector, Evidence, PerSample, Verdict, judge, suspicious
from backdoor_jax.errors import UserError
from backdoor_jax.files import beside
from backdoor_jax.interop.export import SUFFIX as EXPORT_SUFFIX
from backdoor_jax.interop.export import export_model
from backdoor_jax.interop.native import DESCRIPTION, TORCH_SUFFIXES, load_model, save_model
from backdoor_jax.interop.pytorch import require_counterpart
from backdoor_jax.metrics import evaluate
from backdoor_jax.models import Classifier, Variables

NEEDED_PACKAGES = {**dict.fromkeys(TORCH_SUFFIXES, "torch"), EXPORT_SUFFIX: "flatbuffers"}
"""The package that writing a file needs, by its suffix."""
MODEL_SUFFIXES = (".safetensors", *NEEDED_PACKAGES)
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A model that may be backdoored, and the images to work with.

    Attributes:
        name: what errors and figures call it.
        classifier: the network.
        variables: its variables.
        data: images to scan or repair with.
        test: images that the model is evaluated on; `data` where there are no others.
        accuracy: share of `test` that it classifies correctly; NaN without images.
        class_names: names of the classes, where `data` comes with some.
    """

    name: str
    classifier: Classifier
    variables: Variables
    data: Dataset
    test: Dataset
    accuracy: float
    class_names: tuple[str, ...] | None = None

    @property
    def held_out(self) -> bool:
        """Whether it is evaluated on other images than those to work with."""
        return self.test is not self.data


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


@dataclasses.dataclass(frozen=True)
class RepairResult:
    """A repaired model.

    Attributes:
        repair: what the defense returned.
        accuracy: share of the suspect's test images that the repaired model classifies correctly.
        out: where the model was written.
        held_out: whether the defense had no test image to work with.
    """

    repair: Repair
    accuracy: float
    out: Path
    held_out: bool


def load_suspect(
    checkpoint: Path,
    data: str,
    *,
    test: str | None = None,
    model: str | None = None,
    normalization: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: int | None = None,
) -> Suspect:
    """Reads a model and labeled images, and evaluates the model on them.

    Args:
        checkpoint: the model; see `backdoor_jax.load_model`.
        data: clean labeled images; see `backdoor_jax.data.load_labeled`.
        test: images to evaluate on, in one of the same forms; by default the test images that come with `data`, or
            else `data` itself, which then does not show what a repair costs.
        model: the network's name, for a PyTorch file.
        normalization: for a PyTorch file: a name in `backdoor_jax.models.NORMALIZATIONS`.
        mean: for a PyTorch file: of each channel, instead of a name.
        std: for a PyTorch file: of each channel, instead of a name.
        classes: what the model's number of classes must be.

    Raises:
        UserError: for anything that cannot be used, and for a model near chance.
    """
    classifier, variables = load_model(checkpoint, model, normalization=normalization, mean=mean, std=std)
    if classes is not None and classes != classifier.num_classes:
        raise UserError(f"{checkpoint}: has {classifier.num_classes} classes, not {classes}; fix --classes")
    labeled = load_labeled(data, classifier.num_classes, len(classifier.mean))
    held_out = labeled.test
    if test is not None:
        other = load_labeled(test, classifier.num_classes, len(classifier.mean))
        held_out = other.test or other.data
    judged = held_out or labeled.data
    for part in (labeled.data, judged):
        try:
            jax.eval_shape(lambda images: classifier.logits(variables, images)[0], part.images[:1])
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from error
    accuracy = evaluate(classifier, variables, judged, name=str(checkpoint)).acc
    labels = np.asarray(judged.labels)
    require_better_than_chance(round(accuracy * len(judged)), labels, classifier, str(checkpoint))
    return Suspect(str(checkpoint), classifier, variables, labeled.data, judged, accuracy, labeled.class_names)


def load_unseen(
    checkpoint: Path,
    size: tuple[int, int],
    *,
    model: str | None = None,
    normalization: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Suspect:
    """Reads a model without any images, for a detector that needs none.

    Args:
        checkpoint: the model; see `backdoor_jax.load_model`.
        size: height and width of its images.
        model: the network's name, for a PyTorch file.
        normalization: for a PyTorch file: a name in `backdoor_jax.models.NORMALIZATIONS`.
        mean: for a PyTorch file: of each channel, instead of a name.
        std: for a PyTorch file: of each channel, instead of a name.

    Raises:
        UserError: for a file that cannot be used.
    """
    classifier, variables = load_model(checkpoint, model, normalization=normalization, mean=mean, std=std)
    none = Dataset(jnp.zeros((0, *size, len(classifier.mean)), jnp.uint8), jnp.zeros(0, jnp.int32))
    return Suspect(str(checkpoint), classifier, variables, none, none, math.nan)


def scan_model(
    suspect: Suspect, out: Path, detector: Detector = PerSample(), *, seed: int = 0, force: bool = False
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
    if out.suffix not in FIGURE_SUFFIXES:
        raise UserError(f"{out}: unknown suffix {out.suffix!r} for a figure; give .png, .pdf or .svg")
    require_free(out, force, FIGURE_SUFFIXES)
    evidence = detector.examine(jax.random.key(seed), suspect.classifier, suspect.variables, suspect.data)
    verdict = judge(evidence, accuracy=suspect.accuracy, class_names=suspect.class_names)
    try:
        save_figure(evidence_figure(evidence, suspect.name, str(verdict)), out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    return ScanResult(verdict, evidence, out)


def list_suspicious(suspect: Suspect, training_set: str, target: int, method: str, count: int) -> list[str]:
    """The images of a class in a training set that are most likely poison, as file names or else indices.

    Args:
        suspect: the model that was trained on them.
        training_set: see `backdoor_jax.data.load_labeled`.
        target: the class.
        method: a name in `backdoor_jax.detectors.SUSPICIONS`.
        count: how many images.

    Raises:
        UserError: for a training set that cannot be used.
    """
    classifier = suspect.classifier
    labeled = load_labeled(training_set, classifier.num_classes, len(classifier.mean))
    indices = suspicious(classifier, suspect.variables, labeled.data, target=target, method=method)[:count]
    return [str(index) if labeled.files is None else labeled.files[index] for index in indices]


def repair_model(
    suspect: Suspect,
    defense: Defense,
    out: Path,
    *,
    training_set: str | None = None,
    seed: int = 0,
    force: bool = False,
) -> RepairResult:
    """Repairs a model, evaluates the repair and writes it.

    Args:
        suspect: the model.
        defense: the defense.
        out: ``.safetensors``, ``.pt`` or ``.pth``, ``.jaxexport``, or else an Orbax folder.
        training_set: the poisoned training set, for a defense that needs it; see `backdoor_jax.data.load_labeled`.
        seed: of the defense.
        force: whether an existing model may be replaced.

    Raises:
        UserError: for anything that cannot be used, before the work where it can be known.
        NonFiniteError: where the repair diverges.
    """
    classifier, data = suspect.classifier, suspect.data
    if (defense.needs == "training_set") != (training_set is not None):
        fix = "give it with --training-set" if training_set is None else "leave --training-set out"
        raise UserError(f"{defense.name} needs {defense.needs.replace('_', ' ')}; {fix}")
    require_free(out, force, MODEL_SUFFIXES)
    if out.suffix in TORCH_SUFFIXES:
        require_counterpart(classifier)
    if training_set is not None:
        data = load_labeled(training_set, classifier.num_classes, len(classifier.mean)).data
        if data.images.shape[1:] != suspect.data.images.shape[1:]:
            shapes = ("x".join(map(str, part.images.shape[1:])) for part in (data, suspect.data))
            raise UserError("{}: has images of {}, but --data of {}; give one shape".format(training_set, *shapes))
    elif defense.needs == "nothing":
        data = data.take(slice(0))

    repair = defense.repair(jax.random.key(seed), classifier, suspect.variables, data)
    accuracy = evaluate(classifier, repair.variables, suspect.test, name=f"{defense.name} on {suspect.name}").acc
    if out.suffix == EXPORT_SUFFIX:
        height, width, channels = suspect.data.images.shape[1:]
        export_model(out, classifier, repair.variables, (height, width, channels))
    else:
        save_model(out, classifier, repair.variables)
    return RepairResult(repair, accuracy, out, suspect.held_out or defense.needs != "clean")


def require_free(out: Path, force: bool, known: tuple[str, ...]) -> None:
    """Refuses an output path that is taken, or where nothing can be written.

    Args:
        out: the path.
        force: whether what is there may be replaced.
        known: suffixes of files; anything else is a folder.

    Raises:
        UserError: where something is there and may not be replaced, the suffix is unknown or needs a package, or no
            file can be written there.
    """
    if out.suffix[1:2].isalpha() and out.suffix not in known:
        raise UserError(
            f"{out}: unknown suffix {out.suffix!r}; give .safetensors, .pt, {EXPORT_SUFFIX}, or a folder without one"
        )
    package = NEEDED_PACKAGES.get(out.suffix)
    if package is not None and find_spec(package) is None:
        raise UserError(f"{out}: needs the package {package}; pip install {package}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = beside(out, "partial", out.suffix)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    if not out.exists() or (out.is_dir() and not any(out.iterdir()) and out.suffix not in known):
        return
    if out.is_dir() and (out.suffix in known or not (out / DESCRIPTION).is_file()):
        raise UserError(f"{out}: is a folder that holds no model; give another --out")
    if not out.is_dir() and out.suffix not in known:
        raise UserError(f"{out}: is a file, but a model without suffix is a folder; give another --out")
    if not force:
        raise UserError(f"{out}: exists; give another --out, or --force to replace it")


def require_better_than_chance(correct: int, labels: np.ndarray, classifier: Classifier, name: str) -> None:
    """Refuses a model that is hardly better than guessing.

    Guessing is correct for 1/C of the images, or for the share of the most frequent class where that is larger. The
    model must be correct for a tenth of the others as well, and for significantly more than guessing (binomial test,
    5 %), which matters where there are few images.

    Args:
        correct: how many images it classifies correctly.
        labels: ``(N,)``.
        classifier: the network.
        name: what errors call the model.

    Raises:
        UserError: where it is near chance; it names the normalization as the likely cause.
    """
    from scipy import stats

    count = len(labels)
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {count} images are of class {labels[0]}, which shows nothing; give images of all classes")
    chance = max(1 / classifier.num_classes, np.bincount(labels).max() / count)
    if correct / count >= chance + (1 - chance) / 10 and stats.binom.sf(correct - 1, count, chance) <= 0.05:
        return
    mean, std = (",".join(f"{value:g}" for value in values) for values in (classifier.mean, classifier.std))
    raise UserError(
        f"{name}: {correct} of {count} images classified correctly ({100 * correct / count:.1f} %) is near chance "
        f"({100 * chance:.1f} %); most likely the images are not normalized as in its training (here {mean}/{std}): "
        "see --normalize; or the labels number the classes in another order"
    )
