"""CONTRIBUTING.md holds: following it adds a defense, an attack, a model and a data set, to a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import backdoor_jax

ROOT = Path(__file__).parents[1]

MODEL = '''"""A copy of the small network under another name."""

from backdoor_jax.models.small_cnn import SmallCNN


class OtherCNN(SmallCNN):
    """The same network."""
'''

DATA = '''

class Stripes(DatasetSpec):
    """Images of two classes: dark and light."""

    def read(self) -> Splits:
        """The images and labels."""
        labels = np.arange(80) % 2
        noise = np.random.default_rng(0).integers(0, 60, (80, 8, 8, 3))
        images = (noise + 120 * labels[:, None, None, None]).astype(np.uint8)
        return Splits(make_dataset(images[:60], labels[:60], 2), make_dataset(images[60:], labels[60:], 2), 2)


SPECS: tuple[DatasetSpec, ...] = (
    Stripes(name="stripes", summary="two classes, made up"),
'''

SCRIPT = """
import doctest, sys
from pathlib import Path
import backdoor_jax as bj
from backdoor_jax.attacks import stripe
from backdoor_jax.cli import main
from backdoor_jax.config_files import parse_experiment
from backdoor_jax.defenses import head_tune
from backdoor_jax.experiment import run_experiment

assert bj.DEFENSES["head_tune"] is head_tune.HeadTune and bj.ATTACKS["stripe"] is stripe.Stripe
for module in (head_tune, stripe):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
assert main(["list"]) == 0
experiment = parse_experiment({
    "name": "added",
    "data": {"source": "stripes"},
    "model": {"name": "other_cnn", "width": 2},
    "victim": {"epochs": 1, "batch_size": 20, "crop": 0},
    "clean_ratio": 0.5,
    "attacks": [{"name": "stripe", "rows": 1}],
    "defenses": [{"name": "head_tune", "preset": "strong", "steps": 2, "crop": 0}],
})
for row in run_experiment(experiment, Path(sys.argv[1]), report=lambda line: None):
    print(row["attack"], row["defense"], row["method"], row["dataset"], row["model"])
"""


def section(title: str) -> list[str]:
    """The Python blocks of a section of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def insert(path: Path, before: str, text: str) -> None:
    """Puts text in front of the first place where a file has other text."""
    content = path.read_text(encoding="utf-8")
    assert before in content
    path.write_text(content.replace(before, text + before, 1), encoding="utf-8")


@pytest.mark.slow
def test_following_contributing_adds_one_of_each_to_a_copy_of_the_package(tmp_path: Path) -> None:
    package = tmp_path / "backdoor_jax"
    shutil.copytree(Path(backdoor_jax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for title, folder, file, first in (
        ("Add a defense", "defenses", "head_tune.py", "        FineTune,\n"),
        ("Add an attack", "attacks", "stripe.py", "        BadNets,\n"),
    ):
        code, imported, entry = section(title)
        (package / folder / file).write_text(code, encoding="utf-8")
        insert(package / folder / "__init__.py", f"from backdoor_jax.{folder}", imported)
        insert(package / folder / "__init__.py", first, entry)
    (package / "models" / "other_cnn.py").write_text(MODEL, encoding="utf-8")
    models = package / "models" / "__init__.py"
    insert(models, "from backdoor_jax.models.preact", "from backdoor_jax.models.other_cnn import OtherCNN\n")
    insert(models, '    "preact_resnet18": Arch', '    "other_cnn": Architecture(OtherCNN, "another network"),\n')
    specs = package / "data" / "specs.py"
    content = specs.read_text(encoding="utf-8")
    specs.write_text(content.replace("\n\nSPECS: tuple[DatasetSpec, ...] = (\n", DATA, 1), encoding="utf-8")

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith("other_cnn-2")]
    assert ["stripe", "head_tune", "head_tune", "stripes", "other_cnn-2"] in rows
    assert len(rows) == 4
    listed = done.stdout
    assert all(name in listed for name in ("head_tune", "stripe", "other_cnn", "stripes"))


def test_the_root_stays_a_short_list() -> None:
    assert len(backdoor_jax.__all__) <= 40
    assert all(hasattr(backdoor_jax, name) for name in backdoor_jax.__all__)
