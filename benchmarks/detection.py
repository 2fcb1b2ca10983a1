"""Detectors on a population of small clean and backdoored models: how often they are right, and their false alarms.

    python benchmarks/detection.py --data data/gtsrb_half.npz data/cifar10.npz data/cifar100_subset.npz \
        --models 120 --out runs/detection

Model number N is drawn from its number alone: even ones are clean, odd ones backdoored; data sets, architectures and
attacks take turns; target, poisoning rate (1 to 10 %), epochs and a long tail of 1:10 (a third of the models) are
random. SIG poisons its own class up to that rate, and all of it where the class is smaller. The defender has 5 or 1 %
of the training images, clean. Half of the models, by number, may choose thresholds, the other half reports. Writes
OUT/population.jsonl, a row for each model, and OUT/summary.json. Re-running resumes; ``--tiny`` tries everything on
digits.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import measuring
import numpy as np

ATTACKS = ("badnets", "blended", "sig", "low_frequency", "wanet", "input_aware", "trojan_nn", "adap_blend")
ARCHITECTURES = (("preact_resnet18", 8), ("resnet18", 8), ("small_cnn", 16))
COMBINED = ("per_sample", "neural_cleanse")
"""The detectors whose p-values are multiplied."""
FALSE_ALARMS = 0.05
BOOTSTRAPS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], help="data sets, as backdoor_jax.load takes them")
    parser.add_argument("--models", type=int, default=120, help="of the population (default: 120)")
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 20), metavar=("FROM", "TO"))
    parser.add_argument("--tiny", action="store_true", help="six models of digits in a minute, to try the script")
    parser.add_argument("--out", type=Path, required=True)
    measuring.command(parser, run)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model of the population is.

    Attributes:
        number: of the model, which determines everything else.
        attack: its name; None for a clean model.
        reporting: whether the model reports, and chooses nothing.
    """

    number: int
    data: str
    architecture: str
    width: int
    attack: str | None
    target: float
    rate: float
    epochs: int
    long_tail: bool
    clean_share: float
    reporting: bool


