"""One of two processes that train one network together; `test_distributed.py` starts them.

    python distributed_run.py PORT PROCESS FOLDER EPOCHS

Process 0 writes the weights to FOLDER/trained.npz.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import backdoor_jax as bj
from backdoor_jax.config import numbers
from backdoor_jax.data import Augment
from backdoor_jax.training import CosineSGD, GradientStep, SupervisedLoss, fit


def train(folder: Path, epochs: int, devices: list[jax.Device]) -> None:
    """Trains over these devices, of whatever processes."""
    generator = np.random.default_rng(0)
    labels = np.arange(32) % 4
    images = generator.integers(0, 128, (32, 8, 8, 3), dtype=np.uint8)
    data = bj.make_dataset(images, labels, 4)
    classifier = bj.build_classifier("small_cnn", 4, width=2)
    step, constants = GradientStep(SupervisedLoss(classifier), CosineSGD(100)), numbers(bj.TrainConfig())
    state, history = fit(
        jax.random.key(0),
        step,
        step.init(classifier.init(jax.random.key(1), data.images), constants),
        data,
        constants,
        epochs=epochs,
        batch_size=8,
        augment=Augment(crop=1),
        sharding=NamedSharding(jax.make_mesh((len(devices),), ("data",), devices=devices), PartitionSpec("data")),
        checkpoints=folder / "training",
    )
    if jax.process_index() == 0:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.variables)]
        np.savez(folder / "trained.npz", *leaves, steps=len(history["loss"]))


if __name__ == "__main__":
    port, process, folder, epochs = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    train(Path(folder), int(epochs), jax.devices())
