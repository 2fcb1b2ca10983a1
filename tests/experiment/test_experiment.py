"""Experiments in miniature: the fields of rows, clean models, resuming, refused folders, and early checks."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backdoor_jax import (
    D3,
    PADFT,
    TAC,
    BadNets,
    Blended,
    Classifier,
    Dataset,
    FineTune,
    NonFiniteError,
    TrainConfig,
    UserError,
    load_model,
)
from backdoor_jax.attacks import SIG, SSBA, AdapBlend, Attack, LabelConsistent, LowFrequency, TrojanNN, WaNet, base
from backdoor_jax.data import Poisoned
from backdoor_jax.defenses import DEFENSES as METHODS
from backdoor_jax.errors import FailedRepairs
from backdoor_jax.experiment import (
    AttackEntry,
    DataConfig,
    DefenseEntry,
    Experiment,
    ModelConfig,
    append_row,
    format_row,
    read_rows,
    run_experiment,
    victims,
)
from backdoor_jax.experiment.rows import Row
from backdoor_jax.models import MODELS, Architecture
from backdoor_jax.training import train

CONTRACT = (
    "experiment", "dataset", "model", "attack", "poison_rate", "defense", "method", "clean_ratio", "data_used",
    "n_used", "seed", "acc", "asr", "ra", "der", "acc_before", "asr_before", "ra_before",
    "near_chance", "target", "seconds", "compile_seconds", "device", "versions", "commit", "config", "info",
)  # fmt: skip
"""Fields of a row, which documentation and reports rely on."""
RATES = ("acc", "asr", "ra", "der", "acc_before", "asr_before", "ra_before")
BADNETS = AttackEntry("badnets", BadNets(target=1))
FINETUNE = DefenseEntry("finetune", FineTune(steps=2))
DEFENSES = (
    DefenseEntry("pad_ft", PADFT(per_class=2, bound_epochs=2, tune_epochs=2)),
    FINETUNE,
    DefenseEntry("tac_detected", TAC(steps=2)),
    DefenseEntry("tac_smallest", TAC(target="smallest", steps=2)),
    DefenseEntry("tac_known", TAC(steps=2), known_target=True),
)
SMALL = Experiment(
    "small",
    (BADNETS,),
    (FINETUNE,),
    DataConfig("digits", train_size=96, test_size=48),
    ModelConfig("tiny", width=16),
    TrainConfig(epochs=1),
    clean_ratio=0.5,
)
COMPLETE = dataclasses.replace(SMALL, defenses=DEFENSES)


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tiny_classifier: Classifier) -> Iterator[None]:
    """Registers the suite's smallest network; a larger one would spend most of the time compiling."""
    network = type(tiny_classifier.network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Architecture(lambda classes, width: network(classes, width), "one layer"))
        yield


def run(experiment: Experiment, out: Path, **options: Any) -> list[Row]:
    return run_experiment(experiment, out, **{"report": lambda line: None, **options})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of all defenses; copy it to change it."""
    out = tmp_path_factory.mktemp("runs") / "complete"
    run(COMPLETE, out)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of fine-tuning alone."""
    out = tmp_path_factory.mktemp("runs") / "small"
    run(SMALL, out)
    return out


@pytest.fixture(scope="module")
def rows(done: Path) -> list[Row]:
    return read_rows(done / "results.jsonl")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a victim was trained")

    monkeypatch.setattr(victims, "train", refuse)


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def reproducible(rows: list[Row]) -> list[Row]:
    """What must be the same in every run of an experiment."""
    return [
        {name: row[name] for name in CONTRACT if name not in ("seconds", "compile_seconds", "info")} for row in rows
    ]


def models(rows: list[Row]) -> list[tuple[str, int, str]]:
    return [(row["attack"], row["seed"], row["defense"]) for row in rows]


# Rows


def test_every_defense_is_run_on_every_victim_and_clean_model_in_order(rows: list[Row]) -> None:
    labels = [entry.label for entry in DEFENSES]
    with_oracle = [("badnets", 0, label) for label in ["none", *labels]]
    without = [("none", 0, label) for label in ["none", *labels] if label != "tac_known"]
    assert models(rows) == with_oracle + without


def test_rows_have_the_documented_fields_and_no_others(rows: list[Row]) -> None:
    for row in rows:
        assert sorted(row) == sorted(CONTRACT)


