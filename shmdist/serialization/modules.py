"""Modules whose functions and classes go by value: ``__main__``, and those that the user has registered."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

MAIN = frozenset({"__main__", "__mp_main__"})


def registered() -> Collection[str]:
    """Return the names that ``cloudpickle.register_pickle_by_value`` was given; imports nothing.

    It is cloudpickle's own set: its public function makes a copy for each question, and every call
    of a function by name asks.
    """
    cloudpickle = sys.modules.get("cloudpickle.cloudpickle")
    return () if cloudpickle is None else getattr(cloudpickle, "_PICKLE_BY_VALUE_MODULES", ())


def goes_by_value(module: Any) -> bool:
    """Return whether what is defined in the module of this name goes by value."""
    if module in MAIN:
        return True
    names = registered()
    if not names or type(module) is not str:
        return False
    while module and module not in names:
        module = module.rpartition(".")[0]  # a package stands for its modules
    return bool(module)


__all__ = ["MAIN", "goes_by_value", "registered"]
