"""A newly installed package works: a backdoored model is trained, scanned, repaired, saved and read again.

python benchmarks/smoke.py
"""

import tempfile
from pathlib import Path

import jax

import backdoor_jax as bj


def main() -> None:
    task, attack = bj.digits(), bj.BadNets()
    classifier = bj.build_classifier("small_cnn", task.num_classes, width=8)
    training = bj.TrainConfig(epochs=10, batch_size=32, learning_rate=0.05, crop=1)
    victim = attack.train_victim(jax.random.key(0), classifier, task.train, training)
    clean = task.train.take(slice(200))
    target = bj.scan(classifier, victim.variables, clean.images).tests["per_sample"].smallest
    repair = bj.TAC(target=target, steps=50, crop=1).repair(jax.random.key(1), classifier, victim.variables, clean)
    with tempfile.TemporaryDirectory() as folder:
        bj.save_model(Path(folder) / "repaired.safetensors", classifier, repair.variables)
        again, variables = bj.load_model(Path(folder) / "repaired.safetensors")
    labels = attack.label_map(task.num_classes)
    before = bj.evaluate(classifier, victim.variables, task.test, victim.trigger, labels)
    after = bj.evaluate(again, variables, task.test, victim.trigger, labels)
    assert before.asr is not None and after.asr is not None
    rates = f"class {target}: ACC {before.acc:.3f} to {after.acc:.3f}, ASR {before.asr:.3f} to {after.asr:.3f}"
    if not (target == attack.target and before.asr > 0.5 and after.asr < 0.1 and after.acc > 0.7):
        raise SystemExit(f"backdoor_jax {bj.__version__} did not remove the backdoor of class {attack.target}: {rates}")
    print(f"backdoor_jax {bj.__version__} works: {rates}")


if __name__ == "__main__":
    main()
