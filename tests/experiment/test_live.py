"""The live table of an experiment's cells: what it shows on a terminal, and that it is silent elsewhere."""

import io

import pytest
from rich.console import Console

from backdoor_jax.experiment import live
from backdoor_jax.experiment.live import RUNNING, WAITING, LiveTable

CELLS = [("badnets-0", "none"), ("badnets-0", "d3"), ("none-0", "none")]


def test_a_terminal_shows_a_line_for_each_model_and_what_each_cell_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(live, "Console", lambda stderr: Console(file=written, force_terminal=True, width=80))
    with LiveTable(CELLS) as table:
        assert table.shown
        table.run([CELLS[0], CELLS[2]])
        assert [table.texts[cell] for cell in CELLS] == [RUNNING, WAITING, RUNNING]
        table.end(CELLS[0], "94.5 / 96.4")
        table.run([CELLS[1]])
        assert [table.texts[cell] for cell in CELLS] == ["94.5 / 96.4", RUNNING, WAITING]
    shown = written.getvalue()
    assert "badnets-0" in shown and "94.5 / 96.4" in shown and "d3" in shown


def test_nothing_is_written_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with LiveTable(CELLS) as table:
        table.end(CELLS[0], "trained")
    assert not table.shown and capfd.readouterr() == ("", "")
