"""Analyses: which rows hold which, their values against other computations, and the figures."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from comparison import assert_trees_equal, random_variables
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats

from backdoor_jax import (
    TAC,
    BadNets,
    Classifier,
    Dataset,
    FineTune,
    TrainConfig,
    UserError,
    build_classifier,
    digits,
    load,
    load_model,
)
from backdoor_jax.analyses import ANALYSES, Neurons, Reactivation, Reinjection, Subject, landscape, membership
from backdoor_jax.analyses.base import mean_over_seeds
from backdoor_jax.analyses.neurons import latent_norm
from backdoor_jax.config_files import parse_experiment
from backdoor_jax.data import LabelMap, Trigger
from backdoor_jax.defenses import ANP, MMBM, fit_masks
from backdoor_jax.experiment import (
    AttackEntry,
    DataConfig,
    DefenseEntry,
    Experiment,
    ModelConfig,
    clean_subset,
    make_workspace,
    read_rows,
    run_experiment,
    streams,
)
from backdoor_jax.metrics import ReinjectConfig, SearchConfig
from backdoor_jax.metrics.latent import cosine
from backdoor_jax.models import Variables
from backdoor_jax.report import render

EVERY = tuple(ANALYSES)
TUNING: dict[str, Any] = {"steps": 4, "batch_size": 32, "crop": 0}
EXPERIMENT = Experiment(
    "inside",
    (AttackEntry("badnets", BadNets(target=1, rate=0.2)),),
    (
        DefenseEntry("finetune", FineTune(**TUNING)),
        DefenseEntry("mm_bm", MMBM(places=None, bound_epochs=1)),
        DefenseEntry("tac", TAC(alpha=1e-9, **TUNING)),
    ),
    DataConfig("digits", train_size=200, test_size=120),
    ModelConfig("small_cnn", width=4),
    TrainConfig(epochs=2, batch_size=20, crop=0),
    clean_ratio=0.5,
    analyses=EVERY,
)

REACTIVATION = Reactivation(
    images=100,
    retuning=ReinjectConfig((0.1,), (2,), batch_size=50, learning_rate=0.05),
    search=SearchConfig(radius=40, steps=40, step_size=4, batch_size=50, epochs=2),
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
        patch.setitem(ANALYSES, "neurons", Neurons(mask_steps=3))
        patch.setitem(ANALYSES, "reinjection", Reinjection(config=ReinjectConfig((0.1,), (1, 2), batch_size=32)))
        patch.setitem(ANALYSES, "reactivation", REACTIVATION)
        patch.setattr(landscape, "loss_along_line", called := Mock(wraps=landscape.loss_along_line))
        run_experiment(EXPERIMENT, out, report=lambda line: None)
    table = {(row["attack"], row["defense"]): row for row in read_rows(out / "results.jsonl")}
    assert called.call_count == 1
    return Finished(out, table, *called.call_args.args)


def test_settings_take_the_names_of_all_analyses_and_no_others() -> None:
    assert EVERY == (
        "verdict", "answers", "landscape", "latents", "neurons", "membership", "reinjection", "reactivation"
    )  # fmt: skip
    document = {"name": "x", "attacks": [{"name": "badnets"}], "defenses": [], "analyses": ["landscape"]}
    assert parse_experiment(document).analyses == ("landscape",)
    with pytest.raises(UserError, match=r"analyses.*landscape"):
        parse_experiment({**document, "analyses": ["dreams"]})
    with pytest.raises(UserError, match=r"Experiment.analyses.*neurons"):
        dataclasses.replace(EXPERIMENT, analyses=("dreams",))


def test_each_analysis_is_computed_for_the_models_to_which_it_applies(finished: Finished) -> None:
    held = {model: set(row["analyses"]) for model, row in finished.table.items()}
    both = {"answers", "latents", "membership", "reinjection", "reactivation"}
    assert held["badnets", "none"] == {*both, "neurons", "verdict"}
    assert held["badnets", "finetune"] == {*both, "landscape"}
    assert held["badnets", "mm_bm"] == both  # A repair with bounds is not on a line with the victim.
    assert held["badnets", "tac"] == set()  # It flags nothing at this level, and changes nothing.
    assert held["none", "none"] == {"membership", "verdict"}
    assert held["none", "finetune"] == {"membership"}


def test_neurons_are_not_compared_without_one_target_class() -> None:
    label_map, trigger = BadNets(labels="all_to_all").label_map(10), BadNets().trigger(jax.random.key(0), (16, 16, 3))
    subject = Subject({}, None, digits().train, np.arange(0), trigger, label_map)
    context: Any = None
    assert Neurons().compute(context, subject) is None


def test_the_line_passes_through_the_victim_and_the_repair(finished: Finished) -> None:
    out, table = finished.out, finished.table
    line = table["badnets", "finetune"]["analyses"]["landscape"]
    at = {position: number for number, position in enumerate(line["positions"])}
    for position, defense in ((0.0, "none"), (1.0, "finetune")):
        for rate in ("acc", "asr"):
            assert line[rate][at[position]] == pytest.approx(table["badnets", defense][rate], abs=1e-4)
    assert_trees_equal(finished.victim, load_model(out / "victims" / "badnets-0")[1])
    labels = np.asarray(finished.test.labels)
    for position, variables in ((0.0, finished.victim), (1.0, finished.repaired)):
        for loss, images, targets, counted in (
            ("clean_loss", finished.test.images, labels, labels >= 0),
            ("backdoor_loss", finished.triggered, np.ones_like(labels), labels != 1),
        ):
            logits = np.asarray(finished.classifier.logits(variables, images)[0], np.float64)
            losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), targets]
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


def test_members_are_clean_images_of_the_training_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def signal(classifier: Classifier, variables: Variables, data: Dataset) -> np.ndarray:
        seen.append(data)
        return np.zeros(60)

    monkeypatch.setattr(membership, "loss_signal", signal)
    monkeypatch.setattr(membership, "shadow_signal", lambda *_: np.zeros(60))
    small = dataclasses.replace(EXPERIMENT, defenses=(), analyses=("membership",))
    run_experiment(small, tmp_path / "out", report=lambda line: None)
    task = digits()
    trained = {image.tobytes() for image in np.asarray(task.train.images)}
    inside, outside, left_out = seen[:3]
    assert len(inside) == len(outside) == 60
    assert all(image.tobytes() in trained for image in np.asarray(inside.images))
    assert not any(image.tobytes() in trained for image in np.asarray(outside.images))
    used = load("digits", train_size=200, test_size=120)
    assert used.left_out is not None
    np.testing.assert_array_equal(left_out.images, used.left_out.images)


def test_reinjection_starts_from_the_clean_model_the_untrained_model_and_the_repair(finished: Finished) -> None:
    out, table = finished.out, finished.table
    rows = table["badnets", "none"]["analyses"]["reinjection"]["rows"]
    assert [(row["start"], row["steps"] > 0) for row in rows] == [
        ("clean", False), ("clean", True), ("clean", True),
        ("untrained", False), ("untrained", True), ("untrained", True),
    ]  # fmt: skip
    assert rows[0]["acc"] == pytest.approx(table["none", "none"]["acc"], abs=1e-6)
    repaired = table["badnets", "finetune"]["analyses"]["reinjection"]["rows"]
    assert {row["start"] for row in repaired} == {"repaired"}
    assert repaired[0]["asr"] == pytest.approx(table["badnets", "finetune"]["asr"], abs=1e-6)
    assert (out / "victims" / "none-0").is_dir()


def latents_of(finished: Finished, variables: Variables, images: jax.Array) -> np.ndarray:
    return np.asarray(finished.classifier.features(variables, images)[0], np.float64)


def test_neurons_hold_the_true_change_and_its_agreement_with_each_score(finished: Finished) -> None:
    found, victim = finished.table["badnets", "none"]["analyses"]["neurons"], finished.victim
    others = np.asarray(finished.test.labels) != 1
    clean, triggered = (latents_of(finished, victim, x[others]) for x in (finished.test.images, finished.triggered))
    change = triggered - clean
    np.testing.assert_allclose(found["mean"], change.mean(0), atol=2e-5)
    np.testing.assert_allclose(found["size"], np.abs(change).mean(0), atol=2e-5)
    assert found["target"] == 1 and max(found["size"]) > 1e-3

    workspace = make_workspace(EXPERIMENT, finished.out)
    task = workspace.task
    defenders = task.train.take(clean_subset(workspace, 0))
    kernel, bias = (np.asarray(part, np.float64) for part in finished.classifier.head_weights(victim))

    def lead(scale: float) -> float:
        """The smallest lead of the target class over the defender's images."""
        moved = latents_of(finished, victim, defenders.images) + scale * np.asarray(found["vector"])
        logits = moved @ kernel + bias
        return float(np.min(logits[:, 1] - np.delete(logits, 1, axis=1).max(1)))

    assert lead(1.0) == pytest.approx(0, abs=1e-4) and lead(0.9) < -1e-3

    norm, variance = victim["params"]["bn2"], np.asarray(victim["batch_stats"]["bn2"]["var"])
    filters = np.moveaxis(np.asarray(victim["params"]["conv2"]["kernel"]), -1, 0)
    bounds = np.abs(norm["scale"]) / np.sqrt(variance + 1e-5) * [np.linalg.norm(f.reshape(9, -1), 2) for f in filters]
    config, key = ANP(steps=3, flip=task.flip), streams(0, "neurons")["analysis"]
    masks, _ = fit_masks(key, finished.classifier, victim, defenders, config)
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


