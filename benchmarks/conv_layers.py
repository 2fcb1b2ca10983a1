"""Where a training step's time goes, layer by layer, here and in PyTorch: `conv_layers-DEVICE.json`.

    python benchmarks/conv_layers.py --torch-python PYTHON --width 16 --cores 1

Every kind of convolution in a PreAct-ResNet18, with how many times it occurs: milliseconds of the forward pass, of the
gradient by the images and of that by the kernel, and the algorithms that `backdoor_jax.models.conv.choose` takes for
them; and normalization with its rectifier, forward and backward. Both sides run the same work on the same cores,
PyTorch with `channels_last`. Here each is inside `lax.scan`, as in training.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

PARTS = ("forward", "by_images", "by_kernel")
Layer = tuple[int, int, int, int, int]
"""Size of the images, taps, input channels, output channels, stride."""


def layers(width: int) -> dict[Layer, int]:
    """How often each kind of convolution occurs in a PreAct-ResNet18 for 32x32 images."""
    counts: dict[Layer, int] = {(32, 3, 3, width, 1): 1, (32, 3, width, width, 1): 4}
    for stage in (1, 2, 3):
        size, features = 32 >> stage, width << stage
        counts[2 * size, 3, features // 2, features, 2] = 1
        counts[2 * size, 1, features // 2, features, 2] = 1
        counts[size, 3, features, features, 1] = 3
    return counts


def norms(width: int) -> dict[Layer, int]:
    """How often normalization and rectifier occur, by the shape that they work on; no taps."""
    return {(32 >> stage, 0, width << stage, width << stage, 1): count for stage, count in enumerate((5, 4, 4, 3))}


def median_ms(run: Callable[[], Any], calls: int, repeats: int = 5) -> float:
    """Milliseconds of one of the calls that ``run`` makes, after a first that compiles."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds) / calls


