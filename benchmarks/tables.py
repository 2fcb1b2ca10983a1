"""The tables of README.md and of the pages of results, from the committed rows.

    python benchmarks/tables.py

Reads benchmarks/results, and writes every table of the pages in `PAGES` between its marks; a test compares. The page on
detection and the leaderboard have scripts of their own.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median
from typing import Any

import cost_model
import measuring
from pages import ROOT, fill, percent, table

from backdoor_jax.experiment import read_rows
from backdoor_jax.files import write_text
from backdoor_jax.report.table import markdown

Row = dict[str, Any]
ALPHA = 0.05
"""The level of the scan's tests."""
IGNORED = 0.02
"""The attack success rate below which a victim ignores its trigger."""
LAYERS = "conv_layers-width16-cores2-cpu_cpu"
VICTIMS = {"badnets": "BadNets", "blended": "Blended", "none": "clean"}
"""What tables call the two usual victims and the clean model."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name in PAGES:
        write_text(ROOT / name, page(name))
        print(name)


def page(name: str) -> str:
    """A page with its tables as the rows give them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return fill(text, {table: make() for table, make in PAGES[name].items()})


@cache
def rows_of(name: str, file: str = "results.jsonl") -> list[Row]:
    """The rows of a file in a folder of `benchmarks/results`."""
    return read_rows(measuring.RESULTS / name / file)


def measured(name: str) -> dict[str, Any]:
    """The results of a file of `benchmarks/results/speed`."""
    return dict(json.loads((measuring.RESULTS / "speed" / f"{name}.json").read_text(encoding="utf-8"))["results"])


def one(rows: Sequence[Row], **fields: Any) -> Row | None:
    """The row with these values, where there is one."""
    found = [row for row in rows if all(row[name] == value for name, value in fields.items())]
    assert len(found) <= 1, f"{len(found)} rows have {fields}"
    return found[0] if found else None


def rates(row: Row | None, names: Sequence[str] = ("acc", "asr")) -> str:
    """Rates in percent, those that the row has.

    >>> rates({"acc": 0.9, "asr": 0.01}), rates({"acc": 0.9, "asr": None}), rates(None)
    ('90.0 / 1.0', '90.0', '-')
    """
    return "-" if row is None else " / ".join(percent(row[name]) for name in names if row[name] is not None)


def span(values: Sequence[float], digits: int = 0) -> str:
    """The least and the largest.

    >>> span([8.2, 7.6]), span([8.2, 7.9]), span([0.6], 1)
    ('8', '8', '0.6')
    """
    least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def seconds_of(rows: Sequence[Row], *defenses: str) -> list[float]:
    """What victims took to train, or repairs that changed something."""
    return [
        row["seconds"]
        for row in rows
        if row["defense"] in defenses and (row["defense"] == "none" or row["info"].get("changed"))
    ]


def on_one_core() -> list[Row]:
    """The rows of width 8 with ordinary victims and 800 clean images or the poisoned set."""
    names = ("analyses_small", "rates_small", "adaptive_small")
    return [row for name in names for row in rows_of(name) if row["attack"] in VICTIMS]


def code(name: str) -> str:
    """A method's name as code, and what the rows call a victim or clean model before any repair."""
    return "victim" if name == "none" else f"`{name}`"


# README.md


def headline() -> str:
    """The default repair, once it has rows, the four papers' methods and fine-tuning at the published width."""
    measured = {row["defense"] for row in rows_of("defenses_gtsrb")}
    shown = ("none", "midway", "finetune", "d3", "super_finetune", "tac", "pad_ft")
    return at_published_width([defense for defense in shown if defense in measured], seconds=False)


def at_published_width(defenses: Sequence[str], seconds: bool) -> str:
    """ACC / ASR / RA on both victims and the clean model, with the seconds of all three."""
    rows = rows_of("defenses_gtsrb")
    lines = []
    for defense in defenses:
        found = [one(rows, attack=attack, defense=defense) for attack in VICTIMS]
        cells = [rates(row, ("acc", "asr", "ra")) for row in found]
        times = [span([row["seconds"] for row in found if row])] if seconds else []
        lines.append(["none" if defense == "none" else code(defense), *cells, *times])
    heads = ["defense", "BadNets: ACC / ASR / RA", "Blended: ACC / ASR / RA", "clean model: ACC"]
    return table(heads + ["seconds"] * seconds, lines)


# docs/results.md


