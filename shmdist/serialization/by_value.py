"""What cloudpickle leaves out of functions and classes that go by value."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, MemberDescriptorType, SimpleNamespace
from typing import Any


def with_slots(kind: type, reduced: Any) -> Any:
    """Let a class with slots have them where it arrives: there it would have a ``__dict__`` in their place.

    An attribute that no slot is for could be set then, and objects could not come back.
    """
    slots = kind.__dict__.get("__slots__")
    if slots is None or type(reduced) is not tuple or reduced[0].__name__ != "_make_skeleton_class":
        return reduced
    make, (meta, name, bases, namespace, *more), (attributes, state), *rest = reduced
    namespace = {**namespace, "__slots__": slots}
    # They are made with the class; under mangled names, too.
    attributes = {
        key: value
        for key, value in attributes.items()
        if not (type(value) is MemberDescriptorType and value.__objclass__ is kind)
    }
    return make, (meta, name, bases, namespace, *more), (attributes, state), *rest


def with_submodules(function: FunctionType, slotstate: dict[str, Any]) -> None:
    """Add the submodules that only functions, classes and comprehensions inside `function` use.

    cloudpickle looks at the names in the outermost code alone, for what a package has imported beside it.
    """
    names = {name for code in _codes_in(function.__code__) for name in code.co_names}
    found = slotstate.get("_cloudpickle_submodules")
    if names and type(found) is list:
        from cloudpickle import cloudpickle

        packages = [
            *slotstate.get("__globals__", {}).values(),
            *(cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)),
        ]
        looked = cloudpickle._find_imported_submodules(SimpleNamespace(co_names=names), packages)
        found += [module for module in looked if module not in found]


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if type(constant) is CodeType:
            yield constant
            yield from _codes_in(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


__all__ = ["with_slots", "with_submodules"]
