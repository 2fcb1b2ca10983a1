"""PyTorch modules run in JAX: every operator, both modes, state dicts, bounds, heads, and what is refused."""

import copy
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_near
from torch_networks import torch_preact_resnet18, torch_resnet, torchvision_models

import backdoor_jax as bj
from backdoor_jax import Classifier, UserError
from backdoor_jax.interop import apply_bounds, torch_state
from backdoor_jax.models import Variables
from backdoor_jax.models.torch_module.operators import OPERATORS

torch: Any = pytest.importorskip("torch", reason="PyTorch modules: pip install 'backdoor_jax[torch]'")
nn: Any = torch.nn
F: Any = nn.functional
prune: Any = importlib.import_module("torch.nn.utils.prune")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@jax.jit
def in_both_modes(
    classifier: Classifier, variables: Variables, images: jax.Array
) -> tuple[jax.Array, jax.Array, Variables]:
    return classifier.logits(variables, images)[0], *classifier.logits(variables, images, train=True)


def images_of(shape: tuple[int, int, int], count: int = 4) -> Any:
    return np.random.default_rng(3).integers(0, 256, (count, *shape), dtype=np.uint8)


def pixels(images: Any, dtype: Any = None) -> Any:
    return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2) / 255, dtype=dtype or torch.float32)


def randomized(module: Any) -> Any:
    """The module with random statistics and normalizations, and without dropout."""
    generator = torch.Generator().manual_seed(0)
    for each in module.modules():
        if isinstance(each, nn.modules.dropout._DropoutNd):
            each.p = 0.0
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.3, generator=generator)
    return module