def defenses() -> str:
    """All defenses at the published width."""
    return at_published_width(list(dict.fromkeys(row["defense"] for row in rows_of("defenses_gtsrb"))), seconds=True)


def methods() -> str:
    """The four papers' methods over three seeds."""
    return markdown([_named(row) for row in rows_of("gtsrb_small")])


def _named(row: Row) -> Row:
    """A row that calls a model without poison clean."""
    return {**row, "attack": "clean"} if row["attack"] == "none" else row


def attacks() -> str:
    """The attacks other than BadNets and Blended, without the times that include other work."""
    order = ("sig", "trojan_nn", "low_frequency", "ssba", "wanet", "lira", "input_aware", "label_consistent")
    rows = [row for attack in order for row in rows_of("attacks_small") if row["attack"] == attack]
    lines = markdown(rows).splitlines()
    for number, row in enumerate(rows, 2):
        if "seconds_include" in row["info"]:
            lines[number] = lines[number].replace(f"| {row['seconds']:.1f} |", "| - |")
    return "\n".join(lines)


# docs/which_defense.md


def choices() -> str:
    """What each advised defense left and cost, over all seeds and both widths on which it ran."""
    everything = "all of the training set, clean"
    flagged = "a few clean images a class; the scan names one"
    unflagged = "the same; the scan names none, or accuracy matters most"
    patch = "the same; the trigger is likely a patch"
    advice = (
        (everything, "super_finetune", {"super_finetune_small": "super_finetune_guide"}),
        (flagged, "tac", {"defenses_gtsrb": "tac", "gtsrb_small": "tac_smallest"}),
        (unflagged, "ft_sam", {"defenses_gtsrb": "ft_sam"}),
        ("the same; removal matters more than accuracy", "sau", {"defenses_gtsrb": "sau"}),
        ("", "d3", {"defenses_gtsrb": "d3", "gtsrb_small": "d3"}),
        ("the same; very little time", "fst", {"defenses_gtsrb": "fst"}),
        (patch, "nad", {"defenses_gtsrb": "nad"}),
        ("", "finetune", {"defenses_gtsrb": "finetune", "gtsrb_small": "finetune"}),
        ("", "fine_pruning", {"defenses_gtsrb": "fine_pruning"}),
        ("the poisoned training set, no clean image", "pad_ft", {"defenses_gtsrb": "pad_ft", "gtsrb_small": "pad_ft"}),
        ("no data", "clp", {"defenses_gtsrb": "clp"}),
    )
    lines = []
    for situation, defense, sources in advice:
        rows = [row for name, called in sources.items() for row in rows_of(name) if row["defense"] == called]
        left = [
            [100 * row["asr"] for row in rows if row["attack"].startswith(attack)] for attack in ("badnets", "blended")
        ]
        points = [(row["attack"] == "none", 100 * (row["acc"] - row["acc_before"])) for row in rows]
        change = [[value for clean, value in points if clean == kind] for kind in (False, True)]
        cells = (span([value + 0.0 for value in values], 1).replace("-0.0", "0.0") for values in (*left, *change))
        lines.append([situation, code(defense), *cells])
    return table(["you have", "use", "BadNets: ASR", "Blended: ASR", "victims: ACC", "clean model: ACC"], lines)


# docs/claims.md


def by_victim(rows: Sequence[Row], victims: dict[str, str], defenses: Sequence[str]) -> str:
    """ACC / ASR, a line for each victim."""
    lines = [
        [title, *(rates(one(rows, attack=attack, defense=defense)) for defense in defenses)]
        for attack, title in victims.items()
    ]
    return table(["", *map(code, defenses)], lines)


def little_clean_data() -> str:
    """Repairs from 5, 1 and 0.5 % clean data."""
    defenses = ("finetune", "d3", "super_finetune", "tac")
    lines = []
    for attack, title in VICTIMS.items():
        for name in ("adaptive_small", "clean01_small", "clean005_small"):
            found = [one(rows_of(name), attack=attack, defense=defense) for defense in ("none", *defenses)]
            used = next(row["n_used"] for row in found[1:] if row)
            lines.append([title, str(used), *map(rates, found)])
    return table(["", "clean images", "victim", *map(code, defenses)], lines)


