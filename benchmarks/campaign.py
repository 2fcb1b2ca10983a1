"""The published protocol at full width: victims on all of CIFAR-10, every method at 5 % clean data, several seeds.

    python benchmarks/campaign.py --data data/cifar10.npz --out runs/campaign --platform gpu
    python benchmarks/campaign.py --tiny --platform cpu --out runs/tiny

Resumable, and made of steps that each end in minutes: `--minutes` stops before a new step once they are spent, and the
next call goes on. Rows are those of `backdoor-jax run` and land in OUT/run/results.jsonl. `--tiny` proves the script on
a CPU in about two minutes, on random images with a planted patch; its rates mean nothing.

Needs jax, flax, optax, orbax, numpy, scipy and jaxopt, and this repository on PYTHONPATH; nothing else.
"""

import argparse
import time
from pathlib import Path

import measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar10.npz", help="plain .npz, see prepare_data.py")
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"), help="folder for results")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), help="which backend (default: JAX's choice)")
    parser.add_argument(
        "--attacks", nargs="+", default=["badnets", "blended", "wanet"], help="names that `backdoor-jax list` shows"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new step after so many minutes")
    parser.add_argument("--tiny", action="store_true", help="prove the script on a CPU in about two minutes")
    arguments = parser.parse_args()
    measuring.use_platform(arguments.platform)

    from backdoor_jax.attacks import ATTACKS
    from backdoor_jax.errors import UserError
    from backdoor_jax.experiment import Experiment, run_experiment

    unknown = [name for name in arguments.attacks if name not in ATTACKS]
    if unknown:
        parser.error(f"unknown attack {unknown[0]!r}; known are {', '.join(ATTACKS)}")
    if arguments.tiny:
        experiment = tiny(arguments.out, arguments.attacks)
    else:
        experiment = published(arguments.data, arguments.attacks, tuple(arguments.seeds))
    assert isinstance(experiment, Experiment)
    end = time.monotonic() + 60 * arguments.minutes

    try:
        rows = run_experiment(
            experiment,
            arguments.out / "run",
            report=lambda text: print(text, flush=True),
            proceed=lambda: time.monotonic() < end,
        )
    except UserError as error:
        parser.exit(2, f"campaign: {error}\n")
    per_seed = (len(experiment.attacks) + 1) * (len(experiment.defenses) + 1)
    oracles = sum(entry.known_target for entry in experiment.defenses)
    wanted = len(experiment.seeds) * (per_seed - oracles)
    print(f"{len(rows)} of {wanted} rows are in {arguments.out / 'run' / 'results.jsonl'}")


def published(data: str, attacks: list[str], seeds: tuple[int, ...]) -> "Experiment":  # type: ignore[name-defined]  # noqa: F821
    """The benchmark's CIFAR-10 protocol: PreAct-ResNet18 at width 64, 100 epochs, 10 % poison, 5 % clean data."""
    from backdoor_jax.attacks import ATTACKS
    from backdoor_jax.defenses import (
        D3Config,
        FineTuneConfig,
        PadConfig,
        PadFtConfig,
        SuperFineTuneConfig,
        TacConfig,
    )  # fmt: skip
    from backdoor_jax.experiment import AttackEntry, DataConfig, DefenseEntry, Experiment

    return Experiment(
        "cifar10_published",
        tuple(AttackEntry(name, ATTACKS[name]()) for name in attacks),
        (
            DefenseEntry("finetune", "finetune", FineTuneConfig()),
            DefenseEntry("d3", "d3", D3Config()),
            DefenseEntry("d3_paper", "d3", D3Config.preset("paper")),
            DefenseEntry("sft_guide", "super_finetune", SuperFineTuneConfig.preset("guide")),
            DefenseEntry("sft_toolbox", "super_finetune", SuperFineTuneConfig.preset("toolbox_cifar10")),
            DefenseEntry("pad", "pad", PadConfig()),
            DefenseEntry("pad_ft", "pad_ft", PadFtConfig()),
            DefenseEntry("tac_detected", "tac", TacConfig()),
            DefenseEntry("tac_smallest", "tac", TacConfig(target="smallest")),
            DefenseEntry("tac_known", "tac", TacConfig(), known_target=True),
        ),
        DataConfig(data),
        seeds=seeds,
    )


def tiny(out: Path, attacks: list[str]) -> "Experiment":  # type: ignore[name-defined]  # noqa: F821
    """The same entries on 512 random images, with a narrow network and few steps."""
    import dataclasses

    import numpy as np

    from backdoor_jax.experiment import DataConfig, ModelConfig

    out.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    labels = np.arange(640) % 10
    images = generator.integers(0, 200, (640, 16, 16, 3)).astype(np.uint8)
    images[np.arange(640), labels, :, :] = 250
    data = out / "tiny.npz"
    np.savez(
        data, train_images=images[:512], train_labels=labels[:512], test_images=images[512:], test_labels=labels[512:]
    )

    whole = published(str(data.resolve()), attacks, (0,))
    short = {"steps": 4, "bound_epochs": 2, "tune_epochs": 2}
    defenses = tuple(
        dataclasses.replace(
            entry,
            config=dataclasses.replace(
                entry.config,
                **{name: value for name, value in short.items() if hasattr(entry.config, name)},
            ),
        )
        for entry in whole.defenses
    )
    return dataclasses.replace(
        whole,
        name="tiny",
        data=DataConfig(str(data.resolve())),
        model=ModelConfig(width=4),
        victim=dataclasses.replace(whole.victim, epochs=2),
        defenses=defenses,
    )


if __name__ == "__main__":
    main()
