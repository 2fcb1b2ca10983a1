"""The report's figures, each as a PNG in a data address that a page can hold."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from backdoor_jax.defenses import DEFENSES
from backdoor_jax.defenses.base import StepsConfig
from backdoor_jax.report.table import Row, summarize

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#4d4d4d", "#b5b500", "#7f3fbf")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


# Labels are the user's, and a dollar sign in one is no formula.
matplotlib.rcParams["text.parse_math"] = False


def save(figure: Figure, out: Path | BinaryIO) -> None:
    """Writes a figure, cut to what is drawn: in the form that a path's ending names, else as a PNG."""
    figure.savefig(out, format=None if isinstance(out, Path) else "png", dpi=110, bbox_inches="tight")


def embed(figure: Figure) -> str:
    """A figure as the text of an ``<img src=...>``."""
    buffer = io.BytesIO()
    save(figure, buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def logarithmic(axis: Axes) -> None:
    """A logarithmic y axis whose labels are plain numbers: the usual ones are formulas, which are not parsed here."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.5)))


def scatter(rows: list[Row]) -> Figure:
    """ACC against ASR: a colour a defence (with a black edge the second time round), a marker an attack, bars of one
    deviation.
    """
    summaries = [s for s in summarize(rows) if s.asr is not None]
    defenses = list(dict.fromkeys(s.defense for s in summaries))
    attacks = list(dict.fromkeys(s.attack for s in summaries))
    figure = Figure(figsize=(7.5, 4.8))
    axes = figure.subplots()

    def paint(defense: str) -> dict[str, Any]:
        again, number = divmod(defenses.index(defense), len(COLORS))
        return {"color": COLORS[number], **({"markeredgecolor": "black", "markeredgewidth": 1.5} if again else {})}

    for summary in summaries:
        assert summary.acc is not None and summary.asr is not None
        axes.errorbar(
            100 * summary.acc[0],
            100 * summary.asr[0],
            xerr=100 * (summary.acc[1] or 0),
            yerr=100 * (summary.asr[1] or 0),
            marker=MARKERS[attacks.index(summary.attack) % len(MARKERS)],
            markersize=8,
            alpha=0.85,
            linewidth=1,
            **paint(summary.defense),
        )
    for defense in defenses:
        axes.plot([], [], "o", label=defense, **paint(defense))
    for attack in attacks:
        axes.plot([], [], MARKERS[attacks.index(attack) % len(MARKERS)], color="grey", mfc="none", label=f"on {attack}")
    axes.set(
        xlabel="ACC %: clean test images classified rightly", ylabel="ASR %: triggered images that obey", ylim=(-4, 104)
    )
    axes.set_title("Good repairs are at the lower right")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def triggers(folder: Path, side_by_side: int = 1) -> Figure | None:
    """Clean image, triggered image and their amplified difference for each attack; None where no example was kept.

    Args:
        folder: holds the examples.
        side_by_side: attacks beside each other; they go on downwards first.
    """
    examples = sorted(path for path in folder.glob("*.npz") if not path.stem.endswith(".partial"))
    if not examples:
        return None
    high = -(-len(examples) // side_by_side)
    figure = Figure(figsize=(6.6 * side_by_side, 2.2 * high))
    grid = figure.subplots(high, 3 * side_by_side, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    downwards = np.concatenate(np.split(grid, side_by_side, axis=1))
    for axes, path in zip(downwards, examples, strict=False):
        with np.load(path) as arrays:
            clean, triggered = arrays["clean"].astype(int), arrays["triggered"].astype(int)
        difference = triggered - clean
        gain = 127 / max(np.abs(difference).max(), 1)
        titles = (path.stem, "triggered", f"difference × {gain:.1f}, grey is none")
        for axis, image, title in zip(axes, (clean, triggered, 127 + gain * difference), titles, strict=True):
            axis.imshow(np.clip(image, 0, 255).astype(np.uint8).squeeze(), cmap="gray", interpolation="nearest")
            axis.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


def perturbations(rows: list[Row]) -> list[tuple[str, Figure]]:
    """For each scanned model the two statistics of every class, and the verdict as a title."""
    figures = []
    seen: set[tuple[str, int]] = set()
    for row in rows:
        found: dict[str, Any] | None = row["info"].get("scan")
        model = (row["attack"], row["seed"])
        if found is None or model in seen:
            continue
        seen.add(model)
        figure = perturbation_figure(found, f"{model[0]}, seed {model[1]}")
        figures.append((f"{model[0]}-{model[1]}", figure))
    return figures


def perturbation_figure(found: dict[str, Any], name: str) -> Figure:
    """A scan's two statistics of every class; `found` is what `Scan.summary` gives."""
    figure = Figure(figsize=(7.5, 2.4))
    grid = figure.subplots(1, 2)
    for axis, statistic in zip(grid, ("worst_case", "per_sample"), strict=True):
        values = [np.nan if value is None else value for value in found[statistic]]
        test = found["tests"][statistic]
        colors = ["#d55e00" if number == test["smallest"] else "#0072b2" for number in range(len(values))]
        axis.bar(range(len(values)), values, color=colors)
        p_value = "too few classes" if test["p_value"] is None else f"p = {test['p_value']:.2g}"
        used = " (verdict)" if statistic == found["statistic"] else ""
        axis.set_title(f"{statistic.replace('_', ' ')}{used}: {p_value}", fontsize=9)
        axis.set_xlabel("class")
        axis.set_ylabel("norm")
    figure.suptitle(f"{name}: {found['verdict']}", fontsize=10)
    figure.tight_layout()
    return figure


def learning_rates(rows: list[Row]) -> Figure | None:
    """The learning rate of every defence that has one, step by step; a line for all that have the same."""
    kinds = [defense.config for defense in DEFENSES.values() if issubclass(defense.config, StepsConfig)]
    by_fields = {frozenset(field.name for field in dataclasses.fields(kind)): kind for kind in kinds}
    configs = {}
    for row in rows:
        settings = row["config"].get("defense") or {}
        kind = by_fields.get(frozenset(settings))
        if kind is not None:
            configs[row["defense"]] = kind(**settings)
    if not configs:
        return None
    curves: dict[tuple[float, ...], list[str]] = {}
    for label, config in configs.items():
        steps = np.arange(config.steps)
        rates = np.broadcast_to(np.maximum(np.asarray(config.schedule()(steps)), 1e-6), steps.shape)
        curves.setdefault(tuple(rates.tolist()), []).append(label)
    figure = Figure(figsize=(7.5, 2.8))
    axes = figure.subplots()
    for number, (curve, labels) in enumerate(curves.items()):
        axes.plot(curve, color=COLORS[number % len(COLORS)], linewidth=0.9, label="\n".join(labels))
    axes.set(xlabel="step", ylabel="learning rate")
    logarithmic(axes)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
