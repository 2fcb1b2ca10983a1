"""Experiments on real worker processes: they change no result, and lost workers, schedulers and space end well."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import pytest

from backdoor_jax import BadNets, FineTune, TrainConfig, UserError, load_model
from backdoor_jax.attacks import AttackContext, Victim
from backdoor_jax.cli import main
from backdoor_jax.data import Dataset
from backdoor_jax.defenses import Repair
from backdoor_jax.experiment import (
    AttackEntry,
    DataConfig,
    DefenseEntry,
    Experiment,
    ModelConfig,
    read_rows,
    run_experiment,
)
from backdoor_jax.files import held
from backdoor_jax.interop.checkpoints import Checkpoints
from backdoor_jax.models import Classifier, Variables

pytest.importorskip("distributed", reason="Dask: pip install 'backdoor_jax[distributed]'")

from backdoor_jax.experiment.workers import local_workers, read_profile, slurm_workers, workers_of

TIMES = ("seconds", "compile_seconds", "info")
"""Fields of a row that say how it was made: `info` whether a training was resumed."""


def die_once(marker: str) -> None:
    """Kills this process, unless an earlier one was killed here; where there is no marker, it never does."""
    if marker and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class FatalBadNets(BadNets):
    """An attack whose first training is killed after its first epoch."""

    marker: str = ""

    def train_victim_in(self, context: AttackContext, *keys: Any, **options: Any) -> Victim:
        save = Checkpoints.save

        def save_and_die(checkpoints: Checkpoints, number: int, tree: Any) -> None:
            save(checkpoints, number, tree)
            die_once(self.marker)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_and_die)
            return super().train_victim_in(context, *keys, **options)


@dataclasses.dataclass(frozen=True)
class FatalFineTune(FineTune):
    """A defense whose first repair is killed."""

    marker: str = ""

    def repair(self, key: Any, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        die_once(self.marker)
        return super().repair(key, classifier, variables, data)


def experiment(attack_marker: str = "", defense_marker: str = "") -> Experiment:
    return Experiment(
        "small",
        (AttackEntry("badnets", FatalBadNets(target=1, marker=attack_marker)),),
        (DefenseEntry("finetune", FatalFineTune(steps=2, marker=defense_marker)),),
        DataConfig("digits", train_size=96, test_size=48),
        ModelConfig("small_cnn", width=2),
        TrainConfig(epochs=2, batch_size=48),
        clean_ratio=0.5,
    )


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with local_workers(2) as client:
        yield client


def run(client: Any, made: Experiment, out: Path, report: Callable[[str], None] = lambda line: None) -> list[Any]:
    return run_experiment(made, out, report=report, client=client)


def limit_files(size: int) -> None:
    """Lets this process write no file larger than this, which is what a full disk is like; -1 lifts it."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_workers_that_are_killed_while_they_train_and_repair_change_no_bit(client: Any, tmp_path: Path) -> None:
    markers = [str(tmp_path / name) for name in ("training", "repair")]
    killed = run(client, experiment(*markers), tmp_path / "killed")
    assert all(Path(marker).exists() for marker in markers)
    assert [row["info"].get("resumed") for row in killed if (row["attack"], row["defense"]) == ("badnets", "none")] == [
        True
    ]

    client.cluster.scale(1)
    client.run(limit_files, 2000)
    with pytest.raises((UserError, OSError), match=r"cannot be written|File too large"):
        run(client, experiment(), tmp_path / "one")
    client.run(limit_files, -1)
    assert read_rows(tmp_path / "one" / "results.jsonl") == []

    one = run(client, experiment(), tmp_path / "one")
    assert [(row["attack"], row["defense"]) for row in one] == [
        ("badnets", "none"), ("badnets", "finetune"), ("none", "none"), ("none", "finetune")
    ]  # fmt: skip
    for rows in (one, killed):
        for row in rows:
            row["config"] = None  # It names the markers.
            for name in TIMES:
                row.pop(name)
    assert one == killed
    for name in ("badnets-0", "none-0"):
        models = [load_model(tmp_path / folder / "victims" / name)[1] for folder in ("one", "killed")]
        chex.assert_trees_all_equal(*models)


@pytest.mark.slow
def test_a_second_scheduler_is_refused_and_a_lost_one_leaves_a_folder_that_resumes(client: Any, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    out.mkdir()
    with held(out, ["seed-0"]), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        run(client, experiment(), out)
    with pytest.raises(UserError, match="the scheduler is gone; run this again"):
        run(client, experiment(), out, report=lambda line: client.cluster.close())
    assert len(read_rows(out / "results.jsonl")) == 1
    models = dataclasses.replace(experiment(), defenses=())  # Repairs would only take longer.
    assert {row["attack"] for row in run_experiment(models, out, report=lambda line: None)} == {"badnets", "none"}


def test_what_cannot_be_a_cluster_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="give 1 or more"), local_workers(0):
        pass
    with pytest.raises(UserError, match="fix the address"), workers_of("nowhere"):
        pass
    profile = tmp_path / "profile.yaml"
    for text in ("", "cores: 2", "jobs: 0", "jobs: [", "jobs: true", "jobs: !!int x", "[" * 5000, "a: 2026-99-99"):
        profile.write_text(text)
        with pytest.raises(UserError, match=r"profile\.yaml"):
            read_profile(profile)
    profile.write_text("jobs: 2\ncores: 1\nmemory: 1GB")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"), slurm_workers(profile, tmp_path):
        pass
    with pytest.raises(SystemExit):
        main(["run", "x.yaml", "--workers", "2", "--slurm", "y.yaml"])
    assert "not allowed with argument" in capsys.readouterr().err
