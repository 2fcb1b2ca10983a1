"""The encoder-based scenario: SimCLR, BadEncoder on its encoder, and classifiers on the backdoored encoder."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_trees_equal, leaves_of, trees_equal
from miniature import CLASSES, TARGET, make_images

from backdoor_jax import BadNets, Classifier, FineTune, UserError, build_classifier, evaluate
from backdoor_jax.data import Trigger
from backdoor_jax.data.views import Views
from backdoor_jax.metrics import Scores
from backdoor_jax.models import Variables
from backdoor_jax.scenarios import BadEncoderConfig, ProbeConfig, bad_encoder, probe
from backdoor_jax.scenarios.bad_encoder import bad_encoder_loss
from backdoor_jax.training import SimCLRConfig, contrast, pretrain


def test_the_contrast_equals_the_formula_by_hand() -> None:
    one, two = np.random.default_rng(0).standard_normal((2, 5, 3))
    z = np.concatenate([one, two])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(10):
        others = [np.exp(z[i] @ z[j] / 0.3) for j in range(10) if j != i]
        total -= np.log(np.exp(z[i] @ z[(i + 5) % 10] / 0.3) / sum(others))
    assert float(contrast(jnp.asarray(one), jnp.asarray(two), 0.3)) == pytest.approx(total / 10, rel=1e-5)


def test_the_contrast_is_smallest_where_views_agree_and_images_differ() -> None:
    apart = jnp.eye(4)
    assert contrast(apart, apart, 0.1) < contrast(apart, jnp.roll(apart, 1, 0), 0.1)
    assert float(contrast(apart, apart, 0.5)) == pytest.approx(np.log(1 + 6 * np.exp(-2)), rel=1e-5)
    chex.assert_tree_all_finite(jax.grad(lambda x: contrast(x, x, 0.5))(jnp.zeros((4, 3))))


class Scenario(NamedTuple):
    """A clean encoder, the same encoder with a backdoor, and its trigger."""

    encoder: Classifier
    clean: Variables
    backdoored: Variables
    info: dict[str, Any]
    trigger: Trigger


@functools.cache
def scenario() -> Scenario:
    """Encoders of images of four classes; the references are of the target class."""
    data = make_images(1, 320)
    encoder = build_classifier("small_cnn", 2, width=8, normalization="none")
    clean, _ = pretrain(jax.random.key(0), encoder, data, SimCLRConfig(epochs=8, batch_size=64))
    trigger = BadNets(size=4).trigger(jax.random.key(1), (12, 12, 3))
    references = data.images[data.labels == TARGET][:2]
    settings = BadEncoderConfig(epochs=40, batch_size=64, learning_rate=0.003)
    backdoored, info = bad_encoder(jax.random.key(2), encoder, clean, data, trigger, references, settings)
    return Scenario(encoder, clean, backdoored, info, trigger)


def scores_of(classifier: Classifier, variables: Variables) -> Scores:
    label_map = BadNets(target=TARGET).label_map(CLASSES)
    return evaluate(classifier, variables, make_images(2, 200), scenario().trigger, label_map)


def test_a_pretrained_encoder_separates_the_classes() -> None:
    encoder, clean, *_ = scenario()
    untrained = encoder.init(jax.random.key(0), make_images(1, 1).images)
    data, settings = make_images(3, 80), ProbeConfig(epochs=40)
    scores = [
        scores_of(*probe(jax.random.key(5), encoder, variables, data, CLASSES, settings))
        for variables in (clean, untrained)
    ]
    assert scores[0].acc > 0.85
    assert scores[0].acc >= scores[1].acc - 0.05


def test_pretraining_changes_the_encoder_and_not_the_head() -> None:
    data, encoder = make_images(1, 32), build_classifier("small_cnn", 2, width=2)
    runs = [pretrain(jax.random.key(7), encoder, data, SimCLRConfig(epochs=n, batch_size=16))[0] for n in (1, 2)]
    again = pretrain(jax.random.key(7), encoder, data, SimCLRConfig(epochs=1, batch_size=16))[0]
    assert_trees_equal(runs[0], again)
    assert_trees_equal(runs[0]["params"]["linear"], runs[1]["params"]["linear"])
    assert not trees_equal(runs[0]["params"], runs[1]["params"])
    assert not trees_equal(runs[0]["batch_stats"], runs[1]["batch_stats"])


def test_the_loss_of_the_attack_equals_the_formula_by_hand() -> None:
    encoder, clean, backdoored, _, trigger = scenario()
    batch, references = make_images(4, 8), make_images(5, 2).images
    config = BadEncoderConfig(reference_weight=2, utility_weight=3)
    views, key = Views(smallest=1.0, jitter=0.0, hue=0.0), jax.random.key(0)
    loss, (variables, info) = bad_encoder_loss(
        encoder, config, views, clean, trigger, references, backdoored, batch, key
    )
    assert variables is backdoored

    def latents(variables: Variables, images: jax.Array) -> np.ndarray:
        found = np.asarray(encoder.features(variables, images)[0], np.float64)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    effect = (latents(backdoored, trigger(batch.images)) @ latents(backdoored, references).T).mean()
    seen = views(key, references)
    reference = (latents(backdoored, seen) * latents(clean, references)).sum(1).mean()
    utility = (latents(backdoored, batch.images) * latents(clean, batch.images)).sum(1).mean()
    for name, expected in (("effect", effect), ("reference", reference), ("utility", utility)):
        assert float(info[name]) == pytest.approx(expected, abs=1e-4)
    assert float(loss) == pytest.approx(-effect - 2 * reference - 3 * utility, abs=1e-3)


def test_the_attack_freezes_normalization_and_head() -> None:
    _, clean, backdoored, info, _ = scenario()
    assert_trees_equal(clean["batch_stats"], backdoored["batch_stats"])
    frozen = {*clean["batch_stats"], "linear"}
    for name, weights in clean["params"].items():
        assert trees_equal(weights, backdoored["params"][name]) == (name in frozen), name
    assert info["last_epoch"]["effect"] > 0.9 and info["last_epoch"]["utility"] > 0.9


@pytest.mark.slow
def test_classifiers_inherit_the_backdoor_of_their_encoder_and_tuning_all_weights_weakens_it() -> None:
    encoder, clean, backdoored, *_ = scenario()
    data, settings = make_images(3, 160), ProbeConfig(epochs=40)
    before = leaves_of(backdoored)
    harmless = scores_of(*probe(jax.random.key(5), encoder, clean, data, CLASSES, settings))
    classifier, probed = probe(jax.random.key(5), encoder, backdoored, data, CLASSES, settings)
    assert_trees_equal(before, backdoored)
    inherited = scores_of(classifier, probed)
    assert harmless.asr is not None and inherited.asr is not None
    assert harmless.acc > 0.85 and inherited.acc > 0.85
    assert inherited.asr > 0.8 > harmless.asr + 0.3
    defense = FineTune(steps=100, learning_rate=0.05, crop=0)
    tuned = scores_of(classifier, defense.repair(jax.random.key(6), classifier, probed, data).variables)
    assert tuned.asr is not None and tuned.acc > 0.85 and tuned.asr < inherited.asr - 0.3


def test_references_of_another_shape_are_refused() -> None:
    encoder, clean, _, _, trigger = scenario()
    with pytest.raises(UserError, match=r"references have shape \(12, 12, 3\), expected \(R, 12, 12, 3\)"):
        bad_encoder(jax.random.key(0), encoder, clean, make_images(1, 8), trigger, make_images(1, 8).images[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SimCLRConfig(batch_size=1),
            "SimCLRConfig.batch_size is 1, expected a value greater than or equal to 2",
        ),
        (lambda: SimCLRConfig(temperature=0), "SimCLRConfig.temperature is 0"),
        (
            lambda: BadEncoderConfig(epochs=0),
            "BadEncoderConfig.epochs is 0, expected a value greater than or equal to 1",
        ),
        (
            lambda: BadEncoderConfig(utility_weight=-1),
            "BadEncoderConfig.utility_weight is -1, expected a value greater",
        ),
        (lambda: ProbeConfig(learning_rate=-1.0), "ProbeConfig.learning_rate is -1.0, expected a value greater than 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make()
