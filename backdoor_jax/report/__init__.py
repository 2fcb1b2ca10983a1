"""Reports: tables, figures and a self-contained page from the rows of an experiment."""

from backdoor_jax.report.answers import lead
from backdoor_jax.report.page import render, write_page
from backdoor_jax.report.table import compact, markdown, summarize

__all__ = ["compact", "lead", "markdown", "render", "summarize", "write_page"]
