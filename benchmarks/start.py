"""How long a user waits: from the start of the command line to the end of the first epoch, on digits.

    python benchmarks/start.py
    python benchmarks/start.py --quick

`backdoor-jax run` is started in a process of its own with an empty cache of compiled programs (cold), then with the one
that it left (warm). Its clock starts before Python does and stops when the first compiled epoch of the first victim is
through; the network is the demo's.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measuring

CONFIG = """
name: start
data: {source: digits}
model: {name: preact_resnet18, width: WIDTH}
victim: {epochs: 20, batch_size: 64, crop: 1}
attacks: [{name: badnets}]
defenses: [{name: finetune}]
"""


def main() -> None:
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--width", type=int, default=8, help="of the PreAct-ResNet18 (default: 8, the demo's)")
    parser.add_argument("--child", nargs=2, metavar=("CONFIG", "OUT"), help="run until the first epoch is through")
    arguments = parser.parse_args()
    if arguments.child:
        sys.exit(until_the_first_epoch(*arguments.child))
    measuring.use_platform(arguments.platform)
    repeats = 1 if arguments.quick else arguments.repeats

    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "start.yaml"
        config.write_text(CONFIG.replace("WIDTH", str(arguments.width)))
        for number in range(repeats):
            for state, times in seconds.items():
                out = Path(folder) / f"{state}-{number}"
                environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder) / f"cache-{number}")}
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, __file__, "--child", str(config), str(out)], env=environment, check=True
                )
                times.append(time.perf_counter() - started)

    results = {state: measuring.spread(times) for state, times in seconds.items()}
    content = {"about": measuring.about(), "quick": arguments.quick, "width": arguments.width, "results": results}
    print(measuring.write(arguments, "start", content))
    rows = [[state, f"{s['seconds']:.1f}", f"{s['least']:.1f}", f"{s['most']:.1f}"] for state, s in results.items()]
    measuring.show("Command line to the end of the first epoch, digits", ["cache", "seconds", "least", "most"], rows)


def until_the_first_epoch(config: str, out: str) -> str:
    """`backdoor-jax run`, left as soon as an epoch is through; comes back only where it failed before."""
    import jax

    from backdoor_jax.cli import main as command
    from backdoor_jax.training import fitting

    compiled_epoch = fitting._compiled_epoch

    def leave(*arguments: object, **options: object) -> None:
        jax.block_until_ready(compiled_epoch(*arguments, **options))
        os._exit(0)

    fitting._compiled_epoch = leave  # type: ignore[assignment]
    return f"no epoch was run (exit code {command(['run', config, '--out', out])})"


if __name__ == "__main__":
    main()
