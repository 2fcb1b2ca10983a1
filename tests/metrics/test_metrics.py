"""ACC, ASR, RA and DER of predictions written by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoor_jax import Classifier, Dataset, NonFiniteError, UserError, evaluate, make_dataset, predict
from backdoor_jax.data import LabelMap, Trigger
from backdoor_jax.metrics import Scores, defense_effectiveness, success_rates
from backdoor_jax.models import Variables

CLASSES = 4
CLASS = st.integers(0, CLASSES - 1)


class Oracle(nn.Module):
    """Predicts the class given by an image's red value."""

    def setup(self) -> None:
        self.linear = nn.Dense(CLASSES)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        return jax.nn.one_hot(jnp.round(255 * x[:, 0, 0, 0]).astype(jnp.int32), CLASSES)

    def head(self, latent: jax.Array) -> jax.Array:
        return self.linear(latent)


ORACLE = Classifier(Oracle(), CLASSES)
VARIABLES: Variables = {"params": {"linear": {"kernel": jnp.eye(CLASSES), "bias": jnp.zeros(CLASSES)}}}
SHOW_GREEN: Trigger = jax.tree_util.Partial(lambda images: images.at[..., 0].set(images[..., 1]))
"""A trigger under which the oracle predicts the class given by an image's green value."""


def make_images(labels: list[int], clean: list[int], triggered: list[int]) -> Dataset:
    """Images that the oracle classifies as one class as they are, and as another when triggered."""
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = clean, triggered
    return make_dataset(images, np.array(labels), CLASSES)


def test_predictions_are_correct_with_and_without_a_trigger() -> None:
    test = make_images([0, 1, 2, 3], clean=[3, 1, 2, 0], triggered=[1, 1, 0, 2])
    assert predict(ORACLE, VARIABLES, test.images).tolist() == [3, 1, 2, 0]
    assert predict(ORACLE, VARIABLES, test.images, SHOW_GREEN).tolist() == [1, 1, 0, 2]


def test_a_set_larger_than_a_chunk_is_predicted_image_by_image() -> None:
    expected = np.random.default_rng(0).integers(0, CLASSES, 1203)
    test = make_images([0] * 1203, clean=list(expected), triggered=[0] * 1203)
    np.testing.assert_array_equal(predict(ORACLE, VARIABLES, test.images), expected)


def test_all_to_one_rates_equal_those_by_hand() -> None:
    # Four of six images are correct; of the four outside class 1, triggered, one is classified as 1, two stay correct.
    test = make_images([0, 0, 1, 1, 2, 3], clean=[0, 0, 1, 2, 2, 1], triggered=[1, 0, 1, 1, 2, 0])
    scores = evaluate(ORACLE, VARIABLES, test, SHOW_GREEN, LabelMap("all_to_one", CLASSES, target=1))
    assert scores == Scores(acc=4 / 6, asr=1 / 4, ra=2 / 4)


def test_all_to_all_rates_count_every_image() -> None:
    test = make_images([0, 1, 2, 3, 3], clean=[0, 1, 2, 3, 0], triggered=[1, 1, 3, 0, 3])
    scores = evaluate(ORACLE, VARIABLES, test, SHOW_GREEN, LabelMap("all_to_all", CLASSES))
    assert scores == Scores(acc=4 / 5, asr=3 / 5, ra=2 / 5)


def test_without_a_trigger_there_is_only_accuracy() -> None:
    test = make_images([0, 1], clean=[0, 0], triggered=[0, 0])
    assert evaluate(ORACLE, VARIABLES, test) == Scores(0.5, None, None)


