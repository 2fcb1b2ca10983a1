"""Calibrated p-values: their formula, and that they keep the level that a detector's own test misses."""

import json
from pathlib import Path

import numpy as np
import pytest

from backdoor_jax.detectors import Evidence, base, calibration, judge
from backdoor_jax.detectors.calibration import calibrated


def test_the_body_is_the_conformal_p_value() -> None:
    clean = tuple(np.linspace(0.05, 0.95, 19))
    for p_value in (0.45, 0.5, 0.951, 1.0):
        expected = (1 + sum(one <= p_value for one in clean)) / 20
        assert calibrated(p_value, clean) == pytest.approx(expected)


def test_the_tail_continues_the_body_by_hills_estimate() -> None:
    clean = (1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9)
    gamma = np.mean(np.log(0.1 / np.array([1e-6, 1e-4, 1e-2])))
    assert calibrated(1e-8, clean) == pytest.approx(5 / 9 * (1e-7) ** (1 / gamma))
    assert calibrated(0.0999999, clean) == pytest.approx(calibrated(0.1, clean), rel=1e-5)
    grid = np.geomspace(1e-12, 1, 200)
    found = [calibrated(p_value, clean) for p_value in grid]
    assert np.all(np.diff(found) >= 0) and 0 < calibrated(0.0, clean) < found[0]


def test_a_tail_is_never_thinner_than_that_of_a_test_that_keeps_its_level() -> None:
    assert calibrated(0.2, (0.39, 0.395, 0.399, 0.4, 0.5, 0.6, 0.7, 0.8)) == pytest.approx(5 / 9 * 0.2 / 0.4)


def test_the_tail_of_scores_may_be_thinner() -> None:
    clean = (0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
    index = np.mean(np.log(0.4 / np.array([0.2, 0.3, 0.35])))
    assert index < 1
    assert calibrated(0.1, clean, least_index=0) == pytest.approx(5 / 9 * 0.25 ** (1 / index))
    alike = (0.4,) * 20
    assert calibrated(0.39, alike, least_index=0) == 0 and calibrated(0.4, alike, least_index=0) == 1


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_the_level_holds_where_the_own_test_raises_false_alarms(power: float) -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        clean = tuple(np.sort(generator.random(30) ** power))
        found += [calibrated(p_value, clean) for p_value in generator.random(25) ** power]
    own = (generator.random(10_000) ** power <= 0.05).mean()
    assert own > 0.3 if power == 3 else own < 0.06
    for alpha in (0.05, 0.01, 0.001):
        assert np.mean(np.array(found) <= alpha) <= 1.3 * alpha + 0.001


def test_a_verdict_has_the_calibrated_p_value_of_a_calibrated_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = tuple(np.linspace(0.01, 1, 20) ** 2)
    monkeypatch.setattr(base, "clean_models", lambda: {"a test": clean})
    for p_value in (1e-9, 0.02, 0.4):
        verdict = judge(Evidence("a test", "norm", np.arange(6.0), 2, p_value))
        assert verdict.p_value == calibrated(p_value, clean) != p_value
        assert (verdict.outcome == "backdoored") == (calibrated(p_value, clean) <= 0.05)
    assert judge(Evidence("another", "norm", np.arange(6.0), 2, 0.02)).p_value == 0.02


def test_a_score_is_compared_in_place_of_the_own_p_value(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = tuple(np.linspace(0.2, 1, 20))
    monkeypatch.setattr(base, "clean_models", lambda: {"a test": clean})
    verdict = judge(Evidence("a test", "norm", np.arange(6.0), 2, 0.9, score=0.05))
    assert verdict.p_value == calibrated(0.05, clean, least_index=0) < 0.05 and verdict.outcome == "backdoored"
    assert judge(Evidence("a test", "norm", np.arange(6.0), 2, 1e-9, score=0.9)).outcome == "no sign of a backdoor"


def test_too_few_clean_models_calibrate_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "detectors").mkdir()
    few, enough = [0.5] * 18, [0.9, *[0.5] * 18]
    content = json.dumps({"scores": {"few": few, "enough": enough}})
    (tmp_path / "detectors" / "clean_models.json").write_text(content)
    monkeypatch.setattr("backdoor_jax.detectors.calibration.resources.files", lambda _: tmp_path)
    assert calibration.clean_models.__wrapped__() == {"enough": tuple(sorted(enough))}
