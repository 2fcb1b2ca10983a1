"""Draws what the measuring scripts wrote: `docs/speed.png`, of one device.

python benchmarks/speed_figure.py --device cpu_cpu
"""

import argparse
import json
from pathlib import Path
from typing import Any

import measuring

WORK = {"finetune": "fine-tuning", "d3": "D3", "scoring": "scoring"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=measuring.RESULTS / "speed", help="folder of the JSON files")
    parser.add_argument("--device", default="cpu_cpu", help="the end of their names (default: cpu_cpu)")
    parser.add_argument("--out", type=Path, default=Path("docs/speed.png"))
    arguments = parser.parse_args()

    def read(name: str) -> dict[str, Any]:
        path = arguments.results / f"{name}-{arguments.device}.json"
        if not path.is_file():
            parser.exit(2, f"{path}: not there; run benchmarks/{name}.py first\n")
        return dict(json.loads(path.read_text()))

    draw(read("speed"), read("versus_torch"), read("scaling"), arguments.out)
    print(arguments.out)


def draw(speed: dict[str, Any], versus: dict[str, Any], scaling: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    about = speed["about"]
    figure.suptitle(f"{about['processor']}, {about['cores']} cores, JAX {about['versions']['jax']}", fontsize=10)

    axis = axes[0, 0]
    titles = list(versus["results"])
    for number, (work, label) in enumerate(WORK.items()):
        ratios = [versus["results"][title][f"{work}/tuned"]["ratio"] for title in titles]
        bars = axis.bar(np.arange(len(titles)) + 0.27 * (number - 1), ratios, 0.25, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(titles)), [title.replace(", ", "\n") for title in titles], fontsize=8)
    axis.set_ylabel("PyTorch's seconds / ours")
    axis.set_title("Against tuned PyTorch in the same run", fontsize=10)
    axis.margins(y=0.15)
    axis.legend(fontsize=8, loc="upper left", ncols=3)

    axis = axes[0, 1]
    shown = {name: found for name, found in speed["results"].items() if not name.startswith("tac_programs")}
    bars = axis.barh(list(shown), [100 * found["share"] for found in shown.values()], color="tab:green")
    axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_xlabel("% of the rate of large float32 matrix products")
    axis.set_title("Share of this device's floor", fontsize=10)

    axis = axes[1, 0]
    for how in dict.fromkeys(point["how"] for point in scaling["results"] if point["scale"] == "victims"):
        points = [p for p in scaling["results"] if (p["scale"], p["how"]) == ("victims", how)]
        axis.plot([p["point"] for p in points], [p["seconds"] / p["point"] for p in points], "o-", label=how)
    axis.set_ylim(0)
    axis.set_xlabel("victims at once")
    axis.set_ylabel("seconds a victim")
    axis.set_title("Many models at once", fontsize=10)
    axis.legend(fontsize=8)

    axis = axes[1, 1]
    for latent in (512, 2048):
        programs = {
            n: f for n, f in speed["results"].items() if n.startswith("tac_programs") and n.endswith(str(latent))
        }
        classes = [int(name.split("_")[2]) for name in programs]
        axis.plot(classes, [found["seconds"] for found in programs.values()], "o-", label=f"latents of {latent}")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("classes")
    axis.set_ylabel("seconds for all classes")
    axis.set_title("TAC's quadratic programs", fontsize=10)
    axis.legend(fontsize=8)

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