def test_rates_are_shares_and_a_clean_model_has_only_an_accuracy(rows: list[Row]) -> None:
    for row in rows:
        for name in RATES:
            if row["attack"] == "none" and not name.startswith("acc"):
                assert row[name] is None
            else:
                assert 0 <= row[name] <= 1
        assert row["poison_rate"] == (0.1 if row["attack"] == "badnets" else 0)


def test_der_is_computed_from_the_rates_of_the_row(rows: list[Row]) -> None:
    for row in rows:
        if row["attack"] == "badnets":
            gain, loss = (max(0, row[f"{name}_before"] - row[name]) for name in ("asr", "acc"))
            assert row["der"] == pytest.approx((gain - loss + 1) / 2, abs=1e-5)


def test_rows_repeat_the_rates_of_the_victim(rows: list[Row]) -> None:
    own = {row["attack"]: row for row in rows if row["defense"] == "none"}
    for row in rows:
        for name in ("acc", "asr", "ra"):
            assert row[f"{name}_before"] == own[row["attack"]][name]


def test_rows_say_which_data_a_defense_received(rows: list[Row]) -> None:
    used = {row["defense"]: (row["data_used"], row["n_used"], row["clean_ratio"]) for row in rows}
    assert used == {
        "none": ("nothing", 0, 0.0),
        "pad_ft": ("training_set", 96, 0.0),
        **dict.fromkeys(("finetune", "tac_detected", "tac_smallest", "tac_known"), ("clean", 48, 0.5)),
    }


def test_an_oracle_receives_the_attackers_target_and_says_so(rows: list[Row]) -> None:
    known, smallest = (next(row for row in rows if row["defense"] == label) for label in ("tac_known", "tac_smallest"))
    assert (known["target"], known["info"]["oracle"], known["config"]["defense"]["target"]) == (1, True, 1)
    assert smallest["info"]["oracle"] is False
    norms = np.array(smallest["info"]["scan"]["per_sample"], np.float64)
    assert smallest["target"] == np.nanargmin(norms)


def test_poisoned_images_among_the_purified_ones_are_counted(rows: list[Row]) -> None:
    found = {row["attack"]: row["info"] for row in rows if row["defense"] == "pad_ft"}
    assert 0 <= found["badnets"]["purified_poisoned"] <= 10
    assert found["none"]["purified_poisoned"] == 0
    assert all("kept" not in info and info["purified"] == 20 for info in found.values())


def test_rows_hold_the_method_beside_its_label(rows: list[Row]) -> None:
    methods = {row["defense"]: row["method"] for row in rows}
    assert methods == {"none": "none"} | {entry.label: entry.defense.name for entry in DEFENSES}
    assert set(methods.values()) - {"none"} <= METHODS.keys()


def test_entries_with_equal_settings_get_equal_rates(tmp_path: Path) -> None:
    again = DefenseEntry("again", FINETUNE.defense)
    rows = run(dataclasses.replace(SMALL, defenses=(FINETUNE, again)), tmp_path / "out")
    first, second = (next(row for row in rows if row["defense"] == label) for label in ("finetune", "again"))
    assert [second[name] for name in RATES] == [first[name] for name in RATES]


def test_rows_survive_json(done: Path, rows: list[Row], no_training: None) -> None:
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [json.loads(line) for line in (done / "results.jsonl").read_text().splitlines()] == rows


def test_the_rows_returned_are_those_written(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(SMALL, out) == read_rows(out / "results.jsonl")


def test_the_lines_reported_are_those_of_the_rows(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = run(SMALL, tmp_path / "out", report=lines.append)
    assert lines == [format_row(row) for row in rows]


def test_no_temporary_file_is_left(done: Path) -> None:
    assert not [path for path in done.rglob("*") if "partial" in path.name]
    assert {path.name for path in done.iterdir()} == {"results.jsonl", "experiment.json", "victims", "examples"}


# Resuming


def test_a_complete_experiment_run_again_does_nothing(
    done: Path, rows: list[Row], no_training: None, tmp_path: Path
) -> None:
    before = snapshot(done)
    lines: list[str] = []
    assert run(COMPLETE, done, report=lines.append) == rows
    assert lines == []
    assert snapshot(done) == before


def test_another_folder_gets_the_same_rows(small: Path, tmp_path: Path) -> None:
    assert reproducible(run(SMALL, tmp_path / "out")) == reproducible(read_rows(small / "results.jsonl"))


@pytest.mark.parametrize("lost", [1, 2])
def test_removed_rows_are_made_again_from_the_stored_victims(
    done: Path, rows: list[Row], no_training: None, tmp_path: Path, lost: int
) -> None:
    out = copied(done, tmp_path)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:-lost]))
    again = run(COMPLETE, out)
    assert again[:-lost] == rows[:-lost]
    assert reproducible(again) == reproducible(rows)


