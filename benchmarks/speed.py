"""How fast everything is on this device, beside the device's own floor.

    python benchmarks/speed.py --platform cpu
    python benchmarks/speed.py --platform gpu --steps 1000
    python benchmarks/speed.py --quick

Each measurement runs in a process of its own: a call that compiles, with caches off, then timed repeats. `floor` is the
time the arithmetic would take at the rate at which this device multiplies large float32 matrices, measured in the same
process; `share` is how much of that rate is reached. Images are random: speed does not depend on them.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import measuring


class Work(NamedTuple):
    """Something to time.

    Attributes:
        run: does it, compiled at its first call.
        flops: of one run.
        images: that one run goes over, 0 where it is not about images.
        what: how much one run is, in words.
    """

    run: Callable[[], Any]
    flops: float
    images: int
    what: str


class Size(NamedTuple):
    """How large the network and the work are, and what it is computed in."""

    width: int
    steps: int
    images: int
    dtype: Any = "float32"


def tuning(size: Size, name: str) -> Work:
    """Victim training, FT, D3, super-fine-tuning, TAC's fine-tuning: ``steps`` gradient steps."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    import backdoor_jax as bj
    from backdoor_jax.data import Augment
    from backdoor_jax.defenses import DEFENSES
    from backdoor_jax.defenses.tac import tac_loss
    from backdoor_jax.training import GradientStep, batch_shape, cross_entropy, fit, supervised_loss

    batch = 128 if name == "victim" else 250
    data = random_data(10 * batch)
    classifier, variables = network(size)
    key = jax.random.key(1)
    steps, epochs = 10 * -(-size.steps // 10), -(-size.steps // 10)
    if name == "victim":
        training = bj.TrainConfig(epochs=epochs, batch_size=batch)
        step = GradientStep(Partial(supervised_loss, classifier), training.optimizer(len(data)))
        state = step.init(variables)

        def run() -> Any:
            augment = Augment(crop=4, flip=True)
            return fit(key, step, state, data, epochs=epochs, batch_size=batch, augment=augment).state
    elif name == "tac_tuning":
        tac = bj.TAC(steps=steps, flip=True)
        latent = classifier.features(variables, data.images[:1], train=False)[0]
        loss = Partial(tac_loss, classifier, tac.beta, jnp.ones(latent.shape[1]) / 10)

        def run() -> Any:
            return tac.tune(key, GradientStep(loss, tac.optimizer), variables, data).variables
    else:
        make: Any = DEFENSES[name]
        defense = make(steps=steps, flip=True)
        an_epoch, batch = batch_shape(len(data), defense.batch_size)
        steps = an_epoch * -(-steps // an_epoch)

        def run() -> Any:
            return defense.repair(key, classifier, variables, data).variables

    def gradient(params: Any, images: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, _ = classifier.logits({**variables, "params": params}, images, train=True)
            return cross_entropy(logits, data.labels[:batch]).mean()

        return jax.grad(loss)(params)

    arithmetic = steps * measuring.flops(gradient, variables["params"], data.images[:batch])
    return Work(run, arithmetic, steps * batch, f"{steps} steps of {batch} images")


def scoring(size: Size) -> Work:
    """PAD-FT's first stage: a symmetric cross-entropy for every training image."""
    from backdoor_jax.defenses.pad_ft import score

    data = random_data(size.images)
    classifier, variables = network(size)
    one = measuring.forward_flops(classifier, variables, data.images)
    return Work(lambda: score(classifier, variables, data), one * size.images, size.images, f"{size.images} images")


def bounding(size: Size) -> Work:
    """PAD-FT's second stage: Adam on the bounds, backwards through the frozen network."""
    import jax

    from backdoor_jax.defenses import PAD, bound_activations

    images = min(size.images, 3000)
    data = random_data(images)
    classifier, variables = network(size)
    config = PAD(bound_epochs=2)

    def run() -> Any:
        return bound_activations(jax.random.key(1), classifier, variables, data, config)[0]

    one = measuring.forward_flops(classifier, variables, data.images)
    # Forward and the gradient of activations, no gradient of weights; logits and largest activations once more.
    return Work(
        run, one * images * (2 * config.bound_epochs + 2), images * config.bound_epochs, f"2 epochs of {images}"
    )


def head_tuning(size: Size) -> Work:
    """PAD-FT's third stage: features of all views once, then the head alone."""
    import jax

    from backdoor_jax.defenses import PADFT, tune_classifier

    images = min(size.images, 3000)
    data = random_data(images)
    classifier, variables = network(size)
    config = PADFT()

    def run() -> Any:
        return tune_classifier(jax.random.key(1), classifier, variables, data, config)[0]

    one = measuring.forward_flops(classifier, variables, data.images)
    views = images * (1 + config.views)
    width = 8 * size.width
    head = 6 * 10 * width * views * config.tune_epochs
    return Work(run, one * views + head, views, f"{images} images, {config.views} views, {config.tune_epochs} epochs")


def head_recomputing(size: Size) -> Work:
    """Two epochs of the same with no features kept: every step runs the frozen network on all views of its batch."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    from backdoor_jax.data import Augment, Dataset
    from backdoor_jax.defenses import PADFT
    from backdoor_jax.defenses.pad_ft import classifier_loss
    from backdoor_jax.training import SGD, Cosine, GradientStep, batch_shape, fit

    images, epochs = min(size.images, 3000), 2
    data = random_data(images)
    classifier, variables = network(size)
    config = PADFT()
    augment = Augment(flip=bool(config.flip), brightness=config.brightness, contrast=config.contrast)

    def loss(config: PADFT, variables: Any, batch: Dataset, key: Any) -> Any:
        views = [batch.images, *(augment(one, batch.images) for one in jax.random.split(key, config.views))]
        seen = jnp.stack([classifier.features(variables, view)[0] for view in views], axis=1)
        return classifier_loss(classifier, config, variables, Dataset(seen, batch.labels), key)

    steps, _ = batch_shape(images, config.batch_size)
    optimizer = SGD(config.learning_rate, Cosine(steps * epochs), config.momentum, config.weight_decay)
    step = GradientStep(Partial(loss, config), optimizer, trainable=(classifier.head_path,))
    state = step.init(variables)

    def run() -> Any:
        key = jax.random.key(1)
        return fit(key, step, state, data, epochs=epochs, batch_size=config.batch_size).state

    one = measuring.forward_flops(classifier, variables, data.images)
    seen = images * (1 + config.views) * epochs
    return Work(
        run, one * seen, seen, f"{images} images, {config.views} views, {epochs} of {config.tune_epochs} epochs"
    )


def programs(classes: int, latent: int) -> Work:
    """TAC's quadratic programs of all classes, for clean latents as a trained network has them: clusters."""
    import jax
    import numpy as np

    from backdoor_jax.defenses.tac_program import WORKING_SET, class_perturbations

    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((latent, classes)).astype(np.float32) / np.sqrt(latent)
    samples = generator.standard_normal((5 * classes, latent)).astype(np.float32)
    samples += 20 * kernel[:, np.arange(5 * classes) % classes].T
    arrays = jax.device_put((samples, kernel, np.zeros(classes, np.float32)))
    sweeps = float(class_perturbations(*arrays).sweeps.sum())
    jax.clear_caches()
    arithmetic = 2 * classes**3 * min(classes, latent) + sweeps * 2 * min(classes, WORKING_SET) ** 2
    return Work(lambda: class_perturbations(*arrays), arithmetic, 0, f"{classes} classes, latents of {latent}")


def random_data(images: int) -> Any:
    """Images of CIFAR-10's shape and labels in ten classes."""
    import numpy as np

    import backdoor_jax as bj

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    return bj.make_dataset(pixels, np.arange(images) % 10, 10)


def network(size: Size) -> tuple[Any, Any]:
    """An untrained PreAct-ResNet18."""
    import jax

    import backdoor_jax as bj

    classifier = bj.build_classifier("preact_resnet18", 10, width=size.width, dtype=size.dtype)
    return classifier, classifier.init(jax.random.key(0), random_data(1).images)


MEASUREMENTS: dict[str, Callable[[Size], Work]] = {
    "victim": lambda size: tuning(size, "victim"),
    "finetune": lambda size: tuning(size, "finetune"),
    "d3": lambda size: tuning(size, "d3"),
    "super_finetune": lambda size: tuning(size, "super_finetune"),
    "pad_score": scoring,
    "pad_bounds": bounding,
    "pad_head": head_tuning,
    "pad_head_recomputing": head_recomputing,
    **{
        f"tac_programs_{classes}_{latent}": lambda size, c=classes, d=latent: programs(c, d)  # type: ignore[misc]
        for classes in (10, 43, 100, 200)
        for latent in (512, 2048)
    },
    "tac_tuning": lambda size: tuning(size, "tac_tuning"),
}
QUICK = ("d3", "pad_score", "tac_programs_43_512")


def main() -> None:
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--width", type=int, help="of the PreAct-ResNet18 (default: 64, on a CPU 16)")
    parser.add_argument("--steps", type=int, help="gradient steps a run (default: 1000, on a CPU 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what networks compute in")
    parser.add_argument("--one", choices=MEASUREMENTS, help="measure this alone, and print it as JSON")
    arguments = parser.parse_args()
    measuring.use_platform(arguments.platform)
    measuring.keep_no_programs()
    unknown = set(arguments.only or ()) - set(MEASUREMENTS)
    if unknown:
        parser.error(f"unknown measurement {sorted(unknown)[0]!r}; known are {', '.join(MEASUREMENTS)}")
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return

    names = arguments.only or (QUICK if arguments.quick else MEASUREMENTS)
    results = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = measuring.in_a_process(__file__, *sys.argv[1:], "--one", name)
        about = results[name].pop("about")
        content = {"about": about, "quick": arguments.quick, "results": results}
        path = measuring.write(arguments, "speed" + ("-bfloat16" if arguments.dtype == "bfloat16" else ""), content)
    print(path)
    rows = []
    for name, result in results.items():
        rate = f"{result['images'] / result['seconds']:,.0f}" if result["images"] else "-"
        times = f"{result['seconds']:.3g} ({result['least']:.3g} to {result['most']:.3g})"
        memory = f"{result['peak_bytes'] / 2**20:,.0f}"
        share = f"{100 * result['share']:.0f}"
        compiling = f"{result['compile_seconds']:.1f}"
        rows.append([name, result["what"], times, rate, compiling, f"{result['floor']:.3g}", share, memory])
    columns = ["", "work", "seconds", "images/s", "compile s", "floor s", "share %", "peak MiB"]
    measuring.show(f"{about['device']}, {about['processor']}", columns, rows)


def measure(name: str, arguments: Any) -> dict[str, Any]:
    """One measurement, in this process."""
    import jax

    accelerator = jax.default_backend() != "cpu"
    width, steps = (64, 1000) if accelerator else (16, 20)
    images = 50_000 if accelerator else 10_000
    if arguments.quick:
        width, steps, images = 4, 10, 2_000
    size = Size(arguments.width or width, arguments.steps or steps, images, arguments.dtype)
    before = measuring.floors(arguments.quick)
    work = MEASUREMENTS[name](size)
    times = measuring.timed(work.run, 2 if arguments.quick else arguments.repeats)
    after = measuring.floors(arguments.quick)
    best = {key: max(value, after[key]) for key, value in before.items()}
    floor = work.flops / best["matmul_float32_flops"]
    return {
        **times,
        "what": work.what,
        "width": size.width,
        "dtype": size.dtype,
        "images": work.images,
        "flops": work.flops,
        "floor": floor,
        "share": floor / times["seconds"],
        "peak_bytes": measuring.peak_memory(),
        "floors": best,
        "about": measuring.about(),
    }


if __name__ == "__main__":
    main()
