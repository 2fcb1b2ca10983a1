"""PAD-FT: purification against NumPy, bounds against Adam by hand, the head's step by hand, and a small victim."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, leaves_of, trees_equal
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from miniature import Case

from backdoor_jax import (
    PADFT,
    BadNets,
    Classifier,
    Dataset,
    NonFiniteError,
    TrainConfig,
    UserError,
    build_classifier,
    digits,
    evaluate,
    make_dataset,
    train,
)
from backdoor_jax.attacks import AttackContext
from backdoor_jax.data import Augment
from backdoor_jax.defenses import PAD, Repair, bound_activations, purify, tune_classifier
from backdoor_jax.defenses.bounds import MMBM_PLACES
from backdoor_jax.defenses.pad_ft import classifier_loss, score, view_latents
from backdoor_jax.models import Variables
from backdoor_jax.models.layers import ReLU
from backdoor_jax.training import symmetric_cross_entropy

CLASSES = 3
QUICK = PADFT(per_class=4, bound_epochs=3, bound_batch_size=6, tune_epochs=2, batch_size=6, views=2, flip=True)


class Plain(nn.Module):
    """A linear head on flattened pixels, with or without a rectifier; counts how often it is traced."""

    rectified: bool = False
    traces = 0

    def setup(self) -> None:
        self.relu = ReLU() if self.rectified else lambda x: x
        self.linear = nn.Dense(CLASSES)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        del train
        Plain.traces += 1
        return self.relu(x.reshape(x.shape[0], -1))

    def head(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.features(x, train))


def random_data(count: int, seed: int = 0, labels: np.ndarray | None = None) -> Dataset:
    generator = np.random.default_rng(seed)
    tint = generator.integers(0, 128, (count, 1, 1, 3))
    images = (tint + generator.integers(0, 128, (count, 8, 8, 3))).astype(np.uint8)
    return make_dataset(images, np.arange(count) % CLASSES if labels is None else labels, CLASSES)


@pytest.fixture(scope="module")
def case(tiny_classifier: Classifier, tiny_variables: Variables) -> Case:
    """A victim as confident as trained ones are, and 60 images."""
    head = jax.tree.map(lambda leaf: 60 * leaf, tiny_variables["params"]["linear"])
    params = {**tiny_variables["params"], "linear": head}
    return Case(tiny_classifier, {**tiny_variables, "params": params}, random_data(60))


@pytest.fixture(scope="module")
def gentle(tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset) -> Case:
    """A victim with low confidence, and 24 images."""
    return Case(tiny_classifier, tiny_variables, tiny_data)


@pytest.fixture(scope="module")
def resnet(tiny_data: Dataset) -> Case:
    classifier = build_classifier("preact_resnet18", CLASSES, width=2)
    return Case(classifier, classifier.init(jax.random.key(0), tiny_data.images), tiny_data)


def wrongness(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 - p_y in float64, as the share of the other classes, so that nothing cancels."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    own = np.arange(logits.shape[-1]) == labels[..., None]
    return np.where(own, 0, powers).sum(-1) / powers.sum(-1)


def sce(logits: np.ndarray, labels: np.ndarray, alpha: float, log_zero: float) -> np.ndarray:
    wrong = wrongness(logits, labels)
    return -np.log1p(-wrong) - alpha * log_zero * wrong


def logits_of(case: Case) -> np.ndarray:
    return np.asarray(case.classifier.logits(case.variables, case.data.images)[0], np.float64)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by path, such as ``params/linear/bias``."""
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def maxima(case: Case) -> dict[str, np.ndarray]:
    return by_path(case.classifier.activations(case.variables, case.data.images))


# Stage 1


@pytest.mark.parametrize("k", [1, 7, 20])
def test_purification_keeps_the_k_images_of_each_labeled_class_with_the_largest_p_y(case: Case, k: int) -> None:
    logits, labels = logits_of(case), np.asarray(case.data.labels)
    margins = logits - logits[np.arange(60), labels][:, None]
    assert (np.log(np.exp(margins).sum(1), dtype=np.float32) == 0).sum() > 5, "too little confidence for ties"
    kept = purify(case.classifier, case.variables, case.data, PAD(per_class=k))
    wrong = wrongness(logits, labels)
    assert np.array_equal(kept.indices, np.unique(kept.indices))
    assert kept.short == ()
    for c in range(CLASSES):
        inside = np.intersect1d(np.flatnonzero(labels == c), kept.indices)
        outside = np.setdiff1d(np.flatnonzero(labels == c), kept.indices)
        assert len(inside) == k
        assert wrong[inside].max() <= wrong[outside].min(initial=1.0) * 1.0001
        assert kept.scores[inside].max() <= kept.scores[outside].min(initial=np.inf)


