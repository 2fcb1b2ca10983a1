"""Progress: a bar on a terminal, with name, count and note; lines elsewhere, where a command asks for them."""

import contextlib
import io
import itertools

import pytest
import rich.progress
from rich.console import Console

from backdoor_jax.progress import hidden_bars, progress_bar, progress_lines

ERASE_LINE = "\x1b[2K"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a stderr that passes for a terminal."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120)
    monkeypatch.setattr(rich.console, "Console", lambda stderr: console)
    return written


def test_nothing_is_written_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("training", 10) as advance:
        advance(5)
        advance(5, "loss 0.1")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "total", "expected"),
    [
        (5, 10, ["training: 5 of 10 steps, about 25 s left, loss 4"]),
        (
            30,
            10,
            ["training: 2 of 10 steps, about 240 s left, loss 1", "training: 3 of 10 steps, about 210 s left, loss 2"],
        ),
        (5, None, ["training: 5 of ? steps, loss 4"]),
        (1, 10, []),
    ],
)
def test_lines_replace_a_bar_where_there_is_no_terminal(
    seconds: int,
    total: int | None,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("backdoor_jax.progress.EVERY", 20.0)
    clock = itertools.count(0, seconds)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with progress_lines(), progress_bar("training", total, done=1) as advance, progress_bar("inner", 2) as inner:
        for number in range(1, 5):
            inner(1)
            advance(1, f"loss {number}")
    out, error = capfd.readouterr()
    assert not out and error.splitlines()[: len(expected)] == expected
    assert bool(error) == bool(expected)


def test_hidden_progress_writes_no_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("backdoor_jax.progress.EVERY", 0.0)
    with progress_lines(), hidden_bars(), progress_bar("training", 10) as advance:
        advance(5)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_name_count_and_note(terminal: io.StringIO) -> None:
    with progress_bar("training victim [7]", 10) as advance:
        advance(3, "loss 0.1")
        advance(2, "loss [b]0.05")
    written = terminal.getvalue()
    assert "training victim [7]" in written
    assert "5/10" in written
    assert "loss [b]0.05" in written


def test_units_done_before_are_counted(terminal: io.StringIO) -> None:
    with progress_bar("training", 10, done=4) as advance:
        advance(5)
    assert " 9/10" in terminal.getvalue()


def test_bytes_are_shown_as_a_size(terminal: io.StringIO) -> None:
    with progress_bar("data", 3_000_000, unit="bytes") as advance:
        advance(1_500_000)
    assert "1.5/3.0 MB" in terminal.getvalue()


def test_a_bar_inside_another_is_hidden(terminal: io.StringIO) -> None:
    with progress_bar("outer", 2) as outer, progress_bar("inner", 2) as inner:
        outer(1)
        inner(1)
    assert "outer" in terminal.getvalue() and "inner" not in terminal.getvalue()


def test_the_total_may_be_unknown(terminal: io.StringIO) -> None:
    with progress_bar("data", None) as advance:
        advance(5)
    assert "5/?" in terminal.getvalue()


@pytest.mark.parametrize("fails", [False, True])
def test_the_bar_is_removed_at_the_end_and_after_an_error(terminal: io.StringIO, fails: bool) -> None:
    with contextlib.suppress(RuntimeError), progress_bar("training", 10) as advance:
        advance(5)
        if fails:
            raise RuntimeError
    assert terminal.getvalue().endswith(ERASE_LINE)
