"""The work of ``backdoor-jax defend`` and ``scan``: a model in a file, some labelled images, a verdict or a repair.

Both first print how many of the images the model classifies rightly and refuse to go on near chance, since a model
that is fed wrongly normalised images looks just so, and neither a scan nor a repair of it means anything.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from backdoor_jax.config_files import defense_config, parse_override
from backdoor_jax.data import Dataset, load_labelled
from backdoor_jax.defenses import DEFENSES, TacConfig
from backdoor_jax.defenses import scan as scan_classes
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.interop.export import SUFFIX as EXPORT_SUFFIX
from backdoor_jax.interop.export import export_model
from backdoor_jax.interop.native import DESCRIPTION, TORCH_SUFFIXES, load_model, save_model
from backdoor_jax.interop.pytorch import require_counterpart
from backdoor_jax.metrics import evaluate
from backdoor_jax.models import NORMALIZATIONS, Classifier, Variables

NEEDED_PACKAGES = {**dict.fromkeys(TORCH_SUFFIXES, "torch"), EXPORT_SUFFIX: "flatbuffers"}
"""What a file to be written needs, by its suffix."""
MODEL_SUFFIXES = (".safetensors", *NEEDED_PACKAGES)
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


class Suspect(NamedTuple):
    """A model that was read, with the images to judge it by.

    Attributes:
        classifier: the network.
        variables: its variables.
        data: images to scan or repair with.
        test: images to judge on; `data` where there are no others.
        acc: share of `test` that it classifies rightly.
    """

    classifier: Classifier
    variables: Variables
    data: Dataset
    test: Dataset
    acc: float


def defend(
    checkpoint: Path,
    data: str,
    defense: str,
    out: Path,
    *,
    model: str | None = None,
    normalize: str | None = None,
    classes: int | None = None,
    test: str | None = None,
    training_set: str | None = None,
    preset: str | None = None,
    overrides: tuple[str, ...] = (),
    seed: int = 0,
    force: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Repairs a model and writes it.

    Args:
        checkpoint: the model; see `backdoor_jax.interop.native.load_model`.
        data: clean labelled images, which also judge the model; see `backdoor_jax.data.load_labelled`.
        defense: a name in `DEFENSES`.
        out: ``.safetensors``, ``.pt`` or ``.pth``, ``.jaxexport``, or else an Orbax folder.
        model: the network's name, for a PyTorch file.
        normalize: for a PyTorch file; see `parse_normalization`.
        classes: what the model's number of classes must be.
        test: images to judge on, read as `data` is; by default the test images that come with `data`, or else `data`
            itself, which then does not show what the repair costs.
        training_set: the poisoned set, for a defence that needs it; read as `data` is.
        preset: named settings of the defence.
        overrides: settings as ``key=value``.
        seed: of the defence.
        force: whether what is at `out` may go.
        report: told a line at a time.

    Raises:
        UserError: for anything that cannot be used, before the work where it can be known.
    """
    if defense not in DEFENSES:
        raise UserError(f"unknown defence {defense!r}; known are {', '.join(DEFENSES)}")
    method = DEFENSES[defense]
    config = defense_config(defense, preset, dict(map(parse_override, overrides)), defense)
    if (method.needs == "training_set") != (training_set is not None):
        mend = "give it with --training-set" if training_set is None else "leave --training-set out"
        raise UserError(f"{defense} needs {method.needs.replace('_', ' ')}; {mend}")
    require_free(out, force, MODEL_SUFFIXES)
    suspect = _open(checkpoint, data, model, normalize, classes, report, test)
    classifier, images = suspect.classifier, suspect.data
    if out.suffix in TORCH_SUFFIXES:
        require_counterpart(classifier)
    if training_set is not None:
        images = load_labelled(training_set, classifier.num_classes, len(classifier.mean)).data
        if images.images.shape[1:] != suspect.data.images.shape[1:]:
            raise UserError(f"{training_set}: its images have another shape than those of {data}; give the same shape")
    elif method.needs == "nothing":
        images = images.take(slice(0))

    repair = method.run(jax.random.key(seed), classifier, suspect.variables, images, config)
    acc = evaluate(classifier, repair.variables, suspect.test, name=f"{defense} on {checkpoint}").acc
    info = repair.info
    if info.get("target") is not None:
        report(f"{defense}: repaired class {info['target']}")
    if not info["changed"]:
        report(f"{defense}: changed nothing ({info.get('why', 'nothing to repair')})")
    report(f"{defense}: {100 * acc:.1f} % right, {100 * suspect.acc:.1f} % before")
    if method.needs == "clean" and suspect.test is suspect.data:
        report(f"{defense}: these are the images it repaired with; give others (--test) to see what the repair costs")
    if out.suffix == EXPORT_SUFFIX:
        height, width, channels = suspect.data.images.shape[1:]
        export_model(out, classifier, repair.variables, (height, width, channels))
    else:
        save_model(out, classifier, repair.variables)
    report(f"{out}: written")


