"""What arrives of what is sent: pickled_functions, functions and classes, references, and errors that name the culprit.

Arrays are in test_codec_arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
import operator
import os
import pickle
import random
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.errors import SerializationError
from shmdist.serialization import arrays, codec, function_names, pickled_functions, pickler
from shmdist.serialization.codec import INLINE, Payload
from shmdist.transport.messages import BROKEN, BY_NAME, BY_VALUE, HAS_REFS, HEADER, Frame


def receive(parts: list[Any]) -> Frame:
    """Cut a frame out of its bytes, as written down in `messages`; its memory is its own."""
    data = b"".join(parts)
    kind, flags, _, lane, nbuf, call_id, body_len = HEADER.unpack_from(data)
    sizes = [body_len]
    place = HEADER.size
    lengths = data[place : place + 8 * nbuf]
    sizes += [int.from_bytes(lengths[i : i + 8], "little") for i in range(0, len(lengths), 8)]
    place += len(lengths)
    sections = []
    for size in sizes:
        sections.append(bytearray(data[place : place + size]))
        place += size
    assert place == len(data)
    return Frame(kind, flags, lane, call_id, sections[0], list(sections[1:]))


def no_references(refs: list[Any]) -> None:
    raise AssertionError(f"nothing is to be given back: {refs}")


def ship(obj: Any) -> Any:
    return codec.loads(receive(codec.frame(1, 0, 0, 0, codec.dumps(obj))), no_references)


def body_of(obj: Any) -> bytes:
    return b"".join(codec.dumps(obj).parts)


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


class Color(enum.Enum):
    RED = 1


class Odd(Exception):
    """Its constructor does not fit its args."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.a = a


