"""Custom networks through `Classifier`, native files, and exported programs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from backdoor_jax import Classifier, Dataset, UserError, build_classifier, load_model, save_model
from backdoor_jax.defenses import D3, PADFT, TAC, SuperFineTune, scan
from backdoor_jax.interop.checkpoints import save_tree
from backdoor_jax.interop.export import export_model
from backdoor_jax.interop.native import DESCRIPTION, HEADER
from backdoor_jax.models import MODELS, Stem, Variables, describe

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class CustomLinen(nn.Module):
    """A user's network: only a ``__call__``, Flax's normalization, dropout, and a switch called ``training``."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not training, name="norm")(x))
        x = nn.Dropout(0.5, deterministic=not training)(x.mean((1, 2)))
        return nn.Dense(3, name="out")(x)


class CustomNNX(nnx.Module):
    """The same kind of network in NNX, with its head in a list."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.drop(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))
        return self.layers[1](nnx.relu(self.layers[0](x)))


def pooled(variables: Variables, x: jax.Array, train: bool) -> tuple[jax.Array, Variables]:
    kernel = variables["params"]["body"]["kernel"]
    return jax.nn.relu(x.reshape(x.shape[0], -1, 3).mean(1) @ kernel), variables


def product(variables: Variables, latent: jax.Array) -> jax.Array:
    out = variables["params"]["out"]
    return latent @ out["kernel"] + out["bias"]


def draw(key: jax.Array, x: jax.Array) -> Variables:
    body, out = jax.random.split(key)
    head = {"kernel": jax.random.normal(out, (6, 3)), "bias": jnp.zeros(3)}
    return {"params": {"body": {"kernel": jax.random.normal(body, (3, 6))}, "out": head}}


def linen(images: jax.Array) -> tuple[Classifier, Variables]:
    classifier = Classifier.from_linen(CustomLinen(), 3, ("out",), mean=MEAN, std=STD)
    return classifier, classifier.init(jax.random.key(0), images)


def in_nnx(images: jax.Array) -> tuple[Classifier, Variables]:
    return Classifier.from_nnx(CustomNNX(nnx.Rngs(0)), 3, ("layers", "1"), mean=MEAN, std=STD)


def functions(images: jax.Array) -> tuple[Classifier, Variables]:
    classifier = Classifier.from_functions(draw, pooled, product, 3, ("out",), mean=MEAN, std=STD)
    return classifier, classifier.init(jax.random.key(0), images)


CUSTOM: dict[str, Callable[[jax.Array], tuple[Classifier, Variables]]] = {
    "linen": linen,
    "nnx": in_nnx,
    "functions": functions,
}


@pytest.fixture(scope="module", params=CUSTOM)
def custom(request: pytest.FixtureRequest, tiny_data: Dataset) -> tuple[str, Classifier, Variables]:
    return request.param, *CUSTOM[request.param](tiny_data.images)


# Custom networks


def test_logits_equal_those_of_the_module(tiny_data: Dataset) -> None:
    x = jnp.asarray((np.asarray(tiny_data.images) / 255 - MEAN) / STD, jnp.float32)
    classifier, variables = linen(tiny_data.images)
    logits, kept = classifier.logits(variables, tiny_data.images)
    np.testing.assert_allclose(logits, np.asarray(CustomLinen().apply(variables, x)), atol=1e-5)
    assert kept is variables

    model = CustomNNX(nnx.Rngs(0))
    model.eval()
    classifier, variables = in_nnx(tiny_data.images)
    logits, kept = classifier.logits(variables, tiny_data.images)
    np.testing.assert_allclose(logits, model(x), atol=1e-5)
    assert kept is variables
    again = classifier.network.model(variables)
    again.eval()
    np.testing.assert_allclose(logits, again(x), atol=1e-5)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_training_returns_the_batchs_statistics_and_leaves_the_given_ones(name: str, tiny_data: Dataset) -> None:
    classifier, variables = CUSTOM[name](tiny_data.images)
    before = jax.tree.map(np.asarray, variables)
    first, new = classifier.features(variables, tiny_data.images, train=True)
    second, _ = classifier.features(variables, tiny_data.images, train=True)
    np.testing.assert_array_equal(first, second)  # No dropout.
    chex.assert_trees_all_equal(variables, before)
    chex.assert_trees_all_equal(new["params"], before["params"])
    chex.assert_trees_all_equal_structs(new, variables)
    assert float(jnp.abs(new["batch_stats"]["norm"]["mean"] - before["batch_stats"]["norm"]["mean"]).max()) > 0


def test_an_equal_classifier_is_traced_once(custom: tuple[str, Classifier, Variables], tiny_data: Dataset) -> None:
    name, classifier, variables = custom
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def logits(classifier: Classifier, variables: Variables, images: jax.Array) -> jax.Array:
        return classifier.logits(variables, images)[0]

    same = CUSTOM[name](tiny_data.images)[0]
    assert same == classifier and hash(same) == hash(classifier)
    for one in (classifier, same):
        logits(one, variables, tiny_data.images)


def test_head_weights_reproduce_the_head(custom: tuple[str, Classifier, Variables], tiny_data: Dataset) -> None:
    _, classifier, variables = custom
    latent, _ = classifier.features(variables, tiny_data.images)
    kernel, bias = classifier.head_weights(variables)
    np.testing.assert_allclose(latent @ kernel + bias, classifier.head(variables, latent), atol=1e-5)


def test_defenses_repair_custom_networks(custom: tuple[str, Classifier, Variables], tiny_data: Dataset) -> None:
    _, classifier, variables = custom
    before = jax.tree.map(np.asarray, variables)
    few: dict[str, Any] = {"steps": 2, "batch_size": 12, "crop": 1}
    key = jax.random.key(1)
    repairs = [
        defense.repair(key, classifier, variables, tiny_data)
        for defense in (D3(**few), SuperFineTune(**few), TAC(target="smallest", **few))
    ]
    for repair in repairs:
        chex.assert_trees_all_equal_structs(repair.variables, variables)
        if repair.changed:
            assert not np.array_equal(
                classifier.head_weights(repair.variables)[0], classifier.head_weights(variables)[0]
            )
    assert repairs[0].info["norm_ratio"] == pytest.approx(1, abs=1e-4)
    assert repairs[0].changed and repairs[1].changed
    chex.assert_trees_all_equal(variables, before)
    assert scan(classifier, variables, tiny_data.images).worst_case.shape == (3,)


def test_pad_ft_says_which_layers_it_needs(custom: tuple[str, Classifier, Variables], tiny_data: Dataset) -> None:
    _, classifier, variables = custom
    with pytest.raises(UserError, match=r"has no rectifiers that can be bounded; .*layers\.ReLU or GELU.* d3"):
        PADFT(per_class=2).repair(jax.random.key(0), classifier, variables, tiny_data)


def test_parts_can_be_methods_or_functions_of_the_module(tiny_classifier: Classifier, tiny_data: Dataset) -> None:
    def body(net: Any, x: jax.Array, train: bool) -> jax.Array:
        return net.features(x, train)

    variables = tiny_classifier.init(jax.random.key(0), tiny_data.images)
    expected, new = tiny_classifier.logits(variables, tiny_data.images, train=True)
    for parts in ((), (body,), ("features", "head"), (body, lambda net, latent: net.linear(latent))):
        classifier = Classifier.from_linen(tiny_classifier.network, 3, ("linear",), *parts)
        logits, stats = classifier.logits(variables, tiny_data.images, train=True)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        chex.assert_trees_all_close(stats, new, atol=1e-6)
        assert list(classifier.activations(variables, tiny_data.images)) == ["relu"]


def test_nnx_parts_and_new_variables(tiny_data: Dataset) -> None:
    def body(net: Any, x: jax.Array) -> jax.Array:
        x = nnx.relu(net.norm(net.conv(x))).mean((1, 2))
        return nnx.relu(net.layers[0](x))

    def make(key: jax.Array) -> nnx.Module:
        return CustomNNX(nnx.Rngs(key))

    plain, variables = in_nnx(tiny_data.images)
    classifier, _ = Classifier.from_nnx(
        CustomNNX(nnx.Rngs(0)), 3, ("layers", "1"), body, lambda net, z: net.layers[1](z), make=make, mean=MEAN, std=STD
    )
    np.testing.assert_allclose(
        classifier.logits(variables, tiny_data.images)[0], plain.logits(variables, tiny_data.images)[0], atol=1e-5
    )
    chex.assert_trees_all_equal_shapes(classifier.init(jax.random.key(3), tiny_data.images), variables)
    with pytest.raises(UserError, match="give from_nnx make="):
        plain.init(jax.random.key(0), tiny_data.images)


@pytest.mark.parametrize(
    ("path", "classes", "message"),
    [
        (("dense",), 3, "no linear head at 'dense'; give head_path: linear layers lie at out"),
        (("conv",), 3, "expected \\(B, D\\); pool or flatten"),
        (("out",), 4, "gives 3 logits for 4 classes"),
    ],
)
def test_a_wrong_head_is_a_one_line_error(
    path: tuple[str, ...], classes: int, message: str, tiny_data: Dataset
) -> None:
    classifier = Classifier.from_linen(CustomLinen(), classes, path)
    variables = classifier.init(jax.random.key(0), tiny_data.images)
    with pytest.raises(UserError, match=message):
        classifier.logits(variables, tiny_data.images)


def test_latents_must_be_vectors(tiny_data: Dataset) -> None:
    classifier = Classifier.from_functions(None, lambda v, x, train: (x, v), product, 3, ("out",))
    with pytest.raises(UserError, match=r"latents have shape \(24, 8, 8, 3\), expected \(B, D\)"):
        classifier.features({"params": {}}, tiny_data.images)


# Native files


@pytest.fixture(scope="module")
def made() -> tuple[Classifier, Variables]:
    """A clipped model of a network that files can describe."""
    classifier = build_classifier("preact_resnet18", 5, width=1, normalization="cifar100")
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.uint8)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), image)
    shapes = {**shapes, "bounds": jax.eval_shape(classifier.activations, shapes, image)}
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    arrays = [jax.random.uniform(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return classifier, jax.tree.unflatten(treedef, arrays)


@pytest.fixture(scope="module")
def kept(made: tuple[Classifier, Variables], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    save_model(folder / "model.safetensors", *made)
    save_model(folder / "model", *made)
    return folder


FORMS = ("model.safetensors", "model")


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_read_as_it_was_written(form: str, kept: Path, made: tuple[Classifier, Variables]) -> None:
    classifier, variables = load_model(kept / form)
    assert classifier == made[0]
    chex.assert_trees_all_equal_structs(variables, made[1])
    chex.assert_trees_all_equal(variables, made[1])
    assert not [path for path in kept.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("form", FORMS)
def test_a_model_can_be_overwritten(form: str, made: tuple[Classifier, Variables], tmp_path: Path) -> None:
    classifier, variables = made
    save_model(tmp_path / form, classifier, variables)
    plain = {name: jax.tree.map(jnp.zeros_like, tree) for name, tree in variables.items() if name != "bounds"}
    save_model(tmp_path / form, classifier, plain)
    chex.assert_trees_all_equal(load_model(tmp_path / form)[1], plain)


@pytest.mark.parametrize("name", MODELS)
def test_every_named_network_is_described(name: str) -> None:
    stems: tuple[Stem | None, ...] = (None, "imagenet") if "stem" in MODELS[name].options else (None,)
    for stem in stems:
        classifier = build_classifier(name, 7, 3, stem=stem)
        described = describe(classifier)
        assert described is not None
        assert (described["model"], described["width"]) == (name, 3)
        again = build_classifier(described["model"], 7, described["width"], **described["options"])
        assert again == classifier
    assert describe(Classifier(nn.Dense(2), 2)) is None


def test_a_vision_transformer_of_any_image_size_is_checked(tmp_path: Path) -> None:
    classifier = build_classifier("vit_tiny", 3, width=1, patch=4)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    save_model(tmp_path / "vit.safetensors", classifier, variables)
    assert load_model(tmp_path / "vit.safetensors")[0] == classifier


def test_a_custom_network_needs_its_classifier_again(
    custom: tuple[str, Classifier, Variables], tiny_classifier: Classifier, tiny_variables: Variables, tmp_path: Path
) -> None:
    _, classifier, variables = custom
    for form in FORMS:
        save_model(tmp_path / form, classifier, variables)
        assert "classifier" in refusal(tmp_path / form)
        same, again = load_model(tmp_path / form, classifier=classifier)
        assert same is classifier
        chex.assert_trees_all_equal(again, variables)
        assert "5" in refusal(tmp_path / form, classifier=build_classifier("preact_resnet18", 5, 1))
        assert "linear" in refusal(tmp_path / form, classifier=tiny_classifier)


def test_names_may_contain_any_character(tmp_path: Path) -> None:
    classifier = Classifier.from_functions(None, pooled, product, 3, ("net/~/out",))
    variables = {"params": {"net/~/out": {"kernel": jnp.ones((2, 3)), "100%": jnp.ones(())}}}
    for form in FORMS:
        save_model(tmp_path / form, classifier, variables)
        chex.assert_trees_all_equal(load_model(tmp_path / form, classifier=classifier)[1], variables)


def refusal(path: Path, *arguments: Any, **named: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path, *arguments, **named)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


@pytest.mark.parametrize("share", [0, 0.0005, 0.5, 0.999])
def test_a_truncated_file_is_a_one_line_error(share: float, kept: Path, tmp_path: Path) -> None:
    data = (kept / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: int(share * len(data))])
    assert "not a complete safetensors file" in refusal(tmp_path / "cut.safetensors")


def test_a_damaged_folder_is_a_one_line_error(kept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(kept / "model", folder)
    data = [path for path in (folder / "variables").rglob("*") if path.is_file() and path.parent.name == "d"]
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in refusal(folder)
    shutil.rmtree(folder / "variables")
    assert "lacks files" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 2}, "not those of the network"),
        ({"classes": 6}, "not those of the network"),
        ({"model": "resnet18"}, "not those of the network"),
        ({"model": "resnet99"}, "resnet99"),
        ({"format": 99}, "later than"),
        ({"arrays": [1]}, "damaged"),
        ({"options": {"color": 1}}, "color"),
        ({"std": [0, 0, 0]}, "std"),
        ({"mean": "x"}, "cannot be used"),
    ],
)
def test_a_description_of_another_model_is_a_one_line_error(
    change: dict[str, Any], message: str, kept: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(kept / "model", folder)
    described = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**described, **change}))
    assert message in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": 1}', '{"format": "x"}', "\udcff"])
def test_an_invalid_description_is_a_one_line_error(text: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert DESCRIPTION in refusal(tmp_path)


def test_foreign_files_are_a_one_line_error(kept: Path, tmp_path: Path, tiny_variables: Variables) -> None:
    from safetensors.numpy import save_file

    save_file({"fc.weight": np.ones((2, 2), np.float32)}, tmp_path / "foreign.safetensors")
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "bad.safetensors", {HEADER: "{"})
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07onnx")
    (tmp_path / "bare.pt").write_bytes(b"torch")
    save_tree(tmp_path / "older" / "variables", tiny_variables)
    assert "--model" in refusal(tmp_path / "foreign.safetensors")
    assert "damaged or another program's" in refusal(tmp_path / "bad.safetensors")
    assert "perhaps an ONNX file" in refusal(tmp_path / "model.onnx")
    assert "--model" in refusal(tmp_path / "bare.pt")
    assert DESCRIPTION in refusal(tmp_path / "older")
    assert "no such model" in refusal(tmp_path / "nowhere")
    for form in FORMS:
        assert "holds preact_resnet18, not resnet18" in refusal(kept / form, "resnet18")
        assert "has its own normalization" in refusal(kept / form, normalization="gtsrb")


def test_a_path_that_cannot_be_written_is_a_one_line_error(made: tuple[Classifier, Variables], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for form in ("file", "file/model.safetensors", "file/model"):
        with pytest.raises(UserError, match="cannot be written"):
            save_model(tmp_path / form, *made)
    with pytest.raises(UserError, match=r"params is a list; only dictionaries of arrays can be saved"):
        save_model(tmp_path / "model", made[0], {"params": [jnp.ones(1)]})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_killed_save_leaves_no_model(
    made: tuple[Classifier, Variables], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("backdoor_jax.interop.native.save_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "model", *made)
    assert DESCRIPTION in refusal(tmp_path / "model")


# Exported programs

ALONE = """
import sys

