"""Models and images as people have them, each case with its right behavior; docs/field_cases.md lists them."""

import contextlib
import dataclasses
import io
import itertools
import pickle
import re
import sys
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from torch_networks import torch_resnet, torchvision_models

from backdoor_jax import (
    Classifier,
    UserError,
    build_classifier,
    evaluate,
    load_model,
    load_torch,
    make_dataset,
    predict,
    save_model,
    save_torch,
    scan,
)
from backdoor_jax.app import (
    Images,
    ModelFile,
    Suspect,
    load_suspect,
    repair_model,
    require_better_than_chance,
    scan_model,
)
from backdoor_jax.attacks import picture_patch
from backdoor_jax.cli import main
from backdoor_jax.cli.options import make_parser
from backdoor_jax.cli.suspects import images_of
from backdoor_jax.data import LabelMap, folders, image_size, load, load_labeled
from backdoor_jax.data.layouts import as_images, as_labels
from backdoor_jax.defenses import CLP, FineTune, Repair
from backdoor_jax.detectors import PerSample
from backdoor_jax.experiment.rows import format_row
from backdoor_jax.interop.torch_files import read as read_weights
from backdoor_jax.interop.torch_files import unwrap
from backdoor_jax.interop.torch_models import classes_and_channels, load_module
from backdoor_jax.report.table import markdown

torch = pytest.importorskip("torch", reason="PyTorch's files: pip install 'backdoor_jax[torch]'")

COLORS = np.array(list(itertools.product((0, 1), repeat=3)))[1:7]
NETS = """
import torch

from pooled import PooledResNet


def make_net(num_classes=6):
    return PooledResNet(num_classes)


def broken():
    raise RuntimeError("no weights")


not_a_function = 3
"""
POOLED = """
import sys

import torch

sys.path.append({tests!r})
from torch_networks import torch_resnet


class PooledResNet(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.net = torch_resnet(torch, classes, 4, (1, 1, 1, 1), False, True)
        self.pool = torch.nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        net = self.net
        x = self.pool(torch.relu(net.bn1(net.conv1(x))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
        return net.fc(x.mean((2, 3)))
"""


def draw(count: int, seed: int, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is the color of a small square; the rest is noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 6
    images = rng.integers(0, 120, (count, side, side, 3))
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(0, side - 5, 2)
        image[top : top + 5, left : left + 5] = 255 * COLORS[label]
    return images.astype(np.uint8), labels


class Place(NamedTuple):
    folder: Path
    module: Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A ResNet with torchvision's names whose 3x3 stem is followed by pooling, its weights, its code, and images."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("field")
    (folder / "pooled.py").write_text(POOLED.format(tests=str(Path(__file__).parent)))
    (folder / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    module = load_module(f"{folder / 'nets.py'}:make_net", fresh_state(folder), "new")
    images, labels = draw(240, 0)
    # Contiguous: on processors without AVX-512, PyTorch 2.13 corrupts its heap in the gradient of a convolution of four
    # channels whose input has the memory layout channels_last.
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    x, y = torch.tensor(planes / 255, dtype=torch.float32), torch.tensor(labels)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    module.train()
    for step in range(80):
        at = torch.arange(60) + 60 * (step % 4)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x[at]), y[at]).backward()
        optimizer.step()
    module.eval()
    state = module.state_dict()
    torch.save(state, folder / "model.pth.tar")
    np.savez(folder / "clean.npz", images=images[:120], labels=labels[:120])
    return Place(folder, module)


def pooled(place: Place) -> ModelFile:
    """The trained model, with the user's code."""
    return ModelFile(place.folder / "model.pth.tar", f"{place.folder / 'nets.py'}:make_net")


def fresh_state(folder: Path) -> dict[str, Any]:
    """The state dict of a new network of the user's file."""
    import importlib.util
    import sys

    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("nets", folder / "nets.py")
    assert spec is not None and spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    sys.path.pop(0)
    return nets.make_net().state_dict()


def state_of_vgg() -> dict[str, Any]:
    """The names and shapes of a narrow VGG19."""
    from backdoor_jax.interop.pytorch import torch_state, zeros

    made = build_classifier("vgg19_bn", 4, 2)
    return torch_state(made, zeros(made))


def call(*arguments: str | Path) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), error.getvalue()


