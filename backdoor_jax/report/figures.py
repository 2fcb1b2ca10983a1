"""The figures of a report."""

from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from matplotlib.figure import Figure

from backdoor_jax.array_files import read_npz
from backdoor_jax.defenses import DEFENSES, GradientDefense
from backdoor_jax.detectors import Evidence
from backdoor_jax.drawing import COLORS, MARKERS, label_points, legend_beside, use_logarithmic_scale
from backdoor_jax.reading import parsing
from backdoor_jax.report.table import Row, summarize


def scatter(rows: list[Row]) -> Figure:
    """ACC against ASR with bars of one standard deviation: a color and a marker for each attack, each point labeled."""
    summaries = [s for s in summarize(rows) if s.asr is not None]
    attacks = list(dict.fromkeys(s.attack for s in summaries))
    figure = Figure(figsize=(7.5, 4.8))
    axes = figure.subplots()
    points, labels, colors = [], [], []
    for summary in summaries:
        assert summary.acc is not None and summary.asr is not None
        number = attacks.index(summary.attack)
        points.append((100 * summary.acc[0], 100 * summary.asr[0]))
        labels.append("no defense" if summary.defense == "none" else summary.defense)
        colors.append(COLORS[number % len(COLORS)])
        axes.errorbar(
            *points[-1],
            xerr=100 * (summary.acc[1] or 0),
            yerr=100 * (summary.asr[1] or 0),
            marker=MARKERS[number % len(MARKERS)],
            color=colors[-1],
            markersize=7,
            alpha=0.85,
            linewidth=1,
        )
    for number, attack in enumerate(attacks):
        marker, color = MARKERS[number % len(MARKERS)], COLORS[number % len(COLORS)]
        axes.plot([], [], marker, color=color, label=attack)
    axes.set(
        xlabel="ACC %: clean test images classified correctly",
        ylabel="ASR %: triggered images classified as the target",
        ylim=(-6, 106),
    )
    axes.margins(x=0.12)
    axes.set_title("Good repairs are at the lower right")
    axes.grid(alpha=0.3)
    legend_beside(axes)
    label_points(axes, points, labels, colors)
    return figure


