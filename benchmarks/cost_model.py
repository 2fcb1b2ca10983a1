"""How long an experiment takes on so many workers, computed from the seconds in the rows of one that was run.

    python benchmarks/cost_model.py benchmarks/results/defenses_gtsrb/results.jsonl --seeds 21 --workers 1 10 100

The cells of a run are those of the rows, once for each seed. A worker takes the next task whose model is trained, as
Dask does; each kind of task is compiled once on every worker that meets it, or with `--shared-cache` on the first
alone, and every worker needs `--start` seconds before its first. Left out: reading models and data, and a device that
several workers share.
"""

import argparse
import heapq
from pathlib import Path
from typing import Any, NamedTuple

import measuring

from backdoor_jax.experiment import read_rows


class Task(NamedTuple):
    """A model to train, or a repair of it."""

    model: str
    kind: str
    seconds: float
    compile_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a results.jsonl")
    parser.add_argument("--seeds", type=int, default=1, help="how often each cell is run (default: 1)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 10, 100])
    parser.add_argument("--shared-cache", action="store_true", help="workers share their compiled programs")
    parser.add_argument("--start", type=float, default=20.0, help="seconds until a worker can begin (default: 20)")
    arguments = parser.parse_args()
    tasks = read_tasks(read_rows(arguments.rows), arguments.seeds)
    alone = makespan(tasks, 1, arguments.start, arguments.shared_cache)
    lines = []
    for workers in arguments.workers:
        seconds = makespan(tasks, workers, arguments.start, arguments.shared_cache)
        lines.append(
            [str(workers), f"{seconds / 60:.1f}", f"{alone / seconds:.1f}", f"{alone / seconds / workers:.0%}"]
        )
    measuring.show(f"{len(tasks)} cells of {arguments.rows}", ["workers", "minutes", "speedup", "efficiency"], lines)


def read_tasks(rows: list[dict[str, Any]], seeds: int) -> list[Task]:
    """The tasks of the rows of one seed, repeated; each model before its repairs."""
    first = min(row["seed"] for row in rows)
    compiling: dict[str, float] = {}  # Of the row that compiled; others found the program.
    for row in rows:
        compiling[row["defense"]] = max(row["compile_seconds"], compiling.get(row["defense"], 0.0))
    return [
        Task(f"{row['attack']}-{seed}", row["defense"], row["seconds"], compiling[row["defense"]])
        for seed in range(seeds)
        for row in sorted(rows, key=lambda row: row["defense"] != "none")
        if row["seed"] == first
    ]


def makespan(tasks: list[Task], workers: int, start: float, shared_cache: bool = False) -> float:
    """Seconds until all tasks are done, each given to the worker that is free first.

    >>> victim, repair = Task("badnets-0", "none", 10, 0), Task("badnets-0", "d3", 5, 1)
    >>> makespan([victim, repair, repair], 1, 2.0), makespan([victim, repair, repair], 2, 2.0)
    (23.0, 18.0)
    """
    compiled: set[tuple[int, str]] = set()  # By worker, or once for all.
    free = [(start, worker) for worker in range(workers)]
    waiting = [task for task in tasks if task.kind == "none"]
    ready: list[tuple[float, int, Task]] = [(0.0, number, task) for number, task in enumerate(waiting)]
    heapq.heapify(ready)
    repairs = [task for task in tasks if task.kind != "none"]
    end = 0.0
    while ready:
        since, _, task = heapq.heappop(ready)
        now, worker = heapq.heappop(free)
        program = (0 if shared_cache else worker, task.kind)
        done = max(now, since) + task.seconds + task.compile_seconds * (program not in compiled)
        compiled.add(program)
        heapq.heappush(free, (done, worker))
        end = max(end, done)
        if task.kind == "none":
            for place, repair in enumerate(repairs):
                if repair.model == task.model:
                    heapq.heappush(ready, (done, len(waiting) + place, repair))
    return end


if __name__ == "__main__":
    main()
