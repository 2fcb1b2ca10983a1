"""The code of the documentation runs, and its relative links lead somewhere."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from processes import output_as_user
from torch_networks import torch_preact_resnet18, torchvision_models

from backdoor_jax import load_torch, save_torch
from backdoor_jax.cli.options import make_parser
from backdoor_jax.cli.suspects import parse_normalization, parse_size
from backdoor_jax.config_files import make_defense

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted([*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.md")])]


@pytest.mark.slow
def test_the_examples_of_the_page_on_extending_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(blocks) == 3
    assert printed.strip().endswith("(3, 80)")


@pytest.mark.slow
def test_the_quickstart_prints_what_it_shows(tmp_path: Path) -> None:
    """Words as they are; rates within six points, because versions of JAX round differently."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, shown = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)[0]
    assert code in (DOCS / "quickstart.md").read_text(encoding="utf-8")
    assert shown in (DOCS / "quickstart.md").read_text(encoding="utf-8")
    printed = output_as_user("-c", code, folder=tmp_path)
    number = r"\d\.\d+"
    assert re.sub(number, "0", printed) == re.sub(number, "0", shown)
    rates, expected = ([float(rate) for rate in re.findall(number, part)] for part in (printed, shown))
    assert rates == pytest.approx(expected, abs=0.06)


def test_a_network_of_torchvision_is_repaired_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch modules: pip install 'backdoor_jax[torch]'")
    models = torchvision_models()
    # With one block a stage, compiled in half the time.
    narrow = functools.partial(models.resnet.ResNet, models.resnet.BasicBlock, [1, 1, 1, 1])
    monkeypatch.setattr(models, "resnet18", narrow)
    text = (ROOT / "docs" / "scan_and_repair.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line.strip()]) == 10
    monkeypatch.chdir(tmp_path)
    state = models.resnet18(num_classes=10).state_dict()
    torch.save(state, "suspect.pt")
    rng = np.random.default_rng(0)
    np.savez("clean.npz", images=rng.integers(0, 256, (20, 32, 32, 3), np.uint8), labels=np.arange(20) % 10)
    short = block.replace("Midway()", "Midway(steps=2)")
    assert short != block
    exec(compile(short, "docs/scan_and_repair.md", "exec"), {})
    repaired = torch.load("repaired.pt", weights_only=True)
    assert set(repaired) == set(state)
    assert not torch.equal(repaired["conv1.weight"], state["conv1.weight"])


def test_the_definition_of_preact_resnet18_has_the_names_and_logits_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch modules: pip install 'backdoor_jax[torch]'")
    text = (DOCS / "preact_resnet18.md").read_text(encoding="utf-8")
    define, train, load = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    narrow = train.replace("num_classes=10", "num_classes=10, width=2")
    exec(compile(define + narrow, "docs/preact_resnet18.md", "exec"), names)
    network, images = names["network"], np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    assert set(network.state_dict()) == set(torch_preact_resnet18(torch, 10, 2).state_dict())
    network.eval()
    classifier, variables = load_torch("suspect.pt", "preact_resnet18")
    with torch.no_grad():
        expected = network(torch.tensor(images).permute(0, 3, 1, 2) / 255).numpy()
    np.testing.assert_allclose(classifier.logits(variables, jnp.asarray(images))[0], expected, atol=1e-4)
    save_torch("repaired.pt", classifier, variables)
    exec(compile(load, "docs/preact_resnet18.md", "exec"), names)
    table = text[text.index("| name |") : text.index("A prefix")]
    assert {*re.findall(r"`([a-z][\w.]+\w)`", table)} - {"layer1", "layer3.0", "layer4.0"} <= {*network.state_dict()}


def test_commands_of_the_documentation_have_options_that_exist() -> None:
    for page in PAGES:
        for line in re.findall(r"^backdoor-jax +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            parsed = make_parser().parse_args(shlex.split(line, comments=True))
            parse_normalization(getattr(parsed, "normalize", None))
            parse_size(getattr(parsed, "size", None))
            if hasattr(parsed, "defense"):
                make_defense(parsed.defense, parsed.preset)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if line := re.fullmatch(r"L(\d+)", anchor):  # Of a file of rows.
            assert int(line[1]) <= len(target.read_text(encoding="utf-8").splitlines()), link
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, link