@given(pairs=st.lists(st.tuples(CLASS, CLASS), min_size=1, max_size=20), target=CLASS)
def test_success_rates_leave_out_the_target_class(pairs: list[tuple[int, int]], target: int) -> None:
    counted = [(label, guess) for label, guess in pairs if label != target]
    labels, guesses = np.array(pairs).T
    label_map = LabelMap("all_to_one", CLASSES, target)
    if not counted:
        with pytest.raises(UserError, match="no test image is outside the target class"):
            success_rates(guesses, labels, label_map)
        return
    asr, ra = success_rates(guesses, labels, label_map)
    assert asr == pytest.approx(sum(guess == target for _, guess in counted) / len(counted))
    assert ra == pytest.approx(sum(guess == label for label, guess in counted) / len(counted))
    assert asr + ra <= 1 + 1e-12


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Scores(0.9, 0.9), Scores(0.9, 0.9), 0.5),
        (Scores(0.9, 1.0), Scores(0.9, 0.0), 1.0),
        (Scores(0.9, 0.8), Scores(0.7, 0.2), (0.6 - 0.2 + 1) / 2),
        (Scores(0.7, 0.8), Scores(0.9, 0.2), (0.6 + 1) / 2),
        (Scores(0.9, 0.1), Scores(0.9, 0.6), 0.5),
        (Scores(1.0, 0.1), Scores(0.0, 0.6), 0.0),
    ],
    ids=["nothing", "perfect", "at_a_price", "accuracy_gained", "worse", "ruined"],
)
def test_defense_effectiveness_equals_that_by_hand(before: Scores, after: Scores, expected: float) -> None:
    assert defense_effectiveness(before, after) == pytest.approx(expected)


@given(rates=st.tuples(*[st.floats(0, 1)] * 4))
def test_defense_effectiveness_stays_in_its_range(rates: tuple[float, float, float, float]) -> None:
    value = defense_effectiveness(Scores(*rates[:2]), Scores(*rates[2:]))
    assert value is not None and 0 <= value <= 1


def test_defense_effectiveness_is_none_without_an_attack() -> None:
    assert defense_effectiveness(Scores(0.9), Scores(0.8)) is None
    assert defense_effectiveness(Scores(0.9, 0.5), Scores(0.8)) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["kernel", "bias"])
def test_non_finite_weights_are_an_error(value: float, place: str) -> None:
    linear = VARIABLES["params"]["linear"]
    broken = {"params": {"linear": {**linear, place: linear[place].at[0].set(value)}}}
    test = make_images([1], clean=[1], triggered=[1])
    with pytest.raises(NonFiniteError, match=f"suspect: weights .*{place}.* are not finite"):
        evaluate(ORACLE, broken, test, name="suspect")


@pytest.mark.parametrize("broken", [0, 700, 1202])
def test_a_single_non_finite_logit_is_an_error(broken: int) -> None:
    # Finite weights whose sum overflows, for images of one class only.
    huge = jnp.float32(3e38)
    kernel = jnp.eye(CLASSES).at[3, 2].set(huge)
    variables = {"params": {"linear": {"kernel": kernel, "bias": jnp.zeros(CLASSES).at[2].set(huge)}}}
    guesses = [0] * 1203
    guesses[broken] = 3
    test = make_images([0] * 1203, clean=guesses, triggered=[0] * 1203)
    with pytest.raises(NonFiniteError, match="suspect: logits are not finite"):
        predict(ORACLE, variables, test.images, name="suspect")
    with pytest.raises(NonFiniteError, match="suspect: logits are not finite"):
        evaluate(ORACLE, variables, test, name="suspect")
    assert predict(ORACLE, variables, test.images, SHOW_GREEN, "suspect").tolist() == [2] * 1203


def test_logits_that_are_non_finite_only_under_the_trigger_are_an_error() -> None:
    huge = jnp.float32(3e38)
    kernel = jnp.eye(CLASSES).at[3, 2].set(huge)
    variables = {"params": {"linear": {"kernel": kernel, "bias": jnp.zeros(CLASSES).at[2].set(huge)}}}
    test = make_images([0, 1], clean=[0, 1], triggered=[0, 3])
    with pytest.raises(NonFiniteError, match="suspect: logits are not finite"):
        evaluate(ORACLE, variables, test, SHOW_GREEN, LabelMap("all_to_one", CLASSES), name="suspect")


def test_a_network_with_batch_normalization_is_evaluated_in_evaluation_mode(
    tiny_classifier: Classifier, tiny_variables: Variables, tiny_data: Dataset
) -> None:
    logits, _ = tiny_classifier.logits(tiny_variables, tiny_data.images)
    expected = np.asarray(logits).argmax(-1)
    np.testing.assert_array_equal(predict(tiny_classifier, tiny_variables, tiny_data.images), expected)
    scores = evaluate(tiny_classifier, tiny_variables, tiny_data)
    assert scores.acc == pytest.approx(np.mean(expected == np.asarray(tiny_data.labels)))