def plan(number: int, sources: list[str], epochs: tuple[int, int]) -> Plan:
    """Model ``number``; ``target`` is in [0, 1) because the number of classes is not known yet."""
    generator, pair = np.random.default_rng([24, number]), number // 2
    architecture, width = ARCHITECTURES[pair // len(sources) % len(ARCHITECTURES)]
    return Plan(
        number=number,
        data=sources[pair % len(sources)],
        architecture=architecture,
        width=width,
        attack=ATTACKS[pair % len(ATTACKS)] if number % 2 else None,
        target=float(generator.random()),
        rate=float(np.exp(generator.uniform(math.log(0.01), math.log(0.1)))),
        epochs=int(generator.integers(epochs[0], epochs[1] + 1)),
        long_tail=bool(generator.random() < 1 / 3),
        clean_share=float(generator.choice([0.05, 0.01])),
        reporting=bool(pair // (len(sources) * len(ARCHITECTURES)) % 2),
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


def run(arguments: argparse.Namespace) -> None:
    from backdoor_jax import load
    from backdoor_jax.experiment import append_row, read_rows
    from backdoor_jax.files import write_text

    sources = ["digits"] if arguments.tiny else arguments.data
    epochs = (2, 3) if arguments.tiny else tuple(arguments.epochs)
    tasks = {source: load(source) for source in sources}
    path = arguments.out / "population.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = {row["number"] for row in read_rows(path)}
    for number in range(6 if arguments.tiny else arguments.models):
        if number not in done:
            made = plan(number, sources, epochs)
            if arguments.tiny:
                made = dataclasses.replace(made, architecture="small_cnn", width=2)
            row = one_model(made, tasks[made.data], arguments.tiny)
            append_row(path, row)
            shown = ", ".join(f"{name} {found['p_value'] or 1:.2g}" for name, found in row["detectors"].items())
            rates = f"ACC {100 * row['acc']:.1f} ASR {100 * (row['asr'] or 0):.1f}"
            print(f"{number}: {made.attack or 'clean'} {rates}; p {shown}", flush=True)
    summary = summarize(read_rows(path))
    write_text(arguments.out / "summary.json", json.dumps(summary, indent=1))
    for name, found in summary["detectors"].items():
        print(name, json.dumps(found))


def one_model(made: Plan, task: Any, tiny: bool) -> dict[str, Any]:
    """Trains a model of the population and runs every detector on it."""
    import jax

    from backdoor_jax import build_classifier, evaluate, train
    from backdoor_jax.attacks import ATTACKS as REGISTRY
    from backdoor_jax.attacks import AttackContext
    from backdoor_jax.data import clean_indices
    from backdoor_jax.detectors import SUSPICIONS, suspicious
    from backdoor_jax.experiment.rows import environment
    from backdoor_jax.training import Stopwatch, TrainConfig

    keys = jax.random.split(jax.random.fold_in(jax.random.key(24), made.number), 5)
    data, classes = task.train, task.num_classes
    if made.long_tail:
        data = data.take(long_tail(np.random.default_rng(made.number), np.asarray(data.labels), classes))
    classifier = build_classifier(made.architecture, classes, made.width, task.normalization)
    training = TrainConfig(epochs=made.epochs, batch_size=64, learning_rate=0.05, crop=data.images.shape[1] // 8)
    target, asr, share, found = int(made.target * classes), None, 1.0, {}
    with Stopwatch() as watch:
        if made.attack is None:
            variables = train(keys[0], classifier, data, training, flip=task.flip).variables
            acc = evaluate(classifier, variables, task.test).acc
        else:
            share = float(np.mean(np.asarray(data.labels) == target))
            poison = min(made.rate, share) if made.attack == "sig" else made.rate
            attack = REGISTRY[made.attack](target=target, rate=poison)
            clean_model = None
            if attack.needs_clean_model:
                clean_model = train(keys[1], classifier, data, training, flip=task.flip).variables
            context = AttackContext(classifier, data, training, flip=task.flip, clean_model=clean_model)
            victim = attack.train_victim_in(context, keys[2], keys[0])
            variables = victim.variables
            scores = evaluate(classifier, variables, task.test, victim.trigger, attack.label_map(classes))
            acc, asr = scores.acc, scores.asr
            poisoned = victim.poisoned.data
            here = np.intersect1d(victim.poisoned.indices, np.flatnonzero(np.asarray(poisoned.labels) == target))
            for method in SUSPICIONS:
                order = suspicious(classifier, variables, poisoned, target=target, method=method)
                found[method] = float(np.isin(order[: len(here)], here).mean()) if len(here) else None
    clean = data.take(clean_indices(keys[3], data.labels, made.clean_share, classes))
    return {
        **dataclasses.asdict(made),
        "target": target,
        "classes": classes,
        "acc": acc,
        "asr": asr,
        "clean_images": len(clean),
        "training_seconds": round(watch.seconds, 1),
        "fills_class": made.attack == "sig" and made.rate >= share,
        "precision": found,
        "detectors": examined(keys[4], classifier, variables, clean, tiny),
        **environment(),
    }


def examined(key: Any, classifier: Any, variables: Any, clean: Any, tiny: bool) -> dict[str, Any]:
    """What each detector says of a model; an error of a detector that finds values that are not finite is a row too."""
    from backdoor_jax.detectors import DETECTORS
    from backdoor_jax.errors import NonFiniteError
    from backdoor_jax.training import Stopwatch

    quick = {"mm_bd": {"starts": 2, "steps": 5}, "neural_cleanse": {"rounds": 2}, "loss_ascent": {"steps": 5}}
    rows: dict[str, Any] = {}
    for name, make in DETECTORS.items():
        with Stopwatch() as watch:
            try:
                evidence = make(**quick.get(name, {}) if tiny else {}).examine(key, classifier, variables, clean)
            except NonFiniteError as error:
                rows[name] = {"target": None, "p_value": None, "trouble": str(error), "values": [], "seconds": 0.0}
                continue
        rows[name] = {
            "target": evidence.target,
            "p_value": evidence.p_value,
            "trouble": evidence.trouble,
            "values": [float(f"{value:.5g}") if math.isfinite(value) else None for value in evidence.values],
            "seconds": round(watch.seconds, 2),
        }
    return rows


def suspicion(row: dict[str, Any], detector: str) -> float:
    """How backdoored a detector finds a model, the larger the more."""
    if detector == "combined":
        return sum(suspicion(row, name) for name in COMBINED)
    found = row["detectors"][detector]
    if detector == "loss_ascent":
        return max(found["values"], default=0.0)
    return -math.log10(max(1.0 if found["p_value"] is None else found["p_value"], 1e-300))


def area(poisoned: np.ndarray, clean: np.ndarray) -> float:
    """Area under the ROC curve: the share of pairs in the right order, ties counting half.

    >>> area(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    return float(np.mean((poisoned[:, None] > clean) + 0.5 * (poisoned[:, None] == clean)))


def interval(poisoned: np.ndarray, clean: np.ndarray) -> list[float]:
    """The bootstrap's 95 % interval of the area."""
    generator = np.random.default_rng(0)
    drawn = [
        area(generator.choice(poisoned, len(poisoned)), generator.choice(clean, len(clean))) for _ in range(BOOTSTRAPS)
    ]
    return np.quantile(drawn, [0.025, 0.975]).round(4).tolist()


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Areas, and rates at thresholds that the choosing half sets, for each detector on the reporting half.

    The threshold is the smallest that flags at most 5 % of the choosing half's clean models. ``level`` is the share of
    *all* clean models with p at most .05, which says whether a detector's own test keeps its level. Victims whose class
    is all poison are counted apart, as ``fills_class``.
    """
    if not rows:
        return {"models": 0, "detectors": {}}
    summary = {}
    for name in (*rows[0]["detectors"], "combined"):
        score = {row["number"]: suspicion(row, name) for row in rows}

        def of(poisoned: bool, reporting: bool | None, score: dict[int, float] = score, **same: Any) -> np.ndarray:
            kept = [
                score[row["number"]]
                for row in rows
                if (row["attack"] is not None) == poisoned
                and reporting in (None, row["reporting"])
                and not row["fills_class"]
                and all(row[key] == value for key, value in same.items())
            ]
            return np.array(kept)

        choosing, clean, poisoned = of(False, False), of(False, True), of(True, True)
        found: dict[str, Any] = {"level": rate(of(False, None), -math.log10(FALSE_ALARMS))}
        if len(choosing) and len(clean) and len(poisoned):
            threshold = float(np.quantile(choosing, 1 - FALSE_ALARMS, method="higher"))
            found |= {
                "threshold": threshold,
                "area": round(area(poisoned, clean), 4),
                "area_interval": interval(poisoned, clean),
                "true_positives": rate(poisoned, threshold, strict=True),
                "false_positives": rate(clean, threshold, strict=True),
                "fills_class": rate(
                    np.array([score[row["number"]] for row in rows if row["fills_class"]]), threshold, strict=True
                ),
                "by_attack": {
                    attack: rate(part, threshold, strict=True)
                    for attack in ATTACKS
                    if len(part := of(True, True, attack=attack))
                },
                "by_data": {
                    data: round(area(part, other), 4)
                    for data in dict.fromkeys(row["data"] for row in rows)
                    if len(part := of(True, True, data=data)) and len(other := of(False, True, data=data))
                },
            }
        summary[name] = found
    return {"models": len(rows), "detectors": summary}


def rate(scores: np.ndarray, threshold: float, strict: bool = False) -> float | None:
    """Share of the scores at or above a threshold; above it where ``strict``."""
    if not len(scores):
        return None
    return round(float(np.mean(scores > threshold if strict else scores >= threshold)), 4)


if __name__ == "__main__":
    main()
