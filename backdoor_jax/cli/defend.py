"""``backdoor-jax defend``: repairs the user's own model."""

import argparse
import json
from typing import TYPE_CHECKING

from backdoor_jax.cli.suspects import images_of, judged_on, print_accuracy, require_used, suspect_of
from backdoor_jax.errors import UserError

if TYPE_CHECKING:
    from backdoor_jax.app import RepairResult, Suspect


def defend(parsed: argparse.Namespace) -> int:
    """Repairs a model, and prints what that changed; 1 where it lost too much accuracy."""
    from backdoor_jax.app import change_line, loading_line, repair_model, repaired_path
    from backdoor_jax.app.outputs import MODEL_SUFFIXES, require_free
    from backdoor_jax.config_files import make_defense

    require_used(parsed)
    defense = make_defense(parsed.defense, parsed.preset, parsed.overrides)
    if parsed.hold_out is not None and defense.needs != "clean":
        raise UserError(f"{defense.name} sees no image of --data, so all of them measure it; leave out --hold-out")
    out = parsed.out or repaired_path(parsed.checkpoint)
    require_free(out, parsed.force, MODEL_SUFFIXES)  # Before the model is loaded, which takes seconds.
    suspect = suspect_of(parsed)
    if not (parsed.quiet or parsed.json):
        print_accuracy(suspect)
    result = repair_model(
        suspect,
        defense,
        out,
        training_set=parsed.training_set,
        seed=parsed.seed,
        force=parsed.force,
        max_drop=parsed.max_drop,
        training_images=images_of(parsed),
    )
    repair, name = result.repair, defense.name
    drop = suspect.accuracy - result.accuracy
    if not (parsed.quiet or parsed.json):
        for note in result.notes:
            print(note)
    if parsed.json:
        print(_repair_as_json(suspect, name, result))
        return 1 if drop > parsed.max_drop else 0
    if repair.target is not None:
        print(f"{name}: repaired class {repair.target}")
    elif repair.changed and repair.scan is not None:
        print(f"{name}: the scan names no class ({repair.scan['verdict']})")
    if not repair.changed:
        print(f"{name}: changed nothing ({repair.why or 'nothing to repair'})")
    else:
        print(f"{name}: {change_line(suspect.variables, repair.variables)}")
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
    if drop > parsed.max_drop:
        what = "not written, unless with --force" if result.out is None else "written because of --force"
        print(f"{name}: warning: it lost {100 * drop:.1f} % of accuracy, more than --max-drop allows; {what}")
    if result.out is not None:
        print(f"{result.out}: written; load it by {loading_line(suspect, repair, result.out)}")
    return 1 if drop > parsed.max_drop else 0


def _repair_as_json(suspect: "Suspect", defense: str, result: "RepairResult") -> str:
    """A repair as JSON."""
    repair = result.repair
    return json.dumps(
        {
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
            "out": None if result.out is None else str(result.out),
        },
        indent=2,
        allow_nan=False,
    )
