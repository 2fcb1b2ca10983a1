"""NAD: attention and loss against NumPy, feature maps of every kind of network, and a miniature victim repaired."""

import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import (
    assert_depends_on_key_alone,
    assert_trees_equal,
    random_variables,
    trees_equal,
)
from flax import nnx
from jax.tree_util import Partial
from miniature import CLASSES, TRACES, Miniature, flat_miniature, miniature

from backdoor_jax import MODELS, Classifier, Repair, UserError, build_classifier
from backdoor_jax.defenses import NAD
from backdoor_jax.defenses.nad import Layers, attention, nad_loss

NAMES = ("conv0", "conv1", "conv2")
LAYERS = tuple((name,) for name in NAMES)


@pytest.fixture(scope="module")
def case() -> Miniature:
    return miniature()


def small(**changes: Any) -> NAD:
    settings = {"steps": 10, "teacher_steps": 10, "batch_size": 32, "learning_rate": 0.05, "crop": 0, "layers": NAMES}
    return NAD(**{**settings, **changes})


def run(case: Miniature, key: int = 1, **changes: Any) -> Repair:
    return small(**changes).repair(jax.random.key(key), case.classifier, case.variables, case.clean)


def published_attention(found: np.ndarray) -> np.ndarray:
    energy = (np.abs(found) ** 2).sum(-1).reshape(len(found), -1)
    return energy / np.linalg.norm(energy, axis=1, keepdims=True)


def test_attention_is_the_energy_of_each_position_with_norm_one() -> None:
    found = np.random.default_rng(0).standard_normal((5, 4, 3, 7)).astype(np.float32)
    got = attention(jnp.asarray(found))
    np.testing.assert_allclose(got, published_attention(found), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(attention(jnp.asarray(found[:, :1, :1])), 1, rtol=1e-5)  # after global pooling


def test_a_dead_map_has_no_attention_and_a_finite_gradient() -> None:
    dead = jnp.zeros((2, 3, 3, 4))
    np.testing.assert_array_equal(attention(dead), 0)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(attention(x) ** 2))(dead)).all()


def test_the_loss_is_cross_entropy_and_weighted_distances_of_attention(case: Miniature) -> None:
    teacher = jax.tree.map(lambda leaf: leaf * 1.1 + 0.05, case.variables)
    betas = np.array([3.0, 20.0, 100.0])
    bound = Partial(nad_loss, case.classifier, Layers(LAYERS), jnp.asarray(betas), teacher)
    loss, (variables, info) = jax.jit(bound)(case.variables, case.clean, jax.random.key(0))
    logits, own, trained = case.classifier.maps(case.variables, case.clean.images, LAYERS, train=True)
    _, taught, _ = case.classifier.maps(teacher, case.clean.images, LAYERS)
    assert [one.shape[1:] for one in own] == [(16, 16, 16), (8, 8, 32), (4, 4, 32)]
    distance = sum(
        beta * ((published_attention(np.asarray(a)) - published_attention(np.asarray(b))) ** 2).mean()
        for beta, a, b in zip(betas, own, taught, strict=True)
    )
    z = np.asarray(logits, np.float64)
    clean = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), np.asarray(case.clean.labels)])
    assert distance > 0
    assert float(info["distance"]) == pytest.approx(distance, rel=1e-4)
    assert float(info["cross_entropy"]) == pytest.approx(clean, rel=1e-3, abs=1e-6)
    assert float(loss) == pytest.approx(clean + distance, rel=1e-4)
    chex.assert_trees_all_close(variables, trained, rtol=1e-5)


def test_maps_leave_logits_and_statistics_as_they_are(case: Miniature) -> None:
    for train in (False, True):
        logits, _, after = case.classifier.maps(case.variables, case.clean.images, LAYERS, train)
        plain, statistics = case.classifier.logits(case.variables, case.clean.images, train)
        assert_trees_equal((logits, after), (plain, statistics))
    params = case.variables["params"]
    _, (first, *_), _ = case.classifier.maps(case.variables, case.clean.images, LAYERS)
    x = case.classifier.normalize(case.clean.images)
    expected = jax.lax.conv_general_dilated(
        x, params["conv0"]["kernel"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("preact_resnet18", (32, 16, 8, 4)), ("resnet34", (32, 16, 8, 4)), ("resnet50", (32, 16, 8, 4)),
     ("vgg19_bn", (32, 16, 8, 4, 2))],
)  # fmt: skip
def test_the_convolutional_networks_name_a_map_for_every_resolution(model: str, sizes: tuple[int, ...]) -> None:
    classifier = build_classifier(model, 10, width=2)
    images = jnp.zeros((2, 32, 32, 3), jnp.uint8)

    def maps(key: jax.Array) -> Any:
        return classifier.maps(classifier.init(key, images), images, classifier.map_layers)[1]

    shapes = [found.shape for found in jax.eval_shape(maps, jax.random.key(0))]
    assert [shape[:3] for shape in shapes] == [(2, size, size) for size in sizes]


