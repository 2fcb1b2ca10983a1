"""Public functions refuse arguments that cannot be used, in one line; NaN reaches the check on every backend."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal
from jax.tree_util import Partial

import backdoor_jax as bj
from backdoor_jax import Classifier, Dataset, NonFiniteError, UserError
from backdoor_jax.attacks import AttackContext, random_pattern
from backdoor_jax.config_files import make_defense, parse_experiment
from backdoor_jax.data import (
    LabelMap,
    clean_indices,
    draw_poisoned,
    load_labeled,
    poison,
    poison_count,
    random_crop,
    random_flip,
    rotate,
)
from backdoor_jax.defenses import smallest_outlier
from backdoor_jax.detectors import scan_evidence, suspicious
from backdoor_jax.metrics import (
    Scores,
    agreement,
    chance_level,
    confidence_signal,
    defense_effectiveness,
    embedding,
    is_near_chance,
    largest_margin,
    loss_along_line,
    loss_signal,
    maximum_margins,
    membership,
    success_rates,
    triggered_change,
    weight_change,
)
from backdoor_jax.models import Variables, build_classifier, describe
from backdoor_jax.models.layers import ReLU, max_pool
from backdoor_jax.models.rectifier import relu
from backdoor_jax.training import SGD, GradientStep, fit, fit_many, latents, stack, supervised_loss, train_many

KEY = jax.random.key(0)
CLASSIFIER = build_classifier("small_cnn", 3, width=2)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
DATA = bj.make_dataset(IMAGES, np.arange(6) % 3, 3)
BN = ("batch_stats", "bn0")


def variables() -> Variables:
    return CLASSIFIER.init(KEY, DATA.images)


def changed(tree: Any, path: tuple[str, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(tree)
    return {**tree, path[0]: changed(tree[path[0]], path[1:], change)}


DOORS: dict[str, Callable[..., Any]] = {
    "evaluate": lambda key, classifier, variables, data: bj.evaluate(classifier, variables, data),
    "scan": lambda key, classifier, variables, data: bj.scan(classifier, variables, data.images),
    "train": lambda key, classifier, variables, data: bj.train(key, classifier, data, bj.TrainConfig(epochs=1)),
    "badnets": lambda key, classifier, variables, data: bj.BadNets().train_victim(key, classifier, data),
    **{
        name: lambda key, classifier, variables, data, defense=defense: defense().repair(
            key, classifier, variables, data
        )
        for name, defense in bj.DEFENSES.items()
    },
}


def with_images(change: Callable[[Any], Any]) -> Callable[[], Dataset]:
    return lambda: Dataset(change(DATA.images), DATA.labels)


def with_labels(change: Callable[[Any], Any]) -> Callable[[], Dataset]:
    return lambda: Dataset(DATA.images, change(DATA.labels))


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "float images": (with_images(lambda x: x / 255), "is float32, expected uint8"),
    "int32 images": (with_images(lambda x: x.astype(jnp.int32)), "is int32, expected uint8"),
    "NCHW": (with_images(lambda x: x.transpose(0, 3, 1, 2)), "(6, 3, 8, 8), expected (N, height, width, 3)"),
    "gray": (with_images(lambda x: x[..., :1]), "(6, 8, 8, 1), expected (N, height, width, 3)"),
    "one image": (with_images(lambda x: x[0]), "(8, 8, 3), expected (N,"),
    "a list": (with_images(lambda x: [1, 2]), "is list, expected uint8"),
    "float labels": (with_labels(lambda y: y.astype(jnp.float32)), "float32 (6,), expected one integer"),
    "one-hot labels": (with_labels(lambda y: jax.nn.one_hot(y, 3, dtype=jnp.int32)), "(6, 3), expected one integer"),
    "too few labels": (with_labels(lambda y: y[:4]), "(4,), expected one integer for each of 6"),
    "negative labels": (with_labels(lambda y: y - 1), "run from -1 to 1, expected 0 to 2"),
    "large labels": (with_labels(lambda y: y + 1), "run from 1 to 3, expected 0 to 2"),
    "a pair": (lambda: (DATA.images, DATA.labels), "is a tuple, expected a Dataset"),
    "None": (lambda: None, "is a NoneType, expected a Dataset"),
}
BAD_VARIABLES: dict[str, tuple[Callable[[], Any], type[UserError], str]] = {
    "None": (lambda: None, UserError, "is a NoneType, expected a dictionary with params"),
    "params alone": (lambda: variables()["params"], UserError, "expected a dictionary with params"),
    "float16": (
        lambda: jax.tree.map(lambda x: x.astype(jnp.float16), variables()),
        UserError,
        "is float16, expected an array of float32",
    ),
    "int32": (lambda: jax.tree.map(lambda x: x.astype(jnp.int32), variables()), UserError, "is int32"),
    "lists": (lambda: jax.tree.map(lambda x: "a", variables()), UserError, "is str"),
    "NaN mean": (lambda: changed(variables(), (*BN, "mean"), lambda x: x * jnp.nan), NonFiniteError, "bn0/mean"),
    "infinite kernel": (
        lambda: changed(variables(), ("params", "linear", "kernel"), lambda x: x + jnp.inf),
        NonFiniteError,
        "params/linear/kernel are not finite",
    ),
    "negative variance": (
        lambda: changed(variables(), (*BN, "var"), lambda x: x - 2),
        UserError,
        "bn0/var has a variance of -1",
    ),
    "bound without axis": (
        lambda: {**variables(), "bounds": {"relu0": {"upper": jnp.float32(1)}}},
        UserError,
        "bounds/relu0/upper has shape (), expected one bound for each channel",
    ),
}
BAD_KEYS = {"int": 0, "None": None, "keys": jax.random.split(KEY), "float": jnp.zeros(2)}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("door", ["evaluate", "train", "badnets", "d3", "pad_ft"])
def test_data_that_cannot_be_used_are_refused(door: str, case: str) -> None:
    make, expected = BAD_DATA[case]
    with pytest.raises(UserError, match=rf"^{door}: (data|test).*{re.escape(expected)}"):
        DOORS[door](KEY, CLASSIFIER, variables(), make())


@pytest.mark.parametrize("case", BAD_VARIABLES)
@pytest.mark.parametrize("door", ["evaluate", "scan", "finetune"])
def test_variables_that_cannot_be_used_are_refused(door: str, case: str) -> None:
    make, kind, expected = BAD_VARIABLES[case]
    with pytest.raises(kind, match=re.escape(expected)):
        DOORS[door](KEY, CLASSIFIER, make(), DATA)


STEP = GradientStep(Partial(supervised_loss, CLASSIFIER), SGD())


def fit_one(key: Any, data: Any, step: Any = STEP, state: Any = None) -> Any:
    return fit(key, step, STEP.init(variables()) if state is None else state, data, batch_size=6, epochs=0)


def fit_two(keys: Any, data: Any) -> Any:
    return fit_many(keys, stack([STEP] * 2), stack([STEP.init(variables())] * 2), data, batch_size=6, epochs=0)


def train_two(keys: Any, data: Any) -> Any:
    return train_many(keys, CLASSIFIER, data, bj.TrainConfig(epochs=1))


@pytest.mark.parametrize("case", BAD_DATA)
def test_trainings_refuse_data_that_cannot_be_used(case: str) -> None:
    """`fit` knows no classifier: it takes any channels and classes, and latents in place of images."""
    make, expected = BAD_DATA[case]
    runs = [DATA, make()]
    with pytest.raises(UserError, match=rf"^train_many: data\[1\].*{re.escape(expected)}"):
        train_two(list(jax.random.split(KEY)), runs)
    if case in ("NCHW", "gray", "large labels"):
        return
    with pytest.raises(UserError, match=r"^fit: data"):
        fit_one(KEY, make())
    with pytest.raises(UserError, match=r"^fit_many: data"):
        stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 2), make()) if isinstance(make(), Dataset) else make()
        fit_two(jax.random.split(KEY), stacked)


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
def test_trainings_refuse_keys_that_cannot_be_used(key: Any) -> None:
    if isinstance(key, jax.Array) and key.shape == KEY.shape:
        return
    with pytest.raises(UserError, match=r"^fit: key is a .*, expected a single key"):
        fit_one(key, DATA)
    for train in (fit_two, train_two):
        with pytest.raises(UserError, match=r"^(fit|train)_many: keys are a .*, expected one key for each run"):
            train([key] * 2, stack([DATA] * 2) if train is fit_two else [DATA] * 2)


def test_a_fit_refuses_what_is_no_step_or_state() -> None:
    with pytest.raises(UserError, match=r"^fit: step is a str, expected a function"):
        fit_one(KEY, DATA, step="sgd")
    with pytest.raises(UserError, match=r"^fit: state is a dict, expected what a step's init made"):
        fit_one(KEY, DATA, state=variables())
    with pytest.raises(UserError, match=r"^train_many: data is a Dataset, expected a list of one Dataset for each key"):
        train_two(list(jax.random.split(KEY)), DATA)
    with pytest.raises(UserError, match=r"^fit_many: data is a Dataset, expected one data set for each of 2 runs"):
        fit_two(jax.random.split(KEY), stack([DATA] * 3))


@pytest.mark.parametrize("case", BAD_DATA)
def test_an_attack_refuses_data_that_cannot_be_used(case: str) -> None:
    make, expected = BAD_DATA[case]
    with pytest.raises(UserError, match=rf"^AttackContext: data.*{re.escape(expected)}"):
        AttackContext(CLASSIFIER, make())


@pytest.mark.parametrize("name", bj.ATTACKS)
def test_every_method_of_an_attack_checks_its_arguments(name: str) -> None:
    attack: Any = bj.ATTACKS[name]()
    context = AttackContext(CLASSIFIER, DATA)
    for method in (attack.fit_trigger, attack.poison, attack.train_victim_in, attack.poison_data):
        arguments: dict[Any, list[Any]] = {attack.train_victim_in: [KEY], attack.poison_data: [lambda images: images]}
        others = arguments.get(method, [])
        with pytest.raises(UserError, match=f"^{name}: key is a int, expected a single key"):
            method(*((context, 3, KEY) if others == [KEY] else (3, context, *others)))
        with pytest.raises(UserError, match=f"^{name}: context is a Dataset, expected a AttackContext"):
            method(*((DATA, KEY, KEY) if others == [KEY] else (KEY, DATA, *others)))
    with pytest.raises(UserError, match=f"^{name}: trigger is a int, expected a function"):
        attack.poison_data(KEY, context, 3)


@pytest.mark.parametrize("case", BAD_VARIABLES)
def test_an_attack_and_a_file_refuse_variables_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    make, kind, expected = BAD_VARIABLES[case]
    if case != "None":  # There the attack has no clean model.
        with pytest.raises(kind, match=re.escape(expected)):
            AttackContext(CLASSIFIER, DATA, clean_model=make())
    for save in (
        lambda: bj.save_torch(tmp_path / "model.safetensors", CLASSIFIER, make()),
        lambda: bj.export_model(tmp_path / "model.jaxexport", CLASSIFIER, make(), (8, 8, 3)),
    ):
        with pytest.raises(kind, match=re.escape(expected)):
            save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("evaluate", "scan")])
def test_every_door_checks_key_classifier_and_data(door: str) -> None:
    for key in BAD_KEYS.values():
        with pytest.raises(UserError, match=f"^{door}: key is a .*, expected a single key"):
            DOORS[door](key, CLASSIFIER, variables(), DATA)
    with pytest.raises(UserError, match=f"^{door}: classifier is a str"):
        DOORS[door](KEY, "resnet18", variables(), DATA)
    with pytest.raises(UserError, match=f"^{door}: data is a list"):
        DOORS[door](KEY, CLASSIFIER, variables(), [IMAGES])
    needs = getattr(bj.DEFENSES.get(door), "needs", "clean")
    if needs != "nothing":
        with pytest.raises(UserError, match=f"^{door}: data holds no images"):
            DOORS[door](KEY, CLASSIFIER, variables(), DATA.take(slice(0)))


def test_frozen_dictionaries_are_taken() -> None:
    from flax.core import freeze

    plain = variables()
    expected = bj.FineTune(steps=1).repair(KEY, CLASSIFIER, plain, DATA).variables
    trees: tuple[Any, ...] = (freeze(plain), {name: freeze(part) for name, part in plain.items()})
    for tree in trees:
        found = bj.FineTune(steps=1).repair(KEY, CLASSIFIER, tree, DATA).variables
        assert type(found["params"]) is dict
        assert_trees_equal(found, expected)


def test_a_pytorch_module_and_tensors_say_what_makes_them_usable() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch: pip install 'backdoor_jax[torch]'")
    with pytest.raises(UserError, match=r"classifier is a Linear; make one with Classifier.from_torch"):
        bj.evaluate(torch.nn.Linear(2, 2), variables(), DATA)
    made = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), variables())
    with pytest.raises(UserError, match=r"variables: .* is Tensor, expected an array of float32"):
        bj.evaluate(CLASSIFIER, made, DATA)
    unusable: tuple[Any, ...] = (torch.zeros(2, 8, 8, 3).requires_grad_(), torch.zeros(2, device="meta"), [IMAGES, 3])
    for images in unusable:
        with pytest.raises(UserError, match=r"images are float32, expected uint8|images make no array"):
            bj.make_dataset(images, np.zeros(2, int))
    with pytest.raises(UserError, match=r"from_linen: module is a Linear, expected a flax.linen.Module"):
        Classifier.from_linen(torch.nn.Linear(2, 2), 2, ("fc",))
    with pytest.raises(UserError, match=r"is a PyTorch tensor, expected a uint8 array; give tensor.numpy"):
        bj.scan(CLASSIFIER, variables(), torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


def test_a_door_is_not_called_inside_compiled_code() -> None:
    start = variables()
    with pytest.raises(UserError, match=r"^finetune runs compiled programs itself; call it outside jit"):
        jax.jit(lambda key: bj.FineTune().repair(key, CLASSIFIER, start, DATA).variables)(KEY)
    with pytest.raises(UserError, match=r"^evaluate runs compiled programs itself"):
        jax.vmap(lambda x: bj.evaluate(CLASSIFIER, start, Dataset(x, DATA.labels)).acc)(DATA.images[None])


def test_another_methods_configuration_and_a_trigger_of_nan_are_refused() -> None:
    config: Any = bj.D3()
    with pytest.raises(UserError, match="maximum_margins: config is a D3, expected a MarginConfig"):
        maximum_margins(KEY, CLASSIFIER, variables(), (8, 8, 3), config)
    trigger = bj.Blended().trigger(KEY, (8, 8, 3))
    damaged = dataclasses.replace(trigger, pattern=trigger.pattern * jnp.nan)
    with pytest.raises(UserError, match="evaluate: trigger holds numbers that are not finite"):
        bj.evaluate(CLASSIFIER, variables(), DATA, damaged, LabelMap("all_to_one", 3))


def test_variables_of_another_network_are_one_line() -> None:
    other = build_classifier("small_cnn", 3, width=4).init(KEY, DATA.images)
    trees: tuple[Variables, ...] = (other, {"params": {}})
    for tree in trees:
        with pytest.raises(UserError, match=r"the network cannot take images of 8x8x3 with these variables \("):
            bj.evaluate(CLASSIFIER, tree, DATA)


@pytest.mark.parametrize(("mean", "std"), [((np.nan,) * 3, (1.0,) * 3), ((0.0,) * 3, (np.inf,) * 3), ((), ())])
def test_a_normalization_that_is_not_finite_is_refused(mean: Any, std: Any) -> None:
    with pytest.raises(UserError, match="finite numbers"):
        Classifier(CLASSIFIER.network, 3, mean, std)


# What is no argument at all


def wrong(value: object) -> Any:
    """A value that the types forbid."""
    return value


LABELS = LabelMap("all_to_one", 3)
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "classes true": (
        lambda at: bj.make_dataset(IMAGES, np.arange(6) % 3, True),
        "num_classes is True, expected a whole",
    ),
    "classes 10.0": (
        lambda at: bj.make_dataset(IMAGES, np.arange(6) % 3, wrong(10.0)),
        "num_classes is 10.0, expected",
    ),
    "map true": (lambda at: bj.BadNets().label_map(True), "LabelMap.num_classes is True, expected a whole number"),
    "map 10.5": (lambda at: bj.BadNets().label_map(wrong(10.5)), "LabelMap.num_classes is 10.5, expected a whole"),
    "rate of NaN": (
        lambda at: defense_effectiveness(Scores(np.nan, 1), Scores(1, 1)),
        "a rate is nan, expected shares",
    ),
    "rate of 2": (lambda at: defense_effectiveness(Scores(1, 2.0), Scores(1, 1)), "a rate is 2.0, expected shares"),
    "no rate": (lambda at: defense_effectiveness(Scores(wrong(None)), Scores(1)), "a rate is None, expected shares"),
    "no scores": (lambda at: defense_effectiveness(wrong(3), Scores(1)), "3 is a int, expected Scores"),
    "margin in text": (
        lambda at: bj.scan(CLASSIFIER, variables(), DATA.images, wrong("1")),
        "margin is '1', expected a valid",
    ),
    "no shape": (lambda at: bj.export_model(at / "x", CLASSIFIER, variables(), wrong(3)), "image_shape is 3, expected"),
    "PyTorch's 3": (lambda at: bj.load_torch(wrong(3), "resnet18"), "load_torch: source is a int, expected a file"),
    "no functions": (lambda at: Classifier.from_functions(None, wrong(3), wrong(4), 3, ("out",)), "features is a int"),
    "classes of a network": (lambda at: Classifier(None, True), "Classifier.num_classes is True, expected a whole"),
    "one image": (lambda at: bj.scan(CLASSIFIER, variables(), DATA.images[0]), "scan: images has shape (8, 8, 3)"),
    "no images": (lambda at: bj.scan(CLASSIFIER, variables(), DATA.images[:0]), "scan: images are none; give some"),
    "float latents": (
        lambda at: latents(CLASSIFIER, variables(), DATA.images / 255),
        "images is float32, expected uint8",
    ),
    "no scan": (
        lambda at: bj.TAC().repair(KEY, CLASSIFIER, variables(), DATA, scan=wrong(3)),
        "tac: scan is 3, expected a Scan",
    ),
    "saved without classifier": (
        lambda at: bj.save_model(at / "x", wrong(None), variables()),
        "classifier is a NoneType",
    ),
    "saved classifier first": (
        lambda at: bj.save_model(wrong(CLASSIFIER), wrong("x"), variables()),
        "classifier is a str; make one",
    ),
    "saved variables second": (lambda at: bj.save_model(at / "x", wrong(variables()), wrong(CLASSIFIER)), "is a dict"),
    "saved to a NUL": (lambda at: bj.save_model(at / "a\0b", CLASSIFIER, variables()), "expected the path"),
    "saved nothing": (lambda at: bj.save_model(at / "x", CLASSIFIER, {}), "expected a dictionary with params"),
    "saved another's": (
        lambda at: bj.save_model(at / "x.safetensors", build_classifier("small_cnn", 3, 4), variables()),
        "variables are not those of the network",
    ),
    "saved NaN": (
        lambda at: bj.save_model(at / "x", CLASSIFIER, jax.tree.map(lambda x: x * jnp.nan, variables())),
        "are not finite",
    ),
    "loaded None": (lambda at: bj.load(wrong(None)), "load: source is None, expected the path"),
    "loaded 3": (lambda at: bj.load_model(wrong(3)), "load_model: path is 3, expected the path"),
    "evaluated in another order": (lambda at: bj.evaluate(CLASSIFIER, wrong(DATA), wrong(variables())), "is a Dataset"),
    "a function of labels": (
        lambda at: bj.evaluate(CLASSIFIER, variables(), DATA, lambda x: x, wrong(lambda y: y)),
        "label_map is a function, expected a LabelMap",
    ),
    "embedded NaN": (lambda at: embedding(np.full((3, 3), np.nan)), "latents are not finite"),
    "init without key": (
        lambda at: CLASSIFIER.init(wrong(3), DATA.images),
        "init: key is a int, expected a single key",
    ),
    "init without images": (lambda at: CLASSIFIER.init(KEY, wrong(3)), "init: images are int, expected (N, height"),
    "a crop as large as the image": (
        lambda at: bj.train(KEY, CLASSIFIER, DATA, bj.TrainConfig(epochs=1, crop=8)),
        "crop is 8 for images of 8x8, expected less",
    ),
    "trigger to float": (lambda at: with_trigger(lambda x: x / 255), "trigger makes float32 (6, 8, 8, 3) of uint8"),
    "trigger to None": (lambda at: with_trigger(lambda x: None), "trigger makes NoneType of uint8"),
    "trigger to a shape": (lambda at: with_trigger(lambda x: x[:, :4]), "trigger makes uint8 (6, 4, 8, 3) of uint8"),
    "trigger that fails": (lambda at: with_trigger(lambda x: x.nothing), "trigger cannot be applied to uint8"),
    "pytree to float": (lambda at: with_trigger(Partial(lambda x: x / 255)), "trigger makes float32 (6, 8, 8, 3)"),
}


def with_trigger(trigger: Any) -> Any:
    return bj.evaluate(CLASSIFIER, variables(), DATA, trigger, LABELS)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_argument_is_one_line(case: str, tmp_path: Path) -> None:
    call, expected = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(expected)):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trigger_may_be_any_function_of_uint8_images() -> None:
    def in_numpy(images: Any) -> Any:
        return np.minimum(np.asarray(images), 200)

    assert with_trigger(lambda x: x) == with_trigger(Partial(lambda x: x))
    assert with_trigger(in_numpy) == with_trigger(Partial(lambda x: jnp.minimum(x, 200)))
    assert not triggered_change(CLASSIFIER, variables(), DATA.images, lambda x: x).mean.any()


# Functions without a network

RATES = np.linspace(0.1, 0.9, 9)
SIGNAL = jnp.asarray(RATES)
CLASSES = np.arange(9) % 3
START = variables()
PUBLIC: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "clean_indices": (clean_indices, {"key": KEY, "labels": CLASSES, "ratio": 0.5, "num_classes": 3}),
    "draw_poisoned": (draw_poisoned, {"key": KEY, "rate": 0.5, "images": 9, "candidates": CLASSES}),
    "poison_count": (poison_count, {"rate": 0.5, "images": 9}),
    "poison": (poison, {"key": KEY, "data": DATA, "trigger": lambda x: x, "labels": LABELS, "rate": 0.5}),
    "load": (bj.load, {"source": "digits", "train_size": 9, "test_size": 9, "seed": 0, "image_size": None}),
    "load_labeled": (load_labeled, {"source": "digits", "num_classes": 10, "channels": 3, "size": None}),
    "success_rates": (success_rates, {"predictions": CLASSES, "labels": CLASSES, "label_map": LABELS}),
    "chance_level": (chance_level, {"labels": CLASSES, "num_classes": 3}),
    "is_near_chance": (is_near_chance, {"correct": 5, "labels": CLASSES, "num_classes": 3}),
    "agreement": (agreement, {"scores": RATES, "change": RATES, "k": 2}),
    "largest_margin": (largest_margin, {"margins": RATES}),
    "smallest_outlier": (smallest_outlier, {"values": RATES}),
    "weight_change": (weight_change, {"before": START, "after": START, "path": ("linear", "kernel")}),
    "build_classifier": (build_classifier, {"model": "small_cnn", "num_classes": 3, "width": 2, "dtype": "float32"}),
    "describe": (describe, {"classifier": CLASSIFIER}),
    "take": (DATA.take, {"indices": np.arange(3)}),
    "suspicious": (
        suspicious,
        {"classifier": CLASSIFIER, "variables": START, "training_set": DATA, "target": 0, "method": "x"},
    ),
    "load_model": (bj.load_model, {"path": "x", "model": None, "classifier": None, "key": None, "mean": None}),
}
JUNK: dict[str, Any] = {
    "True": True,
    "-1": -1,
    "NaN": math.nan,
    "text": "x",
    "list": [],
    "dict": {},
    "object": object(),
    "type": bj.D3,
    "function": lambda *_: None,
    "floats": np.full(9, np.nan),
    "no rows": np.zeros((0, 8, 8, 3), np.uint8),
    "no axes": np.array(1.0),
    "texts": np.array(["a", "b"]),
    "objects": np.array([None, 1], object),
    "far": np.array([0, 10**9]),
    "deleted": jnp.zeros(9),
}
JUNK["deleted"].delete()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_return_or_refuse_in_one_line(name: str) -> None:
    call, arguments = PUBLIC[name]
    for argument in arguments:
        for junk in JUNK.values():
            with contextlib.suppress(UserError):
                call(**{**arguments, argument: junk})


NONSENSE: dict[str, tuple[Callable[[], Any], str]] = {
    "indices of no image": (lambda: DATA.take(np.array([0, 10**9])), "take: indices run from 0 to 1000000000"),
    "float indices": (lambda: DATA.take(np.array([0.5])), "take: indices are float64, expected whole numbers"),
    "bool labels": (lambda: success_rates(CLASSES, CLASSES > 0, LABELS), "success_rates: labels are bool (9,)"),
    "classes NaN": (lambda: chance_level(CLASSES, wrong(math.nan)), "chance_level: num_classes is nan, expected a"),
    "labels of a draw": (lambda: clean_indices(KEY, wrong(RATES), 0.5, 3), "clean_indices: labels are float64 (9,)"),
    "flip in text": (
        lambda: bj.train(KEY, CLASSIFIER, DATA, bj.TrainConfig(epochs=1), flip=wrong("no")),
        "train: flip is 'no', expected a valid boolean",
    ),
    "loss of nothing": (
        lambda: bj.train(KEY, CLASSIFIER, DATA, bj.TrainConfig(epochs=1), loss=wrong([])),
        "train: loss is [], expected a function",
    ),
    "no labels": (lambda: chance_level(CLASSES[:0], 3), "chance_level: labels are empty (0,), expected an array"),
    "negative labels": (lambda: is_near_chance(2, CLASSES - 1, 3), "is_near_chance: labels run from -1, expected"),
    "labels of more classes": (lambda: chance_level(CLASSES, 2), "labels run to 2, expected 0 to 1"),
    "more correct than images": (lambda: is_near_chance(10, CLASSES, 3), "correct is 10, expected at most"),
    "no margins": (lambda: largest_margin(RATES[:0]), "largest_margin: margins are empty (0,)"),
    "a level of 1": (lambda: membership(KEY, SIGNAL, SIGNAL, level=1.0), "level is 1.0, expected a value less than 1"),
    "no resamples": (lambda: membership(KEY, SIGNAL, SIGNAL, resamples=0), "resamples is 0, expected a value greater"),
    "many resamples": (lambda: membership(KEY, SIGNAL, SIGNAL, resamples=10**9), "expected a value less than or equal"),
    "no positions": (lambda: line(()), "loss_along_line: positions are none; give some"),
    "targets of other classes": (
        lambda: loss_along_line(CLASSIFIER, START, START, DATA, lambda x: x, LabelMap("all_to_one", 4)),
        "label_map is for 4 classes, but the classifier has 3",
    ),
    "rates of other classes": (
        lambda: success_rates(CLASSES, CLASSES, LabelMap("all_to_one", 2)),
        "success_rates: labels run to 2, expected 0 to 1",
    ),
    "a negative margin": (
        lambda: bj.scan(CLASSIFIER, START, DATA.images, -1),
        "margin is -1, expected a value greater",
    ),
    "a random key of a file": (
        lambda: bj.load_model("x", key=wrong(KEY)),
        "key is a PRNGKeyArray, expected",
    ),
    "labels in a list": (
        lambda: bj.evaluate(CLASSIFIER, START, Dataset(wrong(IMAGES), wrong([0] * 6))),
        "evaluate: test.labels are a list, expected an array",
    ),
    "pattern of a size": (lambda: random_pattern(KEY, wrong((8, 8))), "shape is (8, 8), expected height, width, chan"),
    "evidence of nothing": (lambda: scan_evidence(wrong(None), "per_sample"), "found is None, expected a Scan"),
    "statistic": (lambda: scan_evidence(wrong(None), wrong("x")), "scan_evidence: "),
    "a crop of floats": (
        lambda: random_crop(KEY, wrong(IMAGES / 255), 1),
        "images are float64 (6, 8, 8, 3)",
    ),
    "a negative crop": (lambda: random_crop(KEY, wrong(IMAGES), -1), "random_crop: pad is -1, expected"),
    "a flip without a key": (lambda: random_flip(wrong(0), wrong(IMAGES)), "random_flip: key is a int, expected"),
    "an angle for all": (lambda: rotate(wrong(IMAGES), jnp.zeros(1)), "expected one for each of 6 images"),
    "name of a number": (lambda: bj.predict(CLASSIFIER, variables(), DATA.images, name=wrong(3)), "name is 3, expec"),
    "trigger without target": (lambda: bj.evaluate(CLASSIFIER, variables(), DATA, lambda x: x), "label_map is missing"),
    "empty images": (lambda: bj.make_dataset(np.zeros((2, 0, 8, 3), np.uint8), np.arange(2)), "shape (2, 0, 8, 3)"),
    "mean beyond float32": (lambda: Classifier(CLASSIFIER.network, 3, (1e300,) * 3), "finite numbers"),
    "std beyond float32": (lambda: Classifier(CLASSIFIER.network, 3, std=(1e300,) * 3), "finite numbers"),
    "mean in text": (lambda: Classifier(CLASSIFIER.network, 3, wrong("abc")), "finite numbers"),
}


def line(positions: Any) -> Any:
    return loss_along_line(CLASSIFIER, START, START, DATA, lambda x: x, LABELS, positions)


@pytest.mark.parametrize("positions", [(math.nan,), (0.0, math.inf), ("x",), [[0.0, 1.0]], np.zeros((2, 2)), 1, "ab"])
def test_positions_are_a_sequence_of_finite_numbers(positions: Any) -> None:
    with pytest.raises(UserError, match=r"positions is .*, expected a sequence of finite numbers"):
        line(positions)


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused(case: str) -> None:
    call, expected = NONSENSE[case]
    with pytest.raises(UserError, match=re.escape(expected)):
        call()


def test_a_line_between_models_of_nan_has_no_rates() -> None:
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, variables())
    for models in ((broken, variables()), (variables(), broken)):
        with pytest.raises(NonFiniteError, match="are not finite"):
            loss_along_line(CLASSIFIER, models[0], models[1], DATA, lambda x: x, LABELS, (0.0, 1.0))


def test_arrays_that_were_donated_are_named() -> None:
    donated = jax.tree.map(lambda leaf: leaf + 0, variables())
    jax.tree.map(lambda leaf: leaf.delete(), donated)
    for call in (
        lambda: bj.evaluate(CLASSIFIER, donated, DATA),
        lambda: bj.FineTune(steps=1).repair(KEY, CLASSIFIER, donated, DATA),
        lambda: bj.save_model("unwritten", CLASSIFIER, donated),
    ):
        with pytest.raises(UserError, match="variables holds an array that was deleted, such as one donated"):
            call()


# NaN


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("count", [4, 400])
def test_nan_survives_rectifier_pooling_and_mean(count: int, level: int) -> None:
    """On CPU, XLA's maximum of NaN and 0 is 0 in some programs, depending on the size."""

    rectify: Any = ReLU()

    def network(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x, jnp.ones((3, 3, 3, 8)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(max_pool(rectify.apply({}, x * scale + 1), 2), (1, 2))

    compiled = jax.jit(network, compiler_options={"xla_backend_optimization_level": level})
    assert np.isnan(compiled(jnp.ones((count, 8, 8, 3)), jnp.float32(np.nan))).all()
    assert np.isfinite(compiled(jnp.ones((count, 8, 8, 3)), jnp.float32(1))).all()


@pytest.mark.parametrize("signal", [loss_signal, confidence_signal])
def test_a_membership_signal_is_never_nan(signal: Callable[..., Any]) -> None:
    damaged = changed(changed(START, (*BN, "var"), lambda x: x * 0), ("params", "bn0", "scale"), lambda x: x * 3e38)
    with pytest.raises(NonFiniteError, match="logits are not finite, so there is no membership signal"):
        signal(CLASSIFIER, damaged, DATA)


def test_a_margin_may_be_a_number_on_the_device() -> None:
    found = [bj.scan(CLASSIFIER, START, DATA.images, margin) for margin in (0.5, wrong(jnp.float32(0.5)))]
    np.testing.assert_array_equal(found[0].per_sample, found[1].per_sample)


@pytest.mark.parametrize("count", [4, 400])
def test_a_network_whose_numbers_overflow_has_no_rate(count: int) -> None:
    """The weights are finite, what they compute is not."""
    damaged = changed(variables(), (*BN, "var"), lambda x: x * 0 - 0.0)
    damaged = changed(damaged, ("params", "bn0", "scale"), lambda x: x * 3e38)
    data = bj.make_dataset(np.resize(IMAGES, (count, 8, 8, 3)), np.arange(count) % 3, 3)
    with pytest.raises(NonFiniteError, match="logits are not finite, so there is no rate"):
        bj.evaluate(CLASSIFIER, damaged, data)


def test_the_rectifier_has_the_usual_gradient() -> None:
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(relu(x) ** 2))(x), [0, 0, 0, 6])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(relu(x)))(x), [0, 0, 0, 1])


