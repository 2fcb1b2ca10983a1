"""Networks of torchvision and timm, with random weights, in PyTorch and in JAX: logits, statistics, scan and repairs.

    python benchmarks/torch_parity.py [NAME ...] [--dtype float64] [--repair]

For each network `Classifier.from_torch` is compared with the module itself, on random images, in evaluation and in
training mode; a difference is the largest one, relative to the largest value. Deep networks with random weights magnify
rounding in training mode: `torch_train` is by how much PyTorch's own float32 differs from its float64 there, and a
difference may be 4 times that where it exceeds the limit. With `--repair` the network also goes through the scan, D3
and TAC, is written by `save_torch`, loaded into the module again, and compared there. Rows are added to
`results/torch_parity.jsonl` and `.md`, one for each network and type; those that are there are not run again unless
they are named. Needs PyTorch, torchvision and timm.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import backdoor_jax as bj
from backdoor_jax.interop import torch_state

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from measuring import RESULTS
from torch_networks import torchvision_models

OUT = RESULTS / "torch_parity.jsonl"
LIMITS = {"float32": 1e-4, "float64": 1e-9}
TORCHVISION = {
    **dict.fromkeys(("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121"), 64),
    **dict.fromkeys(("vgg16", "vgg16_bn", "alexnet", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"), 64),
    **dict.fromkeys(("efficientnet_b0", "convnext_tiny", "swin_t", "regnet_y_400mf", "regnet_x_400mf"), 64),
    **dict.fromkeys(("shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "mnasnet0_5", "googlenet"), 64),
    "inception_v3": 96,
    "resnet101": 128,
    "vit_b_16": 224,
}
"""The side of the images by name."""
TIMM = {
    **dict.fromkeys(("resnet26d", "ecaresnet26t", "seresnext26d_32x4d", "resnetv2_50", "gernet_s", "repvgg_a0"), 64),
    **dict.fromkeys(("mobilenetv3_small_050", "efficientnet_lite0", "tf_efficientnet_b0", "regnetx_002", "dla34"), 64),
    **dict.fromkeys(
        ("dpn48b", "hrnet_w18_small", "convnext_atto", "convnextv2_atto", "ghostnet_100", "rexnet_100"), 64
    ),
    **dict.fromkeys(("mobileone_s0", "res2net50_14w_8s", "edgenext_xx_small", "mobilevit_xxs", "poolformer_s12"), 64),
    **dict.fromkeys(("vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224", "resmlp_12_224"), 224),
    **dict.fromkeys(("xcit_nano_12_p16_224", "levit_128s", "pit_ti_224", "swin_tiny_patch4_window7_224"), 224),
}
REPAIRED = (
    *(f"torchvision:{name}" for name in ("resnet18", "densenet121", "vgg16_bn", "mobilenet_v2", "efficientnet_b0")),
    *(f"torchvision:{name}" for name in ("convnext_tiny", "swin_t", "regnet_y_400mf", "squeezenet1_1", "googlenet")),
    *(f"torchvision:{name}" for name in ("shufflenet_v2_x1_0", "resnext50_32x4d", "mobilenet_v3_small", "mnasnet0_5")),
    "timm:resnet26d",
    "timm:vit_tiny_patch16_224",
)
"""One of each family."""
CLASSES, COUNT = 10, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="torchvision:NAME or timm:NAME (default: all)")
    parser.add_argument("--dtype", choices=tuple(LIMITS), default="float32")
    parser.add_argument("--repair", action="store_true", help="scan, D3 and TAC, and back")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", arguments.dtype == "float64")
    known = read()
    every = [f"torchvision:{name}" for name in TORCHVISION] + [f"timm:{name}" for name in TIMM]
    kind = "repair" if arguments.repair else arguments.dtype
    for name in arguments.names or (REPAIRED if arguments.repair else every):
        if not arguments.names and (name, kind) in known:
            continue
        row: dict[str, Any] = {"network": name, "kind": kind}
        try:
            row |= repair(name) if arguments.repair else compare(name, arguments.dtype)
        except bj.UserError as error:
            row["error"] = str(error)
        known[name, kind] = row
        print(json.dumps(row), flush=True)
        write(known)
    failed = [row for row in known.values() if not passed(row)]
    print(f"{len(known) - len(failed)} of {len(known)} within the limits")
    for row in failed:
        print("outside:", json.dumps(row))


def read() -> dict[tuple[str, str], dict[str, Any]]:
    """The rows there are, by network and type."""
    lines = OUT.read_text().splitlines() if OUT.exists() else []
    return {(row["network"], row["kind"]): row for row in map(json.loads, lines)}


def write(known: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Writes the rows, and the same as a Markdown table."""
    OUT.write_text("".join(json.dumps(known[key]) + "\n" for key in sorted(known)), encoding="utf-8")
    OUT.with_suffix(".md").write_text(markdown(known), encoding="utf-8")


