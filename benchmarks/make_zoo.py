"""Trains the victims and clean models of an experiment and writes them to the zoo.

    python benchmarks/make_zoo.py configs/zoo_gtsrb.yaml

The experiment is trained in `--runs`, with `--workers` processes, and resumes when it is run again; the configuration's
defenses are left out. Models are called DATASET/LABEL-sSEED, clean models DATASET/clean-sSEED, and what is recorded of
each is measured with the file as `backdoor_jax.zoo.load` reads it.
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import measuring

from backdoor_jax import zoo
from backdoor_jax.config_files import load_experiment
from backdoor_jax.experiment import AttackEntry, Experiment, Workspace, describe, make_workspace, run_experiment
from backdoor_jax.experiment.rows import environment
from backdoor_jax.experiment.victims import load_stored
from backdoor_jax.metrics import evaluate

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an experiment in YAML")
    parser.add_argument("--runs", type=Path, help="folder of the training (default: runs/ and the file's name)")
    parser.add_argument("--out", type=Path, default=ROOT / "zoo", help="folder of the zoo (default: zoo)")
    parser.add_argument("--workers", type=int, help="processes that train (default: this one)")
    measuring.command(parser, make)


def make(arguments: argparse.Namespace) -> None:
    """Trains what is missing, and writes all models of the experiment to the zoo."""
    experiment = dataclasses.replace(load_experiment(arguments.config), defenses=())
    runs = arguments.runs or ROOT / "runs" / arguments.config.stem
    cluster: Any = contextlib.nullcontext()
    if arguments.workers:
        from backdoor_jax.experiment.workers import local_workers

        cluster = local_workers(arguments.workers)
    with cluster as client:
        run_experiment(experiment, runs, client=client)
    pack(experiment, runs, arguments.out)


def pack(experiment: Experiment, runs: Path, out: Path) -> None:
    """Writes the trained models of an experiment to a zoo."""
    workspace = make_workspace(experiment, runs)
    for seed in experiment.seeds:
        for entry in [*experiment.attacks, None]:
            pack_model(workspace, entry, seed, out)


def pack_model(workspace: Workspace, entry: AttackEntry | None, seed: int, out: Path) -> None:
    """Writes one model to a zoo, with the rates of what was written."""
    experiment, task = workspace.experiment, workspace.task
    clean = load_stored(workspace, None, seed).variables if entry and entry.attack.needs_clean_model else None
    stored = load_stored(workspace, entry, seed, clean)
    label = entry.label if entry else "clean"
    name, described = f"{task.name}/{label}-s{seed}", describe(experiment)
    recipe = {
        "dataset": task.name,
        "data": described["data"],
        "classes": task.num_classes,
        "shape": list(task.test.images.shape[1:]),
        "normalization": task.normalization,
        "model": described["model"],
        "attack": {key: value for key, value in described["attacks"].get(label, {}).items() if key != "victim"} or None,
        "training": dataclasses.asdict(experiment.training(entry)),
        "seed": seed,
        "rates": {"acc": 0.0, "asr": None, "ra": None},
        **environment(),
    }
    contents = zoo.Contents(stored.variables, stored.trigger, stored.poisoned)
    zoo.save(name, contents, recipe, out)
    found = zoo.load(name, out)
    scores = evaluate(found.classifier, found.variables, task.test, found.trigger, found.label_map, name)
    zoo.save(name, contents, recipe | {"rates": scores._asdict()}, out)
    print(name, {rate: value and round(value, 4) for rate, value in scores._asdict().items()}, flush=True)


if __name__ == "__main__":
    main()
