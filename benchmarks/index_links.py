"""Writes README.md for a package index, where relative links lead nowhere: they become links to the repository.

    python benchmarks/index_links.py https://example.org/owner/name v0.1.0

The release's workflow does so in its own checkout, with its own address and tag.
"""

import argparse
import re

from pages import ROOT

from backdoor_jax.files import write_text

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")
"""A relative link or picture, with its text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="its address, as GitHub lays out the files' addresses")
    parser.add_argument("tag", help="whose files the links lead to")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    write_text(readme, absolute(readme.read_text(encoding="utf-8"), arguments.repository, arguments.tag))


def absolute(text: str, repository: str, tag: str) -> str:
    """A page of the repository's root whose links and pictures work elsewhere.

    >>> absolute("![](a.png) [b](b.md#c) [d](https://d.org)", "https://example.org/o/n", "v1")
    '![](https://example.org/o/n/raw/v1/a.png) [b](https://example.org/o/n/blob/v1/b.md#c) [d](https://d.org)'
    """

    def lead(found: re.Match[str]) -> str:
        picture, title, path = found.groups()
        return f"{picture}[{title}]({repository}/{'raw' if picture else 'blob'}/{tag}/{path})"

    return LINK.sub(lead, text)


if __name__ == "__main__":
    main()
