"""Bilinear sampling, rotation and WaNet against SciPy, PyTorch and NumPy written apart."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from backdoor_jax import Classifier, Dataset, InputAware, LabelMap, Scene, TrainConfig, UserError, WaNet
from backdoor_jax.attacks.wanet import WarpLoss, WarpTrigger
from backdoor_jax.data import bilinear_sample, pixel_grid, rotate
from backdoor_jax.models import Variables
from backdoor_jax.training import SupervisedLoss

SHAPES = st.sampled_from([(5, 8, 3), (8, 5, 1), (9, 9, 3)])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def read_at(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """SciPy's reading of an image ``(H, W, channels)`` at places ``(..., 2)``; black outside."""
    coordinates = np.moveaxis(np.asarray(places, np.float64), -1, 0)
    channels = [
        ndimage.map_coordinates(channel, coordinates, order=1, mode="grid-constant", cval=0.0)
        for channel in np.moveaxis(image.astype(np.float64), -1, 0)
    ]
    return np.stack(channels, -1)


def assert_rounded(out: Any, exact: np.ndarray) -> None:
    """The nearest grey level; close to halfway float32 may round to either side."""
    assert np.asarray(out).dtype == np.uint8
    assert np.abs(np.asarray(out, np.float64) - exact).max() <= 0.5 + 2e-3


# Sampling


@given(shape=SHAPES, seed=st.integers(0, 5))
def test_bilinear_sampling_is_scipys_inside_and_outside(shape: tuple[int, int, int], seed: int) -> None:
    height, width, _ = shape
    places = np.random.default_rng(seed).uniform(-2, max(height, width) + 1, (6, 7, 2)).astype(np.float32)
    images = noise(2, *shape)
    out = bilinear_sample(jnp.asarray(images), jnp.asarray(places))
    assert out.shape == (2, 6, 7, shape[2]) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, [read_at(image, places) for image in images], atol=1e-3)


def test_places_of_each_images_own_are_read_from_that_image() -> None:
    images, places = noise(3, 6, 8, 3), np.random.default_rng(0).uniform(-1, 8, (3, 6, 8, 2)).astype(np.float32)
    out = np.asarray(bilinear_sample(jnp.asarray(images), jnp.asarray(places)))
    for image, own, read in zip(images, places, out, strict=True):
        np.testing.assert_allclose(read, read_at(image, own), atol=1e-3)
    shared = bilinear_sample(jnp.asarray(images), jnp.asarray(places[0]))
    each = bilinear_sample(jnp.asarray(images), jnp.broadcast_to(places[0], places.shape))
    np.testing.assert_array_equal(shared, each)


@pytest.mark.parametrize("shape", [(5, 8, 3), (8, 5, 1)])
def test_sampling_at_the_pixels_own_places_changes_nothing(shape: tuple[int, int, int]) -> None:
    grid = np.asarray(pixel_grid(*shape[:2]))
    np.testing.assert_array_equal(grid, np.stack(np.indices(shape[:2]), -1))
    images = noise(3, *shape)
    np.testing.assert_array_equal(bilinear_sample(jnp.asarray(images), jnp.asarray(grid)), images)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("size", [7, 8])
def test_quarter_turns_are_exact_and_anticlockwise(turns: int, size: int) -> None:
    images = noise(2, size, size, 3)
    out = rotate(jnp.asarray(images), jnp.full(2, turns * np.pi / 2))
    assert_rounded(out, np.rot90(images, turns, axes=(1, 2)).astype(np.float64))
    assert np.mean(np.asarray(out) != np.rot90(images, turns, axes=(1, 2))) < 0.01


