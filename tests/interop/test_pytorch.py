"""PyTorch files and networks: names, layouts, safety, bounds, and four defenses step by step in float64."""

import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_near, random_variables
from jax.tree_util import Partial
from torch_networks import torch_preact_resnet18, torch_resnet, torch_vgg19

import backdoor_jax as bj
from backdoor_jax import Classifier, UserError, build_classifier
from backdoor_jax.attacks import AttackContext
from backdoor_jax.defenses import D3, PADFT, TAC, FineTune, SGDDefense, SuperFineTune
from backdoor_jax.defenses.d3 import initialize
from backdoor_jax.defenses.tac_program import class_perturbations
from backdoor_jax.interop import apply_bounds, load_torch, save_torch, torch_state
from backdoor_jax.models import NORMALIZATIONS, ResNet, Stem, Variables
from backdoor_jax.training import SGD, Cosine, GradientStep, batch_shape, fit, latents, supervised_loss

CLASSES, WIDTH = 5, 2
NETWORKS: dict[str, tuple[Stem | None, int, Callable[[Any], Any]]] = {
    "preact_resnet18": ("small", 16, lambda torch: torch_preact_resnet18(torch, CLASSES, WIDTH)),
    "resnet18": ("small", 16, lambda torch: torch_resnet(torch, CLASSES, WIDTH, (2, 2, 2, 2), False, True)),
    "resnet34": ("imagenet", 32, lambda torch: torch_resnet(torch, CLASSES, WIDTH, (3, 4, 6, 3), False, False)),
    "resnet50": ("imagenet", 32, lambda torch: torch_resnet(torch, CLASSES, WIDTH, (3, 4, 6, 3), True, False)),
    "vgg19_bn": (None, 32, lambda torch: torch_vgg19(torch, CLASSES, WIDTH)),
}
"""Stem, images' size, and the network in PyTorch."""


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch", reason="comparison with PyTorch: pip install 'backdoor_jax[torch]'")
    module.set_num_threads(1)
    return module


def random_network(torch: Any, model: str, seed: int = 0) -> Any:
    """A PyTorch network with random weights and statistics, counters included."""
    torch.manual_seed(seed)
    network = NETWORKS[model][2](torch)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.ndim == 1:
            tensor.copy_((1 if name.endswith("weight") else 0) + 0.3 * torch.randn_like(tensor))
        else:
            tensor.copy_((2 / tensor[0].numel()) ** 0.5 * torch.randn_like(tensor))
    return network.eval()


def images_for(model: str, count: int = 8, channels: int = 3) -> jax.Array:
    size = NETWORKS[model][1]
    return jnp.asarray(np.random.default_rng(3).integers(0, 256, (count, size, size, channels), dtype=np.uint8))


def pixels(torch: Any, classifier: Classifier, images: jax.Array, dtype: Any = None) -> Any:
    x = (np.asarray(images) / 255 - np.array(classifier.mean)) / np.array(classifier.std)
    return torch.tensor(x, dtype=dtype or torch.float32).permute(0, 3, 1, 2)


@functools.cache
def state_of(model: str, width: int = WIDTH, classes: int = CLASSES) -> dict[str, np.ndarray]:
    """A state dict of NumPy arrays, without PyTorch."""
    classifier = build_classifier(model, classes, width)
    size = NETWORKS[model][1]
    return torch_state(classifier, random_variables(classifier, jnp.zeros((1, size, size, 3), jnp.uint8)))


@jax.jit
def in_both_modes(
    classifier: Classifier, variables: Variables, images: jax.Array
) -> tuple[jax.Array, jax.Array, Variables]:
    return classifier.logits(variables, images)[0], *classifier.logits(variables, images, train=True)


# Reading and writing


