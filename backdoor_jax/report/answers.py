"""What a page says first: was a backdoor found, did the repairs remove it, and what do the models answer."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from backdoor_jax.analyses.base import Row
from backdoor_jax.array_files import read_npz
from backdoor_jax.defenses import DEFENSES
from backdoor_jax.reading import parsing
from backdoor_jax.report.table import Summary, percent, summarize

REMOVED, COST = 0.05, 0.03
"""A repair succeeds where ASR is at most 5 % and ACC at most 3 points lower than before; ours."""
WORKING = 0.5
"""The ASR before any repair from which a victim counts; one whose trigger hardly works has nothing to remove; ours."""
NOT_COUNTING = f"near chance, or an ASR below {100 * WORKING:g} % before any repair"
MOST_BARS = 20
"""Classes that a page shows of a scan."""


class Bar(NamedTuple):
    """A class in a scan: name, value, the value's share of the largest in percent, and whether it is suspect."""

    name: str
    value: str
    share: float
    suspect: bool


class Answer(NamedTuple):
    """What a model takes an image for: the class's name, and ``right``, ``target`` or ``wrong``."""

    name: str
    kind: str


class Card(NamedTuple):
    """What a page says of one attack's victims, or of the clean models.

    Attributes:
        title: the attack, or that the model is clean.
        found: what the detector says, a sentence; empty where none was run.
        repaired: what the repairs did, a sentence.
        failed: of each repair that did not succeed, its name, what it left or cost, and the reason where one is known.
        good: whether the detector was right, and some repair succeeded.
        quantity: what the bars are.
        bars: of the first seed's model, the suspect class first.
        more: classes that are not shown.
        pictures: triggered images as data URLs, each with the name of its class.
        answers: of the first seed's victim and of each of its repairs, one answer for each picture.
    """

    title: str
    found: str
    repaired: str
    failed: list[tuple[str, str, str]]
    good: bool
    quantity: str
    bars: list[Bar]
    more: int
    pictures: list[tuple[str, str]]
    answers: list[tuple[str, list[Answer]]]


def cards(rows: list[Row], folder: Path) -> list[Card]:
    """One card for each attack and one for the clean models, in the order of their rows.

    Args:
        rows: of one experiment.
        folder: its folder, which holds the examples of triggers.
    """
    summaries = summarize(counting(rows))
    found = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        found.append(_card(attack, own, [summary for summary in summaries if summary.attack == attack], folder))
    return found


def counting(rows: list[Row]) -> list[Row]:
    """The rows of models that show something: those not near chance, and of victims those whose trigger works."""
    works = {(row["attack"], row["seed"]): row["asr"] is None or row["asr"] >= WORKING for row in _trained(rows)}
    return [row for row in rows if not row.get("near_chance") and works.get((row["attack"], row["seed"]), True)]


def lead(rows: list[Row]) -> list[str]:
    """The answer of the page in at most four sentences; models that do not count are only counted."""
    made, rows = len(_trained(rows)), counting(rows)
    left_out = made - len(_trained(rows))
    victims, clean = ([row for row in _trained(rows) if (row["attack"] != "none") == poisoned] for poisoned in (1, 0))
    sentences = []
    scanned = [row for row in victims if _verdict(row)]
    if scanned:
        named = sum(_is_right(row) for row in scanned)
        sentences.append(f"The detector names the attacker's class in {named} of {len(scanned)} backdoored models.")
    scanned = [row for row in clean if _verdict(row)]
    if scanned:
        alarms = sum(not _is_right(row) for row in scanned)
        sentences.append(f"It flags {alarms} of {len(scanned)} clean models.")
    repairs = [summary for summary in summarize(rows) if summary.defense != "none" and summary.attack != "none"]
    if repairs:
        before = {summary.attack: summary for summary in summarize(rows) if summary.defense == "none"}
        failing = {summary.defense for summary in repairs if not succeeds(summary, before.get(summary.attack))}
        all_of_them = [name for name in dict.fromkeys(summary.defense for summary in repairs) if name not in failing]
        removed = f"{_list(all_of_them)} removed" if all_of_them else "No repair removed"
        sentences.append(f"{removed} every backdoor: ASR at most 5 %, ACC at most 3 points lower.")
    if left_out:
        sentences.append(f"{left_out} of {made} models do not count: {NOT_COUNTING}.")
    return sentences


