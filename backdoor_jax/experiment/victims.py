"""Victims and clean models: made once, stored in the experiment's folder, loaded and evaluated."""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from backdoor_jax.analyses.answers import shown_images
from backdoor_jax.array_files import read_npz
from backdoor_jax.attacks import Attack, AttackContext, Victim
from backdoor_jax.data import Dataset, LabelMap, Poisoned, Task, Trigger, clean_indices, load
from backdoor_jax.experiment.rows import plain
from backdoor_jax.experiment.settings import AttackEntry, Experiment
from backdoor_jax.files import atomic_write, write_text
from backdoor_jax.interop.checkpoints import load_tree, save_tree
from backdoor_jax.interop.native import load_model, save_model
from backdoor_jax.metrics import Scores, evaluate
from backdoor_jax.models import Classifier, Variables, build_classifier
from backdoor_jax.reading import parsing, read_text
from backdoor_jax.training import Stopwatch, mesh_for, train, train_many

RECORD = "timing.json"
"""The file whose presence says that a stored model is complete."""


@dataclasses.dataclass(frozen=True)
class Workspace:
    """An experiment with its data, its network and its folder."""

    experiment: Experiment
    task: Task
    classifier: Classifier
    folder: Path

    def model_folder(self, label: str, seed: int) -> Path:
        """Where a victim or a clean model is stored."""
        return self.folder / "victims" / f"{label}-{seed}"

    def attack_context(self, entry: AttackEntry | None, clean_model: Variables | None = None) -> AttackContext:
        """What an attacker works with."""
        training = self.experiment.training(entry)
        return AttackContext(self.classifier, self.task.train, training, self.task.flip, clean_model)


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A victim or a clean model as it was stored.

    Attributes:
        label: the attack's, or ``none`` for a clean model.
        seed: of its weights, poison and clean subset.
        variables: the model's.
        training_set: what it was trained on.
        poisoned: indices of the poisoned images in it.
        trigger: the attacker's; None for a clean model.
        label_map: the attacker's; None for a clean model.
        info: what is worth knowing about the attack, in plain values.
        seconds: what making it took, without compilation.
        compile_seconds: what compilation took.
    """

    label: str
    seed: int
    variables: Variables
    training_set: Dataset
    poisoned: np.ndarray
    trigger: Trigger | None
    label_map: LabelMap | None
    info: dict[str, Any]
    seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class TrainedModel(StoredModel):
    """A victim or a clean model, with its rates on the test set."""

    scores: Scores


def streams(seed: int, label: str) -> dict[str, jax.Array]:
    """A `jax.random` key for each purpose.

    Those of weights and of the clean subset depend on the seed alone; those of the poison, a defense and an analysis
    depend on the label as well.
    """
    key = jax.random.key(seed)
    purposes = ("clean", "victim", "poison", "defense", "analysis")
    streams = {name: jax.random.fold_in(key, number) for number, name in enumerate(purposes)}
    for name in ("poison", "defense", "analysis"):
        streams[name] = jax.random.fold_in(streams[name], zlib.crc32(label.encode()))
    return streams


def make_workspace(experiment: Experiment, folder: Path, root: Path = Path()) -> Workspace:
    """Loads an experiment's data and builds its network; writes nothing.

    Args:
        experiment: the experiment.
        folder: where its models and results are, or will be.
        root: where relative paths of data start.
    """
    data, model = experiment.data, experiment.model
    task = load(data.source, data.train_size, data.test_size, root=root, image_size=data.image_size)
    classifier = build_classifier(model.name, task.num_classes, model.width, task.normalization, **model.options)
    return Workspace(experiment, task, classifier, folder)


def clean_subset(workspace: Workspace, seed: int) -> np.ndarray:
    """Indices of the training images that the defender has, the same for every attack."""
    experiment, task = workspace.experiment, workspace.task
    key = streams(seed, "none")["clean"]
    return np.asarray(
        clean_indices(key, task.train.labels, experiment.clean_ratio, task.num_classes, experiment.stratified)
    )


def prepare_model(
    workspace: Workspace, entry: AttackEntry | None, seed: int, clean_model: Variables | None = None
) -> TrainedModel:
    """A victim, or a clean model where there is no attack: made unless it is stored, loaded and evaluated.

    Args:
        workspace: the experiment.
        entry: the attack.
        seed: the model's.
        clean_model: variables of the clean model of this seed, for an attack that uses one. It started from the same
            weights as the victim, which is more than an attacker would know.
    """
    make_model(workspace, entry, seed, clean_model)
    stored = load_stored(workspace, entry, seed, clean_model)
    if stored.trigger is not None:
        save_examples(workspace.folder, stored.label, shown_images(workspace.task.test), stored.trigger)
    return TrainedModel(**vars(stored), scores=judge(workspace, stored))


def make_model(
    workspace: Workspace, entry: AttackEntry | None, seed: int, clean_model: Variables | None = None
) -> None:
    """Trains and stores a victim or a clean model, unless it is stored."""
    label = entry.label if entry else "none"
    folder = workspace.model_folder(label, seed)
    if (folder / RECORD).is_file():
        return
    keys, context = streams(seed, label), workspace.attack_context(entry, clean_model)
    name, checkpoints = f"{label}-{seed}", folder / "training"
    resumed = checkpoints.is_dir()
    with Stopwatch() as watch:
        if entry:
            victim = entry.attack.train_victim_in(
                context, keys["poison"], keys["victim"], name=name, checkpoints=checkpoints
            )
        else:
            trained = train(
                keys["victim"],
                context.classifier,
                context.data,
                context.training,
                flip=context.flip,
                name=name,
                checkpoints=checkpoints,
            )
            victim = _unpoisoned(workspace.task)._replace(variables=trained.variables)
        jax.block_until_ready(victim.variables)
    if resumed:  # Its seconds are those since then.
        victim = victim._replace(info={**victim.info, "resumed": True})
    _store(workspace, folder, entry, victim, watch.seconds, watch.compile_seconds)


def make_models(workspace: Workspace, entry: AttackEntry | None, devices: Sequence[jax.Device]) -> None:
    """Trains and stores the models of all seeds that are not stored, at once over several devices.

    This is for clean models, and for attacks whose victims are trained on a poisoned set as any model is; it does
    nothing for other attacks. Each model is the one that `make_model` would have made, up to the order of summation,
    and is given an equal share of the seconds.
    """
    if entry and (entry.attack.trains_victim or entry.attack.needs_clean_model):
        return
    label = entry.label if entry else "none"
    folders = {seed: workspace.model_folder(label, seed) for seed in workspace.experiment.seeds}
    missing = [seed for seed, folder in folders.items() if not (folder / RECORD).is_file()]
    if len(missing) < 2:
        return
    context = workspace.attack_context(entry)
    keys = {seed: streams(seed, label) for seed in missing}
    with Stopwatch() as watch:
        victims = [_unpoisoned(workspace.task)] * len(missing)
        if entry:
            poisons = [entry.attack.poison(keys[seed]["poison"], context) for seed in missing]
            victims = [Victim({}, trigger, poisoned, info) for poisoned, trigger, info in poisons]
        trained = train_many(
            [keys[seed]["victim"] for seed in missing],
            context.classifier,
            [victim.poisoned.data for victim in victims],
            context.training,
            flip=context.flip,
            mesh=mesh_for(len(missing), devices),
            name=f"{label}, seeds {', '.join(map(str, missing))}",
            checkpoints=workspace.folder / "victims" / f"{label}-{'-'.join(map(str, missing))}" / "training",
        )
    seconds, compile_seconds = watch.seconds / len(missing), watch.compile_seconds / len(missing)
    for seed, victim, variables in zip(missing, victims, trained, strict=True):
        _store(workspace, folders[seed], entry, victim._replace(variables=variables), seconds, compile_seconds)


def load_stored(
    workspace: Workspace, entry: AttackEntry | None, seed: int, clean_model: Variables | None = None
) -> StoredModel:
    """Loads a victim or a clean model from the experiment's folder.

    Poison and trigger that take no training are made again from the seed.
    """
    label, task = entry.label if entry else "none", workspace.task
    folder, keys = workspace.model_folder(label, seed), streams(seed, label)
    _, variables = load_model(folder, classifier=workspace.classifier)
    poisoned, trigger, label_map = _unpoisoned(task).poisoned, None, None
    if entry:
        label_map = entry.attack.label_map(task.num_classes)
        if entry.attack.fits_trigger:
            trigger = load_tree(folder / "trigger", trigger_like(entry.attack, task))
            poisoned = load_poisoned(folder / "poisoned.npz", task.train)
        else:
            context = workspace.attack_context(entry, clean_model)
            poisoned, trigger, _ = entry.attack.poison(keys["poison"], context)
    with parsing(folder / RECORD, "is damaged", f"remove {folder} to make the model again"):
        record = json.loads(read_text(folder / RECORD, f"remove {folder} to make the model again"))
        times = [record["seconds"], record["compile_seconds"]]
        if not isinstance(record["info"], dict) or not all(type(value) in (int, float) for value in times):
            raise ValueError("it holds no times")
    return StoredModel(
        label, seed, variables, poisoned.data, poisoned.indices, trigger, label_map, record["info"], *times
    )


def judge(workspace: Workspace, model: StoredModel, repaired: Variables | None = None, name: str = "") -> Scores:
    """ACC, ASR and RA on the test set, of a stored model or of its repair.

    Args:
        workspace: the experiment.
        model: gives the trigger and the label map, and the variables where there is no repair.
        repaired: variables of the repair.
        name: what errors call it; the model's label and seed by default.

    Raises:
        NonFiniteError: where weights or logits are not finite.
    """
    variables = model.variables if repaired is None else repaired
    name = name or f"victim {model.label}-{model.seed}"
    return evaluate(workspace.classifier, variables, workspace.task.test, model.trigger, model.label_map, name)


def _unpoisoned(task: Task) -> Victim:
    """A clean model before its training, in the form of a victim."""
    return Victim({}, lambda images: images, Poisoned(task.train, np.empty(0, np.int64)), {})


def _store(
    workspace: Workspace,
    folder: Path,
    entry: AttackEntry | None,
    victim: Victim,
    seconds: float,
    compile_seconds: float,
) -> None:
    """Writes a model and what `load_stored` needs besides."""
    save_model(folder, workspace.classifier, victim.variables)
    if entry and entry.attack.fits_trigger:
        save_tree(folder / "trigger", victim.trigger)
        save_poisoned(folder / "poisoned.npz", victim.poisoned, workspace.task.train)
    record = {"seconds": seconds, "compile_seconds": compile_seconds, "info": victim.info}
    write_text(folder / RECORD, json.dumps(record, default=plain))


def trigger_like(attack: Attack, task: Task) -> Trigger:
    """The structure and shapes of an attack's trigger."""
    height, width, channels = task.train.images.shape[1:]
    return jax.eval_shape(lambda key: attack.trigger(key, (height, width, channels)), jax.random.key(0))


