"""`defend` and `scan` on a model in a file: what they print, write and refuse, and the values behind them."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from backdoor_jax import Classifier, FineTune, Repair, UserError, build_classifier, load_model, save_model
from backdoor_jax.app import ModelFile, load_suspect, repair_model, require_better_than_chance, scan_model
from backdoor_jax.app.trials import Trial, better_input
from backdoor_jax.cli import main
from backdoor_jax.cli.suspects import parse_normalization
from backdoor_jax.data import Dataset, load_labeled
from backdoor_jax.defenses import CLP, Midway
from backdoor_jax.detectors import DETECTORS, MMBD, Evidence, NeuralCleanse, judge
from backdoor_jax.errors import NonFiniteError
from backdoor_jax.models import Variables

COLORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
"""What the images of the six classes show."""


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 6
    images = 200 * COLORS[labels][:, None, None] + generator.integers(0, 50, (count, 8, 8, 3))
    return images.astype(np.uint8), labels


def color_reader() -> tuple[Classifier, Variables]:
    """A network with weights set by hand: latents are mean colors, the head names them."""
    classifier = build_classifier("preact_resnet18", 6, width=3)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    variables["batch_stats"] = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + (path[-1].key == "var"), variables["batch_stats"]
    )
    params = variables["params"]
    params["stem"]["kernel"][1, 1, :3, :3] = np.eye(3)
    for name, block in params.items():
        if name.startswith("layer"):
            for norm in ("bn1", "bn2"):
                block[norm]["scale"] += 1
            if "shortcut" in block:
                block["shortcut"]["kernel"][0, 0, :3, :3] = np.eye(3)
    params["linear"]["kernel"][:3] = 20 * COLORS.T
    params["linear"]["bias"] -= 6 * COLORS.sum(1)
    return classifier, jax.tree.map(jnp.asarray, variables)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in both formats, and images in all forms."""
    folder = tmp_path_factory.mktemp("commands")
    classifier, variables = color_reader()
    save_model(folder / "model.safetensors", classifier, variables)
    save_model(folder / "model", classifier, variables)
    blind = dataclasses.replace(classifier, mean=(1.0, 1.0, 1.0))
    save_model(folder / "blind.safetensors", blind, variables)

    images, labels = draw(60, 0)
    test_images, test_labels = draw(30, 1)
    np.savez(folder / "clean.npz", images=images, labels=labels)
    np.savez(
        folder / "task.npz",
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
    )
    for number in range(12):
        (folder / "images" / f"class{labels[number]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(folder / "images" / f"class{labels[number]}" / f"{number:02}.png")
    return folder


@pytest.fixture
def no_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning that takes no time and changes nothing."""

    def repair(self: FineTune, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        return Repair(variables, changed=False, why="a test")

    monkeypatch.setattr(FineTune, "repair", repair)


def call(*arguments: str | Path) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), error.getvalue()


def error_of(*arguments: str | Path) -> str:
    code, _, error = call(*arguments)
    assert code == 2
    assert error.startswith("backdoor-jax: ") and error.count("\n") == 1
    assert "Traceback" not in error
    return error


def defend(place: Path, out: Path, *more: str | Path, data: str = "clean.npz") -> tuple[str | Path, ...]:
    given = ("--checkpoint", place / "model.safetensors", "--data", place / data, "--out", out)
    return ("defend", *given, "--defense", "finetune", *more)


# Output and files


def test_a_model_in_a_file_is_repaired(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "repaired.safetensors"
    code, output, error = call(*defend(place, out, "steps=1", "crop=0", "learning_rate=1e-3", data="task.npz"))
    assert (code, error) == (0, "")
    lines = output.splitlines()
    assert lines[0] == f"{place / 'model.safetensors'}: 100.0 % of 30 test images classified correctly"
    changed = r"finetune: changed \d+ of 86 arrays, and moved the weights by \S+ % of their norm; took \d+\.\d s"
    assert re.fullmatch(changed, lines[1])
    assert lines[2].startswith("finetune: ")
    assert lines[2].endswith(" % of 30 test images classified correctly, 100.0 % before")
    assert lines[3] == f"{out}: written; load it by backdoor_jax.load_model({str(out)!r})"
    (before, old), (after, new) = load_model(place / "model.safetensors"), load_model(out)
    assert before == after
    assert not np.array_equal(old["params"]["linear"]["kernel"], new["params"]["linear"]["kernel"])


@pytest.mark.parametrize("ruins", [False, True])
def test_a_repair_in_json_has_rates_before_and_after_and_says_where_it_is(
    ruins: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repair(self: FineTune, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        return Repair(jax.tree.map(jnp.zeros_like, variables) if ruins else variables, changed=ruins, target=3)

    monkeypatch.setattr(FineTune, "repair", repair)
    out = tmp_path / "repaired.safetensors"
    trigger = ("--triggered", place / "clean.npz", "--target", "0")
    code, output, error = call(*defend(place, out, "--json", *trigger, data="task.npz"))
    found = json.loads(output)
    assert (code, error) == (int(ruins), "")
    assert (found["defense"], found["target"], found["changed"], found["why"]) == ("finetune", 3, ruins, None)
    assert (found["accuracy_before"], found["success_rate_before"], found["held_out"]) == (1.0, 0.0, True)
    assert found["accuracy"] == pytest.approx(1 / 6 if ruins else 1.0)
    assert found["success_rate"] == (1.0 if ruins else 0.0)
    assert found["out"] == (None if ruins else str(out)) and out.exists() != ruins
    refused = tmp_path / "repaired-refused.safetensors"
    assert found["refused"] == (str(refused) if ruins else None) and refused.exists() == ruins
    assert found["seconds"] >= 0 and (found["remedies"] is not None) == ruins


def test_the_output_says_where_a_repair_is_evaluated_on_the_images_it_used(
    place: Path, tmp_path: Path, no_repair: None
) -> None:
    _, output, _ = call(*defend(place, tmp_path / "a.safetensors", data="images"))
    assert "finetune: measured on the images that the repair saw" in output and "--hold-out 0.2" in output
    for held_out in ("task.npz", "clean.npz"):
        _, output, _ = call(
            *defend(place, tmp_path / held_out / "b.safetensors", "--test", place / held_out, data="images")
        )
        assert "test images classified correctly" in output and "repair saw" not in output
    _, output, _ = call(*defend(place, tmp_path / "c.safetensors", data="task.npz"))
    assert "repair saw" not in output


def test_images_that_are_held_out_measure_and_do_not_repair(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Dataset] = []

    def repair(self: FineTune, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        seen.append(data)
        return Repair(variables, changed=False)

    monkeypatch.setattr(FineTune, "repair", repair)
    for seed in ("0", "1"):
        out = tmp_path / f"{seed}.safetensors"
        code, output, _ = call(*defend(place, out, "--hold-out", "0.3", "--seed", seed))
        assert code == 0 and "100.0 % of 18 test images classified correctly, 100.0 % before" in output
        assert "repair saw" not in output
    suspect = load_suspect(ModelFile(place / "model"), str(place / "clean.npz"), hold_out=0.3)
    assert suspect.held_out
    assert np.bincount(suspect.test.labels).tolist() == [3] * 6
    images = np.concatenate([suspect.data.images, suspect.test.images])
    assert len(np.unique(images, axis=0)) == 60
    for data in seen:
        np.testing.assert_array_equal(data.images, suspect.data.images)
        assert np.bincount(data.labels).tolist() == [7] * 6


@pytest.mark.parametrize(
    ("options", "data", "expected"),
    [
        (("--hold-out", "0.2"), "task.npz", "task.npz has images to evaluate on already; leave out --hold-out"),
        (("--hold-out", "0"), "clean.npz", "--hold-out 0 of 60 images of 6 classes keeps none"),
        (("--hold-out", "20"), "clean.npz", "hold-out is 20.0, expected 0 to 1"),
        (("--hold-out", "0.2", "--defense", "clp"), "clean.npz", "clp sees no image of --data"),
    ],
)
def test_a_hold_out_that_cannot_be_is_one_line(
    options: tuple[str, ...], data: str, expected: str, place: Path, tmp_path: Path
) -> None:
    assert expected in error_of(*defend(place, tmp_path / "out.safetensors", *options, data=data))


@pytest.mark.parametrize("name", ["out.safetensors", "out", "out.jaxexport"])
def test_every_format_is_written_and_replaced_only_with_force(
    name: str, place: Path, tmp_path: Path, no_repair: None
) -> None:
    if name.endswith(".jaxexport"):
        pytest.importorskip("flatbuffers")
    out = tmp_path / name
    code, output, _ = call(*defend(place, out, data="images"))
    assert code == 0
    assert "finetune: changed nothing (a test); took " in output
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "--force" in error_of(*defend(place, out))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert call(*defend(place, out, "--force"))[0] == 0
    if name.endswith(".jaxexport"):
        program = jax.export.deserialize(bytearray(out.read_bytes()))
        images, labels = draw(7, 3)
        assert np.argmax(program.call(images), -1).tolist() == labels.tolist()
    else:
        assert load_model(out)[0] == load_model(place / "model")[0]


@pytest.mark.parametrize(("target", "said"), [(2, "repaired class 2"), (None, "the scan names no class (few)")])
def test_without_a_name_the_default_repair_runs_and_is_written_beside(
    target: int | None, said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repair(self: Midway, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        return Repair(variables, target=target, scan={"verdict": "few"})

    monkeypatch.setattr(Midway, "repair", repair)
    monkeypatch.chdir(tmp_path)
    code, output, error = call(
        "defend", "--checkpoint", place / "model.safetensors", "--data", place / "clean.npz", "steps=1"
    )
    assert (code, error) == (0, "")
    assert f"midway: {said}" in output
    assert load_model(Path("model-repaired.safetensors"))[0] == load_model(place / "model")[0]


def test_several_defenses_are_compared(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: CLP, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        return Repair(variables, changed=False)

    def ruin(self: FineTune, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        return Repair(jax.tree.map(jnp.zeros_like, variables))

    def fail(self: Midway, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        raise NonFiniteError("midway: the loss is nan")

    for defense, repair in ((CLP, keep), (FineTune, ruin), (Midway, fail)):
        monkeypatch.setattr(defense, "repair", repair)
    both = ("--defense", "clp,finetune")
    code, output, error = call(*defend(place, tmp_path / "a.safetensors", *both))
    assert (code, error) == (1, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-clp.safetensors", "a-finetune-refused.safetensors"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [["none", "100.0 %"], ["clp", "100.0 %"], ["finetune", "16.7 %"]]
    assert rows[1][3] == str(tmp_path / "a-clp.safetensors") and float(rows[1][2]) >= 0
    code, output, error = call(*defend(place, tmp_path / "b", "--defense", "auto,clp"))
    assert code == 2 and error == "backdoor-jax: midway: midway: the loss is nan\n"
    assert (tmp_path / "b-clp").is_dir() and "clp: 100.0 %" in output
    code, output, _ = call(*defend(place, tmp_path / "c", "--defense", "auto,clp", "--json"))
    failed, kept = json.loads(output)
    assert (code, failed["error"], kept["out"]) == (2, "midway: the loss is nan", str(tmp_path / "c-clp"))
    for wrong, expected in (((*both, "steps=1"), "set one defense"), (("--defense", "clp,clp"), "twice")):
        assert expected in error_of(*defend(place, tmp_path / "d", *wrong))


def test_a_defense_that_needs_nothing_receives_no_image(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def repair(self: CLP, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        seen.append(data.images.shape)
        return Repair(variables, changed=False)

    monkeypatch.setattr(CLP, "repair", repair)
    code, output, _ = call(*defend(place, tmp_path / "out.safetensors", "--defense", "clp"))
    assert code == 0 and "clp: 100.0 % of 60 images classified correctly, 100.0 % before" in output
    ((count, *_),) = seen
    assert count == 0


@pytest.mark.parametrize("form", ["model", "model.safetensors"])
def test_a_scan_prints_norms_tests_and_verdict_and_writes_a_figure(
    form: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, error = call("scan", "--checkpoint", place / form, "--data", place / "clean.npz")
    assert (code, error) == (0, "")
    lines = output.splitlines()
    assert lines[0] == f"{place / form}: 100.0 % of 60 images classified correctly"
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == list("012345")
    assert lines[1] == f"{place / form}: no sign of a backdoor"
    assert lines[2].startswith("evidence: none; class ") and "p = " in lines[2] and "neural_cleanse" in lines[2]
    assert "no proof of a clean model" in lines[3]
    assert lines[-1] == f"{form}.scan.png: written"
    with Image.open(tmp_path / f"{form}.scan.png") as figure:
        assert figure.size[0] > 400
    assert "--force" in error_of("scan", "--checkpoint", place / form, "--data", place / "clean.npz")
    again = ("--data", place / "images", "--force", "--out", f"{form}.scan.png")
    assert call("scan", "--checkpoint", place / form, *again)[0] == 0


@pytest.mark.parametrize("data", [True, False])
def test_the_advice_on_a_backdoored_model_is_a_command_that_repairs_it(
    data: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examine(self: MMBD, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Evidence:
        return Evidence("mm_bd", "margin", np.arange(6.0), 2, 1e-4)

    monkeypatch.setattr(MMBD, "examine", examine)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "model", tmp_path / "my model")
    names = ",".join(f"class{number}" for number in range(6))
    images = ("--data", place / "images", "--class-names", names, "--healthy", "0.5") if data else ()
    given = ("scan", "--checkpoint", "my model", "--size", "8x8", "--detector", "mm_bd", *images)
    code, output, _ = call(*given)
    lines = output.splitlines()
    verdict = lines.index("my model: backdoored, class 2" + " (class2)" * data)
    assert code == 0 and verdict < next(number for number, line in enumerate(lines) if line.startswith("┏"))
    (command,) = [shlex.split(line) for line in lines if line.startswith("  backdoor-jax defend ")]
    assert json.loads(call(*given, "--json", "--force")[1])["repair_command"] == shlex.join(command)
    assert command[-1] == "target=2" and ("CLEAN_IMAGES" in command) != data
    if data:
        monkeypatch.setattr(Midway, "repair", lambda self, *rest: Repair(rest[2], changed=False, target=self.target))
        code, output, _ = call(*command[1:])
        assert code == 0 and "midway: repaired class 2" in output
        assert (tmp_path / "my model-repaired").is_dir()


def test_a_scan_in_json_has_verdict_values_and_the_images_to_look_at(place: Path, tmp_path: Path) -> None:
    given = ("scan", "--checkpoint", place / "model", "--data", place / "clean.npz", "--out", tmp_path / "s.png")
    listed = ("--training-set", place / "clean.npz", "--list-images", "4", "--by", "activation_clustering")
    code, output, error = call(*given, "--json", *listed)
    assert (code, error) == (0, "")
    found = json.loads(output)
    assert found["verdict"]["outcome"] == "no sign of a backdoor" and found["verdict"]["detector"] == "neural_cleanse"
    assert (found["accuracy"], len(found["values"]), len(found["details"]["success"])) == (1.0, 6, 6)
    labels = np.load(place / "clean.npz")["labels"]
    assert len(found["images"]) == 4
    assert (labels[[int(index) for index in found["images"]]] == np.argmin(found["values"])).all()
    assert Path(found["figure"]).is_file()


def test_labeled_images_bring_class_names_and_file_names(place: Path, tmp_path: Path) -> None:
    folder = load_labeled(str(place / "images"), 6)
    assert folder.class_names == tuple(f"class{number}" for number in range(6))
    assert folder.files is not None and folder.files[0] == "class0/00.png" and len(folder.files) == len(folder.data)
    images, labels = draw(6, 0)
    np.savez(tmp_path / "named.npz", images=images, labels=labels, class_names=list("abcdef"))
    assert load_labeled(str(tmp_path / "named.npz"), 6).class_names == tuple("abcdef")
    with pytest.raises(UserError, match="6 class_names, the model 7"):
        load_labeled(str(tmp_path / "named.npz"), 7)


@pytest.mark.parametrize("detector", ["mm_bd", "per_sample", "loss_ascent", "worst_case"])
def test_every_detector_scans_from_the_command_line(
    detector: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"mm_bd": {"steps": 2}, "loss_ascent": {"steps": 1}}.get(detector, {})
    monkeypatch.setitem(DETECTORS, detector, functools.partial(DETECTORS[detector], **quick))
    monkeypatch.setenv("FORCE_COLOR", "1")  # Passes for a terminal, where each step is shown.
    source = ("--size", "8x8") if detector == "mm_bd" else ("--data", place / "clean.npz")
    out = tmp_path / "s.png"
    code, output, shown = call("scan", "--checkpoint", place / "model", *source, "--detector", detector, "--out", out)
    assert code == 0 and f"({detector})" in output and out.is_file()
    assert ("class programs" if detector in ("per_sample", "worst_case") else f"{detector} ") in shown
    assert (f"evaluating {place / 'model'}"[:20] in shown) == (detector != "mm_bd")
    assert ("cannot tell: loss ascent" in output) == (detector == "loss_ascent")


def test_a_scan_without_what_it_needs_says_what_to_give(place: Path, tmp_path: Path) -> None:
    given = ("scan", "--checkpoint", place / "model", "--out", tmp_path / "s.png")
    assert "--size 32x32" in error_of(*given, "--detector", "mm_bd")
    assert "--size 'big'" in error_of(*given, "--size", "big")
    assert "neural_cleanse needs clean images; give --data" in error_of(*given, "--size", "8x8")
    assert "known are neural_cleanse, per_sample" in error_of(*given, "--detector", "best")
    assert "belong together" in error_of(*given, "--list-images", "3")


def test_the_functions_return_what_the_commands_print(place: Path, tmp_path: Path, no_repair: None) -> None:
    suspect = load_suspect(ModelFile(place / "model"), str(place / "clean.npz"))
    assert (suspect.accuracy, suspect.held_out, len(suspect.test)) == (1.0, False, 60)
    found = scan_model(suspect, tmp_path / "scan.png")
    assert found.figure.is_file()
    expected = NeuralCleanse().examine(jax.random.key(0), suspect.classifier, suspect.variables, suspect.data)
    np.testing.assert_array_equal(found.evidence.values, expected.values)
    assert found.verdict == judge(expected, accuracy=1.0) and found.verdict.target is None
    result = repair_model(suspect, FineTune(), tmp_path / "repaired")
    assert (result.accuracy, result.repair.why, result.held_out) == (1.0, "a test", False)
    assert result.out == tmp_path / "repaired"
    assert load_model(tmp_path / "repaired")[0] == suspect.classifier


# Images


def test_all_forms_of_images_are_read_alike(place: Path) -> None:
    images, labels = draw(60, 0)
    arrays = load_labeled(str(place / "clean.npz"), 6)
    np.testing.assert_array_equal(arrays.data.images, images)
    assert arrays.test is None
    task = load_labeled(str(place / "task.npz"), 6)
    np.testing.assert_array_equal(task.data.images, images)
    assert task.test is not None and len(task.test) == 30
    folder = load_labeled(str(place / "images"), 6)
    order = np.argsort(labels[:12], kind="stable")
    np.testing.assert_array_equal(folder.data.labels, labels[:12][order])
    np.testing.assert_array_equal(folder.data.images, images[:12][order])


def test_gray_and_transparent_images_become_rgb_and_other_files_are_ignored(tmp_path: Path) -> None:
    for name in ("a", "b", ".hidden"):
        (tmp_path / name).mkdir()
    Image.new("L", (4, 3), 7).save(tmp_path / "b" / "gray.png")
    Image.new("RGBA", (4, 3), (1, 2, 3, 0)).save(tmp_path / "b" / "clear.PNG")
    (tmp_path / "b" / "notes.csv").write_text("x")
    data = load_labeled(str(tmp_path), 2).data
    assert data.images.shape == (2, 3, 4, 3)
    assert data.labels.tolist() == [1, 1]
    assert data.images[:, 0, 0].tolist() == [[1, 2, 3], [7, 7, 7]]
    gray = load_labeled(str(tmp_path), 2, channels=1).data
    assert gray.images.shape == (2, 3, 4, 1) and int(gray.images[1, 0, 0, 0]) == 7


def test_invalid_folders_are_one_line(tmp_path: Path) -> None:
    def message(classes: int = 2) -> str:
        with pytest.raises(UserError) as caught:
            load_labeled(str(tmp_path), classes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert "has 2 class folders (a, b), the model 3 classes" in message(3)
    assert "hold no images" in message()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "1.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "b" / "2.png")
    assert "2.png: is 4x5, the images before it 4x4; resize all of them with --size 4x4" in message()
    (tmp_path / "b" / "2.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:40])
    assert "2.png: cannot be read as an image" in message()


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "lacks images and labels"),
        ({"images": np.full((2, 8, 8, 3), -1.5), "labels": np.arange(2)}, "from -1.5 to -1.5, expected 0 to 1"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 6])}, "labels run from 0 to 6"),
    ],
)
def test_invalid_arrays_are_one_line(arrays: dict[str, Any], expected: str, place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    assert expected in error_of("scan", "--checkpoint", place / "model", "--data", tmp_path / "bad.npz")


# Errors


def test_a_model_near_chance_is_refused_and_normalization_is_named(place: Path, tmp_path: Path) -> None:
    for command in ("scan", "defend"):
        more = () if command == "scan" else ("--defense", "finetune")
        out = tmp_path / ("out.png" if command == "scan" else "out.safetensors")
        given = ("--checkpoint", place / "blind.safetensors", "--data", place / "clean.npz", "--out", out)
        error = error_of(command, *given, *more)
        assert "10 of 60 images classified correctly (16.7 %) is near chance (16.7 %)" in error
        assert "here normalized by 1,1,1/1,1,1" in error
        causes = ("--class-names", "--normalize", "--stem", "--size", "--channel-order")
        assert sorted(causes, key=error.index) == list(causes)
    assert not list(tmp_path.iterdir())


def test_another_order_of_classes_is_found(place: Path, tmp_path: Path) -> None:
    images, labels = draw(60, 0)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "images" / f"{9 - label} sign"  # Sorted, the last class is the first.
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02}.png")
    given = ("scan", "--checkpoint", place / "model", "--data", tmp_path / "images", "--out", tmp_path / "s.png")
    names = "9 sign,8 sign,7 sign,6 sign,5 sign,4 sign"
    named = f"with --class-names '{names}' it classifies 100.0 % correctly"
    assert named in error_of(*given)
    code, output, _ = call(*given, "--class-names", names)
    assert code == 0
    assert "100.0 % of 60 images classified correctly" in output
    # An array's classes have no folders.
    np.savez(tmp_path / "clean.npz", images=images, labels=5 - labels)
    error = error_of("scan", "--checkpoint", place / "model", "--data", tmp_path / "clean.npz")
    assert "in another order it classifies 100.0 % correctly; number them as the model does" in error


def test_of_equal_alternatives_the_one_with_the_fewest_changes_is_named() -> None:
    other, names = {0: 1, 1: 0}, ("stop", "yield")
    plain = Trial("", 0.1, 0.99, other, True)
    both = Trial("--channel-order bgr", 0.1, 1.0, {0: 0, 1: 1}, True)
    assert "with --class-names yield,stop it" in better_input([both, plain], 0.1, names)
    turned = Trial("--channel-order bgr", 0.93, 0.97, other, False)
    more = Trial("--normalize gtsrb --channel-order bgr", 0.96, 0.96, other, False)
    assert "with --channel-order bgr it classifies 93.0 %" in better_input([more, turned], 0.1, names)
    assert "--normalize gtsrb" in better_input([more._replace(accuracy=0.99), turned], 0.1, names)
    # Another order that makes more answers correct than other channels do.
    assert "--class-names" in better_input([turned._replace(accuracy=0.4, reordered=0.4), plain], 0.1, names)


def test_what_is_no_better_than_guessing_is_not_named() -> None:
    guessing = Trial("--normalize 0,0,0/1,1,1", 0.155, 0.3, {}, near_chance=True)
    assert better_input([guessing, Trial("", 0.013, 0.2, {}, near_chance=True)], 0.013) == ""


@pytest.mark.parametrize(
    ("correct", "labels", "accepted"),
    [
        (100, np.arange(1000) % 10, False),
        (180, np.arange(1000) % 10, False),
        (200, np.arange(1000) % 10, True),
        (3, np.arange(10), False),
        (4, np.arange(10), True),
        (930, np.repeat([0, 1], [900, 100]), True),
        (905, np.repeat([0, 1], [900, 100]), False),
        (10, np.zeros(10, int), False),
    ],
)
def test_which_models_are_near_chance(correct: int, labels: np.ndarray, accepted: bool) -> None:
    classifier = build_classifier("preact_resnet18", 10, 1)
    with contextlib.nullcontext() if accepted else pytest.raises(UserError, match=r"near chance|of all classes"):
        require_better_than_chance(correct, labels, classifier, "model")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--checkpoint": "nowhere"}, "no such model"),
        ({"--checkpoint": "clean.npz"}, "is a .npz with arrays, not a model"),
        ({"--checkpoint": "images"}, "model.json"),
        ({"--data": "nowhere.npz"}, "no such file"),
        ({"--data": "model.safetensors"}, "unknown data"),
        ({"--data": "digits"}, "digits has 10 classes, the model 6"),
        ({"--defense": "magic"}, "unknown defense 'magic'; known are auto, midway, finetune"),
        ({"--defense": "pad_ft"}, "pad_ft needs training set; give it with --training-set"),
        ({"--training-set": "clean.npz"}, "leave --training-set out"),
        ({"--defense": "clp", "--training-set": "clean.npz"}, "clp needs nothing; leave --training-set out"),
        ({"--preset": "paper"}, "unknown finetune preset 'paper'; known are gtsrb"),
        ({"--model": "resnet18"}, "holds preact_resnet18, not resnet18"),
        ({"--normalize": "cifar10"}, "has its own normalization"),
        ({"--normalize": "much"}, "neither"),
        ({"--classes": "7"}, "has 6 classes, not 7"),
        ({"--out": "out.onnx"}, "unknown suffix '.onnx'"),
        ({"--out": "images"}, "is a folder that holds no model"),
        ({"steps=many": None}, "steps"),
        ({"color=1": None}, "unknown key 'color'"),
    ],
)
def test_what_users_can_fix_is_one_line(change: dict[str, str | None], expected: str, place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    options: dict[str, Any] = {
        "--checkpoint": "model.safetensors", "--data": "clean.npz", "--defense": "finetune", "--out": "out"
    }  # fmt: skip
    options |= {name: value for name, value in change.items() if value is not None}
    for name in ("--checkpoint", "--data", "--out", "--training-set"):
        if name in options and options[name] != "digits":
            options[name] = place / options[name]
    bare = [name for name, value in change.items() if value is None]
    given = [part for name, value in options.items() for part in (name, value)]
    assert expected in error_of("defend", *given, *bare)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_images_that_do_not_fit_into_memory_are_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backdoor_jax.memory.machine_memory", lambda: 1000)
    text = error_of("scan", "--checkpoint", place / "model.safetensors", "--data", place / "clean.npz")
    assert "GB of memory, there are 0.0 GB; give smaller images (--size)" in text


def test_a_damaged_folder_is_one_line_on_stderr_of_the_process(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    for path in (tmp_path / "model" / "variables").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:40])
    given = ("--checkpoint", "model", "--data", place / "clean.npz")
    command = [sys.executable, "-m", "backdoor_jax.cli", "scan", *map(str, given)]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "damaged" in process.stderr
    assert process.stderr.startswith("backdoor-jax: model: ") and process.stderr.count("\n") == 1


def test_a_pytorch_file_needs_the_name_of_its_network(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.pt").write_bytes(b"weights")
    error = error_of("scan", "--checkpoint", tmp_path / "bare.pt", "--data", place / "clean.npz")
    assert "--model" in error


def test_images_of_another_shape_are_one_line(place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "gray.npz", images=np.zeros((6, 8, 8, 1), np.uint8), labels=np.arange(6))
    classifier = dataclasses.replace(load_model(place / "model")[0], mean=(0.0,), std=(1.0,))
    gray = tmp_path / "gray.safetensors"
    variables = load_model(place / "model")[1]
    params = variables["params"]
    stem = {"kernel": params["stem"]["kernel"][:, :, :1]}
    save_model(gray, classifier, {**variables, "params": {**params, "stem": stem}})
    error = error_of("scan", "--checkpoint", gray, "--data", place / "clean.npz", "--out", tmp_path / "s.png")
    assert "images have 3 channel(s), the model takes 1" in error
    error = error_of(
        "scan", "--checkpoint", place / "model", "--data", tmp_path / "gray.npz", "--out", tmp_path / "s.png"
    )
    assert "images have 1 channel(s), the model takes 3" in error


@pytest.mark.parametrize("text", ["cifar11", "0.5", "a,b/c,d", "0.5/0.5/0.5"])
def test_an_invalid_normalization_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="neither"):
        parse_normalization(text)


@pytest.mark.parametrize("out", ["/proc/model.safetensors", "a" * 300 + ".safetensors", "file/model.safetensors"])
def test_a_path_that_cannot_be_written_is_refused_before_the_repair(
    out: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTune, "repair", None)
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in error_of(*defend(place, tmp_path / out))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("command", "name"), [("defend", "a.safetensors"), ("scan", "a.png")])
def test_an_output_that_is_taken_is_refused_before_the_model_is_read(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).touch()
    assert main([command, "--checkpoint", "nowhere", "--data", "nowhere", "--out", str(tmp_path / name)]) == 2
    assert "exists; give another --out, or --force" in capsys.readouterr().err


def test_scan_takes_no_settings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["scan", "--checkpoint", str(place / "model"), "--data", "digits", "steps=1"])
    assert caught.value.code == 2
    assert "only run and defend take settings" in capsys.readouterr().err


def test_a_pytorch_file_is_read_and_written(place: Path, tmp_path: Path, no_repair: None) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("backdoor_jax.interop.pytorch")
    given = ("--data", place / "clean.npz", "--defense", "finetune")
    assert call("defend", "--checkpoint", place / "model", "--out", tmp_path / "m.pt", *given)[0] == 0
    bare = ("--checkpoint", tmp_path / "m.pt", "--model", "preact_resnet18", "--data", place / "clean.npz")
    code, output, error = call(
        "scan", *bare, "--normalize", "0,0,0/1,1,1", "--classes", "6", "--out", tmp_path / "s.png"
    )
    assert (code, error) == (0, "")
    assert "100.0 % of 60 images classified correctly" in output
    assert "near chance" in error_of("scan", *bare, "--normalize", "1,1,1/1,1,1", "--out", tmp_path / "t.png")
