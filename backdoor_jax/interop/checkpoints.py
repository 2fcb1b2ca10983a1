"""Orbax checkpoints of trees of arrays, of a run that may be killed and of a finished model."""

import contextlib
import logging
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.errors import UserError, first_line

UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax adds to the name of a folder that it has not finished."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns whatever Orbax raises in writing a folder into an `OSError`: a full disk is none to its backends."""
    try:
        with quiet_threads():
            yield
    except OSError:
        raise
    except Exception as error:  # Orbax and its backends raise many kinds.
        raise OSError(f"{folder} cannot be written ({first_line(error)})") from error


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Keeps Orbax's threads from printing the tracebacks of errors that the main thread raises as well."""
    shown, level = threading.excepthook, logging.getLogger("absl").level
    threading.excepthook = lambda arguments: None
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        threading.excepthook = shown
        logging.getLogger("absl").setLevel(level)


class Checkpoints:
    """A folder of a run's checkpoints, of which the newest is kept.

    Orbax writes each under a temporary name first, so that a killed run leaves only complete ones.
    """

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        self._args, self._folder = ocp.args, folder
        with writing(folder):
            for leftover in folder.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(leftover)
            self._manager = ocp.CheckpointManager(
                folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            )

    def latest(self, like: Any) -> Any:
        """The newest tree, with the structure of ``like``, or ``like`` itself where there is none."""
        newest = self._manager.latest_step()
        if newest is None:
            return like
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
        try:
            with quiet_threads():
                return self._manager.restore(newest, args=self._args.StandardRestore(abstract))
        except Exception as error:  # Orbax and its backends raise many kinds.
            raise UserError(
                f"{self._folder}: the checkpoint of step {newest} is damaged or of another training "
                f"({first_line(error)}); remove the folder to train again"
            ) from error

    def save(self, number: int, tree: Any) -> None:
        """Writes a tree; the older one is removed once this one is complete."""
        with writing(self._folder):
            self._manager.save(number, args=self._args.StandardSave(tree))
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Stops Orbax's threads."""
        self._manager.close()


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a tree of arrays to a folder, completely or not at all, and replaces what was there."""
    import orbax.checkpoint as ocp

    with writing(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree, force=True)


def is_tree(folder: Path) -> bool:
    """Whether Orbax wrote a folder."""
    return (folder / "_CHECKPOINT_METADATA").is_file()


def stored_bytes(folder: Path) -> int:
    """The bytes that reading a tree takes, by the descriptions of its arrays: a chunk may be larger than its array.

    Raises:
        UserError: where it is no tree that `save_tree` wrote.
    """
    import orbax.checkpoint as ocp

    def needed(array: Any) -> int:
        return max(map(math.prod, (array.shape, array.storage.chunk_shape))) * np.dtype(array.dtype).itemsize

    try:
        with quiet_threads(), ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        return sum(map(needed, jax.tree.leaves(tree)))
    except Exception as error:  # Orbax and its backends raise many kinds.
        raise UserError(f"{folder}: is damaged ({first_line(error)}); save the model again") from error


def load_tree(folder: Path, like: Any) -> Any:
    """Reads a tree that `save_tree` wrote.

    Args:
        folder: the checkpoint's.
        like: a tree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes expected.

    Raises:
        UserError: where there is no such folder, or it holds another tree.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    try:
        with quiet_threads(), ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder.absolute(), like)
    except Exception as error:  # Orbax and its backends raise many kinds.
        raise UserError(
            f"{folder}: does not hold the expected model ({first_line(error)}); "
            "give the model, width and classes it was saved with"
        ) from error
    # Orbax commits arrays to a device, for which everything would be compiled again.
    return jax.tree.map(jnp.asarray, jax.device_get(tree))