@given(alpha=st.floats(0, 20), log_zero=st.floats(-12, -0.01))
def test_neither_alpha_nor_log_zero_changes_what_is_kept(case: Case, alpha: float, log_zero: float) -> None:
    config = PAD(per_class=6, alpha=alpha, log_zero=log_zero)
    kept = purify(case.classifier, case.variables, case.data, config)
    plain = purify(case.classifier, case.variables, case.data, PAD(per_class=6, alpha=0.0))
    assert kept.indices.tolist() == plain.indices.tolist()


def test_a_class_with_fewer_than_k_images_keeps_all_of_them_and_is_named(case: Case) -> None:
    labels = np.array([2 if i in (5, 40) else i % 2 for i in range(60)])
    data = random_data(60, labels=labels)
    kept = purify(case.classifier, case.variables, data, PAD(per_class=3))
    assert kept.short == (2,)
    assert np.bincount(labels[kept.indices]).tolist() == [3, 3, 2]
    assert {5, 40} <= set(kept.indices.tolist())
    assert purify(case.classifier, case.variables, data, PAD(per_class=2)).short == ()


def test_a_class_without_images_is_rejected_by_name(case: Case) -> None:
    data = random_data(60, labels=np.arange(60) % 2)
    with pytest.raises(UserError, match="class 2 has no images"):
        purify(case.classifier, case.variables, data, PAD(per_class=3))


@pytest.mark.parametrize(("count", "k"), [(60, 1), (100, 2), (24, 1), (9, 1)])
def test_six_percent_are_kept_by_default_and_at_least_one_of_each_class(gentle: Case, count: int, k: int) -> None:
    data = random_data(count)
    kept = purify(gentle.classifier, gentle.variables, data)
    assert np.bincount(np.asarray(data.labels)[kept.indices]).tolist() == [k] * CLASSES


def test_scores_that_are_not_finite_are_an_error(gentle: Case) -> None:
    damaged = jax.tree.map(lambda leaf: leaf * jnp.nan, gentle.variables)
    with pytest.raises(NonFiniteError, match="purify"):
        purify(gentle.classifier, damaged, gentle.data)


@pytest.mark.parametrize("count", [7, 501, 1203])
def test_scores_do_not_depend_on_how_the_set_divides_into_chunks(gentle: Case, count: int) -> None:
    case = gentle._replace(data=random_data(count))
    labels = np.asarray(case.data.labels)
    found = np.asarray(score(case.classifier, case.variables, case.data, 0.7, -6.0))
    direct = symmetric_cross_entropy(
        case.classifier.logits(case.variables, case.data.images)[0], case.data.labels, 0.7, -6.0
    )
    assert found.shape == (count,)
    np.testing.assert_allclose(found, direct, rtol=1e-5)
    np.testing.assert_allclose(found, sce(logits_of(case), labels, 0.7, -6.0), rtol=1e-4)
    assert purify(*case, PAD(per_class=1, alpha=0.7, log_zero=-6.0)).scores.tolist() == found.tolist()


def test_scoring_traces_once_for_a_shape() -> None:
    data = random_data(30)
    variables = Classifier(Plain(), CLASSES).init(jax.random.key(0), data.images)
    score(Classifier(Plain(), CLASSES), variables, data, 1.0, -4.0)
    before = Plain.traces
    for alpha in (0.5, 2.0):
        score(Classifier(Plain(), CLASSES), jax.tree.map(jnp.negative, variables), data, alpha, -alpha)
    assert Plain.traces == before
    score(Classifier(Plain(), CLASSES), variables, random_data(31), 1.0, -4.0)
    assert Plain.traces > before