@pytest.mark.parametrize("shape", [(9, 9, 3), (6, 10, 1)])
def test_a_turn_by_any_angle_reads_where_the_inverse_turn_points(shape: tuple[int, int, int]) -> None:
    """In mathematicians' coordinates, x to the right and y upwards, an anticlockwise turn by a maps z to z e^(ia)."""
    images, angles = noise(4, *shape), np.array([0.1, -0.4, 1.0, 3.0])
    rows, columns = np.indices(shape[:2])
    middle = (shape[1] - 1) / 2 - 1j * (shape[0] - 1) / 2
    want = []
    for image, angle in zip(images, angles, strict=True):
        source = (columns - 1j * rows - middle) * np.exp(-1j * angle) + middle
        want.append(read_at(image, np.stack([-source.imag, source.real], -1)))
    assert_rounded(rotate(jnp.asarray(images), jnp.asarray(angles, jnp.float32)), np.stack(want))


# WaNet's trigger


def drawn(key: jax.Array, grid: int) -> np.ndarray:
    """The displacements before they are scaled, rows' first: the one thing taken from the package."""
    return np.asarray(jax.random.uniform(key, (grid, grid, 2), minval=-1, maxval=1), np.float64)


def keys_cubic(samples: np.ndarray, place: float) -> np.ndarray:
    """Cubic convolution (Keys, 1981, a = -0.75) of samples along the first axis, the outermost repeated."""
    left = int(np.floor(place))
    total = np.zeros(samples.shape[1:])
    for tap in range(left - 1, left + 3):
        d = abs(place - tap)
        weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d - 1) * (d - 2) ** 2
        total += weight * samples[min(max(tap, 0), len(samples) - 1)]
    return total


def published_places(field: np.ndarray, shape: tuple[int, ...], strength: float) -> np.ndarray:
    """The published recipe in its own coordinates, where the image spans -1 to 1; then in pixels."""
    height, width = shape[:2]
    field = field / np.mean(np.abs(field))
    tall = np.stack([keys_cubic(field, place) for place in np.linspace(0, len(field) - 1, height)])
    whole = np.stack([keys_cubic(tall.swapaxes(0, 1), place) for place in np.linspace(0, len(field) - 1, width)], 1)
    identity = np.stack(np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"), -1)
    warped = np.clip(identity + strength * whole / height, -1, 1)
    return (warped + 1) / 2 * [height - 1, width - 1]


@pytest.mark.parametrize("shape", [(16, 16, 3), (12, 20, 1), (20, 12, 3)])
@pytest.mark.parametrize(("grid", "strength"), [(4, 0.5), (2, 3.0), (6, 1.0)])
def test_wanet_is_the_published_warp(shape: tuple[int, int, int], grid: int, strength: float) -> None:
    key = jax.random.key(grid)
    trigger = WaNet(grid=grid, strength=strength).trigger(key, shape)
    places = published_places(drawn(key, grid), shape, strength)
    np.testing.assert_allclose(trigger.places, places, atol=1e-4)
    images = noise(3, *shape)
    out = np.asarray(trigger(jnp.asarray(images)))
    want = np.stack([read_at(image, places) for image in images])
    assert out.shape == images.shape and out.dtype == np.uint8
    assert np.abs(out - want).max() <= 0.6
    assert np.mean(out != images) > 0.3


@pytest.mark.parametrize("shape", [(32, 32, 3), (12, 20, 3), (20, 12, 1)])
@pytest.mark.parametrize("strength", [0.5, 4.0])
def test_wanet_is_what_pytorch_makes_of_the_same_noise(shape: tuple[int, int, int], strength: float) -> None:
    torch = pytest.importorskip("torch")
    height, width, _ = shape
    key, images = jax.random.key(1), noise(3, *shape)
    # PyTorch's grids name the column first.
    field = torch.tensor(drawn(key, 4)[..., ::-1].transpose(2, 0, 1)[None].copy())
    field = field / field.abs().mean()
    smooth = torch.nn.functional.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([columns, rows], -1)[None].double() + strength * smooth.permute(0, 2, 3, 1) / height
    warped = torch.nn.functional.grid_sample(
        torch.tensor(images.transpose(0, 3, 1, 2).astype(np.float64)),
        grid.clamp(-1, 1).expand(3, -1, -1, -1),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    want = warped.permute(0, 2, 3, 1).numpy()
    out = WaNet(strength=strength).trigger(key, shape)(jnp.asarray(images))
    assert np.abs(np.asarray(out) - want).max() <= 0.6
    assert np.mean(np.asarray(out) != np.round(want)) < 0.01


# WaNet's loss


def constants(trigger: WarpTrigger, rate: float = 0.0, cross: float = 0.0, degrees: float = 0.0) -> dict[str, Any]:
    numbers = {"rate": rate, "cross": cross, "rotation": np.deg2rad(degrees)}
    return {"warp": trigger.places, **{name: jnp.float32(value) for name, value in numbers.items()}}


LABELS = LabelMap("all_to_one", 3, 2)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_loss_is_the_supervised_one_on_warped_and_relabelled_images(
    tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables, key: jax.Array, rate: float
) -> None:
    trigger = WaNet(strength=2.0).trigger(key, (8, 8, 3))
    loss, (variables, info) = WarpLoss(tiny_classifier, LABELS, crop=0, flip=False)(
        tiny_variables, tiny_data, key, constants(trigger, rate)
    )
    seen = Dataset(trigger(tiny_data.images), LABELS(tiny_data.labels)) if rate else tiny_data
    want, (want_variables, want_info) = SupervisedLoss(tiny_classifier)(tiny_variables, seen, key, {})
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert info == want_info
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), variables, want_variables)


