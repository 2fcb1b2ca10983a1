"""Tables: mean and standard deviation over seeds, and the median of seconds."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from backdoor_jax.analyses.base import Row


class Summary(NamedTuple):
    """One defense on one attack over the seeds.

    Attributes:
        attack: its label.
        defense: its label.
        seeds: how many there are.
        acc: accuracy, as mean and standard deviation; the deviation is None for one seed.
        asr: attack success rate, in the same form; None without an attack.
        ra: robust accuracy, in the same form; None without an attack.
        der: defense effectiveness rating, in the same form; None without an attack.
        seconds: the median.
        changed: ``yes`` or ``no``, or both where seeds differ.
        data: how many images were used, and of which kind.
        target: the class that was repaired.
        near_chance: whether a model that was attacked or repaired is hardly better than guessing, and does not count.
    """

    attack: str
    defense: str
    seeds: int
    acc: tuple[float, float | None] | None
    asr: tuple[float, float | None] | None
    ra: tuple[float, float | None] | None
    der: tuple[float, float | None] | None
    seconds: float
    changed: str
    data: str
    target: str
    near_chance: bool = False


def summarize(rows: list[Row]) -> list[Summary]:
    """One summary for each attack and defense, both in the order of their first rows.

    Example:
        >>> row = {"attack": "badnets", "defense": "d3", "acc": 0.9, "asr": 0.1, "ra": 0.8, "der": 0.9, "seconds": 3.0,
        ...        "n_used": 70, "data_used": "clean", "target": None, "info": {"changed": True}}
        >>> summary = summarize([row, {**row, "acc": 0.8}])[0]
        >>> [round(value, 3) for value in summary.acc], summary.changed, summary.data
        ([0.85, 0.071], 'yes', '70 clean')
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["attack"], row["defense"]), []).append(row)
    attacks = list(dict.fromkeys(attack for attack, _ in groups))

    def of(group: list[Row], name: str) -> tuple[float, float | None] | None:
        values = [row[name] for row in group if row[name] is not None]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    def words(group: list[Row], text: Callable[[Row], str]) -> str:
        seen = [text(row) for row in group]
        return seen[0] if len(set(seen)) == 1 else ", ".join(seen)

    return [
        Summary(
            attack,
            defense,
            seeds=len(group),
            acc=of(group, "acc"),
            asr=of(group, "asr"),
            ra=of(group, "ra"),
            der=of(group, "der"),
            seconds=statistics.median(row["seconds"] for row in group),
            changed=words(group, lambda row: "yes" if row["info"].get("changed") else "no"),
            data=words(group, lambda row: f"{row['n_used']} {row['data_used']}" if row["n_used"] else "-"),
            target=words(group, lambda row: "-" if row["target"] is None else str(row["target"])),
            near_chance=any(row.get("near_chance") for row in group),
        )
        for (attack, defense), group in sorted(groups.items(), key=lambda item: attacks.index(item[0][0]))
    ]


def percent(value: tuple[float, float | None] | None) -> str:
    """A rate in percent with its standard deviation.

    Example:
        >>> percent((0.9123, 0.0051)), percent((0.5, None)), percent(None)
        ('91.2 ± 0.5', '50.0', '-')
    """
    if value is None:
        return "-"
    mean, deviation = value
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


COLUMNS = ("attack", "defense", "seeds", "ACC %", "ASR %", "RA %", "DER %", "seconds", "changed", "data", "class")


def cells(summary: Summary) -> tuple[str, ...]:
    """The text of a summary's cells, in the order of `COLUMNS`."""
    rates = (percent(summary.acc), percent(summary.asr), percent(summary.ra), percent(summary.der))
    attack = f"{summary.attack} (near chance)" if summary.near_chance else summary.attack
    return (
        attack, summary.defense, str(summary.seeds), *rates, f"{summary.seconds:.1f}",
        summary.changed, summary.data, summary.target,
    )  # fmt: skip


def compact(rows: list[Row]) -> str:
    """ACC / ASR in percent as a Markdown table with a row for each attack and a column for each defense.

    Example:
        >>> row = {"attack": "badnets", "defense": "d3", "acc": 0.9, "asr": 0.1, "ra": 0.8, "der": 0.9, "seconds": 3.0,
        ...        "n_used": 70, "data_used": "clean", "target": None, "info": {"changed": True}}
        >>> print(compact([row, {**row, "attack": "none", "asr": None}, {**row, "defense": "tac"}]))
        | attack | d3 | tac |
        | --- | --- | --- |
        | badnets | 90.0 / 10.0 | 90.0 / 10.0 |
        | none | 90.0 | - |
    """
    found = {(summary.attack, summary.defense): summary for summary in summarize(rows)}
    attacks, defenses = (list(dict.fromkeys(row[key] for row in rows)) for key in ("attack", "defense"))

    def cell(attack: str, defense: str) -> str:
        summary = found.get((attack, defense))
        if summary is None:
            return "-"
        return percent(summary.acc) + (f" / {percent(summary.asr)}" if summary.asr else "")

    lines = [(attack, *(cell(attack, defense) for defense in defenses)) for attack in attacks]
    return _markdown(("attack", *defenses), lines)


def markdown(rows: list[Row]) -> str:
    """The summaries as a Markdown table.

    Example:
        >>> markdown([]).splitlines()[0].startswith("| attack |")
        True
    """
    return _markdown(COLUMNS, [cells(summary) for summary in summarize(rows)])


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
