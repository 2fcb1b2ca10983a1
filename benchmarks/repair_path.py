"""What lies on the line from a victim to TAC's repair: rates, clean loss and latent statistics at points of it.

    backdoor-jax run configs/development_small.yaml
    python benchmarks/repair_path.py configs/development_small.yaml --models runs/development_small
    python benchmarks/repair_path.py configs/development_small.yaml --draw docs/figures/repair_path.png

The first command trains the victims, the second adds a row for each of them and each point to --rows (re-running
resumes), the third draws the rows. TAC is given the attacker's target, or for a clean model the class that looks worst.
Points are as they are (``interpolated``), or with normalization statistics estimated again from the clean images
(``reestimated``).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import measuring
import numpy as np

SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2)
PASSES = 5
"""Passes over the clean images that estimate statistics again; with 8 batches each and a momentum of .1 that leaves 1.5
% of what was there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an experiment whose victims are stored")
    parser.add_argument("--models", type=Path, help="its folder")
    parser.add_argument("--rows", type=Path, default=measuring.RESULTS / "midway" / "path.jsonl")
    parser.add_argument("--steps", type=int, default=200, help="of TAC's repair (default: 200)")
    parser.add_argument("--images", type=int, default=1000, help="test images that are looked at (default: 1000)")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the rows instead of measuring")
    measuring.command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.draw is not None:
        draw(read(arguments.rows), arguments.draw)
        return
    from backdoor_jax.config_files import load_experiment
    from backdoor_jax.errors import UserError
    from backdoor_jax.experiment.victims import make_workspace

    if arguments.models is None:
        raise UserError("give the folder with the victims (--models), or --draw")
    workspace = make_workspace(load_experiment(arguments.config), arguments.models)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    for seed in workspace.experiment.seeds:
        for entry in (None, *workspace.experiment.attacks):
            label = entry.label if entry else "none"
            done = {row["attack"] for row in read(arguments.rows) if row["seed"] == seed}
            if label not in done and (workspace.model_folder(label, seed) / "timing.json").is_file():
                rows = measure(workspace, entry, seed, arguments.steps, arguments.images)
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                print(label, [(row["share"], round(row["acc"], 3), row.get("asr")) for row in rows], flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def measure(workspace: Any, entry: Any, seed: int, steps: int, images: int) -> list[dict[str, Any]]:
    """The rows of one victim or clean model."""
    import jax

    import backdoor_jax as bj
    from backdoor_jax.defenses import scan
    from backdoor_jax.defenses.midway import between
    from backdoor_jax.experiment.victims import clean_subset, load_stored

    clean_model = load_stored(workspace, None, seed).variables if entry and entry.attack.needs_clean_model else None
    model, classifier = load_stored(workspace, entry, seed, clean_model), workspace.classifier
    clean = workspace.task.train.take(clean_subset(workspace, seed))
    chosen = np.random.default_rng(seed).permutation(len(workspace.task.test))[:images]
    test = workspace.task.test.take(np.sort(chosen))
    found = scan(classifier, model.variables, clean.images)
    target = entry.attack.target if entry else found.tests["per_sample"].smallest
    repaired = bj.TAC(target=target, steps=steps).repair(
        jax.random.key(seed), classifier, model.variables, clean, scan=found
    )
    rows = []
    for share in SHARES:
        point = between(model.variables, repaired.variables, share)
        for kind in ("interpolated", "reestimated"):
            if kind == "reestimated":
                point = reestimated(classifier, point, clean.images)
            rates = look(classifier, point, test, model, target, found.perturbations.vectors[target])
            distance = scan(classifier, point, clean.images).per_sample
            about = {"attack": model.label, "seed": seed, "target": target, "share": share, "statistics": kind}
            others = float(np.median(np.delete(distance, target)))
            rows.append({**about, **rates, "distance": float(distance[target]), "distance_of_others": others})
    return rows


def look(
    classifier: Any, variables: Any, test: Any, model: Any, target: int, perturbation: np.ndarray
) -> dict[str, Any]:
    """Rates of a model, its loss on clean test images, and what the trigger does to latents and the target's lead."""
    import jax.numpy as jnp

    from backdoor_jax.data import triggered
    from backdoor_jax.metrics import success_rates
    from backdoor_jax.training import cross_entropy, latents

    latent, labels = latents(classifier, variables, test.images), np.asarray(test.labels)
    logits = classifier.head(variables, latent)
    rates: dict[str, Any] = {
        "acc": float(np.mean(np.argmax(logits, -1) == labels)),
        "loss": float(jnp.mean(cross_entropy(logits, test.labels))),
    }
    if model.trigger is None:
        return rates
    after = latents(classifier, variables, triggered(model.trigger, test.images))
    logits, others = np.asarray(classifier.head(variables, after)), labels != target
    rates["asr"], rates["ra"] = success_rates(logits.argmax(-1), labels, model.label_map)
    change = np.asarray(after - latent)[others].mean(0)
    rates["lead"] = float(np.mean((logits[:, target] - np.delete(logits, target, 1).max(1))[others]))
    rates["change"] = float(np.linalg.norm(change))
    rates["cosine"] = float(change @ perturbation / np.linalg.norm(change) / np.linalg.norm(perturbation))
    return rates


def reestimated(classifier: Any, variables: Any, images: Any) -> Any:
    """The variables with normalization statistics estimated again, from batches of 100."""
    import jax

    batches = [images[start : start + 100] for start in range(0, len(images) - 99, 100)] * PASSES
    update = jax.jit(lambda variables, batch: classifier.logits(variables, batch, train=True)[1])
    for batch in batches:
        variables = update(variables, batch)
    return variables


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """ASR, accuracy, and the target's distance against that of the other classes, along the line."""
    from matplotlib.figure import Figure

    from backdoor_jax.drawing import COLORS, save_figure

    rows = [row for row in rows if row["statistics"] == "interpolated"]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    figure = Figure(figsize=(9.5, 3))
    panels = figure.subplots(1, 3)
    for name, color in zip(names, COLORS, strict=False):
        line = sorted((row for row in rows if row["attack"] == name), key=lambda row: row["share"])
        shares = [row["share"] for row in line]
        shown = [
            [100 * row.get("asr", np.nan) for row in line],
            [100 * row["acc"] for row in line],
            [row["distance"] / row["distance_of_others"] for row in line],
        ]
        for panel, values in zip(panels, shown, strict=True):
            panel.plot(shares, values, color=color, marker=".", label="clean model" if name == "none" else name)
    titles = ("ASR (%)", "ACC (%)", "target's distance / other classes'")
    for panel, title in zip(panels, titles, strict=True):
        panel.axvline(0.6, color="0.7", linewidth=0.8, linestyle="--")
        panel.set(title=title, xlabel="share of the way")
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