def test_a_second_repair_of_the_same_shapes_with_other_floats_traces_nothing() -> None:
    data = random_data(60)
    classifier = Classifier(Plain(rectified=True), CLASSES)
    variables = classifier.init(jax.random.key(0), data.images)
    QUICK.repair(jax.random.key(1), classifier, variables, data)
    before = Plain.traces
    changed = dataclasses.replace(QUICK, alpha=2.0, bound_weight=0.1, bound_learning_rate=0.2, learning_rate=0.02)
    changed.repair(jax.random.key(2), classifier, jax.tree.map(lambda leaf: leaf / 2, variables), data)
    assert Plain.traces == before


# Stage 2


@pytest.mark.parametrize("epochs", [1, 4, 30])
def test_bounds_are_lowered_from_their_maxima_and_are_never_negative(gentle: Case, epochs: int) -> None:
    config = PAD(bound_epochs=epochs, bound_batch_size=12)
    clipped, info = bound_activations(jax.random.key(0), *gentle, config)
    start, bounds = maxima(gentle), by_path(clipped["bounds"])
    assert start.keys() == bounds.keys()
    for path, bound in bounds.items():
        assert np.isfinite(bound).all()
        assert (bound >= 0).all()
        assert (bound <= start[path] * (1 + 1e-6)).all()
        assert (bound < start[path]).any()
    assert info["bounded_rectifiers"] == 1
    assert 0 <= info["bound_to_maximum"] < 1


def test_a_channel_silent_on_clean_images_stays_shut(gentle: Case) -> None:
    """Such a channel may be the trigger's, and raising its bound changes nothing on the images at hand."""
    bn = gentle.variables["params"]["bn"]
    silent = {**gentle.variables["params"], "bn": {**bn, "bias": bn["bias"].at[1].set(-100.0)}}
    case = gentle._replace(variables={**gentle.variables, "params": silent})
    config = PAD(bound_epochs=7, bound_batch_size=12, bound_weight=0.01)
    clipped, info = bound_activations(jax.random.key(0), *case, config)
    (start,), (bound,) = maxima(case).values(), by_path(clipped["bounds"]).values()
    assert start[1] == 0
    assert bound[1] == 0
    assert 0 <= info["bound_to_maximum"] <= 1


def test_bounding_changes_no_weight(gentle: Case) -> None:
    before = leaves_of(gentle.variables)
    clipped, _ = bound_activations(jax.random.key(0), *gentle, PAD(bound_epochs=2, bound_batch_size=12))
    rest = {name: part for name, part in clipped.items() if name != "bounds"}
    assert by_path(rest).keys() == by_path(gentle.variables).keys()
    assert_trees_equal(rest, before)
    assert_trees_equal(gentle.variables, before)


def test_bounds_start_at_the_maxima_of_all_images_where_they_change_nothing(gentle: Case) -> None:
    case = gentle._replace(data=random_data(1203))
    config = PAD(bound_epochs=1, bound_batch_size=1203, bound_learning_rate=1e-12)
    clipped, info = bound_activations(jax.random.key(0), *case, config)
    for path, bound in by_path(clipped["bounds"]).items():
        np.testing.assert_allclose(bound, maxima(case)[path], rtol=1e-5)
    np.testing.assert_allclose(logits_of(case._replace(variables=clipped)), logits_of(case), rtol=1e-5, atol=1e-5)
    assert info["bound_to_maximum"] == pytest.approx(1)


def test_only_the_named_places_are_bounded(resnet: Case) -> None:
    config = PAD(places=MMBM_PLACES, bound_epochs=1, bound_batch_size=12)
    clipped, info = bound_activations(jax.random.key(0), *resnet, config)
    bounds = by_path(clipped["bounds"])
    assert {path.removesuffix("/upper") for path in bounds} == set(MMBM_PLACES)
    assert info["bounded_rectifiers"] == len(bounds) == 3
    assert len(maxima(resnet)) == 16
    assert (logits_of(resnet._replace(variables=clipped)) != logits_of(resnet)).any()


def test_an_unknown_place_is_rejected_with_a_list_of_the_known_ones(gentle: Case) -> None:
    with pytest.raises(UserError, match=r"no rectifier at layer9/relu.* there are relu"):
        bound_activations(jax.random.key(0), *gentle, PAD(places=("relu", "layer9/relu")))


def test_a_network_without_bounded_rectifiers_is_rejected_with_what_it_needs() -> None:
    data = random_data(12)
    classifier = Classifier(Plain(), CLASSES)
    with pytest.raises(UserError, match=r"no .*rectifiers.*models\.layers\.ReLU"):
        PAD(per_class=2).repair(jax.random.key(0), classifier, classifier.init(jax.random.key(0), data.images), data)


