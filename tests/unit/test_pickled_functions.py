"""Functions that go by value: their bytes are kept, and never used when they are not what they would be now."""

import gc
import math
import pickle
import sys
import types
import weakref

import cloudpickle
import numpy as np
import pytest

from shmdist.serialization import codec, definitions, pickled_functions
from shmdist.serialization.pickled_functions import PickledFunction, kept
from shmdist.transport.messages import BY_VALUE

SOURCE = """
import math
import numpy as np
from math import sqrt
from numpy import exp, sum as total
from collections import OrderedDict

K = 3
TEXT = "text"
PAIR = (1, (2.5, "x"))
STEP = np.float64(0.25)

def helper(x, by=2):
    return x * by + K

def f(x, y=10, *, z=100):
    "Its text."
    if x == 0:
        return 0
    return (x, y, z, K, TEXT, PAIR, STEP, helper(x), math.pi, sqrt(4), total([exp(0.0)]), OrderedDict, f(0))

def outer(n):
    def inner(x):
        return x + n + K
    return inner

def missing(x):
    return later + x
"""


@pytest.fixture
def main(monkeypatch):
    """The namespace of a program."""
    monkeypatch.setattr(pickled_functions, "_kept", {})
    namespace = {"__name__": "__main__"}
    exec(SOURCE, namespace)
    return types.SimpleNamespace(space=namespace, **{k: v for k, v in namespace.items() if k[0] != "_"})


def sent(function):
    return pickle.loads(pickle.dumps(function))


def keep(function):
    """Have a function kept."""
    assert kept(function) is None  # once is not worth it
    value = kept(function)
    assert value is not None
    assert kept(function) is value
    return value


@pytest.mark.parametrize("name", ["f", "helper"])
def test_it_is_the_function(main, name):
    function = getattr(main, name)
    assert sent(keep(function))(5) == cloudpickle.loads(cloudpickle.dumps(function))(5) == function(5)
    assert sent(kept(function)).__doc__ == function.__doc__


def test_a_call_of_it(main):
    for _ in range(3):
        payload = codec.dumps_call(main.f, (5, 1), {})
    assert payload.flags == BY_VALUE
    function, args, kwargs = pickled_functions.load(payload.parts[0])
    assert function(*args, **kwargs) == main.f(5, 1)
    payload = codec.dumps_call(main.f, ([5], 1), {"z": np.arange(3)})
    assert not payload.flags
    function, args, kwargs = pickle.loads(payload.parts[0])
    assert args == ([5], 1) and kwargs["z"].tolist() == [0, 1, 2]
    assert function(4) == main.f(4)


def test_what_the_arguments_share_with_it_goes_as_one(main):
    keep(main.f)
    body = codec.dumps_call(main.f, (main.helper, [main.f]), {}).parts
    function, (helper, [again]), _ = pickle.loads(b"".join(body))
    assert again is function and function.__globals__["helper"] is helper


def test_each_one_made_of_a_code(main):
    keep(eval("lambda x, y=(1, 2): x + K", main.space))
    for n in (1000, 1001):
        first, second = main.outer(n), main.outer(n)
        kept(first)
        assert kept(first) is kept(second) is not None
        assert sent(kept(first))(1) == n + 4


CHANGES = {
    "code": lambda main: setattr(main.f, "__code__", (lambda x, y=1, *, z=2: x).__code__),
    "defaults": lambda main: setattr(main.f, "__defaults__", (11,)),
    "no defaults": lambda main: setattr(main.f, "__defaults__", None),
    "keywords": lambda main: setattr(main.f, "__kwdefaults__", {"z": 101}),
    "in keywords": lambda main: main.f.__kwdefaults__.update(z=101),
    "no keywords": lambda main: main.f.__kwdefaults__.clear(),
    "text": lambda main: setattr(main.f, "__doc__", "Another text."),
    "name": lambda main: setattr(main.f, "__name__", "g"),
    "title": lambda main: setattr(main.f, "__qualname__", "A.f"),
    "attribute": lambda main: setattr(main.f, "note", 1),
    "global": lambda main: main.space.update(K=4),
    "equal global": lambda main: main.space.update(K=3.0),
    "global is a list": lambda main: main.space.update(K=[3]),
    "no global": lambda main: main.space.pop("K"),
    "module": lambda main: main.space.update(math=types.SimpleNamespace(pi=3)),
    "file": lambda main: main.space.update(__file__="elsewhere"),
    "used function": lambda main: main.space.update(helper=lambda x: x),
    "used function's code": lambda main: setattr(main.helper, "__code__", (lambda x, by: x - by).__code__),
    "used function's defaults": lambda main: setattr(main.helper, "__defaults__", (3,)),
    "used function's attribute": lambda main: setattr(main.helper, "note", 1),
    "itself": lambda main: main.space.update(f=lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(main, change):
    value = keep(main.f)
    CHANGES[change](main)
    assert kept(main.f) is not value
    if kept(main.f) is not None:
        one, other = sent(kept(main.f)), cloudpickle.loads(cloudpickle.dumps(main.f))
        for each in ("__doc__", "__name__", "__qualname__", "__defaults__", "__kwdefaults__", "__module__"):
            assert getattr(one, each) == getattr(other, each)
        assert one.__code__.co_code == other.__code__.co_code
        names = one.__globals__.keys()
        assert names == other.__globals__.keys()
        if one.__kwdefaults__ and one.__defaults__ and "K" in names:
            assert repr(one(5)) == repr(other(5))


def test_a_name_that_comes_later(main):
    value = keep(main.missing)
    main.space["later"] = 5
    assert kept(main.missing) is not value
    assert sent(kept(main.missing))(1) == 6


def test_a_cell(main):
    def outer():
        n = 1

        def inner():
            return n

        def change(to):
            nonlocal n
            n = to

        def empty():
            nonlocal n
            del n

        return inner, change, empty

    inner, change, empty = outer()
    assert sent(keep(inner))() == 1
    change(2.5)
    assert sent(kept(inner))() == 2.5
    empty()
    assert kept(inner) is None
    change([1])
    assert kept(inner) is None


def test_parts_of_packages_that_come_later(main, monkeypatch):
    import xml

    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith("xml.")})
    function = eval("lambda: xml.dom", {"__name__": "__main__", "xml": xml})
    value = keep(function)
    monkeypatch.setitem(sys.modules, "xml.dom", types.ModuleType("xml.dom"))
    assert kept(function) is not value
    assert b"xml.dom" in kept(function).head and b"xml.dom" not in value.head


