"""Configurations: validation, pytrees, and values."""

import dataclasses
import pickle
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from annotated_types import Gt, Lt
from comparison import structure

from backdoor_jax import D3, FineTune, UserError
from backdoor_jax.config import Config, Count, Fraction, NonNegative, Positive, Share, Whole
from backdoor_jax.defenses import FST


@dataclasses.dataclass(frozen=True)
class Inner(Config):
    scale: Positive = 2.0
    size: Count = 3


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    rate: Positive = 0.5
    decay: NonNegative = 0.0
    share: Share = 0.1
    fraction: Fraction = 0.2
    level: Annotated[float, Gt(0), Lt(1)] = 0.05
    steps: Count = 10
    crop: Whole = 4
    flip: bool = False
    kind: Literal["one", "two"] = "one"
    weights: tuple[NonNegative, ...] = (1.0, 2.0)
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Ordered(Config):
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.low < self.high, "high", f"more than {self.low}")


def test_a_pytree_round_trip_gives_an_equal_configuration() -> None:
    config = Settings(rate=0.25, steps=7, inner=Inner(scale=3.0))
    leaves, structure = jax.tree.flatten(config)
    again = jax.tree.unflatten(structure, leaves)
    assert again == config and hash(again) == hash(config)
    assert isinstance(again, Settings) and isinstance(again.inner, Inner)


def test_only_floats_and_those_of_nested_configurations_are_leaves() -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(Settings())]
    assert paths == [".rate", ".decay", ".share", ".fraction", ".level", ".inner.scale"]
    assert jax.tree.leaves(Settings()) == [0.5, 0.0, 0.1, 0.2, 0.05, 2.0]


@pytest.mark.parametrize(
    "changes",
    [{"steps": 11}, {"crop": 0}, {"flip": True}, {"kind": "two"}, {"weights": (1.0,)}, {"inner": Inner(size=4)}],
)
def test_all_other_fields_are_part_of_the_structure(changes: dict[str, Any]) -> None:
    assert structure(Settings(**changes)) != structure(Settings())
    assert jax.tree.leaves(Settings(**changes)) == jax.tree.leaves(Settings())


def test_a_compiled_function_traces_again_for_static_fields_only() -> None:
    traces: list[int] = []

    @jax.jit
    def product(config: Settings) -> jax.Array:
        assert isinstance(config.rate, jax.core.Tracer) and isinstance(config.inner.scale, jax.core.Tracer)
        assert (type(config.steps), type(config.inner.size), type(config.weights)) == (int, int, tuple)
        traces.append(config.steps)
        return config.rate * config.inner.scale * config.steps

    assert float(product(Settings())) == 10.0
    assert float(product(Settings(rate=1.0, decay=3.0, inner=Inner(scale=4.0)))) == 40.0
    assert traces == [10]
    assert float(product(Settings(steps=20))) == 20.0
    assert float(product(Settings(inner=Inner(size=9)))) == 10.0
    assert traces == [10, 20, 10]


def test_gradients_and_vmap_give_configurations() -> None:
    slopes = jax.grad(lambda config: config.rate**2 * config.inner.scale)(Settings(rate=3.0))
    assert isinstance(slopes, Settings)
    assert (float(slopes.rate), float(slopes.inner.scale), float(slopes.decay), slopes.steps) == (12.0, 9.0, 0.0, 10)
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *(Settings(rate=rate) for rate in (1.0, 2.0)))
    assert stacked.rate.tolist() == [1.0, 2.0] and stacked.steps == 10
    doubled = jax.vmap(lambda config: dataclasses.replace(config, rate=2 * config.rate))(stacked)
    assert doubled.rate.tolist() == [2.0, 4.0]


def test_numbers_are_converted_to_the_type_of_their_field() -> None:
    values: dict[str, Any] = {"rate": 1, "decay": np.float32(0.5), "steps": np.int64(3)}
    scale: Any = np.int32(4)
    config = Settings(**values, inner=Inner(scale=scale))
    assert (config.rate, config.decay, config.steps, config.inner.scale) == (1.0, 0.5, 3, 4.0)
    assert [type(value) for value in (config.rate, config.decay, config.steps)] == [float, float, int]
    assert type(config.inner.scale) is float
    assert Settings(weights=(1, 2)).weights == (1.0, 2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate", True),
        ("rate", np.True_),
        ("steps", True),
        ("crop", False),
        ("steps", 3.0),
        ("steps", np.float64(3)),
        ("rate", "0.5"),
        ("steps", None),
        ("flip", 1),
        ("kind", "three"),
        ("kind", 1),
        ("weights", 1.0),
        ("weights", (True,)),
        ("inner", 1.0),
        ("inner", Ordered()),
    ],
)
def test_a_value_of_another_type_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^Settings\.{field} is .*, expected "):
        Settings(**{field: value})


