"""The encoder-based scenario: SimCLR, BadEncoder against it, and what training on top of it does to the backdoor.

    python benchmarks/prepare_data.py --source FOLDER --out data --only cifar10 gtsrb_half
    python benchmarks/encoder.py --pretrain data/cifar10.npz --downstream data/gtsrb_half.npz --out runs/encoder

For each seed an encoder is pre-trained without labels and a copy of it is backdoored. On each of the two a downstream
classifier is built: first its head alone is trained (`classifier`), then the whole model is tuned (`whole`). ACC, ASR
and seconds of each go to OUT/encoder.jsonl; encoders are stored in OUT/encoders. Re-running resumes. The claim under
test is the super-fine-tuning paper's: tuning the whole model removes the backdoor, tuning the head alone does not.
BadEncoder's settings are the released code's except for those given here. It can only reach a target class whose
references the downstream classifier classifies correctly; the rows say how many it does (`references_right`).
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", required=True, help="images to pre-train on: digits, a plain .npz or tfds:NAME")
    parser.add_argument("--pretrain-size", type=int, help="so many of them (default: all)")
    parser.add_argument("--downstream", required=True, help="the downstream task: digits, a plain .npz or tfds:NAME")
    parser.add_argument("--train", type=int, help="so many of its training images (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and encoders")
    parser.add_argument(
        "--model", default="resnet18", help="network whose features are the encoder (default: resnet18)"
    )
    parser.add_argument("--width", type=int, default=64, help="its width (default: 64)")
    parser.add_argument("--epochs", type=int, default=1000, help="of SimCLR (default: 1000, the published)")
    parser.add_argument("--attack-epochs", type=int, default=200, help="of BadEncoder (default: 200, the published)")
    parser.add_argument("--steps", type=int, default=1000, help="of tuning the whole model (default: 1000)")
    parser.add_argument(
        "--target", type=int, default=0, help="downstream class that triggered images should be classified as"
    )
    parser.add_argument("--references", type=int, default=3, help="of the attacker, of that class (default: 3, ours)")
    parser.add_argument("--trigger-size", type=int, default=10, help="pixels of the square (default: 10)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    measuring.command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    """Runs all seeds that are not done."""
    from backdoor_jax import build_classifier, load
    from backdoor_jax.errors import UserError
    from backdoor_jax.experiment import append_row, read_rows

    images = load(arguments.pretrain, arguments.pretrain_size).train
    task = load(arguments.downstream, arguments.train)
    if images.images.shape[1:] != task.train.images.shape[1:]:
        raise UserError(
            f"images to pre-train on have shape {images.images.shape[1:]}, the downstream task's "
            f"{task.train.images.shape[1:]}; give two sets of one size"
        )
    encoder = build_classifier(arguments.model, task.num_classes, arguments.width, task.normalization)
    path = arguments.out / "encoder.jsonl"
    rows = read_rows(path)
    claim(arguments)
    for seed in arguments.seeds:
        if not any(row["seed"] == seed for row in rows):
            for row in one_seed(arguments, encoder, images, task, seed):
                append_row(path, row)


def claim(arguments: argparse.Namespace) -> None:
    """Marks the folder as that of a run with these settings, or refuses one that has others; seeds may be added."""
    from backdoor_jax.errors import UserError
    from backdoor_jax.files import write_text

    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("seeds", "platform", "out")}
    path = arguments.out / "settings.json"
    if not path.is_file():
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1))
    earlier = json.loads(path.read_text())
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"{arguments.out} holds a run with {name} {earlier.get(name)}, here {settings[name]}; give another --out"
        )


def one_seed(arguments: argparse.Namespace, encoder: Any, images: Any, task: Any, seed: int) -> list[dict[str, Any]]:
    """Both encoders of a seed, and the rows of what is built on them."""
    import jax

    from backdoor_jax import BadNets, FineTune, evaluate
    from backdoor_jax.experiment.rows import environment
    from backdoor_jax.metrics import predict
    from backdoor_jax.scenarios import BadEncoderConfig, bad_encoder, probe
    from backdoor_jax.training import SimCLRConfig, Stopwatch, pretrain

    clean_key, trigger_key, backdoor_key, head_key, whole_key = jax.random.split(jax.random.key(seed), 5)
    attack = BadNets(size=arguments.trigger_size, border=1, target=arguments.target)
    trigger, label_map = attack.trigger(trigger_key, images.images.shape[1:]), attack.label_map(task.num_classes)
    references = task.train.images[task.train.labels == arguments.target][: arguments.references]
    simclr = SimCLRConfig(epochs=arguments.epochs)
    config = BadEncoderConfig(epochs=arguments.attack_epochs)
    tuning = FineTune(steps=arguments.steps, flip=task.flip)

    def kept(name: str, make: Callable[[], tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
        return keep(arguments.out / "encoders" / f"{name}-{seed}", encoder, make)

    clean, honest = kept("clean", lambda: pretrain(clean_key, encoder, images, simclr))
    backdoored, attacked = kept(
        "backdoored", lambda: bad_encoder(backdoor_key, encoder, clean, images, trigger, references, config)
    )
    rows = []
    for name, variables, info in (("clean", clean, honest), ("backdoored", backdoored, attacked)):
        with Stopwatch() as alone:
            classifier, probed = probe(head_key, encoder, variables, task.train, task.num_classes)
            jax.block_until_ready(probed)
        with Stopwatch() as together:
            whole = tuning.repair(whole_key, classifier, probed, task.train).variables
            jax.block_until_ready(whole)
        for trained, model, watch in (("classifier", probed, alone), ("whole", whole, together)):
            scores = evaluate(classifier, model, task.test, trigger, label_map)
            seen = (predict(classifier, model, references) == arguments.target).mean()
            rows.append(
                {
                    "seed": seed,
                    "encoder": name,
                    "trained": trained,
                    "pretrained_on": arguments.pretrain,
                    "downstream": task.name,
                    "n_used": len(task.train),
                    **scores._asdict(),
                    "references_right": float(seen),
                    "seconds": round(watch.seconds, 3),
                    **environment(),
                    "encoder_seconds": info["seconds"],
                    "last_epoch": info["last_epoch"],
                    "config": {
                        "model": f"{arguments.model}-{arguments.width}",
                        "pretrain_images": len(images),
                        "simclr": dataclasses.asdict(simclr),
                        "bad_encoder": dataclasses.asdict(config),
                        "target": arguments.target,
                        "trigger_size": arguments.trigger_size,
                        "references": arguments.references,
                        "tuning": dataclasses.asdict(tuning),
                    },
                }
            )
            assert scores.asr is not None
            print(
                f"{name} encoder-{seed}, {trained}: ACC {100 * scores.acc:.1f} ASR {100 * scores.asr:.1f}, "
                f"references seen as the target {100 * seen:.0f}",
                flush=True,
            )
    return rows


def keep(folder: Path, encoder: Any, make: Callable[[], tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """An encoder's variables and what its making told: from the folder, or made and put there."""
    import jax

    from backdoor_jax import load_model, save_model
    from backdoor_jax.files import write_text
    from backdoor_jax.training import Stopwatch

    told = folder / "made.json"
    if not told.is_file():
        with Stopwatch() as watch:
            variables, info = make()
            jax.block_until_ready(variables)
        save_model(folder / "model", encoder, variables)
        write_text(told, json.dumps({**info, "seconds": round(watch.seconds, 1)}))
    return load_model(folder / "model")[1], json.loads(told.read_text())


if __name__ == "__main__":
    main()