def assert_same(module: Any, shape: tuple[int, int, int] = (8, 8, 3), tolerance: float = 1e-4) -> Classifier:
    """Fails unless logits in both modes and the state dict after training mode equal PyTorch's."""
    module = randomized(module)
    classifier, variables = Classifier.from_torch(module, shape)
    images = images_of(shape)
    evaluated, trained, new = in_both_modes(classifier, variables, images)
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        assert_near(evaluated, module.eval()(pixels(images, dtype)), tolerance)
        assert_near(trained, module.train()(pixels(images, dtype)), tolerance)
    after = torch_state(classifier, new)
    assert set(after) == set(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert_near(after[name], tensor, tolerance)
    return classifier


def flat(*layers: Any, classes: int = 3) -> Any:
    """These layers, and a linear head on what they make of images 8x8x3."""
    body = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        width = body.eval()(torch.zeros(2, 3, 8, 8)).shape[1]
    return nn.Sequential(body, nn.Linear(width, classes))


class Computed(torch.nn.Module):
    """A linear head on a function of a few channels."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        with torch.no_grad():
            self.head = nn.Linear(self.body(torch.zeros(2, 3, 8, 8)).shape[1], 3)

    def body(self, x: Any) -> Any:
        return self.function(self.stem(x)).flatten(1)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))


# Operators

ACTIVATIONS = (
    *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh),
    *(F.softplus, F.hardswish, F.hardsigmoid, F.logsigmoid, lambda x: F.celu(x, 0.3)),
    *(lambda x: F.threshold(x, 0.1, 0.3), lambda x: F.gelu(x, approximate="tanh"), lambda x: x.clamp(-0.2, 0.3)),
    *(lambda x: x.clamp(min=0.1), lambda x: F.softmax(x, 1), lambda x: F.log_softmax(x, -1), lambda x: F.glu(x, 1)),
)

ENTRYWISE = (
    *(torch.abs, torch.exp, torch.square, torch.sin, torch.cos, torch.erf, torch.neg, torch.floor, torch.sign),
    *(lambda x: (x.abs() + 1).log(), lambda x: (x.abs() + 1).sqrt(), lambda x: (x.abs() + 1).rsqrt()),
    *(lambda x: 1 / (x.abs() + 1), lambda x: 2 - x, lambda x: torch.add(x, x, alpha=2), lambda x: (x * 5) // 2),
    *(lambda x: x**2, lambda x: (x.abs() + 1) ** 0.5, lambda x: torch.maximum(x, -x), lambda x: x - 2 * x),
    *(lambda x: torch.where(x > 0, x, 3.0), lambda x: x.masked_fill(x < 0, 0.5), lambda x: (x != 0) * x),
    *(torch.atan, torch.tan, torch.sinh, torch.cosh, torch.expm1, torch.exp2, lambda x: (x.abs() + 1).log2()),
    *(lambda x: torch.asin(x / 9), lambda x: torch.acos(x / 9), lambda x: (x.abs() + 1).log10(), lambda x: x.min(-x)),
    *(lambda x: (x > 0).type_as(x) + torch.arange(8).type_as(x), lambda x: x + (-x).zero_(), lambda x: x.max(-x)),
    *(lambda x: torch.nan_to_num(x / (x > 0), 0.5, 2.0, -3.0), lambda x: x + torch.ones_like(x, dtype=torch.long)),
    *(lambda x: x + torch.zeros_like(x, dtype=torch.bool), lambda x: x + torch.full_like(x, 2, dtype=torch.int)),
    *(lambda x: x * torch.arange(8.0), lambda x: x + torch.ones(4, 1, 1), lambda x: x.detach() + x.double().float()),
)

AXES = (
    *(lambda x: x.mean((2, 3)), lambda x: x.mean(1), lambda x: x.mean(2, keepdim=True), lambda x: x.sum((1, 3))),
    *(lambda x: x.amax((2, 3)), lambda x: x.max(1)[0], lambda x: x.var((2, 3)), lambda x: x.std(1, unbiased=False)),
    *(lambda x: torch.cat([x, x[:, :2], 2 * x], 1), lambda x: torch.stack([x, 2 * x], 2).flatten(1, 2)),
    *(lambda x: x.chunk(2, 1)[1], lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), lambda x: x[:, 1:3, ::2, 2:-1]),
    *(lambda x: x[:, 0], lambda x: x.flip(3), lambda x: x.roll((1, 2), (2, 3)), lambda x: x.unbind(1)[1]),
    *(lambda x: x.permute(0, 2, 3, 1).reshape(-1, 16, 16).transpose(1, 2), lambda x: x.unsqueeze(1).squeeze(1)),
    *(lambda x: F.normalize(x, dim=1), lambda x: x.view(x.size(0), 2, 2, 8, 8).transpose(1, 2).reshape(x.shape)),
    *(lambda x: F.pixel_shuffle(x, 2), lambda x: F.pixel_unshuffle(x, 2), lambda x: F.channel_shuffle(x, 2)),
    *(lambda x: F.pad(x, (1, 2, 0, 1)), lambda x: F.pad(x, (1, 1, 2, 2), "reflect"), lambda x: F.pad(x, (0, -1, 1, 0))),
    *(lambda x: F.pad(x, (1, 1, 1, 1), "replicate"), lambda x: x.expand(-1, -1, 8, 8).repeat(1, 2, 1, 1)),
    *(lambda x: x.amin((1, 3)), lambda x: x.min(2)[1] + x.min(2)[0], lambda x: x.max(1, keepdim=True)[1] * 1.0),
    *(lambda x: x.argmax(1) * 0.1, lambda x: x.flatten(1).argmin(1, True) * 0.1, lambda x: x.logsumexp((1, 2))),
    *(lambda x: x.prod(1), lambda x: x - x.min() + x.max(), lambda x: F.local_response_norm(x, 3, 0.1)),
    *(lambda x: x.cumsum(2), lambda x: x[:, torch.tensor([2, 0])], lambda x: x.index_select(1, torch.tensor([3, 1]))),
)

POOLS = (
    *(
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    ),
    *(lambda x: F.max_pool2d(x, 2, 1, dilation=2), lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 8)),
    *(lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), lambda x: F.avg_pool2d(x, (2, 3), divisor_override=5)),
    *(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), lambda x: F.adaptive_avg_pool2d(x, 1)),
    *(lambda x: F.adaptive_avg_pool2d(x, (3, 5)), lambda x: F.adaptive_max_pool2d(x, (3, 1))),
    *(lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, (5, 11))),
    *(
        lambda x: F.interpolate(x, (5, 11), mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    ),
    *(lambda x: F.interpolate(x, (5, 11), mode="bilinear", align_corners=True),),
    *(lambda x: F.interpolate(x, (5, 11), mode="bicubic"), lambda x: F.interpolate(x, (5, 11), mode="nearest-exact")),
    *(lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1), lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1, True, False)),
    *(lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5), lambda x: F.adaptive_max_pool1d(x.flatten(2), 5)),
    *(lambda x: F.unfold(x, (3, 2), 2, 1, (2, 1)), lambda x: F.avg_pool3d(x[:, None], (2, 3, 3), 2, 1)),
)


@pytest.mark.parametrize(
    "functions", [ACTIVATIONS, ENTRYWISE, AXES, POOLS], ids=["activations", "entries", "axes", "pools"]
)
def test_functions_equal_pytorchs(functions: tuple[Callable[..., Any], ...]) -> None:
    assert_same(Computed(lambda x: torch.cat([function(x).flatten(1) for function in functions], 1)))


def test_functions_have_pytorchs_gradients() -> None:
    functions = ACTIVATIONS + POOLS
    module = randomized(Computed(lambda x: torch.cat([f(x).flatten(1) for f in functions], 1)))
    classifier, variables = Classifier.from_torch(module, (8, 8, 3))
    images = images_of((8, 8, 3))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(classifier.logits(v, images)[0]))))
    found = torch_state(classifier, gradient(variables))
    module(pixels(images)).sin().sum().backward()
    for name, parameter in module.named_parameters():
        assert_near(found[name], parameter.grad)  # Also where windows overlap and where values are clipped.


def test_convolutions_and_normalizations_equal_pytorchs() -> None:
    assert_same(
        flat(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4),
            nn.GroupNorm(2, 8),
            nn.PReLU(),
            nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8),
            nn.BatchNorm2d(8, momentum=None),
            nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2),
            nn.InstanceNorm2d(6, affine=True),
            nn.Dropout2d(),
            nn.ConvTranspose2d(6, 4, 2, dilation=2),
            nn.BatchNorm2d(4, affine=False),
            nn.LayerNorm([10, 10]),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
            nn.Flatten(),
            nn.BatchNorm1d(200),
            nn.Dropout(),
        )
    )


def test_computed_weights_equal_pytorchs() -> None:
    torch.manual_seed(0)
    utils, norms = nn.utils, nn.utils.parametrizations
    module = flat(
        utils.weight_norm(nn.Conv2d(3, 4, 3)),
        norms.weight_norm(nn.Conv2d(4, 4, 3, padding="same"), dim=None),
        utils.spectral_norm(nn.Conv2d(4, 4, 2)),
        norms.spectral_norm(nn.Conv2d(4, 4, 2)),
        nn.Flatten(2),
        nn.Conv1d(4, 4, 4, padding="same", dilation=2),
        norms.orthogonal(nn.Linear(16, 16)),
    )
    classifier, variables = Classifier.from_torch(module.eval(), (8, 8, 3))
    images = images_of((8, 8, 3))
    with torch.no_grad():
        assert_near(classifier.logits(variables, images)[0], module(pixels(images)))


class Tokens(torch.nn.Module):
    """What transformers are made of: a class token, embeddings of positions, attention of four kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Embedding(5, 8)
        self.register_buffer("order", torch.arange(5), persistent=False)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.RMSNorm(8)
        self.mix = nn.Conv1d(5, 5, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions(self.order)
        x = self.layer(x)
        x = x + self.attention(x, x, x, need_weights=True)[0]
        x = self.mix(self.norm(x))
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.3)
        x = x + torch.einsum("bij,bjc->bic", torch.baddbmm(x @ x.mT, x, x.mT, alpha=0.1).softmax(-1), x)
        return self.head(x[:, 0])


def test_transformers_equal_pytorchs() -> None:
    classifier = assert_same(Tokens())
    assert [tensor.name for tensor in classifier.network.tensors if not tensor.saved] == ["order"]


def test_every_operator_is_named_as_in_pytorch() -> None:
    for name in OPERATORS:
        packet, _, overload = name.partition(".")
        assert packet == "python" or (
            hasattr(torch.ops.aten, packet) and (not overload or hasattr(getattr(torch.ops.aten, packet), overload))
        )


def test_normalizations_with_and_without_running_statistics_equal_pytorchs() -> None:
    torch.manual_seed(0)
    assert_same(
        flat(
            nn.Conv2d(3, 6, 3),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.ReLU(),
            nn.BatchNorm2d(6, track_running_stats=False),
            nn.InstanceNorm2d(6, track_running_stats=True, momentum=0.3),
            nn.Flatten(2),
            nn.InstanceNorm1d(6, track_running_stats=True),
        )
    )


# Networks


class Kuangliu(torch.nn.Module):
    """A CIFAR ResNet with ``shortcut`` and ``linear``, functional rectifiers and pooling, and its own normalization."""

    class Block(torch.nn.Module):
        def __init__(self, fan_in: int, features: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(fan_in, features, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(features)
            self.shortcut = nn.Sequential()
            if stride != 1 or fan_in != features:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(fan_in, features, 1, stride, bias=False), nn.BatchNorm2d(features)
                )

        def forward(self, x: Any) -> Any:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            out += self.shortcut(x)
            return F.relu(out)

    def __init__(self, width: int = 4, classes: int = 4) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1))
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(self.Block(width, width, 1), self.Block(width, width, 1))
        self.layer2 = nn.Sequential(self.Block(width, 2 * width, 2))
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Any) -> Any:
        out = F.relu(self.bn1(self.conv1((x - self.mean) / 0.25)))
        out = F.avg_pool2d(self.layer2(self.layer1(out)), 4)
        return self.linear(out.view(out.size(0), -1))


