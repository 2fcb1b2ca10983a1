"""Experiments in YAML: read, checked and turned into an `Experiment`.

    name: digits
    data: {source: digits}
    model: {width: 8}
    attacks:
      - {name: badnets}
    defenses:
      - {name: d3, label: d3_paper, preset: paper}

An attack's entry holds its ``name``, a ``label`` (the name by default), its settings, and under ``victim`` the settings
in which its victims' training differs from that of the others. A defense's entry holds the same except ``victim``, and
where the method has them ``preset`` and ``known_target``. pydantic checks types and ranges; an unknown key, a wrong
value and an unknown name are one line each.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backdoor_jax.attacks import ATTACKS
from backdoor_jax.config import Config, _expected
from backdoor_jax.defenses import DEFENSES, Defense
from backdoor_jax.errors import UserError
from backdoor_jax.experiment import AttackEntry, DataConfig, DefenseEntry, Experiment, ModelConfig
from backdoor_jax.training import TrainConfig


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment.

    Args:
        path: a YAML file.
        overrides: ``key=value``, with dots for nested keys, such as ``victim.epochs=2`` or ``seeds=[0]``; the value is
            YAML.

    Raises:
        UserError: for anything that cannot be used, naming file and key.
    """
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file; give an experiment in YAML, such as those in configs/")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected keys such as name, data, attacks and defenses")
    for override in overrides:
        name, value = parse_override(override)
        _override(document, name.split("."), value, override)
    return parse_experiment(document, str(path))


def parse_experiment(document: dict[str, Any], where: str = "experiment") -> Experiment:
    """Turns plain values into an `Experiment`.

    Args:
        document: what the YAML holds.
        where: what errors call it.

    Raises:
        UserError: for anything that cannot be used, naming ``where`` and the key.

    Example:
        >>> parse_experiment({"name": "x", "attacks": [{"name": "badnets", "rate": 2}], "defenses": []}, "x.yaml")
        Traceback (most recent call last):
        ...
        backdoor_jax.errors.UserError: x.yaml: attacks[0].rate is 2, expected a value less than or equal to 1
    """
    fields: dict[str, Any] = dict(document)
    for part, kind in (("data", DataConfig), ("model", ModelConfig), ("victim", TrainConfig)):
        if part in fields:
            fields[part] = check(kind, fields[part], f"{where}: {part}")
    victim = fields.get("victim", TrainConfig())
    for part, parse in (("attacks", partial(_attack, victim=victim)), ("defenses", _defense)):
        entries = fields.get(part, [])
        if not isinstance(entries, list):
            raise UserError(f"{where}: {part}: expected a list of entries, each with a name")
        fields[part] = tuple(parse(entry, f"{where}: {part}[{number}]") for number, entry in enumerate(entries))
    return check(Experiment, fields, where)


def parse_override(override: str) -> tuple[str, Any]:
    """The name and the value, which is YAML, of a ``key=value``.

    Raises:
        UserError: for any other text.

    Example:
        >>> parse_override("victim.epochs=2")
        ('victim.epochs', 2)
    """
    import yaml

    name, separator, value = override.partition("=")
    if not separator or not name:
        raise UserError(f"override {override!r} is not key=value, such as victim.epochs=2")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML ({' '.join(str(error).split())})") from error


def make_defense(name: str, preset: str | None = None, overrides: Sequence[str] = ()) -> Defense:
    """The defense of a name and a preset, with settings as ``key=value``.

    Raises:
        UserError: for an unknown name or preset, or a setting that cannot be used.

    Example:
        >>> make_defense("d3", "paper", ["steps=5"]).penalty
        10.0
    """
    if name not in DEFENSES:
        raise UserError(f"unknown defense {name!r}; known are {', '.join(DEFENSES)}")
    return check_defense(name, preset, dict(map(parse_override, overrides)), name)


def check_defense(name: str, preset: Any, settings: dict[str, Any], where: str) -> Defense:
    """The defense of a known name, from the settings of a preset, where there is one, and further settings.

    Raises:
        UserError: for an unknown preset, or a setting that cannot be used.
    """
    defense = DEFENSES[name]
    if preset is not None:
        if not isinstance(preset, str):
            raise UserError(f"{where}: preset {preset!r} must be a name")
        try:
            defense.preset(preset)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        settings = {**defense.presets[preset], **settings}
    return check(defense, settings, where)


def check(kind: type[Any], values: Any, where: str) -> Any:
    """The configuration of a type from plain values, such as YAML holds.

    Raises:
        UserError: for an unknown or missing key, or a value of the wrong type or out of range.
    """
    import pydantic

    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as errors:
        raise UserError(f"{where}{_explain(errors, kind, values, where)}") from errors
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _explain(errors: Any, kind: type[Config], values: dict[str, Any], where: str) -> str:
    """What is wrong with values, after the place where they are."""
    first = errors.errors()[0]
    if isinstance(first.get("ctx", {}).get("error"), UserError):
        return f": {first['ctx']['error']}"
    key = first["loc"][0] if first["loc"] else ""
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ", ".join(field.name for field in dataclasses.fields(kind))
        return f": unknown key {key!r}; known are {known}"
    if first["type"] in ("missing", "missing_argument"):
        return f": {key}: missing; give it a value"
    return f"{'.' if ': ' in where else ': '}{key} is {values.get(key)!r}, expected {_expected(errors)}"


def _attack(entry: Any, where: str, victim: TrainConfig) -> AttackEntry:
    name, label, settings = _named(entry, where, ATTACKS)
    own = settings.pop("victim", None)
    if own is not None:
        if not isinstance(own, dict):
            raise UserError(f"{where}: victim: expected keys and values, got {own!r}")
        own = check(TrainConfig, {**dataclasses.asdict(victim), **own}, f"{where}: victim")
    return AttackEntry(label, check(ATTACKS[name], settings, where), own)


def _defense(entry: Any, where: str) -> DefenseEntry:
    name, label, settings = _named(entry, where, DEFENSES)
    known_target = settings.pop("known_target", False)
    if known_target not in (True, False) or (known_target and not DEFENSES[name].targeted):
        raise UserError(f"{where}: known_target must be true or false, and true only for a method with a target")
    defense = check_defense(name, settings.pop("preset", None), settings, where)
    return DefenseEntry(label, defense, bool(known_target))


def _named(entry: Any, where: str, known: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Name, label and settings of an entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{where}: expected a name and settings, such as {{name: {next(iter(known))}}}")
    settings = dict(entry)
    name = settings.pop("name")
    label = settings.pop("label", name)
    if name not in known:
        raise UserError(f"{where}: unknown name {name!r}; known are {', '.join(known)}")
    if not isinstance(label, str) or not label or label.startswith(".") or set(label) & set("/\\"):
        raise UserError(f"{where}: label {label!r} must be text that can name a file")
    return name, label, settings


def _override(document: dict[str, Any], path: list[str], value: Any, shown: str) -> None:
    """Sets a value of a document of nested keys."""
    for part in path[:-1]:
        document = document.setdefault(part, {})
        if not isinstance(document, dict):
            raise UserError(f"override {shown!r}: {part} holds no keys; only keys under keys can be set")
    document[path[-1]] = value
