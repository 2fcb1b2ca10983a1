"""Compiled programs are forgotten before a process has too many, and training goes on as if they were not."""

from pathlib import Path

import chex
import jax
import pytest

from backdoor_jax import Classifier, Dataset, FineTune, compiling, evaluate
from backdoor_jax.models import Variables

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux counts regions")


@linux
@pytest.mark.parametrize(("room", "traces"), [(0.0, 2), (1.0, 1)])
def test_room_is_made_where_there_is_little(room: float, traces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "ROOM", room)
    traced = []

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        traced.append(x)
        return 2 * x

    for _ in range(2):
        double(1.0)
        compiling.make_room()
    assert len(traced) == traces


@linux
def test_repairs_make_room_and_are_the_same_without_it(
    key: jax.Array,
    tiny_classifier: Classifier,
    tiny_data: Dataset,
    tiny_variables: Variables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defense = FineTune(steps=2, batch_size=8)
    repairs, made = [], []
    clear = jax.clear_caches
    monkeypatch.setattr(jax, "clear_caches", lambda: made.append(clear()))
    for room in (1.0, 0.0):
        monkeypatch.setattr(compiling, "ROOM", room)
        repairs.append(defense.repair(key, tiny_classifier, tiny_variables, tiny_data).variables)
    assert len(made) == 1
    evaluate(tiny_classifier, repairs[0], tiny_data)
    assert len(made) == 2
    chex.assert_trees_all_equal(*repairs)
