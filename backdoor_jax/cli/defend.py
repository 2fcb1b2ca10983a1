"""``backdoor-jax defend``: repairs the user's own model, with one defense or with several to compare."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoor_jax.cli.streams import fail, print_wide
from backdoor_jax.cli.suspects import images_of, judged_on, print_accuracy, require_used, suspect_of
from backdoor_jax.errors import UserError

if TYPE_CHECKING:
    from backdoor_jax.app import RepairResult, Suspect
    from backdoor_jax.defenses import Defense


def defend(parsed: argparse.Namespace) -> int:
    """Repairs a model, and prints what that changed; 1 where it lost too much accuracy."""
    from backdoor_jax.app import marked, repair_model, repaired_path, require_repairable
    from backdoor_jax.app.outputs import MODEL_SUFFIXES, require_free

    require_used(parsed)
    defenses = _defenses(parsed)
    several = len(defenses) > 1
    out = parsed.out or repaired_path(parsed.checkpoint)
    outs = [marked(out, defense.name) if several else out for defense in defenses]
    for path in outs:  # Before the model is loaded, which takes seconds.
        require_free(path, parsed.force, MODEL_SUFFIXES)
    suspect = suspect_of(parsed)
    if not (parsed.quiet or parsed.json):
        print_accuracy(suspect)
    reads = [defense.needs == "training_set" for defense in defenses]
    sources = [parsed.training_set if read or not any(reads) else None for read in reads]
    work = list(zip(defenses, outs, sources, strict=True))
    for defense, path, source in work:
        require_repairable(suspect, defense, path, training_set=source, force=parsed.force)
    results: dict[str, RepairResult | UserError] = {}
    for defense, path, source in work:
        try:
            result = repair_model(
                suspect,
                defense,
                path,
                training_set=source,
                seed=parsed.seed,
                force=parsed.force,
                max_drop=parsed.max_drop,
                training_images=images_of(parsed),
            )
        except UserError as error:
            if not several:
                raise
            results[defense.name] = error
            if not parsed.json:
                fail(f"{defense.name}: {error}")
            continue
        results[defense.name] = result
        if not parsed.json:
            _print_repair(suspect, defense, result, parsed)
    if parsed.json:
        found = [_as_plain(suspect, name, result) for name, result in results.items()]
        print(json.dumps(found if several else found[0], indent=2, allow_nan=False))
    elif several:
        _print_comparison(suspect, results)
    if any(isinstance(result, UserError) for result in results.values()):
        return 2
    return int(any(not isinstance(result, UserError) and result.remedies for result in results.values()))


def _defenses(parsed: argparse.Namespace) -> "list[Defense]":
    """The defenses of a command, which may share no settings."""
    from backdoor_jax.config_files import make_defense

    names = [name.strip() for name in parsed.defense.split(",")]
    if len(names) > 1 and (parsed.preset or parsed.overrides):
        raise UserError("--preset and key=value set one defense; give one --defense, or leave them out")
    defenses = [make_defense(name, parsed.preset, parsed.overrides) for name in names]
    found = [defense.name for defense in defenses]
    if twice := [name for name in found if found.count(name) > 1]:
        raise UserError(f"--defense names {twice[0]} twice; give it once")
    if parsed.hold_out is not None and all(defense.needs != "clean" for defense in defenses):
        raise UserError(f"{found[0]} sees no image of --data, so all of them measure it; leave out --hold-out")
    return defenses


def _print_repair(suspect: "Suspect", defense: "Defense", result: "RepairResult", parsed: argparse.Namespace) -> None:
    """Prints what a repair changed, and where it is."""
    from backdoor_jax.app import change_line, loading_line

    repair, name = result.repair, defense.name
    for note in () if parsed.quiet else result.notes:
        print(note)
    if repair.target is not None:
        print(f"{name}: repaired class {repair.target}")
    elif repair.changed and repair.scan is not None:
        print(f"{name}: the scan names no class ({repair.scan['verdict']})")
    changed = f"changed nothing ({repair.why or 'nothing to repair'})"
    if repair.changed:
        changed = change_line(suspect.variables, repair.variables)
    print(f"{name}: {changed}; took {result.seconds:.1f} s")
    print(
        f"{name}: {100 * result.accuracy:.1f} % of {judged_on(suspect)} classified correctly, "
        f"{100 * suspect.accuracy:.1f} % before"
    )
    rate, before = (suspect.success_rate(variables) for variables in (repair.variables, suspect.variables))
    if rate is not None and before is not None:
        triggered = f"{100 * rate:.1f} % of the triggered images classified as {suspect.target}"
        print(f"{name}: {triggered}, {100 * before:.1f} % before")
    if not result.held_out:
        print(
            f"{name}: measured on the images that the repair saw, so too well; give others (--test), or keep some for "
            "it (--hold-out 0.2)"
        )
    if result.remedies:
        print(f"{name}: warning: {result.remedies}")
    if result.out is not None:
        print(f"{result.out}: written; load it by {loading_line(suspect, repair, result.out)}", flush=True)


def _print_comparison(suspect: "Suspect", results: "dict[str, RepairResult | UserError]") -> None:
    """Prints what several defenses did, a line each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What each defense did")
    for column in ("defense", "accuracy", "triggered as target", "seconds", "written"):
        if column != "triggered as target" or suspect.triggered is not None:
            table.add_column(column, justify="left" if column in ("defense", "written") else "right", no_wrap=True)

    def add(name: str, accuracy: float, rate: float | None, *rest: str) -> None:
        rates = [f"{100 * value:.1f} %" for value in (accuracy, rate) if value is not None]
        table.add_row(*map(Text, (name, *rates, *rest)))

    add("none", suspect.accuracy, suspect.success_rate(suspect.variables), "", "")
    for name, result in results.items():
        if not isinstance(result, UserError):
            rate, written = suspect.success_rate(result.repair.variables), result.out or result.refused
            add(name, result.accuracy, rate, f"{result.seconds:.1f}", str(written))
    print_wide(table)


def _as_plain(suspect: "Suspect", defense: str, result: "RepairResult | UserError") -> dict[str, Any]:
    """A repair in plain Python values."""
    if isinstance(result, UserError):
        return {"model": suspect.name, "defense": defense, "error": str(result)}

    def shown(path: Path | None) -> str | None:
        return None if path is None else str(path)

    repair = result.repair
    return {
        "model": suspect.name,
        "notes": [*suspect.notes, *result.notes],
        "defense": defense,
        "changed": repair.changed,
        "why": repair.why,
        "target": repair.target,
        "accuracy_before": suspect.accuracy,
        "accuracy": result.accuracy,
        "success_rate_before": suspect.success_rate(suspect.variables),
        "success_rate": suspect.success_rate(repair.variables),
        "held_out": result.held_out,
        "seconds": result.seconds,
        "out": shown(result.out),
        "refused": shown(result.refused),
        "remedies": result.remedies,
    }
