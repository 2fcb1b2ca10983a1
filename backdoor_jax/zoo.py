"""The zoo: trained victims and clean models, each with its trigger, its poisoned images and the recipe that made it.

The repository holds narrow models in `zoo/`, which is no part of the installed package; `benchmarks/make_zoo.py` makes
these and wider ones from an experiment's configuration. Another folder is given as an argument, or in the environment
variable ``BACKDOOR_JAX_ZOO``. On the command line a model of the zoo is ``--checkpoint zoo:NAME``.

A zoo is a folder with ``index.json``, which holds the recipe and the SHA-256 digest of every file, and one
``.safetensors`` file for each model: its variables and its trigger in float16, and the indices of the images that were
poisoned. Nothing in a file is executed, and a file whose digest differs is refused.

    >>> import tempfile
    >>> from backdoor_jax import build_classifier, digits
    >>> task, attack = digits(), ATTACKS["badnets"]()
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> variables, trigger = classifier.init(jax.random.key(0), task.test.images), attack.trigger(None, (8, 8, 3))
    >>> recipe = {"dataset": "digits", "classes": 10, "shape": [8, 8, 3], "seed": 0,
    ...           "model": {"name": "small_cnn", "width": 2}, "normalization": "none",
    ...           "attack": {"name": "badnets"}, "rates": {"acc": 0.1, "asr": 0.0, "ra": 0.1}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save("digits/badnets-s0", Contents(variables, trigger, np.arange(3)), recipe, folder)
    ...     list(folder), load("digits/badnets-s0", folder).poisoned.tolist()
    (['digits/badnets-s0'], [0, 1, 2])
"""

import builtins
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.array_files import read_safetensors
from backdoor_jax.attacks import ATTACKS
from backdoor_jax.config import is_number, is_whole
from backdoor_jax.config_files import check
from backdoor_jax.data import LabelMap, Trigger
from backdoor_jax.errors import UserError
from backdoor_jax.experiment import ModelConfig
from backdoor_jax.files import atomic_write, locked_folder, write_text
from backdoor_jax.metrics import Scores
from backdoor_jax.models import Classifier, Variables, build_classifier
from backdoor_jax.reading import parse_json, parsing, read_text

