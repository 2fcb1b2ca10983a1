"""WaNet against the published recipe, PyTorch and NumPy."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import read_at
from jax.tree_util import Partial

from backdoor_jax import Classifier, Dataset, TrainConfig, UserError
from backdoor_jax.attacks import AttackContext, InputAware, WaNet
from backdoor_jax.attacks.wanet import WarpMixture, WarpTrigger, warp_loss
from backdoor_jax.data import LabelMap
from backdoor_jax.models import Variables
from backdoor_jax.training import supervised_loss


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


# The trigger


def drawn(key: jax.Array, grid: int) -> np.ndarray:
    """The displacements before they are scaled, rows first; drawn as in the package."""
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
    field = np.stack([keys_cubic(tall.swapaxes(0, 1), place) for place in np.linspace(0, len(field) - 1, width)], 1)
    identity = np.stack(np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"), -1)
    warped = np.clip(identity + strength * field / height, -1, 1)
    return (warped + 1) / 2 * [height - 1, width - 1]


@pytest.mark.parametrize("shape", [(16, 16, 3), (12, 20, 1), (20, 12, 3)])
@pytest.mark.parametrize(("grid", "strength"), [(4, 0.5), (2, 3.0), (6, 1.0)])
def test_the_trigger_is_the_published_warp(shape: tuple[int, int, int], grid: int, strength: float) -> None:
    key = jax.random.key(grid)
    trigger = WaNet(grid=grid, strength=strength).trigger(key, shape)
    places = published_places(drawn(key, grid), shape, strength)
    np.testing.assert_allclose(trigger.places, places, atol=1e-4)
    images = noise(3, *shape)
    out = np.asarray(trigger(jnp.asarray(images)))
    expected = np.stack([read_at(image, places) for image in images])
    assert out.shape == images.shape and out.dtype == np.uint8
    assert np.abs(out - expected).max() <= 0.6
    assert np.mean(out != images) > 0.3


@pytest.mark.parametrize("shape", [(32, 32, 3), (12, 20, 3), (20, 12, 1)])
@pytest.mark.parametrize("strength", [0.5, 4.0])
def test_the_trigger_is_what_pytorch_makes_of_the_same_noise(shape: tuple[int, int, int], strength: float) -> None:
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
    expected = warped.permute(0, 2, 3, 1).numpy()
    out = WaNet(strength=strength).trigger(key, shape)(jnp.asarray(images))
    assert np.abs(np.asarray(out) - expected).max() <= 0.6
    assert np.mean(np.asarray(out) != np.round(expected)) < 0.01


# The loss


def mixture(
    warped: float = 0.0, noisy: float = 0.0, degrees: float = 0.0, crop: int = 0, flip: bool = False
) -> WarpMixture:
    """A mixture without any part that is not asked for; as an array the share of warped images may be 0."""
    return WarpMixture(jnp.float32(warped), noisy, crop, float(np.deg2rad(degrees)), flip)


LABELS = LabelMap("all_to_one", 3, 2)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_loss_is_the_supervised_one_on_warped_and_relabeled_images(
    tiny_classifier: Classifier, tiny_data: Dataset, tiny_variables: Variables, key: jax.Array, rate: float
) -> None:
    trigger = WaNet(strength=2.0).trigger(key, (8, 8, 3))
    loss, (variables, info) = warp_loss(tiny_classifier, mixture(rate), LABELS, trigger, tiny_variables, tiny_data, key)
    seen = Dataset(trigger(tiny_data.images), LABELS(tiny_data.labels)) if rate else tiny_data
    expected, (expected_variables, expected_info) = supervised_loss(tiny_classifier, tiny_variables, seen, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert info == expected_info
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), variables, expected_variables)


@pytest.fixture
def ramps() -> Dataset:
    """400 images of 12x12 whose pixels say where they are: row and column, each times 16."""
    places = np.stack([*np.indices((12, 12)), np.zeros((12, 12), int)], -1)
    images = np.broadcast_to(16 * places, (400, 12, 12, 3)).astype(np.uint8)
    return Dataset(jnp.asarray(images), jnp.asarray(np.arange(400) % 3, jnp.int32))


def batch_of_the_network(monkeypatch: pytest.MonkeyPatch, data: Dataset, **settings: Any) -> Dataset:
    """The batch that the network receives."""
    seen: list[Dataset] = []

    def record(classifier: Any, variables: Variables, batch: Dataset, key: jax.Array) -> None:
        seen.append(batch)

    monkeypatch.setattr("backdoor_jax.attacks.wanet.supervised_loss", record)
    trigger = WaNet(strength=2.0).trigger(jax.random.key(0), (12, 12, 3))
    warp_loss(None, mixture(**settings), LABELS, trigger, {}, data, jax.random.key(3))  # type: ignore[arg-type]
    assert seen[0].images.dtype == jnp.uint8 and seen[0].images.shape == data.images.shape
    return seen[0]


def test_a_batch_is_part_warped_part_warped_with_noise_and_part_clean(
    monkeypatch: pytest.MonkeyPatch, ramps: Dataset
) -> None:
    batch = batch_of_the_network(monkeypatch, ramps, warped=0.2, noisy=0.4)
    clean = np.asarray(ramps.images)
    triggered = np.asarray(WaNet(strength=2.0).trigger(jax.random.key(0), (12, 12, 3))(ramps.images[:1]))[0]
    unchanged = np.all(np.asarray(batch.images) == clean, axis=(1, 2, 3))
    warped = np.all(np.asarray(batch.images) == triggered, axis=(1, 2, 3))
    np.testing.assert_array_equal(batch.labels, np.where(warped, 2, ramps.labels))
    # Five standard deviations of a binomial.
    for share, found in ((0.2, warped), (0.4, unchanged), (0.4, ~warped & ~unchanged)):
        assert abs(found.mean() - share) < 5 * np.sqrt(share * (1 - share) / 400)


def test_noise_mode_moves_every_pixel_at_random_and_leaves_labels_alone(
    monkeypatch: pytest.MonkeyPatch, ramps: Dataset
) -> None:
    batch = batch_of_the_network(monkeypatch, ramps, noisy=1.0)
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
def test_augmentation_has_the_published_shares(
    monkeypatch: pytest.MonkeyPatch, ramps: Dataset, settings: dict[str, Any], share: float
) -> None:
    batch = batch_of_the_network(monkeypatch, ramps, **settings)
    changed = np.any(np.asarray(batch.images) != np.asarray(ramps.images), axis=(1, 2, 3))
    assert abs(changed.mean() - share) <= 5 * np.sqrt(share * (1 - share) / 400) + 0.02 * (share > 0)
    if "flip" in settings:
        np.testing.assert_array_equal(batch.images[changed], ramps.images[changed][:, :, ::-1])


# Configuration


@pytest.mark.parametrize("kind", [WaNet, InputAware])
@pytest.mark.parametrize(("cross_ratio", "largest"), [(1.0, "0.5"), (2.0, "0.333333"), (6.0, "0.142857")])
def test_shares_that_exceed_a_batch_are_refused_with_the_largest_possible_rate(
    kind: type[WaNet | InputAware], cross_ratio: float, largest: str
) -> None:
    assert kind(rate=float(largest), cross_ratio=cross_ratio).rate == float(largest)
    expected = rf"{kind.__name__}\.rate is 0\.50001, expected at most {largest} where cross_ratio is {cross_ratio}$"
    with pytest.raises(UserError, match=expected):
        kind(rate=0.50001, cross_ratio=cross_ratio)


def test_a_victim_is_trained_on_the_warp_of_its_poisoned_training_set(
    monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier, tiny_data: Dataset
) -> None:
    """An experiment makes trigger and poisoned set again from the key, so both ways must give the same."""
    arguments: list[Any] = []

    class Trained:
        variables: Variables = {"params": {}}  # noqa: RUF012

    def train(key: jax.Array, classifier: Classifier, data: Dataset, config: TrainConfig, **options: Any) -> Any:
        arguments.extend([data, options])
        return Trained()

    monkeypatch.setattr("backdoor_jax.attacks.wanet.train", train)
    attack = WaNet(rate=0.25, target=1, cross_ratio=0.5, rotation=90, crop=2)
    context = AttackContext(tiny_classifier, tiny_data, flip=True)
    victim = attack.train_victim_in(context, jax.random.key(5), jax.random.key(6))
    poisoned, trigger, _ = attack.poison(jax.random.key(5), context)
    assert isinstance(trigger, WarpTrigger)
    chex.assert_trees_all_equal(victim.trigger(tiny_data.images), trigger(tiny_data.images))
    chex.assert_trees_all_equal(victim.poisoned.data, poisoned.data)
    assert victim.poisoned.indices.tolist() == poisoned.indices.tolist()

    data, options = arguments
    assert data is tiny_data
    loss = options["loss"]
    assert isinstance(loss, Partial) and loss.func is warp_loss
    classifier, mixed, label_map, warp = loss.args
    assert (classifier, label_map) == (tiny_classifier, LabelMap("all_to_one", 3, 1))
    chex.assert_trees_all_equal(warp.places, trigger.places)
    assert mixed == WarpMixture(0.25, 0.125, 2, np.pi / 2, True)
