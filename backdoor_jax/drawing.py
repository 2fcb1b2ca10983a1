"""What all figures share: colors, axes, and how they are written.

Importing this module turns off matplotlib's parsing of formulas, because labels are the user's and a dollar sign in one
does not start a formula.
"""

import base64
import io
import warnings
from pathlib import Path
from typing import BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from backdoor_jax.files import atomic_write

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#4d4d4d", "#b5b500", "#7f3fbf")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")

matplotlib.rcParams["text.parse_math"] = False
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