def test_latents_are_projected_onto_their_two_principal_components(finished: Finished) -> None:
    for defense, variables in (("none", finished.victim), ("finetune", finished.repaired)):
        found = finished.table["badnets", defense]["analyses"]["latents"]
        np.testing.assert_array_equal(found["labels"], finished.test.labels)
        both = [latents_of(finished, variables, images) for images in (finished.test.images, finished.triggered)]
        together = np.concatenate(both)
        _, components = np.linalg.eigh(np.cov(together.T))
        expected = (together - together.mean(0)) @ components[:, [-1, -2]]
        drawn = np.concatenate([found["clean"], found["triggered"]])
        np.testing.assert_allclose(np.abs(drawn), np.abs(expected), atol=2e-3)
        assert (drawn.std(0) > 0.01).all()
        assert [np.shape(points) for points in found["tsne"]] == [(len(part), 2) for part in both]


@pytest.mark.parametrize(
    ("name", "found"), [("small_cnn", ("bn2",)), ("resnet18", ("layer4_1", "bn2")), ("preact_resnet18", None)]
)
def test_the_batch_norm_that_writes_the_latents_is_found(name: str, found: tuple[str, ...] | None) -> None:
    images = digits().train.images[:2]
    classifier = build_classifier(name, 10, width=2)
    variables = random_variables(classifier, images)
    assert latent_norm(classifier, variables, images) == found