def scan(
    checkpoint: Path,
    data: str,
    out: Path | None = None,
    *,
    model: str | None = None,
    normalize: str | None = None,
    classes: int | None = None,
    force: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Says whether a model looks backdoored and towards which class: a table, a verdict, and a figure.

    Args:
        checkpoint: see `defend`.
        data: likewise.
        out: the figure; by default the checkpoint's name and ``.scan.png``, in the working directory.
        model: see `defend`.
        normalize: likewise.
        classes: likewise.
        force: likewise.
        report: told a line at a time.

    Raises:
        UserError: for anything that cannot be used.
    """
    from rich.console import Console
    from rich.table import Table

    from backdoor_jax.report.figures import perturbation_figure, save

    out = out or Path(f"{checkpoint.name}.scan.png")
    if out.suffix not in FIGURE_SUFFIXES:
        raise UserError(f"{out}: unknown suffix {out.suffix!r} for a figure; give .png, .pdf or .svg")
    require_free(out, force, FIGURE_SUFFIXES)
    suspect = _open(checkpoint, data, model, normalize, classes, report)
    settings = TacConfig()
    found = scan_classes(suspect.classifier, suspect.variables, suspect.data.images, name=str(checkpoint))
    summary = found.summary(settings.statistic, settings.alpha)

    table = Table("class", "per sample", "worst case", title="smallest latent change towards each class")
    smallest = found.tests[settings.statistic].smallest
    for number, norms in enumerate(zip(summary["per_sample"], summary["worst_case"], strict=True)):
        shown = ["-" if norm is None else f"{norm:.3g}" for norm in norms]
        table.add_row(str(number), *shown, style="bold" if number == smallest else None)
    Console(soft_wrap=True).print(table)
    for name, test in found.tests.items():
        p_value = "too few classes" if test.p_value is None else f"p = {test.p_value:.2g}"
        used = " (verdict)" if name == settings.statistic else ""
        report(f"{name.replace('_', ' ')}{used}: class {test.smallest} is smallest, {p_value}")
    flagged = summary["flagged"]
    likely = f"likely backdoored towards class {flagged}" if flagged is not None else summary["verdict"]
    report(f"{checkpoint}: {likely} (one-sided Grubbs test at {settings.alpha})")
    figure = perturbation_figure(summary, str(checkpoint))
    try:
        save(figure, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    report(f"{out}: written")


def parse_normalization(text: str | None) -> dict[str, Any]:
    """How pixels in [0, 1] are normalised, as `load_model` takes it.

    Args:
        text: a name in `NORMALIZATIONS`, ``none`` for [0, 1] as they are, or means and deviations of the channels as
            ``0.49,0.48,0.45/0.25,0.24,0.26``; None where nothing was said.

    Raises:
        UserError: for anything else.

    Example:
        >>> parse_normalization("0.5/0.25"), parse_normalization("gtsrb")
        ({'mean': (0.5,), 'std': (0.25,)}, {'normalization': 'gtsrb'})
    """
    if text is None:
        return {}
    if text in NORMALIZATIONS:
        return {"normalization": text}
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
    except ValueError as error:
        raise UserError(
            f"--normalize {text!r} is neither {', '.join(sorted(NORMALIZATIONS))} nor MEAN/STD, such as "
            "0.49,0.48,0.45/0.25,0.24,0.26"
        ) from error
    return {"mean": mean, "std": std}


def require_free(out: Path, force: bool, known: tuple[str, ...]) -> None:
    """Refuses a place to write to that is taken, or a file that cannot be written here.

    Args:
        out: the place.
        force: whether what is there may go.
        known: suffixes of files; anything else is a folder.

    Raises:
        UserError: where something is there and may not go, or the suffix is unknown or needs a package, or no file can
            be there.
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
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    if not out.exists() or (out.is_dir() and not any(out.iterdir()) and out.suffix not in known):
        return
    if out.is_dir() and (out.suffix in known or not (out / DESCRIPTION).is_file()):
        raise UserError(f"{out}: is a folder and no model; give another --out")
    if not out.is_dir() and out.suffix not in known:
        raise UserError(f"{out}: is a file, and a model without suffix is a folder; give another --out")
    if not force:
        raise UserError(f"{out}: exists; give another --out, or --force to replace it")


def require_better_than_chance(right: int, labels: np.ndarray, classifier: Classifier, where: str) -> None:
    """Refuses a model that does not do much better than guessing on these images.

    Guessing is right in 1/C of them, or in the commonest class's share where that is more. The model must be right in a
    tenth of the rest as well, and in significantly more than guessing (binomial, 5 %), which is what counts where there
    are few images.

    Args:
        right: how many it classifies rightly.
        labels: ``(N,)``.
        classifier: the network.
        where: what errors call the model.

    Raises:
        UserError: where it is near chance, naming its normalisation as the likely cause.
    """
    from scipy import stats

    count = len(labels)
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {count} images are of class {labels[0]}, which shows nothing; give images of all classes")
    chance = max(1 / classifier.num_classes, np.bincount(labels).max() / count)
    if right / count >= chance + (1 - chance) / 10 and stats.binom.sf(right - 1, count, chance) <= 0.05:
        return
    mean, std = (",".join(f"{value:g}" for value in values) for values in (classifier.mean, classifier.std))
    raise UserError(
        f"{where}: {right} of {count} images right ({100 * right / count:.1f} %) is near chance "
        f"({100 * chance:.1f} %); most likely the images are normalised otherwise than in its training (here "
        f"{mean}/{std}): see --normalize; or the labels count classes in another order"
    )


def _open(
    checkpoint: Path,
    data: str,
    model: str | None,
    normalize: str | None,
    classes: int | None,
    report: Callable[[str], None],
    test: str | None = None,
) -> Suspect:
    """Reads the model and the images, and judges the one by the others."""
    classifier, variables = load_model(checkpoint, model, **parse_normalization(normalize))
    if classes is not None and classes != classifier.num_classes:
        raise UserError(f"{checkpoint}: has {classifier.num_classes} classes, not {classes}; mend --classes")
    labelled = load_labelled(data, classifier.num_classes, len(classifier.mean))
    apart = labelled.test
    if test is not None:
        other = load_labelled(test, classifier.num_classes, len(classifier.mean))
        apart = other.test or other.data
    judged = apart or labelled.data
    for part in (labelled.data, judged):
        try:
            jax.eval_shape(lambda images: classifier.logits(variables, images)[0], part.images[:1])
        except UserError:
            raise
        except Exception as error:  # Flax and JAX raise many kinds for images that do not fit.
            shape = "x".join(map(str, part.images.shape[1:]))
            raise UserError(
                f"{checkpoint}: cannot take images of {shape} ({first_line(error)}); give images as in its training"
            ) from error
    acc = evaluate(classifier, variables, judged, name=str(checkpoint)).acc
    of = "test images" if apart is not None else "images"
    report(f"{checkpoint}: {100 * acc:.1f} % of {len(judged)} {of} right")
    require_better_than_chance(round(acc * len(judged)), np.asarray(judged.labels), classifier, str(checkpoint))
    return Suspect(classifier, variables, labelled.data, judged, acc)
