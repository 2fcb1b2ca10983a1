"""The report: means and standard deviations, tables, and a self-contained page."""

import dataclasses
import json
import re
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from backdoor_jax.analyses.base import Row
from backdoor_jax.cli.experiments import print_table
from backdoor_jax.defenses import DEFENSES, NAD, FineTune, GradientDefense, SuperFineTune
from backdoor_jax.files import beside
from backdoor_jax.report import compact, figures, markdown, render, summarize, write_page
from backdoor_jax.report.table import COLUMNS, cells

SEEDS = (0, 1, 2)
ACC = {"none": (0.95, 0.96, 0.94), "finetune": (0.93, 0.95, 0.94), "tac": (0.90, 0.91, 0.95), "pad_ft": (0.6, 0.7, 0.5)}
ASR = {"none": (1.0, 0.99, 1.0), "finetune": (0.7, 0.6, 0.8), "tac": (0.0, 0.02, 0.01), "pad_ft": (0.3, 0.1, 0.2)}
TUNED = dataclasses.asdict(FineTune(steps=50))
CYCLIC = dataclasses.asdict(
    SuperFineTune(steps=50, learning_rate=0.01, peak1=0.25, peak2=0.02, up=5, down=5, first_phase=0.4)
)
STEADY = json.loads(json.dumps(dataclasses.asdict(NAD(steps=50, layers=("a/b",) * 3))))
SETTINGS = {"finetune": TUNED, "tac": TUNED, "pad_ft": {"learning_rate": 0.01}, "none": None}


def found(**changes: Any) -> dict[str, Any]:
    test = {"smallest": 0, "statistic": 2.0, "p_value": 0.004, "mad_score": 3.0}
    norms = [1.0, 5.0, 4.5, 5.5, 4.8]
    return {
        "verdict": "class 0",
        "flagged": 0,
        "statistic": "per_sample",
        "alpha": 0.05,
        "tests": {"worst_case": test, "per_sample": test},
        "worst_case": norms,
        "per_sample": norms,
        **changes,
    }


def row(attack: str, defense: str, seed: int, **changes: Any) -> Row:
    poisoned = attack != "none"
    rates = {
        "acc": ACC.get(defense, ACC["tac"])[seed],
        "asr": ASR.get(defense, ASR["tac"])[seed] if poisoned else None,
        "ra": 0.5 if poisoned else None,
        "der": 0.75 if poisoned else None,
    }
    return {
        "experiment": "hand-made",
        "dataset": "digits",
        "model": "preact_resnet18-2",
        "attack": attack,
        "poison_rate": 0.1 if poisoned else 0.0,
        "defense": defense,
        "method": defense,
        "clean_ratio": 0.05,
        "data_used": "nothing" if defense == "none" else "training_set" if defense == "pad_ft" else "clean",
        "n_used": 0 if defense == "none" else 70,
        "seed": seed,
        **rates,
        **{f"{name}_before": value for name, value in rates.items() if name != "der"},
        "target": 0 if defense == "tac" else None,
        "seconds": 1.0 + seed,
        "compile_seconds": 3.0,
        "device": "cpu, 2 cores",
        "versions": {"jax": "0.10.2"},
        "config": {"attack": None, "defense": SETTINGS.get(defense, TUNED)},
        "info": {"changed": defense != "none", **({"scan": found()} if defense == "tac" else {})},
        **changes,
    }


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    attacks = ("badnets", "blended", "none")
    return [row(attack, defense, seed) for seed in SEEDS for attack in attacks for defense in ACC]


