"""Repair a model, evaluate the repair, write it, and say what it changed."""

import dataclasses
import math
import time
from pathlib import Path

import jax
import numpy as np

from backdoor_jax.app.loading import Images, Suspect, require_numbered
from backdoor_jax.app.outputs import MODEL_SUFFIXES, marked, require_free
from backdoor_jax.defenses import Defense, Repair
from backdoor_jax.errors import UserError
from backdoor_jax.interop.export import SUFFIX as EXPORT_SUFFIX
from backdoor_jax.interop.export import export_model
from backdoor_jax.interop.native import TORCH_SUFFIXES, save_model
from backdoor_jax.interop.pytorch import require_counterpart, save_torch
from backdoor_jax.metrics import evaluate
from backdoor_jax.models import Variables
from backdoor_jax.models.torch_module import TorchNetwork

MAX_DROP = 0.05
"""The loss of accuracy above which a repair is refused; ours."""
REFUSED = "refused"
"""What marks the file of such a repair."""
GENTLE = "ft_sam"
"""A defense that removes most backdoors and loses little accuracy, by docs/which_defense.md."""


@dataclasses.dataclass(frozen=True)
class RepairResult:
    """A repaired model.

    Attributes:
        repair: what the defense returned.
        accuracy: share of the suspect's test images that the repaired model classifies correctly.
        seconds: how long the defense took, with compilation.
        out: where the model was written; None where the repair lost too much accuracy.
        refused: where it was written instead, so that it is not lost.
        remedies: what was lost then, and what to do about it.
        held_out: whether the defense had no test image to work with.
        notes: what was converted or passed over in the training set, one line each.
    """

    repair: Repair
    accuracy: float
    seconds: float
    out: Path | None
    held_out: bool
    refused: Path | None = None
    remedies: str | None = None
    notes: tuple[str, ...] = ()


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
        max_drop: the loss of accuracy, of 1, above which the repair is written beside `out`, marked ``-refused``.
        training_images: how the images of `training_set` are read.

    Raises:
        UserError: for anything that cannot be used, before the work where it can be known.
        NonFiniteError: where the repair diverges.
    """
    classifier, data = suspect.classifier, suspect.data
    require_repairable(suspect, defense, out, training_set=training_set, force=force)
    notes: tuple[str, ...] = ()
    if training_set is not None:
        labeled = training_images.load(training_set, classifier.num_classes, len(classifier.mean), suspect.class_names)
        data, notes = labeled.data, labeled.notes
        if data.images.shape[1:] != suspect.data.images.shape[1:]:
            shapes = ("x".join(map(str, part.images.shape[1:])) for part in (data, suspect.data))
            raise UserError("{}: has images of {}, but --data of {}; give one shape".format(training_set, *shapes))
        if not force:
            require_numbered(suspect, labeled, training_set, training_images)
    elif defense.needs == "nothing":
        data = data.take(slice(0))

    started = time.perf_counter()
    repair = defense.repair(jax.random.key(seed), classifier, suspect.variables, data)
    jax.block_until_ready(repair.variables)
    seconds = time.perf_counter() - started
    accuracy = evaluate(classifier, repair.variables, suspect.test, name=f"{defense.name} on {suspect.name}").acc
    held_out = suspect.held_out or defense.needs != "clean"
    result = RepairResult(repair, accuracy, seconds, out, held_out, notes=notes)
    if suspect.accuracy - accuracy > max_drop:
        refused = None if force else marked(out, REFUSED)
        remedies = _remedies(defense, repair, suspect.accuracy - accuracy, max_drop, refused)
        result = dataclasses.replace(result, out=out if force else None, refused=refused, remedies=remedies)
    _write(suspect, repair, result.refused or out)
    return result


def require_repairable(
    suspect: Suspect, defense: Defense, out: Path, *, training_set: str | None = None, force: bool = False
) -> None:
    """Refuses what a repair would fail at, or would mean nothing for, before the work; see `repair_model`.

    Raises:
        UserError: with what to do about it.
    """
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
    require_free(marked(out, REFUSED), True, MODEL_SUFFIXES)
    if out.suffix in TORCH_SUFFIXES:
        require_counterpart(suspect.classifier)


def _write(suspect: Suspect, repair: Repair, out: Path) -> None:
    """Writes a repaired model in the format of a path."""
    classifier = suspect.classifier
    if out.suffix == EXPORT_SUFFIX:
        height, width, channels = suspect.data.images.shape[1:]
        export_model(out, classifier, repair.variables, (height, width, channels))
    elif isinstance(classifier.network, TorchNetwork) and out.suffix == ".safetensors":
        save_torch(out, classifier, repair.variables)  # For the module itself, as .pt.
    else:
        save_model(out, classifier, repair.variables)


def _remedies(defense: Defense, repair: Repair, drop: float, max_drop: float, refused: Path | None) -> str:
    """What a repair lost, where it is, and how to lose less, in one line."""
    rate = "untargeted_step" if repair.target is None else "first_step"
    setting = next((name for name in (rate, "learning_rate") if hasattr(defense, name)), None)
    gentler = f", repair more gently ({setting}={getattr(defense, setting) / 2:.2g})" if setting else ""
    other = "" if defense.name == GENTLE else f", or try one that loses little (--defense {GENTLE})"
    allowed = math.ceil(100 * drop) / 100
    where = "it is written because of --force"
    if refused is not None:
        where = f"it is kept as {refused}; to accept it, rename that or give --max-drop {allowed:g}"
    return (
        f"it lost {100 * drop:.1f} % of accuracy, more than the {100 * max_drop:g} % of --max-drop; {where}; "
        f"to lose less, give more clean images{gentler}{other}"
    )


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
