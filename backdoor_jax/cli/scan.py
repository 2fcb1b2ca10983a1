"""``backdoor-jax scan``: whether a model looks backdoored, and towards which class."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from backdoor_jax.cli.streams import print_wide
from backdoor_jax.cli.suspects import (
    images_of,
    model_of,
    parse_size,
    print_accuracy,
    repair_command,
    require_used,
    suspect_of,
)
from backdoor_jax.errors import UserError

if TYPE_CHECKING:
    from backdoor_jax.app import Listing, ScanResult, Suspect


def scan(parsed: argparse.Namespace) -> None:
    """Scans a model, and prints the verdict."""
    from backdoor_jax.app import list_suspicious, load_unseen, scan_model
    from backdoor_jax.app.outputs import require_free_figure
    from backdoor_jax.detectors import DETECTORS, SUSPICIONS

    require_used(parsed)
    if parsed.detector not in DETECTORS:
        raise UserError(f"unknown detector {parsed.detector!r}; known are {', '.join(DETECTORS)}")
    if (parsed.list_images is None) != (parsed.training_set is None):
        raise UserError("--list-images N and --training-set DATA belong together; give both")
    if parsed.by is not None and parsed.list_images is None:
        raise UserError("--by says how --list-images sorts; give that too, or leave it out")
    by = parsed.by or "spectral_signatures"
    if by not in SUSPICIONS:
        raise UserError(f"unknown --by {by!r}; known are {', '.join(SUSPICIONS)}")
    figure = parsed.out or Path(f"{parsed.checkpoint.name}.scan.png")
    require_free_figure(figure, parsed.force)  # Before the model is loaded, which takes seconds.
    if parsed.data is None:
        size = parse_size(parsed.size)
        if size is None:
            raise UserError("give the size of the model's images as --size 32x32, or clean images by --data")
        suspect = load_unseen(model_of(parsed), size)
    else:
        suspect = suspect_of(parsed)
    if not (parsed.quiet or parsed.json) and len(suspect.test):
        print_accuracy(suspect)
    result = scan_model(suspect, figure, DETECTORS[parsed.detector](), seed=parsed.seed, force=parsed.force)
    target = result.verdict.target
    command = None if target is None else repair_command(parsed, target)
    listing = None
    if parsed.list_images is not None:
        listing = list_suspicious(
            suspect, parsed.training_set, result.evidence.target, by, parsed.list_images, images_of(parsed)
        )
    if parsed.json:
        print(_as_json(suspect, result, command, listing))
        return
    _print_verdict(suspect, result, command)
    if not parsed.quiet:
        _print_values(suspect, result)
    if listing is not None:
        for note in () if parsed.quiet else listing.notes:
            print(note)
        print(f"most suspicious images of class {result.evidence.target} by {by}: {' '.join(listing.images)}")
    print(f"{result.figure}: written")


def _as_json(suspect: "Suspect", result: "ScanResult", command: str | None, listing: "Listing | None") -> str:
    """A scan as JSON; values that are not finite are null."""
    evidence = result.evidence
    return json.dumps(
        {
            "model": suspect.name,
            "accuracy": None if math.isnan(suspect.accuracy) else suspect.accuracy,
            "notes": [*suspect.notes, *(() if listing is None else listing.notes)],
            "success_rate": suspect.success_rate(suspect.variables),
            "verdict": dataclasses.asdict(result.verdict),
            "repair_command": command,
            "own_p_value": evidence.p_value,
            "quantity": evidence.quantity,
            "values": [value if math.isfinite(value) else None for value in evidence.values.tolist()],
            "details": evidence.details,
            "images": None if listing is None else listing.images,
            "figure": str(result.figure),
        },
        indent=2,
        allow_nan=False,
    )


def _print_verdict(suspect: "Suspect", result: "ScanResult", command: str | None) -> None:
    """Prints the verdict, what it rests on and what to do next."""
    evidence, verdict = result.evidence, result.verdict
    p_value = "no p-value" if verdict.p_value is None else f"p = {verdict.p_value:.2g}"
    print(f"{suspect.name}: {verdict}")
    print(f"evidence: {verdict.strength}; class {evidence.target} stands out most, {p_value} ({evidence.detector})")
    print(verdict.advice)
    if command is not None:
        print(f"\n  {command}\n")


def _print_values(suspect: "Suspect", result: "ScanResult") -> None:
    """Prints the values of all classes."""
    from rich.table import Table
    from rich.text import Text

    evidence = result.evidence
    names = suspect.class_names or [""] * len(evidence.values)
    table = Table("class", "name", evidence.quantity, title=f"{evidence.detector}, every class")
    for number, (name, value) in enumerate(zip(names, evidence.values, strict=True)):
        shown = f"{value:.3g}" if math.isfinite(value) else "-"
        table.add_row(str(number), Text(name), shown, style="bold" if number == evidence.target else None)
    print_wide(table)