def markdown(known: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The rows as a table."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)

    columns = ("network", "kind", "side", "eval", "train", "torch_train", "statistics", "d3", "tac", "head")
    lines = ["| " + " | ".join(columns) + " | within |", "|" + " --- |" * (len(columns) + 1)]
    for key in sorted(known):
        row = known[key]
        # A repair that a network cannot have is told in the row; it is no difference.
        lines.append("| " + " | ".join(cell(row.get(column)) for column in columns))
        lines[-1] += f" | {'yes' if passed(row) else 'no'} |"
    return "\n".join(lines) + "\n"


def passed(row: dict[str, Any]) -> bool:
    """Whether the differences of a row are within its limits."""
    limit = max(LIMITS.get(row["kind"], LIMITS["float32"]), 4 * (row.get("torch_train") or 0))
    differences = [value for key, value in row.items() if key in ("eval", "train", "statistics", "d3", "tac")]
    return "error" not in row and all(value is None or value <= limit for value in differences)


def build(name: str) -> tuple[Any, int]:
    """A network with random weights and statistics, without dropout, and the side of its images."""
    source, _, plain = name.partition(":")
    torch.manual_seed(0)
    side = (TORCHVISION if source == "torchvision" else TIMM)[plain]
    models = torchvision_models()
    if source == "torchvision":
        extra = {"aux_logits": False, "init_weights": False} if plain in ("googlenet", "inception_v3") else {}
        module = getattr(models, plain)(weights=None, num_classes=CLASSES, **extra)
    else:
        import timm

        module = timm.create_model(plain, pretrained=False, num_classes=CLASSES)
    for each in module.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
        if type(each).__name__ in ("StochasticDepth", "DropPath"):
            each.p = each.drop_prob = 0.0
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif key.endswith("running_mean") or (tensor.is_floating_point() and not tensor.any()):
            tensor.normal_(0, 0.1)
        elif (tensor.is_floating_point() and "gamma" in key) or key.endswith("layer_scale"):
            tensor.fill_(0.5)
    return module, side


def relative(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / (scale if scale > 0 else 1))


def compare(name: str, dtype: str) -> dict[str, Any]:
    """Differences of logits and statistics, in both modes."""
    module, side = build(name)
    module = module.to(getattr(torch, dtype))
    classifier, variables = bj.Classifier.from_torch(module, (side, side, 3))
    images = np.random.default_rng(0).integers(0, 256, (COUNT, side, side, 3), np.uint8)

    @jax.jit
    def both(variables: Any, images: Any) -> tuple[Any, Any, Any]:
        return classifier.logits(variables, images)[0], *classifier.logits(variables, images, train=True)

    evaluated, trained, new = jax.block_until_ready(both(variables, images))
    x = torch.tensor(images.transpose(0, 3, 1, 2) / 255, dtype=getattr(torch, dtype))
    own = None
    if dtype == "float32":
        double = copy.deepcopy(module).double().train()
    with torch.no_grad():
        expected = module.eval()(x).numpy()
        found = module.train()(x).numpy()
        differences = {"eval": relative(evaluated, expected), "train": relative(trained, found)}
        if dtype == "float32":
            own = relative(found, double(x.double()).numpy())
    state = torch_state(classifier, new)
    if set(state) != set(module.state_dict()):
        raise bj.UserError(f"{name}: the names of the state dict differ")
    statistics = [
        relative(state[key], tensor)
        for key, tensor in module.state_dict().items()
        if "running" in key or key.endswith("num_batches_tracked")
    ]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return {
        "side": side,
        "parameters": parameters,
        **differences,
        "torch_train": own,
        "statistics": max(statistics, default=None),
        "head": "/".join(classifier.head_path) + ("" if classifier.network.tail is None else " (not linear)"),
    }


def repair(name: str) -> dict[str, Any]:
    """Scan, D3 and TAC, and the differences of logits in PyTorch afterwards; or what a step says that it needs."""
    module, side = build(name)
    classifier, variables = bj.Classifier.from_torch(module, (side, side, 3))
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4 * CLASSES, side, side, 3), np.uint8)
    data = bj.make_dataset(images, np.arange(len(images)) % CLASSES, CLASSES)
    x = torch.tensor(images[:COUNT].transpose(0, 3, 1, 2) / 255, dtype=torch.float32)
    row: dict[str, Any] = {"side": side}
    for label, defense in (("d3", bj.D3(steps=2, batch_size=8)), ("tac", bj.TAC())):
        try:
            repaired = defense.repair(jax.random.key(0), classifier, variables, data).variables
        except bj.UserError as error:
            row[f"{label}_needs"] = str(error)
            continue
        with tempfile.TemporaryDirectory() as folder:
            bj.save_torch(Path(folder) / "repaired.pt", classifier, repaired)
            module.load_state_dict(torch.load(Path(folder) / "repaired.pt", weights_only=True))
        with torch.no_grad():
            expected = module.eval()(x).numpy()
        row[label] = relative(jax.jit(lambda v, x: classifier.logits(v, x)[0])(repaired, images[:COUNT]), expected)
    return row


if __name__ == "__main__":
    main()
