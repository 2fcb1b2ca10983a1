"""The transfer scenario: an experiment's victims are fine-tuned for another task, conventionally and by SFT.

    backdoor-jax run configs/gtsrb_small.yaml --out runs/gtsrb_small
    python benchmarks/transfer.py configs/gtsrb_small.yaml --out runs/gtsrb_small --data data/cifar10.npz --train 10000

Writes OUT/transfer.jsonl: for each victim, each clean model and each method, the accuracy on the new task, the class
predicted for most triggered images, and its share with and without the trigger (see `backdoor_jax.scenarios.transfer`).
Re-running resumes. Missing victims are trained first.
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

    from backdoor_jax import FineTune, SuperFineTune, load
    from backdoor_jax.config_files import load_experiment
    from backdoor_jax.experiment import append_row, make_workspace, prepare_model, read_rows, run_experiment
    from backdoor_jax.experiment.rows import environment
    from backdoor_jax.scenarios import evaluate_transfer, transfer
    from backdoor_jax.training import Stopwatch

    experiment = dataclasses.replace(load_experiment(arguments.config), seeds=tuple(arguments.seeds), defenses=())
    run_experiment(experiment, arguments.out)
    workspace = make_workspace(experiment, arguments.out)
    second = load(arguments.data, arguments.train)
    methods: tuple[FineTune | SuperFineTune, ...] = (
        FineTune(steps=arguments.steps, flip=second.flip),
        SuperFineTune.preset(arguments.preset, steps=arguments.steps, flip=second.flip),
    )

    path = arguments.out / "transfer.jsonl"
    rows = read_rows(path)
    for seed in experiment.seeds:
        clean_model = prepare_model(workspace, None, seed)
        for entry in experiment.attacks:
            victim = prepare_model(workspace, entry, seed, clean_model.variables)
            assert victim.trigger is not None
            for source in (victim, clean_model):
                for method in methods:
                    known = {
                        "trigger": victim.label,
                        "pretrained": source.label,
                        "seed": seed,
                        "method": method.name,
                        "to": second.name,
                        "trained_on": len(second.train),
                        "config": dataclasses.asdict(method),
                    }
                    if any(known.items() <= row.items() for row in rows):
                        continue
                    key = jax.random.fold_in(jax.random.key(seed), 7)
                    with Stopwatch() as watch:
                        other, tuned = transfer(
                            key, workspace.classifier, source.variables, second.train, second.num_classes, method
                        )
                        jax.block_until_ready(tuned.variables)
                    found = evaluate_transfer(other, tuned.variables, second.train, second.test, victim.trigger)
                    row = {
                        **known,
                        "from": workspace.task.name,
                        **found._asdict(),
                        "seconds": round(watch.seconds, 3),
                        **environment(),
                    }
                    append_row(path, row)
                    print(
                        f"{victim.label} trigger, {source.label} network, {method.name}: ACC {100 * found.acc:.1f}, "
                        f"class {found.target} {100 * found.asr:.1f} (without {100 * found.unprovoked:.1f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