def succeeds(repair: Summary, before: Summary | None) -> bool:
    """Whether a repair left no backdoor, and cost little; of a clean model, whether it cost little."""
    lost = before is not None and before.acc and repair.acc and before.acc[0] - repair.acc[0] > COST
    return not lost and (repair.asr is None or repair.asr[0] <= REMOVED)


def _card(attack: str, rows: list[Row], summaries: list[Summary], folder: Path) -> Card:
    trained = _trained(rows)
    verdicts = [row for row in trained if _verdict(row)]
    before = next((summary for summary in summaries if summary.defense == "none"), None)
    repairs = [summary for summary in summaries if summary.defense != "none"]
    good = [repair for repair in repairs if succeeds(repair, before)]
    failed = [
        (
            repair.defense,
            _failure(repair, before),
            _reason(repair, [row for row in rows if row["defense"] == repair.defense]),
        )
        for repair in repairs
        if repair not in good
    ]
    bars, quantity, more = _bars(verdicts[0]) if verdicts else ([], "", 0)
    pictures, answers = _answers(attack, rows, folder)
    repaired = _repaired(before, good) if repairs else ""
    if not counting(rows):
        repaired = f"It does not count: {NOT_COUNTING}."
    return Card(
        title="Clean model" if attack == "none" else f"Backdoored by {attack}",
        found=_found(verdicts),
        repaired=repaired,
        failed=failed,
        good=bool(counting(rows)) and all(map(_is_right, verdicts)) and (bool(good) or not repairs),
        quantity=quantity,
        bars=bars,
        more=more,
        pictures=pictures,
        answers=answers,
    )


def _trained(rows: list[Row]) -> list[Row]:
    """The rows of models before any repair."""
    return [row for row in rows if row["defense"] == "none"]


def _verdict(row: Row) -> dict[str, Any] | None:
    return row.get("analyses", {}).get("verdict")


def _target(row: Row) -> int | None:
    """The attacker's class; None for clean models and for attacks with several."""
    attack = (row["config"] or {}).get("attack") or {}
    return attack.get("target") if attack.get("labels") != "all_to_all" else None


def _is_right(row: Row) -> bool:
    """Whether the detector names the attacker's class, or nothing in a clean model."""
    verdict, target = _verdict(row), _target(row)
    if verdict is None:
        return True
    if row["attack"] == "none":
        return verdict["outcome"] == "no sign of a backdoor"
    return verdict["outcome"] == "backdoored" and target in (None, verdict["target"])


def _found(rows: list[Row]) -> str:
    """What the detector says of the models of all seeds."""
    if not rows:
        return ""
    verdict, right = _verdict(rows[0]), sum(map(_is_right, rows))
    assert verdict is not None
    values = [found["p_value"] for found in map(_verdict, rows) if found]
    p_value = "p = " + ", ".join("none" if value is None else f"{value:.2g}" for value in values)
    if len(rows) > 1:
        what = "nothing is found, which is right," if rows[0]["attack"] == "none" else "the attacker's class is named"
        return f"In {right} of {len(rows)} models {what} ({p_value})."
    suspect = class_name(verdict["suspect"], verdict["class_names"])
    if verdict["outcome"] == "cannot tell":
        return f"Cannot tell: {verdict['why']}."
    if verdict["outcome"] == "backdoored":
        truth = "which is right" if right else "a false alarm" if rows[0]["attack"] == "none" else "which is wrong"
        return f"Found: a backdoor to {suspect}, {truth} ({p_value})."
    if right:
        return f"Nothing found, which is right: {suspect} stands out most, but not enough ({p_value})."
    return f"Missed: {suspect} stands out most, but not enough ({p_value})."


def _repaired(before: Summary | None, good: list[Summary]) -> str:
    """What the repairs that succeeded did."""
    if before is None or before.asr is None:
        kept = [repair.defense for repair in good if repair.changed == "no"]
        cost = [repair.defense for repair in good if repair.changed != "no"]
        parts = [f"{_list(kept)} changed nothing"] * bool(kept)
        parts += [f"{_list(cost)} cost at most 3 points of ACC"] * bool(cost)
        return f"With nothing to repair, {' and '.join(parts)}." if parts else "Every repair cost more than 3 points."
    if not good:
        return f"No repair brings the attack's success from {percent(before.asr)} to 5 % at a cost of at most 3 points."
    left = _list([f"{repair.defense} ({percent(repair.asr)} % left)" for repair in good])
    return f"The attack succeeds on {percent(before.asr)} % of images; removed by {left}."


