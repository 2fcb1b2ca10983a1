"""Tables and figure of the page on detection, and the reference of the calibrated p-values, from rows.

    python benchmarks/detection_page.py

Reads the files of benchmarks/results/detection, which `benchmarks/detection.py` wrote. Writes the tables into
docs/detecting.md, between its marks, the figure docs/figures/detection-roc.png, and
backdoor_jax/detectors/clean_models.json, the scores of the choosing half's clean models. Everything in tables and
figure is of the reporting half, except for the table of the population.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from detection import SETTINGS
from pages import ROOT, fill, table

FOLDER = measuring.RESULTS / "detection"
PAGE = ROOT / "docs" / "detecting.md"
FIGURE = ROOT / "docs" / "figures" / "detection-roc.png"
REFERENCE = ROOT / "backdoor_jax" / "detectors" / "clean_models.json"
TESTS = ("neural_cleanse", "per_sample", "worst_case", "mm_bd")
"""The detectors with a test. Those that had their defaults are calibrated."""
WORKS = 0.5
"""The attack success rate from which a poisoned model is backdoored."""
ALPHA = 0.05
BOOTSTRAPS = 2000

Row = dict[str, Any]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = population_rows()
    REFERENCE.write_text(reference(rows))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), tables(rows)), encoding="utf-8")
    draw(rows, FIGURE)
    for name, content in tables(rows).items():
        print(f"{name}\n\n{content}\n")


def population_rows() -> list[Row]:
    """The rows of all files."""
    from backdoor_jax.experiment import read_rows

    return [row for path in sorted(FOLDER.glob("*.jsonl")) for row in read_rows(path)]


def is_backdoored(row: Row) -> bool:
    """Whether the attack works; victims whose class is all poison are apart."""
    return row["attack"] is not None and row["asr"] >= WORKS and not row["fills_class"]


def tells(row: Row, detector: str) -> bool:
    """Whether a detector's evidence supports a verdict: Neural Cleanse's needs clean images enough."""
    from backdoor_jax.detectors.neural_cleanse import FEWEST_IMAGES

    return detector != "neural_cleanse" or row["clean_images"] >= FEWEST_IMAGES


def own(row: Row, detector: str) -> float:
    """A detector's own p-value of a model; 1 where it has none."""
    found = row["detectors"][detector]["p_value"]
    return 1.0 if found is None or not tells(row, detector) else float(found)


def score(row: Row, detector: str) -> float:
    """What verdicts compare with clean models: the ratio of Neural Cleanse, the own p-value of the others."""
    from backdoor_jax.detectors.neural_cleanse import smallest_mask

    if detector != "neural_cleanse":
        return own(row, detector)
    values = row["detectors"][detector]["values"]
    return smallest_mask(np.array(values)).ratio if values and tells(row, detector) else 1.0


def clean_scores(rows: list[Row], detector: str) -> tuple[float, ...]:
    """Those of the choosing half's clean models of which the detector can tell, ascending."""
    chosen = [row for row in rows if row["attack"] is None and not row["reporting"] and tells(row, detector)]
    return tuple(sorted(float(f"{score(row, detector):.4g}") for row in chosen))


def reference(rows: list[Row]) -> str:
    """The file of the reference."""
    models = [f"{Path(r['data']).stem} {r['number']}" for r in rows if r["attack"] is None and not r["reporting"]]
    content = {
        "made_by": "benchmarks/detection_page.py from benchmarks/results/detection",
        "clean_models": models,
        "scores": {name: clean_scores(rows, name) for name in TESTS if name not in SETTINGS},
    }
    return json.dumps(content, indent=1) + "\n"


def p_values(rows: list[Row], detector: str) -> np.ndarray:
    """The p-values of models as verdicts have them: calibrated where there are clean models enough; 1 without one."""
    from backdoor_jax.detectors.calibration import FEWEST_MODELS, calibrated

    clean = clean_scores(rows, detector)
    if len(clean) < FEWEST_MODELS or detector in SETTINGS:
        return np.array([own(row, detector) for row in rows])
    least_index = 0.0 if detector == "neural_cleanse" else 1.0
    return np.array(
        [calibrated(score(row, detector), clean, least_index) if tells(row, detector) else 1.0 for row in rows]
    )


def suspicions(rows: list[Row], detector: str) -> np.ndarray:
    """How backdoored a detector finds models, the larger the more."""
    if detector == "loss_ascent":
        return np.array([max(row["detectors"][detector]["values"], default=0.0) for row in rows])
    return -np.array([score(row, detector) for row in rows])