def test_the_users_own_resnet_equals_pytorchs_and_has_its_layers() -> None:
    torch.manual_seed(0)
    classifier = assert_same(Kuangliu())
    assert classifier.head_path == ("linear",)
    assert classifier.map_layers == (("layer1",), ("layer2",))
    feeding = classifier.conv_feeding_norm(Classifier.from_torch(Kuangliu(), (8, 8, 3))[1], images_of((8, 8, 3)))
    assert feeding["layer2", "0", "shortcut", "1"] == ("layer2", "0", "shortcut", "0")
    assert len(feeding) == 8


@pytest.mark.parametrize("stem", ["pooled", "small"])
def test_the_stem_that_shapes_do_not_determine_is_the_modules(stem: str) -> None:
    module = torch_resnet(torch, 4, 2, (1, 1, 1, 1), False, True)
    module.conv1.stride = (2, 2) if stem == "pooled" else (1, 1)
    assert_same(module, (16, 16, 3))


def test_float64_agrees_to_nine_digits() -> None:
    torch.manual_seed(0)
    with jax.enable_x64(True):
        assert_same(Kuangliu().double(), tolerance=1e-9)


def test_torchvision_networks_equal_pytorchs() -> None:
    models = torchvision_models()
    torch.manual_seed(0)
    classifier = assert_same(models.squeezenet1_1(num_classes=4), (32, 32, 3))
    with pytest.raises(UserError, match="needs a linear head"):
        classifier.head_weights({})


