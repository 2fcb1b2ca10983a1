"""Experiments in YAML: the shipped ones are read, and an error is one line that names the key and the fix."""

from pathlib import Path
from typing import Any

import pytest

from backdoor_jax import D3, PADFT, TAC, BadNets, Blended, FineTune, SuperFineTune, UserError
from backdoor_jax.config_files import load_experiment, make_defense, parse_yaml
from backdoor_jax.defenses import PAD
from backdoor_jax.experiment import ModelConfig

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), ROOT / "backdoor_jax" / "demo.yaml"])
VALID = """
name: small
data: {source: digits, train_size: 96}
model: {width: 2}
victim: {epochs: 1}
attacks:
  - {name: badnets}
defenses:
  - {name: finetune, steps: 2}
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(VALID)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_read(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name
    assert {type(entry.attack) for entry in experiment.attacks} >= {BadNets, Blended}


def test_the_demo_and_the_small_experiment_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"demo", "gtsrb_small"}


def test_entries_become_typed_configurations(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text("""
name: all
clean_ratio: 1
victim: {learning_rate: 1e-3}
attacks:
  - {name: blended, label: faint, alpha: 0.1, target: 3}
defenses:
  - {name: d3, label: strong, preset: paper, steps: 7}
  - {name: super_finetune, preset: guide, peak1: 0.3}
  - {name: pad_ft, consistency: 2, places: [layer1_0/relu1]}
  - {name: pad, preset: mmbm}
  - {name: tac, label: known, known_target: true}
  - {name: tac, label: third, target: 3}
