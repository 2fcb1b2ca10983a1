"""A stopwatch that separates compilation from work."""

import threading
import time
from types import TracebackType

import jax

_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_running: list["Stopwatch"] = []
_lock = threading.Lock()


class Stopwatch:
    """Measures the wall-clock time of a block, without tracing, lowering and compiling, which it measures separately.

    JAX reports their durations through `jax.monitoring`; overlapping reports (a function traced inside another) count
    once. Wait for the results (`jax.block_until_ready`) inside the block.

    Attributes:
        seconds: of work, once the block has ended.
        compile_seconds: of tracing, lowering and compiling.

    Example:
        >>> with Stopwatch() as watch:
        ...     _ = jax.jit(lambda x: x + 1)(1.0).block_until_ready()
        >>> watch.compile_seconds > 0
        True
    """

    def __enter__(self) -> "Stopwatch":
        self._intervals: list[tuple[float, float]] = []
        self._start = time.perf_counter()
        with _lock:
            _running.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.perf_counter()
        with _lock:
            _running.remove(self)
        self.compile_seconds, reached = 0.0, self._start
        for low, high in sorted(self._intervals):
            self.compile_seconds += max(0.0, high - max(low, reached))
            reached = max(reached, high)
        self.seconds = end - self._start - self.compile_seconds


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _COMPILING:
        now = time.perf_counter()
        with _lock:
            for watch in _running:
                watch._intervals.append((now - duration_secs, now))


jax.monitoring.register_event_duration_secs_listener(_listen)