@pytest.mark.parametrize("model", NETWORKS)
def test_logits_and_statistics_equal_pytorchs_and_writing_gives_equal_tensors(
    torch: Any, model: str, tmp_path: Path
) -> None:
    network = random_network(torch, model)
    torch.save(network.state_dict(), tmp_path / "there.pt")
    classifier, variables = load_torch(tmp_path / "there.pt", model, normalization="cifar10")
    stem = NETWORKS[model][0] if model.startswith("resnet") else None
    assert classifier == build_classifier(model, CLASSES, WIDTH, "cifar10", stem=stem)

    save_torch(tmp_path / "back.pt", classifier, variables)
    before, after = network.state_dict(), torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(before) == set(after)
    for name, tensor in before.items():
        counter = name.endswith("num_batches_tracked")
        torch.testing.assert_close(after[name], torch.zeros_like(tensor) if counter else tensor, rtol=0, atol=0)
    NETWORKS[model][2](torch).load_state_dict(after)

    images = images_for(model)
    x = pixels(torch, classifier, images)
    evaluated, trained, new = in_both_modes(classifier, variables, images)
    with torch.no_grad():
        assert_near(evaluated, network(x))
        assert_near(trained, network.train()(x))
    after = torch_state(classifier, new)
    for name, tensor in network.state_dict().items():
        if "running" in name:
            assert_near(after[name], tensor)


@pytest.mark.parametrize("model", NETWORKS)
def test_safetensors_need_no_pytorch(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    state = state_of(model)
    classifier, variables = load_torch(state, model)
    save_torch(tmp_path / "new" / "model.safetensors", classifier, variables)
    again, same = load_torch(str(tmp_path / "new" / "model.safetensors"), model)
    assert again == classifier
    chex.assert_trees_all_equal(same, variables)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]
    assert all(np.array_equal(value, state[name]) for name, value in torch_state(again, same).items())