# Settings


@pytest.mark.parametrize(
    "override",
    [
        "steps='5'",
        "steps=true",
        "steps=5.5",
        "steps=1000000000000",
        "learning_rate=1e6",
        "learning_rate='0.1'",
        "momentum=-5",
        "momentum=1",
        "weight_decay=-5",
        "weight_decay=2",
        "flip=1",
    ],
)
def test_settings_are_as_strict_from_text_as_from_python(override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"^finetune: {name} is .*, expected "):
        make_defense("finetune", None, [override])


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": [True]},
        {"seeds": [2**63]},
        {"seeds": [-1]},
        {"model": {"width": 10**9}},
        {"attacks": [{"name": "badnets", "target": True}]},
        {"clean_ratio": "0.5"},
        {"stratified": 1},
        *(
            {"attacks": [{"name": "badnets", "label": label}]}
            for label in ("a\0", "a\nb", "\x1b[1m", "x" * 300, "\udcff")
        ),
    ],
)
def test_an_experiment_is_checked_before_anything_is_built(changes: dict[str, Any]) -> None:
    document = {"name": "x", "attacks": [{"name": "badnets"}], "defenses": [], **changes}
    with pytest.raises(UserError, match=r"expected|must be") as caught:
        parse_experiment(document, "x.yaml")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("classes", "width"), [(10**9, 2), (3, 10**9), (True, 2), (3, 2.0), (1, 2)])
def test_networks_of_impossible_size_are_refused(classes: Any, width: Any) -> None:
    with pytest.raises(UserError, match=r"make no classifier|expected a whole number"):
        build_classifier("small_cnn", classes, width)


# The environment


RULES: dict[str, Callable[[], Any]] = {
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "types": lambda: jax.numpy_dtype_promotion("strict"),
    "no jit": lambda: jax.disable_jit(),
}


@pytest.mark.parametrize("rule", ["ranks", "types", pytest.param("no jit", marks=pytest.mark.fuzz)])
def test_strict_rules_of_jax_are_the_callers_own(rule: str) -> None:
    start = variables()
    with RULES[rule]():
        assert 0 <= bj.evaluate(CLASSIFIER, start, DATA).acc <= 1
        assert bj.FineTune(steps=1, batch_size=6).repair(KEY, CLASSIFIER, start, DATA).changed
        assert CLASSIFIER.logits(start, DATA.images)[0].shape == (6, 3)


def test_transfers_may_be_forbidden_to_the_caller() -> None:
    start = variables()
    with jax.transfer_guard("disallow"):
        assert 0 <= bj.evaluate(CLASSIFIER, start, DATA).acc <= 1