# The exported classifier


@pytest.fixture(scope="module")
def kuangliu() -> tuple[Any, Classifier, Variables]:
    torch.manual_seed(0)
    module = randomized(Kuangliu())
    return module, *Classifier.from_torch(module, torch.zeros(1, 3, 8, 8))


def test_equal_modules_make_equal_classifiers(kuangliu: tuple[Any, Classifier, Variables]) -> None:
    module, classifier, _ = kuangliu
    again, _ = Classifier.from_torch(copy.deepcopy(module), (3, 8, 8))
    assert again == classifier
    assert hash(again) == hash(classifier)
    other, _ = Classifier.from_torch(Kuangliu(6), (8, 8, 3))
    assert other != classifier


def test_export_leaves_the_module_as_it_is(kuangliu: tuple[Any, Classifier, Variables]) -> None:
    module = Kuangliu()
    module.train()
    module.bn1.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    Classifier.from_torch(module, (8, 8, 3))
    assert module.training
    assert not module.bn1.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_weights_load_into_the_module(
    kuangliu: tuple[Any, Classifier, Variables], suffix: str, tmp_path: Path
) -> None:
    module, classifier, variables = kuangliu
    bj.save_torch(tmp_path / f"a{suffix}", classifier, variables)
    if suffix == ".pt":
        state = torch.load(tmp_path / "a.pt", weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(tmp_path / "a.safetensors")
    other = Kuangliu()
    other.load_state_dict(state)
    for name, tensor in module.state_dict().items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: nn.DataParallel(net),
        lambda net: torch.compile(net),
        lambda net: nn.DataParallel(torch.compile(net)),
        lambda net: net.__setattr__("layer2", nn.DataParallel(net.layer2)) or net,
    ],
    ids=["data-parallel", "compiled", "both", "inside"],
)
def test_what_is_around_a_module_is_in_the_names_that_are_written(wrap: Any, tmp_path: Path) -> None:
    module = wrap(Kuangliu(3))
    classifier, variables = Classifier.from_torch(module, (8, 8, 3))
    bounds = jax.tree.map(lambda most: 0.4 * most, classifier.activations(variables, images_of((8, 8, 3))))
    bj.save_torch(tmp_path / "a.pt", classifier, {**variables, "bounds": bounds})
    saved = torch.load(tmp_path / "a.pt")
    assert list(saved["model"]._metadata) == list(module.state_dict()._metadata)
    module.load_state_dict(saved["model"])
    apply_bounds(module, saved["bounds"])