def ours(width: int, batch: int) -> dict[str, Any]:
    """All layers here."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from backdoor_jax.compiling import jit
    from backdoor_jax.models.conv import FORWARD, INPUT, WEIGHT, choose
    from backdoor_jax.models.layers import BatchNorm
    from backdoor_jax.models.products import Geometry
    from backdoor_jax.models.rectifier import relu

    calls = 8

    def milliseconds(function: Callable[..., Any], *arrays: jax.Array) -> float:
        def loop(*arrays: jax.Array) -> jax.Array:
            def body(total: jax.Array, _: None) -> tuple[jax.Array, None]:
                # Depends on the call before, so that no call can be left out.
                first = arrays[0].at[(0,) * arrays[0].ndim].add(total)
                results = jax.tree.leaves(lax.optimization_barrier(function(first, *arrays[1:])))
                return sum((leaf.ravel()[0] for leaf in results), jnp.zeros(())) * 1e-30, None

            return lax.scan(body, jnp.zeros(()), length=calls)[0]

        compiled = jit(loop)
        return median_ms(lambda: jax.block_until_ready(compiled(*arrays)), calls)

    found: dict[str, Any] = {}
    for layer in layers(width):
        size, taps, inputs, outputs, stride = layer
        pads = ((taps // 2, taps // 2),) * 2
        geometry = Geometry((size, size), (taps, taps), (stride, stride), pads)
        x, w = jnp.ones((batch, size, size, inputs)), jnp.ones((taps, taps, inputs, outputs))
        g = jnp.ones((batch, *geometry.outputs, outputs))
        chosen = choose(geometry, batch, (inputs, outputs), x.dtype)
        algorithms = (FORWARD[chosen[0]], INPUT[chosen[1]], WEIGHT[chosen[2]])
        pairs = zip(PARTS, algorithms, ((x, w), (g, w), (x, g)), strict=True)
        times = {
            part: milliseconds(lambda a, b, f=f, shape=geometry: f(a, b, shape), *arrays) for part, f, arrays in pairs
        }
        found[str(layer)] = {**times, "algorithms": list(chosen)}
    for layer in norms(width):
        size, _, channels, _, _ = layer
        x = jnp.ones((batch, size, size, channels))
        norm = BatchNorm()
        variables = norm.init(jax.random.key(0), x, False)

        def forward(x: jax.Array, norm: Any = norm, variables: Any = variables) -> jax.Array:
            return relu(norm.apply(variables, x, True, mutable=["batch_stats"])[0])

        def backward(x: jax.Array, g: jax.Array, forward: Any = forward) -> Any:
            return jax.vjp(forward, x)[1](g)

        both = milliseconds(backward, x, jnp.ones_like(x))
        found[str(layer)] = {"forward": milliseconds(forward, x), "forward_and_backward": both}
    return found


def theirs(width: int, batch: int) -> dict[str, Any]:
    """All layers in PyTorch."""
    import torch

    calls = 4

    def milliseconds(function: Callable[[], Any]) -> float:
        def run() -> None:
            for _ in range(calls):
                function()

        return median_ms(run, calls)

    def ones(*shape: int) -> Any:
        return torch.ones(shape).to(memory_format=torch.channels_last)

    found: dict[str, Any] = {}
    for layer in layers(width):
        size, taps, inputs, outputs, stride = layer
        x, w = ones(batch, inputs, size, size), ones(outputs, inputs, taps, taps)
        g = ones(batch, outputs, size // stride, size // stride)
        settings = {"stride": [stride] * 2, "padding": [taps // 2] * 2, "dilation": [1, 1]}

        def gradients(mask: list[bool], x: Any = x, w: Any = w, g: Any = g, settings: Any = settings) -> Any:
            return torch.ops.aten.convolution_backward(
                g, x, w, None, **settings, transposed=False, output_padding=[0, 0], groups=1, output_mask=mask
            )

        with torch.inference_mode():
            times = (
                milliseconds(partial(torch.nn.functional.conv2d, x, w, None, stride, taps // 2)),
                milliseconds(partial(gradients, [True, False, False])),
                milliseconds(partial(gradients, [False, True, False])),
            )
        found[str(layer)] = dict(zip(PARTS, times, strict=True))
    for layer in norms(width):
        size, _, channels, _, _ = layer
        x, g = ones(batch, channels, size, size).requires_grad_(), ones(batch, channels, size, size)
        norm = torch.nn.BatchNorm2d(channels)

        def forward(x: Any = x, norm: Any = norm) -> Any:
            return torch.relu(norm(x))

        def both(forward: Any = forward, g: Any = g) -> None:
            forward().backward(g)

        together = milliseconds(both)
        with torch.inference_mode():
            found[str(layer)] = {"forward": milliseconds(forward), "forward_and_backward": together}
    return found


def main() -> None:
    if sys.argv[1:2] == ["--torch-side"]:
        print(json.dumps(theirs(int(sys.argv[2]), int(sys.argv[3]))))
        return
    import measuring

    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--width", type=int, default=16, help="of the network (default: 16)")
    parser.add_argument("--batch", type=int, default=200, help="images (default: 200)")
    parser.add_argument("--cores", type=int, help="cores that both may use (default: all)")
    arguments = parser.parse_args()
    measuring.use_platform(arguments.platform)
    measuring.keep_no_programs()
    width, batch = (4, 8) if arguments.quick else (arguments.width, arguments.batch)
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, usable[: arguments.cores])
    here = ours(width, batch)
    command = [arguments.torch_python, __file__, "--torch-side", str(width), str(batch)]
    there = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    about = measuring.about()
    counts = {str(layer): count for layer, count in (layers(width) | norms(width)).items()}
    results = {name: {"times": counts[name], "jax": here[name], "torch": there[name]} for name in here}
    settings = {"width": width, "batch": batch, "cores": len(os.sched_getaffinity(0))}
    name = f"conv_layers-width{width}-cores{settings['cores']}"
    print(measuring.write(arguments, name, {"about": about, "settings": settings, "results": results}))
    rows, totals = [], [0.0, 0.0]
    for name, found in results.items():
        parts = [part for part in found["jax"] if part != "algorithms"]
        cells = [f"{found['jax'][part]:.2f} / {found['torch'][part]:.2f}" for part in parts]
        for side, key in enumerate(("jax", "torch")):
            counted = parts if "algorithms" in found["jax"] else parts[-1:]
            totals[side] += found["times"] * sum(found[key][part] for part in counted)
        cells += [""] * (3 - len(cells))
        rows.append([name, str(found["times"]), *cells, ", ".join(found["jax"].get("algorithms", ["normalization"]))])
    rows.append(["all", "", f"{totals[0]:.0f} / {totals[1]:.0f}", "", "", ""])
    columns = ["(size, taps, in, out, stride)", "times", "forward", "by images", "by kernel", "algorithms here"]
    measuring.show(f"milliseconds, here / PyTorch, {settings['cores']} cores", columns, rows)


if __name__ == "__main__":
    main()
