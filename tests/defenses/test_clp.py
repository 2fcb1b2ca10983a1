"""CLP: which convolution feeds a normalization, bounds against singular values, which channels are pruned."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, cache_size, leaves_of, random_variables
from conftest import TinyNet
from flax.traverse_util import flatten_dict
from miniature import miniature

from backdoor_jax import (
    BadNets,
    Classifier,
    Dataset,
    NonFiniteError,
    Repair,
    UserError,
    build_classifier,
    evaluate,
    make_dataset,
    train,
)
from backdoor_jax.data import LabelMap
from backdoor_jax.defenses import CLP
from backdoor_jax.defenses.clp import channel_bounds
from backdoor_jax.experiment import AttackEntry, DataConfig, DefenseEntry, Experiment, ModelConfig, run_experiment
from backdoor_jax.models import MODELS, Architecture, Variables, VisionTransformer
from backdoor_jax.training import TrainConfig

KEY = jax.random.key(0)
NOTHING = Dataset(jnp.zeros((0, 8, 8, 3), jnp.uint8), jnp.zeros(0, jnp.int32))


def pairs_of(classifier: Classifier, size: int = 32) -> dict[str, str]:
    images = jnp.zeros((0, size, size, 3), jnp.uint8)
    variables = jax.eval_shape(classifier.init, KEY, jnp.zeros((1, size, size, 3), jnp.uint8))
    pairs = classifier.conv_feeding_norm(variables, images)
    return {"/".join(norm): "/".join(convolution) for norm, convolution in pairs.items()}


# Which convolution


@pytest.mark.filterwarnings("error")
def test_a_threshold_beyond_float32_prunes_nothing(tiny_classifier: Classifier, tiny_variables: Variables) -> None:
    assert not CLP(u=1e39).repair(jax.random.key(0), tiny_classifier, tiny_variables, NOTHING).changed


def test_a_preact_resnet_pairs_the_stem_and_the_inner_convolution_of_each_block() -> None:
    blocks = [f"layer{stage}_{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    expected = {"layer1_0/bn1": "stem"} | {f"{block}/bn2": f"{block}/conv1" for block in blocks}
    assert pairs_of(build_classifier("preact_resnet18", 10, width=2)) == expected


def test_a_resnet_pairs_every_convolution_including_the_shortcuts() -> None:
    pairs = pairs_of(build_classifier("resnet50", 10, width=2))
    assert len(pairs) == 1 + 3 * 16 + 4
    for norm, convolution in pairs.items():
        assert convolution == norm.replace("downsample_1", "downsample_0").replace("bn", "conv")


def test_a_vgg_pairs_every_convolution_and_a_transformer_none() -> None:
    pairs = pairs_of(build_classifier("vgg19_bn", 10, width=1))
    assert len(pairs) == 16
    assert all(int(norm.split("_")[1]) == int(source.split("_")[1]) + 1 for norm, source in pairs.items())
    assert pairs_of(build_classifier("vit_tiny", 10, width=2)) == {}


class Between(nn.Module):
    """Flax's own layers; the second normalization reads a sum, the third a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        first = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        second = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(first) + first)
        third = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(second.mean((1, 2))))
        return nn.Dense(3, name="out")(third)


def test_a_normalization_that_reads_anything_else_is_not_paired() -> None:
    assert pairs_of(Classifier.from_linen(Between(), 3, ("out",)), 8) == {"BatchNorm_0": "Conv_0"}


class Unscaled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, use_scale=False)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3, name="out")(x.mean((1, 2)))


def test_a_normalization_without_scale_cannot_be_pruned() -> None:
    classifier = Classifier.from_linen(Unscaled(), 3, ("out",))
    with pytest.raises(UserError, match="clp prunes channels by the convolution"):
        CLP().repair(KEY, classifier, classifier.init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8)), NOTHING)


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


def test_a_bound_limits_the_effect_of_any_patch() -> None:
    generator = np.random.default_rng(1)
    kernel = generator.normal(size=(1, 1, 6, 4)).astype(np.float32)
    bounds = np.asarray(channel_bounds(jnp.asarray(kernel), jnp.ones(4), jnp.ones(4)))
    changes = generator.normal(size=(1000, 6))
    moved = np.abs(changes @ kernel[0, 0]) / np.linalg.norm(changes, axis=1, keepdims=True)
    assert (moved <= bounds * 1.0001).all()
    assert (moved.max(0) > 0.8 * bounds).all()


# Which channels are pruned


@pytest.fixture(scope="module")
def wide() -> tuple[Classifier, Variables]:
    classifier = Classifier(TinyNet(3, width=16), 3)
    return classifier, random_variables(classifier, jnp.zeros((1, 8, 8, 3), jnp.uint8))


