"""CLP: which convolution a normalisation reads, bounds against singular values, who is pruned, a planted channel."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import random_variables
from conftest import TinyNet
from miniature import miniature

from backdoor_jax import (
    Classifier,
    ClpConfig,
    Dataset,
    NonFiniteError,
    UserError,
    build_classifier,
    clp,
    evaluate,
    make_dataset,
    train,
)
from backdoor_jax.attacks import BadNets
from backdoor_jax.data import LabelMap
from backdoor_jax.defenses import DEFENSES
from backdoor_jax.defenses.clp import channel_bounds
from backdoor_jax.experiment import AttackEntry, DataConfig, DefenseEntry, Experiment, ModelConfig, run_experiment
from backdoor_jax.models import MODELS, Architecture, Variables, VisionTransformer
from backdoor_jax.training import TrainConfig

KEY = jax.random.key(0)
NOTHING = Dataset(jnp.zeros((0, 8, 8, 3), jnp.uint8), jnp.zeros(0, jnp.int32))


def shown(pairs: dict[tuple[str, ...], tuple[str, ...]]) -> dict[str, str]:
    return {"/".join(norm): "/".join(convolution) for norm, convolution in pairs.items()}


def pairs_of(classifier: Classifier, size: int = 32) -> dict[str, str]:
    images = jnp.zeros((0, size, size, 3), jnp.uint8)
    variables = jax.eval_shape(classifier.init, KEY, jnp.zeros((1, size, size, 3), jnp.uint8))
    return shown(classifier.normalized(variables, images))


# Which convolution


def test_a_preact_resnet_has_the_stem_and_the_inner_convolution_of_each_block() -> None:
    blocks = [f"layer{stage}_{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    want = {"layer1_0/bn1": "stem"} | {f"{block}/bn2": f"{block}/conv1" for block in blocks}
    assert pairs_of(build_classifier("preact_resnet18", 10, width=2)) == want


def test_a_resnet_has_every_convolution_the_shortcuts_included() -> None:
    pairs = pairs_of(build_classifier("resnet50", 10, width=2))
    assert len(pairs) == 1 + 3 * 16 + 4
    for norm, convolution in pairs.items():
        want = norm.replace("downsample_1", "downsample_0").replace("bn", "conv")
        assert convolution == want


def test_a_vgg_has_every_convolution_and_a_transformer_none() -> None:
    pairs = pairs_of(build_classifier("vgg19_bn", 10, width=1))
    assert len(pairs) == 16
    assert all(int(norm.split("_")[1]) == int(source.split("_")[1]) + 1 for norm, source in pairs.items())
    assert pairs_of(build_classifier("vit_tiny", 10, width=2)) == {}


class Between(nn.Module):
    """Flax's own layers; the second normalisation reads a sum, the third a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        first = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        second = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(first) + first)
        third = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(second.mean((1, 2))))
        return nn.Dense(3, name="out")(third)


def test_what_reads_something_else_is_no_pair() -> None:
    assert pairs_of(Classifier.from_linen(Between(), 3, ("out",)), 8) == {"BatchNorm_0": "Conv_0"}


class Unscaled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, use_scale=False)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3, name="out")(x.mean((1, 2)))


def test_a_normalisation_without_scale_cannot_be_pruned() -> None:
    classifier = Classifier.from_linen(Unscaled(), 3, ("out",))
    with pytest.raises(UserError, match="clp prunes channels by the convolution"):
        clp(KEY, classifier, classifier.init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8)), NOTHING)


