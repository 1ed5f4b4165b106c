"""The globals that a function may use."""

import sys

import pytest

from shmdist.serialization.global_names import global_names

SOURCE = """
def f(x: Unused = Default):
    global written
    written = read(x.attribute)
    class A(Base, key=keyword):
        own = 1
        plain: Annotated = own + value
        same = same
        parts = [part for _ in range(each)]
        @decorated
        def method(self, y=default) -> Returned:
            return lambda: (deepest, [inner for z in y])
        class B:
            nested: list[Item] = own_of_b
    return A
"""
EXPECTED = {
    *(
        "written",
        "read",
        "Base",
        "keyword",
        "Annotated",
        "value",
        "same",
        "part",
        "range",
        "each",
        "decorated",
    ),
    *("default", "Returned", "deepest", "inner", "list", "Item", "own_of_b"),
}


def of(source):
    space = {"Unused": 1, "Default": 2}
    exec(source, space)
    return global_names(space["f"].__code__)


def test_of_functions_and_classes_in_them():
    assert EXPECTED <= set(of(SOURCE)) <= EXPECTED


def test_what_a_class_has_set_is_not_a_global():
    names = of(
        "def f():\n class A:\n  def get(self): ...\n  x = property(get)\n  __slots__ = ('a',)\n return A"
    )
    assert "get" not in names and "__name__" not in names


@pytest.mark.skipif(sys.version_info < (3, 12), reason="its syntax")
def test_of_type_parameters():
    assert {"Bound", "Other"} <= set(of("def f():\n class A[T: Bound]:\n  type X = Other\n return A"))
