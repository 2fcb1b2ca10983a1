"""Detectors on a population of small clean and backdoored models: how often they are right, and their false alarms.

    python benchmarks/detection.py --data data/gtsrb_half.npz data/cifar10.npz data/cifar100_subset.npz \
        --models 120 --out runs/detection

Model number N is drawn from its number alone: even ones are clean, odd ones backdoored; data sets, architectures,
attacks and the two halves take turns. So that a model takes about a minute on one core, images are cut to their central
24x24 pixels, and a task is a few classes of its data set, drawn for each model (see `SIZES`). Target, poisoning rate (1
to 10 %), the length of the training and a long tail of 1:10 (a third of the models) are random. SIG poisons its own
class up to that rate, and all of it where the class is smaller. The defender has clean images that number 5 or 1 % of
the training images. Half of the models may choose thresholds, the other half reports. Writes OUT/population.jsonl, a
row for each model. Re-running resumes; ``--tiny`` tries everything on digits. `benchmarks/detection_page.py` makes
tables and the figure from the rows.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

import measuring
import numpy as np

ATTACKS = ("badnets", "blended", "sig", "low_frequency", "wanet", "input_aware", "trojan_nn", "adap_blend")
QUICK_ATTACKS: dict[str, dict[str, Any]] = {"input_aware": {"mask_epochs": 3, "channels": 8, "depth": 2}}
"""Smaller networks and fewer passes than the attacks' own defaults."""
SETTINGS: dict[str, dict[str, Any]] = {
    "mm_bd": {"starts": 5, "steps": 60, "rate": 0.05},
    "loss_ascent": {"steps": 100},
}
"""Less work than the detectors' own defaults, so that a model takes seconds."""
ARCHITECTURES = (("preact_resnet18", 8, 0.1), ("resnet18", 8, 0.1), ("small_cnn", 32, 0.05))
"""Name, width and learning rate."""
SIDE = 24
TEST_IMAGES = 2000


class Size(NamedTuple):
    """What a model is trained on: classes, images without and with a long tail, and images seen in a short training.

    A long training sees 1.6 times as many.
    """

    classes: int
    images: int
    long_tail: int
    seen: int


