"""Two processes train one network: as one process does, and resumed after one of them is killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import distributed_run
import jax
import numpy as np
import pytest

EPOCHS, DEVICES = 12, 4


@contextlib.contextmanager
def started(folder: Path, epochs: int) -> Iterator[list[subprocess.Popen[str]]]:
    """The two processes of a run; those still running at the end are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // 2}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, distributed_run.__file__, str(port), str(process), str(folder), str(epochs)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        yield running
    finally:
        for each in running:
            each.kill()
            each.wait()


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights at the end of a run, and the number of its steps."""
    with np.load(folder / "trained.npz") as arrays:
        return dict(arrays)


@pytest.mark.slow
def test_two_processes_resumed_after_one_is_killed_train_as_one_process_does(tmp_path: Path) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    with started(both, 10_000) as running:
        end = time.monotonic() + 240
        while not any(path.name.isdigit() and int(path.name) >= 2 for path in (both / "training").glob("*")):
            ended = next((each for each in running if each.poll() is not None), None)
            assert ended is None, ended.communicate()[1]
            assert time.monotonic() < end, "no checkpoint was written"
            time.sleep(0.05)
        running[1].send_signal(signal.SIGKILL)
        running[1].wait()
    assert not (both / "trained.npz").exists()
    with started(both, EPOCHS) as running:
        for each in running:
            _, error = each.communicate(timeout=240)
            assert each.returncode == 0, error
    distributed_run.train(alone, EPOCHS, jax.devices()[:DEVICES])
    two, one = weights(both), weights(alone)
    assert 0 < two.pop("steps") < one.pop("steps") == 4 * EPOCHS
    assert two.keys() == one.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)
