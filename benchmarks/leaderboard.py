"""The leaderboard, from all rows in `benchmarks/results`: `docs/leaderboard.md`, and a sortable page.

    python benchmarks/leaderboard.py

One table for each data set and network, and one line for each defense and its share of clean data. Every figure leads
to the rows it was computed from, and every row to its line in a file. A method enters by its rows: run an experiment,
copy its `results.jsonl` into a folder of `benchmarks/results`, and run this script again.

Rows of victims near chance, and of victims whose backdoor works on less than `WORKING` of the images, count only for
the cost in accuracy; a row that was copied from another experiment counts once.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import jinja2
import measuring
from pages import ROOT, percent, table

from backdoor_jax.experiment import read_rows
from backdoor_jax.files import write_text
from backdoor_jax.report.answers import WORKING

LEFT, COST = 0.1, 0.1
"""A repair fails where it leaves this attack success rate or more, or costs this much accuracy or more."""


class Measured(NamedTuple):
    """A row, and where it is: a path from the repository's root and the number of the line."""

    row: dict[str, Any]
    path: str
    line: int


class Line(NamedTuple):
    """What one defense did to all models of a table.

    Attributes:
        title: the defense and its share of clean data.
        anchor: of its rows in the pages.
        models: how many victims and clean models.
        der: mean defense effectiveness rating.
        shared: the same over the victims that all defenses of the table have met; None where there are none.
        asr: mean attack success rate after the repair.
        worst: the highest.
        cost: mean loss of accuracy on victims.
        clean_cost: mean loss of accuracy on clean models; None where it met none.
        seconds: the median, without compilation.
        failures: how many repairs fail.
        rows: the rows, in the order of the files.
    """

    title: str
    anchor: str
    models: int
    der: float | None
    shared: float | None
    asr: float | None
    worst: float | None
    cost: float | None
    clean_cost: float | None
    seconds: float
    failures: int
    rows: list[Measured]


class Board(NamedTuple):
    """One table: a data set and a network, the best defense first."""

    title: str
    victims: int
    lines: list[Line]


COLUMNS: dict[str, Callable[[Line], str]] = {
    "models": lambda line: str(line.models),
    "DER": lambda line: percent(line.der),
    "DER, shared": lambda line: percent(line.shared),
    "ASR": lambda line: percent(line.asr),
    "worst ASR": lambda line: percent(line.worst),
    "ACC cost": lambda line: percent(line.cost),
    "clean-model cost": lambda line: percent(line.clean_cost),
    "seconds": lambda line: f"{line.seconds:.0f}",
    "failures": lambda line: str(line.failures),
}
ROW_COLUMNS = ("attack", "seed", "ACC %", "ASR %", "RA %", "seconds", "device", "version", "commit", "row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, help="folder of folders of rows")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where the two pages go (default: docs)")
    arguments = parser.parse_args()
    boards = make_boards(collect(arguments.results))
    for name, text in (("leaderboard.md", markdown(boards)), ("leaderboard_sortable.html", html(boards))):
        write_text(arguments.out / name, text)
        print(arguments.out / name)


def collect(results: Path) -> list[Measured]:
    """The rows of all experiments in a folder of folders; other files of rows are left out."""
    found = []
    for path in sorted(results.glob("*/*.jsonl")):
        name = path.resolve().relative_to(ROOT).as_posix() if path.resolve().is_relative_to(ROOT) else path.as_posix()
        rows = enumerate(read_rows(path), 1)
        found += [Measured(row, name, number) for number, row in rows if "experiment" in row]
    return found


def make_boards(rows: Iterable[Measured]) -> list[Board]:
    """A board for each data set and network, the one with most rows first."""
    groups: dict[str, list[Measured]] = {}
    for measured in rows:
        if measured.row["defense"] != "none":
            groups.setdefault(f"{measured.row['dataset']}, {measured.row['model']}", []).append(measured)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [make_board(title, group) for title, group in ordered]


def make_board(title: str, rows: list[Measured]) -> Board:
    """The board of one data set and network."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for measured in rows:
        groups.setdefault((name_of(measured.row), settings(measured.row)), []).append(measured)
    met = [{victim(measured.row) for measured in group if counts(measured.row)} for group in groups.values()]
    shared = set.intersection(*met)
    lines: list[Line] = []
    for (name, _), group in groups.items():
        same = sum(line.title.split(" (")[0] == name for line in lines)
        lines.append(make_line(f"{name} ({same + 1})" if same else name, title, once(group), shared))
    return Board(title, len(shared), sorted(lines, key=lambda line: -(line.shared or line.der or 0.0)))


def make_line(name: str, board: str, rows: list[Measured], shared: set[tuple[str, int]]) -> Line:
    """What one defense did."""
    found = [measured.row for measured in rows]
    attacked = [row for row in found if counts(row)]
    clean = [row for row in found if row["attack"] == "none"]
    return Line(
        title=name,
        anchor=slug(f"{name}: {board}"),
        models=len(attacked) + len(clean),
        der=mean(row["der"] for row in attacked),
        shared=mean(row["der"] for row in attacked if victim(row) in shared),
        asr=mean(row["asr"] for row in attacked),
        worst=max((row["asr"] for row in attacked), default=None),
        cost=mean(row["acc_before"] - row["acc"] for row in found if row["attack"] != "none"),
        clean_cost=mean(row["acc_before"] - row["acc"] for row in clean),
        seconds=median(row["seconds"] for row in found),
        failures=sum(fails(row) for row in [*attacked, *clean]),
        rows=rows,
    )


def name_of(row: dict[str, Any]) -> str:
    """The defense and what it works with.

    >>> name_of({"defense": "d3", "clean_ratio": 0.05, "data_used": "clean"})
    'd3, 5 % clean'
    >>> name_of({"defense": "clp", "clean_ratio": 0.0, "data_used": "nothing"})
    'clp, no data'
    """
    used = row["data_used"]
    if used == "clean":
        return f"{row['defense']}, {100 * row['clean_ratio']:g} % clean"
    return f"{row['defense']}, {'no data' if used == 'nothing' else used.replace('_', ' ')}"


def settings(row: dict[str, Any]) -> str:
    """What tells two defenses of one name apart: all settings but those that follow from the victim and the data."""
    chosen = {name: value for name, value in row["config"]["defense"].items() if name not in ("target", "flip")}
    return json.dumps(chosen, sort_keys=True)


def victim(row: dict[str, Any]) -> tuple[str, int]:
    """What tells two victims of a board apart."""
    return row["attack"], row["seed"]


def counts(row: dict[str, Any]) -> bool:
    """Whether a row's victim has a backdoor that works."""
    return row["attack"] != "none" and not row.get("near_chance") and row["asr_before"] >= WORKING