@pytest.mark.parametrize(("epochs", "exponents"), [(5, [0]), (21, [0]), (22, [0, 1]), (31, [0, 1]), (42, [0, 1, 2, 3])])
@pytest.mark.parametrize("accurate", [True, False])
def test_the_weight_rises_while_the_accuracy_is_kept_and_falls_otherwise(
    gentle: Case, epochs: int, exponents: list[int], accurate: bool
) -> None:
    hopeless = (np.argmax(logits_of(gentle), -1) + 1) % CLASSES
    data = gentle.data if accurate else Dataset(gentle.data.images, jnp.asarray(hopeless, jnp.int32))
    config = PAD(bound_epochs=epochs, bound_accuracy=0.0 if accurate else 1.0, bound_weight=0.5)
    _, info = bound_activations(jax.random.key(0), gentle.classifier, gentle.variables, data, config)
    sign = 1 if accurate else -1
    assert info["bound_weights"] == pytest.approx([0.5 * 1.2 ** (sign * n) for n in exponents], abs=1e-4)
    assert accurate or info["bound_accuracy"] < 1


def test_the_new_weight_takes_effect_after_epoch_20_counted_from_0(gentle: Case) -> None:
    def bounds(epochs: int, factor: float) -> np.ndarray:
        config = PAD(bound_epochs=epochs, bound_factor=factor, bound_accuracy=0.0, bound_weight=0.1)
        clipped, _ = bound_activations(jax.random.key(0), *gentle, config)
        return np.asarray(clipped["bounds"]["relu"]["upper"])

    assert bounds(21, 1.0).tolist() == bounds(21, 9.0).tolist()
    assert (bounds(24, 1.0) != bounds(24, 9.0)).any()


def test_bounds_descend_their_objective_by_adam(gentle: Case) -> None:
    """Five full-batch steps against the objective's gradient by hand and Adam by its definition, in float64."""
    network, variables = gentle.classifier.network, gentle.variables
    x = gentle.classifier.normalize(gentle.data.images)
    raw = network.apply(variables, x, method=lambda net, x: net.bn(net.conv(x), False))
    activation = np.maximum(np.asarray(raw, np.float64), 0)
    kernel = np.asarray(variables["params"]["linear"]["kernel"], np.float64)
    bounds = activation.max((0, 1, 2))
    weight, rate, first, second = 0.02, 0.03, np.zeros(4), np.zeros(4)
    assert bounds.min() > 5 * rate
    for step in range(1, 6):
        latent_change = np.minimum(activation, bounds).mean((1, 2)) - activation.mean((1, 2))
        error = latent_change @ kernel
        to_latent = 2 * error @ kernel.T / error.size
        gradient = (to_latent * (activation > bounds).mean((1, 2))).sum(0) + weight * bounds / np.linalg.norm(bounds)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        bounds = bounds - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    config = PAD(bound_epochs=5, bound_batch_size=24, bound_learning_rate=rate, bound_weight=weight)
    clipped, _ = bound_activations(jax.random.key(3), *gentle, config)
    np.testing.assert_allclose(clipped["bounds"]["relu"]["upper"], bounds, rtol=1e-4)


# Stage 3


@pytest.fixture(scope="module")
def clipped(gentle: Case) -> Case:
    bounds = {"relu": {"upper": maxima(gentle)["relu/upper"] / 2}}
    return gentle._replace(variables={**gentle.variables, "bounds": jax.tree.map(jnp.asarray, bounds)})


def test_tuning_changes_the_head_and_nothing_else(clipped: Case) -> None:
    original = leaves_of(clipped.variables)
    tuned, info = tune_classifier(jax.random.key(0), *clipped, QUICK)
    before, after = by_path(clipped.variables), by_path(tuned)
    assert before.keys() == after.keys()
    assert {path for path in before if (before[path] != after[path]).any()} == {
        "params/linear/kernel",
        "params/linear/bias",
    }
    assert_trees_equal(clipped.variables, original)
    assert info["steps"] == 8


