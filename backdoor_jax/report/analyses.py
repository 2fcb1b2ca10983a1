"""Figures of what an experiment looked into besides rates; see `backdoor_jax.experiment.analyses`.

Curves and bars are means over seeds, clouds of points those of an attack's first seed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backdoor_jax.report.figures import COLORS, logarithmic
from backdoor_jax.report.table import Row

Found = dict[str, dict[str, list[dict[str, Any]]]]
"""An analysis's findings by attack and defence, a list over seeds."""


def findings(rows: list[Row], name: str) -> Found:
    """What an analysis found, in the order of the rows.

    Example:
        >>> rows = [{"attack": "a", "defense": "d3", "analyses": {"plane": {"x": 1}}}, {"attack": "a", "defense": "ft"}]
        >>> findings(rows, "plane")
        {'a': {'d3': [{'x': 1}]}}
    """
    found: Found = {}
    for row in rows:
        if name in row.get("analyses", {}):
            found.setdefault(row["attack"], {}).setdefault(row["defense"], []).append(row["analyses"][name])
    return found


def models(found: Found) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Attack, defence and findings over seeds of each model, in one list."""
    return [(attack, defense, seeds) for attack, of in found.items() for defense, seeds in of.items()]


def title(attack: str, defense: str) -> str:
    """What a figure calls a model.

    Example:
        >>> title("badnets", "none"), title("badnets", "d3"), title("none", "none"), title("none", "d3")
        ('victim, badnets', 'd3, badnets', 'twin', 'd3, twin')
    """
    if attack == "none":
        return "twin" if defense == "none" else f"{defense}, twin"
    return f"{'victim' if defense == 'none' else defense}, {attack}"


def mean(findings: list[dict[str, Any]], *path: str) -> np.ndarray:
    """The mean over seeds of an entry, which may lie deeper.

    Example:
        >>> mean([{"a": {"b": [1, 2]}}, {"a": {"b": [3, 4]}}], "a", "b").tolist()
        [2.0, 3.0]
    """
    values = []
    for finding in findings:
        value: Any = finding
        for name in path:
            value = value[name]
        values.append(value)
    return np.mean(np.asarray(values, np.float64), axis=0)


def landscape(rows: list[Row]) -> Figure | None:
    """Losses above, rates below, from the victim (0) to the repair (1) and beyond; an attack a pair of rows."""
    found = findings(rows, "landscape")
    if not found:
        return None
    wide = max(map(len, found.values()))
    figure = Figure(figsize=(2.4 * wide + 0.8, 4.2 * len(found)), layout="constrained")
    grid = figure.subplots(2 * len(found), wide, sharey="row", squeeze=False)
    for pair, (attack, of) in zip(grid.reshape(len(found), 2, wide), found.items(), strict=True):
        for (above, below), (defense, seeds) in zip(pair.T, of.items(), strict=False):
            positions = mean(seeds, "positions")
            for axis, (clean, backdoor) in ((above, ("clean_loss", "backdoor_loss")), (below, ("acc", "asr"))):
                scale = 100 if axis is below else 1
                axis.plot(positions, scale * mean(seeds, clean), color=COLORS[0], label=clean.replace("_", " "))
                axis.plot(positions, scale * mean(seeds, backdoor), color=COLORS[1], label=backdoor.replace("_", " "))
                for place in (0, 1):
                    axis.axvline(place, color="grey", linewidth=0.7, linestyle=":")
            logarithmic(above)
            for axis in (above, below):
                axis.tick_params(labelsize=7)
            distance, cosine = (mean(seeds, "head", name) for name in ("distance", "cosine"))
            moved = f"head: distance {distance:.2f}, cosine {cosine:.2f}"
            above.set_title(f"{title(attack, defense)}\n{moved}", fontsize=8)
            below.set_xlabel("t", fontsize=8)
        for axis in pair[:, len(of) :].flat:
            axis.axis("off")
        for axis, unit in zip(pair[:, 0], ("loss", "%"), strict=True):
            axis.set_ylabel(unit)
            axis.legend(fontsize=7, frameon=False)
    return figure


def plane(rows: list[Row]) -> Figure | None:
    """Latents in the plane: a colour a class, neighbours alike, triggered images as black crosses."""
    found = findings(rows, "latents")
    if not found:
        return None
    wide = max(map(len, found.values()))
    figure = Figure(figsize=(2.2 * wide, 2.4 * len(found)))
    grid = figure.subplots(len(found), wide, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for axes, (attack, of) in zip(grid, found.items(), strict=True):
        for axis, (defense, seeds) in zip(axes, of.items(), strict=False):
            points = {name: np.asarray(seeds[0][name]) for name in ("clean", "triggered", "labels")}
            axis.scatter(*points["clean"].T, c=points["labels"], cmap="turbo", s=5, linewidths=0)
            axis.scatter(*points["triggered"].T, c="black", marker="x", s=6, linewidths=0.5)
            axis.set_title(title(attack, defense), fontsize=8)
    figure.tight_layout()
    return figure


def neurons(rows: list[Row]) -> Figure | None:
    """The true change of each latent neuron against TAC's perturbation, and how well scores agree with its size."""
    found = {attack: of["none"] for attack, of in findings(rows, "neurons").items() if "none" in of}
    if not found:
        return None
    figure = Figure(figsize=(9.5, 3.0 * len(found)))
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (attack, seeds) in zip(grid, found.items(), strict=True):
        left.scatter(seeds[0]["mean"], seeds[0]["vector"], s=8, color=COLORS[0])
        cosine, spearman = (mean(seeds, "signed", name) for name in ("cosine", "spearman"))
        left.set_title(f"{attack}: cosine {cosine:.2f}, rank correlation {spearman:.2f}", fontsize=8)
        left.set_xlabel("true change under the trigger", fontsize=8)
        left.set_ylabel("TAC's perturbation", fontsize=8)
        names, measures = list(seeds[0]["agreement"]), ("cosine", "spearman", "precision")
        for number, measure in enumerate(measures):
            heights = [float(mean(seeds, "agreement", name, measure)) for name in names]
            right.bar(np.arange(len(names)) + 0.27 * (number - 1), heights, 0.25, color=COLORS[number], label=measure)
        right.set_xticks(range(len(names)), names)
        right.set_title(
            f"{attack}: agreement with the change's size\nprecision among its {seeds[0]['k']} largest", fontsize=8
        )
        right.axhline(0, color="black", linewidth=0.6)
    grid[0, 1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


def membership(rows: list[Row]) -> Figure | None:
    """AUC of each membership attack on each model, with bootstrap intervals; 0.5 is guessing."""
    found = findings(rows, "membership")
    if not found:
        return None
    judged = models(found)
    figure = Figure(figsize=(7.5, 0.8 + 0.32 * len(judged)))
    axis: Axes = figure.subplots()
    places = np.arange(len(judged))
    signals = list(judged[0][2][0])
    for number, signal in enumerate(signals):
        intervals = np.array([mean(seeds, signal, "auc") for _, _, seeds in judged])
        value, low, high = intervals.T
        axis.errorbar(
            value,
            places + 0.2 * (number - (len(signals) - 1) / 2),
            xerr=np.maximum([value - low, high - value], 0),
            fmt="o",
            markersize=4,
            color=COLORS[number],
            label=signal,
        )
    axis.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(places, [title(attack, defense) for attack, defense, _ in judged], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("AUC: chance that a training image's signal is above another's")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


def reinjection(rows: list[Row]) -> Figure | None:
    """ASR against steps of training on newly poisoned images, a panel for each attack and poisoned share."""
    found = findings(rows, "reinjection")
    curves: dict[tuple[str, float], dict[str, list[list[dict[str, Any]]]]] = {}
    for attack, defense, seeds in models(found):
        for seed in seeds:
            for start, rate in dict.fromkeys((row["start"], row["rate"]) for row in seed["rows"]):
                points = [row for row in seed["rows"] if (row["start"], row["rate"]) == (start, rate)]
                name = defense if start == "repaired" else start
                curves.setdefault((attack, rate), {}).setdefault(name, []).append(points)
    if not curves:
        return None
    wide = len({rate for _, rate in curves})
    figure = Figure(figsize=(3.4 * wide + 1.5, 2.6 * len(found)))
    names = list(dict.fromkeys(name for panel in curves.values() for name in panel))
    grid = figure.subplots(-(-len(curves) // wide), wide, sharey=True, squeeze=False)
    for axis, ((attack, rate), panel) in zip(grid.flat, curves.items(), strict=False):
        for name, lines in panel.items():
            steps = [row["steps"] for row in lines[0]]
            asr = np.mean([[row["asr"] for row in line] for line in lines], axis=0)
            axis.plot(steps, 100 * asr, marker="o", markersize=3, color=COLORS[names.index(name) % len(COLORS)])
        axis.set_title(f"{attack}, {100 * rate:g} % poisoned", fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in grid[:, 0]:
        axis.set_ylabel("ASR %")
    for number, name in enumerate(names):
        grid[0, -1].plot([], [], color=COLORS[number % len(COLORS)], label=name)
    grid[0, -1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


SECTIONS: tuple[tuple[str, str, Callable[[list[Row]], Figure | None]], ...] = (
    (
        "Along the line of a repair",
        "Losses and rates from the victim (0) to the repaired model (1) and as far beyond. A repair in the victim's "
        "own valley keeps both losses low on the way; where a ridge of clean loss lies between, it left that valley.",
        landscape,
    ),
    (
        "Latents in the plane",
        "Test images on the two principal components of each model's latents, a colour a class (neighbours of "
        "many look alike); crosses are the same images triggered. An obeyed trigger draws the crosses together.",
        plane,
    ),
    (
        "Neurons that the trigger moves",
        "Left: what the trigger does to each latent neuron against the perturbation that TAC computes without it. "
        "Right: how well scores find the neurons that change most.",
        neurons,
    ),
    (
        "Membership inference",
        "How well an attacker tells training images from test images, before and after a repair, and from images "
        "of the training set's own source that were left out of it, where there are some. The protocol is ours.",
        membership,
    ),
    (
        "A backdoor injected anew",
        "Training goes on with the defender's images, part of them poisoned: from each repaired model, the unpoisoned "
        "twin and fresh weights. The protocol is ours.",
        reinjection,
    ),
)
"""Title, note and figure of each section that a page shows where there is something to show."""
