"""Files that someone else wrote: damaged at random, or made to run code, to use all memory, or never to end.

Every one is read correctly or refused in one line. `test_damage` tries 200 damages for each format; with ``-m fuzz``
there are 2,000.
"""

import dataclasses
import functools
import io
import json
import os
import pickle
import resource
import signal
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from backdoor_jax import UserError, build_classifier, load_model, load_torch, save_model
from backdoor_jax.array_files import read_npy, read_npz, read_safetensors
from backdoor_jax.config_files import load_experiment
from backdoor_jax.data import DATASETS, load, load_labeled
from backdoor_jax.errors import LONGEST
from backdoor_jax.experiment import RESULT, read_rows
from backdoor_jax.interop import torch_files
from backdoor_jax.interop.native import DESCRIPTION
from backdoor_jax.pickles import PickledArray, PlainUnpickler

MEMORY, SPACE = 1 << 30, 16 << 30
"""Bytes that reading a file may need beyond what the process has, and bytes of addresses, of which JAX takes many."""
SECONDS = 20


def status(field: str) -> int:
    """Bytes of memory that this process has, or had at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


@contextmanager
def limits() -> Iterator[None]:
    """A limit of memory and of time."""
    size, used = status("VmSize"), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The most memory begins anew.
    before = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_: Any) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, before[1]))
    try:
        yield
        assert status("VmHWM") - used < MEMORY
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def refusal(read: Callable[[], Any]) -> str:
    """The line of an error, or nothing where the file was read."""
    with limits():
        try:
            read()
        except UserError as error:
            line = str(error)
            assert line.isprintable() and len(line) <= LONGEST
            assert "MemoryError" not in line and "allocate" not in line, line
            return line
    return ""


# Formats, each with a small file and what reads it


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def npz(**changes: Any) -> bytes:
    file = io.BytesIO()
    part: dict[str, Any] = {"train_images": pixels(6, 4, 4, 3), "train_labels": np.arange(6) % 3}
    part |= {"test_images": pixels(3, 4, 4, 3), "test_labels": np.arange(3), "class_names": np.array(["a", "b", "c"])}
    np.savez_compressed(file, **{**part, "flip": True, "normalization": "cifar10", **changes})
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(12.0).reshape(2, 2, 3))
    return file.getvalue()


def tensors() -> dict[str, np.ndarray]:
    return {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, np.float32)}


@functools.cache
def pt(zipped: bool) -> bytes:
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    state = {name: torch.tensor(value) for name, value in tensors().items()}
    torch.save({"model": state, "indices": np.arange(4)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def safetensors() -> bytes:
    from safetensors.numpy import save

    return save(tensors(), {"format": "pt"})


@functools.cache
def model_folder() -> tuple[Any, Any]:
    classifier = build_classifier("small_cnn", 3, width=2)
    return classifier, classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))


def msgpack() -> bytes:
    from flax.serialization import to_bytes

    return to_bytes(model_folder()[1])


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(4, 4, 3)).save(file, "PNG")
    return file.getvalue()


def batch() -> bytes:
    return pickle.dumps({b"data": pixels(2, 3072), b"labels": [0, 1]}, 2)


def tar(first: bytes | None = None) -> bytes:
    """An archive of CIFAR-10, with these bytes as its first batch."""
    parts = {name: batch() for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")}
    parts["batches.meta"] = pickle.dumps({b"label_names": [b"a", b"b"]}, 2)
    parts["data_batch_1"] = first or batch()
    return tar_of({f"cifar-10-batches-py/{name}": content for name, content in parts.items()})


def pickle_of_pt() -> bytes:
    with zipfile.ZipFile(io.BytesIO(pt(True))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def pt_with(content: bytes) -> bytes:
    """A file of PyTorch's whose pickle is this."""
    with zipfile.ZipFile(io.BytesIO(pt(True))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return zip_of({name: content if name.endswith("/data.pkl") else file for name, file in files.items()})


def tar_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zip_of(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tiny_imagenet() -> bytes:
    image = io.BytesIO()
    Image.fromarray(pixels(64, 64, 3)).save(image, "JPEG")
    files = {"wnids.txt": b"n1\nn2", "val/val_annotations.txt": b"v.JPEG\tn2\t0", "val/images/v.JPEG": image.getvalue()}
    files["train/n1/images/n1_0.JPEG"] = image.getvalue()
    return zip_of({f"tiny-imagenet-200/{name}": content for name, content in files.items()})


def read_official(source: str, path: Path) -> list[Any]:
    spec: Any = DATASETS[source]
    archive = path.parent / spec.archives[0].name
    path.rename(archive)
    return [spec.class_names(path.parent), *spec.examples(path.parent, "train"), *spec.examples(path.parent, "test")]


CONFIG = b"""
name: small
data: {source: digits, train_size: 96}
victim: {epochs: 1, learning_rate: 1e-2}
attacks: [{name: badnets, target: 1}]
defenses: [{name: d3, label: mine, preset: paper}]
"""
ROW = {field: {str: "x", int: 1, dict: {}}.get(kinds[0], 0.5) for field, kinds in RESULT.items()}


def row(**changes: Any) -> bytes:
    return json.dumps({**ROW, **changes}).encode() + b"\n"


def read_torch(path: Path) -> Any:
    state, bounds = torch_files.unwrap(torch_files.read(path), str(path))
    return [torch_files.as_array(value, name, str(path)) for name, value in {**state, **bounds}.items()]


WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "pickle in pt": pt_with,
    "pickle in CIFAR": tar,
    "array in npz": lambda content: zip_of({"train_images.npy": content}),
}
"""What goes around the damaged bytes of a format: checksums of archives would find any damage of the whole."""
FORMATS: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], Any]]] = {
    "pickle in pt": ("a.pt", pickle_of_pt, read_torch),
    "pickle in CIFAR": ("a", batch, lambda path: read_official("tfds:cifar10", path)),
    "array in npz": ("a.npz", npy, lambda path: read_npz(path, "images")),
    "npz": ("a.npz", npz, lambda path: load(str(path))),
    "npy": ("a.npy", npy, read_npy),
    "pt": ("a.pt", lambda: pt(True), read_torch),
    "pt before 1.6": ("a.pt", lambda: pt(False), read_torch),
    "safetensors": ("a.safetensors", safetensors, read_torch),
    "msgpack": ("a.msgpack", msgpack, lambda path: load_model(path, classifier=model_folder()[0])),
    "image": ("0/a.png", png, lambda path: load_labeled(str(path.parent.parent), 1)),
    "GIF": ("0/a.gif", lambda: drawn("GIF"), lambda path: load_labeled(str(path.parent.parent), 1)),
    "CIFAR": ("a", tar, lambda path: read_official("tfds:cifar10", path)),
    "Tiny ImageNet": ("a", tiny_imagenet, lambda path: read_official("tfds:tiny_imagenet", path)),
    "YAML": ("a.yaml", lambda: CONFIG, load_experiment),
    "rows": ("a.jsonl", lambda: row() + row(seed=2), lambda path: read_rows(path, RESULT)),
}


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """The content with a few bytes changed, removed, repeated or moved, or with its end missing."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        at, size = int(generator.integers(len(data) or 1)), int(generator.integers(1, 16))
        kind = generator.integers(6)
        if kind == 0:
            data[at : at + 1] = bytes([generator.integers(256)])
        elif kind == 1:
            data[at : at + size] = generator.bytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size] * int(generator.integers(1, 9))
        elif kind == 4:
            data[at : at + 4] = generator.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"9999"])
        elif generator.integers(4) == 0:
            del data[at:]
    return bytes(data)


def try_damages(name: str, folder: Path, count: int, start: int) -> None:
    file, make, read = FORMATS[name]
    complete, wrap = make(), WRAPPED.get(name, bytes)
    for seed in range(start, start + count):
        inner = folder / str(seed)
        path = inner / file
        path.parent.mkdir(parents=True)
        path.write_bytes(wrap(damaged(complete, np.random.default_rng(seed))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refusal(lambda path=path: read(path))  # type: ignore[misc]


@pytest.mark.parametrize("name", FORMATS)
def test_damage(name: str, tmp_path: Path) -> None:
    try_damages(name, tmp_path, 200, 0)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", FORMATS)
def test_much_damage(name: str, tmp_path: Path) -> None:
    try_damages(name, tmp_path, 2000, 1000)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_complete_is_read(name: str, tmp_path: Path) -> None:
    file, make, read = FORMATS[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(WRAPPED.get(name, bytes)(make()))
    assert not refusal(lambda: read(path))


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.fuzz)])
def test_a_damaged_model_is_refused_or_read(count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder, in which one file is damaged and its digest agrees or not, and a file with a description.

    Where the digest agrees Orbax's threads find the damage; what they would print is not shown.
    """
    import hashlib
    import shutil

    save_model(tmp_path / "model", *model_folder())
    save_model(tmp_path / "model.safetensors", *model_folder())
    complete = (tmp_path / "model.safetensors").read_bytes()
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "model").rglob("*") if path.is_file())
    for seed in range(count):
        generator = np.random.default_rng(seed)
        copy, chosen = tmp_path / str(seed), files[generator.integers(len(files))]
        shutil.copytree(tmp_path / "model", copy / "model")
        content = damaged((copy / chosen).read_bytes(), generator)
        (copy / chosen).write_bytes(content)
        if seed % 2 and chosen.name != DESCRIPTION:
            described = json.loads((copy / "model" / DESCRIPTION).read_text())
            described["files"][chosen.relative_to("model/variables").as_posix()] = hashlib.sha256(content).hexdigest()
            (copy / "model" / DESCRIPTION).write_text(json.dumps(described))
        refusal(lambda copy=copy: load_model(copy / "model"))  # type: ignore[misc]
        (copy / "model.safetensors").write_bytes(damaged(complete, generator))
        refusal(lambda copy=copy: load_model(copy / "model.safetensors"))  # type: ignore[misc]
    assert capfd.readouterr() == ("", "")


