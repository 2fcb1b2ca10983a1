"""Convolution, layers, PreAct-ResNet18 and `Classifier`, against XLA, NumPy and PyTorch."""

import itertools
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_near, draw, random_variables, torch_state
from torch_networks import torch_preact_resnet18

from backdoor_jax import Classifier, UserError, build_classifier
from backdoor_jax.data import Dataset
from backdoor_jax.models import MODELS, NORMALIZATIONS, Variables
from backdoor_jax.models.layers import BatchNorm, ReLU, torch_bias, torch_uniform

CLASSES, WIDTH = 5, 4


def test_batch_norm_equals_pytorchs_in_training_and_evaluation() -> None:
    torch = pytest.importorskip("torch")
    batches = [3 * draw(4, 3, 2, 5, seed=seed) + 1 for seed in range(2)]
    params = {"scale": draw(5, seed=7), "bias": draw(5, seed=8)}
    ours, theirs = BatchNorm(), torch.nn.BatchNorm2d(5)
    theirs.load_state_dict(
        {"weight": torch.tensor(params["scale"].tolist()), "bias": torch.tensor(params["bias"].tolist())}, strict=False
    )
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}

    def reference(x: jax.Array) -> np.ndarray:
        return theirs(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()

    for x in batches:
        out, new = ours.apply(variables, x, True, mutable=["batch_stats"])
        assert_near(out, reference(x))
        variables = {**variables, **new}
        assert_near(variables["batch_stats"]["mean"], theirs.running_mean)
        assert_near(variables["batch_stats"]["var"], theirs.running_var)
    theirs.eval()
    assert_near(ours.apply(variables, batches[0], False), reference(batches[0]))


def test_batch_norm_keeps_an_unbiased_and_exact_running_variance() -> None:
    x = 1000 + draw(4, 3, 2, 5)
    variables = BatchNorm().init(jax.random.key(0), x, False)
    _, new = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    flat = np.asarray(x, np.float64).reshape(-1, 5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-4)


def test_relu_clips_each_channel_at_its_bound() -> None:
    x = jnp.array([[-1.0, 2.0, 3.0], [0.5, -2.0, 9.0]])
    bounded = ReLU().apply({"bounds": {"upper": jnp.array([0.25, 5.0, 4.0])}}, x)
    np.testing.assert_array_equal(bounded, [[0, 2, 3], [0.25, 0, 4]])
    np.testing.assert_array_equal(ReLU().apply({}, x), [[0, 2, 3], [0.5, 0, 9]])


def test_biases_and_kernels_are_uniform_on_pytorchs_range(key: jax.Array) -> None:
    for values, fan_in in (
        (torch_bias(25)(key, (4000,)), 25),
        (torch_uniform(key, (3, 3, 4, 400)), 36),
        (torch_uniform(key, (25, 400)), 25),
    ):
        bound = fan_in**-0.5
        assert 0.99 * bound < float(values.max()) <= bound * (1 + 1e-6)
        assert -bound * (1 + 1e-6) <= float(values.min()) < -0.99 * bound
        assert float(jnp.std(values)) == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.fixture(scope="module")
def resnet() -> Classifier:
    return build_classifier("preact_resnet18", CLASSES, width=WIDTH, normalization="cifar10")


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def variables(resnet: Classifier, images: jax.Array) -> Variables:
    return random_variables(resnet, images)


@pytest.fixture(scope="module")
def logits(resnet: Classifier) -> Callable[[Variables, jax.Array], jax.Array]:
    return jax.jit(lambda variables, images: resnet.logits(variables, images)[0])


def test_logits_and_statistics_equal_those_of_an_independent_pytorch_network(
    resnet: Classifier,
    variables: Variables,
    images: jax.Array,
    logits: Callable[[Variables, jax.Array], jax.Array],
) -> None:
    torch = pytest.importorskip("torch")
    reference = torch_preact_resnet18(torch, CLASSES, WIDTH)
    absent = reference.load_state_dict(torch_state(torch, variables), strict=False)
    assert not absent.unexpected_keys and all("num_batches_tracked" in name for name in absent.missing_keys)
    mean, std = NORMALIZATIONS["cifar10"]
    x = torch.tensor((np.asarray(images) / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)

    with torch.no_grad():
        assert_near(logits(variables, images), reference.eval()(x))
        got, new = jax.jit(lambda variables, images: resnet.logits(variables, images, train=True))(variables, images)
        assert_near(got, reference.train()(x))
    trained = reference.state_dict()
    for name, value in torch_state(torch, {"batch_stats": new["batch_stats"]}).items():
        assert_near(value, trained[name])
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])


