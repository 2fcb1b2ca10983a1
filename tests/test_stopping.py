"""Commands that are stopped, killed, run twice, or have nowhere to write to; kills only with ``-m fuzz``."""

import contextlib
import errno
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from backdoor_jax import cli, load_model, stopping
from backdoor_jax.cli.command import COMMANDS
from backdoor_jax.errors import UserError
from backdoor_jax.experiment import read_rows, rows, runner
from backdoor_jax.files import beside, is_leftover
from backdoor_jax.interop import checkpoints
from backdoor_jax.stopping import Stopped, stop_if_asked, stopping_at_safe_points

CONFIG = """
name: tiny
data: {source: digits, train_size: 96, test_size: 48}
model: {name: small_cnn, width: 2}
attacks: [{name: badnets}]
defenses: [{name: clp}]
victim: {epochs: 2, batch_size: 32}
clean_ratio: 0.5
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def run(config: Path, out: Path, *settings: str) -> int:
    return cli.main(["run", str(config), "--out", str(out), *settings])


def reproducible(out: Path) -> list[tuple[Any, ...]]:
    """The rates of all rows, and the bits of the models they are of."""
    found = read_rows(out / "results.jsonl")
    bits = {}
    for folder in {(row["attack"], row["seed"]) for row in found}:
        _, variables = load_model(out / "victims" / "{}-{}".format(*folder))
        bits[folder] = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(variables)))
    return sorted(
        (
            row["seed"],
            row["attack"],
            row["defense"],
            row["acc"],
            str(row["asr"]),
            bits[row["attack"], row["seed"]].hexdigest(),
        )
        for row in found
    )


def leftovers(out: Path) -> list[str]:
    return [
        path.name
        for path in out.rglob("*")
        if is_leftover(path) or path.suffix == ".lock" or checkpoints.UNFINISHED in path.name
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(CONFIG)
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(folder / "tiny.yaml", folder / "out") == 0
    return folder / "out"


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_the_row_and_the_run_resumes(
    number: int,
    code: int,
    config: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def append(path: Path, row: Any) -> None:
        rows.append_row(path, row)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "append_row", append)
        assert run(config, out) == code
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "stopping at the next safe point" in error
    assert len(read_rows(out / "results.jsonl")) == 1 and not leftovers(out)
    assert run(config, out) == 0
    assert reproducible(out) == reproducible(finished)
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_a_signal_without_a_safe_point_counts_at_the_end() -> None:
    with pytest.raises(Stopped) as caught, stopping_at_safe_points():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert caught.value.code == 143
    stop_if_asked()


def test_without_the_command_nothing_is_installed() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


TWICE = """
import os, runpy, signal, sys, time
with runpy.run_path(sys.argv[1])["stopping_at_safe_points"]():  # Without the import of the package.
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    time.sleep(60)
"""


def test_a_second_signal_ends_it_at_once() -> None:
    arguments = [sys.executable, "-c", TWICE, str(stopping.__file__)]
    assert subprocess.run(arguments, timeout=60, stderr=subprocess.DEVNULL).returncode == 130


IMPORTING = """
import os, sys

class Sending:
    def find_spec(self, name, *_):
        if name == "jax":
            os.kill(os.getpid(), int(sys.argv[1]))

sys.meta_path.insert(0, Sending())
from backdoor_jax_command import main
sys.exit(main())
"""


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_during_the_import_is_one_line(number: int, code: int, name: str) -> None:
    arguments = [sys.executable, "-c", IMPORTING, str(int(number))]
    done = subprocess.run(arguments, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, f"backdoor-jax: stopped by {name}\n")


# Output and the system


def raising(error: BaseException) -> Callable[..., None]:
    def run(*_: Any, **__: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/results.jsonl"), 2, "out/results.jsonl: No space left"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "Read-only file system"),
        (OSError(errno.EFBIG, "File too large"), 2, "File too large"),
        (RuntimeError("something\nunexpected"), 1, "RuntimeError: something; this is a bug, please report it with /"),
        (RecursionError(), 1, "RecursionError: RecursionError"),
        (UserError("x" * 10_000), 2, "xxx...xxx"),
    ],
)
def test_every_error_is_one_line(
    error: Exception, code: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "list", raising(error))
    assert cli.main(["list"]) == code
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1 and len(line) <= 501
    if code == 1:
        log = Path(line.rpartition("with ")[2].strip())
        assert "Traceback" in log.read_text()
        log.unlink()


@pytest.mark.parametrize("kind", ["closed", "ascii"])
def test_results_are_saved_whoever_reads_the_output(
    kind: str, config: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe whose reader is gone, and a locale that has no plus-minus sign."""
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(os.fdopen(writer, "wb"), "ascii", line_buffering=True)
    if kind == "closed":
        os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert run(config, tmp_path / "out", "seeds=[0]") == 0
    stream.close()
    assert reproducible(tmp_path / "out") == reproducible(finished)
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("arguments", [["list"], [], ["--help"], ["scan", "--help"], ["--print-completion", "bash"]])
def test_output_that_cannot_be_written_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert "the output could not be printed ([Errno 28] No space left on device)" in line and line.count("\n") == 1