def _failure(repair: Summary, before: Summary | None) -> str:
    """What is left of an attack, and what the repair cost, where these are too much."""
    parts = []
    if repair.asr is not None and repair.asr[0] > REMOVED:
        parts.append(f"left ASR {percent(repair.asr)} %")
    lost = before.acc[0] - repair.acc[0] if before and before.acc and repair.acc else 0.0
    if lost > COST:
        parts.append(f"cost {100 * lost:.1f} points of ACC")
    return _list(parts)


def _reason(repair: Summary, rows: list[Row]) -> str:
    """Why a repair may have left a backdoor: what its own rows say, or else what is known of the method."""
    if repair.asr is None or repair.asr[0] <= REMOVED:
        return ""
    reasons = []
    for row in rows:
        info = row["info"]
        if info.get("why"):
            reasons.append(f"it changed nothing: {info['why']}")
        elif info.get("untargeted"):  # Midway's, where no class is named.
            reasons.append(f"it unlearned all classes, not the target alone: {info['untargeted']}")
        elif info.get("purified_poisoned") and info.get("purified"):
            kept = f"{info['purified_poisoned']} of the {info['purified']} images"
            reasons.append(f"{kept} that it took for clean were poisoned")
    method = DEFENSES.get(rows[0]["method"])
    known = method.limits if method else ""
    return "; ".join(dict.fromkeys(reasons or ([known] if known else [])))


def _bars(row: Row) -> tuple[list[Bar], str, int]:
    """The classes of a scan, the suspect first and then by value, what is measured, and how many are left out."""
    verdict = _verdict(row)
    assert verdict is not None
    values = [np.nan if value is None else value for value in verdict["values"]]
    order = sorted(range(len(values)), key=lambda c: (c != verdict["suspect"], np.isnan(values[c]), values[c]))
    largest = np.nanmax(values) if np.isfinite(values).any() else 1.0
    bars = [
        Bar(
            class_name(number, verdict["class_names"]),
            "-" if np.isnan(values[number]) else f"{values[number]:.3g}",
            0.0 if np.isnan(values[number]) else round(100 * values[number] / (largest or 1.0), 1),
            number == verdict["suspect"],
        )
        for number in order[:MOST_BARS]
    ]
    return bars, verdict["quantity"], len(values) - len(bars)


def _answers(
    attack: str, rows: list[Row], folder: Path
) -> tuple[list[tuple[str, str]], list[tuple[str, list[Answer]]]]:
    """The triggered pictures of classes other than the target's, and what the models of the first seed answer."""
    path, seed = folder / "examples" / f"{attack}.npz", rows[0]["seed"]
    found = {row["defense"]: row for row in rows if row["seed"] == seed and "answers" in row.get("analyses", {})}
    if not found or not path.is_file():
        return [], []
    arrays = read_npz(path, "an example of a trigger")
    with parsing(path, "is no example of a trigger", "remove it to make it again"):
        images, labels = arrays["triggered"], arrays["labels"].tolist()
        first = next(iter(found.values()))
        names, target = first["analyses"]["answers"]["class_names"], _target(first)
        shown = [at for at, label in enumerate(labels) if label != target]
        pictures = [(picture_url(images[at]), class_name(labels[at], names)) for at in shown]

        def answer(at: int, number: int) -> Answer:
            kind = "right" if number == labels[at] else "target" if number == target else "wrong"
            return Answer(class_name(number, names), kind)

        answers = [
            (defense, [answer(at, row["analyses"]["answers"]["triggered"][at]) for at in shown])
            for defense, row in found.items()
        ]
    return pictures, answers


def picture_url(image: np.ndarray) -> str:
    """A uint8 image ``(H, W, channels)`` as a data URL for ``<img src=...>``."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def class_name(number: int, names: Sequence[str] | None) -> str:
    """What a sentence calls a class.

    Example:
        >>> class_name(1, ("go", "stop")), class_name(1, None)
        ('stop', 'class 1')
    """
    return names[number] if names else f"class {number}"


def _list(words: Sequence[str]) -> str:
    """Words as a sentence has them: ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