class Counting(torch.nn.Linear):
    """A layer that keeps more than tensors."""

    seen: Any = None

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_the_extra_state_of_layers_is_written(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), Counting(192, 3))
    module[1].seen = (3, "all")
    classifier, variables = Classifier.from_torch(module, (8, 8, 3))
    bj.save_torch(tmp_path / "a.pt", classifier, variables)
    other = nn.Sequential(nn.Flatten(), Counting(192, 3))
    other.load_state_dict(torch.load(tmp_path / "a.pt"))
    assert other[1].seen == (3, "all")
    with pytest.raises(UserError, match=r"1._extra_state is no tensor, which such a file cannot hold; give .pt"):
        bj.save_torch(tmp_path / "a.safetensors", classifier, variables)


def test_tied_weights_stay_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.head = nn.Linear(3, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.b(self.a(x.mean((2, 3))).relu()))

    module = Tied()
    classifier, variables = Classifier.from_torch(module, (8, 8, 3))
    assert len(jax.tree.leaves(variables)) == 5
    assert set(torch_state(classifier, variables)) == set(module.state_dict())


def test_bounds_of_rectifiers_reach_pytorch(kuangliu: tuple[Any, Classifier, Variables], tmp_path: Path) -> None:
    _, classifier, variables = kuangliu
    images = images_of((8, 8, 3), 16)
    largest = classifier.activations(variables, images)
    assert len(jax.tree.leaves(largest)) == 7
    bounded = {**variables, "bounds": jax.tree.map(lambda most: 0.4 * most, largest)}
    clipped = classifier.logits(bounded, images)[0]
    assert float(jnp.abs(clipped - classifier.logits(variables, images)[0]).max()) > 0.01
    bj.save_torch(tmp_path / "a.pt", classifier, bounded)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    other = Kuangliu().eval()
    other.load_state_dict(saved["model"])
    with torch.no_grad():
        assert_near(clipped, apply_bounds(other, saved["bounds"])(pixels(images)))


def test_bounds_of_tokens_reach_pytorch(tmp_path: Path) -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.head = nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.act(self.up(x.flatten(2).mT)).mean(1))

    module, images = Mlp().eval(), images_of((8, 8, 3))
    classifier, variables = Classifier.from_torch(module, (8, 8, 3))
    bounded = {**variables, "bounds": jax.tree.map(lambda most: 0.5 * most, classifier.activations(variables, images))}
    clipped = classifier.logits(bounded, images)[0]
    bj.save_torch(tmp_path / "a.safetensors", classifier, bounded)
    bounds = classifier.network.bounds_by_module(bounded)
    assert bounds["act"].shape == (1, 6)
    with torch.no_grad():
        assert_near(clipped, apply_bounds(module, bounds)(pixels(images)))


# Heads


def test_a_convolution_at_the_end_is_a_linear_head() -> None:
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = assert_same(module)
    variables = Classifier.from_torch(module, (8, 8, 3))[1]
    assert classifier.head_path == ("2",)
    assert classifier.head_weights(variables)[0].shape == (5, 3)


def test_what_keeps_the_order_of_classes_is_left_out_behind_the_head() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.LogSoftmax(1)).eval()
    classifier, variables = Classifier.from_torch(module, (8, 8, 3))
    images = images_of((8, 8, 3))
    logits, _ = classifier.logits(variables, images)
    with torch.no_grad():
        assert_near(jax.nn.log_softmax(logits), module(pixels(images)))
        assert_near(logits, module[:2](pixels(images)))


def test_logits_behind_a_named_head_are_the_modules_and_tac_says_what_it_needs() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    classifier, variables = Classifier.from_torch(module, (8, 8, 3), head="1")
    images = images_of((8, 8, 3))
    with torch.no_grad():
        assert_near(classifier.logits(variables, images)[0], module(pixels(images)))
    with pytest.raises(UserError, match="linear"):
        classifier.head_weights(variables)


