"""What experiments look into besides rates: which rows hold what, against the metrics themselves, and the figures."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from comparison import random_variables
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats
from small_victim import equal

from backdoor_jax import (
    BadNets,
    Classifier,
    Dataset,
    FineTuneConfig,
    LabelMap,
    TrainConfig,
    UserError,
    build_classifier,
    digits,
    load_model,
    load_task,
)
from backdoor_jax.config_files import parse_experiment
from backdoor_jax.data import Trigger
from backdoor_jax.defenses import AnpConfig, MmBmConfig, TacConfig
from backdoor_jax.defenses.anp import learn_masks
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
from backdoor_jax.experiment.analyses import ANALYSES, Laboratory, Subject, latent_normalization
from backdoor_jax.experiment.settings import Analysis
from backdoor_jax.experiment.victims import prepare_task
from backdoor_jax.metrics.latent import cosine
from backdoor_jax.models import Variables
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


class Finished(NamedTuple):
    """The folder of a run with every analysis, what its rows hold, and the models and images that it was about."""

    out: Path
    table: Table
    classifier: Classifier
    victim: Variables
    repaired: Variables
    test: Dataset
    trigger: Trigger
    label_map: LabelMap

    @property
    def triggered(self) -> jax.Array:
        return self.trigger(self.test.images)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("runs") / "inside"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyses, "MASK_STEPS", 3)
        patch.setattr(analyses, "REINJECTION", dataclasses.replace(analyses.REINJECTION, rates=(0.1,), epochs=(1, 2)))
        patch.setattr(analyses, "along", along := Mock(wraps=analyses.along))
        run_experiment(EXPERIMENT, out, report=lambda line: None)
    table = {(row["attack"], row["defense"]): row for row in read_rows(out / "results.jsonl")}
    assert along.call_count == 1
    return Finished(out, table, *along.call_args.args)


def test_the_names_that_settings_take_are_those_there_are() -> None:
    assert set(EVERY) == set(ANALYSES)
    document = {"name": "x", "attacks": [{"name": "badnets"}], "defenses": [], "analyses": ["landscape"]}
    assert parse_experiment(document).analyses == ("landscape",)
    with pytest.raises(UserError, match=r"analyses.*landscape"):
        parse_experiment({**document, "analyses": ["dreams"]})
    with pytest.raises(UserError, match=r"Experiment.analyses.*neurons"):
        dataclasses.replace(EXPERIMENT, analyses=("dreams",))


def test_each_analysis_is_made_of_the_models_it_is_about(finished: Finished) -> None:
    held = {model: set(row["analyses"]) for model, row in finished.table.items()}
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


def test_the_line_starts_at_the_victim_and_passes_the_repair(finished: Finished) -> None:
    out, table = finished.out, finished.table
    line = table["badnets", "finetune"]["analyses"]["landscape"]
    at = {position: number for number, position in enumerate(line["positions"])}
    for position, defense in ((0.0, "none"), (1.0, "finetune")):
        for rate in ("acc", "asr"):
            assert line[rate][at[position]] == pytest.approx(table["badnets", defense][rate], abs=1e-4)
    assert equal(finished.victim, load_model(out / "victims" / "badnets-0")[1])
    labels = np.asarray(finished.test.labels)
    for position, variables in ((0.0, finished.victim), (1.0, finished.repaired)):
        for loss, images, wanted, counted in (
            ("clean_loss", finished.test.images, labels, labels >= 0),
            ("backdoor_loss", finished.triggered, np.ones_like(labels), labels != 1),
        ):
            logits = np.asarray(finished.classifier.logits(variables, images)[0], np.float64)
            losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), wanted]
            assert line[loss][at[position]] == pytest.approx(losses[counted].mean(), rel=1e-4, abs=1e-4)
    before, after = (
        np.asarray(variables["params"]["linear"]["kernel"], np.float64).ravel()
        for variables in (finished.victim, finished.repaired)
    )
    assert line["head"] == pytest.approx(
        {"distance": np.linalg.norm(after - before) / np.linalg.norm(before), "cosine": cosine(before, after)}
    )
    assert line["head"]["distance"] > 1e-3
    assert json.loads((out / "experiment.json").read_text())["analyses"] == list(EVERY)


def test_members_are_images_that_were_trained_on_unpoisoned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(analyses, "loss_signal", lambda classifier, variables, data: seen.append(data) or np.zeros(60))
    monkeypatch.setattr(analyses, "shadow_signal", lambda *_: np.zeros(60))
    small = dataclasses.replace(EXPERIMENT, defenses=(), analyses=("membership",))
    run_experiment(small, tmp_path / "out", report=lambda line: None)
    task = digits()
    trained = {image.tobytes() for image in np.asarray(task.train.images)}
    inside, outside, left_out = seen[:3]
    assert len(inside) == len(outside) == 60
    assert all(image.tobytes() in trained for image in np.asarray(inside.images))
    assert not any(image.tobytes() in trained for image in np.asarray(outside.images))
    used = load_task("digits", train_size=200, test_size=120)
    assert used.left_out is not None
    np.testing.assert_array_equal(left_out.images, used.left_out.images)


def test_twin_and_fresh_weights_start_where_they_are(finished: Finished) -> None:
    out, table = finished.out, finished.table
    rows = table["badnets", "none"]["analyses"]["reinjection"]["rows"]
    assert [(row["start"], row["steps"] > 0) for row in rows] == [
        ("twin", False), ("twin", True), ("twin", True), ("fresh", False), ("fresh", True), ("fresh", True),
    ]  # fmt: skip
    assert rows[0]["acc"] == pytest.approx(table["none", "none"]["acc"], abs=1e-6)
    repaired = table["badnets", "finetune"]["analyses"]["reinjection"]["rows"]
    assert {row["start"] for row in repaired} == {"repaired"}
    assert repaired[0]["asr"] == pytest.approx(table["badnets", "finetune"]["asr"], abs=1e-6)
    assert (out / "victims" / "none-0").is_dir()


def latents_of(finished: Finished, variables: Variables, images: jax.Array) -> np.ndarray:
    return np.asarray(finished.classifier.features(variables, images)[0], np.float64)


def test_neurons_hold_the_true_change_and_how_well_each_score_agrees_with_it(finished: Finished) -> None:
    found, victim = finished.table["badnets", "none"]["analyses"]["neurons"], finished.victim
    others = np.asarray(finished.test.labels) != 1
    clean, triggered = (latents_of(finished, victim, x[others]) for x in (finished.test.images, finished.triggered))
    change = triggered - clean
    np.testing.assert_allclose(found["mean"], change.mean(0), atol=2e-5)
    np.testing.assert_allclose(found["size"], np.abs(change).mean(0), atol=2e-5)
    assert found["target"] == 1 and max(found["size"]) > 1e-3

    task, _ = prepare_task(EXPERIMENT)
    laboratory = Laboratory(EXPERIMENT, 0, finished.classifier, task, finished.out)
    kernel, bias = (np.asarray(part, np.float64) for part in finished.classifier.head_weights(victim))

    def lead(scale: float) -> float:
        """Of the target class over the defender's images, at the worst of them."""
        moved = latents_of(finished, victim, laboratory.clean.images) + scale * np.asarray(found["vector"])
        logits = moved @ kernel + bias
        return float(np.min(logits[:, 1] - np.delete(logits, 1, axis=1).max(1)))

    assert lead(1.0) == pytest.approx(0, abs=1e-4) and lead(0.9) < -1e-3

    norm, variance = victim["params"]["bn2"], np.asarray(victim["batch_stats"]["bn2"]["var"])
    filters = np.moveaxis(np.asarray(victim["params"]["conv2"]["kernel"]), -1, 0)
    bounds = np.abs(norm["scale"]) / np.sqrt(variance + 1e-5) * [np.linalg.norm(f.reshape(9, -1), 2) for f in filters]
    config = AnpConfig(steps=3, flip=task.flip)
    masks, _ = learn_masks(laboratory.key("neurons"), finished.classifier, victim, laboratory.clean, config)
    scores = {"tac": np.abs(found["vector"]), "clp": bounds, "anp": 1 - np.asarray(masks["bn2"])}
    assert found["k"] == 1
    for measured, against, by in (
        ({"signed": found["signed"]}, change.mean(0), {"signed": np.asarray(found["vector"])}),
        (found["agreement"], np.abs(change).mean(0), scores),
    ):
        assert set(measured) == set(by)
        for name, values in by.items():
            assert measured[name] == pytest.approx(
                {
                    "cosine": cosine(values, against),
                    "spearman": stats.spearmanr(values, against).statistic,
                    "precision": float(np.argmax(values) == np.argmax(against)),
                },
                abs=1e-3,
            ), name


