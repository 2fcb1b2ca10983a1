"""One self-contained HTML page of an experiment's folder."""

from pathlib import Path

import jinja2

from backdoor_jax.files import write_text
from backdoor_jax.report import figures
from backdoor_jax.report.analyses import SECTIONS
from backdoor_jax.report.table import COLUMNS, Row, cells, summarize

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25em .6em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
thead th { border-bottom: 2px solid #222; } tr.first td { border-top: 1px solid #999; }
tr.bad td { color: #a33; } img { max-width: 100%; } .note { color: #555; font-size: 14px; }
</style></head><body>
<h1>{{ name }}</h1>
<p>{{ dataset }}, {{ model }}, {{ device }}, JAX {{ jax }}.</p>
<p class="note">ACC: clean test images classified rightly. ASR: triggered images not of the target class that go where
the attacker wants. RA: the same images classified rightly. DER: (max(0, drop of ASR) − max(0, drop of ACC) + 1) / 2;
doing nothing earns 50. Mean ± standard deviation over seeds. Attack <b>none</b> is the unpoisoned twin: what a defence
costs where there is nothing to repair. <b>class</b> is the class repaired; a label with <b>known</b> was told the
attacker's class and is an oracle. Seconds are the median over seeds and leave compilation out.</p>
<table><thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table %}<tr class="{{ row.style }}">{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% if worse %}<p class="note">In red: the attack still succeeds on more than half of the images, or ACC fell by more
than ten points.</p>{% endif %}
{% for title, note, images in sections %}<h2>{{ title }}</h2><p class="note">{{ note }}</p>
{% for image in images %}<img alt="{{ title }}" src="{{ image }}">{% endfor %}
{% endfor %}</body></html>
"""


def render(rows: list[Row], folder: Path) -> str:
    """The page's text.

    Args:
        rows: of one experiment.
        folder: its folder, for the example triggers.
    """
    first = rows[0]
    before = {(s.attack): s for s in summarize(rows) if s.defense == "none"}
    table, last = [], None
    for summary in summarize(rows):
        victim = before.get(summary.attack)
        lost = victim is not None and victim.acc and summary.acc and victim.acc[0] - summary.acc[0] > 0.1
        bad = summary.defense != "none" and (lost or (summary.asr is not None and summary.asr[0] > 0.5))
        style = " ".join(name for name, on in (("first", summary.attack != last), ("bad", bad)) if on)
        table.append({"cells": cells(summary), "style": style})
        last = summary.attack

    sections = []
    if any(row["asr"] is not None for row in rows):
        sections.append(
            ("Accuracy against attack success", "A colour a defence, a marker an attack.", [figures.scatter(rows)])
        )
    examples = figures.triggers(folder / "examples")
    if examples is not None:
        sections.append(("Triggers", "A test image, the same image triggered, and what changed.", [examples]))
    scans = [figure for _, figure in figures.perturbations(rows)]
    if scans:
        note = (
            "The smallest latent change that sends clean images to each class; an outlier on the small side is suspect."
        )
        sections.append(("Scan for the poisoned class", note, scans))
    for title, note, draw in SECTIONS:
        figure = draw(rows)
        if figure is not None:
            sections.append((title, note, [figure]))
    rates = figures.learning_rates(rows)
    if rates is not None:
        sections.append(("Learning rates", "What each defence that tunes used.", [rates]))
    return jinja2.Template(TEMPLATE, autoescape=True).render(
        name=first["experiment"],
        dataset=first["dataset"],
        model=first["model"],
        device=", ".join(sorted({row["device"] for row in rows})),
        jax=", ".join(sorted({row["versions"]["jax"] for row in rows})),
        columns=COLUMNS,
        table=table,
        worse=any("bad" in row["style"] for row in table),
        sections=[(title, note, [figures.embed(figure) for figure in images]) for title, note, images in sections],
    )


def write_page(rows: list[Row], folder: Path) -> Path:
    """Writes ``report.html`` into an experiment's folder, whole or not at all."""
    path = folder / "report.html"
    write_text(path, render(rows, folder))
    return path
