"""ResNets, VGG19-BN and vision transformers, compared with published counts, PyTorch and NumPy."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_near, draw, random_variables, torch_state
from scipy.special import erf
from torch_networks import torch_resnet, torch_vgg19

from backdoor_jax import Classifier, UserError, build_classifier
from backdoor_jax.models import ResNet, Variables, VisionTransformer
from backdoor_jax.models.layers import GELU, ReLU, adaptive_avg_pool, max_pool

CLASSES, WIDTH = 5, 2
NETWORKS: dict[str, tuple[Classifier, int, int]] = {
    "resnet18": (build_classifier("resnet18", CLASSES, WIDTH, stem="small"), 16, 17),
    "bottlenecks": (
        Classifier(ResNet(CLASSES, WIDTH, (1, 1, 1, 1), True, "imagenet"), CLASSES, head_path=("fc",)),
        32,
        1 + 4 * 3,
    ),
    "vgg19_bn": (build_classifier("vgg19_bn", CLASSES, WIDTH), 32, 16 + 2),
    "vit": (Classifier(VisionTransformer(CLASSES, 4, depth=2), CLASSES, head_path=("heads_head",)), 12, 2),
}
"""Each with its images' size and how many activations it has. The second is ResNet-50 with fewer blocks."""


@functools.cache
def example(name: str) -> tuple[Variables, jax.Array]:
    """Random weights, and images, for one of `NETWORKS`."""
    classifier, size, _ = NETWORKS[name]
    images = jnp.asarray(np.random.default_rng(3).integers(0, 256, (8, size, size, 3), dtype=np.uint8))
    return random_variables(classifier, images), images


@jax.jit
def evaluated(classifier: Classifier, variables: Variables, images: jax.Array) -> tuple[jax.Array, Variables]:
    """Logits in evaluation mode, and each activation's largest value per channel."""
    return classifier.logits(variables, images)[0], classifier.activations(variables, images)


@jax.jit
def trained(classifier: Classifier, variables: Variables, images: jax.Array) -> tuple[jax.Array, Variables, Any]:
    """Logits in training mode, the variables after them, and the gradient of a random weighting of the logits."""

    def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, Variables]]:
        logits, new = classifier.logits({**variables, "params": params}, images, train=True)
        return jnp.sum(logits * draw(*logits.shape)), (logits, new)

    gradient, (logits, new) = jax.grad(loss, has_aux=True)(variables["params"])
    return logits, new, gradient


# Published facts


@pytest.mark.parametrize(
    ("classifier", "count"),
    [
        (build_classifier("resnet18", 1000, stem="imagenet"), 11_689_512),
        (build_classifier("resnet34", 1000, stem="imagenet"), 21_797_672),
        (build_classifier("resnet50", 1000, stem="imagenet"), 25_557_032),
        (build_classifier("vgg19_bn", 1000), 143_678_248),
        (build_classifier("vit_tiny", 1000, patch=16), 5_717_416),
        (Classifier(VisionTransformer(1000, patch=16, heads=12), 1000), 86_567_656),
    ],
    ids=["resnet18", "resnet34", "resnet50", "vgg19_bn", "vit_tiny", "vit_base"],
)
def test_the_number_of_parameters_is_the_published_one(classifier: Classifier, count: int) -> None:
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    params = jax.eval_shape(classifier.init, jax.random.key(0), images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    ("name", "options", "latent"),
    [
        ("resnet18", {}, 8),
        ("resnet18", {"stem": "imagenet"}, 8),
        ("resnet34", {}, 8),
        ("resnet50", {}, 32),
        ("vgg19_bn", {}, 64),
        ("vit_tiny", {}, 3),
        ("vit_tiny", {"patch": 8}, 3),
    ],
)
def test_shapes_and_the_path_of_the_head(name: str, options: dict[str, Any], latent: int) -> None:
    classifier = build_classifier(name, CLASSES, WIDTH, **options)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8)
    variables = jax.eval_shape(classifier.init, jax.random.key(0), images)
    assert jax.eval_shape(classifier.features, variables, images)[0].shape == (4, latent * WIDTH)
    kernel, bias = jax.eval_shape(classifier.head_weights, variables)
    assert kernel.shape == (latent * WIDTH, CLASSES) and bias.shape == (CLASSES,)


# Independent networks


