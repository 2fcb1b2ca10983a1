"""The command line: exit codes, one line on stderr for what users can fix, and the files that a run writes."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from backdoor_jax.attacks import ATTACKS
from backdoor_jax.cli import main
from backdoor_jax.cli.command import COMMANDS
from backdoor_jax.data import SOURCES
from backdoor_jax.defenses import DEFENSES
from backdoor_jax.experiment import read_rows
from backdoor_jax.models import MODELS

CONFIG = """
name: tiny
data: {source: digits, train_size: 96, test_size: 48}
model: {name: small_cnn, width: 2}
victim: {epochs: 1}
clean_ratio: 0.5
attacks: [{name: badnets}]
defenses: [{name: finetune, steps: 1}]
"""


class Run(NamedTuple):
    config: Path
    out: Path
    code: int
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, with settings changed on the command line."""
    folder = tmp_path_factory.mktemp("cli")
    config, out = folder / "tiny.yaml", folder / "out"
    config.write_text(CONFIG)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["run", str(config), "--out", str(out), "name=renamed", "victim.learning_rate=1e-3", "seeds=[3]"])
    return Run(config, out, code, output.getvalue())


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a command that must exit with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert error.startswith("backdoor-jax: ")
    return error


def test_a_run_writes_rows_and_a_page(finished: Run) -> None:
    assert finished.code == 0
    rows = read_rows(finished.out / "results.jsonl")
    assert [(row["attack"], row["defense"]) for row in rows] == [
        ("badnets", "none"),
        ("badnets", "finetune"),
        ("none", "none"),
        ("none", "finetune"),
    ]
    page = (finished.out / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "renamed" in page


def test_overrides_reach_the_rows(finished: Run) -> None:
    for row in read_rows(finished.out / "results.jsonl"):
        assert (row["experiment"], row["seed"]) == ("renamed", 3)
        if row["defense"] == "none":
            assert row["config"]["victim"]["learning_rate"] == 0.001


def test_a_run_prints_each_row_the_table_and_the_path_of_the_page(finished: Run) -> None:
    lines = finished.output.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["badnets-3", "none"],
        ["badnets-3", "finetune"],
        ["none-3", "none"],
        ["none-3", "finetune"],
    ]
    assert str(finished.out / "report.html") in lines[-1]


def test_the_default_output_folder_is_named_after_the_file(
    finished: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(finished.config), "defenses=[]"]) == 0
    assert {path.name for path in (tmp_path / "runs" / "tiny").iterdir()} >= {"results.jsonl", "report.html"}


def test_a_complete_experiment_run_again_prints_only_the_table(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished.out / "results.jsonl").read_bytes()
    arguments = ["run", str(finished.config), "name=renamed", "--out", str(finished.out), "victim.learning_rate=0.001"]
    assert main([*arguments, "seeds=[3]"]) == 0
    output = capsys.readouterr().out
    assert "badnets-3" not in output
    assert "finetune" in output
    assert (finished.out / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_a_run_prints_its_result_only_where_it_is_asked_to(
    finished: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str
) -> None:
    arguments = ["run", str(finished.config), "--out", str(tmp_path / "out"), "defenses=[]", option]
    assert main(arguments) == 0
    output, error = capsys.readouterr()
    assert "badnets-0" not in output
    assert not error
    if option == "--json":
        found = json.loads(output)
        assert found["answer"][0].startswith("2 of 2 models do not count: near chance")
        assert [(result["attack"], result["defense"]) for result in found["results"]] == [
            ("badnets", "none"),
            ("none", "none"),
        ]
        assert found["page"] == str(tmp_path / "out" / "report.html")
    else:
        assert "What each defense did" in output


def test_without_arguments_the_command_says_what_to_do_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"backdoor-jax {command}" in printed for command in ("demo", "scan", "defend", "list"))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_script_knows_commands_and_options(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("demo", "defend", "--checkpoint", "--detector"))


def test_list_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["defenses"].keys() == DEFENSES.keys()
    assert "signs" in found["data"]


def test_notes_of_libraries_do_not_reach_the_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(parsed: object) -> None:
        logging.getLogger("absl").warning("a note of Orbax")
        warnings.warn_explicit("a note of Flax", UserWarning, "x.py", 1, module="flax.core")

    monkeypatch.setitem(COMMANDS, "list", noisy)
    assert main(["list"]) == 0
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nowhere.yaml: no such file" in error_of(capsys, "run", tmp_path / "nowhere.yaml")


