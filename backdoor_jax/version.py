"""The version of the package, and the commit of a checkout."""

import functools
import subprocess
from pathlib import Path

__version__ = "0.1.0"


@functools.cache
def commit() -> str | None:
    """The commit that this package is imported from, marked where tracked files differ from it; None if installed.

    Example:
        >>> import re
        >>> found = commit()
        >>> found is None or bool(re.fullmatch("[0-9a-f]{7,40}(-dirty)?", found))
        True
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # An environment may lie in another repository.
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
