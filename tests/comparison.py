"""What tests of networks compare with: random arrays, random weights, and the same weights for PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax import Classifier
from backdoor_jax.models import Variables


def assert_near(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    """Equal up to a share of the largest value there is."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def random_variables(classifier: Classifier, images: jax.Array) -> Variables:
    """Random everywhere, statistics and normalisation included, so that a slip in any of them shows.

    Kernels have variance 2/fan-in, so that what rectifiers let through stays as large as it was.
    """
    generator = np.random.default_rng(4)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "var":
            return jnp.asarray(generator.uniform(0.5, 2, leaf.shape).astype(np.float32))
        spread = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if len(leaf.shape) > 1 else 0.3
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray((centre + spread * generator.standard_normal(leaf.shape)).astype(np.float32))

    shapes = jax.eval_shape(classifier.init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def torch_state(torch: Any, variables: Variables) -> dict[str, Any]:
    """Our variables under PyTorch's names, an underscore for each dot but for two of PreAct-ResNet18, and layouts."""
    renamed = {"stem": "conv1", "shortcut": "shortcut.0"}
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        *layers, name = (entry.key for entry in path[1:])
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        layer = ".".join(renamed.get(layer, layer.replace("_", ".")) for layer in layers)
        state[f"{layer}.{names[name]}"] = torch.tensor(np.asarray(leaf).transpose(order))
    return state
