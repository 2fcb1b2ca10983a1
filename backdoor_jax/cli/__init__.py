"""The command line: parses arguments, calls, and prints; a file a command."""

from backdoor_jax.cli.command import main

__all__ = ["main"]
