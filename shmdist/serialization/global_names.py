"""The globals that a function uses, with those of the functions and classes it defines.

cloudpickle looks for the instructions that functions use. The body of a class has others, for a name in
it may be the class's or a global: annotations, defaults of fields and decorators of methods among them.
"""

from __future__ import annotations

from types import CodeType

_FUNCTION = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"})
_CLASS = frozenset({"LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_MOST = 1000  # codes that are noted

_known: dict[int, tuple[CodeType, tuple[str, ...]]] = {}  # by id, which the code itself keeps from another


def global_names(code: CodeType) -> tuple[str, ...]:
    """Return the names of globals that `code`, and the codes inside it, may read or write."""
    known = _known.get(id(code))
    if known is not None:
        return known[1]
    found: dict[str, None] = {}
    _add_names(code, found)
    if len(_known) >= _MOST:
        _known.clear()
    names = tuple(found)
    _known[id(code)] = code, names
    return names


def _add_names(code: CodeType, found: dict[str, None]) -> None:
    import dis

    own = {"__name__", "__annotations__"}  # names that a class's body has set when it comes to them
    for each in dis.get_instructions(code):
        if each.opname in _FUNCTION or (each.opname in _CLASS and each.argval not in own):
            found[each.argval] = None
        elif each.opname == "STORE_NAME":
            own.add(each.argval)
    for inner in code.co_consts:
        if type(inner) is CodeType:
            _add_names(inner, found)


__all__ = ["global_names"]
