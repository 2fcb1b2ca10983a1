"""Rows of results, one JSON line for each evaluated model, and the file that holds them.

Rows are appended under a lock and never rewritten, so several processes may write to one file.
"""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import jax
import numpy as np

from backdoor_jax.analyses.base import Row
from backdoor_jax.errors import UserError
from backdoor_jax.files import locked
from backdoor_jax.metrics import Scores, defense_effectiveness
from backdoor_jax.reading import file_size
from backdoor_jax.version import __version__, commit


def format_row(row: Row) -> str:
    """The row in one line, for the terminal.

    Example:
        >>> rates = {"acc": 0.9, "asr": 0.01, "ra": 0.8, "der": None}
        >>> format_row({"attack": "badnets", "seed": 0, "defense": "d3", **rates, "seconds": 2})
        'badnets-0      d3               ACC  90.0  ASR   1.0  RA  80.0  DER     -  2.0 s'
    """
    rates = "  ".join(
        f"{name.upper()} {'    -' if row[name] is None else f'{100 * row[name]:5.1f}'}"
        for name in ("acc", "asr", "ra", "der")
    )
    mark = "  (the model is near chance and does not count)" if row.get("near_chance") else ""
    return f"{row['attack'] + '-' + str(row['seed']):14} {row['defense']:16} {rates}  {row['seconds']:.1f} s{mark}"


RESULT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("experiment", "dataset", "model", "attack", "defense", "method", "device"), (str,)),
    **dict.fromkeys(("seed", "n_used"), (int,)),
    **dict.fromkeys(("acc", "acc_before", "seconds"), (float, int)),
    **dict.fromkeys(("asr", "ra", "der"), (float, int, type(None))),
    **dict.fromkeys(("versions", "config", "info"), (dict,)),
    "data_used": (str, type(None)),
    "target": (int, type(None)),
}
"""Fields of a row of an experiment that other code reads, and their types in JSON."""
SHARES = ("acc", "acc_before", "asr", "ra", "der", "clean_ratio", "poison_rate")
LARGEST = {**dict.fromkeys(SHARES, 1.0), "seconds": 1e12}
"""Fields that are a number from 0, and the largest that each can be."""
OPTIONAL: dict[str, tuple[type, ...]] = {
    "analyses": (dict,),
    "near_chance": (bool,),
    **dict.fromkeys(("clean_ratio", "poison_rate"), (float, int)),
}
"""Fields that only some rows have, and their types."""
PLACE = ("experiment", "attack", "seed", "defense")
"""Fields that no two rows of a folder share."""


def read_rows(
    path: Path, fields: Mapping[str, tuple[type, ...]] = MappingProxyType({}), experiment: str | None = None
) -> list[Row]:
    """The rows of a ``results.jsonl``; none where there is no such file.

    A truncated last line, which a killed run leaves behind, is ignored.

    Args:
        path: the file.
        fields: such as `RESULT`: what every row must have.
        experiment: the name of the experiment that every row must be of.

    Raises:
        UserError: where another line is not JSON; and, where ``fields`` are given, for a line that lacks one, has a
            rate that is none, is of another experiment, or repeats an earlier row.
    """
    if not os.path.lexists(path):
        return []
    file_size(path, "remove it")
    rows: list[Row] = []
    places = set()
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                raise UserError(f"{path}: line {number} is not JSON; fix or remove it") from error
            continue
        wrong = _wrong_fields(row, fields) if isinstance(row, dict) else fields
        if wrong or not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no row of an experiment ({', '.join(wrong)}); remove it")
        if experiment is not None and row["experiment"] != experiment:
            raise UserError(
                f"{path}: line {number} is of experiment {row['experiment']!r}, not {experiment!r}; remove it"
            )
        if fields:
            place = tuple(row[field] for field in PLACE)
            if place in places:
                raise UserError(f"{path}: line {number} repeats the row of {' '.join(map(str, place))}; remove it")
            places.add(place)
        rows.append(row)
    return rows


def _wrong_fields(row: Row, fields: Mapping[str, tuple[type, ...]]) -> list[str]:
    """The fields of a row that are missing, of another type, or out of range; NaN is in no range."""
    if not fields:
        return []
    kinds = {**fields, **{field: kinds for field, kinds in OPTIONAL.items() if field in row}}
    wrong = [
        field
        for field, types in kinds.items()
        if field not in row
        or type(row[field]) not in types
        or (field in LARGEST and row[field] is not None and not 0 <= row[field] <= LARGEST[field])
    ]
    # Only what was attacked has a rate of success.
    wrong += [
        name for name in ("asr", "ra", "der") if name in row and (row[name] is None) != (row.get("attack") == "none")
    ]
    if isinstance(row.get("info"), dict) and type(row["info"].get("changed", False)) is not bool:
        wrong.append("info.changed")
    return list(dict.fromkeys(wrong))


def append_row(path: Path, row: Row) -> None:
    """Appends a row to a ``results.jsonl``, under a lock.

    A truncated last line is removed first: its run was killed, and makes the row again when it resumes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "results.jsonl"
        ...     append_row(path, {"acc": 0.9})
        ...     with path.open("a") as file:
        ...         _ = file.write('{"acc": ')
        ...     append_row(path, {"acc": 0.8})
        ...     read_rows(path)
        [{'acc': 0.9}, {'acc': 0.8}]
    """
    line = json.dumps(row, default=plain).encode() + b"\n"
    with locked(path) as file:
        _end_last_line(file)
        file.write(line)


def _end_last_line(file: BinaryIO) -> None:
    """Makes the file end at the end of a line: ends a complete row, or removes a truncated one."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    try:
        json.loads(content[start:])
    except ValueError:
        file.truncate(start)
    else:
        file.write(b"\n")


def rates(before: Scores, after: Scores) -> Row:
    """The rates before and after a repair, as a row holds them."""
    found = {**after._asdict(), "der": defense_effectiveness(before, after)}
    found |= {f"{name}_before": value for name, value in before._asdict().items()}
    return {name: None if value is None else round(value, 6) for name, value in found.items()}


def environment() -> Row:
    """Device, versions and commit, as a row holds them."""
    device = jax.devices()[0]
    # Those that this process may use, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": f"{device.device_kind}, {cores} cores" if device.platform == "cpu" else device.device_kind,
        "versions": {"backdoor_jax": __version__}
        | {name: version(name) for name in ("jax", "flax", "optax")}
        | {"python": platform.python_version()},
        "commit": commit(),
    }


def plain(value: Any) -> Any:
    """The array as lists, for `json.dumps`.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} in a results row")