def save_poisoned(path: Path, poisoned: Poisoned, clean: Dataset) -> None:
    """Writes the images and labels of a poisoned set that differ from the clean set."""
    images, labels = np.asarray(poisoned.data.images), np.asarray(poisoned.data.labels)
    changed = np.flatnonzero(
        np.any(images != np.asarray(clean.images), axis=(1, 2, 3)) | (labels != np.asarray(clean.labels))
    )
    with atomic_write(path) as temporary:
        np.savez(temporary, indices=poisoned.indices, changed=changed, images=images[changed], labels=labels[changed])


def load_poisoned(path: Path, clean: Dataset) -> Poisoned:
    """The poisoned set that `save_poisoned` wrote, given the clean set."""
    arrays = read_npz(path, "a poisoned set")
    with parsing(path, "is damaged", "remove its folder to make the model again"):
        changed = arrays["changed"]
        data = Dataset(clean.images.at[changed].set(arrays["images"]), clean.labels.at[changed].set(arrays["labels"]))
        return Poisoned(data, arrays["indices"])


def save_examples(folder: Path, label: str, shown: Dataset, trigger: Trigger) -> None:
    """Writes test images, clean and triggered, and their labels for the report, unless they are there."""
    path = folder / "examples" / f"{label}.npz"
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        triggered = np.asarray(trigger(shown.images))
        np.savez(temporary, clean=np.asarray(shown.images), triggered=triggered, labels=np.asarray(shown.labels))