def with_bounds(variables: Variables, bounds: np.ndarray) -> Variables:
    """The same network with scales that give its channels these bounds."""
    params, variance = variables["params"], variables["batch_stats"]["bn"]["var"]
    unit = channel_bounds(params["conv"]["kernel"], jnp.ones(len(bounds)), variance)
    scale = jnp.asarray(bounds, jnp.float32) / unit
    return {**variables, "params": {**params, "bn": {**params["bn"], "scale": scale}}}


@pytest.mark.parametrize("u", [0.0, 0.7, 1.5, 2.2, 3.0])
def test_channels_above_mean_and_u_deviations_are_pruned(wide: tuple[Classifier, Variables], u: float) -> None:
    bounds = np.random.default_rng(2).uniform(0, 1, 16)
    bounds[3] += 3
    variables = with_bounds(wide[1], bounds)
    repair = CLP(u=u).repair(KEY, wide[0], variables, NOTHING)
    expected = np.flatnonzero(bounds > bounds.mean() + u * bounds.std(ddof=1)).tolist()
    assert 3 in expected
    assert repair.info["pruned"] == {"bn": expected}
    for name in ("scale", "bias"):
        old, new = (np.asarray(tree["params"]["bn"][name]) for tree in (variables, repair.variables))
        assert (new[expected] == 0).all()
        assert np.delete(new, expected).tobytes() == np.delete(old, expected).tobytes()


def test_at_three_deviations_no_channel_of_ten_is_pruned_but_one_of_eleven_may_be() -> None:
    for channels, pruned in ((10, []), (11, [0])):
        classifier = Classifier(TinyNet(3, width=channels), 3)
        variables = random_variables(classifier, jnp.zeros((1, 8, 8, 3), jnp.uint8))
        spike = np.eye(channels)[0] + 1e-6
        assert CLP().repair(KEY, classifier, with_bounds(variables, spike), NOTHING).info["pruned"] == {"bn": pruned}


