"""Victims and unpoisoned twins: made once, kept in the experiment's folder, and loaded again."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from backdoor_jax.attacks import Attack, Planted, Scene
from backdoor_jax.data import Dataset, LabelMap, Poisoned, Task, Trigger, clean_indices, load_task
from backdoor_jax.experiment.rows import plain
from backdoor_jax.experiment.settings import AttackEntry, Experiment
from backdoor_jax.files import whole, write_text
from backdoor_jax.interop.checkpoints import load_tree, save_tree
from backdoor_jax.interop.native import save_model
from backdoor_jax.metrics import Scores, evaluate
from backdoor_jax.models import Classifier, Variables, build_classifier
from backdoor_jax.training import Stopwatch, mesh_for, train, train_many

RECORD = "timing.json"
"""The file whose presence says that a victim is whole."""


class Victim(NamedTuple):
    """A model to be repaired, and the attacker's means to judge it."""

    label: str
    seed: int
    variables: Variables
    scores: Scores
    training_set: Dataset
    poisoned: np.ndarray
    trigger: Trigger | None
    label_map: LabelMap | None
    info: dict[str, Any]
    seconds: float
    compile_seconds: float


def streams(seed: int, label: str) -> dict[str, jax.Array]:
    """One stream of randomness a purpose; the poison's depends on the attack, weights and clean subset do not."""
    key = jax.random.key(seed)
    purposes = ("clean", "victim", "poison", "defense", "analysis")
    streams = {name: jax.random.fold_in(key, number) for number, name in enumerate(purposes)}
    for name in ("poison", "defense", "analysis"):
        streams[name] = jax.random.fold_in(streams[name], zlib.crc32(label.encode()))
    return streams


def clean_subset(experiment: Experiment, task: Task, seed: int) -> np.ndarray:
    """Which training images the defender has, whatever the attack."""
    key, labels = streams(seed, "none")["clean"], task.train.labels
    return np.asarray(clean_indices(key, labels, experiment.clean_ratio, task.num_classes, experiment.stratified))


def prepare_task(experiment: Experiment, root: Path = Path()) -> tuple[Task, Classifier]:
    """The data of an experiment, and the network that it trains on them."""
    data, model = experiment.data, experiment.model
    task = load_task(data.source, data.train_size, data.test_size, root=root)
    return task, build_classifier(model.name, task.num_classes, model.width, task.normalization, **model.options)


def prepare_victim(
    experiment: Experiment,
    task: Task,
    classifier: Classifier,
    entry: AttackEntry | None,
    seed: int,
    out: Path,
    clean_model: Variables | None = None,
) -> Victim:
    """Makes a victim or unpoisoned twin where there is none yet, and loads it.

    Where an attack looks into a clean model, that is the twin, which started from the victim's own weights: more than
    an attacker would know.
    """
    label = entry.label if entry else "none"
    keys = streams(seed, label)
    scene = Scene(classifier, task.train, experiment.training(entry), task.flip, clean_model)
    folder = out / "victims" / f"{label}-{seed}"
    record = folder / RECORD
    if not record.is_file():
        name, checkpoints = f"{label}-{seed}", folder / "training"
        resumed = checkpoints.is_dir()
        with Stopwatch() as watch:
            if entry:
                planted = entry.attack.plant(keys["poison"], keys["victim"], scene, name=name, checkpoints=checkpoints)
            else:
                variables, _ = train(
                    keys["victim"],
                    classifier,
                    task.train,
                    scene.training,
                    flip=task.flip,
                    name=name,
                    checkpoints=checkpoints,
                )
                planted = _unplanted(task, variables)
            jax.block_until_ready(planted.variables)
        if resumed:  # Its seconds are those since then.
            planted = planted._replace(info={**planted.info, "resumed": True})
        _keep(folder, classifier, entry, planted, task, watch.seconds, watch.compile_seconds)

    like = jax.eval_shape(classifier.init, keys["victim"], task.test.images[:1])
    variables = load_tree(folder / "variables", like)
    poisoned, trigger, label_map = Poisoned(task.train, np.empty(0, np.int64)), None, None
    if entry:
        label_map = entry.attack.label_map(task.num_classes)
        if entry.attack.learns:
            trigger = load_tree(folder / "trigger", trigger_like(entry.attack, task))
            poisoned = load_poisoned(folder / "poisoned.npz", task.train)
        else:
            poisoned, trigger, _ = entry.attack.poison(keys["poison"], scene)
        save_example(out, label, task.test.images[:1], trigger)
    scores = evaluate(classifier, variables, task.test, trigger, label_map, f"victim {label}-{seed}")
    made = json.loads(record.read_text(encoding="utf-8"))
    return Victim(
        label,
        seed,
        variables,
        scores,
        poisoned.data,
        poisoned.indices,
        trigger,
        label_map,
        made.get("info", {}),
        made["seconds"],
        made["compile_seconds"],
    )


