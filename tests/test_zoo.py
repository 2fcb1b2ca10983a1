"""The zoo: made from a configuration, loaded with its recorded rates, refused where damaged, and scanned by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from make_zoo import pack

import backdoor_jax as bj
from backdoor_jax import BadNets, Blended, TrainConfig, UserError, evaluate, load
from backdoor_jax.attacks import Attack, WaNet
from backdoor_jax.cli import main
from backdoor_jax.experiment import AttackEntry, DataConfig, Experiment, ModelConfig, run_experiment

ROOT = Path(__file__).parents[1]
NAMES = ["digits/badnets-r20-s0", "digits/clean-s0"]
TINY = Experiment(
    "tiny",
    (AttackEntry("badnets-r20", BadNets(target=1, rate=0.2)),),
    (),
    DataConfig("digits", train_size=600, test_size=200),
    ModelConfig("small_cnn", width=8),
    TrainConfig(epochs=10, batch_size=20, learning_rate=0.05, crop=0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of one victim and a clean model."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("zoo")
    run_experiment(TINY, runs / "tiny", report=lambda line: None)
    pack(TINY, runs / "tiny", out)
    return out


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "zoo"))


def test_models_load_with_their_recorded_rates_trigger_and_recipe(folder: Path) -> None:
    assert bj.zoo.list(folder) == NAMES
    victim, clean = (bj.zoo.load(name, folder) for name in NAMES)
    task = load("digits", TINY.data.train_size, TINY.data.test_size)
    for found in (victim, clean):
        scores = evaluate(found.classifier, found.variables, task.test, found.trigger, found.label_map)
        chex.assert_trees_all_close(scores, found.scores)
        assert {leaf.dtype for leaf in jax.tree.leaves(found.variables)} == {np.dtype(np.float32)}
    assert victim.scores.acc > 0.8 and victim.scores.asr is not None and victim.scores.asr > 0.8
    assert victim.recipe["attack"] == {
        "name": "badnets",
        **json.loads(json.dumps(dataclasses.asdict(BadNets(target=1, rate=0.2)))),
    }
    assert len(victim.poisoned) == 120
    assert (clean.trigger, clean.label_map, clean.recipe["attack"]) == (None, None, None) and not len(clean.poisoned)


def test_a_damaged_file_and_a_damaged_index_are_refused(damaged: Path) -> None:
    path = damaged / f"{NAMES[0]}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged or another file"):
        bj.zoo.load(NAMES[0], damaged)
    index = json.loads((damaged / "index.json").read_text())
    rates, sizes = {"acc": "x", "asr": None, "ra": 5}, [10**9, 10**9, 3]
    for field, value in (
        *(("attack", {"name": "nothing"}), ("model", {"width": -1}), ("rates", {}), ("shape", [8])),
        *(("rates", rates), ("shape", sizes), ("shape", "883"), ("shape", [8.5, 8, 3])),
    ):
        (damaged / "index.json").write_text(json.dumps({NAMES[1]: index[NAMES[1]] | {field: value}}))
        with pytest.raises(UserError, match=r"copy the zoo again|expected"):
            bj.zoo.load(NAMES[1], damaged)
    (damaged / "index.json").write_text(json.dumps({"../x": {}}))
    with pytest.raises(UserError, match="no index of a zoo"):
        bj.zoo.list(damaged)
    with pytest.raises(UserError, match="BACKDOOR_JAX_ZOO"):
        bj.zoo.list(damaged / "nowhere")
    with pytest.raises(UserError, match="cannot be a name"):
        bj.zoo.save("../x", bj.zoo.Contents({}, None, np.arange(0)), {}, damaged)


def test_the_commands_take_a_name_and_bring_its_trigger(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BACKDOOR_JAX_ZOO", str(folder))
    monkeypatch.chdir(tmp_path)
    words = ["--checkpoint", f"zoo:{NAMES[0]}", "--data", "digits"]
    assert main(["defend", *words, "--defense", "clp", "--out", "out.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "of the triggered images classified as 1, " in shown and "written; load it by" in shown
    assert main(["scan", "--checkpoint", "zoo:digits/nothing", "--data", "digits"]) == 2
    assert "is not in the zoo" in capsys.readouterr().err
    monkeypatch.setenv("COLUMNS", "1")
    assert main(["scan", *words]) == 0
    assert "mask size in pixels" in capsys.readouterr().out
    np.savez("small.npz", images=np.zeros((20, 12, 12, 3), np.uint8), labels=np.arange(20) % 10)
    for options, expected in (
        (["--data", "small.npz"], "its trigger is for images of 16x16x3, these are 12x12x3; give --size 16x16"),
        (["--normalize", "nan/nan"], "has its own mean; give its name alone"),
        (["--model", "vgg19_bn"], "has its own model; give its name alone"),
        (["--by", "x"], "--by says how --list-images sorts"),
        (["--by", "x", "--list-images", "3", "--training-set", "digits"], "unknown --by 'x'"),
    ):
        assert main(["scan", *words, *options, "--force"]) == 2
        line = capsys.readouterr().err
        assert expected in line and line.count("\n") == 1


@pytest.mark.parametrize("attack", [Blended(), WaNet()], ids=lambda attack: attack.name)
def test_triggers_are_kept_to_two_gray_levels(attack: Attack, tmp_path: Path) -> None:
    shape = (16, 16, 3)
    classifier = bj.build_classifier("small_cnn", 10, width=2)
    images = bj.digits().test.images[:3]
    trigger = attack.trigger(jax.random.key(1), shape)
    recipe = {"classes": 10, "shape": shape, "normalization": "none", "model": {"name": "small_cnn", "width": 2}}
    recipe |= {"attack": {"name": attack.name}, "rates": {"acc": 0.1, "asr": 0.1, "ra": 0.1}}
    contents = bj.zoo.Contents(classifier.init(jax.random.key(0), images), trigger, np.arange(2))
    bj.zoo.save("digits/tiny", contents, recipe, tmp_path)
    kept = bj.zoo.load("digits/tiny", tmp_path).trigger
    assert kept is not None
    np.testing.assert_allclose(np.asarray(kept(images), int), np.asarray(trigger(images), int), atol=2)


def test_the_zoo_of_the_repository_is_whole_and_small() -> None:
    files = [path for path in (ROOT / "zoo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    for name in bj.zoo.list(ROOT / "zoo"):
        found = bj.zoo.load(name, ROOT / "zoo")
        assert found.recipe["commit"] and (found.trigger is None) == (found.scores.asr is None)