@pytest.mark.parametrize("name", ["resnet18", "bottlenecks", "vgg19_bn"])
def test_logits_statistics_and_gradients_equal_those_of_an_independent_pytorch_network(name: str) -> None:
    torch = pytest.importorskip("torch")
    reference = {
        "resnet18": lambda: torch_resnet(torch, CLASSES, WIDTH, (2, 2, 2, 2), False, True),
        "bottlenecks": lambda: torch_resnet(torch, CLASSES, WIDTH, (1, 1, 1, 1), True, False),
        "vgg19_bn": lambda: torch_vgg19(torch, CLASSES, WIDTH),
    }[name]()
    classifier = NETWORKS[name][0]
    variables, images = example(name)
    absent = reference.load_state_dict(torch_state(torch, variables), strict=False)
    assert not absent.unexpected_keys and all("num_batches_tracked" in key for key in absent.missing_keys)
    x = torch.tensor(np.asarray(images) / 255, dtype=torch.float32).permute(0, 3, 1, 2)

    with torch.no_grad():
        assert_near(evaluated(classifier, variables, images)[0], reference.eval()(x))
    # In float64: normalizing 8 values per channel, as VGG's last layers do, magnifies float32's rounding without limit.
    expected = reference.double().train()(x.double())
    (expected * torch.tensor(np.asarray(draw(*expected.shape)))).sum().backward()
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        got, new, gradient = trained(classifier, double, images)
    assert_near(got, expected.detach(), 1e-5)
    after = reference.state_dict()
    for key, value in torch_state(torch, {"batch_stats": new["batch_stats"]}).items():
        assert_near(value, after[key], 1e-5)
    gradients = {key: value.grad for key, value in reference.named_parameters()}
    largest = max(float(value.abs().max()) for value in gradients.values())
    for key, value in torch_state(torch, {"params": gradient}).items():
        np.testing.assert_allclose(value, gradients[key], rtol=1e-4, atol=1e-6 * largest)