class Shared(torch.nn.Module):
    """A head that shares its weight, its bias or both with the layer before it."""

    def __init__(self, weight: bool = False, bias: bool = False, mix_bias: bool = True, head_bias: bool = True) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3, bias=mix_bias)
        self.fc = nn.Linear(3, 3, bias=head_bias)
        self.fc.weight = self.mix.weight if weight else self.fc.weight
        self.fc.bias = self.mix.bias if bias else self.fc.bias

    def forward(self, x: Any) -> Any:
        return self.fc(torch.tanh(self.mix(x.mean((2, 3)))))


@pytest.mark.parametrize(
    "shared",
    [
        {"weight": True, "mix_bias": False},
        {"weight": True, "head_bias": False},
        {"bias": True},
        {"weight": True, "bias": True},
    ],
    ids=["weight", "weight without bias", "bias", "both"],
)
def test_a_head_that_shares_its_tensors_is_no_linear_head(shared: dict[str, bool]) -> None:
    torch.manual_seed(0)
    classifier = assert_same(Shared(**shared))
    assert classifier.head_path == ("fc",)
    with pytest.raises(UserError, match="or it shares its weights"):
        classifier.head_weights({})


def test_a_parameter_of_two_names_may_be_the_heads_weight() -> None:
    module = Shared()
    module.prototypes = module.fc.weight  # The first name, since a module's own parameters precede its layers'.
    classifier = assert_same(module)
    assert (classifier.head_path, classifier.network.tail) == (("fc",), None)


# What is refused


def test_logits_that_differ_from_pytorchs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(OPERATORS["tanh"], function=lambda self: 1.1 * jnp.tanh(self))
    monkeypatch.setitem(OPERATORS, "tanh", wrong)
    with pytest.raises(UserError, match=r"Shared: its logits in JAX differ from PyTorch's by 0\.\d+, where"):
        Classifier.from_torch(Shared(), (4, 4, 3))