def fails(row: dict[str, Any]) -> bool:
    """Whether a repair leaves the backdoor or costs too much.

    >>> fails({"asr": 0.02, "acc": 0.93, "acc_before": 0.95}), fails({"asr": None, "acc": 0.8, "acc_before": 0.95})
    (False, True)
    """
    return (row["asr"] is not None and row["asr"] >= LEFT) or row["acc_before"] - row["acc"] >= COST


def once(rows: list[Measured]) -> list[Measured]:
    """The rows without copies that another experiment took over."""
    fields = ("attack", "seed", "acc", "asr", "acc_before", "asr_before")
    return list({tuple(measured.row[name] for name in fields): measured for measured in reversed(rows)}.values())[::-1]


def mean(values: Iterable[float]) -> float | None:
    """The mean; None of nothing.

    >>> mean([0.5, 1.0]), mean([])
    (0.75, None)
    """
    listed = list(values)
    return fmean(listed) if listed else None


def slug(heading: str) -> str:
    """The anchor of a heading in Markdown.

    >>> slug("d3, 5 % clean: gtsrb_half")
    'd3-5--clean-gtsrb_half'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def row_cells(measured: Measured) -> tuple[str, ...]:
    """The text of a row's cells, in the order of `ROW_COLUMNS` without the last."""
    row = measured.row
    rates = (f"{percent(row[f'{name}_before'])} → {percent(row[name])}" for name in ("acc", "asr", "ra"))
    made_by = (row["device"], row["versions"]["backdoor_jax"], row.get("commit") or "-")
    attack = "clean model" if row["attack"] == "none" else row["attack"]
    return attack, str(row["seed"]), *rates, f"{row['seconds']:.0f}", *made_by


def markdown(boards: list[Board]) -> str:
    """The page in Markdown."""
    notes = explanation("[sortable](leaderboard_sortable.html)", "`python benchmarks/leaderboard.py`")
    parts = ["# Leaderboard", *notes]
    all_lines = [(board, line) for board in boards for line in board.lines]
    number = {line.anchor: str(place) for place, (_, line) in enumerate(all_lines, 1)}
    for board in boards:
        lines = [
            [line.title, *(f"[{text(line)}][{number[line.anchor]}]" for text in COLUMNS.values())]
            for line in board.lines
        ]
        parts += [f"## {board.title}", shared_note(board), table(("defense", *COLUMNS), lines)]
    parts.append("## Rows")
    for board, line in all_lines:
        parts.append(f"### {line.title}: {board.title}")
        parts.append(table(ROW_COLUMNS, [[*row_cells(row), link(row)] for row in line.rows]))
    parts.append("\n".join(f"[{place}]: #{anchor}" for anchor, place in number.items()))
    return "\n\n".join(parts) + "\n"


def link(measured: Measured) -> str:
    """A link to a row's line, from the folder of the pages."""
    return f"[{measured.path.split('/')[-2]} {measured.line}](../{measured.path}#L{measured.line})"


def explanation(sortable: str, command: str) -> list[str]:
    """What both pages say first."""
    return [
        f"All committed rows of experiments, by data set and network ({sortable}; made by {command}). Each figure "
        "leads to its rows, each row to its line in a file.",
        "DER (defense effectiveness rating), ASR (attack success rate) and ACC (clean accuracy) in percent, cost in "
        "points of ACC; means over victims, seconds as a median. A victim counts where its backdoor works on "
        f"{100 * WORKING:g} % of the images or more. A failure is a repair that leaves an ASR of {100 * LEFT:g} % "
        f"or more, or costs {100 * COST:g} points or more, on a victim or a clean model.",
        "**Lines compare in the column DER, shared alone**: the others are means over whatever victims a defense has "
        "met. Many have met three models of one seed; times are those of their devices.",
    ]


def shared_note(board: Board) -> str:
    """How many victims the lines of a board have in common.

    >>> shared_note(Board("digits", 1, []))
    'All defenses have met 1 victim in common.'
    """
    return f"All defenses have met {board.victims or 'no'} victim{'s' * (board.victims != 1)} in common."


def html(boards: list[Board]) -> str:
    """The sortable page, in one file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("leaderboard.html.jinja").render(
        boards=boards,
        notes=[text.replace("**", "") for text in explanation("click a heading to sort", "benchmarks/leaderboard.py")],
        shared_note=shared_note,
        columns=COLUMNS,
        row_columns=ROW_COLUMNS,
        row_cells=row_cells,
    )


if __name__ == "__main__":
    main()
