"""What decorators make of a program's functions and classes, sent by value."""

import functools
import pickle
import sys
import threading
import types

import cloudpickle
import pytest

from shmdist.errors import SerializationError
from shmdist.serialization import codec, pickled_functions

SOURCE = """
import collections.abc
import functools

K = 3

@functools.cache
def square(x):
    "Its text."
    return x * x

@functools.lru_cache(maxsize=7, typed=True)
def typed(x):
    return x * K

@functools.cache
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

def log(f):
    @functools.wraps(f)
    def logged(*args):
        return "logged", f(*args)
    return logged

logged_cache = log(functools.cache(len))
cached_log = functools.cache(log(len))

class Own(functools.cached_property):
    pass

class A:
    def __init__(self, n):
        self.n = n

    @functools.cached_property
    def squared(self):
        "Of n."
        return square(self.n)

    @Own
    def own(self):
        return type(self) is A

    @functools.cache
    def plus(self, y):
        return self.n + y

    @classmethod
    @functools.cache
    def name(cls):
        return cls.__name__

    five = functools.partialmethod(plus, 5)

    @functools.singledispatchmethod
    def kind(self, x):
        return "object"

    @kind.register
    def _(self, x: int):
        return "int"

    @kind.register
    def _(self, x: list):
        return [visit(each) for each in x]

    @functools.singledispatchmethod
    @classmethod
    def made(cls, x):
        return cls(x)

class OwnMethod(functools.singledispatchmethod):
    pass

class B(A):
    kind = OwnMethod(lambda self, x: "object")
    kind.register(str, lambda self, x: self.n)

visit = A(0).kind  # captures what captures it

@functools.singledispatch
def kind(x):
    "Of x."
    return "object"

@kind.register
def _(x: int):
    return "int"

@kind.register
def _(x: list):
    return [kind(each) for each in x]

@kind.register
def _(x: A):
    return "A"

@kind.register
def _(x: collections.abc.Mapping):
    return "map"

kind(3), kind({})  # its cache has entries
logged_kind = log(kind)

def uses():
    return square(2), typed(2), fib(20), kind([1, None])
"""


@pytest.fixture
def main(monkeypatch):
    """The namespace of a program."""
    monkeypatch.setattr(pickled_functions, "_kept", {})
    program = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    exec(SOURCE, program.__dict__)
    return program


def sent(thing):
    """Send it to where ``__main__`` is another."""
    parts = codec.dumps(thing).parts
    here = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    # By these, cloudpickle finds a class that is here already.
    cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.clear()
    cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.clear()
    try:
        return pickle.loads(b"".join(parts))
    finally:
        sys.modules["__main__"] = here


def test_a_cached_function(main):
    main.square(5)
    square = sent(main.square)
    assert square is not main.square and type(square) is type(main.square)
    assert square.cache_info() == (0, 0, None, 0)
    assert square(4) == square(4) == 16
    assert square.cache_info().hits == 1
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        assert getattr(square, name) == getattr(main.square, name), name
    assert square.__wrapped__(3) == 9
    assert sent(main.typed).cache_parameters() == {"maxsize": 7, "typed": True}
    assert sent(main.typed)(2) == 6


def test_a_cached_function_that_calls_itself(main):
    fib = sent(main.fib)
    assert fib(30) == 832040
    assert fib.__wrapped__.__globals__["fib"] is fib
    assert fib.cache_info().currsize == 31
    assert (fib.__name__, fib.__module__) == ("fib", "__main__")


def test_a_cached_function_twice_is_one(main):
    one, [other], uses = sent((main.square, [main.square], main.uses))
    assert one is other is uses.__globals__["square"]


def test_those_that_a_function_uses(main):
    for _ in range(3):
        payload = codec.dumps_call(main.uses, (), {})
        function, args, kwargs = pickle.loads(b"".join(payload.parts))
        assert function(*args, **kwargs) == (4, 6, 6765, ["int", "object"])
        assert pickled_functions.kept(main.uses) is None  # a cached function is nothing that cannot change