def numpy_vit(params: Any, x: np.ndarray, patch: int, heads: int) -> np.ndarray:
    """A vision transformer's logits, image by image and head by head, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def dense(name: str, x: np.ndarray, layer: Any) -> np.ndarray:
        return x @ layer[name]["kernel"] + layer[name]["bias"]

    def norm(name: str, x: np.ndarray, layer: Any) -> np.ndarray:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return scaled * layer[name]["scale"] + layer[name]["bias"]

    logits = []
    for image in x:
        tokens = [params["class_token"][0, 0]]
        for row in range(0, image.shape[0], patch):
            for column in range(0, image.shape[1], patch):
                pixels = image[row : row + patch, column : column + patch, :, None]
                tokens.append((pixels * params["conv_proj"]["kernel"]).sum((0, 1, 2)) + params["conv_proj"]["bias"])
        t = np.stack(tokens) + params["pos_embedding"][0]
        for number in range(sum(name.startswith("encoder_layer") for name in params)):
            layer = params[f"encoder_layer_{number}"]
            mixed = dense("in_proj", norm("ln_1", t, layer), layer)
            size = t.shape[1] // heads
            outputs = []
            for head in range(heads):
                query, key, value = (mixed[:, part * t.shape[1] + head * size :][:, :size] for part in range(3))
                scores = np.exp(query @ key.T / size**0.5)
                outputs.append(scores / scores.sum(1, keepdims=True) @ value)
            t = t + dense("out_proj", np.concatenate(outputs, 1), layer)
            hidden = dense("mlp_0", norm("ln_2", t, layer), layer)
            t = t + dense("mlp_3", hidden * (1 + erf(hidden / 2**0.5)) / 2, layer)
        logits.append(dense("heads_head", norm("ln", t[0], params), params))
    return np.stack(logits)


def test_a_vision_transformers_logits_equal_those_of_numpy_in_both_modes() -> None:
    classifier = NETWORKS["vit"][0]
    variables, images = example("vit")
    expected = numpy_vit(variables["params"], np.asarray(images, np.float64) / 255, patch=4, heads=3)
    assert_near(evaluated(classifier, variables, images)[0], expected)
    logits, new, _ = trained(classifier, variables, images)
    assert_near(logits, expected)
    chex.assert_trees_all_equal(new, variables)


# Gradients and statistics


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_has_a_finite_gradient_and_training_changes_only_statistics(name: str) -> None:
    variables, images = example(name)
    _, new, gradient = trained(NETWORKS[name][0], variables, images)
    chex.assert_tree_all_finite(gradient)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(np.asarray(leaf)).max() > 0, jax.tree_util.keystr(path)
    assert set(new) == set(variables)
    chex.assert_trees_all_equal(new["params"], variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(new.get("batch_stats", {})):
        old = functools.reduce(lambda tree, entry: tree[entry.key], path, variables["batch_stats"])
        assert np.abs(np.asarray(leaf) - np.asarray(old)).max() > 0, jax.tree_util.keystr(path)


# Bounds


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_clip_every_activation_and_change_nothing_where_they_exceed_it(name: str) -> None:
    classifier, _, count = NETWORKS[name]
    variables, images = example(name)
    plain, upper = evaluated(classifier, variables, images)
    leaves, treedef = jax.tree.flatten(upper)
    assert len(leaves) == count

    clipped, _ = evaluated(classifier, {**variables, "bounds": jax.tree.map(lambda value: value + 1, upper)}, images)
    assert_near(clipped, plain, 1e-5)
    for low in range(count):
        bounds = [value / 4 if index == low else value + 1 for index, value in enumerate(leaves)]
        clipped, reached = evaluated(classifier, {**variables, "bounds": jax.tree.unflatten(treedef, bounds)}, images)
        assert float(jnp.abs(clipped - plain).max()) > 1e-3, jax.tree.unflatten(treedef, range(count))
        np.testing.assert_allclose(jax.tree.leaves(reached)[low], bounds[low], rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "function"),
    [(ReLU(), lambda x: np.maximum(x, 0)), (GELU(), lambda x: x * (1 + erf(x / 2**0.5)) / 2)],
    ids=["relu", "gelu"],
)
def test_an_activation_clips_each_channel_and_reports_its_largest_value(layer: nn.Module, function: Any) -> None:
    x = draw(2, 6, 4).at[..., 0].add(-5)
    expected = function(np.asarray(x, np.float64))
    plain, sown = layer.apply({}, x, mutable=["activations"])
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)
    largest = np.maximum(expected.max((0, 1)), 0)
    np.testing.assert_allclose(sown["activations"]["upper"], largest, rtol=1e-5)
    assert largest[0] == 0
    upper = jnp.array([0.0, 0.1, 0.5, 9.0])
    clipped = layer.apply({"bounds": {"upper": upper}}, x)
    np.testing.assert_allclose(np.asarray(clipped), np.minimum(expected, np.asarray(upper)), rtol=1e-5, atol=1e-6)


# Pooling


@pytest.mark.parametrize(("size", "padding", "shape"), [(2, 0, (5, 6)), (3, 1, (8, 6)), (3, 1, (5, 7))])
def test_max_pooling_and_its_gradient_equal_xlas(size: int, padding: int, shape: tuple[int, int]) -> None:
    x = draw(2, *shape, 3)

    def xlas(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (size, size), (2, 2), [(padding, padding)] * 2)

    (ours, ours_pull), (theirs, theirs_pull) = (
        jax.vjp(function, x) for function in (lambda x: max_pool(x, size, padding), xlas)
    )
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours_pull(draw(*ours.shape))[0], theirs_pull(draw(*ours.shape))[0], atol=1e-6)


def test_the_first_of_equal_values_gets_the_gradient_of_max_pooling_as_in_pytorch() -> None:
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x, 2)))(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])


@pytest.mark.parametrize("place", range(4))
def test_max_pooling_passes_on_nan(place: int) -> None:
    pooled = max_pool(jnp.arange(4.0).at[place].set(jnp.nan).reshape(1, 2, 2, 1), 2)
    assert jnp.isnan(pooled).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (7, 7), (9, 14), (8, 20)])
def test_adaptive_pooling_averages_over_pytorchs_windows(shape: tuple[int, int]) -> None:
    x = draw(2, *shape, 3)
    windows = [[range(i * length // 7, -(-(i + 1) * length // 7)) for i in range(7)] for length in shape]
    expected = [[np.asarray(x)[:, rows][:, :, columns].mean((1, 2)) for columns in windows[1]] for rows in windows[0]]
    got = adaptive_avg_pool(x, 7)
    np.testing.assert_allclose(got, np.transpose(expected, (2, 0, 1, 3)), rtol=1e-5, atol=1e-6)


def test_adaptive_pooling_equals_pytorchs() -> None:
    torch = pytest.importorskip("torch")
    for shape in ((1, 1), (3, 5), (7, 7), (8, 20)):
        x = draw(2, *shape, 3)
        expected = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2), 7)
        np.testing.assert_allclose(adaptive_avg_pool(x, 7), expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


# Initialization


@pytest.mark.parametrize("name", ["bottlenecks", "vgg19_bn", "vit"])
def test_new_weights_are_drawn_as_in_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backdoor_jax.models.vgg.GROUPS", (1, 1, 1, 1, 1))  # Compiles in a third of the time.
    new = NETWORKS[name][0].init(jax.random.key(0), example(name)[1])
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        deviation = expected_deviation(name, where, leaf.shape)
        if deviation == 0:
            assert np.all(leaf == (1 if where.endswith(("scale", "var")) else 0)), where
        else:
            spread = float(np.sqrt(np.mean(np.asarray(leaf) ** 2)))
            assert abs(spread - deviation) < 4 * deviation * (2 * leaf.size) ** -0.5, where


def expected_deviation(name: str, where: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a new weight; 0 for a constant."""
    layer, leaf = where.split("/")[-2:]
    fan_in, fan_out = np.prod(shape[:-1]), np.prod(shape[:-2]) * shape[-1]
    uniform = (3 * fan_in) ** -0.5
    match name, layer, leaf:
        case ("vit", "params", "pos_embedding"):
            return 0.02
        case ("vit", "mlp_0" | "mlp_3", "bias"):
            return 1e-6
        case ("vit", "conv_proj", "kernel"):
            return fan_in**-0.5
        case ("vit", "in_proj" | "mlp_0" | "mlp_3", "kernel"):
            return (2 / (shape[0] + shape[1])) ** 0.5
        case ("vit", "out_proj", "kernel") | (_, "fc", "kernel"):
            return uniform
        case (_, "fc", "bias"):
            return (3 * 32 * WIDTH) ** -0.5
        case ("vgg19_bn", _, "kernel") if len(shape) == 2:
            return 0.01
        case (_, _, "kernel") if len(shape) == 4:
            return (2 / fan_out) ** 0.5
    return 0.0


