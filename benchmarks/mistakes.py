"""How far accuracy falls when a model is given other images than in its training, or run with another stem.

    python benchmarks/mistakes.py --models 6 8 --population runs/detection \
        --data data/gtsrb_half.npz data/cifar10.npz data/cifar100_subset.npz

Clean ResNet-18s that `benchmarks/detection.py` trained, with the default stem, one mistake at a time on their test
images: normalization, order of channels, size, stem and order of classes. The error that
`backdoor_jax.app.loading.require_better_than_chance` raises names its causes in the order measured here. Writes
`results/mistakes.jsonl`, a row for each model and mistake, and prints them.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import detection
import jax
import jax.numpy as jnp
import numpy as np
from measuring import RESULTS

import backdoor_jax as bj
from backdoor_jax.data import load
from backdoor_jax.data.folders import resized
from backdoor_jax.metrics import is_near_chance
from backdoor_jax.models import NORMALIZATIONS

COUNT = 400
"""Test images of a model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, help="as given to detection.py")
    parser.add_argument("--models", type=int, nargs="+", required=True, help="numbers of clean ResNets")
    arguments = parser.parse_args()
    found = []
    for number in arguments.models:
        made = detection.plan(number, arguments.data)
        _, test, _ = detection.small_task(made, load(made.data))
        model = bj.load_model(arguments.population / f"{number}.safetensors")
        for mistake, accuracy, near in mistakes(*model, test):
            row = {"model": number, "data": Path(made.data).stem, "mistake": mistake}
            found.append({**row, "accuracy": accuracy, "near_chance": near})
            print(json.dumps(found[-1]), flush=True)
            (RESULTS / "mistakes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def mistakes(classifier: Any, variables: Any, test: Any) -> Iterator[tuple[str, float, bool]]:
    """Every mistake, the accuracy under it, and whether that is near chance."""
    images, labels = np.asarray(test.images[:COUNT]), np.asarray(test.labels[:COUNT])
    own = classifier.mean, classifier.std

    @partial(jax.jit, static_argnums=0)
    def predictions(classifier: Any, variables: Any, x: Any) -> Any:
        return jnp.argmax(classifier.logits_of_input(variables, x), -1)

    def judged(mistake: str, found: Any) -> tuple[str, float, bool]:
        correct = int(np.sum(np.asarray(found) == labels))
        return mistake, correct / len(labels), is_near_chance(correct, labels, classifier.num_classes)

    def inputs(images: np.ndarray, mean: Any = own[0], std: Any = own[1]) -> Any:
        return ((images / 255 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)

    right = predictions(classifier, variables, inputs(images))
    yield judged("none", right)
    ways = {**NORMALIZATIONS, "0.5/0.5": ((0.5,) * 3, (0.5,) * 3), "[0, 255]": ((0.0,) * 3, (1 / 255,) * 3)}
    for name, way in ways.items():
        if way != own:
            yield judged(f"normalization {name}", predictions(classifier, variables, inputs(images, *way)))
    yield judged("order of channels", predictions(classifier, variables, inputs(images[..., ::-1])))
    as_text = np.array(sorted(range(classifier.num_classes), key=str))
    yield judged("classes sorted as text", as_text[np.asarray(right)])
    yield judged("classes reversed", classifier.num_classes - 1 - np.asarray(right))
    for stem in ("small_pool", "small_stride"):
        other = bj.build_classifier("resnet18", classifier.num_classes, classifier.network.width, stem=stem)
        yield judged(f"stem {stem}", predictions(other, variables, inputs(images)))
    for side in (16, 48):
        yield judged(f"size {side}", predictions(classifier, variables, inputs(resized(images, (side, side)))))


if __name__ == "__main__":
    main()
