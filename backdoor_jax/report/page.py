"""One self-contained HTML page for an experiment's folder."""

from pathlib import Path
from typing import NamedTuple

import jinja2
from matplotlib.figure import Figure

from backdoor_jax.analyses import ANALYSES
from backdoor_jax.drawing import embed_figure
from backdoor_jax.files import write_text
from backdoor_jax.report import figures
from backdoor_jax.report.answers import cards, lead, succeeds
from backdoor_jax.report.table import COLUMNS, Row, cells, summarize


class Section(NamedTuple):
    """A part of a page after its table.

    Attributes:
        title: its heading.
        note: what the figures show.
        figures: at least one.
        folded: whether it is closed until somebody opens it.
    """

    title: str
    note: str
    figures: list[Figure]
    folded: bool = True


def render(rows: list[Row], folder: Path) -> str:
    """The page as HTML: the answer, the cards of the models, the table, figures, and folded details.

    Args:
        rows: of one experiment.
        folder: its folder, which holds the examples of triggers.
    """
    first, lines = rows[0], table_lines(rows)
    loader = jinja2.PackageLoader("backdoor_jax", "report")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html.jinja")
    return template.render(
        name=first["experiment"],
        dataset=first["dataset"],
        model=first["model"],
        device=", ".join(sorted({row["device"] for row in rows})),
        jax=", ".join(sorted({row["versions"]["jax"] for row in rows})),
        lead=lead(rows),
        cards=cards(rows, folder),
        columns=COLUMNS,
        table=lines,
        worse=any("bad" in str(line["style"]) for line in lines),
        sections=[
            (section.title, section.note, list(map(embed_figure, section.figures)), section.folded)
            for section in sections(rows, folder)
        ],
    )


def table_lines(rows: list[Row]) -> list[dict[str, object]]:
    """Cells and style of each line of the table: where an attack starts, and which models still have a backdoor.

    A repair that costs too much is marked too.
    """
    summaries = summarize(rows)
    before = {summary.attack: summary for summary in summaries if summary.defense == "none"}
    lines: list[dict[str, object]] = []
    last = None
    for summary in summaries:
        bad = not succeeds(summary, before.get(summary.attack))
        style = " ".join(name for name, holds in (("first", summary.attack != last), ("bad", bad)) if holds)
        lines.append({"cells": cells(summary), "style": style})
        last = summary.attack
    return lines


def sections(rows: list[Row], folder: Path) -> list[Section]:
    """The sections for which there is something to draw."""
    found: list[Section] = []
    if any(row["asr"] is not None for row in rows):
        note = "One point for each repair, one color and marker for each attack."
        found.append(Section("Accuracy against attack success", note, [figures.scatter(rows)], folded=False))
    examples = figures.triggers(folder / "examples")
    if examples is not None:
        note = "A test image, the same image with the trigger, and their difference."
        found.append(Section("Triggers", note, [examples]))
    scans = [figure for _, figure in figures.perturbations(rows)]
    if scans:
        note = "The smallest latent change that sends clean images to each class; an unusually small one is suspect."
        found.append(Section("Scan for the poisoned class", note, scans))
    for analysis in ANALYSES.values():
        figure = analysis.draw(rows)
        if figure is not None:
            found.append(Section(analysis.title, analysis.note, [figure], folded=False))
    rates = figures.learning_rates(rows)
    if rates is not None:
        note = "The learning rate of each step of the defenses that tune the model."
        found.append(Section("Learning rates", note, [rates]))
    return found


def write_page(rows: list[Row], folder: Path) -> Path:
    """Writes ``report.html`` into an experiment's folder, atomically, and returns its path."""
    path = folder / "report.html"
    write_text(path, render(rows, folder))
    return path