def test_cached_latents_are_those_of_the_augmented_images_under_the_clipped_network(clipped: Case) -> None:
    config = PADFT(views=3, flip=True, brightness=0.4, contrast=0.3)
    found = np.asarray(view_latents(jax.random.key(7), *clipped[:2], clipped.data.images, config))
    augment = Augment(flip=True, brightness=0.4, contrast=0.3)
    views = [augment(key, clipped.data.images) for key in jax.random.split(jax.random.key(7), 3)]
    assert found.shape == (24, 4, 4)
    for number, view in enumerate([clipped.data.images, *views]):
        assert number == 0 or (view != clipped.data.images).any()
        one_by_one = [clipped.classifier.features(clipped.variables, image[None])[0][0] for image in view[:5]]
        np.testing.assert_allclose(found[:5, number], np.stack(one_by_one), rtol=1e-5)


def test_the_heads_loss_is_sce_on_every_view_plus_consistency(clipped: Case) -> None:
    config = PADFT(alpha=0.3, log_zero=-6.0, consistency=2.5)
    generator = np.random.default_rng(0)
    seen, labels = generator.normal(size=(5, 3, 4)).astype(np.float32) * 3, np.array([0, 1, 2, 1, 0])
    batch = Dataset(jnp.asarray(seen), jnp.asarray(labels))
    loss, (_, info) = classifier_loss(clipped.classifier, config, clipped.variables, batch, jax.random.key(0))
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), clipped.variables["params"]["linear"])
    logits = seen @ head["kernel"] + head["bias"]
    supervised = sce(logits, np.repeat(labels[:, None], 3, 1), 0.3, -6.0).mean()
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    distances = [((softmax[i, v] - softmax[i, 0]) ** 2).sum() for i in range(5) for v in (1, 2)]
    assert float(info["supervised"]) == pytest.approx(supervised, rel=1e-5)
    assert float(info["consistency"]) == pytest.approx(np.mean(distances), rel=1e-5)
    assert float(loss) == pytest.approx(supervised + 2.5 * np.mean(distances), rel=1e-5)


def test_one_step_of_the_head_is_one_of_sgd(clipped: Case) -> None:
    """Views equal to their images, so that the loss is the mean SCE and no key matters."""
    config = PADFT(brightness=0.0, contrast=0.0, tune_epochs=1, batch_size=24, learning_rate=0.2, alpha=0.5)
    tuned, info = tune_classifier(jax.random.key(0), *clipped, config)
    latent, _ = clipped.classifier.features(clipped.variables, clipped.data.images)

    def loss(head: dict[str, jax.Array]) -> jax.Array:
        log_p = jax.nn.log_softmax(latent @ head["kernel"] + head["bias"])[jnp.arange(24), clipped.data.labels]
        return jnp.mean(-log_p + 0.5 * 4 * (1 - jnp.exp(log_p)))

    head = clipped.variables["params"]["linear"]
    value, gradient = jax.value_and_grad(loss)(head)
    expected = jax.tree.map(lambda w, g: w - 0.2 * (g + 5e-4 * w), head, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), tuned["params"]["linear"], expected)
    assert info["last_epoch"]["loss"] == pytest.approx(float(value), rel=1e-5)
    assert info["last_epoch"]["consistency"] == pytest.approx(0, abs=1e-12)


def test_whole_numbers_are_accepted_for_float_fields(clipped: Case) -> None:
    config = PADFT(alpha=1, log_zero=-4, consistency=1, weight_decay=0, tune_epochs=1, batch_size=24, views=1)
    exact = PADFT(alpha=1.0, log_zero=-4.0, consistency=1.0, weight_decay=0.0, tune_epochs=1, batch_size=24, views=1)
    found, expected = (tune_classifier(jax.random.key(0), *clipped, c)[0] for c in (config, exact))
    assert config == exact
    assert_trees_equal(found, expected)


# All stages


@pytest.fixture(scope="module")
def before(case: Case) -> list[np.ndarray]:
    return leaves_of(case.variables)


@pytest.fixture(scope="module")
def repaired(case: Case, before: list[np.ndarray]) -> Repair:
    return QUICK.repair(jax.random.key(5), *case)


def test_a_repair_leaves_the_victim_unchanged(case: Case, before: list[np.ndarray], repaired: Repair) -> None:
    assert_trees_equal(case.variables, before)
    assert by_path(repaired.variables).keys() == by_path(case.variables).keys() | {"bounds/relu/upper"}