def test_new_weights_are_drawn_as_in_pytorch(resnet: Classifier, images: jax.Array) -> None:
    new = resnet.init(jax.random.key(0), images)
    assert set(new) == {"params", "batch_stats"}
    kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        name, values = path[-1].key, np.abs(np.asarray(leaf))
        if name == "kernel":
            kernels += 1
            bound = np.prod(leaf.shape[:-1]) ** -0.5
            assert 0.8 * bound < values.max() <= bound * (1 + 1e-6), jax.tree_util.keystr(path)
            assert abs(np.mean(leaf)) < 4 * bound * (3 * leaf.size) ** -0.5, jax.tree_util.keystr(path)
        elif path[-2].key == "linear":
            assert 0 < values.max() <= (8 * WIDTH) ** -0.5
        else:
            assert np.all(leaf == (1 if name in ("scale", "var") else 0)), jax.tree_util.keystr(path)
    assert kernels == 1 + 16 + 3 + 1


def test_activations_are_the_maxima_per_channel_of_all_sixteen_rectifiers(
    resnet: Classifier, variables: Variables, images: jax.Array
) -> None:
    upper = resnet.activations(variables, images)
    _, kept = resnet.network.apply(
        variables,
        resnet.normalize(images),
        False,
        capture_intermediates=lambda module, _: isinstance(module, BatchNorm),
        mutable=["intermediates"],
    )
    assert len(jax.tree.leaves(upper)) == 16
    for block, stage in itertools.product(range(2), range(1, 5)):
        for which in (1, 2):
            (before,) = kept["intermediates"][f"layer{stage}_{block}"][f"bn{which}"]["__call__"]
            expected = np.maximum(np.asarray(before).max((0, 1, 2)), 0)
            assert_near(upper[f"layer{stage}_{block}"][f"relu{which}"]["upper"], expected, 1e-5)


def test_bounds_above_every_activation_change_no_bit(
    resnet: Classifier, variables: Variables, images: jax.Array
) -> None:
    upper = resnet.activations(variables, images)
    plain = resnet.logits(variables, images)[0]
    for margin in (0.0, 1.0):
        bounds = jax.tree.map(lambda value, margin=margin: value + margin, upper)
        np.testing.assert_array_equal(resnet.logits({**variables, "bounds": bounds}, images)[0], plain)


def test_a_low_bound_on_any_of_the_sixteen_rectifiers_takes_effect(
    resnet: Classifier,
    variables: Variables,
    images: jax.Array,
    logits: Callable[[Variables, jax.Array], jax.Array],
) -> None:
    leaves, treedef = jax.tree.flatten(resnet.activations(variables, images))
    plain = logits(variables, images)
    for low in range(16):
        bounds = [value / 4 if index == low else value + 1 for index, value in enumerate(leaves)]
        clipped = logits({**variables, "bounds": jax.tree.unflatten(treedef, bounds)}, images)
        assert float(jnp.abs(clipped - plain).max()) > 1e-3, jax.tree.unflatten(treedef, range(16))


def test_classifiers_are_equal_and_hash_by_value() -> None:
    first, second = (build_classifier("preact_resnet18", 10, width=8, normalization="cifar10") for _ in range(2))
    assert first is not second and first == second and hash(first) == hash(second)
    for other in (
        build_classifier("preact_resnet18", 10, width=8),
        build_classifier("preact_resnet18", 10, width=4, normalization="cifar10"),
        build_classifier("preact_resnet18", 9, width=8, normalization="cifar10"),
    ):
        assert first != other