def one_line(call: Any, *arguments: Any, **options: Any) -> str:
    """The one line of the error that a call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What shapes do not determine


def test_the_users_own_module_is_run_with_its_own_stem(place: Place) -> None:
    data = str(place.folder / "clean.npz")
    suspect = load_suspect(pooled(place), data)
    assert suspect.accuracy > 0.95
    images = np.load(data)["images"]
    with torch.no_grad():
        expected = place.module(torch.tensor(images.transpose(0, 3, 1, 2) / 255, dtype=torch.float32))
    got = suspect.classifier.logits(suspect.variables, jnp.asarray(images))[0]
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_every_stem_with_the_same_shapes_can_be_chosen() -> None:
    state = torch_resnet(torch, 4, 2, (2, 2, 2, 2), False, True).state_dict()
    assert load_torch(state, "resnet18")[0].network.stem == "small"
    for stem in ("small", "small_pool", "small_stride"):
        assert load_torch(state, "resnet18", stem=stem)[0].network.stem == stem
    assert "give one of small, small_pool, small_stride" in one_line(load_torch, state, "resnet18", stem="imagenet")


def test_images_in_another_order_of_channels_or_range_name_the_option(place: Place, tmp_path: Path) -> None:
    arrays = np.load(place.folder / "clean.npz")
    np.savez(tmp_path / "bgr.npz", images=arrays["images"][..., ::-1], labels=arrays["labels"])
    try:
        notes = " ".join(load_suspect(pooled(place), str(tmp_path / "bgr.npz")).notes)
    except UserError as error:
        notes = str(error)
    assert "with --channel-order bgr it classifies" in notes
    turned = load_suspect(pooled(place), str(tmp_path / "bgr.npz"), images=Images(channel_order="bgr"))
    assert turned.accuracy > 0.95
    assert "assumed: pixels from 0 to 1" in turned.notes[0] and "BGR" in turned.notes[0]


def test_too_few_images_say_how_many_are_needed(place: Place, tmp_path: Path) -> None:
    arrays = np.load(place.folder / "clean.npz")
    np.savez(tmp_path / "few.npz", images=arrays["images"][:2], labels=arrays["labels"][:2])
    text = one_line(load_suspect, pooled(place), str(tmp_path / "few.npz"))
    # Guesses of one of two classes: 0.5 ** 5 is the first below 5 %.
    assert "2 of 2 images classified correctly; so few say nothing" in text and "give at least 5" in text


def test_a_scan_that_needs_a_linear_head_names_a_detector(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5), torch.nn.ReLU())
    classifier, variables = Classifier.from_torch(net, (4, 4, 3))
    data = make_dataset(np.zeros((5, 4, 4, 3), np.uint8), np.arange(5))
    suspect = Suspect("model", classifier, variables, data, data, 1.0)
    text = one_line(scan_model, suspect, tmp_path / "a.png", PerSample())
    assert "choose a detector that needs none, such as neural_cleanse" in text and "defense" not in text
    assert "such as super_finetune, or a detector" in one_line(classifier.head_weights, variables)


def test_from_torch_says_what_an_example_must_be() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    assert Classifier.from_torch(net, (np.int64(8), np.int32(8), 3))[0].num_classes == 5
    images = torch.zeros(20, 3, 8, 8)
    text = one_line(Classifier.from_torch, net, (images, torch.zeros(20)))
    assert "the example is a tuple of Tensor, Tensor" in text and "give the images alone" in text
    for example in (np.zeros((20, 4, 16, 16)), (4, 16, 16)):
        text = one_line(Classifier.from_torch, net, example)
        assert "seems to have channels first; give channels last, as (16, 16, 4)" in text
    assert Classifier.from_torch(net, np.array((8, 8, 3)))[0].num_classes == 5
    assert len(one_line(Classifier, None, images)) < 200
    text = one_line(Classifier.from_torch, net, (8, 8, 3), mean=torch.zeros(2), std=torch.ones(2))
    assert "mean and std have 2 channels, the images 3" in text


def test_variables_of_pytorch_say_how_to_get_those_of_jax() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    classifier, variables = Classifier.from_torch(net, (8, 8, 3))
    images = np.zeros((5, 8, 8, 3), np.uint8)
    assert "give the weights as {'params': weights}" in one_line(scan, classifier, variables["params"], images)
    first = images.transpose(0, 3, 1, 2)
    assert "give images.transpose(0, 2, 3, 1)" in one_line(scan, classifier, variables, first)
    for given, words in ((net.state_dict(), "PyTorch's tensors"), (net, "a PyTorch module")):
        text = one_line(scan, classifier, given, images)
        assert f"variables is {words}" in text and "Classifier.from_torch(module, images)" in text


def test_below_a_healthy_accuracy_there_is_no_verdict_and_no_repair(place: Place, tmp_path: Path) -> None:
    arrays = np.load(place.folder / "clean.npz")
    labels = np.where(np.arange(len(arrays["labels"])) % 10, arrays["labels"], (arrays["labels"] + 1) % 6)
    np.savez(tmp_path / "hard.npz", images=arrays["images"], labels=labels)
    given = ("--checkpoint", place.folder / "model.pth.tar", "--data", tmp_path / "hard.npz", "--healthy", "0.95")
    named = ("--model", f"{place.folder / 'nets.py'}:make_net")
    code, output, _ = call("scan", *given, *named, "--out", tmp_path / "a.png")
    assert code == 0
    assert "cannot tell: 90.0 % of the images classified correctly is less than a healthy model" in output
    assert "backdoored, class" not in output
    code, _, error = call("defend", *given, *named, "--defense", "clp", "--out", tmp_path / "a.pt")
    assert code == 2
    assert "less than a healthy model reaches" in error and "--force" in error
    assert not (tmp_path / "a.pt").exists()


def test_options_that_nothing_reads_are_refused(place: Place, tmp_path: Path) -> None:
    data, model = str(place.folder / "clean.npz"), f"{place.folder / 'nets.py'}:make_net"
    stemmed = ModelFile(place.folder / "model.pth.tar", model, stem="small")
    assert "has its own stem; leave out --stem" in one_line(load_suspect, stemmed, data)
    state = torch_resnet(torch, 4, 2, (2, 2, 2, 2), False, True).state_dict()
    save_model(tmp_path / "own.safetensors", *load_torch(state, "resnet18"))
    assert "has its own stem" in one_line(load_model, tmp_path / "own.safetensors", stem="small")
    assert "a stem is chosen for a ResNet" in one_line(load_torch, state_of_vgg(), "vgg19_bn", stem="small")
    for given in ({"model": "resnet18"}, {"key": "x"}, {"stem": "small"}, {"normalization": "gtsrb"}):
        (option,) = given
        text = one_line(ModelFile(Path("zoo:badnets"), **given).open, lambda: (16, 16))  # type: ignore[arg-type]
        assert f"zoo:badnets: has its own {option}" in text
    turned = Images(channel_order="bgr")
    assert "leave out --channel-order" in one_line(turned.load, data, 6, 1)
    scan = ("scan", "--checkpoint", place.folder / "model.pth.tar", "--model", model, "--out", tmp_path / "a.png")
    unseen = (*scan, "--size", "16x16", "--detector", "mm_bd")
    for option, value in (("--target", "1"), ("--strength", "1"), ("--healthy", "0.5"), ("--resize", "16")):
        code, _, error = call(*unseen, option, value)
        assert code == 2 and f"{option} is not used without images" in error
    for options, words in (
        (("--class-names", "a,b,c,d,e,f"), "no images lie in a folder"),
        (("--by", "spectral_signatures"), "--by says how --list-images sorts"),
        (("--by", "x", "--list-images", "1", "--training-set", data), "unknown --by 'x'"),
    ):
        code, _, error = call(*scan, "--data", data, *options)
        assert code == 2 and words in error


def test_a_set_by_name_may_be_given_with_its_own_size() -> None:
    assert len(load_labeled("digits", 10, size=(16, 16)).data) == 1400
    assert "digits has its own size, 16x16" in one_line(load_labeled, "digits", 10, size=(8, 8))


def write_colors(folder: Path, names: Sequence[str], count: int = 36, seed: int = 7) -> None:
    """Images in the folders of their classes, numbered in the order of `draw`."""
    for number, (image, label) in enumerate(zip(*draw(count, seed), strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{number:03}.png")


def test_classes_of_several_sources_are_matched_by_their_names(place: Place, tmp_path: Path) -> None:
    names = ("red", "green", "blue", "yellow", "pink", "cyan")
    images, labels = draw(60, 5)
    np.savez(tmp_path / "clean.npz", images=images, labels=labels, class_names=names)
    write_colors(tmp_path / "images", names)
    order = np.argsort(names)
    other = {"images": images[:30], "labels": np.argsort(order)[labels[:30]], "class_names": np.array(names)[order]}
    np.savez(tmp_path / "sorted.npz", **other)
    for source in ("images", "sorted.npz"):
        found = Images().load(str(tmp_path / source), 6, 3, names)
        assert found.class_names == names and "numbered as those of --data" in found.notes[-1]
        suspect = load_suspect(pooled(place), str(tmp_path / "clean.npz"), test=str(tmp_path / source))
        assert suspect.accuracy > 0.9
    given = ("--checkpoint", place.folder / "model.pth.tar", "--model", f"{place.folder / 'nets.py'}:make_net")
    listed = ("--training-set", tmp_path / "images", "--list-images", "6", "--out", tmp_path / "a.png", "--force")
    for options in ((), ("--class-names", ",".join(names))):
        code, output, error = call("scan", *given, "--data", tmp_path / "clean.npz", *listed, *options)
        assert code == 0, error
        found_class, shown = re.findall(r"most suspicious images of class (\d) by .*: (.*)", output)[0]
        assert {name.split("/")[0] for name in shown.split()} == {names[int(found_class)]}
        assert ("numbered as those of --data" in output) == (not options)
    # A file without names cannot be matched, but the model knows its training set.
    code, _, error = call("scan", *given, "--data", place.folder / "clean.npz", *listed)
    assert code == 2 and "images: the model classifies" in error and f"--class-names {','.join(names)}" in error
    write_colors(tmp_path / "others", ("a", "green", "blue", "yellow", "pink", "cyan"))
    text = one_line(load_suspect, pooled(place), str(tmp_path / "clean.npz"), test=str(tmp_path / "others"))
    assert "has the class 'a', which --data has not, and lacks 'red'" in text and "--class-names" in text


# Files


def test_a_module_goes_through_the_command_and_back(place: Place, tmp_path: Path) -> None:
    triggered, labels = draw(60, 3)
    np.savez(tmp_path / "triggered.npz", images=triggered, labels=labels)
    given = ("--checkpoint", place.folder / "model.pth.tar", "--data", place.folder / "clean.npz")
    named = ("--model", f"{place.folder / 'nets.py'}:make_net")
    trigger = ("--triggered", tmp_path / "triggered.npz", "--target", "2")
    code, output, error = call(
        "defend", *given, *named, *trigger, "--defense", "clp", "--out", tmp_path / "new.pt", "u=9"
    )
    assert (code, error) == (0, "")
    assert "of the triggered images classified as 2" in output and "% before" in output
    assert f"load it by module.load_state_dict(torch.load('{tmp_path / 'new.pt'}'))" in output
    place.module.load_state_dict(torch.load(tmp_path / "new.pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_repaired_module_is_read_again(place: Place, suffix: str, tmp_path: Path) -> None:
    named = ("--model", f"{place.folder / 'nets.py'}:make_net", "--data", place.folder / "clean.npz")
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    for read, written in ((place.folder / "model.pth.tar", first), (first, second)):
        code, _, error = call("defend", "--checkpoint", read, *named, "--defense", "clp", "--out", written, "u=9")
        assert (code, error) == (0, "")
    code, output, error = call("scan", "--checkpoint", second, *named, "--out", tmp_path / "a.png", "--force")
    assert (code, error) == (0, "") and "second" in output
    expected = {name: tuple(tensor.shape) for name, tensor in place.module.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in read_weights(second).items()} == expected


def test_a_patch_or_a_blended_picture_is_put_on_the_images(place: Place, tmp_path: Path) -> None:
    Image.fromarray(np.full((5, 5, 3), (255, 0, 0), np.uint8)).save(tmp_path / "red.png")
    model = ("scan", "--checkpoint", place.folder / "model.pth.tar", "--data", place.folder / "clean.npz")
    named = (*model, "--model", f"{place.folder / 'nets.py'}:make_net", "--out", tmp_path / "a.png", "--force")
    red = tmp_path / "red.png"
    right: tuple[tuple[str | Path, ...], ...] = (
        ("--patch", red),
        ("--patch", red, "--position", "0,3"),
        ("--blend", red, "--strength", "1"),
    )
    for options in right:
        code, output, error = call(*named, *options, "--target", "3")
        assert code == 0 and "of the triggered images classified as 3" in output, error
    wrong: tuple[tuple[tuple[str | Path, ...], str], ...] = (
        (("--patch", red, "--target", "3", "--position", "12,0"), "reach beyond the images of 16x16"),
        (("--patch", red, "--target", "3", "--position", "corner"), "is no position"),
        (("--patch", red), "go together"),
        (("--patch", red, "--blend", red, "--target", "3"), "--patch and --blend are several triggers"),
        (("--strength", "1", "--target", "3"), "--strength belongs to --blend"),
        (("--patch", place.folder / "nets.py", "--target", "3"), "cannot be read as a picture"),
    )
    for given, words in wrong:
        code, _, error = call(*named, *given)
        assert code == 2 and words in error, error


def test_a_patch_lies_where_it_is_told(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 3, 3), 200, np.uint8)).save(tmp_path / "patch.png")
    images = np.zeros((1, 6, 6, 3), np.uint8)
    for position, (top, left) in ((None, (4, 3)), ((1, 0), (1, 0))):
        expected = images.copy()
        expected[:, top : top + 2, left : left + 3] = 200
        trigger = picture_patch(str(tmp_path / "patch.png"), (6, 6, 3), position)
        np.testing.assert_array_equal(trigger(jnp.asarray(images)), expected)
    clear = Image.new("RGBA", (3, 2), (9, 9, 9, 255))
    clear.putpixel((1, 0), (9, 9, 9, 0))
    clear.save(tmp_path / "clear.png")
    assert picture_patch(str(tmp_path / "clear.png"), (2, 3, 3), None).mask[..., 0].tolist() == [[1, 0, 1], [1, 1, 1]]


def test_several_models_in_a_file_are_named_and_one_is_chosen() -> None:
    one, other = {"fc.weight": np.zeros((2, 3))}, {"fc.weight": np.ones((2, 3))}
    for names in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        tree = {"epoch": 3, **dict(zip(names, (one, other), strict=True))}
        assert f"holds several models, {names[0]}, {names[1]}; choose one by key" in one_line(unwrap, tree, "file")
        assert unwrap(tree, "file", names[1])[0]["weight"].all()
        assert "holds no state dict 'x'" in one_line(unwrap, tree, "file", "x")


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "backbone.", "model._orig_mod.", "a.b.c."])
@pytest.mark.parametrize("holder", ["", "net", "model_state_dict", "weights"])
def test_any_shared_prefix_and_holder_is_taken_off(prefix: str, holder: str) -> None:
    state = {f"{prefix}conv1.weight": np.zeros(2), f"{prefix}fc.bias": np.zeros(2)}
    tree = {holder: state, "epoch": 3, "optimizer": {"state": {}, "param_groups": [1]}} if holder else state
    assert set(unwrap(tree, "file")[0]) == {"conv1.weight", "fc.bias"}


@pytest.mark.parametrize("name", ["m.th", "m.t7", "m.tar", "m.ckpt", "m.bin", "m.pth.tar", "m"])
def test_files_are_judged_by_their_content(name: str, tmp_path: Path) -> None:
    state = torch_resnet(torch, 4, 2, (2, 2, 2, 2), False, True).state_dict()
    torch.save({"state_dict": state}, tmp_path / name)
    assert load_model(tmp_path / name, "resnet18")[0].num_classes == 4


def test_safetensors_are_read_under_any_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch_resnet(torch, 4, 2, (2, 2, 2, 2), False, True).state_dict()
    save_file(state, tmp_path / "model.bin")
    assert load_model(tmp_path / "model.bin", "resnet18")[0].num_classes == 4


def test_files_that_are_no_weights_say_what_to_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    assert "TorchScript" in (text := one_line(load_model, path, "resnet18")) and "torch.jit.load" in text
    torch.save(torch.nn.Linear(2, 2), path)
    assert "holds more than weights" in one_line(load_model, path, "resnet18")
    starts = (
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"<html>", "HTML"),
        (b"\x1f\x8b\x08", "gzip"),
        (b'{"weight_map":', "JSON"),
    )
    for start, words in starts:
        path.write_bytes(start + bytes(80))
        assert words in one_line(load_model, path, "resnet18")
    path.write_bytes(b"")
    assert "it is empty" in one_line(load_model, path, "resnet18")
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"fc.weight": np.ones(3)}, protocol))
        assert "is a plain pickle, which holds a dict" in one_line(load_model, path, "resnet18")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/model.pt", b"x")
    assert "is a zip archive of model.pt" in one_line(load_model, path, "resnet18")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    assert "torch.export.load(FILE).state_dict" in one_line(load_model, tmp_path / "program.pt2", "resnet18")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sparse", lambda weight: weight.to_sparse()),
        ("without values", lambda weight: weight.to("meta")),
        ("complex", lambda weight: weight.to(torch.complex64)),
        ("float8_e4m3fn", lambda weight: weight.to(torch.float8_e4m3fn)),
        ("uint16", lambda weight: torch.zeros(2, 2, dtype=torch.uint16)),
    ],
)
def test_tensors_that_are_not_plain_are_named(kind: str, make: Any, tmp_path: Path) -> None:
    torch.save({"fc.weight": make(torch.ones(2, 2))}, tmp_path / "model.pt")
    assert f"holds tensors that are {kind}" in one_line(load_model, tmp_path / "model.pt", "resnet18")


def test_files_without_tensors_say_what_they_hold(tmp_path: Path) -> None:
    for tree, words in (
        ({"state_dict": {}}, "holds no tensors by name, but state_dict (dict)"),
        ({"state": {}, "param_groups": [1]}, "but state (dict), param_groups (list)"),
        ({"fc.weight": np.ones(3)}, "but fc.weight (NumPy array)"),
        ({}, "holds no tensors by name; save"),
        (torch.ones(3), "got tensor"),
    ):
        torch.save(tree, tmp_path / "model.pt")
        assert words in one_line(load_model, tmp_path / "model.pt", "resnet18")


def test_a_model_beside_other_tensors_is_found_and_chosen_by_its_level(place: Place) -> None:
    state, model = place.module.state_dict(), f"{place.folder / 'nets.py'}:make_net"
    average = {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in state.items()}}
    loss = {"state_dict": {"criterion.weight": torch.ones(6), **average}}
    both = {f"w.{side}.{name}": value for side in ("k", "q") for name, value in state.items()}
    for tree, hint, keys in (
        (average, "under module.net, beside others; choose it by key (--key module.net)", ["module.net", "module"]),
        (loss, "(--key module.net)", ["module"]),
        ({**both, "w.queue": torch.zeros(2, 2)}, "under k.net and q.net, beside others", ["q", "w.q.net"]),
    ):
        assert hint in one_line(load_module, model, unwrap(tree, "file")[0], "file")
        for key in keys:
            load_module(model, unwrap(tree, "file", key)[0], "file")
        assert "holds no state dict 'modul'" in one_line(unwrap, tree, "file", "modul")
    named = torch_resnet(torch, 4, 2, (2, 2, 2, 2), False, True).state_dict()
    tree = {"criterion.weight": torch.ones(6), **{f"model.{name}": value for name, value in named.items()}}
    assert "(--key model)" in one_line(load_torch, tree, "resnet18")
    assert load_torch(tree, "resnet18", key="model")[0].num_classes == 4


def test_msgpack_of_flax_is_read_for_a_classifier(tmp_path: Path) -> None:
    import flax.linen as nn
    import jax
    from flax.serialization import to_bytes

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3, name="out")(x.mean((1, 2)))

    classifier = Classifier.from_linen(Net(), 3, ("out",))
    variables = classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    (tmp_path / "model.msgpack").write_bytes(to_bytes(variables))
    _, found = load_model(tmp_path / "model.msgpack", classifier=classifier)
    np.testing.assert_array_equal(found["params"]["out"]["kernel"], variables["params"]["out"]["kernel"])
    assert "classifier=" in one_line(load_model, tmp_path / "model.msgpack")


def test_names_of_other_networks_say_to_give_the_module() -> None:
    state = {
        "conv1.weight": np.zeros((2, 3, 3, 3)),
        "layer1.0.shortcut.0.weight": np.zeros(2),
        "linear.bias": np.zeros(2),
    }
    text = one_line(load_torch, state, "resnet18")
    assert "FILE.py:FUNCTION" in text and "Classifier.from_torch" in text
    assert "Classifier.from_torch(module, images)" in one_line(load_torch, torch.nn.Linear(2, 2), "resnet18")


def test_models_that_cannot_be_made_are_one_line(place: Place, tmp_path: Path) -> None:
    nets = place.folder / "nets.py"
    state = place.module.state_dict()
    assert "no such file" in one_line(load_module, "nowhere.py:make", state, "x")
    assert "has no function 'not_a_function'" in one_line(load_module, f"{nets}:not_a_function", state, "x")
    assert "RuntimeError: no weights" in one_line(load_module, f"{nets}:broken", state, "x")
    assert "lacks" in one_line(load_module, f"{nets}:make_net", {"a.weight": np.zeros(2)}, "x")
    for part in ("net.fc.weight_orig", "net.fc.weight_g", "net.fc.parametrizations.weight.original0"):
        pruned = {name.replace("net.fc.weight", part): value for name, value in state.items()}
        assert f"holds {part}, of which net.fc.weight is computed" in one_line(
            load_module, f"{nets}:make_net", pruned, "x"
        )
    texts = {**state, "net.fc.bias": "x"}
    assert "net.fc.bias is a str, expected a tensor" in one_line(load_module, f"{nets}:make_net", texts, "x")
    wrong = {**state, "net.fc.weight": torch.zeros(6, 3)}
    assert "net.fc.weight has shape (6, 3)" in one_line(load_module, f"{nets}:make_net", wrong, "x", 6)


def test_the_users_file_may_print_and_be_called_as_a_library_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import random

    (tmp_path / "random.py").write_text(
        "import torch\n\nprint('read')\n\n\ndef make():\n    print('made')\n    return torch.nn.Linear(2, 3)\n"
    )
    state = torch.nn.Linear(2, 3).state_dict()
    assert load_module(f"{tmp_path / 'random.py'}:make", state, "x").out_features == 3
    assert sys.modules["random"] is random
    output, error = capsys.readouterr()
    assert (output, error) == ("", "read\nmade\n")


def test_the_users_file_may_hold_the_network_itself(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import torch\n\nnet = torch.nn.Linear(2, 3)\n")
    state = torch.nn.Linear(2, 3).state_dict()
    module = load_module(f"{tmp_path / 'nets.py'}:net", state, "x")
    np.testing.assert_array_equal(module.weight.detach(), state["weight"])


OTHERS = """
import torch
from torch import nn


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.unused = nn.Linear(8, 9)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.stem = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embed(x).flatten(2).mT).mean(1))