def area(poisoned: np.ndarray, clean: np.ndarray) -> float:
    """Area under the ROC curve: the share of pairs in the right order, ties counting half.

    >>> area(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    return float(np.mean((poisoned[:, None] > clean) + 0.5 * (poisoned[:, None] == clean)))


def mean(sample: np.ndarray) -> float:
    """The mean of a sample."""
    return float(np.mean(sample))


def interval(statistic: Callable[..., float], *samples: np.ndarray) -> tuple[float, float]:
    """The bootstrap's 95 % interval of a statistic of samples.

    >>> interval(mean, np.array([0.5, 0.5]))
    (0.5, 0.5)
    """
    generator = np.random.default_rng(0)
    drawn = [statistic(*(generator.choice(sample, len(sample)) for sample in samples)) for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def share(hits: np.ndarray) -> str:
    """Counts, as ``7 / 8``; a dash where there are none."""
    return f"{int(hits.sum())} / {len(hits)}" if len(hits) else "-"


def tables(rows: list[Row]) -> dict[str, str]:
    """The page's tables by name."""
    from backdoor_jax.detectors import HEALTHY

    backdoored = np.array([is_backdoored(row) for row in rows])
    clean = np.array([row["attack"] is None for row in rows])
    reporting = np.array([row["reporting"] for row in rows])
    poisoned = reporting & backdoored
    healthy = np.array([row["acc"] >= HEALTHY for row in rows])
    flagged = {name: p_values(rows, name) <= ALPHA for name in TESTS}

    def by(key: str, part: np.ndarray) -> list[list[str]]:
        """The share found of each value that a field has."""
        body = []
        for value in sorted({row[key] for row, taken in zip(rows, part, strict=True) if taken}):
            here = part & np.array([row[key] == value for row in rows])
            body.append([Path(value).stem, *(share(flagged[name][here]) for name in TESTS)])
        return body

    failed = reporting & ~clean & ~backdoored & np.array([not row["fills_class"] for row in rows])
    filled = reporting & np.array([row["fills_class"] for row in rows])
    alarms = [["clean: " + line[0], *line[1:]] for line in by("data", reporting & clean)]
    apart = [
        [f"attack failed (ASR below {100 * WORKS:.0f} %)", *(share(flagged[name][failed]) for name in TESTS)],
        ["SIG that fills its class", *(share(flagged[name][filled]) for name in TESTS)],
    ]
    head = [f"`{name}`" for name in TESTS]
    return {
        "population": population(rows),
        "overview": overview(rows, reporting, flagged),
        "healthy": overview(rows, reporting & healthy, flagged),
        "attacks": table(["attack", *head], by("attack", poisoned) + apart),
        "data": table(["data set", *head], by("data", poisoned) + alarms),
        "architectures": table(["architecture", *head], by("architecture", poisoned)),
    }


def overview(rows: list[Row], part: np.ndarray, flagged: dict[str, np.ndarray]) -> str:
    """How often each detector is right about a part of the rows."""
    poisoned = part & np.array([is_backdoored(row) for row in rows])
    clean = part & np.array([row["attack"] is None for row in rows])
    body = []
    for name in rows[0]["detectors"]:
        told = np.array([tells(row, name) for row in rows])
        found = suspicions(rows, name)
        mine, other = found[poisoned & told], found[clean & told]
        low, high = interval(area, mine, other)
        named = np.array([row["detectors"][name]["target"] == row["target"] for row in rows])
        verdicts = ["-"] * 3
        if name in TESTS:
            hits = flagged[name][poisoned & told]
            bounds = interval(mean, hits.astype(float))
            verdicts = [
                f"{share(hits)} ({100 * bounds[0]:.0f} to {100 * bounds[1]:.0f} %)",
                share(flagged[name][clean & told]),
                share(np.array([own(row, name) <= ALPHA for row in rows])[clean & told]),
            ]
        seconds = np.median([row["detectors"][name]["seconds"] for row in rows])
        area_shown = f"{area(mine, other):.2f} ({low:.2f} to {high:.2f})"
        silent = str(int((part & ~told).sum()) or "-")
        body.append([f"`{name}`", area_shown, verdicts[0], share(named[poisoned & told]), *verdicts[1:], silent])
        body[-1].append(f"{seconds:.1f}")
    head = ["detector", "AUC", "found at p <= .05", "target named", "false alarms", "by its own test", "cannot tell"]
    return table([*head, "CPU seconds"], body)


def population(rows: list[Row]) -> str:
    """How many models of which kind there are, and how good they are."""
    body = []
    for data in sorted({row["data"] for row in rows}):
        for architecture in sorted({row["architecture"] for row in rows}):
            here = [row for row in rows if (row["data"], row["architecture"]) == (data, architecture)]
            if not here:
                continue
            clean = [row for row in here if row["attack"] is None]
            victims = [row for row in here if is_backdoored(row)]
            accuracy = [100 * row["acc"] for row in here]
            body.append(
                [
                    Path(data).stem,
                    f"`{architecture}`",
                    str(here[0]["classes"]),
                    str(len(clean)),
                    f"{len(victims)} of {len(here) - len(clean)}",
                    f"{np.median(accuracy):.0f} ({min(accuracy):.0f} to {max(accuracy):.0f})",
                ]
            )
    head = ["data set", "architecture", "classes", "clean", "backdoored of poisoned", "accuracy in %"]
    return table(head, body)


def draw(rows: list[Row], out: Path) -> None:
    """The ROC curves of the reporting half."""
    from matplotlib.figure import Figure

    kept = [row for row in rows if row["reporting"]]
    backdoored = np.array([is_backdoored(row) for row in kept])
    clean = np.array([row["attack"] is None for row in kept])
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in kept[0]["detectors"]:
        told, suspicion = np.array([tells(row, name) for row in kept]), suspicions(kept, name)
        mine, other = suspicion[backdoored & told], suspicion[clean & told]
        edges = np.concatenate([[np.inf], np.unique(suspicion[told])[::-1]])
        found, false = ([np.mean(part >= edge) for edge in edges] for part in (mine, other))
        axes.plot(false, found, label=f"{name}, {area(mine, other):.2f}")
    axes.axvline(ALPHA, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="clean models flagged", ylabel="backdoored models flagged", xlim=(-0.01, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8, title="area under the curve", title_fontsize=8)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
