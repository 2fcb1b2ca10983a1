"""Scan or repair a model in a file, given some labeled images: the work of ``backdoor-jax scan`` and ``defend``.

    suspect = load_suspect(Path("model.pt"), "clean.npz", model="resnet18")
    print(scan_model(suspect, Path("scan.png")).verdict)
    repair_model(suspect, D3(), Path("repaired.pt")).accuracy

`load_suspect` evaluates the model. Shapes of weights do not show how images were normalized, in which order their
channels are, or what a stem does, and a model that is given other images than in its training looks like one near
chance. Near chance it is refused; below what a healthy model reaches a scan gives no verdict and a repair is refused.
"""

import dataclasses
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.data import Dataset, Labeled, LabelMap, Trigger, load_labeled
from backdoor_jax.defenses import Defense, Repair
from backdoor_jax.detectors import HEALTHY, Detector, Evidence, PerSample, Verdict, judge, suspicious
from backdoor_jax.errors import UserError
from backdoor_jax.files import beside
from backdoor_jax.interop.export import SUFFIX as EXPORT_SUFFIX
from backdoor_jax.interop.export import export_model
from backdoor_jax.interop.native import DESCRIPTION, TORCH_SUFFIXES, load_model, save_model
from backdoor_jax.interop.pytorch import require_counterpart, save_torch
from backdoor_jax.interop.torch_files import read, unwrap
from backdoor_jax.interop.torch_models import bounds_of, load_module, names_module
from backdoor_jax.metrics import chance_level, evaluate, is_near_chance, predict, success_rates
from backdoor_jax.models import NORMALIZATIONS, STEMS, Classifier, ResNet, Stem, Variables
from backdoor_jax.models.torch_module import TorchNetwork
from backdoor_jax.trials import better_input, try_inputs

if TYPE_CHECKING:
    from backdoor_jax.zoo import ZooVictim

ZOO = "zoo:"
"""What a checkpoint starts with that is a name in `backdoor_jax.zoo`."""

NEEDED_PACKAGES = {**dict.fromkeys(TORCH_SUFFIXES, "torch"), EXPORT_SUFFIX: "flatbuffers"}
"""The package that writing a file needs, by its suffix."""
MODEL_SUFFIXES = (".safetensors", *NEEDED_PACKAGES)
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
MAX_DROP = 0.05
"""The loss of accuracy above which a repair is not written; ours."""


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
        healthy: the accuracy that a healthy model reaches on such images; below it there is no verdict.
        class_names: names of the classes, where `data` comes with some.
        notes: what was assumed, converted or passed over, and what would give a higher accuracy, one line each.
        triggered: images with the user's trigger under their true labels, where given.
        target: the class that the trigger leads to.
    """

    name: str
    classifier: Classifier
    variables: Variables
    data: Dataset
    test: Dataset
    accuracy: float
    healthy: float = HEALTHY
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    triggered: Dataset | None = None
    target: int | None = None

    def success_rate(self, variables: Variables) -> float | None:
        """The attack success rate of the user's trigger under these variables; None without triggered images."""
        if self.triggered is None or self.target is None:
            return None
        predictions = predict(self.classifier, variables, self.triggered.images, name=self.name)
        labels = np.asarray(self.triggered.labels)
        return success_rates(predictions, labels, LabelMap("all_to_one", self.classifier.num_classes, self.target))[0]

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
        out: where the model was written; None where the repair lost too much accuracy.
        held_out: whether the defense had no test image to work with.
    """

    repair: Repair
    accuracy: float
    out: Path | None
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Images:
    """How images are read.

    Attributes:
        size: height and width to which they are resized; as they are by default.
        class_names: the folders of classes 0, 1, ...; their sorted names by default.
        channel_order: ``rgb``, or ``bgr`` for a model that was trained on images of OpenCV.
    """

    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def load(self, source: str, num_classes: int, channels: int) -> Labeled:
        """The labeled images of a source; see `backdoor_jax.data.load_labeled`."""
        found = load_labeled(source, num_classes, channels, size=self.size, class_names=self.class_names)
        test = found.test and dataclasses.replace(found.test, images=self.turn(found.test.images))
        return found._replace(data=dataclasses.replace(found.data, images=self.turn(found.data.images)), test=test)

    def turn(self, images: jax.Array) -> jax.Array:
        """Images in RGB to the model's order of channels, or back."""
        return images if self.channel_order == "rgb" else images[..., ::-1]