def gray():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 6))


head_first, tokens = HeadFirst, Tokens
"""


@pytest.mark.parametrize(("name", "channels"), [("head_first", 3), ("tokens", 3), ("gray", 1)])
def test_classes_and_channels_are_those_of_what_runs(name: str, channels: int, tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text(OTHERS)
    model = f"{tmp_path / 'others.py'}:{name}"
    others: dict[str, Any] = {}
    exec(OTHERS, others)
    torch.save(others[name]().state_dict(), tmp_path / "model.pt")
    images = draw(1, 0)[0][..., :channels]
    np.savez(tmp_path / "images.npz", images=images, labels=[0])
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.fromarray(images[0].squeeze()).save(tmp_path / "images" / "a" / "1.png")
    for data in ("images.npz", "images"):
        opened = ModelFile(tmp_path / "model.pt", model, classes=6).open(partial(image_size, str(tmp_path / data)))
        assert (opened.num_classes, opened.channels) == (6, channels)
    if name == "gray":
        text = one_line(ModelFile(tmp_path / "model.pt", model).open, lambda: (8, 8))
        assert "cannot run on images of 8x8 with 3 or 1 channels" in text


WRAPPED = """
import torch
from torch import nn


class Kept(nn.Linear):
    def get_extra_state(self):
        return {"seen": [1, 1]}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def plain(wrap=lambda module: module):
    return nn.Sequential(wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), nn.Flatten(), Kept(144, 3))


