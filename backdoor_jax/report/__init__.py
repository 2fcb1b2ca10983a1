"""Rows to a table, figures and a self-contained page."""

from backdoor_jax.report.page import render, write_page
from backdoor_jax.report.table import compact, markdown, print_table, summarize

__all__ = ["compact", "markdown", "print_table", "render", "summarize", "write_page"]