# Values, options and errors


def test_classifiers_are_equal_by_value_and_differ_by_their_options() -> None:
    for first, second in (
        (build_classifier("resnet18", 10, 8), build_classifier("resnet18", 10, 8, stem="small")),
        (build_classifier("vit_tiny", 10, 8), build_classifier("vit_tiny", 10, 8, patch=4)),
        (build_classifier("vgg19_bn", 10, 8), build_classifier("vgg19_bn", 10, 8)),
    ):
        assert first is not second and first == second and hash(first) == hash(second)
    several = [
        build_classifier("resnet18", 10, 8),
        build_classifier("resnet18", 10, 8, stem="imagenet"),
        build_classifier("resnet34", 10, 8),
        build_classifier("resnet50", 10, 8),
        build_classifier("vit_tiny", 10, 8),
        build_classifier("vit_tiny", 10, 8, patch=8),
    ]
    assert len(set(several)) == len(several)


def test_equal_classifiers_share_a_trace_and_others_do_not() -> None:
    traced = []

    @jax.jit
    def count(classifier: Classifier, labels: jax.Array) -> jax.Array:
        traced.append(classifier)
        return labels % classifier.num_classes

    for stem in ("small", "imagenet", "small", "imagenet"):
        count(build_classifier("resnet18", CLASSES, WIDTH, stem=stem), jnp.arange(9))
    assert len(traced) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg19_bn", {"stem": "small"}, "model 'vgg19_bn' has no stem; .*: resnet10, resnet18, resnet34, resnet50"),
        ("preact_resnet18", {"patch": 4}, "model 'preact_resnet18' has no patch; .*: vit_tiny"),
        ("resnet18", {"stem": "large"}, "stem is 'large', expected 'small', 'small_pool'"),
        ("vit_tiny", {"patch": 0}, "patch 1 or more"),
    ],
)
def test_an_impossible_option_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_classifier(name, 10, **options)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg19_bn", (31, 40), "31x40 are too small; give 32x32 or larger"),
        ("vit_tiny", (18, 18), "patches of 4x4 .* got 18x18"),
        ("vit_tiny", (16, 32), "square images .* got 16x32"),
    ],
)
def test_images_that_a_network_cannot_take_are_refused(name: str, shape: tuple[int, int], message: str) -> None:
    images = jax.ShapeDtypeStruct((1, *shape, 3), jnp.uint8)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(build_classifier(name, 10, 2).init, jax.random.key(0), images)


def test_a_vision_transformer_refuses_other_image_sizes_than_its_own() -> None:
    variables, images = example("vit")
    assert variables["params"]["pos_embedding"].shape == (1, 1 + 3 * 3, 12)
    with pytest.raises(UserError, match="for images of 12x12, got 16x16; resize them, or make and train one for 16x16"):
        NETWORKS["vit"][0].logits(variables, jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))))