def test_missing_data_is_one_line(finished: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = error_of(capsys, "run", finished.config, "--out", tmp_path / "out", "data={source: nowhere.npz}")
    assert "nowhere.npz: no such file" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("color=red", "unknown key 'color'"),
        ("victim.epochs=many", "victim.epochs"),
        ("clean_ratio=2", "clean_ratio is 2, expected a value less than or equal to 1"),
        ("seeds=[0", "seeds=[0"),
    ],
)
def test_an_invalid_setting_is_one_line(
    finished: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, named: str
) -> None:
    assert named in error_of(capsys, "run", finished.config, "--out", tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_experiment_is_refused_in_one_line(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    assert "holds another experiment (name" in error_of(capsys, "run", finished.config, "--out", finished.out)
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")} == before


def test_a_folder_that_cannot_be_created_is_one_line(
    finished: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert "file" in error_of(capsys, "run", finished.config, "--out", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "x.yaml", "--bogus"],
        ["run", "x.yaml", "bogus"],
        ["run", "x.yaml", "--epochs=3"],
        ["run", "x.yaml", "\x1b[31m\n" + "x" * 10_000],
        ["defend", "--checkpoint", "x"],
        ["scan", "--checkpoint", "x", "--healthy", "much"],
        ["list", "seeds=[0]"],
        ["demo", "seeds=[0]"],
    ],
)
def test_unknown_arguments_exit_with_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("backdoor-jax: ") and "--help" in error


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["list"]])
def test_every_command_has_a_help_text(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: backdoor-jax" in capsys.readouterr().out


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    for name in (*ATTACKS, *DEFENSES, *MODELS, "digits"):
        assert name in first_words


def test_the_module_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "backdoor_jax"]
    foreign = {**os.environ, "MPLBACKEND": "foo"}
    listed = subprocess.run([*command, "list"], cwd=tmp_path, env=foreign, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in (*ATTACKS, *DEFENSES, *MODELS, *SOURCES))
    refused = subprocess.run([*command, "run", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert (
        refused.stderr == "backdoor-jax: nowhere: no such file; give an experiment in YAML, such as those in configs/\n"
    )


def test_a_closed_stdout_and_a_variable_that_jax_refuses(tmp_path: Path) -> None:
    closed = ["sh", "-c", '"$0" -m backdoor_jax list >&-', sys.executable]
    listed = subprocess.run(closed, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert (listed.returncode, listed.stderr) == (0, "")
    wrong = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "foo"}
    command = [sys.executable, "-m", "backdoor_jax", "list"]
    refused = subprocess.run(command, cwd=tmp_path, env=wrong, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "jax_default_matmul_precision" in refused.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seed", "-1"], "seed is -1, expected 0 to 4294967295"),
        (["--seed", str(2**32)], "seed is 4294967296, expected 0 to 4294967295"),
        (["--data", ""], "data is empty"),
        (["--checkpoint", ""], "checkpoint is empty"),
        (["--out", ""], "out is empty"),
        (["--healthy", "nan"], "healthy is nan, expected 0 to 1"),
        (["--healthy", "70"], "healthy is 70.0, expected 0 to 1"),
        (["--list-images", "0"], "list-images is 0, expected 1 to 1000000"),
        (["--classes", "1"], "classes is 1, expected 2 to 65536"),
    ],
)
def test_an_impossible_option_is_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    text = error_of(capsys, "scan", "--checkpoint", "nowhere.safetensors", "--data", "digits", *options)
    assert expected in text


@pytest.mark.parametrize("drop", ["nan", "inf", "-1", "5"])
def test_a_loss_of_accuracy_is_a_share(capsys: pytest.CaptureFixture[str], drop: str) -> None:
    arguments = ["--checkpoint", "x.pt", "--data", "digits", "--defense", "d3", "--out", "y", f"--max-drop={drop}"]
    assert f"max-drop is {float(drop)}, expected 0 to 1" in error_of(capsys, "defend", *arguments)


@pytest.mark.parametrize(
    ("platform", "words"),
    [("cuda", ["backdoor_jax_command", "run", "nowhere.yaml"]), ("nowhere", ["backdoor_jax.cli", "list"])],
)
def test_an_absent_platform_is_one_line(tmp_path: Path, platform: str, words: list[str]) -> None:
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is a GPU")
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    command = [sys.executable, "-m", *words]
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("backdoor-jax: JAX finds no device")
    assert refused.stderr.count("\n") == 1


def test_rows_are_plain_json_lines(finished: Run) -> None:
    lines = (finished.out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_rows(finished.out / "results.jsonl")


def test_compiled_programs_are_cached_between_runs(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "backdoor_jax.cli", "run", str(config), "defenses=[]", "--out"]
    cached = []
    for out in ("first", "second"):
        process = subprocess.run(
            [*command, str(tmp_path / out)], env=environment, check=True, capture_output=True, text=True
        )
        assert "cache entry" not in process.stderr
        cached.append(sorted(path.name for path in (tmp_path / "cache" / "backdoor_jax").rglob("*-cache")))
    assert any(name.startswith("jit__initialized") for name in cached[0])
    assert len(cached[0]) > 20
    assert cached[0] == cached[1]


def test_a_cache_folder_set_in_jax_is_respected(tmp_path: Path) -> None:
    config: Any = jax.config
    before = config.jax_compilation_cache_dir
    try:
        config.update("jax_compilation_cache_dir", str(tmp_path))
        assert main(["list"]) == 0
        assert config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        config.update("jax_compilation_cache_dir", before)
