"""The same work here and in plain PyTorch, in one run, in turns, from the same weights.

    python benchmarks/versus_torch.py --torch-python PYTHON
    python benchmarks/versus_torch.py --widths 16 --checkpoint VICTIM --data data/gtsrb_half.npz
    python benchmarks/versus_torch.py --quick

Fine-tuning, D3 and scoring, the first stage of PAD-FT: a symmetric cross-entropy for each of many images. PyTorch is
tuned; `--only` asks for two other styles (see `torch_side.py`): as the published benchmark has it, with both test sets
judged every epoch, against the same here, and both judged at the end. ACC and ASR of both sides stand beside the
seconds, so that one sees that speed was not bought with quality. Seconds leave compilation out on both sides and
include judging.

A PreAct-ResNet18 of each width is measured on each number of cores, both sides held to the same cores. Images are
random unless `--data` names some, and the network is untrained unless `--checkpoint` gives one: rates mean nothing
then. BadNets' white square is the trigger. `--torch-python` is an interpreter with PyTorch, this one by default.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import measuring
from speed import random_data

STYLES = {"as_published": "every epoch", "judged_once": "at the end", "tuned": "at the end"}
"""PyTorch's style, and when both sides are judged."""
HEADLINE = ("finetune/tuned", "d3/tuned", "scoring/tuned")
KNOWN = (*HEADLINE, *(f"{method}/{style}" for method in ("finetune", "d3") for style in STYLES if style != "tuned"))


def main() -> None:
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--checkpoint", type=Path, help="a PreAct-ResNet18 in a file of ours")
    parser.add_argument("--data", default="random", help="random, digits, or a plain .npz")
    parser.add_argument("--clean", type=int, help="clean images (default: 2500; on a CPU 800, 400 where wide)")
    parser.add_argument("--tests", type=int, help="test images (default: 10000; on a CPU 1000, fewer where wide)")
    parser.add_argument("--steps", type=int, help="gradient steps (default: 1000; on a CPU 20, 2 where wide)")
    parser.add_argument("--scored", type=int, help="images to score (default: 16000; on a CPU fewer where wide)")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64], help="of the networks (default: 16 64)")
    parser.add_argument("--cores", type=int, nargs="+", help="on a CPU: how many both may use (default: 1 and all)")
    parser.add_argument("--one", nargs=2, type=int, metavar=("WIDTH", "CORES"), help="measure this alone, print JSON")
    arguments = parser.parse_args()
    if set(arguments.only or ()) - set(KNOWN):
        parser.error(f"--only takes {', '.join(KNOWN)}")
    measuring.use_platform(arguments.platform)
    measuring.keep_no_programs()
    if arguments.one:
        width, count = arguments.one
        print(json.dumps(measure(width, count, arguments)))
        return

    usable = len(os.sched_getaffinity(0))
    cores = sorted(set(arguments.cores or ([usable] if arguments.quick else [1, usable])))
    if cores[-1] > usable or cores[0] < 1:
        parser.error(f"--cores: this process may use 1 to {usable}")
    if arguments.quick:
        arguments.widths = [4]
    results: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    rows = []
    for width in arguments.widths:
        for count in cores:
            title = f"width {width}, {count} core{'s' * (count > 1)}"
            print(f"{title} ...", file=sys.stderr, flush=True)
            found = measuring.in_a_process(__file__, *sys.argv[1:], "--one", str(width), str(count))
            about = found["about"]
            on_cpu = about["device"].startswith("cpu")
            if not on_cpu:
                title = f"width {width}"
            results[title] = found["results"]
            settings[title] = found["settings"]
            content = {"about": about, "quick": arguments.quick, "settings": settings, "results": results}
            path = measuring.write(arguments, "versus_torch", content)
            rows += [[title, name, *row(result)] for name, result in found["results"].items()]
            if not on_cpu:
                break
    print(path)
    columns = ["", "", "here, s", "PyTorch, s", "times faster", "ACC / ASR here", "PyTorch"]
    measuring.show(f"{about['device']}, {about['processor']}", columns, rows)


