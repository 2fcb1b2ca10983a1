"""Read a suspect model and the images to work with, and evaluate it.

Shapes of weights do not show how images were normalized, in which order their channels are, or what a stem does, and a
model that is given other images than in its training looks like one near chance. Near chance it is refused; below what
a healthy model reaches a scan gives no verdict and a repair is refused.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax import zoo
from backdoor_jax.app.trials import COUNT, IMAGES_PER_CLASS, better_input, try_inputs
from backdoor_jax.data import Dataset, Labeled, LabelMap, Trigger, image_size, in_order, load_labeled, names_classes
from backdoor_jax.detectors import HEALTHY
from backdoor_jax.errors import LONGEST, UserError, printable
from backdoor_jax.interop.native import load_model
from backdoor_jax.interop.torch_files import read, unwrap
from backdoor_jax.interop.torch_models import bounds_of, classes_and_channels, load_module, names_module
from backdoor_jax.memory import largest_array, require_batch_memory
from backdoor_jax.metrics import SIGNIFICANT, chance_level, evaluate, is_near_chance, predict, success_rates
from backdoor_jax.models import NORMALIZATIONS, STEMS, Classifier, ResNet, Stem, Variables
from backdoor_jax.training.inference import CHUNK

ZOO = "zoo:"
"""What the path of a model starts with that is a name in `backdoor_jax.zoo`."""


class _Opened(NamedTuple):
    """A model, of which a module's network follows from the shape of its images; the zoo's comes with a trigger."""

    num_classes: int
    channels: int
    network: Callable[[jax.Array], tuple[Classifier, Variables]]
    victim: zoo.ZooVictim | None = None


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model in a file, and what a PyTorch file does not tell of it.

    Attributes:
        path: the file or folder; see `backdoor_jax.load_model`. Or ``zoo:`` and a name in `backdoor_jax.zoo`.
        model: the network's name, or the module as ``torchvision:NAME``, ``timm:NAME`` or ``FILE.py:FUNCTION``.
        key: of a file that holds several models: which.
        stem: of a ResNet: a name in `backdoor_jax.models.STEMS`.
        normalization: a name in `backdoor_jax.models.NORMALIZATIONS`.
        mean: of each channel, instead of a name.
        std: of each channel, instead of a name.
        classes: what the model's number of classes must be.
    """

    path: Path
    model: str | None = None
    key: str | None = None
    stem: Stem | None = None
    normalization: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: int | None = None

    @property
    def name(self) -> str:
        """What is printed and written in figures for the model."""
        return printable(str(self.path), LONGEST)

    def open(self, size: Callable[[], tuple[int, int]]) -> _Opened:
        """Reads the model.

        Args:
            size: finds height and width of its images, which are asked for where they determine the rest.

        Raises:
            UserError: for a file that cannot be used.
        """
        if self.name.startswith(ZOO):
            for option in ("model", "key", "stem", "normalization", "mean", "std"):
                if getattr(self, option) is not None:
                    raise UserError(f"{self.name}: has its own {option}; give its name alone")
            victim = zoo.load(self.name.removeprefix(ZOO))
            parts = victim.classifier, victim.variables
            opened = _Opened(parts[0].num_classes, len(parts[0].mean), lambda images: parts, victim)
        elif self.model is None or not names_module(self.model):
            found = load_model(
                self.path,
                self.model,
                key=self.key,
                stem=self.stem,
                normalization=self.normalization,
                mean=self.mean,
                std=self.std,
            )
            opened = _Opened(found[0].num_classes, len(found[0].mean), lambda images: found)
        else:
            opened = self._open_module(self.model, size())
        if self.classes is not None and self.classes != opened.num_classes:
            raise UserError(f"{self.path}: has {opened.num_classes} classes, not {self.classes}; fix --classes")
        return opened

    def _open_module(self, model: str, size: tuple[int, int]) -> _Opened:
        """A PyTorch module with the state in the file, for images of a size."""
        if self.stem is not None:
            raise UserError(f"--model {model} has its own stem; leave out --stem")
        state, bounds = unwrap(read(self.path), self.name, self.key)
        module = load_module(model, state, self.name, self.classes)
        num_classes, channels = classes_and_channels(module, size, model)
        mean, std = self._normalization(channels)

        def network(images: jax.Array) -> tuple[Classifier, Variables]:
            classifier, variables = Classifier.from_torch(module, images, mean=mean, std=std)
            return classifier, bounds_of(variables, classifier, bounds, self.name) if bounds else variables

        return _Opened(num_classes, channels, network)

    def _normalization(self, channels: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and standard deviation by name or as given, for this many channels."""
        name, mean, std = self.normalization, self.mean, self.std
        if name is not None and name != "none":
            if name not in NORMALIZATIONS:
                raise UserError(f"unknown normalization {name!r}; known are {', '.join(sorted(NORMALIZATIONS))}")
            mean, std = NORMALIZATIONS[name]
        if mean is not None and len(mean) != channels:
            raise UserError(f"the model takes {channels} channels, the normalization has {len(mean)}; fix --normalize")
        return mean, std


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
class Images:
    """How images are read.

    Attributes:
        size: height and width to which they are resized; as they are by default.
        resize: pixels of the shorter side before the center of `size` is cut out; stretched by default.
        class_names: of sources in folders, the folders of classes 0, 1, ...; their sorted names by default.
        channel_order: ``rgb``, or ``bgr`` for a model that was trained on images of OpenCV.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    class_names: tuple[str, ...] | None = None
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def load(self, source: str, num_classes: int, channels: int, order: tuple[str, ...] | None = None) -> Labeled:
        """The labeled images of a source; see `backdoor_jax.data.load_labeled`.

        Args:
            source: the source.
            num_classes: the model's number of classes.
            channels: the model's.
            order: the names of classes 0, 1, ..., where they are known, for a source that names its classes itself.

        Raises:
            UserError: where it cannot be read, or its classes have other names.
        """
        if self.channel_order != "rgb" and channels != 3:
            raise UserError(f"the model takes {channels} channel, which has no order; leave out --channel-order")
        names = self.class_names if names_classes(source) else None
        found = load_labeled(source, num_classes, channels, size=self.size, resize=self.resize, class_names=names)
        if names is None and order is not None:
            found = in_order(found, order, source)
        test = found.test and dataclasses.replace(found.test, images=self.turn(found.test.images))
        return found._replace(data=dataclasses.replace(found.data, images=self.turn(found.data.images)), test=test)

    def turn(self, images: jax.Array) -> jax.Array:
        """Images in RGB to the model's order of channels, or back."""
        return images if self.channel_order == "rgb" else images[..., ::-1]


def load_suspect(
    file: ModelFile,
    data: str,
    *,
    test: str | None = None,
    hold_out: float | None = None,
    images: Images = Images(),
    healthy: float = HEALTHY,
    triggered: str | Callable[[tuple[int, int, int]], Trigger] | None = None,
    target: int | None = None,
) -> Suspect:
    """Reads a model and labeled images, and evaluates the model on them.

    Args:
        file: the model; one of the zoo comes with its trigger.
        data: clean labeled images; see `backdoor_jax.data.load_labeled`.
        test: images to evaluate on, in one of the same forms; by default the test images that come with `data`, or
            else `data` itself, which then does not show what a repair costs.
        hold_out: share of the images of each class in `data` that is kept for evaluation where there are no others;
            the rest is left to work with.
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
    opened = file.open(partial(image_size, data, images.size))
    victim = opened.victim
    if triggered is None and victim and victim.trigger and victim.label_map and victim.label_map.kind == "all_to_one":
        triggered, target = _planted_trigger(victim, victim.trigger), victim.label_map.target
    labeled = images.load(data, opened.num_classes, opened.channels)
    classifier, variables = opened.network(labeled.data.images)
    name = file.name
    channels, notes = len(classifier.mean), list(labeled.notes)
    held_out = labeled.test
    if test is not None:
        other = images.load(test, classifier.num_classes, channels, labeled.class_names)
        notes += other.notes
        held_out = other.test or other.data
    given = labeled.data
    if hold_out is not None:
        if held_out is not None:
            raise UserError(f"{test or data} has images to evaluate on already; leave out --hold-out")
        given, held_out = _split(labeled.data, hold_out)
    judged = held_out or given
    shown = None
    if triggered is not None and target is not None:
        if not 0 <= target < classifier.num_classes:
            raise UserError(f"--target {target} is no class of the model; it has 0 to {classifier.num_classes - 1}")
        if isinstance(triggered, str):
            carrying = images.load(triggered, classifier.num_classes, channels, labeled.class_names)
            shown = carrying.data
            notes += carrying.notes
        else:
            height, width, _ = judged.images.shape[1:]
            trigger = triggered((height, width, channels))
            shown = dataclasses.replace(judged, images=images.turn(trigger(images.turn(judged.images))))
    for part in (given, judged, *(() if shown is None else (shown,))):
        _require_computable(classifier, variables, part.images, name)
    accuracy = evaluate(classifier, variables, judged, name=name).acc
    labels = np.asarray(judged.labels)
    assumed = file.model is not None
    better = ""
    if accuracy < healthy:
        trials = try_inputs(classifier, variables, judged, assumed, "bgr" if images.channel_order == "rgb" else "rgb")
        better = better_input(trials, accuracy, labeled.class_names if Path(data).is_dir() else None)
    require_better_than_chance(round(accuracy * len(judged)), labels, classifier, name, better, notes)
    if assumed:
        notes.insert(0, _assumptions(classifier, images))
    if better:
        notes.append(better)
    return Suspect(
        name,
        classifier,
        variables,
        given,
        judged,
        accuracy,
        healthy,
        labeled.class_names,
        tuple(notes),
        shown,
        target,
    )


def _split(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Images to work with, of each class at least one, and a share of them to evaluate on: always the same."""
    labels = np.asarray(data.labels)
    order = np.asarray(jax.random.permutation(jax.random.key(0), len(labels)))
    parts = [order[labels[order] == label] for label in np.unique(labels)]
    kept = [part[: min(round(share * len(part)), len(part) - 1)] for part in parts]
    held_out = np.sort(np.concatenate(kept))
    if not len(held_out):
        raise UserError(
            f"--hold-out {share:g} of {len(labels)} images of {len(parts)} classes keeps none; give a larger share, or "
            "more images"
        )
    return data.take(np.setdiff1d(order, held_out)), data.take(held_out)


def _planted_trigger(victim: zoo.ZooVictim, trigger: Trigger) -> Callable[[tuple[int, int, int]], Trigger]:
    """What gives a victim's own trigger for images of a shape, which must be that of its training."""

    def planted(shape: tuple[int, int, int]) -> Trigger:
        height, width, channels = victim.recipe["shape"]
        if shape != (height, width, channels):
            found = "x".join(map(str, shape))
            raise UserError(
                f"{ZOO}{victim.name}: its trigger is for images of {height}x{width}x{channels}, these are {found}; "
                f"give --size {height}x{width}"
            )
        return trigger

    return planted


def _require_computable(classifier: Classifier, variables: Variables, images: jax.Array, name: str) -> None:
    """Refuses images that the network cannot compute with, for their shape or for want of memory."""
    batch = jax.ShapeDtypeStruct((min(CHUNK, len(images)), *images.shape[1:]), images.dtype)
    try:
        needed = largest_array(lambda images: classifier.logits(variables, images)[0], batch)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    require_batch_memory(needed, batch.shape, name)


def _assumptions(classifier: Classifier, images: Images) -> str:
    """What shapes do not determine and was assumed, in one line."""
    mean, std = (",".join(f"{value:g}" for value in values) for values in (classifier.mean, classifier.std))
    plain = not any(classifier.mean) and {*classifier.std} == {1.0}
    parts = [f"pixels from 0 to 1, {'not normalized' if plain else f'normalized by {mean}/{std}'} (--normalize)"]
    parts.append(f"channels in the order {images.channel_order.upper()} (--channel-order)")
    if isinstance(classifier.network, ResNet):
        size, stride, pooled = STEMS[classifier.network.stem]
        pooling = "then max-pooling" if pooled else "no pooling"
        parts.append(f"a stem of {size}x{size} with stride {stride}, {pooling} (--stem)")
    return f"assumed: {'; '.join(parts)}"


def load_unseen(file: ModelFile, size: tuple[int, int]) -> Suspect:
    """Reads a model without any images, for a detector that needs none.

    Args:
        file: the model.
        size: height and width of its images.

    Raises:
        UserError: for a file that cannot be used.
    """
    opened = file.open(lambda: size)
    images = jnp.zeros((1, *size, opened.channels), jnp.uint8)
    classifier, variables = opened.network(images)
    none = Dataset(images[:0], jnp.zeros(0, jnp.int32))
    return Suspect(file.name, classifier, variables, none, none, math.nan)


def require_numbered(suspect: Suspect, found: Labeled, source: str, images: Images) -> None:
    """Refuses a training set of which the model that was trained on it is hardly correct about any image.

    Its classes then probably have other numbers, and another class's images would be taken for the target's.

    Raises:
        UserError: with what would be better, where something is known.
    """
    data = found.data.take(slice(None, None, max(1, len(found.data) // COUNT)))
    labels, classes = np.asarray(data.labels), suspect.classifier.num_classes
    correct = int(np.sum(predict(suspect.classifier, suspect.variables, data.images, name=suspect.name) == labels))
    if not is_near_chance(correct, labels, classes) or is_near_chance(len(labels), labels, classes):
        return
    other = "bgr" if images.channel_order == "rgb" else "rgb"
    trials = try_inputs(suspect.classifier, suspect.variables, data, False, other)
    better = better_input(trials, correct / len(labels), found.class_names if names_classes(source) else None)
    raise UserError(
        f"{source}: the model classifies {correct} of {len(labels)} images correctly, which is near chance; "
        f"{better or 'number its classes as the model does (--class-names), or give the set it was trained on'}"
    )


def require_better_than_chance(
    correct: int,
    labels: np.ndarray,
    classifier: Classifier,
    name: str,
    better: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Refuses a model that is hardly better than guessing; see `is_near_chance`.

    Args:
        correct: how many images it classifies correctly.
        labels: ``(N,)``.
        classifier: the network.
        name: what errors call the model.
        better: what would be better, where something is known.
        notes: what was done to the images, which may be the cause.

    Raises:
        UserError: where it is near chance; it names the likely causes.
    """
    count = len(labels)
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {count} images are of class {labels[0]}, which shows nothing; give images of all classes")
    if not is_near_chance(correct, labels, classifier.num_classes):
        return
    chance = chance_level(labels, classifier.num_classes)
    if is_near_chance(count, labels, classifier.num_classes):
        needed = math.ceil(math.log(SIGNIFICANT) / math.log(chance))
        raise UserError(
            f"{name}: {correct} of {count} images classified correctly; so few say nothing, since guessing reaches "
            f"{100 * chance:.1f} %; give at least {needed}, better {IMAGES_PER_CLASS} of each class"
        )
    mean, std = (",".join(f"{value:g}" for value in values) for values in (classifier.mean, classifier.std))
    if notes and not better:
        better = (
            f"{printable('; '.join(notes), 200)}; if that is not the cause, see --class-names, --normalize, --stem, "
            "--size and --channel-order"
        )
    raise UserError(
        f"{name}: {correct} of {count} images classified correctly ({100 * correct / count:.1f} %) is near chance "
        f"({100 * chance:.1f} %); "
        + (
            better
            # What costs most accuracy comes first, by benchmarks/mistakes.py.
            or "most likely classes are numbered otherwise (--class-names), or pixels had another range (here "
            f"normalized by {mean}/{std}: see --normalize); or else the network another stem (--stem, or the module "
            "itself as --model), or images another size (--size), order of channels (--channel-order) or normalization"
        )
    )