def importable(x: int) -> int:
    return x + 1


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A `__main__` like a script's, with a function that runs code in it."""
    module = types.ModuleType("__main__")
    module.run = lambda source: exec(source, module.__dict__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


TEXTS = st.text(st.sampled_from("aé\ud800\U0001f40d"), max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary(max_size=9) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=8,
)


class TestRoundTrips:
    @settings(max_examples=25, deadline=None)
    @given(VALUES)
    def test_any_value(self, value: Any) -> None:
        assert ship(value) == value
        payload = codec.dumps_value(value, abs)
        assert codec.loads(receive(codec.frame(2, 0, 0, 0, payload)), no_references) == value

    @pytest.mark.parametrize(
        "value",
        [
            10**5000,
            "x" * 100_000,
            b"x" * 100_000,
            bytearray(b"x" * 100_000),
            Point(1, [Point(2)]),
            Color.RED,
            collections.OrderedDict(a=1),
            range(3),
            ...,
            int,
            Point,
            os.path.join,
            len,
            [1].append,
            Point.__eq__,
            functools.partial(importable, 3),
            slice(1, 2),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_values(self, value: Any) -> None:
        again = ship(value)
        if isinstance(value, functools.partial):
            assert again() == value()
        elif isinstance(value, types.BuiltinMethodType) and isinstance(value.__self__, list):
            assert again.__self__ == [1]
        else:
            assert again == value

    def test_shared_parts_and_cycles(self) -> None:
        part: list[Any] = []
        first, second = ship([part, part])
        assert first is second
        part.append(part)
        again = ship(part)
        assert again[0] is again

    @pytest.mark.parametrize("f", [importable, len, lambda: 0, str.upper, Point])
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((), {}),
            ((1, "a", None), {}),
            (("x" * 10_000,), {}),
            ((1,), {"k": 2}),
            (([],), {}),
            ((1,) * 9, {}),
        ],
    )
    def test_calls(self, f: Any, args: Any, kwargs: Any) -> None:
        payload = codec.dumps_call(f, args, kwargs)
        frame = receive(codec.frame(1, 0, 0, 0, payload))
        by_name = frame.flags & BY_NAME
        if frame.flags & BY_VALUE:
            function, *rest = pickled_functions.load(frame.body)
        else:
            function, *rest = (
                function_names.load(frame.body) if by_name else codec.loads(frame, no_references)
            )
        assert rest == [args, kwargs]
        assert not by_name or f in (importable, len)
        assert function is f or function.__name__ == "<lambda>"

    def test_the_environment_is_the_receivers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SHMDIST_TEST_SECRET", "do not tell")
        get, environ = ship((os.environ.get, os.environ))
        assert environ is os.environ
        assert get("SHMDIST_TEST_SECRET") == "do not tell"
        assert b"do not tell" not in body_of(os.environ)


class TestFrames:
    def test_without_a_body(self) -> None:
        [header] = codec.frame(3, 5, 2, 2**40, None)
        assert header == HEADER.pack(3, 5, 0, 2, 0, 2**40, 0)

    @pytest.mark.parametrize("size", [0, 100, codec._JOIN - 50, codec._JOIN + 50, 1 << 18])
    def test_one_body(self, size: int) -> None:
        payload = codec.dumps(b"x" * size)
        frame = receive(codec.frame(1, 16, 3, 7, payload))
        assert (frame.kind, frame.flags, frame.lane, frame.call_id, frame.buffers) == (1, 16, 3, 7, [])
        assert payload.nbytes() == len(frame.body)
        assert pickle.loads(frame.body) == b"x" * size

    @pytest.mark.parametrize("size", [INLINE - 1, INLINE, INLINE + 1])
    def test_large_buffers_leave_the_stream(self, size: int) -> None:
        memory = bytearray(b"x" * size)
        payload = codec.dumps({"a": pickle.PickleBuffer(memory), "b": 1})
        frame = receive(codec.frame(1, 0, 0, 0, payload))
        if size < INLINE:
            assert not payload.buffers
        else:
            [buffer] = payload.buffers
            assert buffer.obj is memory  # written from where it lies
            assert payload.nbytes() == len(frame.body) + size
            assert len(frame.body) < 200
        assert codec.loads(frame, no_references) == {"a": memory, "b": 1}

    def test_a_second_attempt_leaves_nothing_of_the_first(self) -> None:
        memory = pickle.PickleBuffer(bytearray(INLINE))
        payload = codec.dumps([memory, lambda: 0])  # the plain pickler stops at the lambda
        assert len(payload.buffers) == 1


class TestFunctions:
    def test_importable_by_reference(self) -> None:
        for obj in (importable, Point, [importable], functools.partial(importable, 1)):
            assert b"importable" in body_of(obj) or b"Point" in body_of(obj)
            assert b"co_" not in body_of(obj)
            assert len(body_of(obj)) < 150
        assert ship(importable) is importable

    def test_lambdas_and_closures_by_value(self) -> None:
        base = [10]

        def add(x: int, *, y: int = 5) -> int:
            return base[0] + x + y

        copy = ship(add)
        assert copy is not add
        assert copy(1, y=2) == 13
        base[0] = 0
        assert copy(1) == 16
        assert ship(lambda x: x * 2)(4) == 8
        [again] = ship([functools.partial(add, 1)])
        assert again() == 6

    def test_file_and_lines_come_along(self) -> None:
        """A traceback made where a function arrived shows the line that failed."""

        def outer(fail: bool) -> Any:
            class Inner:
                def method(self) -> Any:
                    return [(lambda: {}["needle"])() for _ in range(1)]

            def deep() -> Iterator[Any]:
                yield Inner().method()

            return next(deep()) if fail else Inner

        expected = ["outer", "deep", "method", "<lambda>"]
        for run in (functools.partial(ship(outer), True), functools.partial(ship(outer(False)).method, None)):
            with pytest.raises(KeyError) as caught:
                run()
            frames = [
                each for each in traceback.extract_tb(caught.value.__traceback__) if each.name in expected
            ]
            assert [each.name for each in frames] == expected[-len(frames) :]
            assert {each.filename for each in frames} == {__file__}
            assert "needle" in (frames[-1].line or "") and "needle" in (frames[-2].line or "")

    def test_code_that_no_compiler_makes(self) -> None:
        def template() -> Any:
            return "placeholder"

        code = template.__code__
        constants = tuple(Odd(1, 2) if each == "placeholder" else each for each in code.co_consts)
        patched = types.FunctionType(code.replace(co_consts=constants), {})
        assert type(ship(patched)()) is Odd

    def test_of_main_by_value(self, main: Any) -> None:
        main.run("""
factor = 3
class Thing:
    def __init__(self, x): self.x = x
    def scaled(self): return self.x * factor
def scale(x): return Thing(x).scaled()
def recursive(n): return 1 if n == 0 else n * recursive(n - 1)
""")
        scale, recursive, thing, kind, bound = ship(
            (main.scale, main.recursive, main.Thing(2), main.Thing, main.Thing(5).scaled)
        )
        assert scale is not main.scale
        assert kind is main.Thing or kind.__name__ == "Thing"
        assert (scale(4), recursive(4), thing.scaled(), bound()) == (12, 24, 6, 15)
        assert isinstance(thing, kind)

    def test_main_is_not_needed_at_the_other_end(self, main: Any) -> None:
        main.run("offset = 7\ndef f(x):\n    import math\n    return math.floor(x) + offset")
        body = body_of(main.f)
        del main.f, main.offset
        assert pickle.loads(body)(1.5) == 8

    def test_names_that_only_the_receivers_main_has(self, main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        main.run("""
here = "sender's"
def f(): return here, there
def outer():
    def inner(): return there
    return inner()
def missing(): return nowhere
""")
        body = body_of((main.f, main.outer, main.missing))
        receiver = types.ModuleType("__main__")
        receiver.__dict__.update(here="receiver's", there="receiver's")
        monkeypatch.setitem(sys.modules, "__main__", receiver)
        f, outer, missing = pickle.loads(body)
        assert f() == ("sender's", "receiver's")
        assert outer() == "receiver's"
        with pytest.raises(NameError, match="nowhere"):
            missing()

    def test_functions_seen_are_not_kept_alive(self) -> None:
        function_names._heads.clear()

        def closure() -> None:
            pass

        codec.dumps_call(closure, (), {})
        codec.dumps_call([].append, (1,), {})
        assert not function_names._heads
        codec.dumps_call(importable, (1,), {})
        assert set(function_names._heads) == {importable}

    def test_a_function_that_is_not_importable_any_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        old = importable
        codec.dumps_call(old, (1,), {})
        monkeypatch.setattr(sys.modules[__name__], "importable", lambda x: 0)
        function, _, _ = pickle.loads(b"".join(codec.dumps_call(old, (1,), {}).parts))
        assert function(1) == 2
        assert old not in function_names._heads

    def test_what_a_name_means_is_looked_up_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        body = b"".join(codec.dumps_call(importable, (1,), {}).parts)
        assert function_names.load(body) == (importable, (1,), {})
        monkeypatch.setattr(sys.modules[__name__], "importable", len)
        assert function_names.load(body)[0] is len
        module: Any = types.ModuleType(__name__)
        monkeypatch.setitem(sys.modules, __name__, module)
        with pytest.raises(AttributeError, match="Can't get attribute 'importable' on <module"):
            function_names.load(body)
        module.importable = abs
        assert function_names.load(body)[0] is abs

    def test_a_name_that_is_nowhere(self) -> None:
        text = b"no_such_module_at_all\0f"
        with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
            function_names.load(len(text).to_bytes(2, "little") + text + pickle.dumps(((), {})))

    def test_names_are_not_kept_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(function_names, "_MOST", 2)
        monkeypatch.setattr(function_names, "_heads", {})
        monkeypatch.setattr(function_names, "_found", {})
        for f in (len, abs, max, min, importable):
            body = b"".join(codec.dumps_call(f, (1,), {}).parts)
            assert function_names.load(body)[0] is f
            assert len(function_names._heads) <= 2
            assert len(function_names._found) <= 2

    def test_exceptions_inside(self) -> None:
        error = Odd(1, 2)
        error.__cause__ = KeyError("why")
        for again in (ship({"error": error})["error"], ship([lambda: 0, error])[1]):
            assert type(again) is Odd
            assert (str(again), again.a) == ("1 and 2", 1)
            assert repr(again.__cause__) == "KeyError('why')"

    def test_a_proxy_is_asked_for_its_type_only(self) -> None:
        """What gives itself out for an exception or a class is pickled as what it is."""
        for face in (ValueError("x"), int):
            again = ship(Proxy(face))
            assert type(again) is Proxy
            assert isinstance(again, type(face))

    def test_pickle_whole(self, main: Any) -> None:
        main.run("def f(): return 5")
        memory = bytearray(b"x" * 200_000)
        blob = codec.pickle_whole([main.f, Odd(1, 2), pickle.PickleBuffer(memory), lambda: 3])
        assert type(blob) is bytes
        f, error, buffer, three = pickle.loads(blob)
        assert (f(), str(error), buffer, three()) == (5, "1 and 2", memory, 3)
        with pytest.raises(TypeError, match="lock"):
            codec.pickle_whole(threading.Lock())


class Proxy:
    def __init__(self, face: Any) -> None:
        self.face = face

    @property
    def __class__(self) -> Any:
        return type(self.face)

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        raise TypeError

    def __reduce__(self) -> Any:
        return Proxy, (self.face,)


class Ref:
    """A reference, as `refs` has them: noted when it is pickled, and when it comes to be."""

    def __init__(self, key: tuple[int, int]) -> None:
        self.key = key


def _make_ref(key: tuple[int, int]) -> Ref:
    codec.note_created_reference(key)
    return Ref(key)


def _reduce_ref(ref: Ref, pickler: Any) -> Any:
    if pickler.payload is None:
        return Ref, (ref.key,)
    pickler.payload.refs.append(ref.key)
    return _make_ref, (ref.key,)


class Grenade:
    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise LookupError("unreadable")


def _load_inner(parts: list[Any]) -> Any:
    """Read another frame while one is being read."""
    return codec.loads(receive(parts), no_references)


class Nesting:
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return _load_inner, (self.parts,)


class TestReferences:
    @pytest.fixture(autouse=True)
    def reducer(self) -> Iterator[None]:
        codec.reducers[Ref] = _reduce_ref
        yield
        del codec.reducers[Ref]

    @staticmethod
    def load(obj: Any) -> tuple[Any, list[Any]]:
        """Ship `obj`; return what came, or the error, and what was given back."""
        given: list[Any] = []
        frame = receive(codec.frame(1, 0, 0, 0, codec.dumps(obj)))
        try:
            return codec.loads(frame, given.extend), given
        except Exception as error:
            return error, given

    def test_named_in_the_frame_apart_from_the_body(self) -> None:
        payload = codec.dumps([Ref((1, 2)), "x", pickle.PickleBuffer(bytearray(INLINE)), Ref((1, 3))])
        frame = receive(codec.frame(1, 16, 0, 0, payload))
        assert frame.flags == 16 | HAS_REFS
        assert codec.references(frame) == ((1, 2), (1, 3))
        assert len(frame.buffers) == 2
        assert codec.references(receive(codec.frame(1, 16, 0, 0, codec.dumps("none")))) == ()

    def test_all_made(self) -> None:
        value, given = self.load([Ref((1, 2)), Ref((1, 2)), Ref((1, 3)), bytearray(10)])
        assert [ref.key for ref in value[:3]] == [(1, 2), (1, 2), (1, 3)]
        assert given == []

    def test_one_object_twice_is_one_reference(self) -> None:
        ref = Ref((1, 2))
        payload = codec.dumps([ref, ref])
        assert payload.refs == [(1, 2)]

    def test_by_value_counts_once(self) -> None:
        """The plain pickler has come to the reference before it stopped."""
        payload = codec.dumps([Ref((1, 2)), lambda: 0])
        assert payload.refs == [(1, 2)]

    def test_given_back_when_the_body_cannot_be_read(self) -> None:
        error, given = self.load([Ref((1, 2)), Ref((1, 3)), Grenade(), Ref((1, 3)), Ref((1, 4))])
        assert isinstance(error, LookupError)
        assert given == [(1, 3), (1, 4)]

    def test_with_buffers(self) -> None:
        value, given = self.load([Ref((1, 2)), pickle.PickleBuffer(bytearray(b"x" * INLINE))])
        assert value[1] == b"x" * INLINE
        assert given == []

    def test_a_load_inside_a_load(self) -> None:
        inner = codec.frame(1, 0, 0, 0, codec.dumps([Ref((1, 2))]))
        value, given = self.load([Ref((1, 2)), Nesting(inner), Grenade(), Ref((1, 2))])
        assert isinstance(value, LookupError)
        assert given == [(1, 2)]
        assert codec._loading.made is None

    def test_outside_a_load(self) -> None:
        codec.note_created_reference((1, 2))
        assert self.load([Grenade(), Ref((1, 2))])[1] == [(1, 2)]

    def test_inert_in_pickle_whole(self) -> None:
        assert pickle.loads(codec.pickle_whole(Ref((1, 2)))).key == (1, 2)

    def test_of_a_broken_frame(self) -> None:
        """The link leaves the references in, or takes the flag off."""
        refs = codec.frame(1, 0, 0, 0, codec.dumps(Ref((1, 2))))
        frame = receive(refs)
        assert codec.references(Frame(1, HAS_REFS | BROKEN, 0, 0, b"", frame.buffers)) == ((1, 2),)
        assert codec.references(Frame(1, BROKEN, 0, 0, b"", [])) == ()


def test_payload_is_made_by_hand_too() -> None:
    payload = Payload()
    payload.parts.append(pickle.dumps("x"))
    assert codec.loads(receive(codec.frame(1, 0, 0, 0, payload)), no_references) == "x"


def test_unreadable() -> None:
    error = codec.unreadable(ModuleNotFoundError("No module named 'foo'", name="foo"), "the result")
    assert type(error) is SerializationError
    assert "the result could not be unpickled: ModuleNotFoundError" in str(error)
    assert sys.executable in str(error)
    assert "install" not in str(codec.unreadable(LookupError("x"), "the result"))


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda body: memoryview(bytearray(body))])
@pytest.mark.parametrize("name", [b"numpy.core", b"numpy._core", arrays.__name__.encode()])
def test_a_body_that_names_numpy_is_found_wherever_it_does(name, kind, monkeypatch):
    monkeypatch.setattr(codec, "sys", SimpleNamespace(modules={}))
    for start in (0, 65_500, 65_530, 65_536, 65_560, 200_000):
        monkeypatch.setattr(codec, "_numpy_ready", False)
        codec.prepare(kind(b"n" * start + name))
        assert codec._numpy_ready, start
    monkeypatch.setattr(codec, "_numpy_ready", False)
    codec.prepare(kind(b"numpy and shmdist.transport" * 10_000))
    assert not codec._numpy_ready