def poisoning_rates() -> str:
    """Poisoning rates and target classes."""
    victims = {
        "badnets_005": "BadNets .5 %",
        "badnets_01": "1 %",
        "badnets_01_longer": "1 %, 30 epochs",
        "badnets": "10 %",
        "badnets_50": "50 %",
        "badnets_target7": "10 %, class 7",
        "blended_005": "Blended .5 %",
        "blended_01": "1 %",
        "blended": "10 %",
        "blended_50": "50 %",
        "blended_target7": "10 %, class 7",
        "none": "clean",
    }
    return by_victim(rows_of("rates_small"), victims, ("none", "d3", "tac", "pad_ft"))


def adaptive() -> str:
    """Attackers who expect a repair."""
    victims = {
        "badnets": "BadNets",
        "badnets_sam1": "radius 1",
        "badnets_sam3": "radius 3",
        "blended": "Blended",
        "blended_sam1": "radius 1",
        "blended_sam3": "radius 3",
        "adap_blend": "Adap-Blend, 1 %",
        "none": "clean",
    }
    return by_victim(rows_of("adaptive_small"), victims, ("none", "finetune", "d3", "tac"))


def super_finetuning() -> str:
    """Super-fine-tuning with all of the training set clean, and with 5 % of it."""
    lines = []
    for name, left_out in (("super_finetune_small", ()), ("super_finetune05_small", ("none",))):
        rows = rows_of(name)
        for defense in dict.fromkeys(row["defense"] for row in rows if row["defense"] not in left_out):
            found = [one(rows, attack=attack, defense=defense) for attack in VICTIMS]
            used = "" if defense == "none" else f"{found[0]['n_used']:,}"  # type: ignore[index]
            method, _, settings = defense.rpartition("_") if defense.startswith("super") else (defense, "", "")
            lines.append([f"{code(method)}{f', {settings}' if settings else ''}", used, *map(rates, found)])
    return table(["", "clean images", "BadNets", "Blended", "clean"], lines)


def transfer() -> str:
    """Backdoored networks tuned for another task."""
    names = {
        "badnets": "BadNets",
        "blended": "Blended",
        "finetune": "conventional",
        "super_finetune": "super-fine-tuning",
    }
    lines: list[list[str]] = []
    for trigger in ("badnets", "blended"):
        for method in ("finetune", "super_finetune"):
            for kind, network in (("victim", trigger), ("clean", "none")):
                row = one(rows_of("scenarios", "transfer.jsonl"), trigger=trigger, method=method, pretrained=network)
                assert row
                cells = [percent(row[name]) for name in ("acc", "asr", "unprovoked")]
                lines.append([names[trigger], kind, names[method], *cells, f"{row['seconds']:.0f}"])
    return table(["trigger", "network", "method", "ACC", "triggered", "without", "seconds"], lines)


def encoders() -> str:
    """Classifiers on a clean and on a backdoored encoder."""
    rows = rows_of("scenarios", "encoder.jsonl")
    lines = [
        [f"{kind} encoder", *(rates(one(rows, encoder=kind, trained=what)) for what in ("classifier", "whole"))]
        for kind in ("clean", "backdoored")
    ]
    return table(["", "classifier alone trained", "complete model tuned"], lines)


def verdicts() -> str:
    """How often the scan's two tests name the target, over all victims on GTSRB."""
    scans: dict[tuple[str, str, int, int], Row] = {}
    for path in sorted(measuring.RESULTS.glob("*/results.jsonl")):
        for row in rows_of(path.parent.name):
            if row["dataset"] == "gtsrb_half" and "scan" in row["info"]:
                scans[row["model"], row["attack"], row["seed"], row["n_used"]] = row
    # The same victim scanned with less data counts with the most.
    victims = {key[:3]: row for key, row in sorted(scans.items(), key=lambda item: item[0][3]) if key[1] != "none"}
    groups: dict[str, list[Row]] = {
        "BadNets": [],
        "Blended": [],
        "low-frequency, SSBA, WaNet, LIRA, Input-aware": [],
        "Adap-Blend": [],
        "TrojanNN": [],
        "label-consistent, which ignores its trigger": [],
        "SIG": [],
        "BadNets that ignores its trigger": [],
    }
    for (_, attack, _), row in victims.items():
        title = next(title for title in groups if _kind(attack) in title)
        groups["BadNets that ignores its trigger" if title == "BadNets" and _ignores(row) else title].append(row)
    lines = []
    for title, rows in groups.items():
        success = f"{span([100 * row['asr_before'] for row in rows], 1)} %"
        lines.append(
            [title, str(len(rows)), success, *(str(_named_by(rows, test)) for test in ("per_sample", "worst_case"))]
        )
    clean = [row for key, row in scans.items() if key[1] == "none"]
    models = {(row["model"], row["seed"]) for row in clean}
    flagged = (
        sum(row["info"]["scan"]["tests"][test]["p_value"] <= ALPHA for row in clean)
        for test in ("per_sample", "worst_case")
    )
    lines.append(
        [f"clean models, in {len(clean)} scans", str(len(models)), "-", *(f"{count} flagged" for count in flagged)]
    )
    return table(["models", "how many", "ASR", "our statistic names the class", "the paper's does"], lines)