def triggers(folder: Path, side_by_side: int = 1) -> Figure | None:
    """Clean image, triggered image and their amplified difference for each attack; None without examples.

    Args:
        folder: holds the examples.
        side_by_side: attacks in each row; columns are filled first.
    """
    examples = sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))
    if not examples:
        return None
    high = -(-len(examples) // side_by_side)
    figure = Figure(figsize=(6.6 * side_by_side, 2.2 * high))
    grid = figure.subplots(high, 3 * side_by_side, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    by_column = np.concatenate(np.split(grid, side_by_side, axis=1))
    for panels, path in zip(by_column, examples, strict=False):
        arrays = read_npz(path, "an example of a trigger")
        with parsing(path, "is no example of a trigger", "remove it to make it again"):
            clean, triggered = first_example(arrays)
        difference = triggered - clean
        gain = 127 / max(np.abs(difference).max(), 1)
        titles = (path.stem, "triggered", f"difference × {gain:.1f}, gray is zero")
        for axes, image, title in zip(panels, (clean, triggered, 127 + gain * difference), titles, strict=True):
            axes.imshow(np.clip(image, 0, 255).astype(np.uint8).squeeze(), cmap="gray", interpolation="nearest")
            axes.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


def first_example(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The first image of a file of examples, clean and triggered, ``(2, H, W, channels)``.

    Raises:
        ValueError: where the arrays are something else.
    """
    both = np.stack([arrays["clean"], arrays["triggered"]]).astype(int)
    if both.ndim == 4:  # Files of earlier versions hold one image.
        both = both[:, None]
    if both.ndim != 5 or not both.shape[1]:
        raise ValueError(f"it has shape {both.shape}")
    return both[:, 0]


def perturbations(rows: list[Row]) -> list[tuple[str, Figure]]:
    """Name and figure of the scan of each model that was scanned, once for each model."""
    figures: dict[str, Figure] = {}
    for row in rows:
        found, name = row["info"].get("scan"), f"{row['attack']}-{row['seed']}"
        if found is not None and name not in figures:
            figures[name] = perturbation_figure(found, f"{row['attack']}, seed {row['seed']}")
    return list(figures.items())


def perturbation_figure(found: dict[str, Any], name: str) -> Figure:
    """The two statistics of every class after a scan.

    Args:
        found: the scan, as `backdoor_jax.defenses.Scan.summary` returns it.
        name: what the title calls the model.
    """
    figure = Figure(figsize=(7.5, 2.4))
    grid = figure.subplots(1, 2)
    for axes, statistic in zip(grid, ("worst_case", "per_sample"), strict=True):
        values = [np.nan if value is None else value for value in found[statistic]]
        test = found["tests"][statistic]
        colors = [COLORS[1] if number == test["smallest"] else COLORS[0] for number in range(len(values))]
        axes.bar(range(len(values)), values, color=colors)
        p_value = "too few classes" if test["p_value"] is None else f"p = {test['p_value']:.2g}"
        used = " (verdict)" if statistic == found["statistic"] else ""
        axes.set_title(f"{statistic.replace('_', ' ')}{used}: {p_value}", fontsize=9)
        axes.set_xlabel("class")
        axes.set_ylabel("norm")
    figure.suptitle(f"{name}: {found['verdict']}", fontsize=10)
    figure.tight_layout()
    return figure


def evidence_figure(evidence: Evidence, name: str, verdict: str) -> Figure:
    """What a detector found for every class, and the trigger of the most suspicious one where it reconstructs some.

    Args:
        evidence: the detector's.
        name: what the title calls the model.
        verdict: in words.
    """
    if "tests" in evidence.details:
        return perturbation_figure({**evidence.details, "verdict": verdict}, name)
    shown = evidence.triggers
    figure = Figure(figsize=(7.5, 2.4))
    axes, *panels = np.atleast_1d(
        figure.subplots(1, 3 if shown else 1, width_ratios=(3, 1, 1) if shown else (1,))  # type: ignore[arg-type]
    )
    numbers = range(len(evidence.values))
    axes.bar(numbers, evidence.values, color=[COLORS[number == evidence.target] for number in numbers])
    axes.set(xlabel="class", ylabel=evidence.quantity)
    if shown:
        mask, pattern = shown.masks[evidence.target], shown.patterns[evidence.target]
        for panel, image, name in zip(panels, (mask, mask[..., None] * pattern), ("mask", "trigger"), strict=True):
            panel.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set_title(f"{name} of class {evidence.target}", fontsize=9)
            panel.axis("off")
    p_value = "" if evidence.p_value is None else f", p = {evidence.p_value:.2g}"
    axes.set_title(f"{evidence.detector}{p_value}", fontsize=9)
    figure.suptitle(f"{name}: {verdict}", fontsize=10)
    figure.tight_layout()
    return figure


def learning_rates(rows: list[Row]) -> Figure | None:
    """The learning rate at each step of the gradient defenses; one curve for all that have the same.

    None where no row is of such a defense.
    """
    defenses: dict[str, GradientDefense] = {}
    for row in rows:
        method = DEFENSES.get(row["method"])
        if method is not None and issubclass(method, GradientDefense):
            # JSON has lists for tuples.
            defenses[row["defense"]] = pydantic.TypeAdapter(method).validate_python(row["config"]["defense"])
    if not defenses:
        return None
    curves: dict[tuple[float, ...], list[str]] = {}
    for label, defense in defenses.items():
        steps = np.arange(defense.steps)
        rates = np.broadcast_to(np.maximum(np.asarray(defense.optimizer.rate(steps)), 1e-6), steps.shape)
        curves.setdefault(tuple(rates.tolist()), []).append(label)
    figure = Figure(figsize=(7.5, 2.8))
    axes = figure.subplots()
    for number, (curve, labels) in enumerate(curves.items()):
        axes.plot(curve, color=COLORS[number % len(COLORS)], linewidth=0.9, label="\n".join(labels))
    axes.set(xlabel="step", ylabel="learning rate")
    use_logarithmic_scale(axes)
    axes.grid(alpha=0.3)
    legend_beside(axes)
    return figure
