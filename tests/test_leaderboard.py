"""The leaderboard: the committed pages are those of the committed rows, and a cell that is run again has its rates."""

import json
import re
from pathlib import Path
from typing import Any

import leaderboard
import pytest
import yaml
from processes import output_as_user

from backdoor_jax.experiment import read_rows

ROOT = Path(__file__).parents[1]
CELL = "leaderboard_digits"
TOLERANCE = 0.05
"""Rates of 397 images after a short training, on another processor or version of JAX."""


def row(**changes: Any) -> leaderboard.Measured:
    values = {
        "experiment": "x", "dataset": "digits", "model": "small_cnn-2", "attack": "badnets", "seed": 0, "defense": "d3",
        "clean_ratio": 0.1, "data_used": "clean", "acc": 0.9, "asr": 0.02, "ra": 0.8, "der": 0.9,
        "acc_before": 0.95, "asr_before": 0.98, "ra_before": 0.0, "seconds": 2.0,
        "config": {"defense": {"steps": 2}}, "device": "cpu", "versions": {"backdoor_jax": "1"}, "commit": "abc",
    }  # fmt: skip
    return leaderboard.Measured(values | changes, "benchmarks/results/x/results.jsonl", 1)


def test_the_committed_pages_are_those_of_the_committed_rows() -> None:
    boards = leaderboard.make_boards(leaderboard.collect(leaderboard.measuring.RESULTS))
    for name, text in (
        ("leaderboard.md", leaderboard.markdown(boards)),
        ("leaderboard_sortable.html", leaderboard.html(boards)),
    ):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run python benchmarks/leaderboard.py"


def test_every_figure_leads_to_rows_and_every_row_to_its_line() -> None:
    for name, pattern in (
        ("leaderboard.md", r"\]\((\.\./[^)]+)#L(\d+)\)"),
        ("leaderboard_sortable.html", r'"(\.\./[^"]+)#L(\d+)"'),
    ):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        links = re.findall(pattern, text)
        for path, line in links:
            found = json.loads((ROOT / "docs" / path).read_text(encoding="utf-8").splitlines()[int(line) - 1])
            assert found["defense"] != "none"
        assert len(links) > 200
    markdown = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    anchors = {leaderboard.slug(heading) for heading in re.findall(r"^### (.*)$", markdown, re.MULTILINE)}
    targets = dict(re.findall(r"^\[(\d+)\]: #(.*)$", markdown, re.MULTILINE))
    assert set(targets.values()) == anchors
    assert set(re.findall(r"\]\[(\d+)\]", markdown)) == targets.keys()


def test_lines_are_means_over_victims_that_have_a_backdoor_and_copies_count_once() -> None:
    rows = [
        row(),
        row(),  # A copy.
        row(seed=1, acc=0.80, asr=0.30, der=0.7, seconds=4.0),  # Fails twice over, and counts once.
        row(seed=2, asr_before=0.2, der=0.1),  # No backdoor.
        row(seed=3, near_chance=True, der=0.1),
        row(attack="none", asr=None, ra=None, der=None, asr_before=None, ra_before=None, acc=0.84),
        row(defense="clp", data_used="nothing", der=0.5),
        row(defense="none", der=0.5),
    ]
    (board,) = leaderboard.make_boards(rows)
    best, other = board.lines
    assert (board.title, board.victims, best.title, other.title) == (
        "digits, small_cnn-2",
        1,
        "d3, 10 % clean",
        "clp, no data",
    )
    assert (best.models, best.failures, best.worst) == (3, 2, 0.30)
    figures = (best.der, best.shared, best.asr, best.cost, best.clean_cost, best.seconds)
    assert figures == pytest.approx((0.8, 0.9, 0.16, 0.075, 0.11, 2.0))
    assert other.shared == 0.5 and other.clean_cost is None
    assert leaderboard.COLUMNS["clean-model cost"](other) == "-"


def test_methods_of_one_name_and_other_settings_have_lines_of_their_own() -> None:
    (board,) = leaderboard.make_boards([row(), row(der=0.8, config={"defense": {"steps": 3, "target": 1}})])
    assert [line.title for line in board.lines] == ["d3, 10 % clean", "d3, 10 % clean (2)"]
    assert len({line.anchor for line in board.lines}) == 2


@pytest.mark.slow
def test_a_committed_cell_has_the_same_rates_when_it_is_run_again(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "configs" / f"{CELL}.yaml").read_text(encoding="utf-8"))
    # What fine-tuning leaves depends on rounding; TAC leaves nothing.
    tac = next(defense for defense in settings["defenses"] if defense["name"] == "tac")
    config = tmp_path / "cell.yaml"
    config.write_text(yaml.safe_dump({**settings, "attacks": settings["attacks"][:1], "defenses": [tac]}))
    output_as_user("-m", "backdoor_jax.cli", "run", config.name, "--out", "cell", folder=tmp_path)
    rows = read_rows(tmp_path / "cell" / "results.jsonl")
    committed = [measured.row for measured in leaderboard.collect(leaderboard.measuring.RESULTS)]
    same = ("experiment", "attack", "defense")
    compared = [(new, old) for new in rows for old in committed if all(new[name] == old[name] for name in same)]
    assert len(compared) == 4
    for new, old in compared:  # A victim, its repair, the clean model and its repair.
        for rate in ("acc", "asr", "ra"):
            assert new[rate] == (None if old[rate] is None else pytest.approx(old[rate], abs=TOLERANCE)), (old, rate)
