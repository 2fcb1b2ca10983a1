"""What experiments look into besides rates: which rows hold what, against the metrics themselves, and the figures."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import jax
import numpy as np
import pytest
from comparison import random_variables
from matplotlib.figure import Figure

from backdoor_jax import (
    BadNets,
    FineTuneConfig,
    TrainConfig,
    UserError,
    build_classifier,
    digits,
    load_model,
    load_task,
)
from backdoor_jax.config_files import parse_experiment
from backdoor_jax.defenses import MmBmConfig, TacConfig
from backdoor_jax.experiment import (
    AttackEntry,
    DataConfig,
    DefenseEntry,
    Experiment,
    ModelConfig,
    analyses,
    read_rows,
    run_experiment,
)
from backdoor_jax.experiment.analyses import ANALYSES, Subject, latent_normalization
from backdoor_jax.experiment.settings import Analysis
from backdoor_jax.metrics import evaluate
from backdoor_jax.report import render
from backdoor_jax.report.analyses import SECTIONS, findings, landscape, mean, membership, neurons, plane, reinjection

EVERY = get_args(Analysis)
TUNING: dict[str, Any] = {"steps": 4, "batch_size": 32, "crop": 0}
EXPERIMENT = Experiment(
    "inside",
    (AttackEntry("badnets", BadNets(target=1, rate=0.2)),),
    (
        DefenseEntry("finetune", "finetune", FineTuneConfig(**TUNING)),
        DefenseEntry("mm_bm", "mm_bm", MmBmConfig(places=None, bound_epochs=1)),
        DefenseEntry("tac", "tac", TacConfig(alpha=1e-9, **TUNING)),
    ),
    DataConfig("digits", train_size=200, test_size=120),
    ModelConfig("small_cnn", width=4),
    TrainConfig(epochs=2, batch_size=20, crop=0),
    clean_ratio=0.5,
    analyses=EVERY,
)

Table = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Table]:
    """The folder of a run with every analysis, and what its rows hold."""
    out = tmp_path_factory.mktemp("runs") / "inside"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyses, "MASK_STEPS", 3)
        patch.setattr(analyses, "REINJECTION", dataclasses.replace(analyses.REINJECTION, rates=(0.1,), epochs=(1, 2)))
        run_experiment(EXPERIMENT, out, report=lambda line: None)
    return out, {(row["attack"], row["defense"]): row for row in read_rows(out / "results.jsonl")}


def test_the_names_that_settings_take_are_those_there_are() -> None:
    assert set(EVERY) == set(ANALYSES)
    document = {"name": "x", "attacks": [{"name": "badnets"}], "defenses": [], "analyses": ["landscape"]}
    assert parse_experiment(document).analyses == ("landscape",)
    with pytest.raises(UserError, match=r"analyses.*landscape"):
        parse_experiment({**document, "analyses": ["dreams"]})
    with pytest.raises(UserError, match=r"Experiment.analyses.*neurons"):
        dataclasses.replace(EXPERIMENT, analyses=("dreams",))


def test_each_analysis_is_made_of_the_models_it_is_about(finished: tuple[Path, Table]) -> None:
    held = {model: set(row["analyses"]) for model, row in finished[1].items()}
    both = {"latents", "membership", "reinjection"}
    assert held["badnets", "none"] == {*both, "neurons"}
    assert held["badnets", "finetune"] == {*both, "landscape"}
    assert held["badnets", "mm_bm"] == both  # Bounds are no point of a line.
    assert held["badnets", "tac"] == set()  # It flags nothing at this level, and leaves the victim as it was.
    assert held["none", "none"] == held["none", "finetune"] == {"membership"}


def test_neurons_are_not_compared_where_there_is_no_one_target() -> None:
    label_map, trigger = BadNets(labels="all_to_all").label_map(10), BadNets().trigger(jax.random.key(0), (16, 16, 3))
    victim: Any = SimpleNamespace(trigger=trigger, label_map=label_map)
    laboratory: Any = SimpleNamespace(classifier=None)
    assert analyses.neurons(laboratory, Subject(victim, {}, repaired=False)) is None


def test_the_line_starts_at_the_victim_and_passes_the_repair(finished: tuple[Path, Table]) -> None:
    out, table = finished
    line = table["badnets", "finetune"]["analyses"]["landscape"]
    at = {position: number for number, position in enumerate(line["positions"])}
    for position, defense in ((0.0, "none"), (1.0, "finetune")):
        for rate in ("acc", "asr"):
            assert line[rate][at[position]] == pytest.approx(table["badnets", defense][rate], abs=1e-4)
    assert line["head"]["distance"] > 0 and -1 <= line["head"]["cosine"] <= 1
    assert json.loads((out / "experiment.json").read_text())["analyses"] == list(EVERY)


def test_members_are_images_that_were_trained_on_unpoisoned(
    finished: tuple[Path, Table], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(analyses, "loss_signal", lambda classifier, variables, data: seen.append(data) or np.zeros(60))
    monkeypatch.setattr(analyses, "shadow_signal", lambda *_: np.zeros(60))
    small = dataclasses.replace(EXPERIMENT, defenses=(), analyses=("membership",))
    run_experiment(small, tmp_path / "out", report=lambda line: None)
    (out, _), task = finished, digits()
    trained = {image.tobytes() for image in np.asarray(task.train.images)}
    inside, outside, left_out = seen[0], seen[1], seen[3]
    assert len(inside) == len(outside) == 60
    assert all(image.tobytes() in trained for image in np.asarray(inside.images))
    assert not any(image.tobytes() in trained for image in np.asarray(outside.images))
    used = load_task("digits", train_size=200, test_size=120)
    assert used.left_out is not None
    np.testing.assert_array_equal(left_out.images, used.left_out.images)
    assert out.is_dir()


def test_twin_and_fresh_weights_start_where_they_are(finished: tuple[Path, Table]) -> None:
    out, table = finished
    rows = table["badnets", "none"]["analyses"]["reinjection"]["rows"]
    assert [(row["start"], row["steps"] > 0) for row in rows] == [
        ("twin", False), ("twin", True), ("twin", True), ("fresh", False), ("fresh", True), ("fresh", True),
    ]  # fmt: skip
    assert rows[0]["acc"] == pytest.approx(table["none", "none"]["acc"], abs=1e-6)
    repaired = table["badnets", "finetune"]["analyses"]["reinjection"]["rows"]
    assert {row["start"] for row in repaired} == {"repaired"}
    assert repaired[0]["asr"] == pytest.approx(table["badnets", "finetune"]["asr"], abs=1e-6)
    assert (out / "victims" / "none-0").is_dir()


def test_the_change_of_the_latents_is_that_of_the_victim_on_disk(finished: tuple[Path, Table]) -> None:
    out, table = finished
    found = table["badnets", "none"]["analyses"]["neurons"]
    classifier, variables = load_model(out / "victims" / "badnets-0")
    assert set(found["agreement"]) == {"tac", "clp", "anp"}
    assert len(found["mean"]) == len(found["vector"]) == len(found["size"]) == 8
    assert all(size >= abs(mean) - 1e-5 for size, mean in zip(found["size"], found["mean"], strict=True))
    with np.load(out / "examples" / "badnets.npz") as example:
        changes = [classifier.features(variables, example[name][None])[0] for name in ("clean", "triggered")]
    assert np.asarray(changes).shape == (2, 1, 8)
    assert evaluate(classifier, variables, digits().test.take(slice(0, 120))).acc > 0


@pytest.mark.parametrize(
    ("name", "found"), [("small_cnn", ("bn2",)), ("resnet18", ("layer4_1", "bn2")), ("preact_resnet18", None)]
)
def test_what_writes_the_latents_is_found_by_trial(name: str, found: tuple[str, ...] | None) -> None:
    images = digits().train.images[:2]
    classifier = build_classifier(name, 10, width=2)
    variables = random_variables(classifier, images)
    assert latent_normalization(classifier, variables, images) == found


def test_every_section_is_drawn_and_none_without_findings(finished: tuple[Path, Table]) -> None:
    out, table = finished
    page = render(list(table.values()), out)
    plain = render([{**row, "analyses": {}} for row in table.values()], out)
    for title, _, draw in SECTIONS:
        assert f"<h2>{title}</h2>" in page and title not in plain
        assert draw([]) is None
    assert page.count("<img") == plain.count("<img") + len(SECTIONS)


def test_rows_from_before_there_were_analyses_are_read(finished: tuple[Path, Table]) -> None:
    rows = [{name: value for name, value in row.items() if name != "analyses"} for row in finished[1].values()]
    assert findings(rows, "landscape") == {}
    assert "Membership" not in render(rows, finished[0])


def formulas(figure: Figure) -> list[str]:
    """Tick labels that only a formula's parser would make readable; there is none."""
    figure.draw_without_rendering()
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklabels("both")]
    return [tick.get_text() for tick in ticks if "$" in tick.get_text()]


def test_figures_hold_the_means_over_seeds(finished: tuple[Path, Table]) -> None:
    row = finished[1]["badnets", "finetune"]
    other = json.loads(json.dumps(row))
    other["analyses"]["landscape"]["acc"] = [0.0] * len(row["analyses"]["landscape"]["acc"])
    figure = landscape([row, {**other, "seed": 1}])
    assert figure is not None and not formulas(figure)
    drawn = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, 50 * np.asarray(row["analyses"]["landscape"]["acc"]))
    assert mean([{"a": 1.0}, {"a": 3.0}], "a") == 2
    victim, rows = finished[1]["badnets", "none"], list(finished[1].values())
    for draw, panels in ((neurons, 2), (plane, None), (membership, 1), (reinjection, 1)):
        drawing = draw([victim] if draw is neurons else rows)
        assert drawing is not None
        assert not formulas(drawing)
        if panels:
            assert len(drawing.axes) == panels
