"""Files and folders are old or new and never between, whatever killed the process that wrote them."""

import errno
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import matplotlib
import pytest
from matplotlib.figure import Figure

from backdoor_jax import UserError, build_classifier, drawing, load_model, save_model
from backdoor_jax.app.outputs import MODEL_SUFFIXES, require_free
from backdoor_jax.drawing import save_figure
from backdoor_jax.files import (
    atomic_folder,
    atomic_write,
    beside,
    held,
    is_leftover,
    remove_leftovers,
    settle,
    write_text,
)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def contents(path: Path) -> dict[str, str]:
    return {inner.relative_to(path).as_posix(): inner.read_text() for inner in path.rglob("*") if inner.is_file()}


def half_written(at: Path, dead: int) -> None:
    folder(at / "model", a="old", notes="mine")
    folder(beside(at / "model", "partial", process=dead), a="ne")


def moved_away(at: Path, dead: int) -> None:
    folder(beside(at / "model", "old", process=dead), a="old", notes="mine")
    folder(beside(at / "model", "partial", process=dead), a="new")


def replaced(at: Path, dead: int) -> None:
    folder(at / "model", a="new")
    folder(beside(at / "model", "old", process=dead), a="old", notes="mine")


@pytest.mark.parametrize(("state", "text"), [(half_written, "old"), (moved_away, "old"), (replaced, "new")])
@pytest.mark.parametrize("clean", [lambda at: settle(at / "model"), remove_leftovers])
def test_a_folder_is_old_or_new_after_a_kill_at_any_moment(
    state: Callable[[Path, int], None], text: str, clean: Callable[[Path], None], dead: int, tmp_path: Path
) -> None:
    state(tmp_path, dead)
    clean(tmp_path)
    assert contents(tmp_path) == {"model/a": text, "model/notes": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(dead: int, tmp_path: Path) -> None:
    left = beside(tmp_path / "a.txt", "partial", ".txt", dead)
    running = beside(tmp_path / "a.txt", "partial", ".txt")
    other = beside(tmp_path / "b.txt", "partial", ".txt", dead)
    elsewhere = tmp_path / re.sub("jax-[0-9a-f]+", "jax-00000000", left.name)
    typed = [tmp_path / f"a{suffix}.txt" for suffix in (".partial", f".{dead}.partial", ".20240101.old")]
    for path in (left, running, other, elsewhere, *typed):
        path.write_text("")
    assert [is_leftover(path) for path in (left, running, other, elsewhere, *typed)] == [True, False, True] + 4 * [
        False
    ]
    write_text(tmp_path / "a.txt", "new")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.txt", running, other, elsewhere, *typed}


def test_reading_a_model_touches_nothing_that_a_person_may_have_written(dead: int, tmp_path: Path) -> None:
    classifier = build_classifier("small_cnn", 3, width=2)
    variables = classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    save_model(tmp_path / "m.safetensors", classifier, variables)
    (tmp_path / f"m.{dead}.partial.safetensors").write_text("mine")
    folder(tmp_path / "m.safetensors.2023.old", notes="mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    load_model(tmp_path / "m.safetensors")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("host", ["this", "another"])
def test_a_model_whose_replacement_was_interrupted_is_read(host: str, dead: int, tmp_path: Path) -> None:
    classifier = build_classifier("small_cnn", 3, width=2)
    variables = classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    save_model(tmp_path / "model", classifier, variables)
    old = beside(tmp_path / "model", "old", process=dead).name
    (tmp_path / "model").rename(tmp_path / (old if host == "this" else re.sub("jax-[0-9a-f]+", "jax-00000000", old)))
    chex.assert_trees_all_equal(load_model(tmp_path / "model")[1], variables)


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_what_is_written_is_as_accessible_as_the_umask_says(tmp_path: Path) -> None:
    classifier = build_classifier("small_cnn", 3, width=2)
    variables = classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "m.safetensors", classifier, variables)
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


def test_figures_need_no_latex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's matplotlibrc says."""
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    importlib.reload(drawing)
    assert not matplotlib.rcParams["text.usetex"]


def test_a_figure_that_cannot_be_drawn_keeps_the_old_one(tmp_path: Path) -> None:
    class Broken(Figure):
        def savefig(self, fname: Any, **_: Any) -> None:
            Path(fname).write_text("ha")
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.png").write_text("old")
    with pytest.raises(OSError, match="No space"):
        save_figure(Broken(), tmp_path / "a.png")
    assert contents(tmp_path) == {"a.png": "old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_the_old_one_is_there(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    folder(tmp_path / "model", a="old")
    with pytest.raises(error), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise error
    with pytest.raises(error), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("ne")
        raise error
    assert contents(tmp_path) == {"a.txt": "old", "model/a": "old"}


def test_a_folder_that_holds_no_model_stays_itself(tmp_path: Path) -> None:
    """Its owner may work in it, and give its name by mistake."""
    classifier = build_classifier("small_cnn", 3, width=2)
    variables = classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    folder(tmp_path / "home", notes="mine")
    (tmp_path / "home").chmod(0o711)
    before = (tmp_path / "home").stat()
    save_model(tmp_path / "home", classifier, variables)
    after = (tmp_path / "home").stat()
    assert os.path.samestat(before, after) and before.st_mode == after.st_mode
    assert (tmp_path / "home" / "notes").read_text() == "mine"
    chex.assert_trees_all_equal(load_model(tmp_path / "home")[1], variables)
    (tmp_path / "other").mkdir()
    folder(tmp_path / "other" / "variables", notes="mine")
    with pytest.raises(UserError, match="holds variables, which is no model's; give another path"):
        save_model(tmp_path / "other", classifier, variables)
    assert (tmp_path / "other" / "variables" / "notes").read_text() == "mine"


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    classifier = build_classifier("small_cnn", 3, width=2)
    variables = classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    save_model(tmp_path / "far" / "model", classifier, variables)
    (tmp_path / "far" / "model" / "notes").write_text("mine")
    (tmp_path / "model").symlink_to("far/model")
    (tmp_path / "a.txt").symlink_to("far/a.txt")
    save_model(tmp_path / "model", classifier, jax.tree.map(lambda leaf: leaf + 1, variables))
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "far" / "a.txt").read_text() == "new" and (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "model").is_symlink() and (tmp_path / "far" / "model" / "notes").read_text() == "mine"
    found = load_model(tmp_path / "far" / "model")[1]
    chex.assert_trees_all_equal(found, jax.tree.map(lambda leaf: leaf + 1, variables))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "far", "model"]