def test_an_equal_classifier_is_a_jit_argument_without_another_trace(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def scale(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
        return classifier.normalize(images).sum() + variables["params"]["linear"]["bias"].sum()

    network = type(tiny_classifier.network)
    for _ in range(2):
        scale(Classifier(network(3), 3), tiny_variables, tiny_data.images)
    with pytest.raises(AssertionError, match="traced"):
        scale(Classifier(network(3), 3, std=(2.0, 2.0, 2.0)), tiny_variables, tiny_data.images)


PUBLISHED = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""The published benchmark's, and torchvision's of ImageNet, copied from there and not from the package."""


@pytest.mark.parametrize("name", sorted({*NORMALIZATIONS, *PUBLISHED}))
def test_images_are_normalized_with_the_published_mean_and_deviation(name: str, images: jax.Array) -> None:
    got = build_classifier("preact_resnet18", 10, normalization=name).normalize(images)
    assert got.dtype == jnp.float32
    for channel, (mean, std) in enumerate(zip(*PUBLISHED[name], strict=True)):
        expected = (np.asarray(images, np.float64)[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(got[..., channel], expected, atol=1e-5)


def test_head_weights_reproduce_the_head(resnet: Classifier, variables: Variables) -> None:
    latent = draw(6, 8 * WIDTH)
    kernel, bias = resnet.head_weights(variables)
    assert kernel.shape == (8 * WIDTH, CLASSES) and bias.shape == (CLASSES,)
    assert_near(resnet.head(variables, latent), np.asarray(latent) @ np.asarray(kernel) + np.asarray(bias))


def test_head_weights_of_a_head_at_another_path_without_bias() -> None:
    classifier = Classifier(nn.Dense(2), 2, head_path=("tail", "out"))
    kernel, bias = classifier.head_weights({"params": {"tail": {"out": {"kernel": jnp.ones((3, 2))}}}})
    np.testing.assert_array_equal(kernel, np.ones((3, 2)))
    np.testing.assert_array_equal(bias, np.zeros(2))


def test_evaluation_leaves_variables_unchanged_and_training_changes_only_statistics(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    bounded = {**tiny_variables, "bounds": {"relu": {"upper": jnp.full(4, 0.1)}}}
    _, same = tiny_classifier.features(bounded, tiny_data.images)
    chex.assert_trees_all_equal(same, bounded)
    _, new = tiny_classifier.features(bounded, tiny_data.images, train=True)
    assert set(new) == set(bounded)
    chex.assert_trees_all_equal({**new, "batch_stats": bounded["batch_stats"]}, bounded)
    changed = jax.tree.map(lambda a, b: bool(jnp.all(a != b)), new["batch_stats"], bounded["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_a_low_bound_clips_the_latent(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    upper = tiny_classifier.activations(tiny_variables, tiny_data.images)
    bounds = jax.tree.map(lambda value: value / 2, upper)
    _, kept = tiny_classifier.network.apply(
        tiny_variables,
        tiny_classifier.normalize(tiny_data.images),
        False,
        capture_intermediates=lambda module, _: isinstance(module, BatchNorm),
        mutable=["intermediates"],
    )
    before = np.asarray(kept["intermediates"]["bn"]["__call__"][0])
    expected = np.clip(before, 0, np.asarray(bounds["relu"]["upper"])).mean((1, 2))
    got, _ = tiny_classifier.features({**tiny_variables, "bounds": bounds}, tiny_data.images)
    assert_near(got, expected, 1e-5)
    assert np.abs(got - tiny_classifier.features(tiny_variables, tiny_data.images)[0]).max() > 1e-3


@pytest.mark.parametrize(("mean", "std"), [((0.0,), (1.0, 1.0)), ((0.0, 0.0), (1.0, 0.0))])
def test_an_impossible_normalization_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="std"):
        Classifier(nn.Dense(2), 2, mean, std)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"no_such_model.*{sorted(MODELS)[0]}"):
        build_classifier("no_such_model", 10)
    with pytest.raises(UserError, match=r"no_such_scale.*cifar10"):
        build_classifier("preact_resnet18", 10, normalization="no_such_scale")
