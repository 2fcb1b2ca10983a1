"""Dask clusters for `backdoor_jax.experiment.run_experiment`: workers of this machine, of SLURM, or of a scheduler.

This module needs the extra ``distributed``. Traffic of the clusters that are started here is encrypted and only their
own workers are let in, because whoever reaches a Dask scheduler can run anything on it.

    from backdoor_jax.experiment.workers import local_workers

    if __name__ == "__main__":  # Workers import this file.
        with local_workers(4) as client:
            run_experiment(experiment, Path("runs/example"), client=client)
"""

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster, WorkerPlugin
from distributed.security import Security

from backdoor_jax.config_files import read_yaml
from backdoor_jax.errors import UserError, first_line

CONNECTING = 30
"""Seconds that a scheduler has to answer."""
RESTARTING = {"distributed.deploy.lost-worker-timeout": "10 minutes"}
"""How long a killed worker has to start again before Dask gives it up; on a busy machine the usual 15 s are too few."""


@contextmanager
def local_workers(count: int) -> Iterator[Client]:
    """A client of processes on this machine, each pinned to one core or one GPU, in turn.

    On a CPU results are the same for any number of workers, because each has one core.

    Args:
        count: how many processes.

    Raises:
        UserError: where the number is less than 1.
    """
    if count < 1:
        raise UserError(f"{count} workers cannot do anything; give 1 or more")
    gpus, cores = visible_gpus(), _cores()
    security = Security.temporary()
    with tempfile.TemporaryDirectory(prefix="backdoor_jax-") as scratch:
        options: dict[str, Any] = {
            "nthreads": 1,
            "memory_limit": 0,
            "local_directory": scratch,
            "security": security,
            "protocol": "tls",
            "silence_logs": logging.CRITICAL,
        }
        workers = {
            number: {
                "cls": Nanny,
                "options": options | {"env": worker_environment(number, count, gpus), "plugins": [Pin(cores, number)]},
            }
            for number in range(count)
        }
        scheduler = {
            "cls": Scheduler,
            "options": {"host": "127.0.0.1", "port": 0, "protocol": "tls", "security": security, "dashboard": False},
        }
        with (
            dask.config.set(RESTARTING),
            SpecCluster(workers, scheduler, security=security, silence_logs=logging.CRITICAL) as cluster,
            Client(cluster) as client,
        ):
            yield client


@contextmanager
def slurm_workers(profile: Path, folder: Path) -> Iterator[Client]:
    """A client of jobs that are submitted to SLURM, and cancelled at the end.

    Args:
        profile: a YAML file with ``jobs``, how many, and the arguments of `dask_jobqueue.SLURMCluster`.
        folder: one that all nodes see, for the keys of the encrypted connections; they are removed at the end.

    Raises:
        UserError: for a profile that cannot be used, or where SLURM is not at hand.
    """
    arguments = read_profile(profile)
    jobs = arguments.pop("jobs")
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; run this where SLURM jobs are submitted")
    from dask_jobqueue import SLURMCluster  # Its import looks for schedulers of jobs.

    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"processes": 1, "security": True, "shared_temp_directory": str(folder.resolve())}
    given |= arguments
    try:
        given["scheduler_options"] = {"dashboard": False, **arguments.get("scheduler_options", {})}
        cluster = SLURMCluster(**given)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{profile}: SLURM workers cannot be described so ({first_line(error)}); fix it") from error
    with cluster, Client(cluster) as client:
        cluster.scale(jobs=jobs)
        yield client


@contextmanager
def workers_of(address: str) -> Iterator[Client]:
    """A client of a scheduler that runs, with whatever workers it has.

    Args:
        address: such as ``tcp://10.0.0.1:8786``.

    Raises:
        UserError: where no scheduler answers.
    """
    try:
        client = Client(address, timeout=CONNECTING)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(
            f"{address}: no scheduler answers; start one by `dask scheduler`, or fix the address"
        ) from error
    with client:
        yield client


def read_profile(path: Path) -> dict[str, Any]:
    """The arguments in a SLURM profile, and ``jobs``.

    Raises:
        UserError: for another file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "gpu.yaml"
        ...     _ = path.write_text("jobs: 20\\ncores: 4\\nmemory: 32GB\\nqueue: gpu")
        ...     read_profile(path)
        {'jobs': 20, 'cores': 4, 'memory': '32GB', 'queue': 'gpu'}
    """
    found = read_yaml(path, "give the profile of SLURM jobs")
    if not isinstance(found, dict) or type(found.get("jobs")) is not int or found["jobs"] < 1:
        raise UserError(f"{path}: lacks jobs, how many to submit; add a line such as `jobs: 10`")
    return {str(name): value for name, value in found.items()}


class Pin(WorkerPlugin):
    """Keeps a worker on one core, where the system can."""

    def __init__(self, cores: list[int], number: int) -> None:
        self.core = cores[number % len(cores)] if cores else None

    def setup(self, worker: object) -> None:
        """Pins the process before it starts threads of JAX."""
        del worker
        if self.core is not None:
            os.sched_setaffinity(0, {self.core})


def worker_environment(number: int, count: int, gpus: list[str]) -> dict[str, str]:
    """The environment by which a worker sees one GPU, where there are any.

    Example:
        >>> worker_environment(3, 4, ["0", "1"])
        {'CUDA_VISIBLE_DEVICES': '1', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
        >>> worker_environment(1, 2, ["0", "1"]), worker_environment(0, 1, [])
        ({'CUDA_VISIBLE_DEVICES': '1'}, {})
    """
    if not gpus:
        return {}
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if count > len(gpus) else {}
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)], **shared}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, found without taking any of their memory."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def _cores() -> list[int]:
    """The cores that this process may use; none where the system does not tell, or workers use GPUs."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") and not visible_gpus() else []