def _kind(attack: str) -> str:
    """The title of an attack, without what tells its victims apart."""
    names = {
        "badnets": "BadNets", "blended": "Blended", "low_frequency": "low-frequency", "ssba": "SSBA", "wanet": "WaNet",
        "lira": "LIRA", "input_aware": "Input-aware", "adap_blend": "Adap-Blend", "trojan_nn": "TrojanNN",
        "label_consistent": "label-consistent", "sig": "SIG",
    }  # fmt: skip
    return next(title for name, title in names.items() if attack.startswith(name))


def _ignores(row: Row) -> bool:
    return bool(row["asr_before"] < IGNORED)


def _named_by(rows: Sequence[Row], test: str) -> int:
    """How often a test names the target class."""
    found = [(row["info"]["scan"]["tests"][test], row["config"]["attack"]["target"]) for row in rows]
    return sum(scan["smallest"] == target and scan["p_value"] <= ALPHA for scan, target in found)


def mislabeled() -> str:
    """What detectors say of models that were trained on mislabeled images."""
    titles = {
        "badnets": "BadNets",
        "blended": "Blended",
        "none": "clean",
        "any:0:160": "160 images of any class labeled 0 (of which there are 90)",
        "any:2:160": "160 of any class labeled 2 (938)",
        "1:2:160": "160 of class 1 labeled 2",
    }
    rows = rows_of("scenarios", "detection.jsonl")

    def cell(model: str, statistic: str) -> str:
        row = one(rows, model=model, statistic=statistic)
        assert row
        p_value = f"{row['p_value']:.2g}".replace("e-0", "e-")
        if row["p_value"] > ALPHA:
            return f"none ({p_value})"
        return f"**{row['target']}**, {p_value}" if ":" in model else f"{row['target']}, {p_value}"

    lines = [
        [title, *(cell(model, name) for name in ("per_sample", "worst_case", "mm_bd"))]
        for model, title in titles.items()
    ]
    return table(["model", "our statistic", "the paper's", "MM-BD"], lines)


def purified_sizes() -> str:
    """Sizes of PAD-FT's purified set."""
    rows = rows_of("pad_ft_sizes_small")
    sizes = list(dict.fromkeys(row["defense"] for row in rows if row["defense"] != "none"))
    lines = []
    for attack, title in VICTIMS.items():
        before = rates(one(rows, attack=attack, defense="none"))
        lines.append([f"{title} ({before})", *(rates(one(rows, attack=attack, defense=size)) for size in sizes)])
    of_size = {size: [row for row in rows if row["defense"] == size] for size in sizes}
    lines.append(["seconds, one core", *(span([row["seconds"] for row in of_size[size]]) for size in sizes)])
    kept = [f"{of_size[size][0]['info']['purified']:,}" for size in sizes]
    return table(["purified", *kept], lines)


def seconds() -> str:
    """What each defense takes at three widths."""
    steps = {
        "none": "2,500 of 64", "finetune": "400", "d3": "400", "tac": "400, after the scan",
        "super_finetune": "1,600 of 128", "ft_sam": "400, two gradients each", "sau": "400, each after a search of 5",
        "anp": "2,000 of 128 on masks", "fine_pruning": "1,000", "i_bau": "60, with searches", "nad": "200",
        "fst": "84", "mm_bm": "bounds", "pad_ft": "bounds and head", "clp": "none", "dbd": "trains from scratch",
    }  # fmt: skip
    small = on_one_core()
    lines = []
    for defense, text in steps.items():
        times = seconds_of(rows_of("defenses_gtsrb"), defense)
        on_core = seconds_of(small, defense)
        on_cores = seconds_of(rows_of("gtsrb_small"), "tac_detected" if defense == "tac" else defense)
        least = min(times)
        lines.append(
            [
                "a victim, 160,000 images" if defense == "none" else code(defense),
                text,
                f"{least:.0f}" if least >= 10 else f"{least:.1f}",
                span(on_core) if on_core else "",
                f"{median(on_cores):.0f}" if on_cores else "",
            ]
        )
    return table(["", "steps", "H100", "one core", "two cores"], lines)