def test_the_plane_is_that_of_the_two_principal_components_of_each_models_latents(finished: Finished) -> None:
    for defense, variables in (("none", finished.victim), ("finetune", finished.repaired)):
        found = finished.table["badnets", defense]["analyses"]["latents"]
        np.testing.assert_array_equal(found["labels"], finished.test.labels)
        both = [latents_of(finished, variables, images) for images in (finished.test.images, finished.triggered)]
        together = np.concatenate(both)
        _, components = np.linalg.eigh(np.cov(together.T))
        want = (together - together.mean(0)) @ components[:, [-1, -2]]
        drawn = np.concatenate([found["clean"], found["triggered"]])
        np.testing.assert_allclose(np.abs(drawn), np.abs(want), atol=2e-3)
        assert (drawn.std(0) > 0.01).all()


@pytest.mark.parametrize(
    ("name", "found"), [("small_cnn", ("bn2",)), ("resnet18", ("layer4_1", "bn2")), ("preact_resnet18", None)]
)
def test_what_writes_the_latents_is_found_by_trial(name: str, found: tuple[str, ...] | None) -> None:
    images = digits().train.images[:2]
    classifier = build_classifier(name, 10, width=2)
    variables = random_variables(classifier, images)
    assert latent_normalization(classifier, variables, images) == found