@pytest.fixture
def ramps() -> Dataset:
    """400 images of 12x12 that say of every pixel where it lies: its row and its column, each times 16."""
    places = np.stack([*np.indices((12, 12)), np.zeros((12, 12), int)], -1)
    images = np.broadcast_to(16 * places, (400, 12, 12, 3)).astype(np.uint8)
    return Dataset(jnp.asarray(images), jnp.asarray(np.arange(400) % 3, jnp.int32))


def shown_to_the_network(
    monkeypatch: pytest.MonkeyPatch, data: Dataset, crop: int = 0, flip: bool = False, **settings: Any
) -> Dataset:
    """The batch as the victim sees it."""
    seen: list[Dataset] = []

    def record(classifier: Any) -> Any:
        return lambda variables, batch, key, constants: seen.append(batch)

    monkeypatch.setattr("backdoor_jax.attacks.wanet.SupervisedLoss", record)
    trigger = WaNet(strength=2.0).trigger(jax.random.key(0), (12, 12, 3))
    WarpLoss(None, LABELS, crop, flip)({}, data, jax.random.key(3), constants(trigger, **settings))  # type: ignore[arg-type]
    assert seen[0].images.dtype == jnp.uint8 and seen[0].images.shape == data.images.shape
    return seen[0]


def test_a_batch_is_part_warped_part_warped_with_noise_and_part_clean(
    monkeypatch: pytest.MonkeyPatch, ramps: Dataset
) -> None:
    batch = shown_to_the_network(monkeypatch, ramps, rate=0.2, cross=0.4)
    clean = np.asarray(ramps.images)
    triggered = np.asarray(WaNet(strength=2.0).trigger(jax.random.key(0), (12, 12, 3))(ramps.images[:1]))[0]
    as_it_was = np.all(np.asarray(batch.images) == clean, axis=(1, 2, 3))
    warped = np.all(np.asarray(batch.images) == triggered, axis=(1, 2, 3))
    np.testing.assert_array_equal(batch.labels, np.where(warped, 2, ramps.labels))
    # Five standard deviations of a binomial.
    for share, found in ((0.2, warped), (0.4, as_it_was), (0.4, ~warped & ~as_it_was)):
        assert abs(found.mean() - share) < 5 * np.sqrt(share * (1 - share) / 400)