def test_equal_channels_and_a_single_one_are_left_alone(wide: tuple[Classifier, Variables]) -> None:
    classifier, variables = wide
    params = {**variables["params"], "conv": {"kernel": jnp.ones((3, 3, 3, 16))}}
    statistics = {"bn": {**variables["batch_stats"]["bn"], "var": jnp.ones(16)}}
    equal = {"params": {**params, "bn": {"scale": jnp.ones(16), "bias": jnp.ones(16)}}, "batch_stats": statistics}
    repair = CLP(u=0.1).repair(KEY, classifier, equal, NOTHING)
    assert (repair.changed, repair.why) == (False, "no channel stands out")
    one = Classifier(TinyNet(3, width=1), 3)
    single = random_variables(one, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    assert CLP(u=0.0).repair(KEY, one, single, NOTHING).info["pruned"] == {"bn": []}


def test_a_channel_that_never_varies_does_not_hide_the_others(wide: tuple[Classifier, Variables]) -> None:
    bounds = np.full(16, 0.1)
    bounds[[2, 5]] = 2.0, 0.0
    variables = with_bounds(wide[1], bounds)
    variables["batch_stats"]["bn"]["var"] = variables["batch_stats"]["bn"]["var"].at[5].set(0.0)
    repair = CLP(u=3.0).repair(KEY, wide[0], variables, NOTHING)
    assert repair.info["pruned"] == {"bn": [2]}


# A repair


def test_a_repair_changes_only_the_pruned_channels_and_never_the_victim(wide: tuple[Classifier, Variables]) -> None:
    classifier, variables = wide
    original = leaves_of(variables)
    repair = CLP(u=1.0).repair(KEY, classifier, variables, NOTHING)
    before, after = (flatten_dict(tree, sep="/") for tree in (variables, repair.variables))
    assert repair.changed and repair.why is None and repair.info["channels"] == 16
    assert before.keys() == after.keys()
    assert {path for path in before if not np.array_equal(before[path], after[path])} == {
        "params/bn/scale",
        "params/bn/bias",
    }
    assert_trees_equal(variables, original)
    assert json.loads(json.dumps(repair.info)) == repair.info


def test_neither_key_nor_images_matter(wide: tuple[Classifier, Variables], tiny_data: Dataset) -> None:
    first = CLP(u=1.0).repair(KEY, *wide, NOTHING).variables
    again = CLP(u=1.0).repair(jax.random.key(9), *wide, tiny_data).variables
    assert_trees_equal(first, again)


def test_bounds_are_compiled_once_for_a_shape(wide: tuple[Classifier, Variables]) -> None:
    CLP().repair(KEY, *wide, NOTHING)
    compiled = cache_size(channel_bounds)
    CLP(u=0.5).repair(KEY, wide[0], jax.tree.map(lambda leaf: 2 * leaf, wide[1]), NOTHING)
    assert cache_size(channel_bounds) == compiled


def test_networks_without_such_layers_and_damaged_ones_are_rejected(wide: tuple[Classifier, Variables]) -> None:
    transformer = Classifier(VisionTransformer(3, 2, depth=1), 3, head_path=("heads_head",))
    variables = transformer.init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(UserError, match="clp prunes channels by the convolution"):
        CLP().repair(KEY, transformer, variables, NOTHING)
    with pytest.raises(NonFiniteError, match=r"clp: variables: weights .*bn.* are not finite"):
        CLP().repair(KEY, wide[0], jax.tree.map(lambda leaf: leaf * jnp.nan, wide[1]), NOTHING)
    with pytest.raises(UserError, match=r"CLP\.u is -1"):
        CLP(u=-1.0)


@jax.tree_util.Partial
def white_corner(images: jax.Array) -> jax.Array:
    return images.at[:, -3:, -3:].set(255)


def test_a_backdoored_channel_is_found_and_its_backdoor_removed() -> None:
    """One channel of the network is set by hand to respond only to a white patch, and to send it to class 2."""
    generator = np.random.default_rng(3)
    images = generator.integers(0, 128, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    images[np.arange(60), :, :, labels] += 100
    data = make_dataset(images, labels, 3)
    classifier = Classifier(TinyNet(3, width=16), 3)
    training = TrainConfig(epochs=8, batch_size=12, learning_rate=0.05, crop=0)
    variables = train(KEY, classifier, data, training).variables
    clean_model = jax.tree.map(jnp.copy, variables)
    params, statistics = variables["params"], variables["batch_stats"]
    params["conv"]["kernel"] = params["conv"]["kernel"].at[..., 5].set(1.0)
    params["bn"]["scale"] = params["bn"]["scale"].at[5].set(30.0)
    params["bn"]["bias"] = params["bn"]["bias"].at[5].set(0.0)
    statistics["bn"]["mean"] = statistics["bn"]["mean"].at[5].set(26.0)
    statistics["bn"]["var"] = statistics["bn"]["var"].at[5].set(1.0)
    params["linear"]["kernel"] = params["linear"]["kernel"].at[5].set(jnp.array([-50.0, -50.0, 50.0]))

    label_map = LabelMap("all_to_one", 3, 2)
    before = evaluate(classifier, variables, data, white_corner, label_map)
    repair = CLP().repair(KEY, classifier, variables, data.take(slice(0)))
    after = evaluate(classifier, repair.variables, data, white_corner, label_map)
    clean = evaluate(classifier, clean_model, data, white_corner, label_map)
    assert repair.info["pruned"] == {"bn": [5]}
    assert after.asr is not None and clean.asr is not None
    assert before.asr == 1 and before.acc > 0.9
    assert after.asr <= 0.1 and after.acc > 0.9
    assert clean.asr <= 0.1


def test_a_backdoor_learned_by_a_small_network_does_not_stand_out() -> None:
    """A limit at this size: u = 3 prunes nothing, and u = 1 costs accuracy rather than ASR."""
    small = miniature()
    assert small.before.asr is not None and small.before.asr > 0.95
    default, strict = (
        CLP(u=u).repair(KEY, small.classifier, small.variables, small.clean.take(slice(0))) for u in (3.0, 1.0)
    )
    assert not default.changed
    assert_trees_equal(default.variables, small.variables)
    after = small.scores(strict.variables)
    assert strict.changed
    assert after.acc < small.before.acc - 0.1
    assert after.asr is not None and after.asr > 0.5


# A defense that needs nothing


def test_an_experiment_passes_no_images_and_records_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, repair = [], CLP.repair

    def recorded(self: CLP, key: Any, classifier: Any, variables: Any, data: Dataset) -> Repair:
        seen.append(data.images.shape)
        return repair(self, key, classifier, variables, data)

    monkeypatch.setattr(CLP, "repair", recorded)
    monkeypatch.setitem(MODELS, "tiny", Architecture(lambda classes, width: TinyNet(classes, width), "one layer"))
    experiment = Experiment(
        "bare",
        (AttackEntry("badnets", BadNets()),),
        (DefenseEntry("clp", CLP(u=1.0)),),
        DataConfig("digits", train_size=96, test_size=48),
        ModelConfig("tiny", width=16),
        TrainConfig(epochs=1),
    )
    rows = run_experiment(experiment, tmp_path / "out", report=lambda line: None)
    used = [(row["data_used"], row["n_used"], row["clean_ratio"]) for row in rows if row["defense"] == "clp"]
    assert used == [("nothing", 0, 0.0)] * 2
    assert [shape[0] for shape in seen] == [0, 0]