def test_no_body_is_searched_where_numpy_is_imported(monkeypatch):
    monkeypatch.setattr(codec, "_numpy_ready", False)
    spec = SimpleNamespace(_initializing=True)
    monkeypatch.setattr(codec, "sys", SimpleNamespace(modules={"numpy": SimpleNamespace(__spec__=spec)}))
    codec.prepare(b"something" * 100)
    assert not codec._numpy_ready, "half imported"
    spec._initializing = False
    codec.prepare(b"something")  # which is looked through, being short
    assert not codec._numpy_ready
    codec.prepare(b"something" * 100)
    assert codec._numpy_ready


def test_an_array_among_the_arguments_of_a_call_by_name() -> None:
    for array in (np.ones(3), np.zeros((0, 2), ">i4"), np.ones((2, 1, 3), "c16"), np.array(7, "?")):
        codec.dumps(array)  # numpy is known from here on
        payload = codec.dumps_call(operator.mul, (2, array), {})
        assert type(payload) is pickler.Named
        assert len(payload.parts[0]) < 100 + array.nbytes
        f, (two, arrived), kwargs = function_names.load(payload.parts[0])
        assert (f, two, kwargs) == (operator.mul, 2, {})
        assert (arrived.dtype, arrived.shape) == (array.dtype, array.shape)
        assert (arrived == array).all()
        assert arrived.flags.writeable and arrived is not array


