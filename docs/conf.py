"""The documentation site, built by ``make docs``: pages in Markdown, notebooks that are executed, and docstrings."""

import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.domains.python import PyObject
from sphinx.util import logging

import backdoor_jax
from backdoor_jax import __version__

ROOT = Path(__file__).parents[1]
REFERENCE = {
    "defenses": "Defenses",
    "detectors": "Detectors",
    "attacks": "Attacks",
    "metrics": "Metrics",
    "models": "Models",
    "data": "Data",
    "training": "Training",
    "interop": "Files and other frameworks",
    "app": "Scanning and repairing files",
    "experiment": "Experiments",
    "analyses": "Analyses",
    "scenarios": "Scenarios",
    "zoo": "The zoo",
}
"""The packages of the API reference, and what its pages are called."""

project = "backdoor_jax"
author = "The backdoor_jax developers"
version = release = __version__
html_title = f"backdoor_jax {__version__}"
html_theme = "furo"
html_static_path = ["_static"]
html_show_copyright = False
html_css_files = ["site.css"]
exclude_patterns = ["_build", "figures"]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
# A name in single backticks links to what it names, where that is documented.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "Attributes")]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
# Files of the repository that are no pages: `_publish_files` copies them. Markdown has no links of the scheme `file`.
myst_url_schemes = {
    "http": None,
    "https": None,
    "mailto": None,
    "copy": {"url": "{{path}}#{{fragment}}"},
}

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 3600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True


def _publish_files(app: Any, name: str, source: list[str]) -> None:
    """Links that leave the folder of pages lead to copies of the repository's files."""
    page = Path(app.env.doc2path(name))
    up = "../" * name.count("/")

    def publish(found: re.Match[str]) -> str:
        target = (page.parent / found[1]).resolve()
        if target.is_relative_to(app.srcdir):
            return found[0]
        path = target.relative_to(ROOT)
        copy = Path(app.outdir) / "repository" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, copy)
        return f"](copy:{up}repository/{path}"

    def publish_page(found: re.Match[str]) -> str:
        text = (page.parent / found[1]).read_text(encoding="utf-8")
        (Path(app.outdir) / found[1]).write_text(text.replace('"../', '"repository/'), encoding="utf-8")
        return f"](copy:{found[1]}"

    source[0] = re.sub(r"\]\((\.\./[^)#\s]+)", publish, source[0])
    source[0] = re.sub(r"\]\((\w+\.html)", publish_page, source[0])


def _find_broken_links(app: Any, doctree: nodes.document, name: str) -> None:
    """Warns of links that are shown as they are written, because Markdown does not take them for any."""
    del app
    for text in doctree.findall(nodes.Text):
        if "](" in text and not isinstance(text.parent, nodes.literal | nodes.FixedTextElement):
            logging.getLogger(__name__).warning("no link: %s", text.astext()[-80:], location=name)


def _keep_numbers_together(app: Any, doctree: nodes.document, name: str) -> None:
    """A cell of numbers, such as 94.8 ± 0.3, stays on one line."""
    del app, name
    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            if re.fullmatch(r"-?[\d.,]+ (±|/|to) [-\d.,/ ]+", text):
                text.parent.replace(text, nodes.Text(text.replace(" ", "\N{NO-BREAK SPACE}")))


def _find_comments(app: Any, name: str, source: list[str]) -> None:
    """Warns of lines that begin with a percent sign: Markdown here takes them for comments and leaves them out."""
    del app
    for line in re.findall(r"^\s*%.*", source[0], re.MULTILINE):
        logging.getLogger(__name__).warning("a comment by mistake: %s", line.strip(), location=name)


def _write_reference(app: Any) -> None:
    """A page for each package, with the documentation of its modules."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    for package, title in REFERENCE.items():
        path = f"{backdoor_jax.__path__[0]}/{package}"
        modules = [f"{package}.{module.name}" for module in pkgutil.iter_modules([path]) if not module.ispkg]
        page = [f"# {title}", "", "```{eval-rst}", f".. automodule:: backdoor_jax.{package}", "```"]
        for module in modules:
            page += ["", f"## {module}", "", "```{eval-rst}", f".. automodule:: backdoor_jax.{module}", "   :members:"]
            page += ["```"]
        text = "\n".join(page) + "\n"
        target = folder / f"{package}.md"
        if not target.exists() or target.read_text() != text:  # A page that is written again is built again.
            target.write_text(text)


def _escape_numbers(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """A field described by a number alone is not the first item of a list."""
    del app, what, name, of, options
    lines[:] = [re.sub(r"^(\s*\w+: )(?=[\d.,]+\.$)", r"\1\\", line) for line in lines]


def _write_math(writer: Any, node: nodes.Node) -> None:
    """Formulas as MathML, which browsers draw without a script."""
    try:
        writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", error, node.astext(), location=node)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Registers the hooks above."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    for node in (nodes.math, nodes.math_block):
        app.add_node(node, override=True, html=(_write_math, None))
    # Before napoleon, which makes fields of sections.
    app.connect("autodoc-process-docstring", _escape_numbers, priority=400)
    app.connect("builder-inited", _write_reference)
    app.connect("source-read", _publish_files)
    app.connect("source-read", _find_comments)
    app.connect("doctree-resolved", _find_broken_links)
    app.connect("doctree-resolved", _keep_numbers_together)