def prepare_together(
    experiment: Experiment,
    task: Task,
    classifier: Classifier,
    entry: AttackEntry | None,
    out: Path,
    devices: Sequence[jax.Device],
) -> None:
    """Makes the victims of all seeds that are not there yet at once, over these devices.

    For attacks that train their victims as others do. Each victim is the one that `prepare_victim` would have made, but
    for the order in which sums are taken, and counts with its share of the time.
    """
    if entry and (type(entry.attack).plant is not Attack.plant or entry.attack.needs_clean_model):
        return
    label = entry.label if entry else "none"
    folders = {seed: out / "victims" / f"{label}-{seed}" for seed in experiment.seeds}
    missing = [seed for seed, folder in folders.items() if not (folder / RECORD).is_file()]
    if len(missing) < 2:
        return
    scene = Scene(classifier, task.train, experiment.training(entry), task.flip)
    keys = {seed: streams(seed, label) for seed in missing}
    with Stopwatch() as watch:
        made = [entry.attack.poison(keys[seed]["poison"], scene) for seed in missing] if entry else []
        planted = [Planted({}, trigger, poisoned, info) for poisoned, trigger, info in made]
        planted = planted or [_unplanted(task, {})] * len(missing)
        trained, _ = train_many(
            [keys[seed]["victim"] for seed in missing],
            classifier,
            [own.poisoned.data for own in planted],
            scene.training,
            flip=task.flip,
            mesh=mesh_for(len(missing), devices),
            name=f"{label}, seeds {', '.join(map(str, missing))}",
            checkpoints=out / "victims" / f"{label}-{'-'.join(map(str, missing))}" / "training",
        )
    for seed, own, variables in zip(missing, planted, trained, strict=True):
        seconds, compiling = watch.seconds / len(missing), watch.compile_seconds / len(missing)
        _keep(folders[seed], classifier, entry, own._replace(variables=variables), task, seconds, compiling)


def _unplanted(task: Task, variables: Variables) -> Planted:
    """An unpoisoned twin, as an attack would have left it."""
    return Planted(variables, lambda images: images, Poisoned(task.train, np.empty(0, np.int64)), {})


def _keep(
    folder: Path,
    classifier: Classifier,
    entry: AttackEntry | None,
    planted: Planted,
    task: Task,
    seconds: float,
    compile_seconds: float,
) -> None:
    """Writes a victim and what `prepare_victim` needs to know of it."""
    save_model(folder, classifier, planted.variables)
    if entry and entry.attack.learns:
        save_tree(folder / "trigger", planted.trigger)
        save_poisoned(folder / "poisoned.npz", planted.poisoned, task.train)
    made = {"seconds": seconds, "compile_seconds": compile_seconds, "info": planted.info}
    write_text(folder / RECORD, json.dumps(made, default=plain))


def trigger_like(attack: Attack, task: Task) -> Trigger:
    """The structure and shapes of an attack's trigger."""
    height, width, channels = task.train.images.shape[1:]
    return jax.eval_shape(lambda key: attack.trigger(key, (height, width, channels)), jax.random.key(0))


def save_poisoned(path: Path, poisoned: Poisoned, clean: Dataset) -> None:
    """Writes what a poisoned set has other than the clean one."""
    images, labels = np.asarray(poisoned.data.images), np.asarray(poisoned.data.labels)
    changed = np.flatnonzero(
        np.any(images != np.asarray(clean.images), axis=(1, 2, 3)) | (labels != np.asarray(clean.labels))
    )
    with whole(path) as place:
        np.savez(place, indices=poisoned.indices, changed=changed, images=images[changed], labels=labels[changed])


def load_poisoned(path: Path, clean: Dataset) -> Poisoned:
    """Reads what `save_poisoned` wrote, over the clean set."""
    with np.load(path) as arrays:
        changed = arrays["changed"]
        data = Dataset(clean.images.at[changed].set(arrays["images"]), clean.labels.at[changed].set(arrays["labels"]))
        return Poisoned(data, arrays["indices"])


def save_example(out: Path, label: str, image: jax.Array, trigger: Trigger) -> None:
    """One test image, clean and triggered, for the report."""
    path = out / "examples" / f"{label}.npz"
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    with whole(path) as place:
        np.savez(place, clean=np.asarray(image[0]), triggered=np.asarray(trigger(image)[0]))
