"""What all figures share: colors, axes, and how they are written.

Importing this module turns off matplotlib's parsing of formulas and LaTeX, because labels are the user's and a dollar
sign in one does not start a formula.
"""

import base64
import io
import math
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from backdoor_jax.files import atomic_write

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#4d4d4d", "#b5b500", "#7f3fbf")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")

matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})
# A name in other letters than the font's is drawn as boxes; tables have it in full.
warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)


def save_figure(figure: Figure, out: Path | BinaryIO) -> None:
    """Writes a figure, cropped to what is drawn: in the format of the path's suffix, or as a PNG to an open file.

    A file is written completely or not at all.
    """
    if isinstance(out, Path):
        with atomic_write(out) as partial:
            figure.savefig(partial, dpi=110, bbox_inches="tight")
    else:
        figure.savefig(out, format="png", dpi=110, bbox_inches="tight")


def embed_figure(figure: Figure) -> str:
    """The figure as a data URL for ``<img src=...>``."""
    buffer = io.BytesIO()
    save_figure(figure, buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def use_logarithmic_scale(axes: Axes) -> None:
    """Makes the y axis logarithmic, with plain numbers as labels instead of formulas, which are not parsed."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.5)))


def legend_beside(axes: Axes, **options: object) -> None:
    """Puts the legend to the right of the axes."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, **options)


PLACES = np.array(
    [
        (reach * math.cos(angle), reach * math.sin(angle))
        for reach in (9, 15, 22, 30, 40, 52, 66, 82, 100)
        for angle in (math.tau * (turn + 0.5) / 16 for turn in range(16))
    ]
)
"""Where labels may be, in points (1/72 inch) from what they label, from near to far."""


def label_points(axes: Axes, points: list[tuple[float, float]], labels: list[str], colors: list[str]) -> None:
    """Writes a label near each point, where it covers neither another label nor a point, with a line to the point.

    Places are tried from near to far; where none is free, the one that covers least is taken.

    Args:
        axes: where the points are drawn; its limits are fixed by this.
        points: ``(x, y)`` of each, in the axes' data.
        labels: one for each.
        colors: one for each.
    """
    if not points:
        return
    figure: Any = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    unit = figure.dpi / 72
    places, at = PLACES * unit, axes.transData.transform(points)
    taken = np.concatenate([at - 5 * unit, at + 5 * unit], axis=1)
    frame = np.asarray(axes.bbox.extents)[None]
    for (x, y), point, label, color in zip(at, points, labels, colors, strict=True):
        written = axes.text(0, 0, label, fontsize=7)
        size = written.get_window_extent(renderer)
        written.remove()
        middles = np.array([x, y]) + places + np.sign(places) * (size.width / 2, 0)
        half = np.array([size.width + 4 * unit, size.height]) / 2
        boxes = np.concatenate([middles - half, middles + half], axis=1)
        outside: np.ndarray = size.width * size.height - _shared_areas(boxes, frame).sum(1)
        best = int(np.argmin(np.round(outside + _shared_areas(boxes, taken).sum(1))))
        taken = np.concatenate([taken, boxes[best : best + 1]])
        axes.annotate(
            label,
            point,
            xytext=tuple(PLACES[best]),
            textcoords="offset points",
            fontsize=7,
            color=color,
            ha="left" if PLACES[best, 0] > 0 else "right",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "gray", "shrinkA": 0, "shrinkB": 3},
        )


def _shared_areas(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that each of ``(N, 4)`` boxes shares with each of ``(M, 4)``; a box is its left, low, right, high."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=-1)
