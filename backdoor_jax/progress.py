"""Progress bars: on a terminal, unless they are hidden; elsewhere lines now and then, where a command asks for them."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 20.0
"""Seconds before and between lines."""

_hidden = contextvars.ContextVar("hidden", default=False)
_lines = contextvars.ContextVar("lines", default=False)


@contextlib.contextmanager
def progress_lines() -> Iterator[None]:
    """Writes a line now and then in place of each bar for the length of a block, where stderr is not a terminal.

    Example:
        >>> with progress_lines(), progress_bar("training", 10) as advance:
        ...     advance(5)  # Too soon for a line.
    """
    token = _lines.set(True)
    try:
        yield
    finally:
        _lines.reset(token)


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
    """Shows a bar on stderr for the length of a block, where stderr is a terminal; or lines, see `progress_lines`.

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
    if _hidden.get() or not (console.is_terminal or _lines.get()):
        yield lambda count, note="": None
        return
    if not console.is_terminal:
        with hidden_bars():
            yield _line_writer(name, total, done, unit)
        return
    from rich import progress

    amount = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), amount)
    rest = (progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}", markup=False))
    with progress.Progress(*columns, *rest, console=console, transient=True) as bars:
        task = bars.add_task(name, total=total, completed=done, note="")
        with hidden_bars():  # A terminal has room for one.
            yield lambda count, note="": bars.update(task, advance=count, note=note)


def _line_writer(name: str, total: int | None, done: int, unit: str) -> Callable[..., None]:
    """What writes a line on stderr whenever enough time has passed since the last one."""
    first, started = done, time.monotonic()
    last = started

    def advance(count: int, note: str = "") -> None:
        nonlocal done, last
        done, now = done + count, time.monotonic()
        if now - last < EVERY or done == total:
            return
        last = now
        parts = [f"{name}: {done} of {total or '?'} {unit}"]
        if total and first < done < total:
            parts.append(f"about {(now - started) / (done - first) * (total - done):.0f} s left")
        print(", ".join([*parts, *filter(None, [note])]), file=sys.stderr, flush=True)

    return advance