def load_suspect(
    checkpoint: Path,
    data: str,
    *,
    test: str | None = None,
    model: str | None = None,
    key: str | None = None,
    stem: Stem | None = None,
    normalization: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: int | None = None,
    images: Images = Images(),
    healthy: float = HEALTHY,
    triggered: str | Callable[[tuple[int, int, int]], Trigger] | None = None,
    target: int | None = None,
) -> Suspect:
    """Reads a model and labeled images, and evaluates the model on them.

    Args:
        checkpoint: the model; see `backdoor_jax.load_model`, or ``zoo:`` and a name in `backdoor_jax.zoo`, whose
            trigger is then that of the zoo.
        data: clean labeled images; see `backdoor_jax.data.load_labeled`.
        test: images to evaluate on, in one of the same forms; by default the test images that come with `data`, or
            else `data` itself, which then does not show what a repair costs.
        model: for a PyTorch file: the network's name, or the module as ``torchvision:NAME``, ``timm:NAME`` or
            ``FILE.py:FUNCTION``.
        key: for a PyTorch file that holds several models: which.
        stem: for a PyTorch file of a ResNet: a name in `backdoor_jax.models.STEMS`.
        normalization: for a PyTorch file: a name in `backdoor_jax.models.NORMALIZATIONS`.
        mean: for a PyTorch file: of each channel, instead of a name.
        std: for a PyTorch file: of each channel, instead of a name.
        classes: what the model's number of classes must be.
        images: how images are read.
        healthy: the accuracy that a healthy model reaches on these images.
        triggered: images with the trigger under their true labels, in one of the same forms; or what makes the trigger
            for images of a shape, such as `backdoor_jax.attacks.picture_patch` with a file. It is put on the images
            that the model is evaluated on.
        target: the class that the trigger leads to.

    Raises:
        UserError: for anything that cannot be used, and for a model near chance.
    """
    if (triggered is None) != (target is None):
        raise UserError(
            "a trigger and its target class go together; give both (--triggered, --patch or --blend, and --target)"
        )
    opened = _open(checkpoint, model, key, stem, normalization, mean, std, classes)
    victim = opened.victim
    if triggered is None and victim and victim.label_map and victim.label_map.kind == "all_to_one":
        triggered, target = lambda shape: victim.trigger, victim.label_map.target
    labeled = images.load(data, opened.num_classes, opened.channels)
    classifier, variables = opened.network(labeled.data.images)
    name = str(checkpoint)
    channels, notes = len(classifier.mean), list(labeled.notes)
    held_out = labeled.test
    if test is not None:
        other = images.load(test, classifier.num_classes, channels)
        notes += other.notes
        held_out = other.test or other.data
    judged = held_out or labeled.data
    shown = None
    if triggered is not None and target is not None:
        if not 0 <= target < classifier.num_classes:
            raise UserError(f"--target {target} is no class of the model; it has 0 to {classifier.num_classes - 1}")
        if isinstance(triggered, str):
            shown = images.load(triggered, classifier.num_classes, channels).data
        else:
            height, width, _ = judged.images.shape[1:]
            trigger = triggered((height, width, channels))
            shown = dataclasses.replace(judged, images=images.turn(trigger(images.turn(judged.images))))
    for part in (labeled.data, judged, *(() if shown is None else (shown,))):
        try:
            jax.eval_shape(lambda images: classifier.logits(variables, images)[0], part.images[:1])
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from error
    accuracy = evaluate(classifier, variables, judged, name=name).acc
    labels = np.asarray(judged.labels)
    assumed = model is not None
    better = ""
    if accuracy < healthy:
        trials = try_inputs(classifier, variables, judged, assumed, "bgr" if images.channel_order == "rgb" else "rgb")
        better = better_input(trials, accuracy)
    require_better_than_chance(round(accuracy * len(judged)), labels, classifier, name, better)
    if assumed:
        notes.insert(0, _assumptions(classifier, images))
    if better:
        notes.append(better)
    return Suspect(
        name,
        classifier,
        variables,
        labeled.data,
        judged,
        accuracy,
        healthy,
        labeled.class_names,
        tuple(notes),
        shown,
        target,
    )


