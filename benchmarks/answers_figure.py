"""Draws what a backdoored model and its repair answer for images with and without the trigger, from a demo's folder.

backdoor-jax demo --out demo
python benchmarks/answers_figure.py demo

The picture of the README: one row of images for each attack, the clean image's answer above the triggered one's.
"""

import argparse
from pathlib import Path

COLUMNS = 5
GOOD, BAD = "#0a6b3d", "#b3261e"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    parser.add_argument("--defense", default="tac", help="label of the repair that is shown")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/answers.png"), help="the picture's file")
    arguments = parser.parse_args()
    draw(arguments.demo, arguments.defense, arguments.out)
    print(arguments.out)


def draw(folder: Path, defense: str, out: Path) -> None:
    from matplotlib.figure import Figure

    from backdoor_jax.array_files import read_npz
    from backdoor_jax.drawing import save_figure
    from backdoor_jax.experiment import read_rows

    rows = {
        (row["attack"], row["defense"]): row
        for row in read_rows(folder / "results.jsonl")
        if "answers" in row.get("analyses", {})
    }
    attacks = list(dict.fromkeys(attack for attack, _ in rows))
    figure = Figure(figsize=(8.6, 1.75 * len(attacks)))
    grid = figure.subplots(len(attacks), 2 * COLUMNS, squeeze=False)
    for number, (line, attack) in enumerate(zip(grid, attacks, strict=True)):
        victim, repaired = (rows[attack, label]["analyses"]["answers"] for label in ("none", defense))
        names, labels = victim["class_names"], victim["labels"]
        target = rows[attack, defense]["config"]["attack"]["target"]
        images = read_npz(folder / "examples" / f"{attack}.npz", "an example of a trigger")
        shown = [at for at in range(len(labels)) if labels[at] != target][:COLUMNS]
        for pair, at in zip(line.reshape(COLUMNS, 2), shown, strict=True):
            answers = (
                [("model", victim["clean"][at])],
                [("model", victim["triggered"][at]), ("repaired", repaired["triggered"][at])],
            )
            for axes, kind, given in zip(pair, ("clean", "triggered"), answers, strict=True):
                axes.imshow(images[kind][at], interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.set_title("" if number else kind, fontsize=8)
                for place, (who, answer) in enumerate(given):
                    color = GOOD if answer == labels[at] else BAD
                    text = f"{who}:\n{names[answer]}"
                    axes.text(0.5, -0.06 - 0.38 * place, text, color=color, fontsize=7, ha="center", va="top",
                              transform=axes.transAxes)  # fmt: skip
        line[0].set_ylabel(attack, fontsize=8)
    figure.subplots_adjust(wspace=0.08, hspace=0.5)
    save_figure(figure, out)


if __name__ == "__main__":
    main()