class Never:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("backdoor_jax", "flax", "optax", "orbax"):
            raise ImportError(name)

sys.meta_path.insert(0, Never())
import jax, jax.export, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
np.savez(sys.argv[3], full=program.call(images), part=program.call(images[:2]), platforms=program.platforms)
"""


def test_an_exported_model_runs_without_this_package(
    made: tuple[Classifier, Variables], tiny_data: Dataset, tmp_path: Path
) -> None:
    pytest.importorskip("flatbuffers")
    classifier, variables = made
    export_model(tmp_path / "model.jaxexport", classifier, variables, (8, 8, 3))
    np.save(tmp_path / "images.npy", np.asarray(tiny_data.images))
    names = ("model.jaxexport", "images.npy", "logits.npz")
    command = [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in names)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "logits.npz") as logits:
        expected = classifier.logits(variables, tiny_data.images)[0]
        np.testing.assert_allclose(logits["full"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logits["part"], expected[:2], rtol=1e-4, atol=1e-4)
        assert logits["platforms"].tolist() == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("name", ["small_cnn", "resnet18"])
def test_an_exported_model_takes_any_number_of_images(name: str, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    classifier = build_classifier(name, 3, width=2)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    variables = classifier.init(jax.random.key(0), images)
    export_model(tmp_path / "model.jaxexport", classifier, variables, (8, 8, 3))
    program = jax.export.deserialize(bytearray((tmp_path / "model.jaxexport").read_bytes()))
    np.testing.assert_allclose(program.call(images), classifier.logits(variables, images)[0], rtol=1e-4, atol=1e-4)


def test_an_export_of_the_wrong_shape_is_a_one_line_error(made: tuple[Classifier, Variables], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        export_model(tmp_path / "model.jaxexport", *made, (8, 8, 7))
    assert "8x8x7" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