class Several(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        features = self.features(x)
        return features, self.fc(features)


class Spectral(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 3)

    def forward(self, x: Any) -> Any:
        return self.fc(torch.fft.fft2(x).abs().flatten(1))


class Branching(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x.flatten(1)[:, :3] if x.sum() > 0 else x.flatten(1)[:, 3:6]


class Fixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 3)

    def forward(self, x: Any) -> Any:
        return self.fc(x.reshape(2, 192))


class Sorting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    def forward(self, x: Any) -> Any:
        return self.inner(x.sort(dim=-1)[0])


def computed_head(change: Callable[[Any], Any]) -> Any:
    return nn.Sequential(nn.Flatten(), change(nn.Linear(192, 3)))


COMPUTED = r"the weight of its head \(1.*\) is computed, .* by torch.nn.utils.prune.remove or parametrize"


@pytest.mark.parametrize(
    ("module", "named", "words"),
    [
        (lambda: Branching(), None, "Branching cannot be exported"),
        (lambda: Fixed(), None, "Fixed fixes the number of images"),
        (lambda: Sorting(), None, "aten.sort"),
        (lambda: Spectral(), None, "its forward uses the operator aten.fft_fft2"),
        (lambda: Several(), None, "returns 2 tensors, expected logits alone"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), None, "layer '1' is lazy .* call the module once"),
        (lambda: nn.Flatten(), None, "no linear layer"),
        (lambda: computed_head(nn.utils.parametrizations.weight_norm), None, COMPUTED),
        (lambda: computed_head(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), "1", COMPUTED),
        (lambda: Computed(lambda x: F.adaptive_max_pool2d(x, 3, True)[1] * 0.1), None, "max_pool2d with indices"),
        (lambda: nn.Conv2d(3, 4, 1), None, "logits"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "fc", "'fc'"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3)), None, "batch normalization"),
        (lambda: {"weight": 1}, None, "expected a torch.nn.Module, got a dict"),
    ],
    ids=[
        *("branches", "fixed batch", "operator", "operator outside layers", "several tensors", "lazy", "no head"),
        *("normalized head", "pruned head", "indices"),
        *("no logits", "unknown head", "norm at the end", "no module"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    module: Callable[[], Any], named: str | None, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=words) as error:
        Classifier.from_torch(module(), (8, 8, 3), head=named)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_another_image_shape_and_other_variables_are_refused(
    kuangliu: tuple[Any, Classifier, Variables], tmp_path: Path
) -> None:
    _, classifier, variables = kuangliu
    with pytest.raises(UserError, match="exported for images of 8x8x3, these are 12x12x3"):
        classifier.logits(variables, jnp.zeros((1, 12, 12, 3), jnp.uint8))
    with pytest.raises(UserError, match="lack params/bn1/bias"):
        params = {**variables["params"], "bn1": {"scale": variables["params"]["bn1"]["scale"]}}
        classifier.logits({**variables, "params": params}, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(UserError, match="Kuangliu is a PyTorch module, which holds its weights"):
        classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(UserError, match="the variables lack params"):
        bj.save_torch(tmp_path / "model.pt", classifier, {"params": {}})
    for example, words in (((8, 8), "is no shape"), (32, "is a int"), ([[1]], "is a list of list")):
        with pytest.raises(UserError, match=words):
            Classifier.from_torch(Kuangliu(), example)
    with pytest.raises(UserError, match="head is a Linear"):
        Classifier.from_torch(Kuangliu(), (8, 8, 3), head=nn.Linear(2, 2))


def test_a_forward_of_any_arguments_receives_the_images(tmp_path: Path) -> None:
    module = torch.optim.swa_utils.AveragedModel(Kuangliu())
    classifier, variables = Classifier.from_torch(module, (8, 8, 3))
    bj.save_torch(tmp_path / "a.pt", classifier, variables)
    module.load_state_dict(torch.load(tmp_path / "a.pt"))


def test_examples_and_normalizations_as_people_have_them() -> None:
    module, images = Kuangliu(), images_of((8, 8, 3))
    expected, _ = Classifier.from_torch(module, images, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    for example in (torch.tensor(images), pixels(images), images[0], bj.make_dataset(images, np.zeros(4, int)).images):
        kinds: tuple[Any, ...] = (np.array, torch.tensor, list)
        for kind in kinds:
            found, _ = Classifier.from_torch(module, example, mean=kind([0.5] * 3), std=kind([0.25] * 3))
            assert (found, hash(found)) == (expected, hash(expected))
    with pytest.raises(UserError, match="pixels up to 255; divide mean and std by 255"):
        dataclasses.replace(expected, mean=(123.7, 116.3, 103.5))


# Defenses


DEFENSES: dict[str, dict[str, Any]] = {
    "d3": {"steps": 1},
    "tac": {},
    "clp": {},
    "anp": {"steps": 1},
    "nad": {"steps": 1, "teacher_steps": 1, "betas": (1.0, 1.0)},
    "fine_pruning": {"steps": 1},
    "mm_bm": {"bound_epochs": 1, "places": ("layer1/0", "layer2/0/bn1")},
    "pad_ft": {"bound_epochs": 1},
}


@pytest.mark.parametrize("name", DEFENSES)
def test_defenses_work_on_modules(kuangliu: tuple[Any, Classifier, Variables], name: str) -> None:
    _, classifier, variables = kuangliu
    images = images_of((8, 8, 3), 16)
    data = bj.make_dataset(images, np.arange(16) % 4, 4)
    defense: Any = dataclasses.replace(bj.DEFENSES[name](), **DEFENSES[name])
    repair = defense.repair(jax.random.key(0), classifier, variables, data)
    other = Kuangliu().eval()
    other.load_state_dict(
        {key: torch.tensor(value) for key, value in torch_state(classifier, repair.variables).items()}
    )
    apply_bounds(other, classifier.network.bounds_by_module(repair.variables))
    with torch.no_grad():
        assert_near(classifier.logits(repair.variables, images)[0], other(pixels(images)))


def test_what_trains_from_scratch_says_what_it_needs(kuangliu: tuple[Any, Classifier, Variables]) -> None:
    _, classifier, variables = kuangliu
    data = bj.make_dataset(images_of((8, 8, 3), 16), np.arange(16) % 4, 4)
    with pytest.raises(UserError, match="train from scratch"):
        bj.DEFENSES["dbd"]().repair(jax.random.key(0), classifier, variables, data)


def test_preact_resnet_equals_the_packages_own() -> None:
    torch.manual_seed(0)
    module = randomized(torch_preact_resnet18(torch, 4, 2))
    own, own_variables = bj.load_torch(module.state_dict(), "preact_resnet18")
    read, variables = Classifier.from_torch(module, (16, 16, 3))
    images = images_of((16, 16, 3))
    one, other = in_both_modes(own, own_variables, images), in_both_modes(read, variables, images)
    assert_near(one[0], other[0])
    assert_near(one[1], other[1])
