"""PyTorch networks, written from published descriptions, to compare the package's networks with."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest


def torchvision_models() -> Any:
    """The module `torchvision.models`; the test is skipped where it is not installed.

    A torchvision that was built for another PyTorch lacks its compiled operators, and is imported once these are
    declared; no classifier uses them.
    """
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        pytest.skip("torchvision's networks: pip install torchvision")
    text = (Path(found.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r'(?:register_meta\("|torchvision::)(\w+)', text))):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            LIBRARIES[-1].define(f"{name}(Tensor x) -> Tensor")
    return importlib.import_module("torchvision.models")


LIBRARIES: list[Any] = []
"""Declarations live as long as these."""


def torch_preact_resnet18(torch: Any, classes: int, width: int, channels: int = 3) -> Any:
    """The published benchmark's network with its names; rectifiers are function calls, as there."""

    class Block(torch.nn.Module):
        def __init__(self, fan_in: int, features: int, stride: int) -> None:
            super().__init__()
            self.bn1 = torch.nn.BatchNorm2d(fan_in)
            self.conv1 = torch.nn.Conv2d(fan_in, features, 3, stride, 1, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(features)
            self.conv2 = torch.nn.Conv2d(features, features, 3, 1, 1, bias=False)
            if stride > 1 or fan_in != features:
                self.shortcut = torch.nn.Sequential(torch.nn.Conv2d(fan_in, features, 1, stride, bias=False))

        def forward(self, x: Any) -> Any:
            inner = torch.nn.functional.relu(self.bn1(x))
            side = self.shortcut(inner) if hasattr(self, "shortcut") else x
            return self.conv2(torch.nn.functional.relu(self.bn2(self.conv1(inner)))) + side

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            fan_in = width
            for stage in range(4):
                layer = torch.nn.Sequential()
                for block in range(2):
                    layer.append(Block(fan_in, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                    fan_in = width * 2**stage
                self.add_module(f"layer{stage + 1}", layer)
            self.linear = torch.nn.Linear(fan_in, classes)

        def latent(self, x: Any) -> Any:
            x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
            return x.mean((2, 3))

        def forward(self, x: Any) -> Any:
            return self.linear(self.latent(x))

    return Network()


def torch_resnet(
    torch: Any, classes: int, width: int, blocks: tuple[int, ...], bottleneck: bool, small: bool, channels: int = 3
) -> Any:
    """The paper's network with torchvision's names, written from its description."""

    class Block(torch.nn.Module):
        def __init__(self, fan_in: int, features: int, stride: int) -> None:
            super().__init__()
            out = 4 * features if bottleneck else features
            plan = [(fan_in, features, 3, stride), (features, features, 3, 1)]
            if bottleneck:
                plan = [(fan_in, features, 1, 1), (features, features, 3, stride), (features, out, 1, 1)]
            self.count = len(plan)
            for at, (before, after, size, step) in enumerate(plan, 1):
                self.add_module(f"conv{at}", torch.nn.Conv2d(before, after, size, step, size // 2, bias=False))
                self.add_module(f"bn{at}", torch.nn.BatchNorm2d(after))
            self.downsample = None
            if stride != 1 or fan_in != out:
                self.downsample = torch.nn.Sequential(
                    torch.nn.Conv2d(fan_in, out, 1, stride, bias=False), torch.nn.BatchNorm2d(out)
                )

        def forward(self, x: Any) -> Any:
            inner = x
            for at in range(1, self.count + 1):
                inner = getattr(self, f"bn{at}")(getattr(self, f"conv{at}")(inner))
                inner = torch.relu(inner) if at < self.count else inner
            return torch.relu(inner + (x if self.downsample is None else self.downsample(x)))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(channels, width, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
            self.bn1 = torch.nn.BatchNorm2d(width)
            fan_in = width
            for stage, count in enumerate(blocks):
                layer = torch.nn.Sequential()
                for block in range(count):
                    layer.append(Block(fan_in, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                    fan_in = width * 2**stage * (4 if bottleneck else 1)
                self.add_module(f"layer{stage + 1}", layer)
            self.fc = torch.nn.Linear(fan_in, classes)

        def latent(self, x: Any) -> Any:
            x = torch.relu(self.bn1(self.conv1(x)))
            if not small:
                x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
            for stage in range(len(blocks)):
                x = getattr(self, f"layer{stage + 1}")(x)
            return x.mean((2, 3))

        def forward(self, x: Any) -> Any:
            return self.fc(self.latent(x))

    return Network()


def torch_vgg19(torch: Any, classes: int, width: int) -> Any:
    """The paper's configuration E with normalization and torchvision's names, without its dropout."""
    layers: list[Any] = []
    fan_in = 3
    for channels in [1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 8, 8, 8, 8, 0, 8, 8, 8, 8, 0]:
        if channels == 0:
            layers.append(torch.nn.MaxPool2d(2, 2))
            continue
        out = channels * width
        layers += [torch.nn.Conv2d(fan_in, out, 3, padding=1), torch.nn.BatchNorm2d(out), torch.nn.ReLU()]
        fan_in = out
    hidden = 64 * width
    network = torch.nn.Sequential()
    network.add_module("features", torch.nn.Sequential(*layers))
    network.add_module("avgpool", torch.nn.AdaptiveAvgPool2d((7, 7)))
    network.add_module("flatten", torch.nn.Flatten())
    network.add_module(
        "classifier",
        torch.nn.Sequential(
            torch.nn.Linear(fan_in * 49, hidden), torch.nn.ReLU(), torch.nn.Dropout(0),
            torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Dropout(0),
            torch.nn.Linear(hidden, classes),
        ),
    )  # fmt: skip
    return network