def _normalization(
    name: str | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of a name or as given, for this many channels."""
    if name is not None and name != "none":
        if name not in NORMALIZATIONS:
            raise UserError(f"unknown normalization {name!r}; known are {', '.join(sorted(NORMALIZATIONS))}")
        mean, std = NORMALIZATIONS[name]
    if mean is not None and len(mean) != channels:
        raise UserError(f"the model takes {channels} channels, the normalization has {len(mean)}; fix --normalize")
    return mean, std


def _assumptions(classifier: Classifier, images: Images) -> str:
    """What shapes do not determine and was assumed, in one line."""
    mean, std = (",".join(f"{value:g}" for value in values) for values in (classifier.mean, classifier.std))
    parts = [f"pixels from 0 to 1, normalized by {mean}/{std} (--normalize)"]
    parts.append(f"channels in the order {images.channel_order.upper()} (--channel-order)")
    if isinstance(classifier.network, ResNet):
        size, stride, pooled = STEMS[classifier.network.stem]
        pooling = "then max-pooling" if pooled else "no pooling"
        parts.append(f"a stem of {size}x{size} with stride {stride}, {pooling} (--stem)")
    return f"assumed: {'; '.join(parts)}"


def load_unseen(
    checkpoint: Path,
    size: tuple[int, int],
    *,
    model: str | None = None,
    key: str | None = None,
    stem: Stem | None = None,
    normalization: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: int | None = None,
) -> Suspect:
    """Reads a model without any images, for a detector that needs none.

    Args:
        checkpoint: the model; see `backdoor_jax.load_model`.
        size: height and width of its images.
        model: see `load_suspect`, as for the other arguments.
        key: for a PyTorch file that holds several models: which.
        stem: for a PyTorch file of a ResNet.
        normalization: for a PyTorch file: a name in `backdoor_jax.models.NORMALIZATIONS`.
        mean: for a PyTorch file: of each channel, instead of a name.
        std: for a PyTorch file: of each channel, instead of a name.
        classes: what the model's number of classes must be.

    Raises:
        UserError: for a file that cannot be used.
    """
    opened = _open(checkpoint, model, key, stem, normalization, mean, std, classes)
    images = jnp.zeros((1, *size, opened.channels), jnp.uint8)
    classifier, variables = opened.network(images)
    none = Dataset(images[:0], jnp.zeros(0, jnp.int32))
    return Suspect(str(checkpoint), classifier, variables, none, none, math.nan)


class _Opened(NamedTuple):
    """A model in a file, of which a module's network follows from the shape of its images."""

    num_classes: int
    channels: int
    network: Callable[[jax.Array], tuple[Classifier, Variables]]
    victim: "ZooVictim | None" = None


def _open(
    checkpoint: Path,
    model: str | None,
    key: str | None,
    stem: Stem | None,
    normalization: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    classes: int | None,
) -> _Opened:
    """Reads a model of this package's, of the zoo, or a PyTorch module; see `load_suspect`."""
    if str(checkpoint).startswith(ZOO):
        from backdoor_jax import zoo

        victim = zoo.load(str(checkpoint).removeprefix(ZOO))
        parts = victim.classifier, victim.variables
        opened = _Opened(parts[0].num_classes, len(parts[0].mean), lambda images: parts, victim)
    elif model is None or not names_module(model):
        found = load_model(checkpoint, model, key=key, stem=stem, normalization=normalization, mean=mean, std=std)
        opened = _Opened(found[0].num_classes, len(found[0].mean), lambda images: found)
    else:
        name = str(checkpoint)
        state, bounds = unwrap(read(checkpoint), name, key)
        loaded = load_module(model, state, name, classes)
        ways = _normalization(normalization, mean, std, loaded.channels)

        def network(images: jax.Array) -> tuple[Classifier, Variables]:
            classifier, variables = Classifier.from_torch(loaded.module, images, mean=ways[0], std=ways[1])
            return classifier, bounds_of(variables, classifier, bounds, name) if bounds else variables

        opened = _Opened(loaded.num_classes, loaded.channels, network)
    if classes is not None and classes != opened.num_classes:
        raise UserError(f"{checkpoint}: has {opened.num_classes} classes, not {classes}; fix --classes")
    return opened


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
    verdict = judge(evidence, accuracy=suspect.accuracy, healthy=suspect.healthy, class_names=suspect.class_names)
    try:
        save_figure(evidence_figure(evidence, suspect.name, str(verdict)), out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    return ScanResult(verdict, evidence, out)


def list_suspicious(
    suspect: Suspect, training_set: str, target: int, method: str, count: int, images: Images = Images()
) -> list[str]:
    """The images of a class in a training set that are most likely poison, as file names or else indices.

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
    labeled = images.load(training_set, classifier.num_classes, len(classifier.mean))
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
    max_drop: float = MAX_DROP,
    training_images: Images = Images(),
) -> RepairResult:
    """Repairs a model, evaluates the repair and writes it.

    Args:
        suspect: the model.
        defense: the defense.
        out: ``.safetensors``, ``.pt`` or ``.pth``, ``.jaxexport``, or else an Orbax folder.
        training_set: the poisoned training set, for a defense that needs it; see `backdoor_jax.data.load_labeled`.
        seed: of the defense.
        force: whether an existing model may be replaced, a model less accurate than a healthy one repaired, and a
            repair that lost too much accuracy written.
        max_drop: the loss of accuracy, of 1, above which the repair is not written.
        training_images: how the images of `training_set` are read.

    Raises:
        UserError: for anything that cannot be used, before the work where it can be known.
        NonFiniteError: where the repair diverges.
    """
    classifier, data = suspect.classifier, suspect.data
    if (defense.needs == "training_set") != (training_set is not None):
        fix = "give it with --training-set" if training_set is None else "leave --training-set out"
        raise UserError(f"{defense.name} needs {defense.needs.replace('_', ' ')}; {fix}")
    if suspect.accuracy < suspect.healthy and not force:
        raise UserError(
            f"{suspect.name}: {100 * suspect.accuracy:.1f} % correct is less than a healthy model reaches "
            f"({100 * suspect.healthy:.0f} %, --healthy), so a repair would mean nothing; fix what it is given"
            f"{f' ({suspect.notes[-1]})' if suspect.notes else ''}, or repair it nevertheless with --force"
        )
    require_free(out, force, MODEL_SUFFIXES)
    if out.suffix in TORCH_SUFFIXES:
        require_counterpart(classifier)
    if training_set is not None:
        data = training_images.load(training_set, classifier.num_classes, len(classifier.mean)).data
        if data.images.shape[1:] != suspect.data.images.shape[1:]:
            shapes = ("x".join(map(str, part.images.shape[1:])) for part in (data, suspect.data))
            raise UserError("{}: has images of {}, but --data of {}; give one shape".format(training_set, *shapes))
    elif defense.needs == "nothing":
        data = data.take(slice(0))

    repair = defense.repair(jax.random.key(seed), classifier, suspect.variables, data)
    accuracy = evaluate(classifier, repair.variables, suspect.test, name=f"{defense.name} on {suspect.name}").acc
    held_out = suspect.held_out or defense.needs != "clean"
    if accuracy < suspect.accuracy - max_drop and not force:
        return RepairResult(repair, accuracy, None, held_out)
    if out.suffix == EXPORT_SUFFIX:
        height, width, channels = suspect.data.images.shape[1:]
        export_model(out, classifier, repair.variables, (height, width, channels))
    elif isinstance(classifier.network, TorchNetwork) and out.suffix == ".safetensors":
        save_torch(out, classifier, repair.variables)  # For the module itself, as .pt.
    else:
        save_model(out, classifier, repair.variables)
    return RepairResult(repair, accuracy, out, held_out)


def change_line(before: Variables, after: Variables) -> str:
    """What a repair changed, in words.

    Example:
        >>> at = lambda *kernel: {"params": {"kernel": np.array(kernel)}}
        >>> change_line(at(3.0, 4.0), at(3.0, 4.5))
        'changed 1 of 1 arrays, and moved the weights by 10 % of their norm'
    """
    old, new = (dict(jax.tree_util.tree_leaves_with_path(variables)) for variables in (before, after))
    changed = [path for path, leaf in new.items() if path in old and not np.array_equal(old[path], leaf)]
    moved, norm = 0.0, 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": before["params"]}):
        moved += float(np.sum((np.asarray(new[path], np.float64) - np.asarray(leaf, np.float64)) ** 2))
        norm += float(np.sum(np.asarray(leaf, np.float64) ** 2))
    share = 100 * math.sqrt(moved / norm) if norm else 0.0
    added = len(new) - len(old)
    bounds = f", and added {added} bounds on activations" if added > 0 else ""
    return f"changed {len(changed)} of {len(old)} arrays, and moved the weights by {share:.2g} % of their norm{bounds}"


def loading_line(suspect: Suspect, repair: Repair, out: Path) -> str:
    """How to load a written model."""
    if out.suffix == EXPORT_SUFFIX:
        return f"jax.export.deserialize(bytearray(open({str(out)!r}, 'rb').read())).call(images)"
    module = isinstance(suspect.classifier.network, TorchNetwork)
    if out.suffix in TORCH_SUFFIXES or (module and out.suffix == ".safetensors"):
        read = f"torch.load({str(out)!r})"
        if out.suffix == ".safetensors":
            read = f"safetensors.torch.load_file({str(out)!r})"
        if "bounds" not in repair.variables:
            return f"module.load_state_dict({read})"
        return f"saved = {read}; module.load_state_dict(saved['model']); apply_bounds(module, saved['bounds'])"
    given = ", classifier=classifier" if module else ""
    return f"backdoor_jax.load_model({str(out)!r}{given})"


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


def require_better_than_chance(
    correct: int, labels: np.ndarray, classifier: Classifier, name: str, better: str = ""
) -> None:
    """Refuses a model that is hardly better than guessing; see `is_near_chance`.

    Args:
        correct: how many images it classifies correctly.
        labels: ``(N,)``.
        classifier: the network.
        name: what errors call the model.
        better: what would be better, where something is known.

    Raises:
        UserError: where it is near chance; it names the likely causes.
    """
    count = len(labels)
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {count} images are of class {labels[0]}, which shows nothing; give images of all classes")
    if not is_near_chance(correct, labels, classifier.num_classes):
        return
    chance = chance_level(labels, classifier.num_classes)
    mean, std = (",".join(f"{value:g}" for value in values) for values in (classifier.mean, classifier.std))
    raise UserError(
        f"{name}: {correct} of {count} images classified correctly ({100 * correct / count:.1f} %) is near chance "
        f"({100 * chance:.1f} %); "
        + (
            better
            or f"most likely the images are not normalized as in its training (here {mean}/{std}): see --normalize; or "
            "the channels have another order (--channel-order), the images another size (--size), the network another "
            "stem (--stem, or the module itself as --model), or the labels number the classes in another order"
        )
    )