def test_a_repair_reports_which_images_it_took_for_clean(case: Case, repaired: Repair) -> None:
    purified = purify(*case, QUICK)
    assert repaired.kept is not None
    assert repaired.kept.tolist() == purified.indices.tolist()
    assert repaired.info["purified"] == len(purified.indices) == 4 * CLASSES
    assert repaired.info["short_classes"] == []
    assert repaired.changed
    assert json.loads(json.dumps(repaired.info)) == repaired.info


def test_a_repair_is_deterministic_under_its_key(case: Case, repaired: Repair) -> None:
    again, other = (QUICK.repair(jax.random.key(number), *case).variables for number in (5, 6))
    assert_trees_equal(repaired.variables, again)
    assert not trees_equal(repaired.variables, other)


def test_pad_is_the_first_two_stages(case: Case) -> None:
    """With all purified images in one batch the key only permutes its rows, so both must find the same bounds."""
    shared: dict[str, Any] = {"per_class": 4, "bound_epochs": 3, "bound_batch_size": 100}
    pad = PAD(**shared).repair(jax.random.key(0), *case)
    pad_ft = PADFT(**shared, tune_epochs=1, views=1).repair(jax.random.key(1), *case)
    np.testing.assert_allclose(
        pad.variables["bounds"]["relu"]["upper"], pad_ft.variables["bounds"]["relu"]["upper"], rtol=1e-4
    )
    assert pad.kept is not None and pad_ft.kept is not None
    assert pad.kept.tolist() == pad_ft.kept.tolist()
    assert_trees_equal(pad.variables["params"], case.variables["params"])


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (PAD, "per_class", 0),
        (PAD, "alpha", -0.1),
        (PAD, "alpha", float("nan")),
        (PAD, "log_zero", 0.0),
        (PAD, "places", ()),
        (PAD, "bound_epochs", 0),
        (PAD, "bound_batch_size", 0),
        (PAD, "bound_learning_rate", 0.0),
        (PAD, "bound_weight", -1.0),
        (PAD, "bound_factor", 0.9),
        (PAD, "bound_accuracy", 1.1),
        (PADFT, "per_class", -1),
        (PADFT, "views", 0),
        (PADFT, "consistency", -1.0),
        (PADFT, "tune_epochs", 0),
        (PADFT, "batch_size", 0),
        (PADFT, "learning_rate", 0.0),
    ],
)
def test_settings_out_of_range_are_rejected_by_name(kind: type[PAD], field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.{field} is .*, expected"):
        kind(**{field: value})


def test_presets_take_changes_and_an_unknown_one_names_the_known_ones() -> None:
    assert PAD.preset("all") == PAD()
    assert PADFT.preset("mmbm", views=2) == PADFT(places=MMBM_PLACES, bound_weight=0.5, views=2)
    with pytest.raises(UserError, match=r"unknown pad_ft preset 'mm'; known are all, mmbm"):
        PADFT.preset("mm")


@pytest.mark.slow
def test_a_badnets_victim_is_repaired_without_clean_images() -> None:
    task = digits()
    attack = BadNets(rate=0.1)
    classifier = build_classifier("small_cnn", 10, width=16)
    (training_set, poisoned), trigger, _ = attack.poison(jax.random.key(0), AttackContext(classifier, task.train))
    settings = TrainConfig(epochs=4, batch_size=32, learning_rate=0.05, crop=0)
    victim = train(jax.random.key(1), classifier, training_set, settings).variables
    label_map = attack.label_map(10)
    asr = evaluate(classifier, victim, task.test, trigger, label_map).asr
    assert asr is not None and asr > 0.8

    repair = PADFT(bound_epochs=22, tune_epochs=10).repair(jax.random.key(2), classifier, victim, training_set)
    after = evaluate(classifier, repair.variables, task.test, trigger, label_map)
    assert np.isfinite(np.array(after, float)).all()
    assert after.acc > 0.3
    assert len(jax.tree.leaves(repair.variables["bounds"])) == repair.info["bounded_rectifiers"] == 3
    assert repair.info["purified"] == 80
    assert len(repair.info["bound_weights"]) == 2
    labels = np.asarray(training_set.labels)[repair.kept]
    assert np.bincount(labels).tolist() == [8] * 10
    assert len(poisoned) == 140