def row(result: dict[str, Any]) -> list[str]:
    """Seconds, their ratio, and rates of both sides, in words."""
    sides = [
        f"{result[side]['seconds']:.3g} ({result[side]['least']:.3g} to {result[side]['most']:.3g})"
        for side in ("jax", "torch")
    ]
    rates = [
        f"{100 * result[side]['acc']:.1f} / {100 * result[side]['asr']:.1f}" if "acc" in result[side] else "-"
        for side in ("jax", "torch")
    ]
    return [*sides, f"{result['ratio']:.2f}", *rates]


def measure(width: int, cores: int, arguments: Any) -> dict[str, Any]:
    """All work for a network of one width, both sides on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    import jax
    import numpy as np

    accelerator = jax.default_backend() != "cpu"
    defaults = {"clean": 2500, "tests": 10_000, "steps": 1000, "scored": 16_000}
    if not accelerator:
        share = min(1, (16 / width) ** 2)
        defaults = {"clean": 800, "tests": round(1000 * share), "steps": 20, "scored": round(16_000 * share)}
        if share < 1:
            defaults |= {"clean": 400, "steps": 2}
    if arguments.quick:
        defaults = {"clean": 200, "tests": 200, "steps": 4, "scored": 400}
        arguments.repeats = 1
    for name, value in defaults.items():
        setattr(arguments, name, getattr(arguments, name) or value)

    with tempfile.TemporaryDirectory() as folder:
        ours, work = prepare(width, arguments)
        file = Path(folder) / "work.npz"
        np.savez(file, **work)
        script = str(Path(__file__).with_name("torch_side.py"))
        command = [arguments.torch_python, script, str(file), "cuda" if accelerator else "cpu"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": ""}
        ) as other:
            assert other.stdin is not None and other.stdout is not None
            said = other.stdout.readline()
            if not said:
                sys.exit(f"{arguments.torch_python}: cannot run {script}; give --torch-python one that has PyTorch")
            versions = json.loads(said)

            def theirs(method: str, style: str) -> dict[str, float]:
                assert other.stdin is not None and other.stdout is not None
                other.stdin.write(f"{method} {style}\n")
                other.stdin.flush()
                return dict(json.loads(other.stdout.readline()))

            results = {}
            for name in arguments.only or HEADLINE:
                method, style = name.split("/")
                print(f"  {name} ...", file=sys.stderr, flush=True)
                run = partial(ours[method], STYLES[style] == "every epoch")
                results[name] = compare(run, partial(theirs, method, style), arguments.repeats)
            other.stdin.close()

    about = measuring.about()
    about["versions"] |= {"torch": versions["torch"]}
    settings = {name: getattr(arguments, name) for name in ("clean", "tests", "steps", "scored")}
    settings |= {"data": Path(arguments.data).name, "batch": int(work["batch"])}
    return {"about": about, "settings": settings, "results": results}


def compare(run: Callable[[], Any], other: Callable[[], dict[str, float]], repeats: int) -> dict[str, Any]:
    """Both sides in turns, after a run of each that compiles; the ratio is the median of those of the turns."""
    from backdoor_jax.training.stopwatch import Stopwatch

    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    run()
    other()
    for _ in range(repeats):
        with Stopwatch() as watch:
            ours = run()
        seconds["jax"].append(watch.seconds + watch.compile_seconds)
        theirs = other()
        seconds["torch"].append(theirs["seconds"])
    sides = {name: measuring.spread(values) for name, values in seconds.items()}
    return {
        "jax": {**sides["jax"], **ours},
        "torch": {**theirs, **sides["torch"]},
        "ratio": median(theirs / ours for theirs, ours in zip(seconds["torch"], seconds["jax"], strict=True)),
    }


def prepare(width: int, arguments: Any) -> tuple[dict[str, Callable[[bool], dict[str, float]]], dict[str, Any]]:
    """Our side of each method, told whether to judge every epoch, and what PyTorch needs to do the same."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.tree_util import Partial

    import backdoor_jax as bj
    from backdoor_jax.attacks import AttackContext
    from backdoor_jax.data import Augment
    from backdoor_jax.defenses.d3 import d3_loss, initialize
    from backdoor_jax.defenses.pad_ft import score
    from backdoor_jax.defenses.sphere import project_selected
    from backdoor_jax.interop.pytorch import torch_state
    from backdoor_jax.training import GradientStep, batch_shape, fit, merge, split_by_path, supervised_loss

    if arguments.data == "random":
        classes, flip = 10, True
        train, tests = random_data(max(arguments.clean, arguments.scored)), random_data(arguments.tests)
    else:
        task = bj.load(arguments.data)
        classes, flip, train, tests = task.num_classes, task.flip, task.train, task.test
    if arguments.checkpoint:
        classifier, variables = bj.load_model(arguments.checkpoint)
    else:
        classifier = bj.build_classifier("preact_resnet18", classes, width=width)
        variables = classifier.init(jax.random.key(0), train.images[:1])
    generator = np.random.default_rng(0)
    clean = train.take(generator.permutation(len(train))[: arguments.clean])
    test = tests.take(generator.permutation(len(tests))[: arguments.tests])
    scored = train.take(np.arange(arguments.scored) % len(train))
    attack = bj.BadNets()
    _, trigger, _ = attack.poison(jax.random.key(0), AttackContext(classifier, clean))
    label_map = attack.label_map(classes)
    per_epoch, batch = batch_shape(len(clean), 256)
    epochs = -(-arguments.steps // per_epoch)
    steps = epochs * per_epoch

    select = ((*classifier.head_path, "kernel"),)
    origin, others = split_by_path(variables["params"], select)
    away = {**variables, "params": merge(initialize(jax.random.key(1), origin, "random"), others)}
    finetune, d3 = bj.FineTune(steps=steps), bj.D3.preset("paper", steps=steps)
    objective, project = Partial(d3_loss, classifier, d3, origin), Partial(project_selected, origin)
    methods = {
        "finetune": (GradientStep(Partial(supervised_loss, classifier), finetune.optimizer), variables),
        "d3": (GradientStep(objective, d3.optimizer, project=project), away),
    }

    def side(name: str) -> Callable[[bool], dict[str, float]]:
        step, start = methods[name]

        def run(every_epoch: bool) -> dict[str, float]:
            state = step.init(start)
            for until in range(1, epochs + 1) if every_epoch else (epochs,):
                augment = Augment(crop=4, flip=flip)
                state = fit(jax.random.key(2), step, state, clean, epochs=until, batch_size=256, augment=augment).state
                judged = bj.evaluate(classifier, state.variables, test, trigger, label_map)
            assert judged.asr is not None
            return {"acc": judged.acc, "asr": judged.asr}

        return run

    def scores(every_epoch: bool) -> dict[str, float]:
        del every_epoch
        return {"mean": float(score(classifier, variables, scored).mean())}

    labels = np.asarray(test.labels)
    others_than_target = np.flatnonzero(labels != attack.target)
    work = {
        **{f"finetune/{name}": value for name, value in torch_state(classifier, variables).items()},
        **{f"d3/{name}": value for name, value in torch_state(classifier, away).items()},
        "scored_images": np.asarray(scored.images),
        "scored_labels": np.asarray(scored.labels),
        "origin": np.asarray(jnp.transpose(jax.tree.leaves(origin)[0])),
        "images": np.asarray(clean.images),
        "labels": np.asarray(clean.labels),
        "test_images": np.asarray(test.images),
        "test_labels": labels,
        "triggered_images": np.asarray(trigger(test.images[others_than_target])),
        "triggered_labels": np.full(len(others_than_target), attack.target),
        "mean": np.asarray(classifier.mean, np.float32),
        "std": np.asarray(classifier.std, np.float32),
        "classes": classes,
        "width": variables["params"]["stem"]["kernel"].shape[-1],
        "steps": steps,
        "epochs": epochs,
        "batch": batch,
        "flip": flip,
        "penalty": d3.penalty,
        "epsilon": d3.epsilon,
    }
    return {**{name: side(name) for name in methods}, "scoring": scores}, work


if __name__ == "__main__":
    main()