def test_a_run_killed_after_two_rows_resumes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    lines: list[str] = []

    def die(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMALL, out, report=die)
    kept = read_rows(out / "results.jsonl")
    assert models(kept) == [("badnets", 0, "none"), ("badnets", 0, "finetune")]

    names: list[str] = []
    monkeypatch.setattr(victims, "train", counting(train, names))
    rows = run(SMALL, out)
    assert names == ["none-0"]
    assert rows[:2] == kept
    assert reproducible(rows) == reproducible(read_rows(small / "results.jsonl"))


def test_a_run_killed_between_writing_weights_and_seconds_resumes(small: Path, tmp_path: Path) -> None:
    out = copied(small, tmp_path)
    (out / "results.jsonl").unlink()
    (out / "victims" / "none-0" / "timing.json").unlink()
    assert reproducible(run(SMALL, out)) == reproducible(read_rows(small / "results.jsonl"))


def test_stored_victims_are_models_that_can_be_loaded(small: Path) -> None:
    folder = small / "victims" / "badnets-0"
    described = json.loads((folder / "model.json").read_text())
    assert (described["classes"], described["format"]) == (10, 1)
    _, variables = load_model(folder, classifier=Classifier(MODELS["tiny"].build(10, 16), 10))
    assert variables["params"]["linear"]["kernel"].shape == (16, 10)


def test_an_invalid_line_of_results_is_named(small: Path, tmp_path: Path) -> None:
    out = copied(small, tmp_path)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join([*lines[:2], lines[2][:40] + "\n", *lines[3:]]))
    with pytest.raises(UserError, match=r"results\.jsonl: line 3 is not JSON"):
        run(SMALL, out)


# Attacks that fit a trigger


