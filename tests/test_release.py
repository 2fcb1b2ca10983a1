"""What a release needs: workflows that can be read and call commands that exist, and a version that is described."""

import re
import tomllib
from pathlib import Path
from typing import Any

import index_links
import pytest
import yaml

from backdoor_jax import __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = re.findall(r"\bmake ([a-z]+)", "\n".join(commands(yaml.safe_load(path.read_text(encoding="utf-8")))))
    assert called
    assert set(called) <= targets


def test_workflows_test_every_python_that_is_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["versions"]["strategy"]["matrix"]["python"]
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert promised == f">={tested[0]}"
    assert tested == ["3.11", "3.12", "3.13"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_templates_have_what_github_requires(path: Path) -> None:
    template = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert template["name"] and template["description"]
    assert all(part["attributes"]["label"] for part in template["body"])


def test_the_version_is_described_and_cited() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}, (unreleased|\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_links_of_the_page_on_an_index_are_addresses_of_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    page = index_links.absolute(text, "https://example.org/owner/name", "v1")
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(", text)) > 20
    found = [re.fullmatch(r"https://example.org/owner/name/(raw|blob)/v1/([^#]+)(#.*)?", link) for link in links]
    assert all(match and (ROOT / match[2]).exists() for match in found)
    assert [match[2] for match in found if match and match[1] == "raw"] == ["docs/figures/answers.png"]
    assert index_links.absolute(page, "https://example.org/owner/name", "v2") == page
