"""What more work costs: more images, more classes, more victims at once, more devices.

    python benchmarks/scaling.py --platform cpu
    python benchmarks/scaling.py --quick

- `images`: PAD-FT's scoring, whose memory must not grow with the number of images but by the images themselves;
- `classes`: TAC's programs, all classes;
- `victims`: an epoch of several networks of one shape: one after another, in `lax.map`, under `vmap`, and a network a
  device;
- `batches`: four steps of one network at that many images a step;
- `devices`: data-parallel epochs of one network; virtual devices share the processor's cores, so on a CPU this shows
  what dividing costs, not what it gains.

Each point runs in a process of its own.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import measuring
from speed import Size, network, programs, random_data, scoring


def images(point: int, how: str, width: int) -> Callable[[], Any]:
    """Scoring of so many images."""
    return scoring(Size(width, 0, point)).run


def classes(point: int, how: str, width: int) -> Callable[[], Any]:
    """TAC's programs for so many classes, latents of 512."""
    return programs(point, 512).run


def victims(point: int, how: str, width: int) -> Callable[[], Any]:
    """Four steps of so many networks, each on images of its own."""
    import jax

    from backdoor_jax.compiling import jit
    from backdoor_jax.training import epoch, fit, fit_many, mesh_for, stack

    step, state, data, key = epoch_of(width, 256)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 64}
    if how == "one by one":
        return lambda: [fit(key, step, state, data, **options).state for _ in range(point)]
    keys, steps, states, sets = stack([(key, step, state, data)] * point)
    if how == "vmap":
        each = jit(jax.vmap(lambda *run: epoch(*run, batch_size=64)))
        return lambda: each(states, sets, keys, steps)
    mesh = mesh_for(point, jax.devices()[: point if how == "sharded" else 1])
    return lambda: fit_many(keys, steps, states, sets, **options, mesh=mesh).state


def batches(point: int, how: str, width: int) -> Callable[[], Any]:
    """Four steps of one network in batches of so many images."""
    from backdoor_jax.training import fit

    step, state, data, key = epoch_of(width, 4 * point)
    return lambda: fit(key, step, state, data, epochs=1, batch_size=point).state


def devices(point: int, how: str, width: int) -> Callable[[], Any]:
    """Four steps of one network whose batches are divided over so many devices."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from backdoor_jax.training import fit

    step, state, data, key = epoch_of(width, 256)
    mesh = Mesh(np.array(jax.devices()[:point]), ("batch",))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return lambda: fit(key, step, state, data, epochs=1, batch_size=64, sharding=sharding).state


def epoch_of(width: int, count: int) -> tuple[Any, Any, Any, Any]:
    """A supervised step, its first state, random data and a key."""
    import jax

    from backdoor_jax.training import SGD, Cosine, GradientStep, supervised_loss

    classifier, variables = network(Size(width, 0, 0))
    loss = jax.tree_util.Partial(supervised_loss, classifier)
    step = GradientStep(loss, SGD(schedule=Cosine(100), momentum=0.9, weight_decay=5e-4))
    return step, step.init(variables), random_data(count), jax.random.key(1)


SCALES: dict[str, tuple[Callable[[int, str, int], Callable[[], Any]], tuple[str, ...], tuple[int, ...]]] = {
    "images": (images, ("",), (2_000, 8_000, 32_000)),
    "classes": (classes, ("",), (10, 50, 100, 200)),
    "victims": (victims, ("one by one", "map", "vmap", "sharded"), (1, 2, 4, 8)),
    "batches": (batches, ("",), (128, 256, 512, 1024)),
    "devices": (devices, ("",), (1, 2, 4, 8)),
}


def main() -> None:
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--one", nargs=3, metavar=("SCALE", "HOW", "POINT"), help="measure this alone, print JSON")
    arguments = parser.parse_args()
    if arguments.only and set(arguments.only) - set(SCALES):
        parser.error(f"--only takes {', '.join(SCALES)}")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    measuring.use_platform(arguments.platform)
    measuring.keep_no_programs()
    if arguments.one:
        import jax

        scale, how, point = arguments.one
        if (how == "sharded" or scale == "devices") and int(point) > jax.device_count():
            print(json.dumps({"left_out": f"there are {jax.device_count()} devices"}))
            return
        width = 4 if arguments.quick else 16 if jax.default_backend() == "cpu" else 64
        times = measuring.timed(SCALES[scale][0](int(point), how, width), 2 if arguments.quick else arguments.repeats)
        print(json.dumps({**times, "peak_bytes": measuring.peak_memory(), "about": measuring.about()}))
        return

    results, rows = [], []
    for scale, (_, hows, points) in SCALES.items():
        if arguments.only and scale not in arguments.only:
            continue
        for how in hows[-1:] if arguments.quick else hows:
            for point in (points[0], points[1]) if arguments.quick else points:
                print(f"{scale} {how} {point} ...", file=sys.stderr, flush=True)
                found = measuring.in_a_process(__file__, *sys.argv[1:], "--one", scale, how, str(point))
                if "left_out" in found:
                    print(f"{scale} {how} {point}: left out, {found['left_out']}", file=sys.stderr)
                    continue
                about = found.pop("about")
                results.append({"scale": scale, "how": how, "point": point, **found})
                content = {"about": about, "quick": arguments.quick, "results": results}
                path = measuring.write(arguments, "scaling", content)
                seconds = f"{found['seconds']:.3g} ({found['least']:.3g} to {found['most']:.3g})"
                rows.append([scale, how, str(point), seconds, f"{found['peak_bytes'] / 2**20:,.0f}"])
    print(path)
    columns = ["scale", "how", "point", "seconds", "peak MiB"]
    measuring.show(f"{about['device']}, {about['processor']}", columns, rows)


if __name__ == "__main__":
    main()
