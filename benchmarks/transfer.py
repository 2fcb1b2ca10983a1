"""The transfer-based scenario: an experiment's victims are fine-tuned for another task, conventionally and super-.

    backdoor-jax run configs/gtsrb_small.yaml --out runs/gtsrb_small
    python benchmarks/transfer.py configs/gtsrb_small.yaml --out runs/gtsrb_small --data data/cifar10.npz --train 10000

Writes OUT/transfer.jsonl: for each victim, each unpoisoned twin and each method ACC on the new task, the class that
triggered images go to, and how many do with and without the trigger (see `backdoor_jax.scenarios.transfer`). Run again,
it goes on where it was. Victims that are not there yet are trained first.
"""

import argparse
import dataclasses
from pathlib import Path

import measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the experiment whose victims are the pre-trained networks")
    parser.add_argument("--out", type=Path, required=True, help="its folder")
    parser.add_argument("--data", required=True, help="the new task: digits, a plain .npz or tfds:NAME")
    parser.add_argument("--train", type=int, help="training images of the new task (default: all)")
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps of either method (default: 1000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--preset", default="toolbox_gtsrb", help="of super-fine-tuning (default: toolbox_gtsrb)")
    measuring.command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    import jax

    from backdoor_jax import load_task
    from backdoor_jax.config_files import load_experiment
    from backdoor_jax.defenses import FineTuneConfig, SuperFineTuneConfig
    from backdoor_jax.experiment import read_rows, run_experiment, write_rows
    from backdoor_jax.experiment.rows import where
    from backdoor_jax.experiment.victims import prepare_task, prepare_victim
    from backdoor_jax.scenarios import following, transfer
    from backdoor_jax.training import Stopwatch

    experiment = dataclasses.replace(load_experiment(arguments.config), seeds=tuple(arguments.seeds), defenses=())
    run_experiment(experiment, arguments.out)
    first, classifier = prepare_task(experiment)
    second = load_task(arguments.data, arguments.train)
    methods: dict[str, FineTuneConfig | SuperFineTuneConfig] = {
        "finetune": FineTuneConfig(steps=arguments.steps, flip=second.flip),
        "super_finetune": SuperFineTuneConfig.preset(arguments.preset, steps=arguments.steps, flip=second.flip),
    }

    path = arguments.out / "transfer.jsonl"
    rows = read_rows(path)
    for seed in experiment.seeds:
        twin = prepare_victim(experiment, first, classifier, None, seed, arguments.out)
        for entry in experiment.attacks:
            victim = prepare_victim(experiment, first, classifier, entry, seed, arguments.out, twin.variables)
            assert victim.trigger is not None
            for source in (victim, twin):
                for method, config in methods.items():
                    known = {
                        "trigger": victim.label,
                        "pretrained": source.label,
                        "seed": seed,
                        "method": method,
                        "to": second.name,
                        "trained_on": len(second.train),
                        "config": dataclasses.asdict(config),
                    }
                    if any(known.items() <= row.items() for row in rows):
                        continue
                    key = jax.random.fold_in(jax.random.key(seed), 7)
                    with Stopwatch() as watch:
                        other, tuned = transfer(
                            key, classifier, source.variables, second.train, second.num_classes, config
                        )
                        jax.block_until_ready(tuned.variables)
                    found = following(other, tuned.variables, second.train, second.test, victim.trigger)
                    row = {
                        **known,
                        "from": first.name,
                        **found._asdict(),
                        "seconds": round(watch.seconds, 3),
                        **where(),
                    }
                    rows.append(row)
                    write_rows(path, rows)
                    print(
                        f"{victim.label} trigger on a {source.label} network, {method}: ACC {100 * found.acc:.1f}, "
                        f"class {found.target} {100 * found.asr:.1f} (without {100 * found.unprovoked:.1f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