def parallel():
    return nn.DataParallel(plain(nn.DataParallel))


def compiled():
    return plain(torch.compile)
"""


def test_layers_may_be_wrapped_and_keep_more_than_tensors(tmp_path: Path) -> None:
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    made: dict[str, Any] = {}
    exec(WRAPPED, made)
    for of, into in itertools.product(("plain", "parallel", "compiled"), repeat=2):
        source = made[of]()
        state = source.state_dict()
        name = next(name for name in state if name.endswith("_extra_state"))
        state[name] = {"seen": [0, (2, None)]}
        torch.save({"model": state, "epoch": 3}, tmp_path / "model.pt")
        found, _ = unwrap(read_weights(tmp_path / "model.pt"), "file")
        module = load_module(f"{tmp_path / 'wrapped.py'}:{into}", found, "file")
        assert all(map(torch.equal, module.parameters(), source.parameters()))
        assert [layer.seen for layer in module.modules() if hasattr(layer, "seen")] == [[0, (2, None)]]
    name = next(name for name in found if name.endswith("_extra_state"))
    text = one_line(load_module, f"{tmp_path / 'wrapped.py'}:plain", {**found, name: object()}, "file")
    assert "2._extra_state, the extra state of a layer, holds a object, expected plain data" in text
    del found[name]
    load_module(f"{tmp_path / 'wrapped.py'}:plain", found, "file")  # The layer keeps its own; nothing is missing.


VERSIONED = """
import torch


