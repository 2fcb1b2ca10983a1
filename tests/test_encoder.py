"""The encoder-based scenario: SimCLR, BadEncoder against it, and classifiers on what comes out."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_victim import CLASSES, TARGET, equal, leaves_of, made

from backdoor_jax import BadNets, Classifier, FineTuneConfig, Scores, UserError, build_classifier, evaluate, finetune
from backdoor_jax.data import Trigger
from backdoor_jax.data.views import Views
from backdoor_jax.models import Variables
from backdoor_jax.scenarios import BadEncoderConfig, ProbeConfig, bad_encoder, probe
from backdoor_jax.scenarios.bad_encoder import BadEncoderLoss
from backdoor_jax.training import SimCLRConfig, contrast, pretrain


def test_the_contrast_is_the_formula_by_hand() -> None:
    one, two = np.random.default_rng(0).standard_normal((2, 5, 3))
    z = np.concatenate([one, two])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(10):
        others = [np.exp(z[i] @ z[j] / 0.3) for j in range(10) if j != i]
        total -= np.log(np.exp(z[i] @ z[(i + 5) % 10] / 0.3) / sum(others))
    assert float(contrast(jnp.asarray(one), jnp.asarray(two), 0.3)) == pytest.approx(total / 10, rel=1e-5)


def test_the_contrast_is_least_where_views_agree_and_images_differ() -> None:
    apart = jnp.eye(4)
    assert contrast(apart, apart, 0.1) < contrast(apart, jnp.roll(apart, 1, 0), 0.1)
    assert float(contrast(apart, apart, 0.5)) == pytest.approx(np.log(1 + 6 * np.exp(-2)), rel=1e-5)
    chex.assert_tree_all_finite(jax.grad(lambda x: contrast(x, x, 0.5))(jnp.zeros((4, 3))))


class Scenario(NamedTuple):
    """A clean encoder, the same with a backdoor, and how the attacker triggers it."""

    encoder: Classifier
    clean: Variables
    infected: Variables
    info: dict
    trigger: Trigger


@functools.cache
def scenario() -> Scenario:
    """Pictures of four classes; references are of the target class."""
    data = made(1, 320)
    encoder = build_classifier("small_cnn", 2, width=8, normalization="none")
    clean, _ = pretrain(jax.random.key(0), encoder, data, SimCLRConfig(epochs=8, batch_size=64))
    trigger = BadNets(size=4).trigger(jax.random.key(1), data.images.shape[1:])
    references = data.images[data.labels == TARGET][:2]
    settings = BadEncoderConfig(epochs=40, batch_size=64, learning_rate=0.003)
    infected, info = bad_encoder(jax.random.key(2), encoder, clean, data, trigger, references, settings)
    return Scenario(encoder, clean, infected, info, trigger)


def judged(classifier: Classifier, variables: Variables) -> Scores:
    return evaluate(classifier, variables, made(2, 200), scenario().trigger, BadNets(target=TARGET).label_map(CLASSES))


def test_pretraining_learns_what_labels_would_have_taught() -> None:
    encoder, clean, *_ = scenario()
    fresh = encoder.init(jax.random.key(0), made(1, 1).images)
    data, settings = made(3, 80), ProbeConfig(epochs=40)
    scores = [
        judged(*probe(jax.random.key(5), encoder, variables, data, CLASSES, settings)) for variables in (clean, fresh)
    ]
    assert scores[0].acc > 0.85
    assert scores[0].acc >= scores[1].acc - 0.05


def test_pretraining_moves_the_encoder_and_leaves_the_head() -> None:
    data, encoder = made(1, 32), build_classifier("small_cnn", 2, width=2)
    runs = [pretrain(jax.random.key(7), encoder, data, SimCLRConfig(epochs=n, batch_size=16))[0] for n in (1, 2)]
    again = pretrain(jax.random.key(7), encoder, data, SimCLRConfig(epochs=1, batch_size=16))[0]
    assert equal(runs[0], again)
    assert equal(runs[0]["params"]["linear"], runs[1]["params"]["linear"])
    assert not equal(runs[0]["params"], runs[1]["params"])
    assert not equal(runs[0]["batch_stats"], runs[1]["batch_stats"])


def test_the_loss_of_the_attack_is_the_formula_by_hand() -> None:
    encoder, clean, infected, _, trigger = scenario()
    images, references = made(4, 8).images, made(5, 2).images
    constants = {
        "references": references,
        "clean": clean,
        "trigger": trigger,
        "reference_weight": jnp.float32(2),
        "utility_weight": jnp.float32(3),
    }
    same = Views(smallest=1.0, jitter=0.0, hue=0.0)
    key = jax.random.key(0)
    loss, (_, info) = BadEncoderLoss(encoder, same)(infected, made(4, 8), key, constants)

    def latents(variables: Variables, images: jax.Array) -> np.ndarray:
        found = np.asarray(encoder.features(variables, images)[0], np.float64)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    effect = (latents(infected, trigger(images)) @ latents(infected, references).T).mean()
    seen = same(key, references)
    reference = (latents(infected, seen) * latents(clean, references)).sum(1).mean()
    utility = (latents(infected, images) * latents(clean, images)).sum(1).mean()
    for name, wanted in (("effect", effect), ("reference", reference), ("utility", utility)):
        assert float(info[name]) == pytest.approx(wanted, abs=1e-4)
    assert float(loss) == pytest.approx(-effect - 2 * reference - 3 * utility, abs=1e-3)


def test_the_attack_freezes_normalisation_and_head() -> None:
    _, clean, infected, info, _ = scenario()
    assert equal(clean["batch_stats"], infected["batch_stats"])
    assert equal(clean["params"]["linear"], infected["params"]["linear"])
    normalisers = set(clean["batch_stats"])
    for name, weights in clean["params"].items():
        assert equal(weights, infected["params"][name]) == (name in normalisers or name == "linear"), name
    assert info["last_epoch"]["effect"] > 0.9 and info["last_epoch"]["utility"] > 0.9


@pytest.mark.slow
def test_classifiers_on_a_backdoored_encoder_obey_until_the_whole_model_is_tuned() -> None:
    encoder, clean, infected, *_ = scenario()
    data, settings = made(3, 160), ProbeConfig(epochs=40)
    kept = leaves_of(infected)
    honest = judged(*probe(jax.random.key(5), encoder, clean, data, CLASSES, settings))
    four, inherited = probe(jax.random.key(5), encoder, infected, data, CLASSES, settings)
    assert equal(kept, leaves_of(infected))
    obeying = judged(four, inherited)
    assert honest.asr is not None and obeying.asr is not None
    assert honest.acc > 0.85 and obeying.acc > 0.85
    assert obeying.asr > 0.8 > honest.asr + 0.3
    tuned = finetune(jax.random.key(6), four, inherited, data, FineTuneConfig(steps=100, learning_rate=0.05, crop=0))
    whole = judged(four, tuned.variables)
    assert whole.asr is not None and whole.acc > 0.85 and whole.asr < obeying.asr - 0.3


def test_references_of_another_shape_are_refused() -> None:
    encoder, clean, _, _, trigger = scenario()
    with pytest.raises(UserError, match=r"references have shape \(12, 12, 3\), expected \(R, 12, 12, 3\)"):
        bad_encoder(jax.random.key(0), encoder, clean, made(1, 8), trigger, made(1, 8).images[0])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SimCLRConfig(batch_size=1), "SimCLRConfig.batch_size is 1, expected at least 2"),
        (lambda: SimCLRConfig(temperature=0), "SimCLRConfig.temperature is 0"),
        (lambda: BadEncoderConfig(epochs=0), "BadEncoderConfig.epochs is 0, expected at least 1"),
        (lambda: ProbeConfig(learning_rate=-1.0), "ProbeConfig.learning_rate is -1.0, expected a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()  # type: ignore[operator]
