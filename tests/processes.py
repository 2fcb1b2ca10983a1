"""Python in a process of its own, compiled as for a user: the suite's flags spare the compiler and slow trainings."""

import os
import subprocess
import sys
from pathlib import Path


def output_as_user(*arguments: str, folder: Path) -> str:
    """What Python prints for these arguments in a folder; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