@pytest.fixture(scope="module")
def page(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    example(folder, "badnets")
    return render(rows, folder)


def example(folder: Path, label: str, channels: int = 3) -> None:
    (folder / "examples").mkdir(exist_ok=True)
    clean = np.full((8, 8, channels), 200, np.uint8)
    triggered = clean.copy()
    triggered[-2:, -2:] = 255
    np.savez(folder / "examples" / f"{label}.npz", clean=clean, triggered=triggered)


def table_of(page: str) -> list[tuple[str, list[str]]]:
    """Style and cells of every line of the page's table."""
    lines = re.findall(r'<tr class="([^"]*)">(.*?)</tr>', page, re.DOTALL)
    return [(style, re.findall(r"<td>(.*?)</td>", cells)) for style, cells in lines]


def panels(figure: Figure) -> list[Any]:
    """The axes of a figure; matplotlib declares less about what is in them than there is."""
    return list(figure.axes)


def images(page: str) -> list[tuple[str, str]]:
    """Title and source of every figure; what it shows follows the title."""
    return re.findall(r'<img alt="([^":]*)[^"]*" src="([^"]*)"', page)


def test_summaries_are_means_and_standard_deviations_over_seeds(rows: list[Row]) -> None:
    found = {(s.attack, s.defense): s for s in summarize(rows)}
    assert len(found) == 12
    for defense in ACC:
        summary = found["blended", defense]
        assert summary.seeds == 3
        assert summary.acc == pytest.approx((np.mean(ACC[defense]), np.std(ACC[defense], ddof=1)))
        assert summary.asr == pytest.approx((statistics.mean(ASR[defense]), statistics.stdev(ASR[defense])))
        assert summary.seconds == pytest.approx(2.0)
        assert found["none", defense].asr is None
        assert found["none", defense].der is None


def test_one_seed_has_no_deviation_and_missing_rates_are_left_out() -> None:
    (one,) = summarize([row("badnets", "tac", 0)])
    assert one.acc == (0.9, None)
    (two,) = summarize([row("badnets", "tac", 0), row("badnets", "tac", 1, asr=None)])
    assert two.asr == (0.0, None)
    assert two.seeds == 2


def test_summaries_show_where_seeds_differ() -> None:
    unchanged = row("badnets", "tac", 1, target=None, info={"changed": False})
    (summary,) = summarize([row("badnets", "tac", 0), unchanged])
    assert (summary.changed, summary.target, summary.data) == ("yes, no", "0, -", "70 clean")


def test_the_compact_table_has_a_row_for_each_attack_and_a_column_for_each_defense() -> None:
    judged = [row("badnets", "none", 0), row("none", "none", 0), row("badnets", "tac", 0), row("badnets", "tac", 1)]
    judged.append(row("none", "broken", 0, acc=None))
    assert compact(judged).splitlines() == [
        "| attack | none | tac | broken |",
        "| --- | --- | --- | --- |",
        "| badnets | 95.0 / 100.0 | 90.5 ± 0.7 / 1.0 ± 1.4 | - |",
        "| none | 95.0 | - | - |",
    ]


def test_the_markdown_table_is_in_percent(rows: list[Row]) -> None:
    lines = markdown(rows).splitlines()
    assert len(lines) == 2 + 12
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells == [
        "badnets",
        "tac",
        "3",
        "92.0 ± 2.6",
        "1.0 ± 1.0",
        "50.0 ± 0.0",
        "75.0 ± 0.0",
        "2.0",
        "yes",
        "70 clean",
        "0",
    ]
    assert "| - | - | - |" in lines[-1]


def test_the_printed_table_shows_labels_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([row("badnets", "tac[paper]", 0), row("badnets", "tac[/]", 0), row("none", "tac", 0)])
    output = capsys.readouterr().out
    assert "tac[paper]" in output
    assert "tac[/]" in output
    assert "90.0" in output


def test_the_printed_table_is_wide_enough_for_every_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [row("badnets_trained_longer", "super_finetune_toolbox", seed) for seed in range(3)]
    print_table([{**each, "target": seed, "n_used": 16000, "seconds": 12345.6} for seed, each in enumerate(rows)])
    output = capsys.readouterr().out
    assert "…" not in output
    assert all(cell in output for cell in cells(summarize(rows)[0])[:7])


def test_the_page_is_self_contained(page: str) -> None:
    assert "http" not in page
    assert not re.findall(r"<(link|iframe|object)\b", page)
    assert re.findall(r"<script\b[^>]*>", page) == ["<script>"]
    assert not re.findall(r"@import|url\(", page)
    assert images(page)
    assert all(source.startswith("data:image/png;base64,") for _, source in images(page))
    assert len(re.findall(r"\b(?:src|href)=", page)) == len(images(page))


def test_the_page_has_every_figure(page: str) -> None:
    titles = [title for title, _ in images(page)]
    assert titles.count("Accuracy against attack success") == 1
    assert titles.count("Triggers") == 1
    assert titles.count("Scan for the poisoned class") == 9
    assert titles.count("Learning rates") == 1
    assert len(titles) == 12


def test_the_page_has_every_attack_and_defense_with_its_rates(page: str, rows: list[Row]) -> None:
    cells = [cells for _, cells in table_of(page)]
    assert [tuple(line[:2]) for line in cells] == [(s.attack, s.defense) for s in summarize(rows)]
    assert cells[2][3:5] == ["92.0 ± 2.6", "1.0 ± 1.0"]
    assert all(len(line) == len(COLUMNS) for line in cells)


def test_only_repairs_that_failed_or_cost_too_much_are_marked(page: str) -> None:
    bad = {tuple(cells[:2]) for style, cells in table_of(page) if "bad" in style.split()}
    assert bad == {
        *((attack, failed) for attack in ("badnets", "blended") for failed in ("none", "finetune", "pad_ft")),
        ("none", "pad_ft"),
    }
    assert "In red:" in page


def test_a_page_without_failures_does_not_explain_the_marks(tmp_path: Path) -> None:
    assert "In red:" not in render([row("none", "none", 0), row("none", "tac", 0, acc=0.93)], tmp_path)


def test_labels_are_escaped(tmp_path: Path) -> None:
    named = {"experiment": "<script>alert(1)</script>", "dataset": "a&b"}
    page = render([row("<i>bad", "none", 0, **named), row("<i>bad", "<b>", 0, **named)], tmp_path)
    assert "<b><b>" not in page and "<td><b>" not in page
    assert "<i>" not in page
    assert page.count("<script>") == 1
    assert "&lt;b&gt;" in page
    assert "a&amp;b" in page


@pytest.mark.parametrize("label", ["cost $5$ or $6", "$\\frac$", "ünï ✓"])
def test_any_label_can_be_drawn(tmp_path: Path, label: str) -> None:
    scanned = row(label, label, 0, method="finetune", info={"changed": True, "scan": found()})
    example(tmp_path, "badnets")
    page = render([row(label, "none", 0), scanned], tmp_path)
    assert len(images(page)) == 4


def test_every_point_has_a_label_and_every_attack_is_in_the_legend(rows: list[Row]) -> None:
    figure = figures.scatter(rows)
    assert isinstance(figure, Figure)
    (legend,) = [axes.get_legend() for axes in panels(figure)]
    named = {text.get_text() for text in legend.get_texts()}
    assert named == {"badnets", "blended"}
    (axes,) = panels(figure)
    labels = [text.get_text() for text in axes.texts]
    assert sorted(labels) == sorted(2 * ["no defense", "finetune", "tac", "pad_ft"])


def test_labels_of_close_points_do_not_overlap() -> None:
    crowd = [
        row(attack, f"method {number}", 0, acc=0.95 + 0.001 * number, asr=0.001 * number)
        for attack in ("badnets", "blended", "wanet")
        for number in range(8)
    ]
    figure = figures.scatter(crowd)
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in panels(figure)[0].texts]
    assert len(boxes) == 24
    assert not [(one, other) for one, other in combinations(boxes, 2) if one.overlaps(other)]