""")
    experiment = load_experiment(path)
    assert (experiment.attacks[0].label, experiment.attacks[0].attack) == ("faint", Blended(alpha=0.1, target=3))
    assert [entry.label for entry in experiment.defenses] == [
        "strong",
        "super_finetune",
        "pad_ft",
        "pad",
        "known",
        "third",
    ]
    assert [entry.defense for entry in experiment.defenses] == [
        D3.preset("paper", steps=7),
        SuperFineTune.preset("guide", peak1=0.3),
        PADFT(consistency=2.0, places=("layer1_0/relu1",)),
        PAD.preset("mmbm"),
        TAC(),
        TAC(target=3),
    ]
    assert [entry.known_target for entry in experiment.defenses] == [False, False, False, False, True, False]
    assert experiment.victim.learning_rate == 0.001
    assert isinstance(experiment.clean_ratio, float)
    assert hash(experiment) == hash(load_experiment(path))


def test_a_model_has_options(written: Path) -> None:
    assert load_experiment(written).model == ModelConfig(width=2)
    written.write_text(VALID.replace("{width: 2}", "{name: resnet18, width: 16, stem: small}"))
    assert load_experiment(written).model == ModelConfig("resnet18", 16, stem="small")
    assert load_experiment(written, ("model={name: vit_tiny, patch: 8}",)).model == ModelConfig("vit_tiny", patch=8)


def test_overrides_reach_every_level_and_create_missing_keys(written: Path) -> None:
    experiment = load_experiment(
        written,
        (
            "seeds=[0, 1]",
            "name=other",
            "victim.epochs=3",
            "victim.learning_rate=1e-2",
            "data.test_size=48",
            "model.width=4",
            "clean_ratio=0.2",
            "attacks=[{name: blended, image: a=b.png}]",
        ),
    )
    assert (experiment.name, experiment.seeds, experiment.clean_ratio) == ("other", (0, 1), 0.2)
    assert (experiment.victim.epochs, experiment.victim.learning_rate) == (3, 0.01)
    assert (experiment.data.train_size, experiment.data.test_size, experiment.model.width) == (96, 48, 4)
    assert experiment.attacks[0].attack == Blended(image="a=b.png")
    assert experiment.defenses[0].defense == FineTune(steps=2)

    written.write_text("name: bare\nattacks: [{name: badnets}]\n")
    assert load_experiment(written, ("victim.epochs=3",)).victim.epochs == 3


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("name: small", "name: small\ncolor: 1", ["'color'", "known are name, attacks"]),
        ("{epochs: 1}", "{epoch: 1}", ["victim", "'epoch'", "known are epochs"]),
        ("{name: badnets}", "{name: badnets, rtae: 0.1}", ["attacks[0]", "'rtae'", "known are rate"]),
        ("steps: 2", "stpes: 2", ["defenses[0]", "'stpes'", "known are steps"]),
        ("{epochs: 1}", "{epochs: many}", ["victim.epochs is 'many', expected a valid integer"]),
        ("{epochs: 1}", "{epochs: 0}", ["victim.epochs is 0, expected a value greater than or equal to 1"]),
        ("{epochs: 1}", "3", ["victim", "expected keys and values", "3"]),
        (
            "{name: badnets}",
            "{name: badnets, rate: 2}",
            ["attacks[0].rate is 2, expected a value less than or equal to 1"],
        ),
        ("{name: badnets}", "{name: badnets, corner: middle}", ["attacks[0].corner", "'top_left'", "'middle'"]),
        ("{name: badnets}", "{name: nowhere}", ["attacks[0]", "'nowhere'", "known are badnets, blended"]),
        ("{name: badnets}", "badnets", ["attacks[0]", "expected a name"]),
        ("{name: badnets}", "{rate: 0.1}", ["attacks[0]", "expected a name"]),
        ("\n  - {name: badnets}", " badnets", ["attacks", "expected a list"]),
        ("\n  - {name: badnets}", " []", ["attacks", "at least one"]),
        ("{name: finetune, steps: 2}", "{name: nc}", ["defenses[0]", "'nc'", "known are auto, midway, finetune"]),
        ("{name: finetune, steps: 2}", "{name: d3, preset: fast}", ["defenses[0]", "'fast'", "released, paper"]),
        ("{name: finetune, steps: 2}", "{name: d3, preset: [paper]}", ["defenses[0]", "preset"]),
        ("steps: 2", "preset: paper", ["defenses[0]", "unknown finetune preset 'paper'; known are gtsrb"]),
        ("steps: 2", "known_target: true", ["defenses[0]", "known_target", "method with a target"]),
        ("steps: 2", "label: 3", ["defenses[0]", "label 3", "text"]),
        ("{name: finetune, steps: 2}", "{name: tac, target: fish}", ["defenses[0].target", "'fish'", "'detected'"]),
        ("steps: 2}", "steps: 2}\n  - {name: finetune}", ["'finetune' is taken", "its own label"]),
        ("{name: badnets}", "{name: badnets, label: none}", ["'none' is taken", "its own label"]),
        ("name: small", "name: small\nclean_ratio: 0", ["clean_ratio is 0, expected a value greater than 0"]),
        (
            "name: small",
            "name: small\nclean_ratio: 1.5",
            ["clean_ratio is 1.5, expected a value less than or equal to 1"],
        ),
        ("name: small", "name: small\nseeds: 0", ["seeds", "tuple", "0"]),
        ("name: small", "name: small\nseeds: []", ["Experiment.seeds", "at least one"]),
        ("name: small", "name: small\nseeds: [0, 1, 0]", ["Experiment.seeds is (0, 1, 0)", "each once"]),
        ("steps: 2", "label: " + 40 * "\u00e9", ["defenses[0]", "up to 64 bytes"]),
        ("width: 2", "width: wide", ["model.width", "'wide'"]),
        ("width: 2", "name: resnet18, stem: large", ["model.stem", "'small'", "'imagenet'", "'large'"]),
        ("width: 2", "name: vit_tiny, patch: 0", ["model.patch is 0, expected a value greater than or equal to 1"]),
        ("width: 2", "name: vit_tiny, patch: four", ["model.patch", "'four'"]),
        ("width: 2", "width: 2, depth: 3", ["'depth'", "known are name, width, stem, patch"]),
    ],
)
def test_an_error_is_one_line_naming_file_key_and_fix(written: Path, old: str, new: str, named: list[str]) -> None:
    assert old in VALID
    written.write_text(VALID.replace(old, new, 1))
    text = message(written)
    assert text.startswith(f"{written}: ")
    assert "\n" not in text
    for word in named:
        assert word in text, text


def test_a_missing_name_is_reported(written: Path) -> None:
    written.write_text(VALID.replace("name: small\n", ""))
    text = message(written)
    assert text.startswith(f"{written}: name: ")
    assert "\n" not in text
    assert "ArgsKwargs" not in text
    assert len(text.removeprefix(str(written))) < 120


@pytest.mark.parametrize("label", ["../outside", "a/b"])
def test_a_label_that_cannot_name_a_folder_is_refused(written: Path, label: str) -> None:
    written.write_text(VALID.replace("{name: badnets", f"{{name: badnets, label: {label}"))
    assert "label" in message(written)


@pytest.mark.parametrize("content", ["name: [1", "a: b: c", "name: \t- x\n\t- y", b"\xff\xfe\x00name"])
def test_a_file_that_is_not_yaml_is_one_line(written: Path, content: str | bytes) -> None:
    written.write_bytes(content.encode() if isinstance(content, str) else content)
    text = message(written)
    assert text.startswith(f"{written}: not YAML (")
    assert "\n" not in text


@pytest.mark.parametrize("content", ["", "- name: x", "just text", "3"])
def test_a_document_without_keys_is_refused(written: Path, content: str) -> None:
    written.write_text(content)
    assert message(written) == f"{written}: expected keys such as name, data, attacks and defenses"


def test_keys_that_are_not_text_are_refused(written: Path) -> None:
    written.write_text(VALID + "3: 4\n")
    text = message(written)
    assert text.startswith(f"{written}: ")
    assert "3" in text


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    text = message(tmp_path / name)
    assert text.startswith((f"{tmp_path / name}: no such file", f"{tmp_path / name}: is a folder"))
    assert "configs/" in text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("victim.epochs", ["'victim.epochs'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("attacks.0.rate=1", ["'attacks.0.rate=1'", "attacks holds no keys"]),
        ("victim.epochs.deep=1", ["'victim.epochs.deep=1'", "epochs holds no keys"]),
        ("victim.epochs=many", ["victim.epochs", "'many'"]),
        ("victim.epoch=1", ["victim", "unknown key 'epoch'", "epochs"]),
        ("victim.=1", ["victim", "unknown key ''"]),
        ("seeds=[0", ["seeds=[0"]),
        ("clean_ratio=5%", ["clean_ratio", "'5%'"]),
    ],
)
def test_an_invalid_override_is_one_line(written: Path, override: str, named: list[str]) -> None:
    text = message(written, override)
    assert "\n" not in text
    for word in named:
        assert word in text, text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("1:1:1", "1:1:1"),
        ("1_000", "1_000"),
        ("1:30.5", "1:30.5"),
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-1.5E+2", -150.0),
        ("5.", 5.0),
        ("1.2.3", "1.2.3"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


def test_nothing_is_given_twice(written: Path) -> None:
    assert "'victim.epochs' is given twice" in message(written, "victim.epochs=1", "victim.epochs=2")
    with pytest.raises(UserError, match="'steps' is given twice"):
        make_defense("finetune", None, ["steps=1", "steps=2"])
    written.write_text(VALID + "name: again\n")
    assert "'name' is given twice" in message(written)


@pytest.mark.parametrize("value", ["1", "0", "yes please"])
def test_a_known_target_is_true_or_false(written: Path, value: str) -> None:
    assert "known_target must be true or false" in message(written, f"defenses=[{{name: tac, known_target: {value}}}]")
