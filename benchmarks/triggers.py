"""Draws every attack's trigger on one of the embedded digits: a clean image, the triggered image, their difference.

python benchmarks/triggers.py

Triggers that are trained come from short attacks on a small network; its ACC and ASR are printed, since not every
attack succeeds there. Takes some five minutes on one core.
"""

import argparse
import tempfile
from pathlib import Path

import measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/triggers.png"), help="the picture's file")
    measuring.command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    from backdoor_jax.attacks import (
        LIRA,
        SIG,
        SSBA,
        AdapBlend,
        BadNets,
        Blended,
        InputAware,
        LabelConsistent,
        LowFrequency,
        TrojanNN,
        WaNet,
    )
    from backdoor_jax.drawing import save_figure
    from backdoor_jax.experiment import AttackEntry, DataConfig, Experiment, ModelConfig, run_experiment
    from backdoor_jax.report.figures import triggers
    from backdoor_jax.training import TrainConfig

    attacks = {
        "adap_blend": AdapBlend(rate=0.05, cover_rate=0.05),
        "badnets": BadNets(),
        "blended": Blended(),
        "input_aware": InputAware(mask_epochs=10, mask_density=0.3, diversity_weight=0.0, cross_ratio=0.0, channels=8),
        "label_consistent": LabelConsistent(rate=0.08),
        "lira": LIRA(joint_epochs=10, channels=8, epsilon=0.05, generator_rate=0.001),
        "low_frequency": LowFrequency(),
        "sig": SIG(rate=0.08),
        "ssba": SSBA(bits=20, epochs=12, channels=8),
        "trojan_nn": TrojanNN(),
        "wanet": WaNet(crop=1),
    }
    experiment = Experiment(
        "triggers",
        tuple(AttackEntry(name, attack) for name, attack in attacks.items()),
        (),
        DataConfig("digits"),
        ModelConfig("small_cnn", width=16),
        TrainConfig(epochs=20, batch_size=32, crop=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        run_experiment(experiment, Path(folder))
        figure = triggers(Path(folder) / "examples", side_by_side=2)
    assert figure is not None
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
