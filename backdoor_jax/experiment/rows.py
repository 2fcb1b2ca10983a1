"""Results rows, one JSON line for each judged model, and the file they are kept in."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from backdoor_jax.errors import UserError
from backdoor_jax.files import write_text
from backdoor_jax.metrics import Scores, defense_effectiveness
from backdoor_jax.version import __version__

Row = dict[str, Any]


def line(row: Row) -> str:
    """A row in a line, for the terminal.

    Example:
        >>> rates = {"acc": 0.9, "asr": 0.01, "ra": 0.8, "der": None}
        >>> line({"attack": "badnets", "seed": 0, "defense": "d3", **rates, "seconds": 2})
        'badnets-0      d3               ACC  90.0  ASR   1.0  RA  80.0  DER     -  2.0 s'
    """
    rates = "  ".join(
        f"{name.upper()} {'    -' if row[name] is None else f'{100 * row[name]:5.1f}'}"
        for name in ("acc", "asr", "ra", "der")
    )
    return f"{row['attack'] + '-' + str(row['seed']):14} {row['defense']:16} {rates}  {row['seconds']:.1f} s"


def read_rows(path: Path) -> list[Row]:
    """Rows of a ``results.jsonl``; none where there is no such file.

    Raises:
        UserError: where a line is not JSON.
    """
    if not path.is_file():
        return []
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [json.loads(text)] if text.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}); mend or remove the file") from error
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes all rows, or leaves the old file."""
    write_text(path, "".join(json.dumps(row, default=plain) + "\n" for row in rows))


def judgement(before: Scores, after: Scores) -> Row:
    """Rates before and after a repair, as a row has them."""
    rates = {**after._asdict(), "der": defense_effectiveness(before, after)}
    rates |= {f"{name}_before": value for name, value in before._asdict().items()}
    return {name: None if value is None else round(value, 6) for name, value in rates.items()}


def where() -> Row:
    """Device and versions, as a row has them."""
    device = jax.devices()[0]
    # Those that this process may use, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": f"{device.device_kind}, {cores} cores" if device.platform == "cpu" else device.device_kind,
        "versions": {"backdoor_jax": __version__}
        | {name: version(name) for name in ("jax", "flax", "optax")}
        | {"python": platform.python_version()},
    }


def plain(value: Any) -> Any:
    """Arrays as lists, for `json.dumps`."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} in a results row")
