"""``backdoor-jax list``: everything that has a name."""

import argparse
import inspect
import json


def list_names(parsed: argparse.Namespace) -> None:
    """Prints the names of everything, a line each."""
    from rich.console import Console
    from rich.table import Table

    from backdoor_jax.attacks import ATTACKS
    from backdoor_jax.data import SOURCES
    from backdoor_jax.defenses import DEFENSES
    from backdoor_jax.detectors import DETECTORS
    from backdoor_jax.models import MODELS
    from backdoor_jax.scenarios import SCENARIOS

    def first_line(thing: object) -> str:
        return (inspect.getdoc(thing) or "").splitlines()[0]

    sections = {
        "attacks": [(name, first_line(attack)) for name, attack in ATTACKS.items()],
        "defenses": [(name, f"{d.summary} (needs: {d.needs.replace('_', ' ')})") for name, d in DEFENSES.items()],
        "detectors": [(name, detector.summary) for name, detector in DETECTORS.items()],
        "scenarios": list(SCENARIOS.items()),
        "models": [(name, model.summary) for name, model in MODELS.items()],
        "data": list(SOURCES.items()),
    }
    if parsed.json:
        print(json.dumps({title: dict(entries) for title, entries in sections.items()}, indent=2))
        return
    console = Console(soft_wrap=True)
    for title, entries in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, text in entries:
            table.add_row(name, text)
        console.print(table)
