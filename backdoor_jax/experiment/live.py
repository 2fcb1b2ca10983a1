"""One table of all cells of an experiment that is kept up to date on a terminal, and nothing anywhere else."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

Position = tuple[str, str]
"""A model and a defense: the line and the column of a cell."""
WAITING, RUNNING = "·", "running"


class LiveTable:
    """The table, on stderr while its block is active; a line for each model and a column for each defense.

    Attributes:
        shown: whether stderr is a terminal.

    Example:
        >>> with LiveTable([("badnets-0", "none"), ("badnets-0", "d3")]) as table:
        ...     table.end(("badnets-0", "none"), "94.5 / 96.4")
        ...     table.run([("badnets-0", "d3")])
        ...     table.texts
        {('badnets-0', 'none'): '94.5 / 96.4', ('badnets-0', 'd3'): 'running'}
    """

    def __init__(self, cells: Sequence[Position]) -> None:
        console = Console(stderr=True)
        self.shown = console.is_terminal
        self.texts = dict.fromkeys(cells, WAITING)
        # Where stdout is no terminal, its lines are left where they belong.
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty())

    def __enter__(self) -> "LiveTable":
        if self.shown:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown:
            self._live.stop()

    def end(self, cell: Position, text: str) -> None:
        """Shows what became of a cell."""
        self.texts[cell] = text
        self._show()

    def run(self, cells: Sequence[Position]) -> None:
        """Shows which of the others are running."""
        for cell, text in self.texts.items():
            if text in (WAITING, RUNNING):
                self.texts[cell] = RUNNING if cell in cells else WAITING
        self._show()

    def _show(self) -> None:
        if self.shown:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """The table as it is now."""
        lines, columns = (list(dict.fromkeys(cell[place] for cell in self.texts)) for place in (0, 1))
        table = Table("model", *columns)
        for line in lines:
            table.add_row(line, *(self.texts.get((line, column), "") for column in columns))
        return table
