"""Errors of what cannot be sent: the text names the way to the diagnosis, and nothing hides the error itself."""

from __future__ import annotations

import copy
import functools
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from shmdist.errors import SerializationError
from shmdist.serialization import codec, diagnosis

LOCK = threading.Lock()


def importable(*args: Any, **kwargs: Any) -> None:
    pass


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held

    def method(self) -> None:
        pass


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


def failure(*args: Any, function: Any = importable, **kwargs: Any) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        codec.dumps_call(function, args, kwargs)
    assert str(caught.value).startswith("the call cannot be sent")
    return caught.value


def make_function(kind: str) -> Callable[..., Any]:
    lock = LOCK
    if kind == "captures":
        return lambda: lock
    if kind == "default":
        return lambda x=lock: x
    if kind == "two deep":

        def inner() -> Any:
            return [lock]

        return lambda: inner()
    namespace: dict[str, Any] = {"__name__": "__main__", "lock": lock}
    sources = {
        "global": "def f(): return lock",
        "inner global": "def f():\n  def g(): return lock\n  return g",
    }
    exec(sources[kind], namespace)
    f: Callable[..., Any] = namespace["f"]
    return f


class TestPaths:
    @pytest.mark.parametrize(
        ("args", "path"),
        [
            ((LOCK,), "args[0]"),
            ((1, [0, (LOCK,)]), "args[1][1][0]"),
            (({"lock": LOCK},), "args[0]['lock']"),
            (({"a": {"b": [LOCK]}},), "args[0]['a']['b'][0]"),
            ((Holder({"x": LOCK}),), "args[0].held['x']"),
            ((Slotted(LOCK),), "args[0].held"),
            ((Holder(LOCK).method,), "args[0].__self__.held"),
            ((functools.partial(importable, 1, LOCK),), "args[0].args[1]"),
            ((functools.partial(importable, key=LOCK),), "args[0].keywords['key']"),
            ((functools.partial(lambda: LOCK),), "args[0].func uses global LOCK"),
            ((ValueError("x", LOCK),), "args[0].args[1]"),
        ],
    )
    def test_of_arguments(self, args: Any, path: str) -> None:
        error = failure(*args)
        assert (error.path, error.obj_type) in [(path, "_thread.lock"), (None, None)]
        assert path in str(error)
        assert "cannot pickle '_thread.lock' object" in str(error)

    def test_of_keyword_arguments(self) -> None:
        assert failure(1, model=[LOCK]).path == "argument model[0]"

    @pytest.mark.parametrize(
        ("kind", "path"),
        [
            ("captures", "function captures lock"),
            ("default", "function.__defaults__[0]"),
            ("two deep", "function captures inner captures lock"),
            ("global", "function uses global lock"),
            ("inner global", "function uses global lock"),
        ],
    )
    def test_of_functions(self, kind: str, path: str) -> None:
        assert failure(function=make_function(kind)).path == path
        nested = failure({"f": make_function(kind)}).path
        assert nested == path.replace("function", "args[0]['f']", 1)

    def test_of_classes_by_value(self) -> None:
        class Local:
            lock = LOCK

        assert failure(Local).path == "args[0].lock"
        assert failure(Local()).path == "args[0].__class__.lock"

    def test_of_keys_and_members(self) -> None:
        generator = (i for i in "")
        assert str(failure({generator: 1}).path).startswith("args[0] key <generator")
        assert str(failure({1, generator}).path).startswith("args[0] member <generator")

    def test_the_first_of_several(self) -> None:
        assert failure(1, LOCK, LOCK).path == "args[1]"

    def test_of_other_things_than_calls(self) -> None:
        with pytest.raises(SerializationError) as caught:
            codec.dumps({"key": [0, LOCK]}, "the result of f")
        assert caught.value.path == "['key'][1]"
        with pytest.raises(SerializationError) as caught:
            codec.dumps(LOCK, "the result of f")
        assert (caught.value.path, caught.value.obj_type) == (None, "_thread.lock")
        assert str(caught.value).startswith("the result of f cannot be sent, for it cannot be pickled")

    def test_cycles_end(self) -> None:
        loop: list[Any] = []
        loop.append(loop)
        loop.append(LOCK)
        assert str(failure(loop).path).startswith("args[0][0]")

    def test_deep_ones_end(self) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        error = failure(deep)
        assert str(error.path).startswith("args[0][0]")
        assert len(str(error)) < 1000
        while deep:  # or taking it apart would recurse
            deep = deep[0]

    def test_wide_ones_are_not_looked_through_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(diagnosis, "_MOST", 20)
        assert failure([*range(50), LOCK]).path == "args[0]"


class _ReprRaises:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class _Attributes:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no attributes")

    def __reduce__(self) -> Any:
        raise LookupError("no reduce")


class _StrRaises(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class _Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class TestHostileObjects:
    def test_a_repr_that_raises(self) -> None:
        assert failure({_ReprRaises(): LOCK}).path == "args[0]"

    def test_attributes_that_raise(self) -> None:
        error = failure(_Attributes())
        assert error.path == "args[0]"
        assert "LookupError: no reduce" in str(error)

    def test_an_error_without_text(self) -> None:
        assert "(_StrRaises)" in str(failure(_Raises(_StrRaises())))

    @pytest.mark.parametrize("error", [GeneratorExit(), LookupError("deep"), pytest.UsageError("x")])
    def test_any_error_of_reduce(self, error: BaseException) -> None:
        assert type(error).__name__ in str(failure(_Raises(error)))

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
    def test_what_is_no_fault_of_the_object(self, kind: type[BaseException]) -> None:
        with pytest.raises(kind):
            codec.dumps([_Raises(kind())])
        with pytest.raises(kind):
            codec.dumps([lambda: 0, _Raises(kind())])

    def test_the_traceback_shows_the_picklers_error_alone(self) -> None:
        error = failure(lambda: LOCK)
        text = "".join(traceback.format_exception(error))
        assert "TypeError: cannot pickle '_thread.lock' object" in text
        assert "_ByValue" not in text
        assert "During handling" not in text

    def test_it_travels_itself(self) -> None:
        error = failure({"lock": LOCK})
        again = copy.copy(error)
        assert (str(again), again.path, again.obj_type) == (str(error), error.path, error.obj_type)
