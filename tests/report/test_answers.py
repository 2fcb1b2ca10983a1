"""What the page says first, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backdoor_jax.analyses.base import Row
from backdoor_jax.defenses import FineTune
from backdoor_jax.report import render
from backdoor_jax.report.answers import cards, class_name, lead, succeeds
from backdoor_jax.report.table import summarize

NAMES = ("go", "stop", "left", "right", "slow")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def verdict(outcome: str = "backdoored", target: int | None = 1, **changes: Any) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "target": target,
        "p_value": 0.0002,
        "why": None,
        "suspect": 1,
        "quantity": "norm",
        "values": [5.0, 1.0, 4.0, None, 4.5],
        "class_names": NAMES,
        **changes,
    }


def row(attack: str, defense: str, acc: float, asr: float | None, seed: int = 0, **changes: Any) -> Row:
    return {
        "experiment": "signs demo",
        "dataset": "signs",
        "model": "tiny",
        "attack": attack,
        "defense": defense,
        "method": defense,
        "data_used": "clean",
        "n_used": 10,
        "seed": seed,
        "acc": acc,
        "asr": asr,
        "ra": None,
        "der": None,
        "target": None,
        "seconds": 1.0,
        "device": "cpu",
        "versions": {"jax": "0"},
        "config": {
            "attack": None if attack == "none" else {"target": 1, "labels": "all_to_one"},
            "defense": {"learning_rate": 0.01},
        },
        "info": {"changed": True},
        **changes,
    }


def answers(*triggered: int) -> dict[str, Any]:
    return {"answers": {"labels": [0, 1, 2], "clean": [0, 1, 2], "triggered": list(triggered), "class_names": NAMES}}


def victim(**changes: Any) -> Row:
    return row("badnets", "none", 0.95, 0.99, analyses={"verdict": verdict(**changes), **answers(1, 1, 1)})


def clean_model(**changes: Any) -> Row:
    found = verdict("no sign of a backdoor", None, p_value=0.3, **changes)
    return row("none", "none", 0.96, None, analyses={"verdict": found})


@pytest.fixture
def experiment(tmp_path: Path) -> tuple[list[Row], Path]:
    (tmp_path / "examples").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "examples" / "badnets.npz", clean=images, triggered=images, labels=np.arange(3))
    rows = [
        victim(),
        row("badnets", "finetune", 0.951, 0.6, analyses=answers(1, 1, 2)),
        row("badnets", "d3", 0.94, 0.01, analyses=answers(0, 1, 4)),
        row("badnets", "midway", 0.95, 0.7, info={"changed": True, "untargeted": "nothing flagged"}),
        row("badnets", "pad_ft", 0.8, 0.3, info={"changed": True, "purified": 60, "purified_poisoned": 8}),
        clean_model(),
        row("none", "finetune", 0.96, None),
        row("none", "tac", 0.96, None, info={"changed": False}),
    ]
    return rows, tmp_path


def test_the_page_leads_with_the_answer(experiment: tuple[list[Row], Path]) -> None:
    assert lead(experiment[0]) == [
        "The detector names the attacker's class in 1 of 1 backdoored models.",
        "It flags 0 of 1 clean models.",
        "d3 removed every backdoor: ASR at most 5 %, ACC at most 3 points lower.",
    ]


def test_models_that_show_nothing_do_not_count(tmp_path: Path) -> None:
    guessing = [{**row("badnets", defense, 0.2, 0.0), "near_chance": True} for defense in ("none", "d3", "clp")]
    assert lead(guessing) == ["1 of 1 models do not count: near chance, or an ASR below 50 % before any repair."]
    (card,) = cards(guessing, tmp_path)
    assert card.repaired.startswith("It does not count: near chance") and not card.good and not card.failed
    hardly = [row("blended", "none", 0.95, 0.3), row("blended", "d3", 0.95, 0.01)]
    assert lead([*hardly, row("badnets", "none", 0.9, 0.9), row("badnets", "d3", 0.9, 0.6)]) == [
        "No repair removed every backdoor: ASR at most 5 %, ACC at most 3 points lower.",
        "1 of 2 models do not count: near chance, or an ASR below 50 % before any repair.",
    ]


def test_a_card_says_what_was_found_and_what_the_repairs_did(experiment: tuple[list[Row], Path]) -> None:
    attacked, clean = cards(*experiment)
    assert (attacked.title, clean.title) == ("Backdoored by badnets", "Clean model")
    assert attacked.found == "Found: a backdoor to stop, which is right (p = 0.0002)."
    assert attacked.repaired == "The attack succeeds on 99.0 % of images; removed by d3 (1.0 % left)."
    assert attacked.failed == [
        ("finetune", "left ASR 60.0 %", FineTune.limits),
        ("midway", "left ASR 70.0 %", "it unlearned all classes, not the target alone: nothing flagged"),
        (
            "pad_ft",
            "left ASR 30.0 % and cost 15.0 points of ACC",
            "8 of the 60 images that it took for clean were poisoned",
        ),
    ]
    assert clean.found == "Nothing found, which is right: stop stands out most, but not enough (p = 0.3)."
    assert clean.repaired == "With nothing to repair, tac changed nothing and finetune cost at most 3 points of ACC."
    assert attacked.good and clean.good and not clean.failed


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (victim(target=2, suspect=2), "Found: a backdoor to left, which is wrong (p = 0.0002)."),
        (victim(outcome="no sign of a backdoor", target=None, p_value=0.2), "Missed: stop stands out most, but not"),
        (victim(outcome="cannot tell", target=None, why="too few classes"), "Cannot tell: too few classes."),
        ({**clean_model(), "analyses": {"verdict": verdict()}}, "Found: a backdoor to stop, a false alarm"),
    ],
)
def test_a_wrong_verdict_is_called_wrong(model: Row, found: str, tmp_path: Path) -> None:
    (card,) = cards([model], tmp_path)
    assert card.found.startswith(found)
    assert not card.good


def test_verdicts_of_several_seeds_are_counted(tmp_path: Path) -> None:
    missed = {**victim(outcome="no sign of a backdoor", target=None, p_value=0.2), "seed": 1}
    (card,) = cards([victim(), missed], tmp_path)
    assert card.found == "In 1 of 2 models the attacker's class is named (p = 0.0002, 0.2)."


def test_bars_show_the_suspect_first_and_then_by_value(experiment: tuple[list[Row], Path]) -> None:
    bars = cards(*experiment)[0].bars
    assert [bar.name for bar in bars] == ["stop", "left", "slow", "go", "right"]
    assert [bar.share for bar in bars] == [20.0, 80.0, 90.0, 100.0, 0.0]
    assert [bar.suspect for bar in bars] == [True, False, False, False, False]
    assert bars[-1].value == "-"


def test_answers_are_shown_for_images_of_other_classes_than_the_target(experiment: tuple[list[Row], Path]) -> None:
    card = cards(*experiment)[0]
    assert [name for _, name in card.pictures] == ["go", "left"]
    assert [(label, [answer.kind for answer in given]) for label, given in card.answers] == [
        ("none", ["target", "target"]),
        ("finetune", ["target", "right"]),
        ("d3", ["right", "wrong"]),
    ]


def test_a_repair_succeeds_at_little_success_of_the_attack_and_little_cost() -> None:
    judged = [
        row("badnets", name, acc, asr) for name, acc, asr in (("a", 0.92, 0.05), ("b", 0.919, 0), ("c", 0.95, 0.06))
    ]
    before, *repairs = summarize([row("badnets", "none", 0.95, 1.0), *judged])
    assert [succeeds(repair, before) for repair in repairs] == [True, False, False]


def test_classes_without_names_have_numbers() -> None:
    assert class_name(3, None) == "class 3"


CHECK = """<script>
document.querySelectorAll("details").forEach(part => part.open = true);
const button = [...document.querySelectorAll(".results button")].find(one => one.textContent === "ASR %");
const column = () => [...document.querySelectorAll(".results tbody tr")].map(line => line.cells[4].textContent);
const images = [...document.images];
const found = {images: images.map(image => image.naturalWidth), alts: images.map(image => image.alt)};
button.click(); found.up = column(); button.click(); found.down = column();
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page in")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_every_image_and_sorts_the_table(experiment: tuple[list[Row], Path], width: int) -> None:
    rows, folder = experiment
    assert BROWSER is not None
    page = folder / "report.html"
    page.write_text(render(rows, folder).replace("</body>", CHECK + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command = [
        BROWSER,
        *options,
        f"--window-size={width},900",
        "--virtual-time-budget=5000",
        "--dump-dom",
        page.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search("FOUND(.*)END", shown)
    assert match, shown[:500]
    found = json.loads(match[1])
    assert len(found["images"]) >= 4
    assert all(found["images"]) and all(found["alts"])
    assert found["up"] == ["-", "-", "-", "1.0", "30.0", "60.0", "70.0", "99.0"]
    assert found["down"] == found["up"][::-1]
    assert found["wide"] <= 0
