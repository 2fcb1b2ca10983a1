"""A newly installed package works: a model is trained, scanned, repaired, saved and read again. Takes a minute.

python benchmarks/smoke.py
"""

import tempfile
from pathlib import Path

import jax

import backdoor_jax as bj


def main() -> None:
    task, attack = bj.digits(), bj.BadNets()
    classifier = bj.build_classifier("small_cnn", task.num_classes, width=4)
    training = bj.TrainConfig(epochs=2, batch_size=64, crop=1)
    victim = attack.train_victim(jax.random.key(0), classifier, task.train, training)
    clean = task.train.take(slice(100))
    target = bj.scan(classifier, victim.variables, clean.images).tests["per_sample"].smallest
    repair = bj.TAC(target=target, steps=5, crop=1).repair(jax.random.key(1), classifier, victim.variables, clean)
    with tempfile.TemporaryDirectory() as folder:
        bj.save_model(Path(folder) / "repaired.safetensors", classifier, repair.variables)
        again, variables = bj.load_model(Path(folder) / "repaired.safetensors")
    scores = bj.evaluate(again, variables, task.test, victim.trigger, attack.label_map(task.num_classes))
    print(f"backdoor_jax {bj.__version__} works: ACC {scores.acc:.3f}, ASR {scores.asr:.3f}, repaired class {target}")


if __name__ == "__main__":
    main()
