"""Module-level random generators: a function that uses one uses the receiving process's.

``random.random`` and ``numpy.random.rand`` are methods of a generator, and pickle takes a method
along with its object. With its state the generator would give the same numbers on every process,
and again with every call, so it goes by name, as the functions of other modules do. Generators that
a program has made are values as always.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

#: Modules with such a generator, by the name of its type.
GENERATORS = {"Random": "random", "RandomState": "numpy.random"}


def _generator_of(name: str) -> Any:
    """Return the generator that the functions of module `name` are methods of."""
    return getattr(importlib.import_module(name).random, "__self__", None)


def reduce_generator(obj: Any) -> Any:
    """Reduce an object whose type's name is in `GENERATORS`; NotImplemented when it is a value."""
    name = GENERATORS[type(obj).__name__]
    if name in sys.modules and obj is _generator_of(name):
        return _generator_of, (name,)
    return NotImplemented


__all__ = ["GENERATORS", "reduce_generator"]