@pytest.mark.parametrize("letters", ["?", "b", "u8", ">u2", "f2", "f8", "g", "F", "G"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_the_bytes_of_an_array_are_the_last_of_a_call(letters, shape) -> None:
    """Wherever it stands, and whatever its bytes are like; in calls by name and by value."""
    codec.dumps(np.ones(3))
    size = math.prod(shape) * np.dtype(letters).itemsize
    array = np.frombuffer(bytearray(random.Random(1).randbytes(size)), "u1")
    array = array.view(letters).reshape(shape) if letters != "?" else (array & 1).view(letters).reshape(shape)
    before = array.tobytes()

    def local(*args: Any) -> int:
        return len(args)

    for _ in range(2):  # from the second time on, its bytes are kept
        codec.dumps_call(local, (1,), {})
    for args in ([array], [array, "after"], [b"before", array], [1, None, array, 2.0, "([\x80"]):
        for f, kind, module in (
            (operator.mul, pickler.Named, function_names),
            (local, pickler.Valued, pickled_functions),
        ):
            payload = codec.dumps_call(f, tuple(args), {})
            assert type(payload) is kind and payload.parts[0].endswith(before)
            called, arrived, kwargs = module.load(payload.parts[0])
            assert called.__name__ == f.__name__ and kwargs == {} and type(arrived) is tuple
            for sent, came in zip(args, arrived, strict=True):
                if sent is array:
                    assert (came.dtype, came.shape, came.tobytes()) == (sent.dtype, sent.shape, before)
                    assert came.flags.carray
                    came.fill(0)  # it is its receiver's own
                else:
                    assert came == sent
    assert array.tobytes() == before


@pytest.mark.parametrize(
    "array",
    [
        np.ones(1 << 14),
        np.ones((3, 3)).T[1:],
        np.asfortranarray(np.ones((3, 3))),
        np.frombuffer(bytearray(17), "u1")[1:].view("f8"),
        np.array([None]),
        np.array(["text"]),
        np.ones(3, "M8[s]"),
        np.ones(3, [("a", "i4")]),
        np.ones(3, "f4").view(np.matrix),
    ],
)
def test_other_arrays_are_not_taken_apart(array) -> None:
    codec.dumps(np.ones(3))
    assert type(codec.dumps_call(operator.mul, (2, array), {})) is not pickler.Named
    read_only = np.ones(3)
    read_only.flags.writeable = False
    assert type(codec.dumps_call(operator.mul, (2, read_only), {})) is not pickler.Named
    assert type(codec.dumps_call(operator.mul, (np.ones(3), np.ones(3)), {})) is not pickler.Named