def test_points_are_the_means_in_percent(rows: list[Row]) -> None:
    (axes,) = panels(figures.scatter(rows))
    points = {
        (round(line.get_xdata()[0], 3), round(line.get_ydata()[0], 3)) for line in axes.lines if len(line.get_xdata())
    }
    for defense in ACC:
        assert (round(100 * np.mean(ACC[defense]), 3), round(100 * np.mean(ASR[defense]), 3)) in points


def test_clean_models_alone_make_a_page(tmp_path: Path) -> None:
    page = render([row("none", "none", 0), row("none", "tac", 0)], tmp_path)
    assert [cells[:2] for _, cells in table_of(page)] == [["none", "none"], ["none", "tac"]]
    assert [title for title, _ in images(page)] == ["Scan for the poisoned class", "Learning rates"]


def test_a_victim_alone_makes_a_page_without_figures(tmp_path: Path) -> None:
    assert images(render([row("none", "none", 0)], tmp_path)) == []


def test_the_figure_of_a_scan_of_too_few_classes_says_so(tmp_path: Path) -> None:
    test = {"smallest": 1, "statistic": 1.0, "p_value": None, "mad_score": 0.5}
    scan = found(
        verdict="too few classes to tell",
        flagged=None,
        tests={"worst_case": test, "per_sample": test},
        worst_case=[2.0, None, 3.0],
        per_sample=[None, None, None],
    )
    scanned = row("badnets", "tac", 0, target=None, info={"changed": False, "scan": scan})
    ((name, figure),) = figures.perturbations([scanned])
    assert name == "badnets-0"
    assert "too few classes to tell" in figure.get_suptitle()
    assert [axes.get_title() for axes in figure.axes] == [
        "worst case: too few classes",
        "per sample (verdict): too few classes",
    ]
    assert len(images(render([row("badnets", "none", 0), scanned], tmp_path))) == 3


