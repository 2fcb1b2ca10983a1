"""Everything worth measuring while a GPU is at hand, the most wanted first; it may be cut off at any moment.

    python benchmarks/gpu_campaign.py --minutes 25 --data data/cifar10.npz --torch-python PYTHON
    python benchmarks/gpu_campaign.py --tiny

Phases, each a process of its own with a log:

- `tests`: the fast tests on this device;
- `versus_torch`: fine-tuning, D3 and scoring against tuned PyTorch at width 64;
- `speed`: how fast everything is, beside the device's floor;
- `scaling`: several networks at once (one by one, `lax.map`, `vmap`), and batches of 128 to 1,024 images;
- `cifar10`: configs/gpu_cifar10.yaml, five victims at the published width, each repaired by every defense.

A phase that has ended is not run again; `cifar10` gets whatever time is left and resumes at its rows, so the same
command goes on where it was stopped. `campaign.json` in the output folder says what each phase did and how long it
took. `--tiny` runs all phases at the least size, on any device, in two minutes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import measuring

ROOT = Path(__file__).parents[1]


class Phase(NamedTuple):
    """A command, the same at the least size, and the minutes after which it is cut off; None is all that is left."""

    command: list[str]
    tiny: list[str]
    minutes: float | None


def phases(out: Path, data: str, torch_python: str) -> dict[str, Phase]:
    """All phases in their order."""
    python, experiment = sys.executable, str(out / "cifar10")

    def script(name: str, *words: str) -> list[str]:
        return [python, f"benchmarks/{name}.py", "--out", str(out), *words]

    def run(*words: str) -> list[str]:
        start = "from backdoor_jax.cli import main; main()"
        return [python, "-c", start, "run", "configs/gpu_cifar10.yaml", "--out", experiment, *words]

    pytest = [python, "-m", "pytest", "-q", "-m", "not slow"]
    torch = ["--torch-python", torch_python]
    least = ["model.name=small_cnn", "model.width=2", "model.dtype=float32", "victim.epochs=1", "victim.batch_size=32"]
    least += ["data.source=digits", "data.train_size=64", "data.test_size=64"]
    least += ["attacks=[{name: badnets}]", "defenses=[{name: finetune, steps: 2}, {name: d3, steps: 2}]"]
    return {
        "tests": Phase([*pytest, "tests"], [*pytest, "tests/test_progress.py"], 4),
        "versus_torch": Phase(
            script("versus_torch", "--widths", "64", *torch),
            script("versus_torch", "--quick", "--only", "scoring/tuned", *torch),
            4,
        ),
        "speed": Phase(script("speed", "--repeats", "3"), script("speed", "--quick", "--only", "pad_score"), 4),
        "scaling": Phase(
            script("scaling", "--repeats", "3", "--only", "victims", "batches"),
            script("scaling", "--quick", "--only", "batches"),
            3,
        ),
        "cifar10": Phase(run(f"data.source={data}"), run(*least), None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="when to stop (default: 25)")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "gpu_campaign", help="folder for all results")
    parser.add_argument("--data", default="tfds:cifar10", help="CIFAR-10: tfds:cifar10, or a plain .npz")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--tiny", action="store_true", help="all phases at the least size, in two minutes")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * arguments.minutes
    record_path = out / "campaign.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {}

    for name, phase in phases(out, arguments.data, arguments.torch_python).items():
        left = until - time.monotonic()
        if record.get(name, {}).get("ended") or left < 5:
            continue
        limit = left if phase.minutes is None else min(left, 60 * phase.minutes)
        if name == "versus_torch" and not has_torch(arguments.torch_python):
            print(f"{name}: left out, {arguments.torch_python} has no PyTorch", flush=True)
            continue
        print(f"{name}: at most {limit / 60:.1f} minutes ...", flush=True)
        found = run_phase(phase.tiny if arguments.tiny else phase.command, limit, out / f"{name}.log")
        # A phase of bounded length that was cut off by its own limit would be so again.
        found["ended"] = found["status"] is not None or (phase.minutes is not None and limit == 60 * phase.minutes)
        record[name] = found
        record_path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {found['seconds']:.0f} s, {describe(found['status'])}", flush=True)
    if failed := [name for name, found in record.items() if found["status"] not in (0, None)]:
        parser.exit(1, f"failed: {', '.join(failed)}; see the logs in {arguments.out}\n")


def has_torch(python: str) -> bool:
    """Whether an interpreter can import PyTorch."""
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def run_phase(command: list[str], limit: float, log: Path) -> dict[str, Any]:
    """Runs a command for at most so many seconds; its exit status is None where it was cut off."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (
        log.open("a") as file,
        # A session of its own, so that what a script has started is stopped with it.
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        status: int | None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return {"seconds": time.monotonic() - started, "status": status}


def describe(status: int | None) -> str:
    """An exit status in words."""
    return "cut off" if status is None else "done" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    main()