# Code and memory


class Called:
    """Calls a function when it is unpickled by `pickle`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def object_array() -> bytes:
    """An array whose type says object, with flags by which NumPy would take its bytes for pointers."""
    dtype = b"cnumpy\ndtype\n(S'O8'\nI00\nI01\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
    return array + dtype + b"I00\nS'AAAAAAAA'\ntb."


@pytest.mark.parametrize("function", [os.system, eval, exec, np.dtype, np.load, getattr, os.unlink])
def test_no_function_is_called(function: Any, tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it was not run"):
        PlainUnpickler(
            pickle.dumps(Called(function, str(tmp_path)), 2).replace(b"numpy\ndtype", b"numpy\nother")
        ).load()


def test_an_array_of_objects_holds_nothing() -> None:
    found = PlainUnpickler(object_array()).load()
    assert isinstance(found, PickledArray)
    with pytest.raises(ValueError, match="no plain numbers"):
        _ = found.array


@pytest.mark.parametrize(
    "code",
    [
        b"cnumpy\ndtype\n.",
        b"(I1\ni__main__\nx\n.",
        b"\x82\x01.",
        b"\x96" + b"\xff" * 8,
        b"r\xff\xff\xff\xff.",
        b"]\x8f.",
    ],
)
def test_other_instructions_are_refused_or_harmless(code: bytes) -> None:
    with limits(), pytest.raises(Exception):  # noqa: B017
        raise ValueError(PlainUnpickler(code).load())


def test_keys_that_take_exponential_time_are_refused() -> None:
    code = b"}(I1\nI2\nt" + b"".join(b"p%d\n0(g%d\ng%d\nt" % (n, n, n) for n in range(60)) + b"I1\ns."
    with limits(), pytest.raises(pickle.UnpicklingError, match="keys other than texts"):
        PlainUnpickler(code).load()


@pytest.mark.parametrize("made", [b"c_codecs\nencode\n(h\x00X\x06\0\0\0latin1tR", b"array"])
def test_one_text_is_not_copied_again_and_again(made: bytes) -> None:
    """A text of 1 MB, and what makes bytes or an array of it 10,000 times."""
    size = 1 << 20
    if made == b"array":
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        made = empty + b"(I1\n(I%d\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nh\x00tb" % size
    text = b"X" + struct.pack("<I", size) + b"a" * size
    with limits(), pytest.raises(pickle.UnpicklingError, match="many copies"):
        PlainUnpickler(text + b"q\x000(" + 10_000 * made + b"l.").load()


def header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


FOREIGN_IMAGES = ("ICO", "ICNS", "EPS", "TGA")


def drawn(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(16, 16, 3)).save(file, kind)
    return file.getvalue()


def gif(width: int, height: int, columns: int, rows: int) -> bytes:
    """A GIF whose frame of any size is cleared afterwards, for which Pillow allocates it."""
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"!\xf9\x04\x08\0\0\0\0"
    return start + b"," + struct.pack("<HHHHB", 0, 0, columns, rows, 0) + b"\x02\x02\x44\x01\0;"


def huge_png(side: int) -> bytes:
    rows = zlib.compress(b"\0" * 100_000, 9)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def strided() -> bytes:
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1).expand(10**6, 10**4)}, file)
    return file.getvalue()


def other_tensor(kind: str) -> bytes:
    """A file of weights, one of which is not stored as plain numbers."""
    torch = pytest.importorskip("torch")
    makers: dict[str, Callable[[], Any]] = {
        "meta": lambda: torch.zeros(3, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
        "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    }
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Quantized tensors are deprecated.
        torch.save({"a": makers[kind]()}, file)
    return file.getvalue()


def shared_shape() -> bytes:
    """A file of weights with a shape of nested tuples that share their parts: written out, it has 2 ** 60 entries."""
    nested = b"(I1\nI2\nt" + b"".join(b"p%d\n0(g%d\ng%d\nt" % (n, n, n) for n in range(60))
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuI1\ntQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I0\n" + nested + b"(tI00\nNtR"
    return zip_of({"a/data.pkl": b"\x80\x02}X\x01\0\0\0a" + tensor + b"s.", "a/data/0": bytes(4)})


def msgpack_of(tree: Any) -> bytes:
    from flax.serialization import msgpack_serialize

    return msgpack_serialize(tree)


def encrypted() -> bytes:
    """An archive whose members say that they are encrypted."""
    content = bytearray(npz())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + at] |= 1
    return bytes(content)


def tensor_header(entry: dict[str, Any]) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text


def labels_npz(largest: int) -> bytes:
    file = io.BytesIO()
    images, labels = pixels(2, 4, 4, 3), np.array([0, largest])
    np.savez(file, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return file.getvalue()


ZEROS = bytes(200 << 20)
HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "deflated npz": ("npz", lambda: zip_of({"images.npy": header((200 << 20,)) + ZEROS}), "at most 67.1 MB are read"),
    "shape beyond the file": ("npz", lambda: zip_of({"train_images.npy": header((10**12,))}), "holds 0"),
    "objects": ("npz", lambda: zip_of({"a.npy": header((1,), "|O") + b"A" * 8}), "expected plain numbers"),
    "unclosed header": ("npz", lambda: zip_of({"a.npy": header((1,)).replace(b")", b" ")}), "plain .npz"),
    "npy version": ("npy", lambda: npy().replace(b"NUMPY\x01", b"NUMPY\x09"), "no plain numbers"),
    "largest label": ("npz", lambda: labels_npz(2**31 - 1), "classes"),
    "label of 2^62": ("npz", lambda: labels_npz(2**62), "classes"),
    "stride 0": ("pt", strided, "40000.0 MB"),
    "shape that shares parts": ("pt", shared_shape, "(tuple, tuple) is no shape"),
    **{
        f"{kind} tensor": ("pt", functools.partial(other_tensor, kind), expected)
        for kind, expected in {
            "meta": "without values (meta)",
            "quantized": "tensors that are quantized",
            "sparse": "tensors that are sparse",
            "conjugate": "tensors that are complex",
            "negated": "resolve_neg() first",
        }.items()
    },
    "encrypted npz": ("npz", encrypted, "plain .npz"),
    "npz in bzip2": ("npz", lambda: zip_of({"a.npy": npy()}, zipfile.ZIP_BZIP2), "method 12, expected deflate"),
    "npz in LZMA": ("npz", lambda: zip_of({"a.npy": npy()}, zipfile.ZIP_LZMA), "method 14, expected deflate"),
    "pt in LZMA": ("pt", lambda: zip_of({"a/data.pkl": b"N."}, zipfile.ZIP_LZMA), "method 14, expected deflate"),
    "flip in text": ("npz", lambda: npz(flip="no"), "flip is <U2 of shape (), expected True or False"),
    "normalization 3": ("npz", lambda: npz(normalization=3), "normalization is int64 of shape (), expected a name"),
    **{
        f"msgpack of {name}": ("msgpack", lambda tree=tree: msgpack_of(tree), "a.msgpack")  # type: ignore[misc]
        for name, tree in {
            "a list": {"params": [1]},
            "None": {"params": None},
            "no array": {"params": {"a": None}},
        }.items()
    },
    "npz in method 99": ("npz", lambda: npz().replace(b"\x08\x00", b"\x63\x00"), "plain .npz"),
    "deflated pt": ("pt", lambda: zip_of({"a/data.pkl": ZEROS}), "at most 67.1 MB are read"),
    "hidden axis": (
        "safetensors",
        lambda: tensor_header({"dtype": "F32", "shape": [1, 10**9, 0], "data_offsets": [0, 0]}),
        "4000.0 MB",
    ),
    "float8": ("safetensors", lambda: tensor_header({"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}), "F8"),
    "rank 100": (
        "safetensors",
        lambda: tensor_header({"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}),
        "shape",
    ),
    "GIF of 100 megapixels": ("GIF", lambda: gif(10_000, 10_000, 1, 1), "400.0 MB"),
    "frame beyond its GIF": ("GIF", lambda: gif(4, 4, 65_535, 65_535), "reaches beyond the image"),
    "GIF that ends in a block": ("GIF", lambda: drawn("GIF")[:-3], "it ends within a block"),
    "GIF without frames": ("GIF", lambda: drawn("GIF")[:13] + bytes(768) + b";", "it has no frame"),
    "169 megapixels": ("image", lambda: huge_png(13_000), "676.0 MB"),
    **{f"{kind} named PNG": ("image", partial(drawn, kind), "cannot identify") for kind in FOREIGN_IMAGES},
    "tar of zeros": ("CIFAR", lambda: tar_of({"cifar-10-batches-py/batches.meta": ZEROS}), "at most 67.1 MB are read"),
    "long": ("YAML", lambda: b"#" * (1 << 18), "262144 bytes, at most 131072 are read"),
    "references": ("YAML", lambda: b"a: &a [x, x]\nb: [*a, *a]", r"references"),
    "nesting": ("YAML", lambda: b"[" * 5000, "32 levels"),
    "date": ("YAML", lambda: b"name: 2026-99-99", "not YAML"),
    "digits": ("YAML", lambda: b"name: " + b"9" * 10_000, "not YAML"),
    "hexadecimal": ("YAML", lambda: b"{victim: {epochs: 0x" + b"f" * 100_000 + b"}}", "a number has 100002 digits"),
    "tagged": ("YAML", lambda: b"name: !!int abc", "not YAML"),
    "no row": ("rows", lambda: b"5\n", "line 1"),
    "list": ("rows", lambda: b"[1]\n", "line 1"),
    "empty row": ("rows", lambda: b"{}\n", "line 1"),
    "row twice": ("rows", lambda: row() + row(seed=2) + row(acc=0.4), "line 3 repeats the row of x x 1 x; remove it"),
    "no analyses": ("rows", lambda: row(analyses=5), "line 1 is no row of an experiment (analyses)"),
    "NaN in a row": ("rows", lambda: row(acc=float("nan"), asr=1.5), "line 1 is no row of an experiment (acc, asr)"),
    "a share in text": ("rows", lambda: row(clean_ratio="x", poison_rate=7), "(clean_ratio, poison_rate)"),
    "no success": ("rows", lambda: row(asr=None), "line 1 is no row of an experiment (asr)"),
    "success of nothing": ("rows", lambda: row(attack="none"), "line 1 is no row of an experiment (asr, ra, der)"),
    "perhaps changed": (
        "rows",
        lambda: row(info={"changed": "maybe"}),
        "line 1 is no row of an experiment (info.changed)",
    ),
    "not UTF-8": ("rows", lambda: b"\xff\n", "line 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_asks_for_much_or_holds_nonsense_is_refused(name: str, tmp_path: Path) -> None:
    kind, make, expected = HOSTILE[name]
    file, _, read = FORMATS[kind]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make())
    assert expected in refusal(lambda: read(path))


@pytest.mark.parametrize("name", ["npz", "npy", "pt", "safetensors", "YAML", "rows"])
@pytest.mark.parametrize("what", ["pipe", "device", "folder", "nothing", "NUL", "5,000 characters"])
def test_only_regular_files_are_read(name: str, what: str, tmp_path: Path) -> None:
    file, _, read = FORMATS[name]
    path = tmp_path / file
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "NUL":
        path = Path(f"{tmp_path}/a\0{path.suffix}")
    elif what == "5,000 characters":
        path = tmp_path / ("a" * 5000 + path.suffix)
    line = refusal(lambda: read(path))
    assert line or (name == "rows" and what in ("nothing", "NUL", "5,000 characters"))


def test_names_of_classes_do_not_write_to_the_terminal(tmp_path: Path) -> None:
    names = np.array(["\x1b]0;title\x07", "a\nb", "c" * 10_000])
    for name, given in (("a.npz", names), ("b.npz", np.array("a"))):
        np.savez(tmp_path / name, images=pixels(3, 4, 4, 3), labels=np.arange(3), class_names=given)
    for number, name in enumerate(names[:2]):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(pixels(4, 4, 3)).save(tmp_path / "images" / name / f"{number}\x1b[31m.png")
    found = load_labeled(str(tmp_path / "a.npz"), 3).class_names or ()
    folder = load_labeled(str(tmp_path / "images"), 2)
    for name in (*found, *(folder.class_names or ()), *(folder.files or ())):
        assert name.isprintable() and len(name) <= LONGEST
    assert "has 1 class_names, the model 3" in refusal(lambda: load_labeled(str(tmp_path / "b.npz"), 3))


def test_names_inside_files_are_escaped_and_shortened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"\x1b[31m\n" + "x" * 400: entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    assert r"\x1b[31m\n" in refusal(lambda: load_torch(path, "resnet18"))
    path.write_bytes(struct.pack("<Q", len(text) + 10**6) + text.replace(b"x", b"x" * 2500) + b"\0" * 4)
    assert refusal(lambda: load_torch(path, "resnet18"))


@pytest.mark.parametrize("names", [["params", "params/a"], ["/".join("a" * 100)], ["params/a", "params/a/b"]])
def test_names_that_make_no_tree_are_refused(names: list[str], tmp_path: Path) -> None:
    from safetensors.numpy import load, save

    save_model(tmp_path / "model.safetensors", *model_folder())
    arrays = load((tmp_path / "model.safetensors").read_bytes())
    metadata, _ = read_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "b.safetensors").write_bytes(save({**arrays, **{name: np.ones(1) for name in names}}, metadata))
    assert "b.safetensors" in refusal(lambda: load_model(tmp_path / "b.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**9},
        {"classes": 10**9},
        {"std": [1e400, 1, 1]},
        {"mean": [10**400, 0, 0]},
        {"arrays": {"params/a": ["float32", [10**12]]}},
        {"arrays": {"params/a": ["float32", [1, -1]]}},
        {"arrays": {"params/a": ["object", [1]]}},
        {"options": {"stem": []}},
        {"model": ["small_cnn"]},
        {"files": {"a": 1}},
    ],
)
def test_a_description_is_checked_before_anything_is_built(changes: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path / "model", *model_folder())
    file = tmp_path / "model" / DESCRIPTION
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert str(tmp_path / "model") in refusal(lambda: load_model(tmp_path / "model"))


@pytest.mark.parametrize("what", ["pipe", "device", "folder elsewhere"])
def test_a_model_folder_holds_files_only(what: str, tmp_path: Path) -> None:
    """Whose description says nothing of it: Orbax would wait for the pipe, and read the folder without its digests."""
    save_model(tmp_path / "model", *model_folder())
    file, inner = tmp_path / "model" / DESCRIPTION, tmp_path / "model" / "variables"
    name = "d" if what == "folder elsewhere" else "_METADATA"
    (inner / name).rename(tmp_path / name)
    if what == "pipe":
        os.mkfifo(inner / name)
    else:
        (inner / name).symlink_to("/dev/zero" if what == "device" else tmp_path / name)
    described = json.loads(file.read_text())
    described["files"] = {path: digest for path, digest in described["files"].items() if not path.startswith(name)}
    file.write_text(json.dumps(described))
    assert f"variables/{name}: is a" in refusal(lambda: load_model(tmp_path / "model")).replace("is not a", "is a")


def test_a_chunk_much_larger_than_its_array_is_refused(tmp_path: Path) -> None:
    """A chunk of 128 MiB, compressed to a few KB, of which the array has two numbers."""
    import hashlib

    import tensorstore

    save_model(tmp_path / "model", *model_folder())
    file, inner = tmp_path / "model" / DESCRIPTION, tmp_path / "model" / "variables"
    stored: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{inner}/"}
    array = "batch_stats.bn0.mean/"
    files = tensorstore.KvStore.open(stored).result()
    described = {**json.loads(files.read(f"{array}.zarray").result().value), "chunks": [1 << 25]}
    files.delete_range(tensorstore.KvStore.KeyRange(array, f"{array}~"))
    files.write(f"{array}.zarray", json.dumps(described).encode()).result()
    opened = tensorstore.open({"driver": "zarr", "kvstore": {**stored, "path": array}}, open=True).result()
    opened.write(np.ones(2, np.float32)).result()
    digests = {path.relative_to(inner).as_posix(): path.read_bytes() for path in inner.rglob("*") if path.is_file()}
    files_of = {name: hashlib.sha256(content).hexdigest() for name, content in digests.items()}
    file.write_text(json.dumps({**json.loads(file.read_text()), "files": files_of}))
    assert "declares 134.2 MB of contents in a file of" in refusal(lambda: load_model(tmp_path / "model"))


@pytest.mark.parametrize("size", [(10**5, 10**5), (0, 4), (4, -1)])
def test_images_are_resized_only_to_what_fits_into_memory(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "images" / "0").mkdir(parents=True)
    for number in range(9):
        (tmp_path / "images" / "0" / f"{number}.png").write_bytes(png())
    np.savez(tmp_path / "a.npz", images=pixels(9, 4, 4, 3), labels=np.zeros(9, int))
    for source in ("images", "a.npz"):
        line = refusal(lambda source=source: load_labeled(str(tmp_path / source), 1, size=size))  # type: ignore[misc]
        assert "9 images of 100000x100000: needs 540.0 GB of memory" in line or "greater than or equal to 1" in line
    assert refusal(lambda: load(str(tmp_path / "images"), image_size=min(size)))


def test_a_model_of_four_channels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.png").write_bytes(png())
    assert "images of 4 channels, expected 1 or 3" in refusal(lambda: load_labeled(str(tmp_path), 1, 4))


def test_an_archive_that_is_not_official_is_named(tmp_path: Path) -> None:
    archive = DATASETS["tfds:cifar10"].archives[0]  # type: ignore[attr-defined]
    (tmp_path / archive.name).write_bytes(tar())
    with pytest.warns(UserWarning, match=rf"{archive.name} is not the official archive \(its MD5 is [0-9a-f]{{32}}, "):
        archive.warn_unless_official(tmp_path)
    found = dataclasses.replace(archive, md5="0" * 32)
    with pytest.warns(UserWarning, match="published is 0000"):
        found.warn_unless_official(tmp_path)


def test_a_budget_lets_real_files_through(tmp_path: Path) -> None:
    """Images of one color, which deflate stores in a thousandth."""
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((5000, 32, 32, 3), np.uint8))
    start = time.monotonic()
    assert read_npz(tmp_path / "a.npz", "images")["images"].shape == (5000, 32, 32, 3)
    assert time.monotonic() - start < SECONDS