def test_safetensors_are_exchanged_with_pytorch(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    network = random_network(torch, "preact_resnet18")
    save_file(network.state_dict(), tmp_path / "there.safetensors")
    classifier, variables = load_torch(tmp_path / "there.safetensors", "preact_resnet18")
    chex.assert_trees_all_equal(variables, load_torch(network.state_dict(), "preact_resnet18")[1])
    save_torch(tmp_path / "back.safetensors", classifier, variables)
    network.load_state_dict(load_file(tmp_path / "back.safetensors"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("holder", [None, "model", "state_dict"])
def test_prefixes_are_removed_and_nested_state_dicts_found(prefix: str, holder: str | None) -> None:
    state = state_of("preact_resnet18")
    source: dict[str, Any] = {prefix + name: value for name, value in state.items()}
    source = source if holder is None else {holder: source, "epoch": 3}
    chex.assert_trees_all_equal(load_torch(source, "preact_resnet18")[1], load_torch(state, "preact_resnet18")[1])


def test_half_precision_becomes_float32_and_counters_may_be_absent(torch: Any) -> None:
    state = {name: jnp.asarray(value, jnp.bfloat16) for name, value in state_of("resnet18").items()}
    plain = {name: value for name, value in state.items() if "num_batches" not in name}
    halves = {name: torch.tensor(np.asarray(value, np.float32)).bfloat16() for name, value in plain.items()}
    arrays, tensors = load_torch(plain, "resnet18")[1], load_torch(halves, "resnet18")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(arrays)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal(arrays, tensors)


def test_variables_do_not_change_with_their_source(torch: Any) -> None:
    network = random_network(torch, "preact_resnet18")
    _, variables = load_torch(network.state_dict(), "preact_resnet18")
    before = jax.tree.map(np.array, variables)
    for tensor in network.state_dict().values():
        tensor.zero_()
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, variables), before)


def test_width_classes_channels_and_normalization() -> None:
    state = state_of("preact_resnet18", width=3, classes=7)
    classifier, _ = load_torch(state, "preact_resnet18", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (classifier.network.width, classifier.num_classes, classifier.std) == (3, 7, (0.4, 0.5, 0.6))
    gray = {**state, "conv1.weight": state["conv1.weight"][:, :1]}
    classifier, variables = load_torch(gray, "preact_resnet18")
    logits, _ = jax.eval_shape(classifier.logits, variables, jnp.zeros((2, 8, 8, 1), jnp.uint8))
    assert logits.shape == (2, 7)
    for options, message in (
        ({"normalization": "cifar10"}, "1 channels, the normalization for 3"),
        ({"normalization": "cifar"}, "unknown normalization 'cifar'; known are"),
        ({"mean": (0.5,)}, "mean and std go together"),
    ):
        with pytest.raises(UserError, match=message):
            load_torch(gray, "preact_resnet18", **options)


# What a file may contain


def attack_result(torch: Any) -> dict[str, Any]:
    """The contents of the benchmark's file, by name and type."""
    return {
        "model_name": "preactresnet18",
        "num_classes": np.int64(CLASSES),
        "model": random_network(torch, "preact_resnet18").state_dict(),
        "data_path": "../data/cifar10",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": {
            "bd_data_container": {"data_dict": {3: {"path": "x.png", "other_info": np.float32(1)}}},
            "original_index_array": np.arange(9),
            "poison_indicator": np.ones(9, bool),
            "names": np.array(["a", "b"]),
            "mixed": np.array([None, {"a": np.uint8(1)}], object),
        },
        "bd_test": None,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_the_benchmarks_file_is_read(torch: Any, zipped: bool, tmp_path: Path) -> None:
    result, allowed = attack_result(torch), torch.serialization.get_safe_globals()
    torch.save(result, tmp_path / "attack_result.pt", _use_new_zipfile_serialization=zipped)
    older = (tmp_path / "attack_result.pt").read_bytes().replace(b"numpy._core.multi", b"numpy.core.multi")
    assert b"numpy" in older
    if not zipped:  # As NumPy 1 wrote it; in a zip file the lengths would be wrong.
        (tmp_path / "attack_result.pt").write_bytes(older)
    _, variables = load_torch(tmp_path / "attack_result.pt", "preact_resnet18")
    chex.assert_trees_all_equal(variables, load_torch(result["model"], "preact_resnet18")[1])
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


class Command:
    """Runs a command when it is unpickled by `pickle`."""

    def __init__(self, command: str, how: Any = os.system) -> None:
        self.command, self.how = command, how

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.how, (self.command,)


@pytest.mark.parametrize("how", [os.system, eval, exec])
@pytest.mark.parametrize("plain", [False, True])
def test_a_file_that_would_run_a_command_is_refused(torch: Any, how: Any, plain: bool, tmp_path: Path) -> None:
    file, ran = tmp_path / "model.pt", tmp_path / "ran"
    command = f"touch {ran}" if how is os.system else f"open({str(ran)!r}, 'w')"
    tree = {"model": random_network(torch, "preact_resnet18").state_dict(), "then": Command(command, how)}
    if plain:
        file.write_bytes(pickle.dumps({"then": tree["then"]}, protocol=2))
    else:
        torch.save(tree, file)
    with pytest.raises(
        UserError, match=rf"model.pt: holds more than weights, \S*{how.__name__}.*state_dict\(\)"
    ) as caught:
        load_torch(file, "preact_resnet18")
    assert not ran.exists() and "\n" not in str(caught.value) and "False" not in str(caught.value)
    pickle.loads(pickle.dumps(tree["then"]))
    assert ran.exists()


def test_a_pickled_module_is_refused(torch: Any, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"more than weights, torch.nn.modules.linear.Linear, .* save model.state_dict"):
        load_torch(tmp_path / "model.pt", "preact_resnet18")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(torch: Any, suffix: str, share: float, tmp_path: Path) -> None:
    classifier, variables = load_torch(state_of("preact_resnet18"), "preact_resnet18")
    file = tmp_path / f"model{suffix}"
    save_torch(file, classifier, variables)
    complete = file.read_bytes()
    file.write_bytes(complete[: int(share * len(complete))])
    with pytest.raises(UserError, match=rf"model{suffix}: not a complete .* again") as caught:
        load_torch(file, "preact_resnet18")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_contents_are_refused(torch: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    for content, message in (
        (pickle.dumps({"a": 1}, protocol=4), "is a plain pickle, which holds a dict"),
        (b"no pickle at all", "not a complete file of weights"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_torch(file, "preact_resnet18")
        assert "weights_only" not in str(caught.value)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(UserError, match="expected a state dict, or a dictionary that holds one, got list"):
        load_torch(file, "preact_resnet18")


def test_without_pytorch_the_error_names_the_extra_and_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    message = r"needs PyTorch.*pip install 'backdoor_jax\[torch\]', or use a .safetensors"
    with pytest.raises(UserError, match=message):
        save_torch(tmp_path / "new.pth", *load_torch(state_of("preact_resnet18"), "preact_resnet18"))
    assert not (tmp_path / "new.pth").exists()


def changed(**changes: Any) -> dict[str, Any]:
    """A state dict with tensors replaced, or left out where None; two underscores for a dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in {**state_of("preact_resnet18"), **named}.items() if value is not None}


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (
            "resnet18",
            lambda: state_of("resnet34"),
            r"not those of resnet18: unknown layer1.2.bn1.bias, .* and .* more; they are those of resnet34, so",
        ),
        ("preact_resnet18", lambda: state_of("vgg19_bn"), "missing conv1.weight, .*they are those of vgg19_bn"),
        ("preact_resnet18", lambda: changed(linear__bias=None), "the state dict: .*: missing linear.bias; give the"),
        ("preact_resnet18", lambda: changed(bn__weight=np.ones(16)), "unknown bn.weight; give the module it was saved"),
        (
            "preact_resnet18",
            lambda: changed(layer1__0__bn1__weight=np.ones(3)),
            r"layer1.0.bn1.weight has shape \(3,\), expected \(2,\) in a preact_resnet18 of 5 classes",
        ),
        ("preact_resnet18", lambda: changed(conv1__weight=np.ones((2, 3, 5, 5))), r"\(2, 3, 5, 5\) .* size 3 or 7"),
        ("preact_resnet18", lambda: changed(conv1__weight=np.ones((2, 3, 7, 7))), r"7\), expected \(2, 3, 3, 3\)"),
        ("preact_resnet18", lambda: changed(linear__weight=np.ones(3)), r"linear.weight \(3,\), expected"),
        ("preact_resnet18", lambda: changed(conv1__weight=np.float32(1)), r"conv1.weight has shape \(\)"),
        ("preact_resnet18", lambda: changed(linear__bias=np.ones(5, np.int8)), "linear.bias holds int8, .* dequantize"),
        ("preact_resnet18", lambda: changed(linear__bias="five"), "linear.bias is a str, expected a tensor"),
        ("preact_resnet18", dict, "holds no tensors by name; save"),
        ("vit_tiny", dict, "'vit_tiny' has no PyTorch counterpart here; .* preact_resnet18, resnet10, .*, vgg19_bn"),
        ("resnet", dict, "'resnet' has no PyTorch counterpart"),
        ("resnet18", lambda: Path("nowhere.pt"), "nowhere.pt: no such file"),
        ("resnet18", lambda: "nowhere.safetensors", "nowhere.safetensors: no such file"),
    ],
)
def test_what_cannot_be_loaded_is_a_one_line_error(model: str, source: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_torch(source(), model)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_saved_is_an_error(tmp_path: Path) -> None:
    classifier, variables = load_torch(state_of("preact_resnet18"), "preact_resnet18")
    with pytest.raises(UserError, match=r"unknown suffix '.npz'; give .pt, .pth or .safetensors"):
        save_torch(tmp_path / "model.npz", classifier, variables)
    with pytest.raises(UserError, match="VisionTransformer has no PyTorch counterpart here; save it as"):
        save_torch(tmp_path / "model.safetensors", build_classifier("vit_tiny", 10, 2), variables)
    bounds = {"layer1_0": {"relu1": {"upper": np.array([1.0, -0.5])}}}
    with pytest.raises(UserError, match="bounds of layer1_0/relu1 are not all 0 or more"):
        save_torch(tmp_path / "model.safetensors", classifier, {**variables, "bounds": bounds})
    assert not list(tmp_path.iterdir())


# Bounds


@functools.cache
def bounded(model: str) -> tuple[Classifier, Variables]:
    """A model with a random bound on every rectifier; those of one channel are 0."""
    classifier, variables = load_torch(state_of(model), model)
    shapes = jax.eval_shape(classifier.activations, variables, images_for(model))
    generator = np.random.default_rng(6)
    uppers = [generator.uniform(0.2, 1, leaf.shape).astype(np.float32) for leaf in jax.tree.leaves(shapes)]
    for upper in uppers:
        upper[0] = 0
    return classifier, {**variables, "bounds": jax.tree.unflatten(jax.tree.structure(shapes), map(jnp.asarray, uppers))}


@jax.jit
def logits_of(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
    return classifier.logits(variables, images)[0]


@pytest.mark.parametrize("model", [model for model in NETWORKS if model != "resnet34"])
def test_a_bounded_model_is_the_same_in_pytorch(torch: Any, model: str, tmp_path: Path) -> None:
    classifier, variables = bounded(model)
    save_torch(tmp_path / "bounded.pt", classifier, variables)
    saved = torch.load(tmp_path / "bounded.pt", weights_only=True)
    network = torch_of(torch, model, classifier)
    network.load_state_dict(saved["model"])
    network.eval()
    x, images = pixels(torch, classifier, images_for(model)), images_for(model)
    with torch.no_grad():
        plain = network(x)
        names = set(network.state_dict())
        assert apply_bounds(network, saved["bounds"]) is network
        assert_near(network(x), logits_of(classifier, variables, images))
        assert float((plain - network(x)).abs().max()) > 0.1
        assert set(network.state_dict()) == names

        apply_bounds(network, {name: 1e9 * torch.ones_like(upper) for name, upper in saved["bounds"].items()})
        assert_near(network(x), plain, 1e-6)


def torch_of(torch: Any, model: str, classifier: Classifier) -> Any:
    """The network in PyTorch, with the small stem of `state_of`."""
    blocks = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
    if model in blocks:
        return torch_resnet(torch, CLASSES, WIDTH, blocks[model], model == "resnet50", True)
    return NETWORKS[model][2](torch)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("model", ["preact_resnet18", "resnet50", "vgg19_bn"])
def test_bounds_are_written_and_read(torch: Any, model: str, suffix: str, tmp_path: Path) -> None:
    classifier, variables = bounded(model)
    save_torch(tmp_path / f"bounded{suffix}", classifier, variables)
    again, same = load_torch(tmp_path / f"bounded{suffix}", model)
    assert again == classifier
    chex.assert_trees_all_equal(same, variables)


def test_bounds_move_with_a_network_and_survive_copies_and_data_parallel_training(torch: Any, tmp_path: Path) -> None:
    import copy

    classifier, variables = bounded("preact_resnet18")
    save_torch(tmp_path / "bounded.pt", classifier, variables)
    saved = torch.load(tmp_path / "bounded.pt", weights_only=True)
    network = torch_preact_resnet18(torch, CLASSES, WIDTH).eval()
    network.load_state_dict(saved["model"])
    apply_bounds(torch.nn.DataParallel(network), {name: upper.numpy() for name, upper in saved["bounds"].items()})
    x = pixels(torch, classifier, images_for("preact_resnet18"))
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(copy.deepcopy(network)(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(network.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no module 'layer9', whose output a bound clips"):
        apply_bounds(network, {"layer9": torch.ones(2)})


def test_a_bound_of_a_module_without_rectifier_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a bound is for conv1, which has no rectifier; modules with one are layer1.0.bn1"
    ):
        load_torch({"model": state_of("preact_resnet18"), "bounds": {"conv1": np.ones(2)}}, "preact_resnet18")


@pytest.mark.slow
def test_pad_ft_has_the_same_asr_in_both_frameworks(torch: Any, tmp_path: Path) -> None:
    """A BadNets victim on the digits, repaired with clipped activations, then evaluated here and in PyTorch."""
    task = bj.digits()
    few, channels = task.train.take(slice(500)), task.test.images.shape[-1]
    attack, classifier = bj.BadNets(), Classifier(ResNet(10, 4, (1, 1, 1, 1)), 10, head_path=("fc",))
    (poisoned, _), trigger, _ = attack.poison(jax.random.key(0), AttackContext(classifier, few))
    optimizer = SGD(0.03, Cosine(160), momentum=0.9, weight_decay=5e-4)
    step = GradientStep(Partial(supervised_loss, classifier), optimizer)
    start = step.init(random_variables(classifier, few.images))
    victim = fit(jax.random.key(1), step, start, poisoned, epochs=8, batch_size=25).variables
    defense = PADFT(per_class=10, bound_epochs=20, bound_batch_size=50, bound_weight=1.0, tune_epochs=5, views=1)
    repaired = defense.repair(jax.random.key(2), classifier, victim, poisoned).variables
    scores = bj.evaluate(classifier, repaired, task.test, trigger, attack.label_map(10))

    save_torch(tmp_path / "repaired.pt", classifier, repaired)
    saved = torch.load(tmp_path / "repaired.pt", weights_only=True)
    network = torch_resnet(torch, 10, 4, (1, 1, 1, 1), False, True, channels).eval()
    network.load_state_dict(saved["model"])
    labels = np.asarray(task.test.labels)
    counted = labels != 0
    triggered = pixels(torch, classifier, trigger(task.test.images)[counted])
    with torch.no_grad():
        unbounded = network(triggered).argmax(1).numpy()
        apply_bounds(network, saved["bounds"])
        predicted = network(triggered).argmax(1).numpy()
        clean = network(pixels(torch, classifier, task.test.images)).argmax(1).numpy()
    assert float(np.mean(predicted == 0)) == scores.asr
    assert float(np.mean(predicted == labels[counted])) == scores.ra
    assert float(np.mean(clean == labels)) == scores.acc
    assert (unbounded != predicted).any()
    assert np.mean(unbounded == 0) > 0.8 and scores.acc > 0.5


# The same defense on the same victim, step by step


def parity(**changes: Any) -> dict[str, Any]:
    """20 steps: ten epochs of 24 images in two batches, not augmented."""
    return {"steps": 20, "batch_size": 12, "crop": 0, **changes}


SHORT = Classifier(ResNet(CLASSES, WIDTH, (1, 1, 1, 1)), CLASSES, *NORMALIZATIONS["cifar10"], head_path=("fc",))
"""A ResNet of one block a stage, which compiles in half of the time; D3 is tested on the benchmark's network."""

DEFENSES: dict[str, SGDDefense] = {
    "finetune": FineTune(**parity()),
    "super_finetune": SuperFineTune(**parity(learning_rate=3e-3, peak1=0.05, peak2=0.01, up=3, down=4)),
    "super_finetune with momentum": SuperFineTune(
        **parity(learning_rate=3e-3, peak1=0.05, peak2=0.01, up=3, down=4, momentum=0.9, weight_decay=5e-4)
    ),
    "d3": D3(**parity(initialization="far")),
    "d3 with the paper's penalty": D3.preset("paper", **parity(weight_decay=5e-4)),
    "tac": TAC(**parity(target=3, beta=0.7)),
}


def cosine(defense: Any, step: int) -> float:
    """PyTorch's cosine annealing over 100 epochs, of which every step here counts as five."""
    return defense.learning_rate * (1 + np.cos(np.pi * 5 * step / 100)) / 2


def triangle(defense: Any, step: int) -> float:
    """Linear up and linear down between the base and the phase's peak."""
    peak = defense.peak1 if step < 0.4 * 20 else defense.peak2
    at = step % (defense.up + defense.down)
    knots = [0, defense.up, defense.up + defense.down]
    return float(np.interp(at, knots, [defense.learning_rate, peak, defense.learning_rate]))


def rows_of(key: jax.Array, count: int, defense: SGDDefense) -> list[np.ndarray]:
    """The indices of the images of each step."""
    steps, size = batch_shape(count, defense.batch_size)
    order, _ = jax.random.split(key)
    starts = range(0, defense.steps, steps)
    drawn = [jax.random.permutation(jax.random.fold_in(order, start), count) for start in starts]
    return [row for permutation in drawn for row in np.asarray(permutation).reshape(steps, size)]


@pytest.mark.parametrize("name", DEFENSES)
def test_twenty_steps_give_the_same_weights_as_pytorch(torch: Any, name: str) -> None:
    defense: Any = DEFENSES[name]
    functional = torch.nn.functional
    network = random_network(torch, "preact_resnet18", seed=1).double()
    images = images_for("preact_resnet18", 24)
    with jax.enable_x64(True):
        if isinstance(defense, D3):
            classifier, victim = load_torch(network.state_dict(), "preact_resnet18", normalization="cifar10")
        else:
            classifier, network = SHORT, torch_resnet(torch, CLASSES, WIDTH, (1, 1, 1, 1), False, True).double()
            victim = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_variables(SHORT, images))
            network.load_state_dict({k: torch.tensor(v) for k, v in torch_state(SHORT, victim).items()})
        assert {leaf.dtype for leaf in jax.tree.leaves(victim)} == {jnp.dtype(jnp.float64)}
        data = bj.make_dataset(np.asarray(images), np.random.default_rng(0).integers(0, CLASSES, 24), CLASSES)
        key = jax.random.key(5)
        repaired = defense.repair(key, classifier, victim, data).variables
        got = torch_state(classifier, repaired)
        start_key, tune_key = jax.random.split(key)
        rows = rows_of(tune_key if isinstance(defense, D3) else key, len(data), defense)
        if isinstance(defense, D3):
            kernel = {"kernel": victim["params"]["linear"]["kernel"]}
            drawn = np.array(initialize(start_key, kernel, defense.initialization)["kernel"]).T
        if isinstance(defense, TAC):
            seen, (weights, bias) = latents(classifier, victim, images), classifier.head_weights(victim)
            change = class_perturbations(np.array(seen), np.array(weights), np.array(bias)).vectors[3]

    head = network.get_submodule(classifier.head_path[0])
    weight = head.weight
    origin = weight.detach().clone()
    if isinstance(defense, D3):
        weight.data = -origin if defense.initialization == "far" else torch.tensor(drawn)

    def objective(x: Any, y: Any) -> Any:
        latent = network.latent(x)
        losses = functional.cross_entropy(head(latent), y, reduction="none")
        if isinstance(defense, D3):
            hinge = functional.relu(losses - defense.epsilon).mean()
            loss = defense.penalty * hinge - torch.linalg.norm(weight - origin)
            return loss / (defense.penalty + 1) if defense.penalty > 1 else loss
        if isinstance(defense, TAC):
            moved = head(latent + torch.tensor(change))
            return losses.mean() + defense.beta * functional.cross_entropy(moved, y)
        return losses.mean()

    settings = {"momentum": defense.momentum, "weight_decay": defense.weight_decay}
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1.0, **settings)
    x, y = pixels(torch, classifier, images, torch.float64), torch.tensor(np.asarray(data.labels), dtype=torch.int64)
    assert len(rows) == 20
    for step, row in enumerate(rows):
        rate = triangle if isinstance(defense, SuperFineTune) else cosine
        optimizer.param_groups[0]["lr"] = rate(defense, step)
        optimizer.zero_grad()
        objective(x[row.tolist()], y[row.tolist()]).backward()
        optimizer.step()
        if isinstance(defense, D3):
            with torch.no_grad():
                weight *= torch.linalg.norm(origin) / torch.linalg.norm(weight)

    before, moved = torch_state(classifier, victim), 0.0
    for layer, tensor in network.state_dict().items():
        if not layer.endswith("num_batches_tracked"):
            np.testing.assert_allclose(got[layer], tensor.numpy(), rtol=1e-6, atol=1e-6, err_msg=layer)
            moved = max(moved, float(np.abs(got[layer] - before[layer]).max()))
    assert moved > 0.01
    if isinstance(defense, D3):
        assert np.linalg.norm(got["linear.weight"]) == pytest.approx(float(torch.linalg.norm(origin)), rel=1e-12)