def test_the_last_map_is_the_input_of_global_pooling(case: Miniature) -> None:
    classifier = build_classifier("preact_resnet18", 4, width=2)
    variables = random_variables(classifier, case.clean.images)
    _, maps, _ = classifier.maps(variables, case.clean.images[:4], classifier.map_layers)
    latent, _ = classifier.features(variables, case.clean.images[:4])
    np.testing.assert_allclose(maps[-1].mean((1, 2)), latent, rtol=1e-5, atol=1e-6)


class Bare(nn.Module):
    """A module without `map_layers`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), name="low")(x))
        return nn.Dense(CLASSES, name="out")(x.mean((1, 2)))


def test_any_linen_module_works_where_layers_are_named(case: Miniature) -> None:
    classifier = Classifier.from_linen(Bare(), CLASSES, ("out",))
    variables = classifier.init(jax.random.key(0), case.clean.images)
    defense = small(layers=("low",), betas=(1000.0,), steps=5, teacher_steps=5)
    repair = defense.repair(jax.random.key(1), classifier, variables, case.clean)
    assert repair.info["layers"] == ["low"]
    assert not trees_equal(repair.variables["params"], variables["params"])
    with pytest.raises(UserError, match=r"names 0 layers.*nad compares 3; give layers"):
        small(layers=None).repair(jax.random.key(1), classifier, variables, case.clean)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("nowhere", "calls no layer 'nowhere'; maps come from .*conv0"), ("linear", "no layer 'linear'")],
)
def test_an_unknown_layer_is_an_error_before_anything_is_trained(case: Miniature, layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(case, layers=(layer, *NAMES[1:]))


def test_a_layer_whose_output_is_no_map_is_an_error() -> None:
    classifier = build_classifier("vgg19_bn", 4, width=1)
    images = jnp.zeros((1, 32, 32, 3), jnp.uint8)

    def maps(key: jax.Array) -> Any:
        return classifier.maps(classifier.init(key, images), images, (("classifier_0",),))[1]

    with pytest.raises(UserError, match=re.escape("the output of layer 'classifier_0' is (1, 64), expected a map")):
        jax.eval_shape(maps, jax.random.key(0))


def test_networks_without_maps_are_an_error_that_says_what_to_give(case: Miniature) -> None:
    transformer = build_classifier("vit_tiny", CLASSES, width=4)
    assert transformer.map_layers == ()
    with pytest.raises(UserError, match="names 0 layers"):
        small(layers=None).repair(jax.random.key(0), transformer, {"params": {}}, case.clean)

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.out = nnx.Linear(3, CLASSES, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(x.mean((1, 2)))

    classifier, variables = Classifier.from_nnx(Net(nnx.Rngs(0)), CLASSES, ("out",))
    assert classifier.map_layers == ()
    with pytest.raises(UserError, match="NNXNetwork has no layers that can be observed; give a Linen module"):
        small().repair(jax.random.key(0), classifier, variables, case.clean)


def test_only_convolutional_networks_name_layers() -> None:
    named = {name: len(build_classifier(name, 10, width=2).map_layers) for name in MODELS}
    assert named == {
        "preact_resnet18": 4, "resnet10": 4, "resnet18": 4, "resnet34": 4, "resnet50": 4, "vgg19_bn": 5, "vit_tiny": 0,
        "small_cnn": 3,
    }  # fmt: skip


def test_one_key_gives_one_result_and_the_victim_is_unchanged(case: Miniature) -> None:
    one = assert_depends_on_key_alone(lambda key: run(case, key), case.variables)
    assert set(one.info["teacher"]) == {"loss", "accuracy"}


def test_other_floats_do_not_trace_the_steps_again(case: Miniature) -> None:
    run(case)
    traced = len(TRACES)
    changes: list[dict[str, Any]] = [{"betas": (1.0, 2.0, 3.0)}, {"learning_rate": 0.02, "weight_decay": 0.0}]
    ends = [run(case, **change).variables for change in changes]
    # Each call checks the layers' shapes once, on the victim.
    assert len(TRACES) == traced + len(changes)
    assert not trees_equal(*ends)


def test_the_backdoor_is_removed_only_where_attention_is_distilled() -> None:
    case, layers = flat_miniature(), ("convolutions_0", "convolutions_1", "convolutions_2")
    tuned, distilled = (
        case.scores(run(case, steps=50, teacher_steps=50, betas=betas, layers=layers).variables)
        for betas in ((0.0, 0.0, 0.0), (500.0, 1000.0, 1000.0))
    )
    assert tuned.asr is not None and distilled.asr is not None
    assert distilled.asr < tuned.asr - 0.5
    assert distilled.acc > tuned.acc - 0.1


def test_defaults_are_those_of_the_benchmark() -> None:
    config = NAD()
    assert (config.steps, config.teacher_steps, config.batch_size) == (100, 100, 256)
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.01, 0.9, 5e-4)
    assert config.betas == (500.0, 1000.0, 1000.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("teacher_steps", 0), ("betas", ()), ("betas", (1.0, -1.0)), ("layers", ("a",)), ("learning_rate", 0.0)],
)
def test_a_setting_out_of_range_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"NAD.{field} is .*expected"):
        NAD(**{field: value})
