"""The page on detection shows what the committed rows give, and the package's reference is theirs."""

from pathlib import Path

import detection_page
import numpy as np
import pytest
from pages import fill

ROWS = detection_page.population_rows()


def test_the_tables_of_the_page_are_those_of_the_rows() -> None:
    text = detection_page.PAGE.read_text(encoding="utf-8")
    assert fill(text, detection_page.tables(ROWS)) == text


def test_the_reference_is_the_choosing_half_of_the_clean_models() -> None:
    assert detection_page.reference(ROWS) == detection_page.REFERENCE.read_text(encoding="utf-8")


def test_a_model_of_the_other_half_changes_the_tables_and_not_the_reference() -> None:
    number = next(i for i, row in enumerate(ROWS) if row["attack"] is None and row["reporting"])
    fewer = ROWS[:number] + ROWS[number + 1 :]
    assert detection_page.reference(fewer) == detection_page.reference(ROWS)
    assert detection_page.tables(fewer)["overview"] != detection_page.tables(ROWS)["overview"]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    detection_page.draw(ROWS, tmp_path / "roc.png")
    assert (tmp_path / "roc.png").stat().st_size > 1000


def test_areas_and_intervals_follow_their_definitions() -> None:
    poisoned, clean = np.array([3.0, 4.0, 1.0]), np.array([0.0, 2.0])
    assert detection_page.area(poisoned, clean) == pytest.approx(5 / 6)
    assert detection_page.area(clean, clean) == 0.5
    low, high = detection_page.interval(detection_page.mean, np.repeat([0.0, 1.0], 50))
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62