FITTED = (
    AttackEntry("ssba", SSBA(bits=4, epochs=2, channels=2, depth=1)),
    AttackEntry("trojan_nn", TrojanNN(steps=3, target=2)),
    AttackEntry("covered", AdapBlend(rate=0.1, cover_rate=0.1)),
    AttackEntry("label_consistent", LabelConsistent(robust_epochs=0, steps=2, rate=0.05, target=1)),
    AttackEntry("adaptive", BadNets(target=1), dataclasses.replace(SMALL.victim, sam_radius=1.0)),
)
FITTING = dataclasses.replace(SMALL, attacks=FITTED, defenses=DEFENSES[:1])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a finished run of these attacks, and the names of all trainings in order."""
    out, names = tmp_path_factory.mktemp("runs") / "fitted", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for module in (victims, base):
            patch.setattr(module, "train", counting(train, names))
        run(FITTING, out)
    return out, names


def counting(original: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        names.append(options["name"])
        return original(*args, **options)

    return counted


def test_a_clean_model_that_an_attack_needs_is_trained_before_it_and_once(fitted: tuple[Path, list[str]]) -> None:
    assert fitted[1] == ["ssba-0", "none-0", "trojan_nn-0", "covered-0", "label_consistent-0", "adaptive-0"]


def test_rows_hold_details_of_the_attack_and_the_settings_of_the_training(fitted: tuple[Path, list[str]]) -> None:
    rows = {row["attack"]: row for row in read_rows(fitted[0] / "results.jsonl") if row["defense"] == "none"}
    assert list(rows) == ["ssba", "trojan_nn", "covered", "label_consistent", "adaptive", "none"]
    assert rows["ssba"]["info"].keys() >= {"decoding_accuracy", "psnr", "poisoned"}
    assert len(rows["trojan_nn"]["info"]["neurons"]) == 2
    assert [rows[name]["info"]["poisoned"] for name in rows] == [10, 10, 10, 5, 10, 0]
    assert rows["adaptive"]["config"]["victim"] == dataclasses.asdict(FITTED[-1].victim)  # type: ignore[arg-type]
    assert rows["ssba"]["config"]["victim"] == dataclasses.asdict(SMALL.victim)


def test_removed_rows_are_made_again_without_any_training(
    fitted: tuple[Path, list[str]], tmp_path: Path, no_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(fitted[0], tmp_path)
    rows = read_rows(out / "results.jsonl")
    (out / "results.jsonl").unlink()

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(Attack, "train_victim_in", refuse)
    for entry in FITTED:
        if entry.attack.fits_trigger:
            monkeypatch.setattr(type(entry.attack), "fit_trigger", refuse)
            monkeypatch.setattr(type(entry.attack), "poison_data", refuse)
    again = run(FITTING, out)
    assert reproducible(again) == reproducible(rows)
    # A defense finds the same in the training set, so the poison and its indices are the same.
    purified = [[row["info"].get("purified_poisoned") for row in some] for some in (again, rows)]
    assert purified[0] == purified[1]


def test_a_poisoned_set_is_stored_as_its_difference_from_the_clean_one(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8), np.arange(20, dtype=np.int32) % 5
    clean = Dataset(jnp.asarray(images), jnp.asarray(labels))
    indices = np.array([2, 5, 11])
    # Relabeled and changed; only relabeled; only changed, as a cover image is; poisoned but equal to the clean image.
    data = Dataset(clean.images.at[jnp.array([2, 7])].add(1), clean.labels.at[jnp.array([2, 5])].set(4))
    victims.save_poisoned(tmp_path / "poisoned.npz", Poisoned(data, indices), clean)
    loaded = victims.load_poisoned(tmp_path / "poisoned.npz", clean)
    for got, expected in (
        (loaded.data.images, data.images),
        (loaded.data.labels, data.labels),
        (loaded.indices, indices),
    ):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
    with np.load(tmp_path / "poisoned.npz") as arrays:
        assert arrays["changed"].tolist() == [2, 5, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["poisoned.npz"]


@pytest.mark.parametrize(("labels", "applies"), [("all_to_one", True), ("clean_label", True), ("all_to_all", False)])
def test_a_known_target_needs_an_attack_with_one(labels: Any, applies: bool) -> None:
    known = DefenseEntry("known", TAC(), known_target=True)
    assert known.applies(SIG(labels=labels)) is applies
    assert not known.applies(None)


# Folders


CHANGES: dict[str, Callable[[Experiment], Experiment]] = {
    "name": lambda e: dataclasses.replace(e, name="other"),
    "data": lambda e: dataclasses.replace(e, data=DataConfig("digits", train_size=95, test_size=48)),
    "model": lambda e: dataclasses.replace(e, model=ModelConfig("tiny", width=8)),
    "victim": lambda e: dataclasses.replace(e, victim=TrainConfig(epochs=2)),
    "clean_ratio": lambda e: dataclasses.replace(e, clean_ratio=0.25),
    "stratified": lambda e: dataclasses.replace(e, stratified=True),
    "'badnets'": lambda e: dataclasses.replace(e, attacks=(AttackEntry("badnets", BadNets(rate=0.2, target=1)),)),
    "'finetune'": lambda e: dataclasses.replace(e, defenses=(DefenseEntry("finetune", D3(steps=2)),)),
}


@pytest.mark.parametrize("part", CHANGES)
def test_the_folder_of_another_experiment_is_refused_and_not_changed(small: Path, no_training: None, part: str) -> None:
    before = snapshot(small)
    with pytest.raises(UserError, match=part) as caught:
        run(CHANGES[part](SMALL), small)
    assert str(small) in str(caught.value)
    assert "--out" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(small) == before


def test_an_option_of_the_model_is_recorded(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {row["model"] for row in read_rows(small / "results.jsonl")} == {"tiny-16"}

    tiny = MODELS["tiny"]
    optional = Architecture(lambda classes, width, patch=1: tiny.build(classes, width), "one layer", options=("patch",))
    monkeypatch.setitem(MODELS, "tiny", optional)
    experiment = dataclasses.replace(SMALL, model=ModelConfig("tiny", 16, patch=2), defenses=())
    with pytest.raises(UserError, match="model is"):
        run(experiment, copied(small, tmp_path))
    rows = run(experiment, tmp_path / "out")
    assert {row["model"] for row in rows} == {"tiny-16-patch=2"}
    recorded = json.loads((tmp_path / "out" / "experiment.json").read_text())["model"]
    assert recorded == {"name": "tiny", "width": 16, "stem": None, "patch": 2, "dtype": "float32"}
    assert run(experiment, tmp_path / "out") == rows


@pytest.mark.parametrize("name", ["notes.txt", "victims"])
def test_a_foreign_folder_is_refused_and_not_changed(tmp_path: Path, no_training: None, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UserError, match="not the folder of an experiment; give another --out"):
        run(SMALL, out)
    assert snapshot(out) == {name: b"mine"}


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"name": "other"}'])
def test_a_folder_with_a_foreign_experiment_file_is_refused(tmp_path: Path, no_training: None, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "experiment.json").write_text(content)
    with pytest.raises(UserError, match="--out"):
        run(SMALL, out)
    assert snapshot(out) == {"experiment.json": content.encode()}


def test_a_run_that_made_nothing_has_no_claim_to_its_folder(small: Path, no_training: None, tmp_path: Path) -> None:
    described = {**json.loads((small / "experiment.json").read_text()), "clean_ratio": 0.9}
    (tmp_path / "experiment.json").write_text(json.dumps(described))
    (tmp_path / "victims").mkdir()
    with pytest.raises(AssertionError, match="trained"):
        run(SMALL, tmp_path)
    assert json.loads((tmp_path / "experiment.json").read_text())["clean_ratio"] == SMALL.clean_ratio
    (tmp_path / "experiment.json").write_text(json.dumps(described))
    (tmp_path / ".seed-7.lock").touch()
    with pytest.raises(UserError, match="holds another experiment"):
        run(SMALL, tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, no_training: None) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="--out"):
        run(SMALL, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert len(run(dataclasses.replace(SMALL, defenses=()), tmp_path)) == 2


def test_a_seed_and_a_defense_can_be_added(small: Path, tmp_path: Path) -> None:
    out = copied(small, tmp_path)
    kept = read_rows(out / "results.jsonl")
    harder = DefenseEntry("harder", FineTune(steps=3))
    rows = run(dataclasses.replace(SMALL, defenses=(FINETUNE, harder), seeds=(0, 1)), out)
    assert [row for row in rows if row in kept] == kept
    assert set(models(rows)) == {
        (attack, seed, defense)
        for attack in ("badnets", "none")
        for seed in (0, 1)
        for defense in ("none", "finetune", "harder")
    }
    assert len(rows) == 12
    by_model = {(row["attack"], row["seed"], row["defense"]): row for row in rows}
    assert by_model["badnets", 0, "harder"]["acc_before"] == by_model["badnets", 0, "none"]["acc"]
    assert run(SMALL, out) == rows
    with pytest.raises(UserError, match="'harder'"):
        run(dataclasses.replace(SMALL, defenses=(DefenseEntry("harder", FineTune(steps=4)),)), out)


# Errors


def npz(path: Path, labels: int, classes: int) -> str:
    """Noise in the shapes of `SMALL`, so that nothing is compiled for it."""
    images = np.random.default_rng(0).integers(0, 256, (144, 16, 16, 3), dtype=np.uint8)
    marks = np.arange(144) % labels
    names = [f"class {number}" for number in range(classes)]
    np.savez(
        path,
        train_images=images[:96],
        train_labels=marks[:96],
        test_images=images[96:],
        test_labels=marks[96:],
        class_names=names,
    )
    return str(path)


def with_attack(attack: Any) -> Experiment:
    return dataclasses.replace(SMALL, attacks=(AttackEntry("badnets", attack),))


def with_model(model: ModelConfig) -> Experiment:
    return dataclasses.replace(SMALL, model=model)


def with_data(data: DataConfig) -> Experiment:
    return dataclasses.replace(SMALL, data=data)


IMPOSSIBLE: dict[str, tuple[Callable[[Path], Experiment], str]] = {
    "missing file": (lambda tmp: with_data(DataConfig("nowhere.npz")), r"nowhere\.npz: no such file"),
    "unknown source": (lambda tmp: with_data(DataConfig("imagenet")), "unknown data 'imagenet'"),
    "too many images": (lambda tmp: with_data(DataConfig("digits", train_size=2000)), "lower train_size"),
    "label out of range": (
        lambda tmp: with_data(DataConfig(npz(tmp / "data.npz", labels=5, classes=3))),
        "labels run from 0 to 4, expected 0 to 3 - 1",
    ),
    "unknown model": (lambda tmp: with_model(ModelConfig("vgg19")), "unknown model 'vgg19'"),
    "option of another model": (lambda tmp: with_model(ModelConfig("tiny", stem="small")), "'tiny' has no stem"),
    "images too small": (lambda tmp: with_model(ModelConfig("vgg19_bn", 2)), "16x16 are too small"),
    "patches that do not fit": (lambda tmp: with_model(ModelConfig("vit_tiny", 2, patch=5)), "patches of 5x5 .* 16x16"),
    "target out of range": (lambda tmp: with_attack(BadNets(target=10)), "target class 10 does not exist"),
    "patch larger than images": (lambda tmp: with_attack(BadNets(size=17)), "larger than the 16x16 images"),
    "clean labels of too few": (lambda tmp: with_attack(SIG(rate=0.5)), r"SIG\.rate is 0\.5, .* give at most 0\."),
    "cover of nothing": (lambda tmp: with_attack(AdapBlend(rate=0.1)), r"rate 0\.003 of 96 images poisons none"),
    "pattern that is missing": (lambda tmp: with_attack(LowFrequency(pattern="nowhere.npy")), r"nowhere\.npy"),
    "picture that is missing": (lambda tmp: with_attack(Blended(image="nowhere.png")), r"nowhere\.png"),
    "target of a defense out of range": (
        lambda tmp: dataclasses.replace(SMALL, defenses=(DefenseEntry("tac", TAC(target=10)),)),
        "TAC.target is 10",
    ),
    "crop of a victim": (
        lambda tmp: dataclasses.replace(SMALL, victim=TrainConfig(crop=16)),
        "victim: crop is 16 for images with a side of 16",
    ),
    "crop of a defense": (
        lambda tmp: dataclasses.replace(SMALL, defenses=(DefenseEntry("tuned", FineTune(crop=10**6)),)),
        "tuned: crop is 1000000",
    ),
    "clean share of nothing": (lambda tmp: dataclasses.replace(SMALL, clean_ratio=0.001), "leaves none"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_settings_that_the_data_rule_out_are_refused_before_any_training(
    tmp_path: Path, no_training: None, case: str
) -> None:
    make, expected = IMPOSSIBLE[case]
    with pytest.raises(UserError, match=expected):
        run(make(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_relative_data_path_starts_at_the_given_root(tmp_path: Path) -> None:
    npz(tmp_path / "data.npz", labels=10, classes=10)
    experiment = dataclasses.replace(with_data(DataConfig("data.npz")), defenses=())
    assert [row["dataset"] for row in run(experiment, tmp_path / "out", root=tmp_path)] == ["data", "data"]


def test_images_are_mirrored_where_the_data_allow_it_unless_set(tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 10
    arrays: dict[str, Any] = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images,
        "test_labels": labels,
    }
    np.savez(tmp_path / "mirrored.npz", **arrays, flip=np.bool_(True))
    never = DefenseEntry("never", FineTune(steps=2, flip=False))
    experiment = dataclasses.replace(
        SMALL, data=DataConfig(str(tmp_path / "mirrored.npz")), attacks=(BADNETS,), defenses=(FINETUNE, never)
    )
    rows = run(experiment, tmp_path / "out")
    flips = {row["defense"]: row["config"]["defense"]["flip"] for row in rows if row["defense"] != "none"}
    assert flips == {"finetune": True, "never": False}


def test_a_victim_that_diverges_is_an_error_and_never_a_row(tmp_path: Path) -> None:
    wild = TrainConfig(epochs=4, batch_size=16, learning_rate=100, weight_decay=1)
    experiment = dataclasses.replace(SMALL, victim=wild)
    with pytest.raises(NonFiniteError, match="badnets-0"):
        run(experiment, tmp_path / "out")
    assert read_rows(tmp_path / "out" / "results.jsonl") == []


def test_a_repair_that_diverges_has_no_row_and_the_others_are_made(tmp_path: Path) -> None:
    wild = DefenseEntry("wild", FineTune(steps=60, batch_size=8, learning_rate=100, weight_decay=1, momentum=0.9))
    lines: list[str] = []
    with pytest.raises(FailedRepairs, match="2 repairs failed; wild on badnets-0: finetune"):
        run(dataclasses.replace(SMALL, defenses=(wild, FINETUNE)), tmp_path / "out", report=lines.append)
    made = [(attack, 0, defense) for attack in ("badnets", "none") for defense in ("none", "finetune")]
    assert models(read_rows(tmp_path / "out" / "results.jsonl")) == made
    assert sum(line.startswith("wild on ") for line in lines) == 2


def test_two_runs_in_one_folder_keep_each_others_rows(small: Path, tmp_path: Path) -> None:
    out = copied(small, tmp_path)

    def meanwhile(line: str) -> None:
        if line.startswith("badnets-1      none"):
            append_row(out / "results.jsonl", {**read_rows(out / "results.jsonl")[0], "seed": 7})

    rows = run(dataclasses.replace(SMALL, seeds=(1,)), out, report=meanwhile)
    assert sorted(row["seed"] for row in rows) == [0] * 4 + [1] * 4 + [7]
    assert json.loads((out / "experiment.json").read_text())["seeds"] == [0, 1]


def test_the_row_of_a_killed_run_is_made_again(small: Path, tmp_path: Path, no_training: None) -> None:
    out = copied(small, tmp_path)
    text = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(text[:-100])
    assert reproducible(run(SMALL, out)) == reproducible(read_rows(small / "results.jsonl"))
    assert (out / "results.jsonl").read_text().count("\n") == 4


def test_rows_without_analyses_are_reported(small: Path, tmp_path: Path, no_training: None) -> None:
    lines: list[str] = []
    run(dataclasses.replace(SMALL, analyses=("latents",)), copied(small, tmp_path), report=lines.append)
    assert lines[0].startswith("4 rows were made without analyses; remove them from ")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attacks": (BADNETS, BADNETS)}, "'badnets' is taken"),
        ({"defenses": (FINETUNE, FINETUNE)}, "'finetune' is taken"),
        ({"attacks": (AttackEntry("none", BadNets()),)}, "'none' is taken"),
        ({"attacks": ()}, "attacks is ()"),
        ({"seeds": ()}, "seeds is ()"),
        ({"clean_ratio": 0.0}, "clean_ratio is 0"),
        ({"analyses": ("verdict", "verdict")}, "each once"),
    ],
)
def test_an_inconsistent_experiment_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(SMALL, **changes)
    assert named in str(caught.value)


# Several devices and precisions


def test_victims_of_all_seeds_are_trained_at_once_over_several_devices(tmp_path: Path) -> None:
    adaptive, wanet = AdapBlend(target=1, rate=0.1, cover_rate=0.1), WaNet(target=1)
    attacks = (BADNETS, AttackEntry("adap_blend", adaptive), AttackEntry("wanet", wanet))
    both = dataclasses.replace(SMALL, seeds=(0, 1), attacks=attacks)
    with pytest.MonkeyPatch.context() as patch:
        alone = run(both, tmp_path / "alone")
        trained: list[str] = []
        train_many = victims.train_many

        def watch(*arguments: Any, **options: Any) -> Any:
            trained.append(options["name"])
            return train_many(*arguments, **options)

        patch.setattr(victims, "train_many", watch)
        together = run(both, tmp_path / "together", devices=jax.devices()[:2])
        assert trained == ["badnets, seeds 0, 1", "adap_blend, seeds 0, 1", "none, seeds 0, 1"]
        assert run(both, tmp_path / "together", devices=jax.devices()[:2]) == together
        assert len(trained) == 3
    for one, other in zip(alone, together, strict=True):
        assert [one[name] for name in ("attack", "seed", "defense")] == [
            other[name] for name in ("attack", "seed", "defense")
        ]
        assert other["acc"] == pytest.approx(one["acc"], abs=0.05)
    for label in ("badnets-1", "adap_blend-0", "none-1"):
        models = [load_model(tmp_path / folder / "victims" / label)[1] for folder in ("alone", "together")]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *models)


def test_rows_say_that_a_model_computes_in_bfloat16(tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL.model, name="small_cnn", width=2, dtype="bfloat16")
    rows = run(dataclasses.replace(SMALL, model=model), tmp_path / "half")
    assert {row["model"] for row in rows} == {"small_cnn-2-dtype=bfloat16"}