def test_a_module_that_is_to_go_by_value(main):
    value = keep(main.f)
    cloudpickle.register_pickle_by_value(math)
    try:
        assert kept(main.f) is None or not kept(main.f).stands_for(main.f)
    finally:
        cloudpickle.unregister_pickle_by_value(math)
    assert value.stands_for(main.f)


def test_a_named_function_that_another_takes_the_place_of(main, monkeypatch):
    module = types.ModuleType("its_module")
    exec("def g(): return 1", module.__dict__)
    monkeypatch.setitem(sys.modules, "its_module", module)
    function = eval("lambda: g()", {"__name__": "__main__", "g": module.g})
    value = keep(function)
    assert b"its_module" in value.head
    old = module.g
    exec("def g(): return 2", module.__dict__)
    assert kept(function) is not value
    assert old() == 1 == sent(kept(function))()


@pytest.mark.parametrize(
    "thing",
    [
        [1],
        {"a": 1},
        {1},
        bytearray(b"x"),
        np.arange(3),
        np.array(1.0),
        (1, [2]),
        types.SimpleNamespace(a=1),
        type("A", (), {"__module__": "__main__"}),
        type("B", (float,), {})(1),
        types.ModuleType("of_nobody"),
        object(),
        "x" * 20_000,
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_may_change_is_pickled_each_time(main, thing):
    for function in (
        eval("lambda: thing", {"__name__": "__main__", "thing": thing}),
        (lambda: lambda: thing)(),
        eval("lambda x=thing: x", {"__name__": "__main__", "thing": thing}),
        eval("lambda: helper()", {"__name__": "__main__", "helper": lambda: thing}),
    ):
        for _ in range(10):
            assert kept(function) is None
        assert pickled_functions._kept[id(function.__code__)].tries == pickled_functions._TRIES


def test_annotations(main):
    space = {"__name__": "__main__", "A": type("A", (), {"__module__": "__main__"}), "np": np}
    exec("def f(x: np.ndarray, y: list[int] | None = None) -> float: pass\ndef g(x: A): pass", space)
    keep(space["f"])
    assert kept(space["g"]) is kept(space["g"]) is None


def test_importable_functions_are_no_concern_of_it(main):
    for function in (math.sqrt, np.sum, keep, print, np.sin):
        assert kept(function) is kept(function) is None
    assert not pickled_functions._kept


def test_one_that_always_changes_is_given_up(main, monkeypatch):
    made = []
    make = PickledFunction.__init__
    monkeypatch.setattr(
        PickledFunction, "__init__", lambda self, function: (made.append(1), make(self, function))[1]
    )
    function = main.missing
    for number in range(100, 130):
        main.space["later"] = 1000 + number
        kept(function)
    assert len(made) == pickled_functions._TRIES
    # One that changes now and then is not.
    function = main.helper
    for number in range(20):
        main.space["K"] = 1000 + number
        kept(function)
        assert kept(function) is kept(function)


def test_nothing_is_kept_alive(main):
    class Thing:
        pass

    space = {"__name__": "__main__", "thing": Thing()}
    exec("def g(): return 1\ndef f(): return g()\ndef use(): return thing", space)
    keep(space["f"])
    thing = weakref.ref(space["thing"])
    code = id(space["f"].__code__)
    space.clear()
    gc.collect()
    assert thing() is None
    assert pickled_functions._kept[code].value._modules == -1  # what it uses is gone


def test_the_table_is_short(main, monkeypatch):
    monkeypatch.setattr(pickled_functions, "_MOST", 10)
    for number in range(50):
        kept(eval(f"lambda: {number}", {"__name__": "__main__"}))
        assert len(pickled_functions._kept) <= 10


def test_none_uses_too_many(main, monkeypatch):
    monkeypatch.setattr(pickled_functions, "_DEEPEST", 5)
    space = {"__name__": "__main__"}
    exec("def f0(): pass\n" + "".join(f"def f{n + 1}(): f{n}()\n" for n in range(9)), space)
    keep(space["f4"])
    assert kept(space["f9"]) is kept(space["f9"]) is None


def test_a_global_that_not_all_processes_have_set_after_all_goes_along(monkeypatch):
    main = sys.modules["__main__"].__dict__
    monkeypatch.setattr(definitions, "_list_processes", lambda: (1, 2))
    monkeypatch.setitem(main, "of_everywhere", 7)
    function = types.FunctionType(compile("of_everywhere", "", "eval"), main, "<lambda>")
    function.__module__ = "__main__"
    definitions.define((1, 5), {"of_everywhere": 7}, (1, 2))
    try:
        assert [kept(function), kept(function)][1].stands_for(function)
        definitions.correct_holders((1, 5), {"of_everywhere": [1]})
        assert not kept(function)
    finally:
        definitions.forget(["of_everywhere"])
