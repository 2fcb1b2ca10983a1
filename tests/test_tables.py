"""The pages of results show what the committed rows give."""

import pytest
import tables


@pytest.mark.parametrize("name", tables.PAGES)
def test_the_tables_of_a_page_are_those_of_the_rows(name: str) -> None:
    page = (tables.ROOT / name).read_text(encoding="utf-8")
    assert tables.page(name) == page, "run python benchmarks/tables.py"


def test_the_table_of_networks_is_that_of_its_rows() -> None:
    pytest.importorskip("torch", reason="its networks: pip install 'backdoor_jax[torch]'")
    import torch_parity

    known = torch_parity.read()
    assert torch_parity.OUT.with_suffix(".md").read_text(encoding="utf-8") == torch_parity.markdown(known)
    assert all(map(torch_parity.passed, known.values()))


def test_another_row_changes_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables.headline()
    rows = [{**row, "asr": 0.123} if row["attack"] == "blended" else row for row in tables.rows_of("defenses_gtsrb")]
    monkeypatch.setattr(tables, "rows_of", lambda name: rows)
    assert tables.headline() != before
    assert tables.headline().count("/ 12.3 /") == 6
