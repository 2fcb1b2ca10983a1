"""One of two processes that train one network together; `test_distributed.py` starts them.

    python distributed_run.py PORT PROCESS FOLDER EPOCHS

Process 0 writes the weights to FOLDER/trained.npz.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

import backdoor_jax as bj
from backdoor_jax.data import Augment
from backdoor_jax.training import SGD, Cosine, GradientStep, fit, supervised_loss


def train(folder: Path, epochs: int, devices: list[jax.Device]) -> None:
    """Trains on these devices, of any processes."""
    generator = np.random.default_rng(0)
    labels = np.arange(32) % 4
    images = generator.integers(0, 128, (32, 8, 8, 3), dtype=np.uint8)
    data = bj.make_dataset(images, labels, 4)
    classifier = bj.build_classifier("small_cnn", 4, width=2)
    optimizer = SGD(0.01, Cosine(100), momentum=0.9, weight_decay=5e-4)
    step = GradientStep(Partial(supervised_loss, classifier), optimizer)
    fitted = fit(
        jax.random.key(0),
        step,
        step.init(classifier.init(jax.random.key(1), data.images)),
        data,
        epochs=epochs,
        batch_size=8,
        augment=Augment(crop=1),
        sharding=NamedSharding(jax.make_mesh((len(devices),), ("data",), devices=devices), PartitionSpec("data")),
        checkpoints=folder / "training",
    )
    if jax.process_index() == 0:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(fitted.variables)]
        np.savez(folder / "trained.npz", *leaves, steps=len(fitted.history["loss"]))


if __name__ == "__main__":
    port, process, folder, epochs = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    train(Path(folder), int(epochs), jax.devices())