def test_a_cached_lambda_and_caches_within_others(main):
    assert sent(functools.cache(lambda x: x + 1))(2) == 3
    assert sent(functools.partial(main.square, 3))() == 9
    assert sent(main.logged_cache)("ab") == sent(main.cached_log)("ab") == ("logged", 2)


@functools.cache
def importable(x):
    return x


def test_what_can_be_imported_goes_by_name(monkeypatch):
    assert sent(importable) is importable
    assert len(codec.dumps(importable).parts[0]) < 100
    assert sent(functools.singledispatch) is functools.singledispatch
    cached = functools.cache(len)  # says that it is len, which is another thing
    assert sent(cached)("ab") == 2 and sent(cached) is not len


def test_a_class(main):
    a = sent(main.A(5))
    assert type(a) is not main.A
    assert (a.squared, a.own, a.plus(3), a.name(), a.five()) == (25, True, 8, "A", 10)
    assert (a.kind(1), a.kind("")) == ("int", "object")
    assert "squared" in a.__dict__ and type(a).squared.__doc__ == "Of n."
    assert type(vars(type(a))["own"]).__name__ == "Own"
    assert sent(main.A(5).plus)(1) == 6
    assert sent(main.A.name)() == "A"
    assert sent(main.A(5).kind)(1) == "int"


def test_methods_with_singledispatch(main):
    """Sent after they were called, for Python 3.13 keeps what it has bound."""
    a, b = main.A(5), main.B(6)
    for _ in range(2):
        assert (a.kind(1), a.kind([1, ""]), main.A.made(3).n) == ("int", ["int", "object"], 3)
        assert sent(a.kind)([2, "", [3]]) == sent(main.visit)([2, "", [3]]) == ["int", "object", ["int"]]
        assert sent(main.A.made)(7).kind(8) == "int"
        assert (sent(b).kind("s"), sent(b.kind)("s")) == (6, 6)
    kind, there = sent((a.kind, a))
    assert (kind.__name__, kind.__doc__, kind.__module__) == ("kind", None, "__main__")
    kind.register(bytes, lambda self, x: self.n)
    assert kind(b"") == there.kind(b"") == sent(kind)(b"") == 5  # it is a part of the object's class
    assert a.kind(b"") == "object"
    a.bound = a.kind
    assert sent(a).bound(1) == sent(a.bound)(1) == "int"


def test_a_function_with_singledispatch(main):
    kind, kind_of_a = sent((main.kind, main.A(1)))
    assert kind([1, "s", {}, kind_of_a, [2]]) == ["int", "object", "map", "A", ["int"]]
    assert list(kind.registry) != list(main.kind.registry)  # A is another there
    assert len(kind.registry) == len(main.kind.registry)
    assert (kind.__name__, kind.__doc__, kind.__module__) == ("kind", "Of x.", "__main__")
    assert kind.__wrapped__ is kind.registry[object]
    kind.register(str, lambda x: "str")
    assert kind(["s"]) == ["str"]  # within it, it is the same
    assert main.kind("s") == "object"
    with pytest.raises(TypeError, match="kind requires at least"):
        kind()


def test_what_wraps_a_function_with_singledispatch(main):
    logged = sent(main.logged_kind)
    assert logged([1, None]) == ("logged", ["int", "object"])
    logged.register(str, lambda x: "str")
    assert logged("s") == ("logged", "str")
    assert logged.dispatch(int) is logged.registry[int]


def test_the_culprit_behind_a_decorator(main):
    main.K = threading.Lock()
    kind = functools.singledispatch(lambda x: None)
    kind.register(str, eval("lambda x: K", main.__dict__))
    with pytest.raises(SerializationError) as caught:
        codec.dumps(main.typed)
    assert caught.value.path == ".__wrapped__ uses global K"
    with pytest.raises(SerializationError) as caught:
        codec.dumps(kind)
    assert caught.value.path == ".dispatch(str) uses global K"
    bound = main.A(threading.Lock()).kind
    with pytest.raises(SerializationError) as caught:
        codec.dumps(bound)
    assert caught.value.path == " captures obj.n"