# Bounds


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (1, 1, 4, 3), (3, 3, 1, 2), (5, 3, 2, 1)])
def test_bounds_are_the_largest_singular_values_of_the_scaled_filters(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    kernel, scale = generator.normal(size=shape), generator.normal(size=shape[-1])
    variance = generator.uniform(0.1, 3, shape[-1])
    found = channel_bounds(*(jnp.asarray(array, jnp.float32) for array in (kernel, scale, variance)))
    height, width, inputs, channels = shape
    for k in range(channels):
        matrix = kernel[..., k].transpose(2, 0, 1).reshape(inputs, height * width)
        gain = abs(scale[k]) / np.sqrt(variance[k] + 1e-5)
        assert float(found[k]) == pytest.approx(np.linalg.svd(matrix * gain)[1].max(), rel=1e-5)


def test_a_bound_bounds_what_a_patch_can_do() -> None:
    generator = np.random.default_rng(1)
    kernel = generator.normal(size=(1, 1, 6, 4)).astype(np.float32)
    bounds = np.asarray(channel_bounds(jnp.asarray(kernel), jnp.ones(4), jnp.ones(4)))
    changes = generator.normal(size=(1000, 6))
    moved = np.abs(changes @ kernel[0, 0]) / np.linalg.norm(changes, axis=1, keepdims=True)
    assert (moved <= bounds * 1.0001).all()
    assert (moved.max(0) > 0.8 * bounds).all()


# Who is pruned


@pytest.fixture(scope="module")
def wide() -> tuple[Classifier, Variables]:
    classifier = Classifier(TinyNet(3, width=16), 3)
    return classifier, random_variables(classifier, jnp.zeros((1, 8, 8, 3), jnp.uint8))


def with_bounds(variables: Variables, bounds: np.ndarray) -> Variables:
    """The same network, its scales such that the channels have these bounds."""
    params, variance = variables["params"], variables["batch_stats"]["bn"]["var"]
    unit = channel_bounds(params["conv"]["kernel"], jnp.ones(len(bounds)), variance)
    scale = jnp.asarray(bounds, jnp.float32) / unit
    return {**variables, "params": {**params, "bn": {**params["bn"], "scale": scale}}}


@pytest.mark.parametrize("u", [0.0, 0.7, 1.5, 2.2, 3.0])
def test_channels_above_mean_and_u_deviations_are_pruned(wide: tuple[Classifier, Variables], u: float) -> None:
    bounds = np.random.default_rng(2).uniform(0, 1, 16)
    bounds[3] += 3
    variables = with_bounds(wide[1], bounds)
    repair = clp(KEY, wide[0], variables, NOTHING, ClpConfig(u=u))
    want = np.flatnonzero(bounds > bounds.mean() + u * bounds.std(ddof=1)).tolist()
    assert 3 in want
    assert repair.info["pruned"] == {"bn": want}
    for name in ("scale", "bias"):
        old, new = (np.asarray(tree["params"]["bn"][name]) for tree in (variables, repair.variables))
        assert (new[want] == 0).all()
        assert np.delete(new, want).tobytes() == np.delete(old, want).tobytes()


def test_a_layer_of_ten_channels_loses_none_at_three_deviations() -> None:
    for channels, lost in ((10, []), (11, [0])):
        classifier = Classifier(TinyNet(3, width=channels), 3)
        variables = random_variables(classifier, jnp.zeros((1, 8, 8, 3), jnp.uint8))
        spike = np.eye(channels)[0] + 1e-6
        assert clp(KEY, classifier, with_bounds(variables, spike), NOTHING).info["pruned"] == {"bn": lost}


def test_equal_channels_and_a_single_one_are_left_alone(wide: tuple[Classifier, Variables]) -> None:
    classifier, variables = wide
    params = {**variables["params"], "conv": {"kernel": jnp.ones((3, 3, 3, 16))}}
    statistics = {"bn": {**variables["batch_stats"]["bn"], "var": jnp.ones(16)}}
    equal = {"params": {**params, "bn": {"scale": jnp.ones(16), "bias": jnp.ones(16)}}, "batch_stats": statistics}
    repair = clp(KEY, classifier, equal, NOTHING, ClpConfig(u=0.1))
    assert (repair.info["changed"], repair.info["why"]) == (False, "no channel stands out")
    one = Classifier(TinyNet(3, width=1), 3)
    single = random_variables(one, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    assert clp(KEY, one, single, NOTHING, ClpConfig(u=0.0)).info["pruned"] == {"bn": []}


def test_a_channel_that_never_varies_does_not_hide_the_others(wide: tuple[Classifier, Variables]) -> None:
    bounds = np.full(16, 0.1)
    bounds[[2, 5]] = 2.0, 0.0
    variables = with_bounds(wide[1], bounds)
    variables["batch_stats"]["bn"]["var"] = variables["batch_stats"]["bn"]["var"].at[5].set(0.0)
    repair = clp(KEY, wide[0], variables, NOTHING, ClpConfig(u=3.0))
    assert repair.info["pruned"] == {"bn": [2]}


# A repair


def leaves(tree: Any) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(tree)}


def test_a_repair_changes_only_what_it_pruned_and_never_the_victim(wide: tuple[Classifier, Variables]) -> None:
    classifier, variables = wide
    before = leaves(variables)
    repair = clp(KEY, classifier, variables, NOTHING, ClpConfig(u=1.0))
    after = leaves(repair.variables)
    assert repair.info["changed"] and repair.info["channels"] == 16
    assert {path for path in before if after[path] != before[path]} == {
        "['params']['bn']['scale']",
        "['params']['bn']['bias']",
    }
    assert leaves(variables) == before
    assert json.loads(json.dumps(repair.info)) == repair.info


def test_neither_key_nor_images_matter(wide: tuple[Classifier, Variables], tiny_data: Dataset) -> None:
    first = clp(KEY, *wide, NOTHING, ClpConfig(u=1.0)).variables
    again = clp(jax.random.key(9), *wide, tiny_data, ClpConfig(u=1.0)).variables
    assert leaves(first) == leaves(again)


def test_bounds_are_compiled_once_for_a_shape(wide: tuple[Classifier, Variables]) -> None:
    clp(KEY, *wide, NOTHING)
    compiled = channel_bounds._cache_size()
    clp(KEY, wide[0], jax.tree.map(lambda leaf: 2 * leaf, wide[1]), NOTHING, ClpConfig(u=0.5))
    assert channel_bounds._cache_size() == compiled


def test_networks_without_such_layers_and_damaged_ones_are_refused(wide: tuple[Classifier, Variables]) -> None:
    transformer = Classifier(VisionTransformer(3, 2, depth=1), 3, head_path=("heads_head",))
    variables = transformer.init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(UserError, match="clp prunes channels by the convolution"):
        clp(KEY, transformer, variables, NOTHING)
    with pytest.raises(NonFiniteError, match="bounds at bn are not finite"):
        clp(KEY, wide[0], jax.tree.map(lambda leaf: leaf * jnp.nan, wide[1]), NOTHING)
    with pytest.raises(UserError, match=r"ClpConfig\.u is -1"):
        ClpConfig(u=-1.0)


@jax.tree_util.Partial
def white_corner(images: jax.Array) -> jax.Array:
    return images.at[:, -3:, -3:].set(255)


def test_a_planted_channel_is_found_and_its_backdoor_gone() -> None:
    """A network in which one channel by hand sees nothing but a white patch, and sends it to class 2."""
    generator = np.random.default_rng(3)
    images = generator.integers(0, 128, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    images[np.arange(60), :, :, labels] += 100
    data = make_dataset(images, labels, 3)
    classifier = Classifier(TinyNet(3, width=16), 3)
    variables, _ = train(KEY, classifier, data, TrainConfig(epochs=8, batch_size=12, learning_rate=0.05, crop=0))
    bare = jax.tree.map(jnp.copy, variables)
    params, statistics = variables["params"], variables["batch_stats"]
    params["conv"]["kernel"] = params["conv"]["kernel"].at[..., 5].set(1.0)
    params["bn"]["scale"] = params["bn"]["scale"].at[5].set(30.0)
    params["bn"]["bias"] = params["bn"]["bias"].at[5].set(0.0)
    statistics["bn"]["mean"] = statistics["bn"]["mean"].at[5].set(26.0)
    statistics["bn"]["var"] = statistics["bn"]["var"].at[5].set(1.0)
    params["linear"]["kernel"] = params["linear"]["kernel"].at[5].set(jnp.array([-50.0, -50.0, 50.0]))

    label_map = LabelMap("all_to_one", 3, 2)
    before = evaluate(classifier, variables, data, white_corner, label_map)
    repair = clp(KEY, classifier, variables, data.take(slice(0)))
    after = evaluate(classifier, repair.variables, data, white_corner, label_map)
    clean = evaluate(classifier, bare, data, white_corner, label_map)
    assert repair.info["pruned"] == {"bn": [5]}
    assert before.asr == 1 and before.acc > 0.9
    assert after.asr <= 0.1 and after.acc > 0.9
    assert clean.asr <= 0.1


def test_a_backdoor_learnt_by_a_small_network_does_not_stand_out() -> None:
    """What holds at this size, and is no success: u = 3 prunes nothing, and u = 1 costs accuracy rather than ASR."""
    small = miniature()
    assert small.before.asr > 0.95
    default, strict = (
        clp(KEY, small.classifier, small.variables, small.clean.take(slice(0)), ClpConfig(u=u)) for u in (3.0, 1.0)
    )
    assert not default.info["changed"]
    assert leaves(default.variables) == leaves(small.variables)
    after = small.scores(strict.variables)
    assert strict.info["changed"]
    assert after.acc < small.before.acc - 0.1 and after.asr > 0.5


# Where a defence needs nothing


def test_an_experiment_hands_over_nothing_and_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(key: Any, classifier: Any, variables: Any, data: Dataset, config: Any) -> Any:
        seen.append(data.images.shape)
        return clp(key, classifier, variables, data, config)

    monkeypatch.setitem(DEFENSES, "clp", dataclasses.replace(DEFENSES["clp"], run=run))
    monkeypatch.setitem(MODELS, "tiny", Architecture(lambda classes, width: TinyNet(classes, width), "one layer"))
    experiment = Experiment(
        "bare",
        (AttackEntry("badnets", BadNets()),),
        (DefenseEntry("clp", "clp", ClpConfig(u=1.0)),),
        DataConfig("digits", train_size=96, test_size=48),
        ModelConfig("tiny", width=16),
        TrainConfig(epochs=1),
    )
    rows = run_experiment(experiment, tmp_path / "out", report=lambda line: None)
    used = [(row["data_used"], row["n_used"], row["clean_ratio"]) for row in rows if row["defense"] == "clp"]
    assert used == [("nothing", 0, 0.0)] * 2
    assert [shape[0] for shape in seen] == [0, 0]
