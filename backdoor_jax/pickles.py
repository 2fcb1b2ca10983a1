"""Pickles read as data: numbers, texts, containers and arrays of plain numeric types, and nothing that is called.

A pickle is a program for a small machine, which can call anything that can be imported. Here the machine is Python's
own, with its instructions for calling and building left out: names of a short list stand for functions of this module,
and any other name is an error. NumPy's constructors are not called either: an allowed `numpy.dtype` can be told to
treat raw bytes as pointers. An array is made from its shape, the name of its type and its bytes.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np


class PickledCode(pickle.UnpicklingError):
    """A pickle asks for a name that is not data; it was not run."""

    def __init__(self, name: str) -> None:
        super().__init__(f"its pickle asks for {name}, which is no data; it was not run")
        self.name = name


class Skipped:
    """Stands for an object that is of no use here, such as an array of Python objects."""


class PickledType:
    """A NumPy type in a pickle: its name, and the byte order that follows."""

    def __init__(self, name: object, *_: object) -> None:
        self.name, self.order = name, "<"

    def set_state(self, state: Any) -> None:
        """Takes the byte order; everything else in the state is for types that are not plain."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order in ("<", ">", "|", "="):
            self.order = order

    def plain(self) -> np.dtype | None:
        """The type, where it is one of plain numbers."""
        name = self.name.decode("latin1") if isinstance(self.name, bytes) else self.name
        if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
            return None
        return np.dtype(self.order + name)


class PickledArray:
    """A NumPy array in a pickle."""

    def __init__(self, *_: object) -> None:
        self._found: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """Makes the array from shape, type and bytes, where the type is plain."""
        _, shape, kind, fortran_order, data = state
        dtype = kind.plain() if isinstance(kind, PickledType) else None
        if dtype is None:
            return
        data = data.encode("latin1") if isinstance(data, str) else data
        if (
            not isinstance(data, bytes)
            or not all(type(length) is int and length >= 0 for length in shape)
            or math.prod(shape) * dtype.itemsize != len(data)
        ):
            raise pickle.UnpicklingError("an array's shape does not fit its bytes")
        self._found = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")

    @property
    def nbytes(self) -> int:
        """The bytes of the array; 0 where it is not one of plain numbers."""
        return 0 if self._found is None else self._found.nbytes

    @property
    def array(self) -> np.ndarray:
        """The array.

        Raises:
            ValueError: where it is not one of plain numbers.
        """
        if self._found is None:
            raise ValueError("an array holds no plain numbers")
        return self._found


def _scalar(kind: object, data: object = b"") -> Any:
    dtype = kind.plain() if isinstance(kind, PickledType) else None
    data = data.encode("latin1") if isinstance(data, str) else data
    if dtype is None or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        return Skipped()
    return np.frombuffer(data, dtype)[0].item()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes are written in an unknown way")
    return text.encode("latin1")


_PLAIN = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
)
"""The instructions that are carried out: no others are in files of weights and images."""


class _Instructions(dict[int, Callable[..., None]]):
    """What each instruction does."""

    def __missing__(self, code: int) -> Callable[..., None]:
        raise pickle.UnpicklingError(f"it has the instruction {code}, which is not for plain data")


_Machine: Any = pickle._Unpickler
"""Python's unpickler in Python: that in C cannot be told which instructions to leave out."""


class PlainUnpickler(_Machine):
    """Reads plain values and arrays, and refuses everything else.

    Args:
        data: the pickle.
        names: what stands for further names, as ``module.name``.
        persistent: what stands for objects that are stored outside the pickle.

    Example:
        >>> PlainUnpickler(pickle.dumps({"labels": [3, 1]}, protocol=2)).load()
        {'labels': [3, 1]}
        >>> PlainUnpickler(pickle.dumps(np.arange(3.0), protocol=2)).load().array
        array([0., 1., 2.])
        >>> PlainUnpickler(pickle.dumps(print, protocol=2)).load()
        Traceback (most recent call last):
        backdoor_jax.pickles.PickledCode: its pickle asks for __builtin__.print, which is no data; it was not run
    """

    names: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "numpy.dtype": PickledType,
        "numpy.ndarray": PickledArray,
        "_codecs.encode": _encode,
        **{
            f"numpy.{core}.multiarray.{name}": made
            for core in ("core", "_core")
            for name, made in (("_reconstruct", PickledArray), ("scalar", _scalar))
        },
    }

    def __init__(
        self,
        data: bytes | io.BytesIO,
        names: Mapping[str, Callable[..., Any]] | None = None,
        persistent: Callable[[Any], Any] | None = None,
        encoding: str = "latin1",
    ) -> None:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        super().__init__(file, encoding=encoding)
        self._left = 2 * len(file.getbuffer())  # A text becomes bytes once, and these an array.
        self._known, self._persistent = {**self.names, **(names or {})}, persistent

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        known = self._known.get(f"{module}.{name}")
        if known is None:
            raise PickledCode(f"{module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        """What stands for an object outside the pickle."""
        if self._persistent is None:
            raise pickle.UnpicklingError("it refers to objects outside of it")
        return self._persistent(pid)

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not isinstance(arguments, tuple) or function not in self._known.values():
            raise pickle.UnpicklingError("it calls what cannot be called")
        made = self.stack[-1] = function(*arguments)
        if isinstance(made, bytes):
            self._count(len(made))

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, PickledType | PickledArray):
            made.set_state(state)
        if isinstance(made, PickledArray):
            self._count(made.nbytes)

    def _count(self, made: int) -> None:
        """Refuses to make more bytes than a pickle of this size can hold, such as one text again and again."""
        self._left -= made
        if self._left < 0:
            raise pickle.UnpicklingError("it makes many copies of what it holds")

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._put(items[::2], items[1::2])

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key], [value])

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(items[::2], items[1::2])

    def _put(self, keys: list[Any], values: list[Any]) -> None:
        # The hash of nested tuples that share parts takes time exponential in their depth.
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str | bytes | int) for key in keys):
            raise pickle.UnpicklingError("its dictionaries have keys other than texts and integers")
        self.stack[-1].update(zip(keys, values, strict=True))

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise pickle.UnpicklingError("it appends to what is no list")
        self.stack[-1].extend(values)

    dispatch: ClassVar[dict[int, Callable[..., None]]] = _Instructions(
        {getattr(pickle, name)[0]: _Machine.dispatch[getattr(pickle, name)[0]] for name in _PLAIN}
        | {
            pickle.REDUCE[0]: _reduce,
            pickle.BUILD[0]: _build,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.DICT[0]: _make_dict,
            pickle.APPEND[0]: _append,
            pickle.APPENDS[0]: _appends,
        }
    )
