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

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import yaml

from backdoor_jax.attacks import ATTACKS
from backdoor_jax.config import Config, expected_of
from backdoor_jax.defenses import AUTO, DEFENSES, Defense, find_defense
from backdoor_jax.errors import UserError
from backdoor_jax.experiment import AttackEntry, DataConfig, DefenseEntry, Experiment, ModelConfig
from backdoor_jax.reading import DEEPEST, file_size
from backdoor_jax.training import TrainConfig

LARGEST = 1 << 17
"""Bytes of a YAML file; reading as many takes seconds."""
LONGEST_NUMBER = 100
"""Characters of a whole number; Python prints none of thousands of digits."""
LONGEST_LABEL = 64
"""Bytes of a label, which names folders and files."""


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment.

    Args:
        path: a YAML file.
        overrides: ``key=value``, with dots for nested keys, such as ``victim.epochs=2`` or ``seeds=[0]``; the value is
            YAML.

    Raises:
        UserError: for anything that cannot be used, naming file and key.
    """
    document = read_yaml(path, "give an experiment in YAML, such as those in configs/")
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected keys such as name, data, attacks and defenses")
    for override, (name, value) in zip(overrides, parse_overrides(overrides).items(), strict=True):
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
    name, separator, value = override.partition("=")
    if not separator or not name:
        raise UserError(f"override {override!r} is not key=value, such as victim.epochs=2")
    with _parsing_yaml(f"override {override!r}"):
        return name, parse_yaml(value)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of ``key=value`` texts, by their names.

    Raises:
        UserError: for any other text, or a name that is given twice.

    Example:
        >>> parse_overrides(["steps=2", "steps=3"])
        Traceback (most recent call last):
        backdoor_jax.errors.UserError: 'steps' is given twice; give it once
    """
    values: dict[str, Any] = {}
    for override in overrides:
        name, value = parse_override(override)
        if name in values:
            raise UserError(f"{name!r} is given twice; give it once")
        values[name] = value
    return values


class _Loader(yaml.SafeLoader):
    """YAML's plain values, with the numbers of YAML 1.2: 1e-3 is one, 1:1:1 is none, and 010 is ten.

    No references, which may grow endlessly, and no key twice.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next value."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("references (*name) are not allowed; write the value out")
        if self.depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The keys and values of a node."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"{twice[0][:50]!r} is given twice")
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: Any) -> int:
        """A whole number."""
        text = self.construct_scalar(node)
        if len(text) > LONGEST_NUMBER:
            raise ValueError(f"a number has {len(text)} digits, at most {LONGEST_NUMBER} are read")
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)


INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT, FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INT, re.compile("(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor(INT, _Loader.construct_whole)


def parse_yaml(text: str) -> Any:
    """The plain value that YAML text holds.

    Raises:
        Exception: of many kinds for other text; see `_parsing_yaml`.

    Example:
        >>> parse_yaml("{learning_rate: 1e-3}")
        {'learning_rate': 0.001}
    """
    return yaml.load(text, _Loader)


def read_yaml(path: Path, fix: str) -> Any:
    """The plain value that a YAML file holds.

    Args:
        path: the file.
        fix: the end of the error where there is none.

    Raises:
        UserError: where there is no such file, or it is too large or not YAML.
    """
    size = file_size(path, fix)
    if size > LARGEST:
        raise UserError(f"{path}: has {size} bytes, at most {LARGEST} are read; {fix}")
    with _parsing_yaml(str(path)):
        return parse_yaml(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _parsing_yaml(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Numbers, dates and nesting raise others than YAMLError.
        raise UserError(f"{where}: not YAML ({' '.join(str(error).split())[:200]})") from error


def make_defense(name: str, preset: str | None = None, overrides: Sequence[str] = ()) -> Defense:
    """The defense of a name and a preset, with settings as ``key=value``.

    Raises:
        UserError: for an unknown name or preset, or a setting that cannot be used.

    Example:
        >>> make_defense("d3", "paper", ["steps=5"]).penalty
        10.0
    """
    find_defense(name)
    return check_defense(name, preset, parse_overrides(overrides), name)


def check_defense(name: str, preset: Any, settings: dict[str, Any], where: str) -> Defense:
    """The defense of a known name, from the settings of a preset, where there is one, and further settings.

    Raises:
        UserError: for an unknown preset, or a setting that cannot be used.
    """
    defense = find_defense(name)
    if preset is not None:
        if not isinstance(preset, str):
            raise UserError(f"{where}: preset {preset!r} must be a name")
        try:
            defense.preset(preset)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        settings = {**defense.presets[preset], **settings}
    return check(defense, settings, where)


def check(kind: type[Config], values: Any, where: str) -> Any:
    """The configuration of a type from plain values, such as YAML holds.

    Raises:
        UserError: for an unknown or missing key, or a value of the wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: unknown key {name!r}; known are {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: {name}: missing; give it a value")
    given = {name: _tuples(value) for name, value in values.items()}
    for name, value in given.items():
        try:
            kind._adapters()[name].validate_python(value, strict=True)
        except pydantic.ValidationError as errors:
            dot = "." if ": " in where else ": "
            raise UserError(f"{where}{dot}{name} is {values[name]!r}, expected {expected_of(errors)}") from errors
    try:
        return kind(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _tuples(value: Any) -> Any:
    """The value, in which YAML's lists are tuples, as in configurations."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _attack(entry: Any, where: str, victim: TrainConfig) -> AttackEntry:
    name, label, settings = _named(entry, where, ATTACKS)
    own = settings.pop("victim", None)
    if own is not None:
        if not isinstance(own, dict):
            raise UserError(f"{where}: victim: expected keys and values, got {own!r}")
        own = check(TrainConfig, {**dataclasses.asdict(victim), **own}, f"{where}: victim")
    return AttackEntry(label, check(ATTACKS[name], settings, where), own)


def _defense(entry: Any, where: str) -> DefenseEntry:
    name, label, settings = _named(entry, where, (AUTO, *DEFENSES))
    known_target = settings.pop("known_target", False)
    if not isinstance(known_target, bool) or (known_target and not find_defense(name).targeted):
        raise UserError(f"{where}: known_target must be true or false, and true only for a method with a target")
    defense = check_defense(name, settings.pop("preset", None), settings, where)
    return DefenseEntry(label, defense, known_target)


def _named(entry: Any, where: str, known: Iterable[str]) -> tuple[str, str, dict[str, Any]]:
    """Name, label and settings of an entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{where}: expected a name and settings, such as {{name: {next(iter(known))}}}")
    settings = dict(entry)
    name = settings.pop("name")
    label = settings.pop("label", name)
    if name not in known:
        raise UserError(f"{where}: unknown name {name!r}; known are {', '.join(known)}")
    if (
        not isinstance(label, str)
        or not label.isprintable()
        or not 0 < len(label.encode()) <= LONGEST_LABEL
        or label.startswith(".")
        or set(label) & set("/\\")
    ):
        raise UserError(f"{where}: label {label!r} must be text of up to {LONGEST_LABEL} bytes that can name a file")
    return name, label, settings


def _override(document: dict[str, Any], path: list[str], value: Any, shown: str) -> None:
    """Sets a value of a document of nested keys."""
    for part in path[:-1]:
        document = document.setdefault(part, {})
        if not isinstance(document, dict):
            raise UserError(f"override {shown!r}: {part} holds no keys; only keys under keys can be set")
    document[path[-1]] = value