class Versioned(torch.nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        assert metadata.get("version") == 2, "no version"
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def make():
    return torch.nn.Sequential(torch.nn.Flatten(), Versioned(12, 3))
"""


def test_layers_that_ask_for_the_version_of_their_state_dict_get_it(tmp_path: Path) -> None:
    (tmp_path / "versioned.py").write_text(VERSIONED)
    state = {"1.weight": np.ones((3, 12), np.float32), "1.bias": np.arange(3.0)}  # An own file, without versions.
    module = load_module(f"{tmp_path / 'versioned.py'}:make", state, "x")
    classifier, variables = Classifier.from_torch(module, (2, 2, 3))
    save_torch(tmp_path / "model.pt", classifier, variables)
    module.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert module[1].bias.tolist() == [0, 1, 2]


def test_a_network_of_timm_gets_its_classes_from_the_file() -> None:
    torchvision_models()
    timm = pytest.importorskip("timm", reason="timm's networks: pip install timm")
    state = timm.create_model("resnet10t", num_classes=7).state_dict()
    module = load_module("timm:resnet10t", state, "x")
    assert classes_and_channels(module, (32, 32), "timm:resnet10t") == (7, 3)
    assert "no network 'resnet9'" in one_line(load_module, "timm:resnet9", state, "x")


def test_a_network_of_torchvision_gets_its_classes_from_the_file() -> None:
    models = torchvision_models()
    state = models.squeezenet1_1(num_classes=7).state_dict()
    module = load_module("torchvision:squeezenet1_1", {f"net.{name}": value for name, value in state.items()}, "x")
    assert classes_and_channels(module, (32, 32), "torchvision:squeezenet1_1") == (7, 3)
    assert "no classifier 'squeezenet9'" in one_line(load_module, "torchvision:squeezenet9", state, "x")


# Images


def write_images(folder: Path, suffix: str = ".png", deeper: str = "", side: int = 4) -> None:
    for name in ("a", "b"):
        (folder / name / deeper).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (9, 9, 9)).save(folder / name / deeper / f"1{suffix}", "PNG")


@pytest.mark.parametrize(("suffix", "deeper"), [(".jfif", ""), (".PNG", "inner"), (".jpeg", "one/two")])
def test_images_of_every_usual_suffix_and_depth_are_read(suffix: str, deeper: str, tmp_path: Path) -> None:
    write_images(tmp_path, suffix, deeper)
    assert load_labeled(str(tmp_path), 2).data.labels.tolist() == [0, 1]


def test_what_a_folder_passes_over_is_told(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "photo.heic").write_bytes(b"x")
    first, second = load_labeled(str(tmp_path), 3).notes
    assert "1 files passed over, which are no images: .heic" in first
    assert "classes without images: c" in second


def test_images_of_unequal_sizes_are_resized_on_demand(tmp_path: Path) -> None:
    write_images(tmp_path)
    Image.new("RGB", (6, 8)).save(tmp_path / "b" / "2.png")
    assert "--size 4x4" in one_line(load_labeled, str(tmp_path), 2)
    assert load_labeled(str(tmp_path), 2, size=(5, 7)).data.images.shape == (3, 5, 7, 3)


def test_the_center_of_resized_images_is_torchvisions(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 50, 37, 3), np.uint8)
    for name, picture in (("a", pixels[0]), ("b", pixels[0].transpose(1, 0, 2))):
        (tmp_path / "folder" / name).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "folder" / name / "1.png")
    np.savez(tmp_path / "1.npz", images=pixels, labels=np.zeros(1, int))
    # Resize(18) makes 24x18 of 50x37, and CenterCrop((14, 16)) cuts 5 rows and 1 column off each side of it.
    tall = np.asarray(Image.fromarray(pixels[0]).resize((18, 24), Image.Resampling.BILINEAR))[5:19, 1:17]
    wide = np.asarray(Image.fromarray(pixels[0].transpose(1, 0, 2)).resize((24, 18), Image.Resampling.BILINEAR))
    found = load_labeled(str(tmp_path / "folder"), 2, size=(14, 16), resize=18)
    np.testing.assert_allclose(found.data.images, [tall, wide[2:16, 4:20]], atol=1)  # uint8, rounded twice.
    arrays = load_labeled(str(tmp_path / "1.npz"), 2, size=(14, 16), resize=18)
    np.testing.assert_allclose(arrays.data.images, [tall], atol=1)
    assert not found.notes
    assert "2 of 2 images stretched to 16x16" in load_labeled(str(tmp_path / "folder"), 2, size=(16, 16)).notes[0]
    for size, resize in ((None, 18), ((32, 16), 18), ((16, 16), 10**400)):
        assert "--resize" in one_line(load_labeled, str(tmp_path), 2, size=size, resize=resize)


def test_class_names_give_the_order(tmp_path: Path) -> None:
    write_images(tmp_path)
    assert load_labeled(str(tmp_path), 2, class_names=("b", "a")).data.labels.tolist() == [0, 1]
    Image.new("RGB", (4, 4), (1, 1, 1)).save(tmp_path / "b" / "1.png")
    data = load_labeled(str(tmp_path), 2, class_names=("b", "a")).data
    assert data.images[:, 0, 0, 0].tolist() == [1, 9]
    assert "no class folder 'x'" in one_line(load_labeled, str(tmp_path), 2, class_names=("x", "a"))


def test_data_that_are_missing_say_so(tmp_path: Path) -> None:
    assert "no such data" in one_line(load_labeled, str(tmp_path / "x"), 2, class_names=("a", "b"))


def test_class_names_may_be_written_with_spaces() -> None:
    parsed = make_parser().parse_args(
        ["scan", "--checkpoint", "x.pt", "--data", "x", "--class-names", "go, no entry ,stop"]
    )
    assert images_of(parsed).class_names == ("go", "no entry", "stop")


def test_a_class_is_named_once(tmp_path: Path) -> None:
    write_images(tmp_path)
    assert "'a' is named for several classes" in one_line(load_labeled, str(tmp_path), 2, class_names=("a", "a"))


def test_classes_that_are_numbers_are_told_to_be_in_the_order_of_text(tmp_path: Path) -> None:
    for number in ("2", "10"):
        (tmp_path / number).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / number / "1.png")
    assert "classes in the order 10, 2, of text" in load_labeled(str(tmp_path), 2).notes[0]
    assert not load_labeled(str(tmp_path), 2, class_names=("2", "10")).notes
    (tmp_path / "10").rename(tmp_path / "3")
    assert not load_labeled(str(tmp_path), 2).notes


def test_linked_folders_that_are_passed_over_are_told(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "b" / "more").symlink_to(tmp_path / "images" / "a")
    assert "a link to a folder" in load_labeled(str(tmp_path / "images"), 2).notes[0]


def test_a_folder_with_splits_is_worked_with_and_evaluated_on(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", side=6)
    found = load_labeled(str(tmp_path), 2)
    assert found.test is not None
    assert (found.data.images.shape[1], found.test.images.shape[1]) == (4, 6)
    assert "works with train and evaluates on val" in found.notes[0]


def test_splits_of_usual_names_and_a_single_folder_around_them_are_found(tmp_path: Path) -> None:
    for first, second in (("training", "validation"), ("Train", "valid"), ("train", "testing")):
        root = tmp_path / second / "archive" / "images"
        write_images(root / first)
        write_images(root / second, side=6)
        (tmp_path / second / "__MACOSX").mkdir()
        for found in (load_labeled(str(tmp_path / second), 2), load(str(tmp_path / second), image_size=4)):
            assert "holds a single folder, so archive/images is read" in found.notes[0] + found.notes[-1]
        labeled = load_labeled(str(tmp_path / second), 2)
        assert labeled.test is not None and labeled.test.images.shape[1] == 6
        assert any(f"works with {first} and evaluates on {second}" in note for note in labeled.notes)
    write_images(tmp_path / "plain" / "inner")
    found = load_labeled(str(tmp_path / "plain"), 2)
    assert found.class_names == ("a", "b") and "so inner is read" in found.notes[0]


def test_images_outside_of_class_folders_say_so(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    for names in (None, ("a", "b")):
        assert "its images lie in the folder itself" in one_line(load_labeled, str(tmp_path), 2, class_names=names)
    assert "its images lie in the folder itself" in one_line(load, str(tmp_path), image_size=4)


def test_a_folder_of_anything_but_images_is_not_walked_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MOST_FOREIGN", 3)
    (tmp_path / "usr").mkdir()
    for number in range(5):
        (tmp_path / "usr" / f"{number}.so").touch()
    with pytest.raises(UserError, match="usr: none of 3 files is an image"):
        load_labeled(str(tmp_path), 1)


def test_folders_that_are_no_class_are_told(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "test")
    Image.new("RGB", (4, 4)).save((tmp_path / "test" / "a").rename(tmp_path / "test" / "c") / "1.png")
    (tmp_path / "test" / "a").mkdir()
    assert any("no class: c" in note for note in load_labeled(str(tmp_path), 2).notes)


def test_resizing_without_a_size_says_what_to_give(tmp_path: Path) -> None:
    assert "give --size as well" in one_line(load_labeled, str(tmp_path), 2, resize=16)
    assert "give 32 to 10000 pixels" in one_line(load_labeled, str(tmp_path), 2, size=(32, 16), resize=18)


def test_a_gif_of_one_frame_is_read_and_an_animation_refused(tmp_path: Path) -> None:
    write_images(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    still = Image.fromarray(pixels).quantize()
    still.save(tmp_path / "a" / "1.png", "GIF", comment=b"x" * 1000, transparency=0)
    found = load_labeled(str(tmp_path), 2)
    np.testing.assert_array_equal(found.data.images[0], still.convert("RGB"))
    np.testing.assert_array_equal(picture_patch(str(tmp_path / "a" / "1.png"), (4, 4, 3), None).mask.min(), 0)
    other = Image.new("RGB", (4, 4), (9, 0, 0))
    for kind in ("GIF", "PNG", "WEBP"):
        still.convert("RGB").save(tmp_path / "a" / "1.png", kind, save_all=True, append_images=[other])
        assert "1.png: cannot be read as an image (it is animated; save one frame" in one_line(
            load_labeled, str(tmp_path), 2
        )


def test_images_of_other_colors_than_the_models_are_converted_and_told(tmp_path: Path) -> None:
    write_images(tmp_path)
    Image.new("LA", (4, 4), (7, 9)).save(tmp_path / "b" / "1.png")
    assert "1 of 2 images are gray, and were converted to color" in load_labeled(str(tmp_path), 2).notes[0]
    assert "1 of 2 images are in color, and were converted to gray" in load_labeled(str(tmp_path), 2, 1).notes[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "1.png")
    assert not load_labeled(str(tmp_path), 2).notes
    classifier = build_classifier("small_cnn", 2, width=2)
    note = "x: 40 of 40 images are gray, and were converted to color"
    text = one_line(require_better_than_chance, 20, np.arange(40) % 2, classifier, "model", "", (note,))
    assert "near chance (50.0 %); x: 40 of 40 images are gray" in text and "see --class-names" in text


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    write_images(tmp_path)
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "a" / "1.png")
    assert int(load_labeled(str(tmp_path), 2).data.images[0, 0, 0, 0]) == 100


@pytest.mark.parametrize("names", [("x_train", "y_train"), ("images", "labels"), ("X", "y"), ("arr_0", "arr_1")])
def test_arrays_of_usual_layouts_are_converted_and_told(names: tuple[str, str], tmp_path: Path) -> None:
    images, labels = draw(6, 0)
    layouts = {"nchw": images.transpose(0, 3, 1, 2) / 255, "nhwc": images.astype(np.float32), "int": images.astype(int)}
    for name, array in layouts.items():
        np.savez(tmp_path / f"{name}.npz", **{names[0]: array, names[1]: np.eye(6)[labels]})
        found = load_labeled(str(tmp_path / f"{name}.npz"), 6)
        np.testing.assert_array_equal(found.data.images, images)
        np.testing.assert_array_equal(found.data.labels, labels)
        assert "one-hot rows to numbers" in found.notes[-1]
        assert ("channels moved last" in found.notes[0]) == (name == "nchw")


def test_arrays_are_read_under_a_suffix_in_capitals(tmp_path: Path) -> None:
    images, labels = draw(6, 0)
    images = images.astype(np.uint8)
    file = tmp_path / "A.NPZ"
    with file.open("wb") as stream:
        np.savez(stream, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    np.testing.assert_array_equal(load_labeled(str(file), 6).data.images, images)
    np.testing.assert_array_equal(load(str(file)).train.images, images)


def test_ambiguous_arrays_are_refused() -> None:
    for images in (np.full((2, 4, 4, 3), -0.5), np.full((2, 4, 4, 3), 300.0), np.full((2, 4, 4, 3), np.nan)):
        assert "values run from" in one_line(as_images, images, "x")
    for shape in ((2, 8, 8, 4), (2, 4, 8, 8)):
        assert "leave out the fourth channel" in one_line(as_images, np.zeros(shape, np.uint8), "x")
    assert "not one-hot" in one_line(as_labels, np.ones((2, 3)), "y")


def test_images_with_other_channels_than_the_models_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "gray.npz", images=np.zeros((2, 28, 28), np.uint8), labels=np.arange(2))
    assert "images have 1 channel(s), the model takes 3" in one_line(load_labeled, str(tmp_path / "gray.npz"), 2)


def test_an_experiment_takes_a_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (4 + number, 6), (9, 9, 9)).save(tmp_path / part / name / "1.png")
    assert "image_size" in one_line(load, str(tmp_path))
    task = load(str(tmp_path), image_size=8)
    assert (task.num_classes, task.train.images.shape, task.test.images.shape) == (2, (2, 8, 8, 3), (2, 8, 8, 3))
    whole = load(str(tmp_path / "train"), image_size=8)
    assert (len(whole.train), len(whole.test)) == (1, 1)
    assert "leave it out" in one_line(load, "digits", image_size=8)


def test_an_experiment_says_what_was_stretched_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    for name, size in (("a", (9, 6)), ("b", (6, 6))):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", size).save(folder / name / f"{number}.png")
    (folder / "b" / "photo.heic").write_bytes(b"x")
    (tmp_path / "small.yaml").write_text(
        "{name: small, data: {source: images, image_size: 6}, model: {name: small_cnn, width: 2}, "
        "victim: {epochs: 1}, clean_ratio: 0.5, attacks: [{name: badnets}], defenses: [{name: finetune}]}"
    )
    monkeypatch.setattr("backdoor_jax.experiment.runner._run", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    assert main(["run", "small.yaml"]) == 0
    output = capsys.readouterr().out
    assert "images: 5 of 10 images stretched to 6x6; --resize of scan and defend keeps their proportions" in output
    assert "images: 1 files passed over, which are no images: .heic" in output
    assert main(["run", "small.yaml", "--quiet"]) == 0
    assert "stretched" not in capsys.readouterr().out


def test_arrays_of_other_proportions_that_are_stretched_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 12, 3), np.uint8), labels=np.arange(2))
    (note,) = load_labeled(str(tmp_path / "a.npz"), 2, size=(6, 6)).notes
    assert "images: stretched from 8x12 to 6x6; --resize" in note
    for size, resize in (((4, 6), None), ((6, 6), 6)):
        assert not load_labeled(str(tmp_path / "a.npz"), 2, size=size, resize=resize).notes


# An experiment's victims


def test_victims_near_chance_are_marked() -> None:
    row = {
        "attack": "badnets",
        "seed": 0,
        "defense": "d3",
        "acc": 0.1,
        "asr": 0.0,
        "ra": 0.1,
        "der": 0.5,
        "seconds": 1.0,
    }
    assert "near chance" in format_row({**row, "near_chance": True})
    assert "near chance" not in format_row({**row, "near_chance": False})
    rest = {"n_used": 0, "data_used": "nothing", "target": None, "info": {"changed": False}}
    assert "badnets (near chance)" in markdown([{**row, **rest, "near_chance": True}])
    assert "near chance" not in markdown([{**row, **rest}])


# The trigger, and after a repair


def test_triggered_images_under_the_targets_label_are_refused(place: Place, tmp_path: Path) -> None:
    images, labels = draw(6, 3)
    np.savez(tmp_path / "relabeled.npz", images=images, labels=np.full_like(labels, 2))
    suspect = load_suspect(
        pooled(place), str(place.folder / "clean.npz"), triggered=str(tmp_path / "relabeled.npz"), target=2
    )
    assert "other classes under their true labels" in one_line(suspect.success_rate, suspect.variables)


def test_the_success_rate_of_triggered_images_leaves_out_the_target_class(place: Place) -> None:
    suspect = load_suspect(pooled(place), str(place.folder / "clean.npz"))
    data = make_dataset(*draw(60, 5))
    shown = make_dataset(np.asarray(data.images)[np.full(60, 3)], np.asarray(data.labels))
    target = int(predict(suspect.classifier, suspect.variables, shown.images[:1])[0])
    label_map = LabelMap("all_to_one", 6, target)
    scores = evaluate(suspect.classifier, suspect.variables, data, label_map=label_map, triggered=shown)
    assert (scores.asr, scores.ra) == (1.0, 0.0)
    informed = dataclasses.replace(suspect, triggered=shown, target=target)
    assert informed.success_rate(suspect.variables) == 1.0
    assert dataclasses.replace(informed, target=(target + 1) % 6).success_rate(suspect.variables) == 0.0
    assert "go together" in one_line(load_suspect, place.folder / "model.pth.tar", "x.npz", target=1)


def test_a_repair_that_loses_accuracy_exits_with_1_names_remedies_and_is_kept_apart(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(self: FineTune, key: Any, classifier: Classifier, variables: Any, data: Any) -> Repair:
        fc = variables["params"]["net"]["fc"]
        params = {**variables["params"], "net": {**variables["params"]["net"], "fc": {**fc, "kernel": -fc["kernel"]}}}
        return Repair({**variables, "params": params}, changed=True)

    monkeypatch.setattr(FineTune, "repair", ruin)
    given = ("--checkpoint", place.folder / "model.pth.tar", "--data", place.folder / "clean.npz")
    named = ("--model", f"{place.folder / 'nets.py'}:make_net", "--defense", "finetune", "--out", tmp_path / "a.pt")
    code, output, error = call("defend", *given, *named)
    assert (code, error) == (1, "")
    assert "warning: it lost" in output and f"kept as {tmp_path / 'a-refused.pt'}" in output
    assert all(remedy in output for remedy in ("--max-drop ", "clean images", "learning_rate=0.005", "ft_sam"))
    allowed = re.findall(r"give --max-drop (\S+);", output)[0]
    assert not (tmp_path / "a.pt").exists() and (tmp_path / "a-refused.pt").is_file()
    code, output, _ = call("defend", *given, *named[:-1], tmp_path / "b.pt", "--max-drop", allowed)
    assert code == 0 and (tmp_path / "b.pt").is_file()
    code, output, _ = call("defend", *given, *named, "--force")
    assert code == 1
    assert "written because of --force" in output
    assert (tmp_path / "a.pt").exists()
    code, output, _ = call("defend", *given, *named, "--force", "--max-drop", "1")
    assert (code, "warning" in output) == (0, False)


def test_a_repair_in_python_is_not_written_either(place: Place, tmp_path: Path) -> None:
    suspect = load_suspect(pooled(place), str(place.folder / "clean.npz"))
    result = repair_model(suspect, CLP(u=0.0), tmp_path / "a.pt", max_drop=-1.0)
    assert result.out is None and result.refused == tmp_path / "a-refused.pt" and result.refused.is_file()
    assert result.remedies is not None and "ft_sam" in result.remedies and "gently" not in result.remedies