def test_links_in_a_circle_are_replaced(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).symlink_to(other)
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_folder_without_a_name_is_one_line(path: str) -> None:
    with pytest.raises(UserError, match=r"is a folder that holds no model|cannot be written"):
        require_free(Path(path), True, MODEL_SUFFIXES)


@pytest.mark.parametrize("kind", ["pipe", "circle", "device"])
def test_only_files_and_folders_are_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "circle" else os.devnull)
    with pytest.raises(UserError, match="is neither a file nor a folder; give another --out"):
        require_free(path, True, MODEL_SUFFIXES)


def test_a_full_disk_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = build_classifier("small_cnn", 3, width=2)
    old = classifier.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", classifier, old)
    (tmp_path / "model" / "notes.txt").write_text("mine")

    def full(*_: Any, **__: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
        with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device"):
            save_model(tmp_path / "model", classifier, jax.tree.map(lambda x: x + 1, old))
    chex.assert_trees_all_equal(load_model(tmp_path / "model")[1], old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    save_model(tmp_path / "model", classifier, jax.tree.map(lambda x: x + 1, old))
    chex.assert_trees_all_equal(load_model(tmp_path / "model")[1], jax.tree.map(lambda x: x + 1, old))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


HOLDER = """
import sys, time
from pathlib import Path
from backdoor_jax.files import held
with held(Path(sys.argv[1]), ["seed-0"]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_given_up_when_that_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                UserError, match=rf"is in use by process {holder.pid} \(seed 0\); wait for it, or give other"
            ),
            held(tmp_path, ["seed-1", "seed-0"]),
        ):
            raise AssertionError
        with held(tmp_path, ["seed-1"]):
            pass
    finally:
        holder.kill()
        holder.wait()
    with held(tmp_path, ["seed-0"]):
        assert (tmp_path / ".seed-0.lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_system_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / ("a" * 300)) as temporary:
        temporary.write_text("")
    assert caught.value.errno == errno.ENAMETOOLONG
