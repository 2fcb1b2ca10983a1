"""Progress bars: on a terminal, unless they are hidden, and nothing anywhere else."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_hidden = contextvars.ContextVar("hidden", default=False)


@contextlib.contextmanager
def hidden_bars() -> Iterator[None]:
    """Shows no bar for the length of a block.

    Example:
        >>> with hidden_bars(), progress_bar("training", 10) as advance:
        ...     advance(5)
    """
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextlib.contextmanager
def progress_bar(name: str, total: int | None, done: int = 0, unit: str = "steps") -> Iterator[Callable[..., None]]:
    """Shows a bar on stderr for the length of a block, where stderr is a terminal.

    Args:
        name: what is in progress.
        total: units in all; None where that is not known.
        done: units done before.
        unit: what is counted; ``bytes`` are shown as a size.

    Yields:
        ``advance(count, note="")``: counts units as done and shows a note beside the bar.

    Example:
        >>> with progress_bar("training", 10) as advance:
        ...     advance(5, "loss 0.1")
    """
    from rich.console import Console

    console = Console(stderr=True)
    if _hidden.get() or not console.is_terminal:
        yield lambda count, note="": None
        return
    from rich import progress

    amount = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), amount)
    rest = (progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}", markup=False))
    with progress.Progress(*columns, *rest, console=console, transient=True) as bars:
        task = bars.add_task(name, total=total, completed=done, note="")
        with hidden_bars():  # A terminal has room for one.
            yield lambda count, note="": bars.update(task, advance=count, note=note)