def test_every_analysis_is_drawn_and_none_without_findings(finished: Finished) -> None:
    out, table = finished.out, finished.table
    page = render(list(table.values()), out)
    plain = render([{**row, "analyses": {}} for row in table.values()], out)
    cards = ("verdict", "answers")
    for name, analysis in ANALYSES.items():
        assert analysis.draw([]) is None
        assert (f"<h2>{analysis.title}</h2>" in page) == (name not in cards)
        assert f"<h2>{analysis.title}</h2>" not in plain
    assert page.count("<img") >= plain.count("<img") + len(ANALYSES) - len(cards)


def test_rows_without_analyses_are_read(finished: Finished) -> None:
    rows = [{name: value for name, value in row.items() if name != "analyses"} for row in finished.table.values()]
    assert ANALYSES["landscape"].findings(rows) == {}
    assert "Membership" not in render(rows, finished.out)


def formulas(figure: Figure) -> list[str]:
    """Tick labels that are formulas, which would be shown unparsed."""
    figure.draw_without_rendering()
    ticks = [
        tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklabels(which="both")
    ]
    return [tick.get_text() for tick in ticks if "$" in tick.get_text()]


def test_figures_show_means_over_seeds(finished: Finished) -> None:
    row = finished.table["badnets", "finetune"]
    other = json.loads(json.dumps(row))
    other["analyses"]["landscape"]["acc"] = [0.0] * len(row["analyses"]["landscape"]["acc"])
    figure = ANALYSES["landscape"].draw([row, {**other, "seed": 1}])
    assert figure is not None and not formulas(figure)
    drawn = np.asarray(figure.axes[1].lines[0].get_ydata(), np.float64)
    np.testing.assert_allclose(drawn, 50 * np.asarray(row["analyses"]["landscape"]["acc"]))
    assert mean_over_seeds([{"a": 1.0}, {"a": 3.0}], "a") == 2


