"""What the measuring scripts share: repeats with compilation apart, the device's floors, and where results go."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--platform", choices=("cpu", "gpu", "tpu"), help="which backend (default: JAX's choice)")
    made.add_argument("--quick", action="store_true", help="a narrow network and little work: under a minute")
    made.add_argument("--repeats", type=int, default=5, help="timed calls of each, after one that compiles")
    made.add_argument("--out", type=Path, default=RESULTS / "speed", help="folder for the JSON file")
    made.add_argument("--only", nargs="+", help="names of the measurements to run (default: all)")
    return made


def use_platform(name: str | None) -> None:
    """Settles the backend, where one is named; before JAX is first used. `flops` needs a CPU beside it."""
    if name:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}.get(name, name)


def command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Runs a script with what the command line says, `--platform` included; a user's error is one line."""
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), help="which backend (default: JAX's choice)")
    arguments = parser.parse_args()
    use_platform(arguments.platform)

    from backdoor_jax.errors import UserError

    try:
        run(arguments)
    except UserError as error:
        parser.exit(2, f"{Path(sys.argv[0]).stem}: {error}\n")


def keep_no_programs() -> None:
    """Compile times are real: nothing compiled earlier is taken; before JAX is first used."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def timed(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of ``run`` once compiled (median, least, most), and of compiling it.

    The first call compiles; what JAX reports of tracing, lowering and compiling in it is `compile_seconds`.
    """
    import jax

    from backdoor_jax.training.stopwatch import Stopwatch

    with Stopwatch() as first:
        jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        with Stopwatch() as watch:
            jax.block_until_ready(run())
        seconds.append(watch.seconds + watch.compile_seconds)
    return {**spread(seconds), "compile_seconds": first.compile_seconds}


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, least and most.

    >>> spread([3.0, 1.0, 2.0])
    {'seconds': 2.0, 'least': 1.0, 'most': 3.0, 'repeats': 3}
    """
    return {"seconds": median(seconds), "least": min(seconds), "most": max(seconds), "repeats": len(seconds)}


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of one call, counted by XLA before it optimizes for a CPU; for a GPU it counts none."""
    import jax

    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arguments)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        counted: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return float(counted["flops"])


def forward_flops(classifier: Any, variables: Any, images: Any) -> float:
    """Floating-point operations of the logits of one image like these."""
    return flops(lambda images: classifier.logits(variables, images)[0], images[:100]) / len(images[:100])


def floors(quick: bool = False) -> dict[str, float]:
    """What this device does at best, now: matrix products and copies, the best of ten."""
    import jax
    import jax.numpy as jnp

    large = jax.default_backend() != "cpu" and not quick
    size, length = (8192, 2**28) if large else (1024 if quick else 2048, 2**25)

    def best(function: Callable[..., Any], *arguments: Any) -> float:
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*arguments))
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    found = {}
    for name in ("float32", "bfloat16"):
        square = jnp.ones((size, size), name)
        found[f"matmul_{name}_flops"] = 2 * size**3 / best(lambda a, b: a @ b, square, square)
    found["copy_bytes"] = 2 * 4 * length / best(lambda x: x + 1, jnp.ones(length, jnp.float32))
    return found


def about() -> dict[str, Any]:
    """Device, processor, versions, and the commit that was measured."""
    import flax
    import jax
    import jaxlib

    import backdoor_jax
    from backdoor_jax.version import commit

    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            "backdoor_jax": backdoor_jax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
        },
        "commit": commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_memory() -> int:
    """Most bytes in use so far: of the accelerator, or of this process where there is none."""
    import jax

    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_a_process(script: str, *words: str) -> dict[str, Any]:
    """Runs a script of ours in a process of its own, and reads the JSON in the last line it prints."""
    done = subprocess.run([sys.executable, script, *words], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write(arguments: argparse.Namespace, name: str, content: dict[str, Any]) -> Path:
    """One JSON file for this run: ``NAME-DEVICE.json``; a quick or partial run never replaces a complete one."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    name += ("-quick" if arguments.quick else "") + ("-part" if arguments.only else "")
    kind = content["about"]["device"].lower().replace(" ", "_")
    path: Path = arguments.out / f"{name}-{kind}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
