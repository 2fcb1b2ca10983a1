"""The campaign for a borrowed GPU, at its least size: every phase runs, ends once, and is cut off whole."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_campaign


def campaign(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(gpu_campaign.__file__)), "--tiny", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_every_phase_runs_once_and_leaves_its_results(tmp_path: Path) -> None:
    first = campaign(tmp_path)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert first.returncode == 0, (first.stdout, first.stderr, logs)
    record = json.loads((tmp_path / "campaign.json").read_text())
    expected = list(gpu_campaign.phases(tmp_path, "", ""))
    assert list(record) == [name for name in expected if name in record]
    assert {*expected} - {*record} <= {"versus_torch"}, "left out only where there is no PyTorch"
    assert all(found["status"] == 0 and found["ended"] for found in record.values())
    rows = [json.loads(line) for line in (tmp_path / "cifar10" / "results.jsonl").read_text().splitlines()]
    assert [row["defense"] for row in rows] == 2 * ["none", "finetune", "d3"], "the victim's, then the clean model's"
    assert {path.stem.split("-")[0] for path in tmp_path.glob("*.json")} >= {"campaign", "speed", "scaling"}
    again = campaign(tmp_path)
    assert again.returncode == 0 and "at most" not in again.stdout


def test_a_phase_is_cut_off_with_what_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)  # campaign'])"
    found = gpu_campaign.run_phase([sys.executable, "-c", script], 2, tmp_path / "log")
    assert found["status"] is None and 2 <= found["seconds"] < 30
    time.sleep(0.5)
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [words for words in running if b"sleep(60)  # campaign" in words]


def test_a_phase_that_fails_is_told(tmp_path: Path) -> None:
    found = gpu_campaign.run_phase([sys.executable, "-c", "print('why'); raise SystemExit(3)"], 20, tmp_path / "log")
    assert found["status"] == 3
    assert (tmp_path / "log").read_text() == "why\n"