def test_figures_show_the_findings(finished: Finished) -> None:
    rows = list(finished.table.values())
    drawings = [ANALYSES[name].draw(rows) for name in ("neurons", "latents", "membership", "reinjection")]
    axes: list[list[Any]] = [drawing.axes for drawing in drawings if drawing is not None and not formulas(drawing)]
    (cloud, bars), planes, (intervals,), (curves,) = axes

    found = finished.table["badnets", "none"]["analyses"]["neurons"]
    np.testing.assert_allclose(cloud.collections[0].get_offsets(), np.transpose([found["mean"], found["vector"]]))
    heights = [bar.get_height() for bar in bars.patches if isinstance(bar, Rectangle)]
    measured = list(found["agreement"].values())
    assert heights == [of[measure] for measure in ("cosine", "spearman", "precision") for of in measured]

    clouds = ANALYSES["latents"].findings(rows)["badnets"]
    assert list(clouds) == ["none", "finetune", "mm_bm"]
    for panel, near, (points,) in zip(planes[:3], planes[3:], clouds.values(), strict=True):
        for drawn, name in zip(panel.collections, ("clean", "triggered"), strict=True):
            np.testing.assert_allclose(drawn.get_offsets(), points[name])
        for drawn, expected in zip(near.collections, points["tsne"], strict=True):
            np.testing.assert_allclose(drawn.get_offsets(), expected)

    models = [seeds[0] for of in ANALYSES["membership"].findings(rows).values() for seeds in of.values()]
    values = [[found[signal]["auc"][0] for found in models] for signal in models[0]]
    assert [bar.lines[0].get_xdata().tolist() for bar in intervals.containers] == values

    lines = [
        [row for row in seeds[0]["rows"] if row["start"] == start]
        for of in ANALYSES["reinjection"].findings(rows).values()
        for seeds in of.values()
        for start in dict.fromkeys(row["start"] for row in seeds[0]["rows"])
    ]
    curves_drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in curves.lines if len(line.get_xdata())]
    assert curves_drawn == [([row["steps"] for row in line], [100 * row["asr"] for row in line]) for line in lines]


def test_reactivation_compares_each_repair_with_the_clean_model_under_one_search(finished: Finished) -> None:
    clean, finetuned, bounded = (
        finished.table["badnets", defense]["analyses"]["reactivation"] for defense in ("none", "finetune", "mm_bm")
    )
    assert [found["start"] for found in (clean, finetuned, bounded)] == ["clean", "repaired", "repaired"]
    assert clean["surrogate"] == finetuned["surrogate"] == bounded["surrogate"]
    row = finished.table["badnets", "finetune"]
    assert finetuned["trigger"] == pytest.approx(row["asr"], abs=1e-6) and finetuned["images"] == 100
    assert all(0 <= clean[name] <= 1 for name in ("trigger", "retuned", "retuned_acc", "nearby", "alone"))
    figure = REACTIVATION.draw(list(finished.table.values()))
    assert figure is not None
    heights = [bar.get_height() for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]
    assert heights[:3] == pytest.approx([100 * found["trigger"] for found in (clean, finetuned, bounded)])
