"""Fine-tuning, D3 and scoring in plain PyTorch, for `versus_torch.py`.

Reads a file, then a line a run, and answers in JSON.

Needs PyTorch and NumPy alone, so that it may have an interpreter of its own. The file holds the network's tensors
under `finetune/` and `d3/`, images and labels, and the settings. A run is ``METHOD STYLE``:

- ``as_published``: NCHW, a `DataLoader` that decodes, crops and mirrors image by image, and both test sets judged every
  epoch, which is what the published benchmark does;
- ``judged_once``: the same, judged at the end;
- ``tuned``: channels last, everything on the device, a batch augmented at once, and on a GPU bfloat16 autocast and
  `torch.compile`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from torch_networks import torch_preact_resnet18


def main() -> None:
    work = dict(np.load(sys.argv[1]))
    device = torch.device(sys.argv[2])
    sides = Side(work, device)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(sides.run(*line.split())), flush=True)


class Decoded(torch.utils.data.Dataset):
    """Images one by one, cropped and mirrored in NumPy, as a loader of files would hand them out."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, augmented: bool, flip: bool) -> None:
        self.images, self.labels, self.augmented, self.flip = images, labels, augmented, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        if self.augmented:
            size = image.shape[0]
            row, column = np.random.randint(0, 9, 2)
            image = np.pad(image, ((4, 4), (4, 4), (0, 0)))[row : row + size, column : column + size]
            if self.flip and np.random.rand() < 0.5:
                image = image[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div(255), int(
            self.labels[index]
        )


class Side:
    """The work, and how PyTorch does it."""

    def __init__(self, work: dict[str, np.ndarray], device: Any) -> None:
        self.work, self.device = work, device
        self.steps, self.epochs, self.batch, self.flip = (int(work[k]) for k in ("steps", "epochs", "batch", "flip"))
        self.mean, self.std = (torch.tensor(work[k]).view(1, -1, 1, 1).to(device) for k in ("mean", "std"))
        self.compiled: dict[str, Any] = {}

    def start(self, method: str) -> dict[str, Any]:
        prefix = f"{method}/"
        return {k.removeprefix(prefix): torch.tensor(v) for k, v in self.work.items() if k.startswith(prefix)}

    def network(self, method: str) -> Any:
        classes, width = int(self.work["classes"]), int(self.work["width"])
        made = torch_preact_resnet18(torch, classes, width)
        made.load_state_dict(self.start(method))
        return made.to(self.device)

    def run(self, method: str, style: str) -> dict[str, float]:
        tuned = style == "tuned"
        network = self.network("finetune" if method == "scoring" else method)
        if tuned:
            network = network.to(memory_format=torch.channels_last)
        forward = network
        if tuned and self.device.type == "cuda":
            forward = torch.compile(network)
            if method == "scoring":
                self.score(forward)
            else:
                self.train(forward, network, method, tuned, steps=3, judge=False)
                network.load_state_dict(self.start(method))
                network.to(self.device)
        synchronize(self.device)
        started = time.perf_counter()
        if method == "scoring":
            mean = self.score(forward)
            return {"seconds": time.perf_counter() - started, "mean": mean}
        self.train(forward, network, method, tuned, self.steps, judge=style == "as_published")
        rates = self.judge(network, tuned)
        synchronize(self.device)
        return {"seconds": time.perf_counter() - started, **rates}

    def train(self, forward: Any, network: Any, method: str, tuned: bool, steps: int, judge: bool) -> None:
        d3 = method == "d3"
        weight = network.linear.weight
        origin = torch.tensor(self.work["origin"]).to(self.device)
        radius = origin.norm()
        decay = 0.0 if d3 else 5e-4
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=decay)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=tuned and self.device.type == "cuda")
        penalty, epsilon = float(self.work["penalty"]), float(self.work["epsilon"])
        network.train()
        step = 0
        while step < steps:
            for images, labels in self.batches(tuned):
                for group in optimizer.param_groups:
                    group["lr"] = 0.005 * (1 + np.cos(np.pi * (step * 100 // self.steps) / 100))
                with autocast:
                    logits = forward(self.normalized(images)).float()
                if d3:
                    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                    loss = penalty * torch.relu(losses - epsilon).mean() - (weight - origin).norm()
                    loss = loss / (penalty + 1 if penalty > 1 else 1)
                else:
                    loss = torch.nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if d3:
                    with torch.no_grad():
                        weight.mul_(radius / weight.norm())
                step += 1
                if step == steps:
                    break
            if judge and step < steps:
                self.judge(network, tuned)
                network.train()

    @torch.inference_mode()
    def score(self, forward: Any) -> float:
        """The mean symmetric cross-entropy of all images to be scored."""
        forward.eval()
        pixels, truth = torch.tensor(self.work["scored_images"]), torch.tensor(self.work["scored_labels"]).long()
        scores = []
        for images, labels in zip(pixels.split(500), truth.split(500), strict=True):
            x = images.to(self.device).permute(0, 3, 1, 2).float().div(255)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = forward(self.normalized(x)).float()
            losses = torch.nn.functional.cross_entropy(logits, labels.to(self.device), reduction="none")
            scores.append(losses + 4 * (1 - torch.exp(-losses)))
        return float(torch.cat(scores).mean())

    def batches(self, tuned: bool) -> Any:
        images, labels = self.work["images"], self.work["labels"]
        if not tuned:
            data = Decoded(images, labels, augmented=True, flip=bool(self.flip))
            return (
                (x.to(self.device), y.to(self.device))
                for x, y in torch.utils.data.DataLoader(data, self.batch, shuffle=True, drop_last=True, num_workers=2)
            )
        return self.on_device()

    def on_device(self) -> Any:
        if not hasattr(self, "pixels"):
            self.pixels = torch.tensor(self.work["images"].transpose(0, 3, 1, 2)).to(self.device)
            self.labels = torch.tensor(self.work["labels"]).long().to(self.device)
        size = self.pixels.shape[-1]
        for chosen in torch.randperm(len(self.labels), device=self.device).split(self.batch):
            if len(chosen) < self.batch:
                return
            x = torch.nn.functional.pad(self.pixels[chosen], (4, 4, 4, 4))
            rows, columns = (torch.randint(0, 9, (self.batch, 1), device=self.device) for _ in range(2))
            along = torch.arange(size, device=self.device)
            where = (columns + along)[:, None, :]
            if self.flip:
                mirrored = torch.rand(self.batch, 1, 1, device=self.device) < 0.5
                where = torch.where(mirrored, where.flip(-1), where)
            picks = torch.arange(self.batch, device=self.device)[:, None, None]
            x = x.permute(0, 2, 3, 1)[picks, (rows + along)[:, :, None], where].permute(0, 3, 1, 2)
            yield x.float().div(255), self.labels[chosen]

    def normalized(self, images: Any) -> Any:
        return (images - self.mean) / self.std

    @torch.inference_mode()
    def judge(self, network: Any, tuned: bool) -> dict[str, float]:
        network.eval()
        rates = {}
        for rate, images, labels in (
            ("acc", "test_images", "test_labels"),
            ("asr", "triggered_images", "triggered_labels"),
        ):
            pixels, truth = self.work[images], self.work[labels]
            if tuned:
                parts = torch.tensor(pixels.transpose(0, 3, 1, 2)).to(self.device).split(500)
                answers = [network(self.normalized(part.float().div(255))).argmax(1).cpu() for part in parts]
            else:
                data = Decoded(pixels, truth, augmented=False, flip=False)
                loader = torch.utils.data.DataLoader(data, self.batch, num_workers=2)
                answers = [network(self.normalized(x.to(self.device))).argmax(1).cpu() for x, _ in loader]
            rates[rate] = float((torch.cat(answers).numpy() == truth).mean())
        return rates


def synchronize(device: Any) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