def test_a_model_scanned_by_several_defenses_is_shown_once(rows: list[Row]) -> None:
    twice = [row("badnets", "tac", 0), row("badnets", "tac_known", 0, info={"changed": True, "scan": found()})]
    shown = figures.perturbations(twice)
    assert [name for name, _ in shown] == ["badnets-0"]
    assert all(isinstance(figure, Figure) for _, figure in shown)
    heights = [[patch.get_height() for patch in axes.patches] for axes in panels(shown[0][1])]
    assert heights == [[1.0, 5.0, 4.5, 5.5, 4.8]] * 2
    assert figures.perturbations([row("badnets", "finetune", 0)]) == []


def test_learning_rates_are_drawn_for_each_step() -> None:
    cyclic = row("badnets", "super_finetune", 0, config={"attack": None, "defense": CYCLIC})
    steady = row("badnets", "nad", 0, config={"attack": None, "defense": STEADY})
    shown = [row("badnets", name, 0) for name in ("finetune", "pad_ft", "tac")]
    figure = figures.learning_rates([*shown, cyclic, steady])
    assert isinstance(figure, Figure)
    (axes,) = panels(figure)
    plain, triangular, constant = axes.lines
    assert (plain.get_label(), triangular.get_label()) == ("finetune\ntac", "super_finetune")
    assert constant.get_ydata() == pytest.approx(np.full(50, 0.01))
    assert len(plain.get_xdata()) == len(triangular.get_xdata()) == 50
    assert plain.get_ydata()[[0, 25]] == pytest.approx([0.01, 0.005], rel=1e-3)
    assert triangular.get_ydata()[[0, 5, 10, 25]] == pytest.approx([0.01, 0.25, 0.01, 0.02], rel=1e-3)
    figure.draw_without_rendering()
    assert not any("$" in tick.get_text() for tick in axes.yaxis.get_ticklabels(which="both"))
    assert figures.learning_rates([row("badnets", "none", 0)]) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_triggers_are_shown_with_the_difference(tmp_path: Path, channels: int) -> None:
    assert figures.triggers(tmp_path / "examples") is None
    example(tmp_path, "badnets", channels)
    beside(tmp_path / "examples" / "other.npz", "partial", ".npz").write_bytes(b"half")
    figure = figures.triggers(tmp_path / "examples")
    assert isinstance(figure, Figure)
    clean, triggered, difference = (axes.images[0].get_array() for axes in panels(figure))
    assert clean.shape == ((8, 8, 3) if channels == 3 else (8, 8))
    assert (triggered[-1, -1] == 255).all()
    assert (difference[0, 0] == 127).all()
    assert (difference[-1, -1] == 254).all()


def test_triggers_side_by_side_fill_columns_first(tmp_path: Path) -> None:
    for name in "abc":
        example(tmp_path, name)
    figure = figures.triggers(tmp_path / "examples", side_by_side=2)
    assert isinstance(figure, Figure)
    names = [axes.get_title() if axes.images else None for axes in figure.axes]
    assert names[::3] == ["a", "c", "b", None]


def test_the_page_is_written_without_temporary_files(rows: list[Row], tmp_path: Path) -> None:
    path = write_page(rows[:2], tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(rows[:2], tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_every_gradient_defense_has_a_learning_rate_to_draw() -> None:
    methods = {name: method for name, method in DEFENSES.items() if issubclass(method, GradientDefense)}
    settings = {name: {"attack": None, "defense": dataclasses.asdict(method())} for name, method in methods.items()}
    figure = figures.learning_rates([row("badnets", name, 0, config=config) for name, config in settings.items()])
    assert figure is not None
    assert {name for line in figure.axes[0].lines for name in str(line.get_label()).split("\n")} == methods.keys()