def test_every_section_is_drawn_and_none_without_findings(finished: Finished) -> None:
    out, table = finished.out, finished.table
    page = render(list(table.values()), out)
    plain = render([{**row, "analyses": {}} for row in table.values()], out)
    for title, _, draw in SECTIONS:
        assert f"<h2>{title}</h2>" in page and title not in plain
        assert draw([]) is None
    assert page.count("<img") == plain.count("<img") + len(SECTIONS)


def test_rows_from_before_there_were_analyses_are_read(finished: Finished) -> None:
    rows = [{name: value for name, value in row.items() if name != "analyses"} for row in finished.table.values()]
    assert findings(rows, "landscape") == {}
    assert "Membership" not in render(rows, finished.out)


def formulas(figure: Figure) -> list[str]:
    """Tick labels that only a formula's parser would make readable; there is none."""
    figure.draw_without_rendering()
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklabels("both")]
    return [tick.get_text() for tick in ticks if "$" in tick.get_text()]


def test_figures_hold_the_means_over_seeds(finished: Finished) -> None:
    row = finished.table["badnets", "finetune"]
    other = json.loads(json.dumps(row))
    other["analyses"]["landscape"]["acc"] = [0.0] * len(row["analyses"]["landscape"]["acc"])
    figure = landscape([row, {**other, "seed": 1}])
    assert figure is not None and not formulas(figure)
    drawn = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, 50 * np.asarray(row["analyses"]["landscape"]["acc"]))
    assert mean([{"a": 1.0}, {"a": 3.0}], "a") == 2


def test_figures_show_what_was_found(finished: Finished) -> None:
    rows = list(finished.table.values())
    drawings = [draw(rows) for draw in (neurons, plane, membership, reinjection)]
    axes = [drawing.axes for drawing in drawings if drawing is not None and not formulas(drawing)]
    (cloud, bars), planes, (intervals,), (curves,) = axes

    found = finished.table["badnets", "none"]["analyses"]["neurons"]
    np.testing.assert_allclose(cloud.collections[0].get_offsets(), np.transpose([found["mean"], found["vector"]]))
    heights = [bar.get_height() for bar in bars.patches if isinstance(bar, Rectangle)]
    measured = list(found["agreement"].values())
    assert heights == [of[measure] for measure in ("cosine", "spearman", "precision") for of in measured]

    clouds = findings(rows, "latents")["badnets"]
    assert list(clouds) == ["none", "finetune", "mm_bm"]
    for panel, (points,) in zip(planes, clouds.values(), strict=True):
        for drawn, name in zip(panel.collections, ("clean", "triggered"), strict=True):
            np.testing.assert_allclose(drawn.get_offsets(), points[name])

    told = [seeds[0] for of in findings(rows, "membership").values() for seeds in of.values()]
    values = [[found[signal]["auc"][0] for found in told] for signal in told[0]]
    assert [bar.lines[0].get_xdata().tolist() for bar in intervals.containers] == values

    lines = [
        [row for row in seeds[0]["rows"] if row["start"] == start]
        for of in findings(rows, "reinjection").values()
        for seeds in of.values()
        for start in dict.fromkeys(row["start"] for row in seeds[0]["rows"])
    ]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in curves.lines if len(line.get_xdata())]
    assert drawn == [([row["steps"] for row in line], [100 * row["asr"] for row in line]) for line in lines]