def test_noise_mode_moves_every_pixel_at_random_and_leaves_labels_alone(
    monkeypatch: pytest.MonkeyPatch, ramps: Dataset
) -> None:
    batch = shown_to_the_network(monkeypatch, ramps, cross=1.0)
    np.testing.assert_array_equal(batch.labels, ramps.labels)
    places = np.asarray(batch.images, np.float64)[..., :2] / 16
    warp = np.asarray(WaNet(strength=2.0).trigger(jax.random.key(0), (12, 12, 3)).places)
    away, unit = places - warp, 11 / 2 / 12
    assert np.abs(away).max() <= unit + 0.5 / 16 + 1e-3
    inner = np.all((warp > unit) & (warp < 11 - unit), axis=-1)
    assert np.abs(np.mean(away[:, inner], 0)).max() < 0.1
    np.testing.assert_allclose(np.std(away[:, inner], 0), unit / np.sqrt(3), rtol=0.2)
    assert places.min() >= 0 and places.max() <= 11


@pytest.mark.parametrize(
    ("settings", "share"),
    [({"crop": 3}, 0.8 * 48 / 49), ({"degrees": 20.0}, 0.5), ({"flip": True}, 0.5), ({}, 0.0)],
)
def test_its_own_augmentation_takes_the_published_shares(
    monkeypatch: pytest.MonkeyPatch, ramps: Dataset, settings: dict[str, Any], share: float
) -> None:
    batch = shown_to_the_network(monkeypatch, ramps, **settings)
    changed = np.any(np.asarray(batch.images) != np.asarray(ramps.images), axis=(1, 2, 3))
    assert abs(changed.mean() - share) <= 5 * np.sqrt(share * (1 - share) / 400) + 0.02 * (share > 0)
    if "flip" in settings:
        np.testing.assert_array_equal(batch.images[changed], ramps.images[changed][:, :, ::-1])


# Settings


@pytest.mark.parametrize("kind", [WaNet, InputAware])
@pytest.mark.parametrize(("cross_ratio", "largest"), [(1.0, "0.5"), (2.0, "0.333333"), (6.0, "0.142857")])
def test_shares_of_a_batch_that_exceed_it_are_refused_with_the_largest_rate_there_is(
    kind: type[WaNet | InputAware], cross_ratio: float, largest: str
) -> None:
    assert kind(rate=float(largest), cross_ratio=cross_ratio).rate == float(largest)
    expected = rf"{kind.__name__}\.rate is 0\.50001, expected at most {largest} where cross_ratio is {cross_ratio}$"
    with pytest.raises(UserError, match=expected):
        kind(rate=0.50001, cross_ratio=cross_ratio)


def test_a_victim_learns_the_warp_that_its_training_set_shows(
    monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    """An experiment makes trigger and poisoned set anew from the key, so both ways must come to the same."""
    asked: list[Any] = []

    def train(key: jax.Array, classifier: Classifier, data: Dataset, config: TrainConfig, **options: Any) -> Any:
        asked.extend([data, options])
        return {"params": {}}, {}

    monkeypatch.setattr("backdoor_jax.attacks.wanet.train", train)
    attack = WaNet(rate=0.25, target=1, cross_ratio=0.5, rotation=90, crop=2)
    scene = Scene(tiny_classifier, tiny_data, flip=True)
    planted = attack.plant(jax.random.key(5), jax.random.key(6), scene)
    poisoned, trigger, _ = attack.poison(jax.random.key(5), scene)
    assert isinstance(trigger, WarpTrigger)
    chex.assert_trees_all_equal(planted.trigger(tiny_data.images), trigger(tiny_data.images))
    chex.assert_trees_all_equal(planted.poisoned.data, poisoned.data)
    assert planted.poisoned.indices.tolist() == poisoned.indices.tolist()

    data, options = asked
    assert data is tiny_data
    assert options["loss"] == WarpLoss(tiny_classifier, LabelMap("all_to_one", 3, 1), 2, True)
    chex.assert_trees_all_equal(options["constants"]["warp"], trigger.places)
    numbers = {name: float(options["constants"][name]) for name in ("rate", "cross", "rotation")}
    assert numbers == pytest.approx({"rate": 0.25, "cross": 0.125, "rotation": np.pi / 2})