@pytest.mark.parametrize("field", ["rate", "decay", "share", "fraction", "level"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf")])
def test_a_float_that_is_not_finite_is_an_error(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^Settings\.{field} is .*, expected a "):
        Settings(**{field: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_field_without_a_range_is_finite_too(value: float) -> None:
    with pytest.raises(UserError, match=r"^Ordered\.low is (nan|inf), expected a finite number$"):
        Ordered(low=value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rate", 0.0, "a value greater than 0"),
        ("decay", -1.0, "a value greater than or equal to 0"),
        ("share", 0.0, "a value greater than 0"),
        ("share", 1.5, "a value less than or equal to 1"),
        ("fraction", -0.1, "a value greater than or equal to 0"),
        ("fraction", 1.1, "a value less than or equal to 1"),
        ("level", 1.0, "a value less than 1"),
        ("steps", 0, "a value greater than or equal to 1"),
        ("crop", -1, "a value greater than or equal to 0"),
        ("kind", "three", "'one' or 'two'"),
        ("weights", (1.0, -1.0), "a value greater than or equal to 0"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_says_what_is_expected(field: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        Settings(**{field: value})
    assert str(caught.value) == f"Settings.{field} is {value!r}, expected {expected}"


def test_the_ends_of_a_range_are_allowed_where_they_belong_to_it() -> None:
    for changes in ({"decay": 0.0}, {"share": 1.0}, {"fraction": 0.0}, {"fraction": 1.0}, {"steps": 1}, {"crop": 0}):
        field, value = next(iter(changes.items()))
        assert getattr(Settings(**changes), field) == value


def test_a_nested_configuration_is_checked_on_its_own() -> None:
    with pytest.raises(UserError, match=r"^Inner\.scale is -1\.0, expected a value greater than 0$"):
        Settings(inner=Inner(scale=-1.0))


def test_checks_across_fields_run_after_those_of_each_field() -> None:
    assert Ordered(low=1, high=2).high == 2.0
    with pytest.raises(UserError, match=r"^Ordered\.high is 0\.5, expected more than 1\.0$"):
        Ordered(low=1, high=0.5)
    with pytest.raises(UserError, match=r"^Ordered\.high is '2', expected "):
        Ordered(low=1.0, high="2")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [jnp.asarray(0.25), jnp.arange(3.0)])
def test_float_fields_take_arrays(value: jax.Array) -> None:
    assert Settings(rate=value).rate is value  # type: ignore[arg-type]


def test_configurations_are_equal_and_hashable_by_value() -> None:
    one, same = Settings(rate=1, inner=Inner(scale=3)), Settings(rate=1.0, inner=Inner(scale=3.0))
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1
    assert one != Settings(rate=1.0) and one != Settings(rate=1.0, steps=11, inner=Inner(scale=3.0))
    assert Inner() != Ordered()
    assert FineTune() != D3()


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().rate = 1.0  # type: ignore[misc]


def test_replace_gives_a_checked_copy() -> None:
    config = Settings(decay=0.3)
    changed = dataclasses.replace(config, rate=2, inner=dataclasses.replace(config.inner, size=5))
    assert changed == Settings(rate=2.0, decay=0.3, inner=Inner(size=5))
    assert config == Settings(decay=0.3)
    with pytest.raises(UserError, match=r"Settings\.steps is 0"):
        dataclasses.replace(config, steps=0)


def test_a_configuration_survives_pickling() -> None:
    config = Settings(rate=0.3, inner=Inner(scale=5.0))
    assert pickle.loads(pickle.dumps(config)) == config


def test_an_unknown_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="epochs"):
        Settings(epochs=3)  # type: ignore[call-arg]


def test_a_preset_is_the_published_settings_with_changes() -> None:
    assert D3.preset("paper") == D3(penalty=10.0)
    assert D3.preset("paper", steps=5, penalty=2) == D3(penalty=2.0, steps=5)
    with pytest.raises(UserError, match=r"D3\.steps is 0"):
        D3.preset("paper", steps=0)


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"^unknown d3 preset 'mine'; known are released, paper$"):
        D3.preset("mine")
    with pytest.raises(UserError, match=r"^unknown fst preset 'paper'; it has none$"):
        FST.preset("paper")
