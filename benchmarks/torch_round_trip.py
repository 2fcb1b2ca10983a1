"""A victim's way from PyTorch through `scan` and `defend` and back, judged in both frameworks at every stop.

    python benchmarks/torch_round_trip.py --data data/gtsrb_half.npz --out runs/torch_round_trip

Trains a BadNets victim in PyTorch, saves it with `torch.save` as a plain state dict and in the layout of the published
benchmark's `attack_result.pt`, runs the two commands on each file, loads what `defend` wrote into PyTorch, and prints
clean accuracy and attack success rate before and after as either framework measures them. Ends with exit code 1 where
the two differ by more than 0.1 point. Needs PyTorch.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import backdoor_jax as bj
from backdoor_jax.attacks import AttackContext
from backdoor_jax.cli.suspects import parse_normalization
from backdoor_jax.data import clean_indices

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from torch_networks import torch_preact_resnet18

Moment = np.ndarray
TOLERANCE = 0.001
"""Largest difference between the frameworks, of 1."""


class Row(NamedTuple):
    """What one framework measures on the model in one file."""

    file: str
    when: str
    framework: str
    acc: float
    asr: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="digits or a plain .npz (prepare_data.py)")
    parser.add_argument("--out", type=Path, default=Path("runs/torch_round_trip"), help="folder for all that is made")
    parser.add_argument("--width", type=int, default=8, help="of the PreAct-ResNet18")
    parser.add_argument("--epochs", type=int, default=10, help="of the victim")
    parser.add_argument("--steps", type=int, default=1000, help="of D3")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    task = bj.load(arguments.data)
    attack = bj.BadNets()
    classifier = bj.build_classifier("preact_resnet18", task.num_classes, width=arguments.width)
    poisoned, trigger, _ = attack.poison(jax.random.key(0), AttackContext(classifier, task.train))
    clean = task.train.take(clean_indices(jax.random.key(2), task.train.labels, 0.05, task.num_classes))
    np.savez(
        out / "clean.npz",
        train_images=clean.images,
        train_labels=clean.labels,
        test_images=task.test.images,
        test_labels=task.test.labels,
    )
    pixels = np.asarray(task.train.images, np.float32).reshape(-1, 3) / 255
    mean, std = pixels.mean(0).round(4), pixels.std(0).round(4)
    normalize = "/".join(",".join(f"{value:.4f}" for value in moment) for moment in (mean, std))

    network = torch_preact_resnet18(torch, task.num_classes, arguments.width)
    train(network, poisoned.data, mean, std, arguments.epochs)
    state = network.state_dict()
    torch.save(state, out / "victim.pt")
    torch.save(
        {
            "model_name": "preactresnet18",
            "num_classes": task.num_classes,
            "model": state,
            "data_path": "../data/gtsrb",
            "img_size": (32, 32, 3),
            "clean_data": "gtsrb",
            "bd_train": {"original_index_array": np.asarray(poisoned.indices)},
            "bd_test": None,
        },
        out / "attack_result.pt",
    )

    where = np.flatnonzero(np.asarray(task.test.labels) != attack.target)
    triggered = np.asarray(trigger(task.test.images[where]))
    images, labels = np.asarray(task.test.images), np.asarray(task.test.labels)
    rows: list[Row] = []
    for name in ("victim.pt", "attack_result.pt"):
        repaired = out / f"repaired_{name}"
        common = ["--checkpoint", out / name, "--data", out / "clean.npz", "--model", "preact_resnet18"]
        common += ["--normalize", normalize, "--force"]
        command("scan", *common, "--out", out / f"{name}.png")
        command(
            "defend", *common, "--defense", "d3", "--preset", "paper", "--out", repaired, f"steps={arguments.steps}"
        )
        network = torch_preact_resnet18(torch, task.num_classes, arguments.width)
        for when, file in (("before", out / name), ("after", repaired)):
            saved = torch.load(file, weights_only=name == "victim.pt" or when == "after")
            network.load_state_dict(saved.get("model", saved))
            classifier, variables = bj.load_torch(file, "preact_resnet18", **parse_normalization(normalize))
            judged = bj.evaluate(classifier, variables, task.test, trigger, attack.label_map(task.num_classes))
            assert judged.asr is not None
            rows.append(Row(name, when, "jax", judged.acc, judged.asr))
            acc = np.mean(predict(network, images, mean, std) == labels)
            asr = np.mean(predict(network, triggered, mean, std) == attack.target)
            rows.append(Row(name, when, "torch", float(acc), float(asr)))

    table = Table("file", "D3", "framework", "ACC %", "ASR %")
    for row in rows:
        table.add_row(row.file, row.when, row.framework, f"{100 * row.acc:.2f}", f"{100 * row.asr:.2f}")
    Console(soft_wrap=True).print(table)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    worst = max(max(abs(ours.acc - other.acc), abs(ours.asr - other.asr)) for ours, other in pairs)
    print(f"largest difference between the frameworks: {100 * worst:.3f} points")
    result = {
        "rows": [row._asdict() for row in rows],
        "largest_difference": worst,
        "width": arguments.width,
        "epochs": arguments.epochs,
        "steps": arguments.steps,
        "data": task.name,
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "backdoor_jax": bj.__version__},
    }
    (out / "torch_round_trip.json").write_text(json.dumps(result, indent=1) + "\n")
    if worst > TOLERANCE:
        sys.exit(1)


def train(network: Any, data: bj.Dataset, mean: Moment, std: Moment, epochs: int, batch: int = 64) -> None:
    """SGD with cosine decay on uint8 images, without augmentation, in PyTorch alone."""
    torch.manual_seed(0)
    network.train().to(memory_format=torch.channels_last)
    images, labels = prepared(np.asarray(data.images), mean, std), torch.tensor(np.asarray(data.labels)).long()
    steps = len(labels) // batch
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    for epoch in range(epochs):
        started, right = time.perf_counter(), 0
        for chosen in torch.randperm(len(labels))[: steps * batch].view(steps, batch):
            logits = network(images[chosen])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == labels[chosen]).sum())
        seconds = time.perf_counter() - started
        print(f"PyTorch, epoch {epoch + 1}: {100 * right / (steps * batch):.1f} % correct, {seconds:.0f} s", flush=True)


def prepared(images: np.ndarray, mean: Moment, std: Moment) -> Any:
    """Normalized float images in PyTorch's order."""
    x = (images.astype(np.float32) / 255 - mean) / std
    return torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)


def predict(network: Any, images: np.ndarray, mean: Moment, std: Moment) -> np.ndarray:
    """The classes PyTorch sees."""
    network.eval()
    with torch.inference_mode():
        parts = [network(prepared(part, mean, std)).argmax(1) for part in np.array_split(images, 40)]
    return np.asarray(torch.cat(parts))


def command(*words: Any) -> None:
    """Runs ``backdoor-jax`` as a user would."""
    line = [sys.executable, "-m", "backdoor_jax.cli", *map(str, words)]
    print("$ backdoor-jax", *line[3:], flush=True)
    subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