# docs/performance.md


def versus_torch() -> str:
    """Seconds of PyTorch over those of this package."""
    content = json.loads((measuring.RESULTS / "speed" / "versus_torch-cpu_cpu.json").read_text(encoding="utf-8"))
    lines = []
    for width in (16, 64):
        for name, title in {"finetune": "fine-tuning", "d3": "D3", "scoring": "scoring"}.items():
            places = [f"width {width}, {cores}" for cores in ("1 core", "2 cores")]
            of = f" ({content['settings'][places[0]]['scored']:,} images)" if name == "scoring" else ""
            ratios = (content["results"][place][f"{name}/tuned"]["ratio"] for place in places)
            lines.append([f"{title}, width {width}{of}", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(["", "1 core", "2 cores"], lines)


def layers() -> str:
    """Milliseconds of a step's layers, those of one kind together."""
    found = {tuple(json.loads(f"[{key[1:-1]}]")): value for key, value in measured(LAYERS).items()}
    kinds = {
        "stem": [key for key in found if key[2] == 3],
        **{
            f"{found[key]['times']} layers of {key[2]} channels at {key[0]}x{key[0]}": [key]
            for key in found
            if key[1] == 3 and key[2] == key[3]
        },
        "3 with stride 2, 3x3": [key for key in found if key[1] == 3 and key[4] == 2],
        "3 with stride 2, 1x1": [key for key in found if key[1] == 1],
        "16 normalizations with rectifiers": [key for key in found if key[1] == 0],
    }

    def cell(keys: Sequence[tuple[int, ...]], part: str) -> str:
        if any(part not in found[key]["jax"] for key in keys):
            return "-"
        here, there = (sum(found[key]["times"] * found[key][side][part] for key in keys) for side in ("jax", "torch"))
        return f"{here:.1f} / {there:.1f}"

    parts = ("forward", "by_images", "by_kernel", "forward_and_backward")
    lines = [[title, *(cell(keys, part) for part in parts)] for title, keys in kinds.items()]
    lines[0][2] = "-"  # Nobody needs the gradient by the images.
    return table(["", "forward", "by images", "by kernel", "forward and backward"], lines)


def parts_on_cpu() -> str:
    """Single parts of the methods on a CPU, against what they were to take."""
    cpu, start = measured("speed-cpu_cpu"), measured("start-cpu_cpu")
    head, recomputed = cpu["pad_head"]["seconds"], 50 * cpu["pad_head_recomputing"]["seconds"]
    return table(
        ["", "target", "measured"],
        [
            ["PAD-FT's tuning (3,000 images, 5 views, 100 epochs)", "20 times faster than with features recomputed",
             f"{head:.1f} s, {recomputed / head:.0f} times"],
            ["TAC's programs, 200 classes, latents of 2,048", "1 s",
             f"{cpu['tac_programs_200_2048']['seconds']:.2f} s"],
            ["from starting the command to the end of the first epoch on digits", "15 s cold, 6 s warm",
             f"{start['cold']['seconds']:.1f} and {start['warm']['seconds']:.1f} s"],
        ],
    )  # fmt: skip


def on_gpu() -> str:
    """Runs on a GPU, scaled to the published length."""
    names = ("speed-bfloat16-gpu_nvidia_h100_80gb_hbm3", "speed-gpu_nvidia_h100_80gb_hbm3")

    def scaled(what: str, images: int) -> list[str]:
        cells = []
        for name in names:
            found = measured(name).get(what)
            if found is None:
                cells.append("not measured: out of memory beside the others")
                continue
            pace = found["images"] / found["seconds"]
            seconds = images / pace
            cells.append(f"{seconds:.{0 if seconds >= 100 else 1}f} s ({round(pace, -2):,.0f} images a second)")
        return cells

    half, full = map(measured, names)
    large = full["tac_programs_200_2048"]
    return table(
        ["", "target, for an H200", "bfloat16", "float32"],
        [
            ["100 epochs of a victim on CIFAR-10's 50,000 images", "90 s", *scaled("victim", 5_000_000)],
            ["D3, 1,000 steps of 250 images", "5 s", *scaled("d3", 250_000)],
            ["super-fine-tuning, 1,600 steps of 125", "15 s", *scaled("super_finetune", 200_000)],
            ["PAD-FT of 50,000 images, 3,000 kept", "5 s", f"scoring {half['pad_score']['seconds']:.1f} s",
             f"{full['pad_score']['seconds']:.1f} s scoring, {25 * full['pad_bounds']['seconds']:.1f} s bounds, "
             f"{full['pad_head']['seconds']:.1f} s head"],
            ["TAC's programs", "0.1 s", "-", f"43 classes {full['tac_programs_43_512']['seconds']:.3f} s; 200 classes, "
             f"latents of 2,048: {large['seconds']:.2f} s ({large['least']:.2f} to {large['most']:.2f})"],
        ],
    )  # fmt: skip


def both_precisions() -> str:
    """BadNets on digits in bfloat16 and in float32."""
    titles = {"none": "victim", "finetune": "fine-tuning", "d3": "D3", "tac": "TAC"}
    files = ("bfloat16", "float32")
    rows = [rows_of("bfloat16_digits", f"{file}.jsonl") for file in files]
    lines = [
        [title, *(rates(one(part, attack="badnets", defense=defense)) for part in rows)]
        for defense, title in titles.items()
    ]
    return table(["", *files], lines)


# docs/scaling.md


def cells() -> str:
    """Seconds of a cell at three widths."""
    groups = {
        "width 8, one core": on_one_core(),
        "width 16, two cores": rows_of("gtsrb_small"),
        "width 64, one H100 shared by twelve processes": rows_of("defenses_gtsrb"),
    }
    kinds = {
        "victim": ("none",),
        "fine-tuning": ("finetune",),
        "D3": ("d3",),
        "TAC": ("tac", "tac_detected"),
        "PAD-FT": ("pad_ft",),
    }

    lines = [
        [title, *(f"{median(seconds_of(rows, *names)):.0f}" for rows in groups.values())]
        for title, names in kinds.items()
    ]
    return table(["", *groups], lines)


def workers() -> str:
    """Minutes of a thousand cells on so many workers, computed."""
    tasks = cost_model.read_tasks(rows_of("defenses_gtsrb"), 21)
    alone = cost_model.makespan(tasks, 1, 20.0, True)
    lines = []
    for count in (1, 2, 4, 10, 30, 100):
        apart, shared = (cost_model.makespan(tasks, count, 20.0, cache) for cache in (False, True))
        lines.append([str(count), f"{apart / 60:.0f}", f"{shared / 60:.0f}", f"{alone / shared:.1f}"])
    return table(["workers", "each compiles for itself", "with a shared cache of programs", "speedup with it"], lines)


def networks() -> str:
    """The largest differences of PyTorch modules between JAX and PyTorch, by type, and after a repair."""
    rows = rows_of(".", "torch_parity.jsonl")

    def largest(kind: str, *fields: str) -> str:
        found = [row[field] for row in rows if row["kind"] == kind for field in fields if row.get(field) is not None]
        return f"{max(found):.1e}" if found else "-"

    names = {"float32": "as they are, float32", "float64": "as they are, float64", "repair": "repaired, float32"}
    header = ("networks", "number", "evaluation mode", "training mode", "PyTorch's rounding")
    lines = [
        (
            name,
            str(sum(row["kind"] == kind for row in rows)),
            largest(kind, "eval", "d3", "tac"),
            largest(kind, "train", "statistics"),
            largest(kind, "torch_train"),
        )
        for kind, name in names.items()
    ]
    return table(header, lines)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"headline": headline},
    "docs/results.md": {"defenses": defenses, "methods": methods, "attacks": attacks},
    "docs/which_defense.md": {"choices": choices},
    "docs/claims.md": {
        "little_clean_data": little_clean_data,
        "poisoning_rates": poisoning_rates,
        "adaptive": adaptive,
        "super_finetuning": super_finetuning,
        "transfer": transfer,
        "encoders": encoders,
        "verdicts": verdicts,
        "mislabeled": mislabeled,
        "purified_sizes": purified_sizes,
        "seconds": seconds,
    },
    "docs/field_cases.md": {"networks": networks},
    "docs/performance.md": {
        "versus_torch": versus_torch,
        "layers": layers,
        "parts_on_cpu": parts_on_cpu,
        "on_gpu": on_gpu,
        "both_precisions": both_precisions,
    },
    "docs/scaling.md": {"cells": cells, "workers": workers},
}
"""The tables of each page by name."""


if __name__ == "__main__":
    main()