INDEX = "index.json"
LARGEST_SIDE = 4096
"""Pixels of an image's side; a trigger of its size is made before the file is read."""
FOLDER = "BACKDOOR_JAX_ZOO"
"""The environment variable that names another folder."""
NAME = re.compile(r"[A-Za-z0-9_]+/[A-Za-z0-9_.-]+")
"""What names look like; they are paths below the folder."""


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        variables: the model's.
        trigger: the attacker's; None for a clean model.
        poisoned: indices of the poisoned images in the training set.
    """

    variables: Variables
    trigger: Trigger | None
    poisoned: np.ndarray


class ZooVictim(NamedTuple):
    """A victim or a clean model of the zoo.

    Attributes:
        name: in the zoo.
        classifier: the network.
        variables: its variables, in float32.
        trigger: the attacker's; None for a clean model.
        label_map: the attacker's; None for a clean model.
        poisoned: indices of the poisoned images in the training set.
        recipe: how it was made, in plain values: data, model, attack, training, seed, versions and device.
        scores: ACC, ASR and RA on the test set, of these variables and this trigger.
    """

    name: str
    classifier: Classifier
    variables: Variables
    trigger: Trigger | None
    label_map: LabelMap | None
    poisoned: np.ndarray
    recipe: dict[str, Any]
    scores: Scores


def list(folder: Path | str | None = None) -> builtins.list[str]:
    """The names of the models in the zoo.

    Args:
        folder: of the zoo; by default that of ``BACKDOOR_JAX_ZOO``, or else of this checkout.

    Raises:
        UserError: where there is no zoo.
    """
    return sorted(_index(_folder(folder)))


def load(name: str, folder: Path | str | None = None) -> ZooVictim:
    """Loads a model of the zoo.

    Args:
        name: such as ``gtsrb_half/wanet-r10-s0``; see `list`.
        folder: see `list`.

    Raises:
        UserError: for a name that is not in the zoo, a file whose digest differs from the recorded one, or a recipe
            that cannot be used.
    """
    home = _folder(folder)
    index = _index(home)
    if name not in index:
        raise UserError(f"{name!r} is not in the zoo {home}; it has {', '.join(sorted(index)) or 'nothing'}"[:500])
    path, recipe = _path(home, name), index[name]
    with parsing(home / INDEX, f"the recipe of {name} is damaged", "copy the zoo again"):
        digest, shape, rates = recipe["sha256"], tuple(recipe["shape"]), recipe["rates"]
        scores = Scores(*(rates[field] for field in Scores._fields))
        if len(shape) != 3 or not all(is_whole(side) and 0 < side <= LARGEST_SIDE for side in shape):
            raise ValueError(f"{shape} is no shape of an image of up to {LARGEST_SIDE} pixels a side")
        if not all(rate is None or (is_number(rate) and 0 <= rate <= 1) for rate in scores):
            raise ValueError("its rates are no numbers from 0 to 1")
        settings = {key: value for key, value in (recipe["attack"] or {}).items() if key != "name"}
        attack = check(ATTACKS[recipe["attack"]["name"]], settings, name) if recipe["attack"] else None
        model: ModelConfig = check(ModelConfig, recipe["model"], name)
        classifier = build_classifier(
            model.name, recipe["classes"], model.width, recipe["normalization"], **model.options
        )
    found, arrays = _read(path)
    if found != digest:
        raise UserError(f"{path}: is damaged or another file (its SHA-256 is not the recorded one); copy the zoo again")
    key, image = jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    with parsing(path, "holds another model than its recipe says", "copy the zoo again"):
        variables = _unflatten("variables", jax.eval_shape(classifier.init, key, image), arrays)
        trigger = attack and _unflatten("trigger", jax.eval_shape(lambda key: attack.trigger(key, shape), key), arrays)
        poisoned = arrays["poisoned"]
    label_map = attack.label_map(classifier.num_classes) if attack else None
    return ZooVictim(name, classifier, variables, trigger, label_map, poisoned, recipe, scores)


def save(name: str, contents: Contents, recipe: dict[str, Any], folder: Path | str) -> None:
    """Writes a model to a zoo, and its recipe and digest to the index; what had the name is replaced.

    Args:
        name: ``DATASET/MODEL``, of letters, digits and ``_.-``.
        contents: what to write.
        recipe: plain values; `load` needs ``shape`` and ``classes`` of the data, ``model``, ``normalization``,
            ``attack`` with its ``name`` (None for a clean model), and ``rates``.
        folder: of the zoo.

    Raises:
        UserError: for a name that cannot be a path.
    """
    from safetensors.numpy import save_file

    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be a name in the zoo; give DATASET/MODEL in letters, digits and _.-")
    home, path = Path(folder), _path(Path(folder), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {**_flatten("variables", contents.variables), **_flatten("trigger", contents.trigger)}
    with atomic_write(path) as partial:
        save_file({**arrays, "poisoned": np.asarray(contents.poisoned, np.int32)}, partial)
    with locked_folder(home):
        index = _index(home) if (home / INDEX).is_file() else {}
        index[name] = {**recipe, "sha256": _read(path)[0]}
        write_text(home / INDEX, json.dumps(dict(sorted(index.items())), indent=1) + "\n")


def _folder(folder: Path | str | None) -> Path:
    return Path(folder or os.environ.get(FOLDER) or Path(__file__).parents[1] / "zoo")


def _path(home: Path, name: str) -> Path:
    return home / f"{name}.safetensors"


def _index(home: Path) -> dict[str, Any]:
    """The recipes by name."""
    fix = f"give the folder of a zoo in {FOLDER}, such as zoo/ of the repository"
    with parsing(home / INDEX, "is no index of a zoo", fix):
        index = parse_json(read_text(home / INDEX, fix))
        if not all(isinstance(recipe, dict) and NAME.fullmatch(name) for name, recipe in index.items()):
            raise ValueError("it is no table of recipes")
        return dict(index)


def _read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The digest of a file, and its arrays."""
    arrays = read_safetensors(path)[1]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), arrays


def _flatten(part: str, tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their number in it, floats in float16."""
    arrays = {}
    for number, leaf in enumerate(map(np.asarray, jax.tree.leaves(tree))):
        kind = np.float16 if np.issubdtype(leaf.dtype, np.floating) else leaf.dtype
        arrays[f"{part}/{number}"] = np.array(leaf, kind, order="C")
    return arrays


def _unflatten(part: str, like: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The tree with this structure, and shapes and types, of the leaves that `_flatten` made."""
    leaves, structure = jax.tree.flatten(like)
    found = [arrays[f"{part}/{number}"] for number in range(len(leaves))]
    if any(array.shape != leaf.shape for array, leaf in zip(found, leaves, strict=True)):
        raise ValueError(f"its {part} are of other shapes")
    return jax.tree.unflatten(
        structure, [jnp.asarray(array, leaf.dtype) for array, leaf in zip(found, leaves, strict=True)]
    )
