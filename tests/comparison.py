"""Comparisons shared by the tests: random arrays and weights, equal trees, weights for PyTorch, images from SciPy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from backdoor_jax import Classifier, Repair
from backdoor_jax.models import Variables


def assert_near(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Fails where values differ by more than a share of the largest expected one."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Standard normal values."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def random_variables(classifier: Classifier, images: jax.Array) -> Variables:
    """Random values everywhere, statistics and normalization included, so that a mistake in any of them shows.

    Kernels have variance 2/fan-in, so that activations keep their size from layer to layer.
    """
    generator = np.random.default_rng(4)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "var":
            return jnp.asarray(generator.uniform(0.5, 2, leaf.shape).astype(np.float32))
        spread = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if len(leaf.shape) > 1 else 0.3
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray((center + spread * generator.standard_normal(leaf.shape)).astype(np.float32))

    shapes = jax.eval_shape(classifier.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def torch_state(torch: Any, variables: Variables) -> dict[str, Any]:
    """Flax variables under PyTorch's names (dots for underscores, except two in PreAct-ResNet18) and in its layouts."""
    renamed = {"stem": "conv1", "shortcut": "shortcut.0"}
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        *layers, name = (entry.key for entry in path[1:])
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        layer = ".".join(renamed.get(layer, layer.replace("_", ".")) for layer in layers)
        state[f"{layer}.{names[name]}"] = torch.tensor(np.asarray(leaf).transpose(order))
    return state


def read_at(image: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """An image ``(H, W, channels)`` at positions ``(..., 2)``, by SciPy; black outside."""
    coordinates = np.moveaxis(np.asarray(positions, np.float64), -1, 0)
    channels = [
        ndimage.map_coordinates(channel, coordinates, order=1, mode="grid-constant", cval=0.0)
        for channel in np.moveaxis(image.astype(np.float64), -1, 0)
    ]
    return np.stack(channels, -1)


def leaves_of(tree: Any) -> list[np.ndarray]:
    """Copies of a tree's leaves."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def trees_equal(one: Any, other: Any) -> bool:
    """Whether two trees hold the same values, bit for bit."""
    return all(np.array_equal(a, b) for a, b in zip(leaves_of(one), leaves_of(other), strict=True))


def assert_trees_equal(one: Any, other: Any) -> None:
    """Fails where two trees differ in any bit, showing where."""
    for a, b in zip(leaves_of(one), leaves_of(other), strict=True):
        np.testing.assert_array_equal(a, b)


def structure(tree: Any) -> Any:
    """A tree's structure, which is equal to that of a tree of the same containers, keys and static fields."""
    return jax.tree.structure(tree)


def assert_depends_on_key_alone(repair: Callable[[int], Repair], victim: Variables) -> Repair:
    """Fails unless equal keys give equal repairs, others other ones, and the victim is left as it is.

    Args:
        repair: repairs the victim under the key of a number.
        victim: its variables.

    Returns:
        The repair under the key 1.
    """
    before = leaves_of(victim)
    one, same, other = (repair(number) for number in (1, 1, 2))
    assert_trees_equal(before, victim)
    assert_trees_equal(one.variables, same.variables)
    assert one.info == same.info
    assert not trees_equal(one.variables["params"], other.variables["params"])
    assert structure(one.variables) == structure(victim)
    return one


def cache_size(function: Any) -> int:
    """How many programs a jitted function has been compiled to."""
    return function._cache_size()
