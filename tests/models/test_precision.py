"""The option bfloat16: what is computed in it, and what stays in float32."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import random_variables

from backdoor_jax import Classifier, Dataset, UserError, build_classifier
from backdoor_jax.defenses import D3, PADFT, TAC, Defense
from backdoor_jax.models import MODELS
from backdoor_jax.training import cross_entropy

IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))


def dtypes(tree: object) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


PRODUCT = re.compile(
    r"stablehlo\.(?:convolution|dot_general)\b.* : \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\) -> tensor<(\w+)>"
)


def products(lowered: jax.stages.Lowered) -> list[tuple[str, str, str]]:
    """The types of both factors of every convolution and matrix product, and the shape of the result, in some order."""
    return PRODUCT.findall(lowered.as_text())


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"resnet34", "resnet50"}))
def test_networks_compute_in_bfloat16_and_return_float32(name: str) -> None:
    classifier = build_classifier(name, 10, width=4, dtype="bfloat16")
    variables = jax.eval_shape(classifier.init, jax.random.key(0), IMAGES)
    assert dtypes(variables) == {"float32"}

    def run(variables: dict, images: jax.Array) -> tuple:
        return classifier.logits(variables, images, train=True)

    logits, new = jax.eval_shape(run, variables, IMAGES)
    assert dtypes((logits, new)) == {"float32"}
    chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
    found = products(jax.jit(run).lower(variables, IMAGES))
    pooling = 2 if name == "vgg19_bn" else 0
    assert [factors[:2] for factors in found].count(("bf16", "bf16")) == len(found) - 1 - pooling > 2
    assert ("f32", "f32", "4x10xf32") in found, "the head"


def test_gradients_and_statistics_are_float32_and_close_to_full_precision() -> None:
    full, half = (build_classifier("preact_resnet18", 10, width=8, dtype=d) for d in ("float32", "bfloat16"))
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8))
    variables = random_variables(full, images)
    labels = jnp.arange(32) % 10

    def gradient(classifier: Classifier) -> tuple:
        def loss(params: dict) -> tuple:
            logits, new = classifier.logits({**variables, "params": params}, images, train=True)
            return cross_entropy(logits, labels).mean(), new["batch_stats"]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    (expected, statistics), slope = gradient(full)
    (loss, found), rounded = gradient(half)
    assert dtypes((loss, found, rounded)) == {"float32"}
    assert loss == pytest.approx(float(expected), rel=0.02)
    assert not np.array_equal(loss, expected)
    chex.assert_trees_all_close(found, statistics, rtol=0.05, atol=0.02)
    flat, near = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (slope, rounded))
    assert flat @ near / np.linalg.norm(flat) / np.linalg.norm(near) > 0.95


def test_bounds_clip_in_bfloat16(tiny_classifier: Classifier) -> None:
    half = Classifier(tiny_classifier.network, 3, dtype="bfloat16")
    variables = half.init(jax.random.key(0), IMAGES)
    largest = half.activations(variables, IMAGES)
    assert dtypes(largest) == {"float32"}
    open_ = {**variables, "bounds": jax.tree.map(lambda leaf: leaf + 1, largest)}
    shut = {**variables, "bounds": jax.tree.map(jnp.zeros_like, largest)}
    np.testing.assert_array_equal(half.features(open_, IMAGES)[0], half.features(variables, IMAGES)[0])
    np.testing.assert_array_equal(half.features(shut, IMAGES)[0], 0)


@pytest.mark.parametrize(
    "defense",
    [
        D3(steps=2, batch_size=8),
        PADFT(per_class=2, bound_epochs=2, tune_epochs=2),
        TAC(steps=2, batch_size=8, target=0),
    ],
    ids=lambda defense: defense.name,
)
def test_repairs_of_a_network_in_bfloat16_leave_float32_weights(
    tiny_classifier: Classifier, tiny_data: Dataset, defense: Defense
) -> None:
    half = Classifier(tiny_classifier.network, 3, dtype="bfloat16")
    variables = half.init(jax.random.key(0), tiny_data.images)
    repair = defense.repair(jax.random.key(1), half, variables, tiny_data)
    assert dtypes(repair.variables) == {"float32"}
    chex.assert_tree_all_finite(repair.variables)
    assert not np.array_equal(repair.variables["params"]["linear"]["kernel"], variables["params"]["linear"]["kernel"])


def test_other_linen_modules_compute_in_bfloat16() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Conv(4, (3, 3))(x))
            return nn.Dense(3, name="out")(x.mean((1, 2)))

    classifier = dataclasses.replace(Classifier.from_linen(Net(), 3, ("out",)), dtype="bfloat16")
    variables = classifier.init(jax.random.key(0), IMAGES)
    logits, new = classifier.logits(variables, IMAGES, train=True)
    assert dtypes((logits, new)) == {"float32"}
    (convolution, head) = sorted(products(jax.jit(classifier.logits).lower(variables, IMAGES)))
    assert convolution[:2] == ("bf16", "bf16")
    assert head == ("f32", "f32", "4x3xf32")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="dtype is 'float16', expected 'float32' or 'bfloat16'"):
        build_classifier("small_cnn", 10, dtype="float16")  # type: ignore[arg-type]
