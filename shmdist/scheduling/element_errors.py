"""Which element of a map or loop an error belongs to: its index, and a note for the reader.

An error has its place as ``.index``, and a note such as ``element 2: 0``. Both are written
straight into the dict that each exception has, so errors of types that refuse attributes have
them too. Where the original has an ``index`` of its own, that is at ``error.captured.ex``.

In a loop the worker knows where in its chunk the body failed. It tells that by an entry in the
error's dict, which is taken out again where the error arrives. An error that loses the entry on
its way, because its type pickles itself, is told with the range of its chunk.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

_DICT = vars(BaseException)["__dict__"]  # the C-level accessor, whatever the class defines
_OFFSET = "_shmdist_offset"
_MAX_TEXT = 80  # characters of an element's text
_ITEMS = 6  # items of a container that are shown
_DEEPEST = 3  # containers within each other that are shown
_BRACKETS: dict[type[Any], str] = {list: "[]", tuple: "()", set: "{}", frozenset: "{}", dict: "{}"}


def name_element(error: BaseException, index: int | range, element: Any) -> None:
    """Tell in an error of which element of a map or loop it is.

    Parameters
    ----------
    error : BaseException
        Gets the attribute ``index`` and a note.
    index : int or range
        The element's place in the input; of a chunk the places.
    element : object
        The element, or the chunk.
    """
    what = f"element {index}"
    if isinstance(index, range):
        what = f"elements {index.start} to {index.stop - 1}"
    fields = _DICT.__get__(error)
    fields["index"] = index
    notes = fields.get("__notes__")
    fields["__notes__"] = [*(notes if isinstance(notes, list) else ()), f"{what}: {short_repr(element)}"]


def note_offset(error: BaseException, chunk: Any, elements: Iterator[Any]) -> None:
    """Note which element of a chunk was the last that its iterator has given."""
    left = operator.length_hint(elements, -1)
    if left >= 0:
        _DICT.__get__(error)[_OFFSET] = len(chunk) - left - 1


def name_in_chunk(error: BaseException, chunks: Sequence[Any], number: int, vectorized: bool) -> None:
    """Tell in an error of chunk `number` which element of the loop's input it is of."""
    start, chunk = sum(map(len, chunks[:number])), chunks[number]
    fields = _DICT.__get__(error)
    offset = fields.pop(_OFFSET, None)
    captured = fields.get("_shmdist_captured")
    if captured is not None:
        _DICT.__get__(captured.ex).pop(_OFFSET, None)
    if vectorized or offset is None or not 0 <= offset < len(chunk):
        name_element(error, range(start, start + len(chunk)), chunk)
    else:
        name_element(error, start + offset, chunk[offset])


def short_repr(value: Any) -> str:
    """Return a text for `value` of bounded length that is made quickly and never fails.

    Examples
    --------
    >>> short_repr([1, "two", (3.0, None)])
    "[1, 'two', (3.0, None)]"
    >>> short_repr(range(10**9)), short_repr(list(range(1000)))
    ('range(0, 1000000000)', '[0, 1, 2, 3, 4, 5, ...]')
    """
    try:
        text = _describe(value, _DEEPEST)
    except (Exception, SystemExit, GeneratorExit):  # it runs code of the value's class
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def _describe(value: Any, depth: int) -> str:
    kind = type(value)
    if kind in (str, bytes, bytearray):
        return repr(value[:_MAX_TEXT])
    if kind in _BRACKETS:
        return _describe_container(value, _BRACKETS[kind], depth)
    if kind is int and value.bit_length() > 4 * _MAX_TEXT:
        return f"<int of {value.bit_length()} bits>"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        dtype = getattr(value, "dtype", None)
        return f"<{kind.__name__} of shape {tuple(shape)}{'' if dtype is None else f', dtype {dtype}'}>"
    if shape is None and kind is not range and hasattr(kind, "__len__") and len(value) > _MAX_TEXT:
        return f"<{kind.__name__} of length {len(value)}>"
    return repr(value)


def _describe_container(value: Any, brackets: str, depth: int) -> str:
    if not depth:
        return f"{brackets[0]}...{brackets[1]}"
    if type(value) is dict:
        pairs = islice(value.items(), _ITEMS)
        items = [f"{_describe(key, depth - 1)}: {_describe(item, depth - 1)}" for key, item in pairs]
    else:
        items = [_describe(item, depth - 1) for item in islice(value, _ITEMS)]
    if len(value) > _ITEMS:
        items.append("...")
    comma = "," if type(value) is tuple and len(items) == 1 else ""
    return f"{brackets[0]}{', '.join(items)}{comma}{brackets[1]}"


__all__ = ["name_element", "name_in_chunk", "note_offset", "short_repr"]