def test_closed_streams_are_never_files_of_the_run(tmp_path: Path) -> None:
    code = (
        "import os; from backdoor_jax_command import prepare; prepare();"
        "files = [os.open(f'{number}', os.O_CREAT) for number in range(3)]; os._exit(min(files))"
    )
    command = f'exec "{sys.executable}" -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=False).returncode >= 3


def test_an_error_without_room_for_its_log_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "list", raising(RuntimeError("unexpected")))
    monkeypatch.setattr("tempfile.NamedTemporaryFile", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert cli.main(["list"]) == 1
    line = capsys.readouterr().err
    assert "RuntimeError: unexpected" in line and line.count("\n") == 1


@pytest.mark.parametrize("size", [100, 2000])
def test_a_limit_of_file_sizes_is_one_line_and_the_run_resumes(
    size: int, config: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `ulimit -f` sets it: writing beyond it fails in Python and in Orbax's threads."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        code = run(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capfd.readouterr().err
    assert code == 2 and error.startswith("backdoor-jax: ") and error.count("\n") == 1, error
    assert run(config, tmp_path / "out") == 0
    assert reproducible(tmp_path / "out") == reproducible(finished) and not leftovers(tmp_path / "out")


# Folders


def test_a_folder_that_is_in_use_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From within a run: another with the same seed is refused, one with another seed shares the folder."""
    out = tmp_path / "out"
    codes: list[int] = []

    def append(path: Path, row: Any) -> None:
        rows.append_row(path, row)
        if not codes:
            codes.append(run(config, out))
            codes.append(run(config, out, "seeds=[1]"))

    monkeypatch.setattr(runner, "append_row", append)
    assert run(config, out) == 0
    assert codes == [2, 0]
    assert f"out is in use by process {os.getpid()} (seed 0); wait for it" in capsys.readouterr().err
    found = reproducible(out)
    assert len(found) == len(set(found)) == 8
    assert json.loads((out / "experiment.json").read_text())["seeds"] == [0, 1]


def test_a_run_killed_before_its_first_file_was_complete_resumes(config: Path, finished: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    out = tmp_path / "out"
    out.mkdir()
    beside(out / "experiment.json", "partial", ".json", process.pid).write_text("{")
    (out / ".seed-0.lock").write_text(str(process.pid))
    assert run(config, out) == 0
    assert reproducible(out) == reproducible(finished) and not leftovers(out)


DAMAGES: dict[str, tuple[str, bytes]] = {
    "experiment of other types": ("experiment.json", b'{"name": "tiny", "seeds": 3}'),
    "experiment of a list": ("experiment.json", b"[]"),
    "experiment with deep lists": ("experiment.json", b"[" * 100_000),
    "empty times": ("victims/badnets-0/timing.json", b""),
    "times of other types": ("victims/badnets-0/timing.json", b'{"seconds": "x", "compile_seconds": 1, "info": {}}'),
    "example": ("examples/badnets.npz", b"PK"),
    "rows": ("results.jsonl", b'{"attack": 3}\n'),
    "binary rows": ("results.jsonl", b"\xff\xfe\n"),
    "description": ("victims/badnets-0/model.json", b"[]"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_one_line_or_made_again(
    case: str, config: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    name, content = DAMAGES[case]
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "results.jsonl").unlink()
    (out / name).write_bytes(content)
    code = run(config, out)
    error = capsys.readouterr().err
    assert code == 0 or (code == 2 and error.count("\n") == 1 and len(error) <= 501), error
    assert code == 2 or reproducible(out) == reproducible(finished)


def test_a_damaged_training_checkpoint_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("backdoor_jax.experiment.victims.save_model", raising(OSError(errno.ENOSPC, "No space left")))
        assert run(config, out) == 2
    saved = [path for path in (out / "victims/badnets-0/training").rglob("*") if path.parent.name == "d"]
    for path in saved:
        path.write_bytes(b"x" * path.stat().st_size)
    capsys.readouterr()
    assert saved and run(config, out) == 2
    error = capsys.readouterr().err
    assert "the checkpoint of step 2 is damaged" in error and error.count("\n") == 1


# Kills

SCRIPT = """
import os, signal, sys
from pathlib import Path
from backdoor_jax import cli, files
from backdoor_jax.interop import checkpoints

at, count = sys.argv[1], int(sys.argv[2])

def killing(function):
    def call(*arguments, **named):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

if at == "replace":
    os.replace = killing(os.replace)
elif at == "append":
    from backdoor_jax.experiment import runner
    runner.append_row = killing(runner.append_row)
elif at == "checkpoint":
    checkpoints.Checkpoints.save = killing(checkpoints.Checkpoints.save)
elif at == "tree":
    from backdoor_jax.interop import native
    native.save_tree = killing(native.save_tree)
sys.exit(cli.main(sys.argv[3:]))
"""


def start(config: Path, out: Path, at: str = "", count: int = 0, *settings: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", SCRIPT, at, str(count), "run", str(config), "--out", str(out), *settings]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


AIMED = [("replace", 1), ("tree", 0), ("checkpoint", 1), ("append", 1), ("replace", 0), ("replace", 2), ("replace", 3)]


@pytest.mark.fuzz
@pytest.mark.parametrize(("at", "count"), AIMED)
def test_a_kill_at_a_write_is_resumed(at: str, count: int, config: Path, finished: Path, tmp_path: Path) -> None:
    process = start(config, tmp_path / "out", at, count)
    assert process.wait(120) == -signal.SIGKILL
    assert run(config, tmp_path / "out") == 0
    assert reproducible(tmp_path / "out") == reproducible(finished)
    assert not leftovers(tmp_path / "out")


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment_is_resumed(seed: int, config: Path, finished: Path, tmp_path: Path) -> None:
    process = start(config, tmp_path / "out")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(np.random.default_rng(seed).uniform(3, 15))
    process.kill()
    process.wait()
    assert run(config, tmp_path / "out") == 0
    assert reproducible(tmp_path / "out") == reproducible(finished)
    assert not leftovers(tmp_path / "out")


@pytest.mark.fuzz
@pytest.mark.parametrize("seeds", [[0, 0], [0, 1], [0, 0, 1, 1], [0, 1, 2, 3]])
def test_runs_at_once_end_in_unique_rows_or_a_refusal(seeds: list[int], config: Path, tmp_path: Path) -> None:
    processes = [start(config, tmp_path / "out", "", 0, f"seeds=[{seed}]") for seed in seeds]
    codes = []
    for process in processes:
        _, error = process.communicate(timeout=300)
        codes.append(process.returncode)
        assert process.returncode == 0 or b"in use by process" in error, error
    assert codes.count(0) >= len(set(seeds))
    found = reproducible(tmp_path / "out")
    assert len(found) == len({row[:3] for row in found}) == 4 * len(set(seeds))
    assert not leftovers(tmp_path / "out")


# The environment


@pytest.mark.fuzz
def test_strict_settings_of_jax_a_c_locale_and_a_cache_that_cannot_be_written_are_no_obstacle(
    config: Path, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file, where a folder is needed")
    environment = {
        **os.environ,
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_TRANSFER_GUARD": "disallow",
        "JAX_DISABLE_JIT": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "backdoor_jax.cli", "run", str(config), "--out", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 4


CACHED = """
import jax
from backdoor_jax.cli import command
command._set_up_jax(distributes=False)
assert jax.config.jax_compilation_cache_dir == "/proc/backdoor_jax/programs"
print(jax.jit(lambda x: x + 1)(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
def test_a_cache_folder_that_cannot_be_written_is_not_noticed() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    arguments, environment["XDG_CACHE_HOME"] = [sys.executable, "-c", CACHED], "/proc"
    done = subprocess.run(arguments, env=environment, timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
