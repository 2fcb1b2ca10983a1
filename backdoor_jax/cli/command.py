"""What every command shares: from the arguments to the exit code, with one line for whatever goes wrong."""

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from backdoor_jax.cli.defend import defend
from backdoor_jax.cli.experiments import cluster_option, demo, run
from backdoor_jax.cli.listing import list_names
from backdoor_jax.cli.options import check_options, make_parser
from backdoor_jax.cli.scan import scan
from backdoor_jax.cli.streams import fail, quiet_libraries, safe_output
from backdoor_jax.errors import UserError, first_line
from backdoor_jax.progress import hidden_bars, progress_lines
from backdoor_jax.stopping import Stopped, stopping_at_safe_points

FIRST_STEPS = """\
backdoor-jax detects and removes backdoors in image classifiers. Start with one of these:

  backdoor-jax demo                                      see it work, on models that it trains itself
  backdoor-jax scan --checkpoint MODEL --data IMAGES     does a model look backdoored, and towards which class
  backdoor-jax defend --checkpoint MODEL --data IMAGES   repair it
  backdoor-jax list                                      attacks, defenses, detectors, models and data sets

MODEL is FILE.safetensors, FILE.pt or a folder; IMAGES are clean, in FILE.npz or a folder for each class.
`backdoor-jax COMMAND --help` has all options; `backdoor-jax --print-completion bash` prints a completion script.
"""

COMMANDS: dict[str, Callable[[Any], int | None]] = {
    "demo": demo,
    "run": run,
    "defend": defend,
    "scan": scan,
    "list": list_names,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 with one line on stderr for what the user can fix; 1 where a repair lost too much accuracy, and with one
        line that names a log file for anything else; 130 or 143 where Ctrl-C or SIGTERM stopped it.

    Example:
        >>> main(["run", "nowhere.yaml"])
        2
    """
    code, left = 0, None
    with safe_output() as refused:
        try:
            code = _parse_and_run(arguments)
        except SystemExit as leaving:  # After --help, and for options that argparse refuses.
            left = leaving
    if refused:
        return fail(f"the output could not be printed ({first_line(refused[0])}); results are saved")
    if left is not None:
        raise left
    return code


def _parse_and_run(arguments: Sequence[str] | None) -> int:
    """Runs a command; its output goes to safe streams."""
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command is None and not rest:
        print(FIRST_STEPS, end="")
        return 0
    if rest and (
        parsed.command not in ("run", "defend") or any(text.startswith("-") or "=" not in text for text in rest)
    ):
        parser.error(f"unknown arguments {' '.join(rest)}; only run and defend take settings, as key=value")
    parsed.overrides = tuple(rest)
    try:
        with stopping_at_safe_points(), quiet_libraries():
            check_options(parsed)
            _set_up_jax(distributes=cluster_option(parsed) is not None)
            with hidden_bars() if parsed.quiet or parsed.json else progress_lines():
                code: int | None = COMMANDS[parsed.command](parsed)
    except UserError as error:
        return fail(str(error))
    except Stopped as stopped:
        return stopped.code  # The line was printed when the signal came.
    except OSError as error:
        return fail(_system_error(error))
    except Exception as error:
        name = "what you ran"
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile("w", prefix="backdoor_jax-", suffix=".log", delete=False) as log,
        ):
            traceback.print_exc(file=log)
            name = log.name
        return fail(f"{type(error).__name__}: {first_line(error)}; this is a bug, please report it with {name}", 1)
    return code or 0


def _system_error(error: OSError) -> str:
    """What the operating system refused, and where."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or first_line(error)}; free some space or choose another folder, and run it again"


def _set_up_jax(distributes: bool) -> None:
    """Sets JAX to its default rules, whatever the environment says, and finds out whether it has a device.

    A process whose workers do the work leaves accelerators to them.
    """
    import jax

    from backdoor_jax.compiling import use_program_cache

    config: Any = jax.config
    for name, value in (
        ("jax_numpy_rank_promotion", "allow"),
        ("jax_numpy_dtype_promotion", "standard"),
        ("jax_transfer_guard", "allow"),
        ("jax_disable_jit", False),
    ):
        config.update(name, value)
    if distributes:
        config.update("jax_platforms", "cpu")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The latter for a platform that was not installed.
        raise UserError(f"JAX finds no device ({first_line(error)}); unset JAX_PLATFORMS, or set it to cpu") from error
    use_program_cache()