SIZES = {
    "gtsrb_half": Size(12, 4000, 2000, 60_000),
    "cifar10": Size(6, 12000, 6000, 75_000),
    "cifar100_subset": Size(8, 800, 300, 60_000),
    "digits": Size(10, 1000, 500, 20_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], help="data sets, as backdoor_jax.load takes them")
    parser.add_argument("--models", type=int, default=120, help="of the population (default: 120)")
    parser.add_argument("--tiny", action="store_true", help="six models of digits in a minute, to try the script")
    parser.add_argument("--out", type=Path, required=True)
    measuring.command(parser, run)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model of the population is.

    Attributes:
        number: of the model, which determines everything else.
        attack: its name; None for a clean model.
        target: in [0, 1), because the number of classes is the data set's.
        seen: training images seen, each as often as it is drawn.
        clean_share: of the training images, by number, that the defender has.
        reporting: whether the model reports, and chooses nothing.
    """

    number: int
    data: str
    architecture: str
    width: int
    learning_rate: float
    attack: str | None
    target: float
    rate: float
    seen: int
    long_tail: bool
    clean_share: float
    reporting: bool


def plan(number: int, sources: list[str]) -> Plan:
    """Model ``number``."""
    generator, pair = np.random.default_rng([24, number]), number // 2
    data = sources[pair % len(sources)]
    architecture, width, rate = ARCHITECTURES[pair // 3 % 3]
    return Plan(
        number=number,
        data=data,
        architecture=architecture,
        width=width,
        learning_rate=rate,
        attack=ATTACKS[pair % len(ATTACKS)] if number % 2 else None,
        target=float(generator.random()),
        rate=float(generator.uniform(0.01, 0.1)),
        seen=round(generator.choice([1, 1.6]) * SIZES[Path(data).stem].seen),
        long_tail=bool(generator.random() < 1 / 3),
        clean_share=float(generator.choice([0.05, 0.01])),
        reporting=bool((pair + pair // len(ATTACKS)) % 2),
    )


def long_tail(generator: np.random.Generator, labels: np.ndarray, classes: int, ratio: float = 10.0) -> np.ndarray:
    """Indices of images of which the most frequent class keeps all and the rarest a tenth, geometrically between.

    >>> kept = long_tail(np.random.default_rng(0), np.repeat(np.arange(3), 100), 3)
    >>> sorted(np.bincount(np.repeat(np.arange(3), 100)[kept]).tolist())
    [10, 32, 100]
    """
    shares = generator.permutation(ratio ** -(np.arange(classes) / (classes - 1)))
    kept = [
        generator.permutation(np.flatnonzero(labels == k))[: max(2, round(share * np.sum(labels == k)))]
        for k, share in enumerate(shares)
    ]
    return np.sort(np.concatenate(kept))


def center(images: np.ndarray) -> np.ndarray:
    """The central `SIDE` pixels along each side of images ``(N, H, W, channels)``; smaller images as they are.

    >>> center(np.zeros((1, 32, 32, 3), np.uint8)).shape, center(np.zeros((1, 16, 16, 3), np.uint8)).shape
    ((1, 24, 24, 3), (1, 16, 16, 3))
    """
    top, left = (max(0, side - SIDE) // 2 for side in images.shape[1:3])
    return images[:, top : top + SIDE, left : left + SIDE]


def small_task(made: Plan, task: Any) -> tuple[Any, Any, Size]:
    """The training and test set of a model: some classes, renumbered, of some images, made small."""
    from backdoor_jax import make_dataset

    size = SIZES[Path(made.data).stem]
    generator = np.random.default_rng([25, made.number])
    chosen = generator.permutation(task.num_classes)[: size.classes]
    renumbered = np.full(task.num_classes, -1)
    renumbered[chosen] = np.arange(size.classes)

    def part(data: Any, count: int, tail: bool) -> Any:
        labels = renumbered[np.asarray(data.labels)]
        kept = np.flatnonzero(labels >= 0)
        if tail:
            kept = kept[long_tail(generator, labels[kept], size.classes)]
        kept = np.sort(generator.permutation(kept)[:count])
        return make_dataset(center(np.asarray(data.images)[kept]), labels[kept], size.classes)

    count = size.long_tail if made.long_tail else size.images
    return part(task.train, count, made.long_tail), part(task.test, TEST_IMAGES, False), size


def run(arguments: argparse.Namespace) -> None:
    from backdoor_jax import load
    from backdoor_jax.experiment import append_row, read_rows

    sources = ["digits"] if arguments.tiny else arguments.data
    tasks = {source: load(source) for source in sources}
    path = arguments.out / "population.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = {row["number"] for row in read_rows(path)}
    for number in range(6 if arguments.tiny else arguments.models):
        if number not in done:
            made = plan(number, sources)
            if arguments.tiny:
                made = dataclasses.replace(made, architecture="small_cnn", width=2, seen=2000)
            row = one_model(made, tasks[made.data], arguments.out / f"{number}.safetensors")
            append_row(path, row)
            named = {name: found["target"] for name, found in row["detectors"].items()}
            rates = f"ACC {100 * row['acc']:.1f} ASR {100 * (row['asr'] or 0):.1f} target {row['target']}"
            print(f"{number}: {made.attack or 'clean'}, {rates}; {named}", flush=True)


def one_model(made: Plan, task: Any, path: Path) -> dict[str, Any]:
    """Trains a model of the population, saves it and runs every detector on it."""
    import jax

    from backdoor_jax import build_classifier, evaluate, save_model, train
    from backdoor_jax.attacks import ATTACKS as REGISTRY
    from backdoor_jax.attacks import AttackContext
    from backdoor_jax.detectors import SUSPICIONS
    from backdoor_jax.experiment.rows import environment
    from backdoor_jax.training import TrainConfig, latents

    keys = jax.random.split(jax.random.fold_in(jax.random.key(24), made.number), 5)
    data, test, size = small_task(made, task)
    classifier = build_classifier(made.architecture, size.classes, made.width, task.normalization)
    training = TrainConfig(epochs=round(made.seen / len(data)), batch_size=64, learning_rate=made.learning_rate, crop=2)
    target, asr, share, found = int(made.target * size.classes), None, 1.0, {}
    started = time.process_time()
    if made.attack is None:
        variables = train(keys[0], classifier, data, training, flip=task.flip).variables
        acc = evaluate(classifier, variables, test).acc
    else:
        share = float(np.mean(np.asarray(data.labels) == target))
        poison = min(made.rate, share) if made.attack == "sig" else made.rate
        attack = REGISTRY[made.attack](target=target, rate=poison, **QUICK_ATTACKS.get(made.attack, {}))
        clean_model = None
        if attack.needs_clean_model:
            clean_model = train(keys[1], classifier, data, training, flip=task.flip).variables
        context = AttackContext(classifier, data, training, flip=task.flip, clean_model=clean_model)
        victim = attack.train_victim_in(context, keys[2], keys[0])
        variables = victim.variables
        scores = evaluate(classifier, variables, test, victim.trigger, attack.label_map(size.classes))
        acc, asr = scores.acc, scores.asr
        there = np.flatnonzero(np.asarray(victim.poisoned.data.labels) == target)
        poison_there = np.isin(there, victim.poisoned.indices)
        if poison_there.any():
            latent = np.asarray(latents(classifier, variables, victim.poisoned.data.images))[there]
            for method, score in SUSPICIONS.items():
                order = np.argsort(-score(latent), kind="stable")
                found[method] = float(poison_there[order[: poison_there.sum()]].mean())
    seconds = round(time.process_time() - started, 1)
    save_model(path, classifier, variables)
    count = round(made.clean_share * size.images)
    clean = data.take(np.sort(np.asarray(jax.random.permutation(keys[3], len(data)))[:count]))
    return {
        **dataclasses.asdict(made),
        "target": target if made.attack else None,
        "classes": size.classes,
        "images": len(data),
        "acc": acc,
        "asr": asr,
        "clean_images": len(clean),
        "training_seconds": seconds,
        "fills_class": made.attack == "sig" and made.rate >= share,
        "precision": found,
        "detectors": examined(keys[4], classifier, variables, clean),
        **environment(),
    }


def examined(key: Any, classifier: Any, variables: Any, clean: Any) -> dict[str, Any]:
    """What each detector says of a model; an error of a detector that finds values that are not finite is a row too.

    The two statistics of the scan come from one scan, whose seconds count for both. Seconds are the processor's, with
    compilation where a model is the first of its shapes.
    """
    from backdoor_jax import scan
    from backdoor_jax.defenses.tac_scan import Statistic
    from backdoor_jax.detectors import DETECTORS, scan_evidence
    from backdoor_jax.errors import NonFiniteError

    rows: dict[str, Any] = {}
    started = time.process_time()
    scanned = scan(classifier, variables, clean.images)
    scans = {statistic: scan_evidence(scanned, statistic) for statistic in get_args(Statistic)}
    scanning = time.process_time() - started
    for name, make in DETECTORS.items():
        started = time.process_time()
        try:
            evidence = scans.get(name) or make(**SETTINGS.get(name, {})).examine(key, classifier, variables, clean)
        except NonFiniteError as error:
            rows[name] = {"target": None, "p_value": None, "trouble": str(error), "values": [], "seconds": 0.0}
            continue
        seconds = scanning if name in scans else time.process_time() - started
        rows[name] = {
            "target": evidence.target,
            "p_value": evidence.p_value,
            "trouble": evidence.trouble,
            "values": [float(f"{value:.5g}") if math.isfinite(value) else None for value in evidence.values],
            "seconds": round(seconds, 2),
        }
    return rows


if __name__ == "__main__":
    main()
