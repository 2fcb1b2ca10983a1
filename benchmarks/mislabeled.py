"""Detection: TAC's scan and MM-BD on an experiment's victims and clean models, and on models with mislabeled images.

    backdoor-jax run configs/super_finetune05_small.yaml --out runs/super_finetune05_small
    python benchmarks/mislabeled.py configs/super_finetune05_small.yaml --out runs/super_finetune05_small \
        --mislabeled any:0:160 1:2:160

``--mislabeled FROM:TO:COUNT`` trains a model on the clean images, COUNT of which (of class FROM, or of any class) have
the label TO, without any trigger: a mistake such as annotators make. Writes OUT/detection.jsonl, a row for each model
and test. Re-running resumes. Missing victims are trained first.
"""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the experiment whose victims are tested")
    parser.add_argument("--out", type=Path, required=True, help="its folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", type=int, default=30, help="MM-BD's starts for a class (default: 30, as published)")
    parser.add_argument("--mislabeled", nargs="*", default=[], metavar="FROM:TO:COUNT", help="further models to train")
    measuring.command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from backdoor_jax.config_files import load_experiment
    from backdoor_jax.data import Dataset
    from backdoor_jax.defenses import scan
    from backdoor_jax.errors import UserError
    from backdoor_jax.experiment import (
        append_row,
        clean_subset,
        make_workspace,
        prepare_model,
        read_rows,
        run_experiment,
        streams,
    )
    from backdoor_jax.experiment.rows import environment
    from backdoor_jax.metrics import MarginConfig, evaluate, mm_bd
    from backdoor_jax.models import Variables
    from backdoor_jax.training import Stopwatch, train

    experiment = dataclasses.replace(load_experiment(arguments.config), seeds=tuple(arguments.seeds), defenses=())
    workspace = make_workspace(experiment, arguments.out)
    task, classifier = workspace.task, workspace.classifier
    labels = np.asarray(task.train.labels)
    mistakes: dict[str, tuple[np.ndarray, int, int]] = {}
    for name in arguments.mislabeled:
        if not re.fullmatch(r"(any|\d+):\d+:\d+", name):
            raise UserError(f"--mislabeled {name}: expected FROM:TO:COUNT, classes from 0 or any, such as any:0:160")
        source, to, count = name.split(":")
        pool = np.flatnonzero(labels != int(to) if source == "any" else labels == int(source))
        if int(count) > len(pool):
            raise UserError(f"--mislabeled {name}: there are {len(pool)} such images; lower the last number")
        mistakes[name] = pool, int(to), int(count)
    run_experiment(experiment, arguments.out)
    path = arguments.out / "detection.jsonl"
    rows = read_rows(path)

    def detect(name: str, seed: int, variables: Variables, clean: np.ndarray, known: dict[str, Any]) -> None:
        def by_scan() -> dict[str, Any]:
            tests = scan(classifier, variables, task.train.images[clean]).tests
            return {key: (test.smallest, test.p_value) for key, test in tests.items()}

        def by_margins() -> dict[str, Any]:
            _, height, width, channels = task.train.images.shape
            config = MarginConfig(starts=arguments.starts)
            found = mm_bd(jax.random.key(seed), classifier, variables, (height, width, channels), config)
            return {"mm_bd": (found.target, found.p_value)}

        for test in (by_scan, by_margins):
            with Stopwatch() as watch:
                found = test()
            for statistic, (target, p_value) in found.items():
                row = {
                    **{"model": name, "seed": seed, **known, "statistic": statistic},
                    **{"target": int(target), "p_value": p_value, "clean": len(clean)},
                    **{"seconds": round(watch.seconds, 3), **environment()},
                }
                append_row(path, row)
                told = "too few classes" if p_value is None else f"p = {p_value:.2g}"
                print(f"{name} seed {seed}: {statistic} class {target}, {told}", flush=True)

    for seed in experiment.seeds:
        clean = clean_subset(workspace, seed)
        seen = {row["model"] for row in rows if row["seed"] == seed}
        clean_model = prepare_model(workspace, None, seed)
        victims = (
            prepare_model(workspace, entry, seed, clean_model.variables)
            for entry in experiment.attacks
            if entry.label not in seen
        )
        for model in (clean_model, *victims):
            if model.label not in seen:
                detect(model.label, seed, model.variables, clean, {"acc": model.scores.acc, "asr": model.scores.asr})
        for name, (pool, to, count) in mistakes.items():
            if name in seen:
                continue
            draw_key, train_key = jax.random.split(streams(seed, f"mislabelled {name}")["analysis"])
            wrong = np.asarray(jax.random.permutation(draw_key, pool))[:count]
            training_set = Dataset(task.train.images, task.train.labels.at[wrong].set(to))
            variables = train(
                train_key, classifier, training_set, experiment.training(None), flip=task.flip, name=name
            ).variables
            known = {"acc": evaluate(classifier, variables, task.test).acc, "of_class": int((labels == to).sum())}
            detect(name, seed, variables, np.setdiff1d(clean, wrong), known)


if __name__ == "__main__":
    main()
