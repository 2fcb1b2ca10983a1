"""Reactivation: the search against its closed form and its box, and a repaired victim that is misled again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniature import Linear, miniature

from backdoor_jax import Classifier, Dataset, UserError, evaluate
from backdoor_jax.data import LabelMap
from backdoor_jax.metrics import SearchConfig, search_nearby, unlearn

CONFIG = SearchConfig(radius=24, steps=60, step_size=2, batch_size=64, epochs=4, crop=0)


def test_against_a_linear_model_every_pixel_goes_to_the_edge_of_the_box_on_the_side_of_its_weight() -> None:
    classifier = Classifier(Linear(2), 2)
    images = jax.random.randint(jax.random.key(0), (20, 4, 4, 3), 100, 150).astype(jnp.uint8)
    data = Dataset(images, jnp.zeros(20, jnp.int32))
    variables = classifier.init(jax.random.key(1), images)
    kernel, _ = classifier.head_weights(variables)
    toward = np.sign(np.asarray(kernel[:, 1] - kernel[:, 0])).reshape(4, 4, 3)
    nearby = search_nearby(
        jax.random.key(2), classifier, variables, data, lambda images: images, LabelMap("all_to_one", 2, 1), CONFIG
    )
    np.testing.assert_array_equal(nearby.perturbation, CONFIG.radius * toward)
    np.testing.assert_array_equal(nearby(images), np.asarray(images, int) + CONFIG.radius * toward)


def test_a_perturbation_found_on_the_attackers_own_repair_reactivates_it_within_the_box() -> None:
    case = miniature()
    attack = case.trigger, case.label_map
    repaired = unlearn(jax.random.key(0), case.classifier, case.variables, case.clean, case.trigger, CONFIG)
    nearby = search_nearby(jax.random.key(1), case.classifier, repaired, case.clean, *attack, CONFIG)
    before = evaluate(case.classifier, repaired, case.test, *attack)
    after = evaluate(case.classifier, repaired, case.test, nearby, case.label_map)
    assert case.before.asr is not None and before.asr is not None and after.asr is not None
    assert before.acc > case.before.acc - 0.1 and before.asr < 0.3 < case.before.asr
    assert after.asr > before.asr + 0.3
    change = np.asarray(nearby(case.test.images), int) - np.asarray(case.trigger(case.test.images), int)
    assert 0 < abs(change).max() <= CONFIG.radius


def test_settings_out_of_range_are_refused_by_name() -> None:
    for field in ("radius", "steps", "step_size", "epochs"):
        with pytest.raises(UserError, match=f"SearchConfig.{field}"):
            SearchConfig(**{field: 0})  # type: ignore[arg-type]
