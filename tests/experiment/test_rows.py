"""The file of results: rows that several processes append, and what a killed process leaves in it."""

import json
import multiprocessing
from pathlib import Path

import pytest

from backdoor_jax import UserError, files
from backdoor_jax.experiment import append_row, read_rows

ROWS = 200
PADDING = "x" * 20_000
"""Longer than any buffer, so that unlocked writes would be torn."""


def append_rows(path: Path, process: int, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    for number in range(ROWS):
        append_row(path, {"process": process, "number": number, "padding": PADDING})


def test_rows_that_two_processes_append_at_once_are_all_there_and_complete(tmp_path: Path) -> None:
    path, context = tmp_path / "results.jsonl", multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=append_rows, args=(path, number, start)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = read_rows(path)
    for number in range(2):
        assert [row["number"] for row in rows if row["process"] == number] == list(range(ROWS))
    assert len(rows) == 2 * ROWS and all(row["padding"] == PADDING for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_without_locks_of_the_system_a_lock_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.05)
    path, lock = tmp_path / "results.jsonl", tmp_path / "results.jsonl.lock"
    with files.locked(path):
        assert lock.exists()
        with pytest.raises(UserError, match=r"results\.jsonl\.lock is in the way"):
            append_row(path, {"number": 0})
    append_row(path, {"number": 1})
    assert read_rows(path) == [{"number": 1}] and not lock.exists()


@pytest.mark.parametrize("kept", [1, 6, 12])
def test_a_truncated_last_line_is_ignored_and_replaced_by_the_next_row(tmp_path: Path, kept: int) -> None:
    path, rows = tmp_path / "results.jsonl", [{"number": number} for number in range(3)]
    append_row(path, rows[0])
    with path.open("a") as file:
        file.write(json.dumps(rows[1])[:kept])
    assert read_rows(path) == rows[:1]
    append_row(path, rows[2])
    assert read_rows(path) == [rows[0], rows[2]]
    assert path.read_text().splitlines() == [json.dumps(row) for row in (rows[0], rows[2])]


def test_a_complete_last_row_without_a_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"number": 0}')
    assert read_rows(path) == [{"number": 0}]
    append_row(path, {"number": 1})
    assert read_rows(path) == [{"number": 0}, {"number": 1}]


def test_another_invalid_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"number": 0}\n{"number"\n{"number": 2}\n')
    with pytest.raises(UserError, match=r"results\.jsonl: line 2 is not JSON"):
        read_rows(path)


def test_a_row_of_another_experiment_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"experiment": "a"}\n{"experiment": "b"}\n')
    with pytest.raises(UserError, match=r"results\.jsonl: line 2 is of experiment 'b', not 'a'; remove it"):
        read_rows(path, experiment="a")


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "results.jsonl") == []
