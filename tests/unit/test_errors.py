import abc
import copy
import dataclasses
import doctest
import io
import os
import pickle
import subprocess
import sys
import threading
import traceback
import types

import pytest

import shmdist
from shmdist import errors
from shmdist.errors import (
    AuthenticationError,
    CapturedException,
    ChannelClosed,
    CompositeException,
    LaunchWorkerError,
    ProcessExitedException,
    RemoteException,
    SerializationError,
    ShmdistError,
    VersionMismatch,
    capture,
    describe_exit,
    local_exception,
    rebuild_exception,
    reduce_exception,
    remote_exception,
)

# 2 is left out: it writes the names of Python 2, where every PermissionError is an OSError.
PROTOCOLS = range(3, pickle.HIGHEST_PROTOCOL + 1)


class ReducingPickler(pickle.Pickler):
    def reducer_override(self, obj):
        return reduce_exception(obj) if isinstance(obj, BaseException) else NotImplemented


def through_dumps(obj, protocol=5):
    file = io.BytesIO()
    ReducingPickler(file, protocol).dump(obj)
    return file.getvalue()


def through_reducer(obj, protocol=5):
    return pickle.loads(through_dumps(obj, protocol))


def raised(exc):
    try:
        raise exc
    except BaseException as caught:
        return caught


# Exceptions of every odd make. None of their constructors may run a second time.


class TwoArguments(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}-{b}")
        self.a, self.b = a, b


class KeywordOnly(ValueError):
    def __init__(self, *, code):
        super().__init__("keyword only")
        self.code = code


class NoSuperInit(RuntimeError):
    def __init__(self, first, second="s"):
        self.first = first


class Slotted(Exception):
    __slots__ = ("__private", "empty", "none", "value")

    def __init__(self, value):
        super().__init__("slotted")
        self.value, self.none, self.__private = value, None, "hidden"

    def private(self):
        return self.__private


class SlottedChild(Slotted):
    __slots__ = ("more",)

    def __init__(self):
        super().__init__(5)
        self.more = [1]


class DemandingNew(Exception):
    def __new__(cls, code, *, name):
        self = super().__new__(cls, code)
        self.name = name
        return self

    def __init__(self, code, *, name):
        super().__init__(code)


class OddOS(OSError):
    def __init__(self, path, reason):
        super().__init__(2, reason, path)
        self.path = path


class OddImport(ImportError):
    def __init__(self, a, b):
        super().__init__("no foo", name="foo")
        self.ab = (a, b)


class OddUnicode(UnicodeDecodeError):
    def __init__(self, start):
        super().__init__("utf-8", b"ab\xff", start, 3, "odd")


class OddGroup(ExceptionGroup):
    def __new__(cls, label):
        self = super().__new__(cls, label, [ValueError("v"), TwoArguments(1, 2)])
        self.label = label
        return self

    def __init__(self, label):
        super().__init__(label)


class ReadOnly(Exception):
    def __init__(self, a, b):
        super().__init__("read only")
        self.__dict__["a"] = a

    def __setattr__(self, name, value):
        raise AttributeError("read only")


class HasPid(Exception):
    def __init__(self):
        super().__init__("mine")
        self.pid, self.captured = "my pid", "my captured"


class SlottedPid(Exception):
    __slots__ = ("captured", "pid")

    def __init__(self, x):
        super().__init__("mine")
        self.pid, self.captured = "my pid", "my captured"


class HidesArgs(Exception):
    args = property(lambda self: 1 / 0)


class RefusesSubclasses(Exception):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("final")


class WithMeta(Exception, metaclass=abc.ABCMeta):
    @abc.abstractmethod
    def must(self): ...


class FinalMeta(type):
    def __new__(mcs, name, bases, namespace):
        if any(isinstance(base, FinalMeta) for base in bases):
            raise TypeError("final")
        return super().__new__(mcs, name, bases, namespace)


class Final(Exception, metaclass=FinalMeta):
    def __init__(self, a, b):
        super().__init__("final")


class LyingMeta(type):
    def __call__(cls, *args):
        return (
            5
            if args and isinstance(args[0], str) and args[0].startswith("Remote")
            else super().__call__(*args)
        )

    def __new__(mcs, name, bases, namespace):
        return 5 if name.startswith("Remote") else super().__new__(mcs, name, bases, namespace)


class Lying(Exception, metaclass=LyingMeta):
    pass


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    unit: str


class Immutable(Exception):
    def __setattr__(self, name, value):
        raise TypeError("immutable")

    def __delattr__(self, name):
        raise TypeError("immutable")


class OwnStop(StopIteration):
    """Never has a value."""


class HostileAttributes(Exception):
    def __getattribute__(self, name):
        raise RuntimeError("hostile")


class BadStr(Exception):
    def __str__(self):
        raise RuntimeError("no str")

    __repr__ = __str__


class ExitingStr(Exception):
    def __str__(self):
        raise SystemExit(3)


class OwnReduce(Exception):
    def __init__(self, a, b):
        super().__init__("own")
        self.a, self.b = a, b

    def __reduce__(self):
        return OwnReduce, (self.a, self.b)


class RefusesPickling(Exception):
    def __reduce_ex__(self, protocol):
        raise TypeError("no pickling")


class OwnReduceEx(OwnReduce):
    def __reduce_ex__(self, protocol):
        return OwnReduceEx, (self.a, self.b)


class OwnSetState(Exception):
    def __setstate__(self, state):
        self.restored = state


def unicode_error():
    try:
        b"ab\xff".decode()
    except UnicodeDecodeError as error:
        return error


def syntax_error():
    try:
        compile("a b", "file.py", "exec")
    except SyntaxError as error:
        return error


def attribute_error():
    try:
        (5).nothing  # noqa: B018
    except AttributeError as error:
        return error


def with_notes():
    error = TwoArguments(1, 2)
    error.add_note("a note")
    return error


# Factory, and the fields a handler would read.
EXCEPTIONS = {
    "ValueError": (lambda: ValueError("boom"), ()),
    "empty": (lambda: ValueError(), ()),
    "KeyError": (lambda: KeyError("a"), ()),
    "MemoryError": (lambda: MemoryError("m"), ()),
    "Exception": (lambda: Exception("e", 1), ()),
    "OSError": (
        lambda: OSError(13, "denied", "a.txt", None, "b.txt"),
        ("errno", "strerror", "filename", "filename2"),
    ),
    "FileNotFoundError": (
        lambda: FileNotFoundError(2, "no file", "a.txt"),
        ("errno", "strerror", "filename"),
    ),
    "OSError, text only": (lambda: OSError("just text"), ("errno", "strerror", "filename")),
    "BlockingIOError": (lambda: BlockingIOError(11, "again", 7), ("errno", "characters_written")),
    "TimeoutError": (lambda: TimeoutError("late"), ()),
    "UnicodeDecodeError": (unicode_error, ("encoding", "object", "start", "end", "reason")),
    "ImportError": (lambda: ImportError("no", name="foo", path="p"), ("name", "path", "msg")),
    "ModuleNotFoundError": (lambda: ModuleNotFoundError("no", name="foo"), ("name", "path", "msg")),
    "SyntaxError": (syntax_error, ("filename", "lineno", "offset", "text", "msg", "end_offset")),
    "AttributeError": (attribute_error, ("name",)),
    "NameError": (lambda: NameError("no x", name="x"), ("name",)),
    "RecursionError": (lambda: RecursionError("deep"), ()),
    "ExceptionGroup": (lambda: ExceptionGroup("g", [ValueError("v"), KeyError("k")]), ("message",)),
    "TwoArguments": (lambda: TwoArguments(1, 2), ("a", "b")),
    "KeywordOnly": (lambda: KeywordOnly(code=4), ("code",)),
    "NoSuperInit": (lambda: NoSuperInit("f"), ("first",)),
    "Slotted": (lambda: Slotted([1]), ("value", "none")),
    "SlottedChild": (SlottedChild, ("value", "none", "more")),
    "DemandingNew": (lambda: DemandingNew(3, name="n"), ("name",)),
    "OddOS": (lambda: OddOS("p", "r"), ("errno", "strerror", "filename", "path")),
    "OddImport": (lambda: OddImport(1, 2), ("name", "msg", "ab")),
    "OddUnicode": (lambda: OddUnicode(2), ("encoding", "object", "start", "end", "reason")),
    "OddGroup": (lambda: OddGroup("odd"), ("label", "message")),
    "ReadOnly": (lambda: ReadOnly(1, 2), ("a",)),
    "RefusesSubclasses": (lambda: RefusesSubclasses("r"), ()),
    "WithMeta": (lambda: WithMeta("w"), ()),
    "OwnReduce": (lambda: OwnReduce(1, 2), ("a", "b")),
    "OwnReduceEx": (lambda: OwnReduceEx(1, 2), ("a", "b")),
    "OwnSetState": (lambda: OwnSetState("s"), ()),
    "Final": (lambda: Final(1, 2), ()),
    "Lying": (lambda: Lying("l"), ()),
    "Frozen": (lambda: Frozen("metre"), ("unit",)),
    "Immutable": (lambda: Immutable("i"), ()),
    "with notes": (with_notes, ("__notes__", "a")),
    "ProcessExited": (lambda: ProcessExitedException(5, exitcode=3), ("exitcode", "host")),
    "Composite": (lambda: CompositeException("c", [ValueError("v")]), ("message",)),
}
ALONE = {
    "KeyboardInterrupt": lambda: KeyboardInterrupt("stop"),
    "SystemExit": lambda: SystemExit(3),
    "GeneratorExit": GeneratorExit,
    "BaseExceptionGroup": lambda: BaseExceptionGroup("b", [KeyboardInterrupt()]),
    "bare BaseException": lambda: BaseException("bare"),
    "StopIteration": lambda: StopIteration(5),
    "StopAsyncIteration": lambda: StopAsyncIteration(5),
    "OwnStop": OwnStop,
}

every = pytest.mark.parametrize(("make", "fields"), EXCEPTIONS.values(), ids=EXCEPTIONS)
alone = pytest.mark.parametrize("make", ALONE.values(), ids=ALONE)


def assert_same_fields(got, wanted, fields):
    assert got.args == wanted.args or repr(got.args) == repr(wanted.args)
    for field in fields:
        assert getattr(got, field) == getattr(wanted, field), field
    if isinstance(wanted, ExceptionGroup):
        assert [(type(e), e.args) for e in got.exceptions] == [(type(e), e.args) for e in wanted.exceptions]


class TestTwoFaced:
    @every
    def test_is_both_and_keeps_fields(self, make, fields):
        original = raised(make())
        error = remote_exception(3, capture(original))
        assert isinstance(error, RemoteException)
        assert isinstance(error, type(original))
        assert error.pid == 3
        assert error.captured.ex is original
        assert_same_fields(error, original, fields)
        assert "\n\nRaised on process 3 (as " in str(error)
        assert str(error).startswith(error.captured.message or error.captured.type_name)
        assert type(error).__name__ == f"RemoteException[{type(original).__name__}]"
        assert repr(error).startswith(type(error).__name__ + "(3, ")

    @every
    def test_pickles_and_copies(self, make, fields):
        error = remote_exception(3, capture(raised(make())))
        copies = [pickle.loads(pickle.dumps(error, p)) for p in PROTOCOLS]
        copies += [through_reducer(error, p) for p in PROTOCOLS]
        copies += [copy.copy(error), copy.deepcopy(error)]
        for other in copies:
            assert type(other) is type(error)
            assert other.pid == 3
            assert str(other) == str(error)
            if not isinstance(error, OwnSetState):
                assert_same_fields(other, error, fields)

    @alone
    def test_alone(self, make):
        original = raised(make())
        error = remote_exception(3, capture(original))
        assert type(error) is RemoteException
        assert error.captured.ex is original
        assert error.args == vars(BaseException)["args"].__get__(original)
        assert "Raised on process 3 (as " in str(error)

    def test_of_an_original_that_guards_its_attributes(self):
        error = remote_exception(3, capture(raised(HostileAttributes("h"))))
        assert isinstance(error, HostileAttributes)
        assert (error.pid, error.args) == (3, ("h",))

    @pytest.mark.parametrize("kind", [Frozen, Immutable])
    def test_may_be_changed(self, kind):
        error = remote_exception(3, capture(raised(kind("x"))))
        error.index = 4
        error.add_note("note")
        error.__cause__ = ValueError("v")
        del error.index
        assert error.__notes__ == ["note"]
        assert not hasattr(error, "index")

    def test_what_was_set_on_it_goes_with_it(self):
        error = remote_exception(3, capture(with_notes()))
        error.index = 4
        error.add_note("another")
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert other.index == 4
            assert other.__notes__ == ["a note", "another"]
            assert other.captured.ex.__notes__ == ["a note"]
            other.add_note("third")
        assert error.__notes__ == ["a note", "another"]

    @pytest.mark.parametrize("name", ALONE)
    def test_alone_pickles(self, name):
        error = remote_exception(3, capture(raised(ALONE[name]())))
        for other in (pickle.loads(pickle.dumps(error)), through_reducer(error), copy.copy(error)):
            assert type(other) is RemoteException
            assert type(other.captured.ex) is type(error.captured.ex)
            assert str(other) == str(error)

    def test_every_builtin_exception_combines(self):
        import builtins

        kinds = {k for k in vars(builtins).values() if isinstance(k, type) and issubclass(k, Exception)}
        for kind in kinds - {ExceptionGroup, StopIteration, StopAsyncIteration}:
            ex = rebuild_exception(kind, ("text",))
            error = remote_exception(2, CapturedException(ex, kind.__name__, "text", "tb"))
            assert isinstance(error, kind), kind
            assert isinstance(error, RemoteException)

    def test_own_pid_wins_over_the_originals(self):
        for original in (HasPid(), SlottedPid(1), ProcessExitedException(5)):
            error = remote_exception(2, capture(original))
            assert isinstance(error, type(original))
            assert error.pid == 2
            assert isinstance(error.captured, CapturedException)
            assert error.captured.ex.pid in ("my pid", 5)

    def test_args_hidden_by_a_property(self):
        error = remote_exception(2, capture(HidesArgs("x")))
        assert isinstance(error, RemoteException)
        assert isinstance(error, HidesArgs)
        assert vars(BaseException)["args"].__get__(error) == ("x",)

    def test_no_user_code_runs(self, monkeypatch):
        originals = [make() for make, _ in EXCEPTIONS.values() if make().__class__.__module__ == __name__]
        for kind in {type(e) for e in originals}:
            for name in ("__init__", "__new__"):
                if name in vars(kind):
                    monkeypatch.setattr(kind, name, lambda *a, **k: pytest.fail("user code ran"))
        for original in originals:
            assert isinstance(remote_exception(2, capture(original)), type(original))

    def test_class_is_cached_and_not_kept_alive(self):
        first, second = (remote_exception(p, capture(TwoArguments(1, 2))) for p in (2, 3))
        assert type(first) is type(second)

        import gc
        import weakref

        class Passing(Exception):
            pass

        error = remote_exception(2, capture(Passing()))
        seen = weakref.ref(Passing)
        del error, Passing
        gc.collect()  # Takes the two-faced class,
        gc.collect()  # and then nothing holds the original.
        assert seen() is None

    def test_of_a_remote_exception(self):
        inner = raised(remote_exception(3, capture(raised(OddOS("p", "r")))))
        outer = remote_exception(2, capture(inner))
        assert type(outer) is type(inner)
        assert outer.pid == 2
        assert outer.captured.ex.pid == 3
        assert outer.errno == 2
        assert outer.captured.message == inner.captured.message
        text = str(outer)
        assert text.index("Raised on process 2") < text.index("Raised on process 3")
        assert str(pickle.loads(pickle.dumps(outer))) == text

    def test_group_splits(self):
        original = ExceptionGroup("g", [ValueError("v"), KeyError("k")])
        error = remote_exception(3, capture(original))
        match, rest = error.split(ValueError)
        assert [type(e) for e in match.exceptions] == [ValueError]
        assert [type(e) for e in rest.exceptions] == [KeyError]
        seen = []
        try:
            raise error
        except* ValueError as part:
            seen += part.exceptions
        except* KeyError as part:
            seen += part.exceptions
        assert [type(e) for e in seen] == [ValueError, KeyError]

    def test_notes_are_its_own(self):
        error = remote_exception(3, capture(with_notes()))
        error.add_note("more")
        assert error.captured.ex.__notes__ == ["a note"]

    def test_as_it_is_shown_uncaught(self):
        text = "".join(traceback.format_exception(remote_exception(3, capture(raised(ValueError("boom"))))))
        assert text.startswith(
            "shmdist.RemoteException[ValueError]: boom\n\nRaised on process 3 (as ValueError):\n"
        )
        assert "in raised\n    raise exc\nValueError: boom" in text

    def test_without_known_pid(self):
        assert "Raised on an unnamed process" in str(remote_exception(0, capture(KeyboardInterrupt())))

    def test_repr_is_short(self):
        assert len(repr(remote_exception(3, capture(ValueError("x" * 1000))))) < 130


class TestCapture:
    def test_chain(self):
        try:
            try:
                raise KeyError("inner")
            except KeyError as inner:
                raise TwoArguments(1, 2) from inner
        except TwoArguments as outer:
            text = capture(outer).traceback_text
        assert "KeyError: 'inner'" in text
        assert "direct cause" in text
        assert text.endswith("TwoArguments: 1-2\n")

    def test_type_name(self):
        assert capture(ValueError()).type_name == "ValueError"
        assert capture(TwoArguments(1, 2)).type_name == f"{__name__}.TwoArguments"
        assert capture(ChannelClosed()).type_name == "shmdist.ChannelClosed"

    def test_internal_frames(self):
        path = os.path.join(os.path.dirname(errors.__file__), "runtime", "machinery.py")
        namespace = {}
        exec(compile("def call(f):\n    return f()", path, "exec"), namespace)

        def user():
            namespace["call"](lambda: 1 / 0)

        with pytest.raises(ZeroDivisionError) as caught:
            namespace["call"](user)
        error = caught.value.with_traceback(caught.value.__traceback__.tb_next)
        text = capture(error).traceback_text
        assert text.count("machinery.py") == 0
        assert text.count("in user") == text.count("in <lambda>") == 1
        assert capture(error, skip_internal=False).traceback_text.count("machinery.py") == 2

    def test_internal_frames_may_be_shown(self, monkeypatch):
        path = os.path.join(os.path.dirname(errors.__file__), "machinery.py")
        namespace = {}
        exec(compile("def call(f):\n    return f()", path, "exec"), namespace)
        with pytest.raises(ZeroDivisionError) as caught:
            namespace["call"](lambda: 1 / 0)
        assert "machinery.py" not in capture(caught.value).traceback_text
        monkeypatch.setenv("SHMDIST_FULL_TRACEBACK", "1")
        assert "machinery.py" in capture(caught.value).traceback_text
        monkeypatch.setenv("SHMDIST_FULL_TRACEBACK", "0")
        assert "machinery.py" not in capture(caught.value).traceback_text

    def test_internal_frames_of_what_it_came_of(self):
        path = os.path.join(os.path.dirname(errors.__file__), "machinery.py")
        namespace = {}
        exec(compile("def call(f):\n    return f()", path, "exec"), namespace)
        try:
            try:
                namespace["call"](lambda: 1 / 0)
            except ZeroDivisionError as error:
                raise ExceptionGroup("g", [error, KeyError("k")]) from error
        except ExceptionGroup as group:
            text = capture(group).traceback_text
        assert "machinery.py" not in text
        assert text.count("in <lambda>") == 2

    def test_internal_frames_stay_where_there_are_no_others(self):
        path = os.path.join(os.path.dirname(errors.__file__), "runtime", "machinery.py")
        try:
            exec(compile("1 / 0", path, "exec"))
        except ZeroDivisionError as error:
            error.__traceback__ = error.__traceback__.tb_next
            assert "machinery.py" in capture(error).traceback_text

    @pytest.mark.parametrize("kind", [BadStr, ExitingStr, HostileAttributes])
    def test_never_raises(self, kind):
        captured = capture(raised(kind("x")))
        assert kind.__name__ in captured.type_name
        assert kind.__name__ in captured.traceback_text
        error = remote_exception(3, captured)
        assert isinstance(error, RemoteException)
        assert str(error)
        assert repr(error)

    def test_pickles_with_an_odd_original(self):
        captured = capture(raised(TwoArguments(1, 2)))
        for p in PROTOCOLS:
            other = pickle.loads(pickle.dumps(captured, p))
            assert type(other.ex) is TwoArguments
            assert (other.ex.a, other.type_name, other.message, other.traceback_text) == (
                1,
                captured.type_name,
                captured.message,
                captured.traceback_text,
            )
        assert "1-2" in repr(captured)

    @pytest.mark.parametrize(
        ("ex", "kind"),
        [
            (KeywordOnly(code=threading.Lock()), ValueError),
            (TwoArguments(1, threading.Lock()), Exception),
            (ValueError(threading.Lock()), ValueError),
            (OddOS("p", "r"), OSError),
            (OddUnicode(2), UnicodeDecodeError),
            (OwnStop(threading.Lock()), StopIteration),
            (ExceptionGroup("g", [ValueError(threading.Lock())]), Exception),
            (SystemExit(threading.Lock()), SystemExit),
        ],
    )
    def test_stand_in(self, ex, kind):
        captured = capture(raised(ex))
        other = pickle.loads(pickle.dumps(captured.stand_in()))
        assert type(other.ex) is kind
        assert other.ex.args == (captured.message,)
        assert (other.type_name, other.traceback_text) == (captured.type_name, captured.traceback_text)
        assert isinstance(remote_exception(2, other), RemoteException)
        for field in ("errno", "encoding", "start", "reason"):
            assert getattr(other.ex, field, None) == getattr(ex, field, None)

    def test_by_fields(self):
        """What pickles itself, and fails; and what has fields that no pickler takes."""

        def sendable(value):
            try:
                pickle.dumps(value)
            except Exception:
                return False
            return True

        error = raised(RefusesPickling("text", threading.Lock()))
        error.code, error.lock = 4, threading.Lock()
        other = pickle.loads(pickle.dumps(capture(error).by_fields(sendable))).ex
        assert type(other) is RefusesPickling
        assert (other.args[0], other.code, hasattr(other, "lock")) == ("text", 4, False)
        assert "lock" in other.args[1]
        group = raised(ExceptionGroup("g", [error, KeyError("k")]))
        assert [type(e) for e in capture(group).by_fields(sendable).ex.exceptions] == [Exception, KeyError]
        far = raised(remote_exception(3, capture(error)))
        again = pickle.loads(pickle.dumps(capture(far).by_fields(sendable))).ex
        assert isinstance(again, RefusesPickling)
        assert (again.pid, again.code) == (3, 4)


def nested(levels, call):
    """Raise through so many calls of one process within each other."""
    try:
        if levels:
            nested(levels - 1, call)
        else:
            1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        call(error)


class TestChains:
    """A text grows by lines with each call that an error passes, and not by doubling."""

    def test_on_one_process(self):
        def call(error):
            told = local_exception(1, error)
            if told is error:
                raise
            raise told from None

        with pytest.raises(ZeroDivisionError) as caught:
            nested(20, call)
        error = caught.value
        assert (error.pid, type(error.captured.ex)) == (1, ZeroDivisionError)
        assert len(str(error)) < 1000
        assert error.__cause__ is None
        *_, last = traceback.walk_tb(error.__traceback__)
        assert (last[0].f_code.co_name, last[0].f_locals["levels"]) == ("nested", 0)
        sent = capture(error)
        assert type(sent.ex) is ZeroDivisionError
        assert sent.traceback_text.endswith("\nZeroDivisionError: division by zero\n")
        assert "Raised on" not in sent.traceback_text

    def test_through_processes(self):
        sizes = []
        for levels in (1, 2, 12):
            pids = iter(range(2, 40))

            def call(error, pids=pids):
                raise remote_exception(next(pids), pickle.loads(pickle.dumps(capture(error)))) from None

            with pytest.raises(ZeroDivisionError) as caught:
                nested(levels, call)
            error = caught.value
            assert error.pid == 2 + levels
            assert error.captured.ex.pid == 2
            assert type(error.captured.ex.captured.ex) is ZeroDivisionError
            assert str(error).count("Raised on process ") == levels + 1
            sizes.append(len(str(error)))
        assert sizes[2] - sizes[1] < 11 * (sizes[1] - sizes[0])

    def test_what_was_set_on_the_way_arrives(self):
        first = raised(remote_exception(3, capture(raised(ValueError("v")))))
        first.index = 1
        second = raised(remote_exception(2, pickle.loads(pickle.dumps(capture(first)))))
        second.add_note("on the way")
        third = remote_exception(1, pickle.loads(pickle.dumps(capture(second))))
        assert (third.index, third.__notes__) == (1, ["on the way"])
        assert third.captured.ex.pid == 3

    def test_a_local_one_with_a_note_arrives_with_it(self):
        told = local_exception(2, raised(ValueError("v")))
        told.index = 7
        sent = pickle.loads(pickle.dumps(capture(raised(told))))
        assert remote_exception(2, sent).index == 7


class TestReduce:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @every
    def test_round_trip(self, make, fields, protocol):
        original = raised(make())
        other = through_reducer(original, protocol)
        assert type(other) is type(original)
        assert_same_fields(other, original, fields)
        if not isinstance(original, (OwnSetState, OwnReduce)):
            assert str(other) == str(original)

    @pytest.mark.parametrize("kind", [OwnReduce, OwnReduceEx])
    def test_own_pickling_is_left_alone(self, kind):
        assert reduce_exception(kind(1, 2)) is NotImplemented

    def test_own_setstate_is_left_alone(self):
        assert reduce_exception(OwnSetState("x")) is NotImplemented

    def test_private_slot(self):
        other = through_reducer(Slotted(1))
        assert other.private() == "hidden"
        assert not hasattr(other, "empty")

    def test_cause_context_notes(self):
        for kind in (lambda: TwoArguments(1, 2), lambda: ValueError("v")):
            error = kind()
            error.__cause__ = KeywordOnly(code=1)
            error.add_note("n")
            other = through_reducer(error)
            assert other.__cause__.code == 1
            assert other.__suppress_context__
            assert other.__notes__ == ["n"]
            error = kind()
            error.__suppress_context__ = True
            other = through_reducer(error)
            assert other.__cause__ is None
            assert other.__suppress_context__

    def test_cycles(self):
        a, b = TwoArguments(1, 2), TwoArguments(3, 4)
        a.__cause__, b.__cause__, a.me = b, a, a
        other = through_reducer(a)
        assert other.me is other
        assert other.__cause__.__cause__ is other

    def test_exceptions_within_survive_any_pickler(self):
        inner = TwoArguments(1, 2)
        group = OddGroup("odd")
        outer = TwoArguments(3, 4)
        outer.args, outer.many, outer.__cause__ = (inner,), {"k": [inner]}, group
        group.__cause__ = outer
        for dumps in (pickle.dumps, through_dumps):
            other = pickle.loads(dumps(capture(outer))).ex
            assert other.args[0] is other.many["k"][0]
            assert other.args[0].a == 1
            assert other.__cause__.exceptions[1].b == 2
            assert other.__cause__.__cause__ is other

    def test_own_errors_hold_odd_exceptions_under_any_pickler(self):
        group = CompositeException("c", [TwoArguments(1, 2)])
        group.__cause__ = KeywordOnly(code=3)
        other = pickle.loads(pickle.dumps(group))
        assert (other.exceptions[0].a, other.__cause__.code) == (1, 3)
        other = pickle.loads(pickle.dumps(LaunchWorkerError("m", causes=[TwoArguments(1, 2)])))
        assert other.causes[0].b == 2

    def test_attribute_error_leaves_its_object_behind(self):
        error = attribute_error()
        assert error.obj == 5
        assert through_reducer(error).obj is None
        assert remote_exception(2, capture(error)).obj == 5

    def test_no_constructor_runs(self, monkeypatch):
        error = DemandingNew(3, name="n")
        monkeypatch.setattr(DemandingNew, "__init__", lambda *a, **k: pytest.fail("ran"))
        monkeypatch.setattr(DemandingNew, "__new__", lambda *a, **k: pytest.fail("ran"))
        assert through_reducer(error).name == "n"

    def test_no_builtin_base_that_makes_instances(self):
        with pytest.raises(TypeError, match="no built-in base"):
            rebuild_exception(ExceptionGroup, ("no exceptions given",))


OWN = {
    "ShmdistError": lambda: ShmdistError("root"),
    "ProcessExited": lambda: ProcessExitedException(
        3, host="h", ospid=9, exitcode=1, signal="SIGKILL", stderr_tail=["a", "b"], oom=True, what="f"
    ),
    "Launch": lambda: LaunchWorkerError(
        "m",
        host="h",
        phase="p",
        command=["a"],
        exitcode=1,
        stderr_tail=["x"],
        pids=[2],
        causes=[ValueError("v")],
    ),
    "Closed": lambda: ChannelClosed("closed"),
    "Serialization": lambda: SerializationError("m", path="args[0]", obj_type="lock"),
    "Authentication": lambda: AuthenticationError("a", reply=b"r"),
    "Version": lambda: VersionMismatch("v", reply=b"r"),
    "Composite": lambda: CompositeException("c", [ValueError("v"), KeyboardInterrupt()]),
    "Remote": lambda: RemoteException(3, capture(ValueError("v"))),
}


class TestOwnErrors:
    @pytest.mark.parametrize("make", OWN.values(), ids=OWN)
    def test_round_trip(self, make):
        error = make()
        error.add_note("note") if not isinstance(error, RemoteException) else None
        copies = [pickle.loads(pickle.dumps(error, p)) for p in PROTOCOLS]
        for other in [*copies, through_reducer(error), copy.copy(error), copy.deepcopy(error)]:
            assert isinstance(other, type(error))
            assert str(other) == str(error)
            assert repr(other.args) == repr(error.args)
            if not isinstance(error, RemoteException):
                assert {k: repr(v) for k, v in vars(other).items()} == {
                    k: repr(v) for k, v in vars(error).items()
                }

    @pytest.mark.parametrize("make", OWN.values(), ids=OWN)
    def test_is_seen_as_of_shmdist(self, make):
        error = make()
        assert isinstance(error, ShmdistError)
        assert type(error).__module__ == "shmdist"
        assert getattr(shmdist, type(error).__name__) is type(error)
        assert "shmdist." + type(error).__name__ in traceback.format_exception_only(error)[0] + "".join(
            traceback.format_exception(error)
        )

    def test_subclass_of_a_user(self):
        error = UserError(1, b=2)
        other = pickle.loads(pickle.dumps(error))
        assert (type(other), other.b, other.args) == (UserError, 2, ("user",))

    def test_cause_travels(self):
        error = ChannelClosed("c")
        error.__cause__ = ValueError("v")
        assert repr(pickle.loads(pickle.dumps(error)).__cause__) == "ValueError('v')"

    @pytest.mark.parametrize(
        ("keywords", "text"),
        [
            ({}, "process 3 closed its connection (exit status unknown)"),
            ({"exitcode": 3}, "process 3 exited with code 3"),
            ({"exitcode": 0}, "process 3 exited with code 0"),
            ({"signal": "SIGSEGV"}, "process 3 was killed by SIGSEGV"),
            (
                {"signal": "SIGKILL"},
                "process 3 was killed by SIGKILL; SIGKILL often means the system ran out of memory",
            ),
            ({"host": "h", "ospid": 123, "exitcode": 3}, "process 3 (host h, OS pid 123) exited with code 3"),
            (
                {"exitcode": 3, "what": "train(7)", "stderr_tail": ["one\n", "two"]},
                "process 3 exited with code 3 during train(7)\nLast lines of its stderr:\n    one\n    two",
            ),
        ],
    )
    def test_process_exited_text(self, keywords, text):
        assert str(ProcessExitedException(3, **keywords)) == text

    def test_process_exited_oom(self):
        text = str(ProcessExitedException(3, signal="SIGKILL", oom=True))
        assert "was killed by SIGKILL; probably out of memory: " in text
        assert "often means" not in text

    def test_process_exited_copies_differ(self):
        first = ProcessExitedException(3)
        second = copy.copy(first)
        second.what = "f"
        assert (first.what, second.what) == (None, "f")
        assert "during f" in str(second)

    def test_launch_text(self):
        error = LaunchWorkerError(
            "no answer",
            host="h",
            phase="connect",
            command=["python", "-m", "shmdist"],
            exitcode=127,
            stderr_tail=["not found"],
            pids=[2, 3],
            causes=[ValueError("two\nlines")],
        )
        assert str(error) == (
            "no answer (host h, phase connect, exit code 127)\n"
            "Command: python -m shmdist\n"
            "Last lines of its stderr:\n    not found\n"
            "Cause: ValueError: two\n    lines\n"
            "Started and still in the cluster: 2, 3"
        )
        assert error.pids == (2, 3)
        assert str(LaunchWorkerError("m")) == "m"

    def test_serialization_text(self):
        assert str(SerializationError("m")) == "m"
        assert str(SerializationError("m", path="a.b")) == "m: a.b"


class UserError(ShmdistError):
    def __init__(self, a, *, b):
        super().__init__("user")
        self.b = b


class TestComposite:
    def test_is_a_group(self):
        group = CompositeException("sync", [ValueError("a\nb"), KeyError("k")])
        assert isinstance(group, ExceptionGroup)
        assert isinstance(group, ShmdistError)
        assert str(group) == "sync: 2 failures, the first ValueError: a"
        assert str(CompositeException("s", [ValueError("a")])) == "s: 1 failure ValueError: a"

    def test_except_star_and_split(self):
        group = CompositeException("sync", [ValueError("a"), KeyError("k"), TypeError("t")])
        seen = []
        with pytest.raises(CompositeException) as caught:
            try:
                raise group
            except* ValueError as part:
                seen.append(part)
        assert type(seen[0]) is CompositeException
        assert [type(e) for e in caught.value.exceptions] == [KeyError, TypeError]
        match, rest = group.split(KeyError)
        assert type(match) is type(rest) is CompositeException

    def test_remote_members_are_caught_by_their_type(self):
        group = CompositeException("sync", [remote_exception(2, capture(ValueError("a")))])
        seen = []
        try:
            raise group
        except* ValueError as part:
            seen += part.exceptions
        assert seen[0].pid == 2

    def test_bare_base_exceptions_are_wrapped(self):
        group = CompositeException("sync", [KeyboardInterrupt("k"), ValueError("v")], pid=4)
        first = group.exceptions[0]
        assert type(first) is RemoteException
        assert first.pid == 4
        assert isinstance(first.captured.ex, KeyboardInterrupt)
        other = pickle.loads(pickle.dumps(group))
        assert type(other.exceptions[0].captured.ex) is KeyboardInterrupt
        assert group.args[1] == other.args[1] or len(other.args[1]) == 2

    def test_as_an_iterator_and_empty(self):
        assert len(CompositeException("s", [ValueError(i) for i in range(3)]).exceptions) == 3
        with pytest.raises(ValueError, match="non-empty"):
            CompositeException("s", [])


@pytest.mark.parametrize(
    ("returncode", "wanted"),
    [
        (None, (None, None)),
        (0, (0, None)),
        (3, (3, None)),
        (-9, (None, "SIGKILL")),
        (-11, (None, "SIGSEGV")),
        (-62, (None, "signal 62")),
    ],
)
def test_describe_exit(returncode, wanted):
    assert describe_exit(returncode) == wanted


@pytest.mark.parametrize("name", [n for n in errors.__all__ if isinstance(getattr(errors, n), type)])
def test_examples_of_classes(name):
    # Their __module__ is "shmdist", so a doctest run over errors.py passes them by.
    kind = getattr(errors, name)
    runner = doctest.DocTestRunner()
    namespace = dict(vars(errors))
    tests = doctest.DocTestFinder(recurse=False).find(
        kind, name, module=types.ModuleType("shmdist"), globs=namespace
    )
    assert tests
    for test in tests:
        assert runner.run(test).failed == 0


def test_import_is_light():
    # An empty package in place of the real one, whose __init__ imports all the rest.
    code = (
        "import sys, types; before = set(sys.modules)\n"
        "package = sys.modules['shmdist'] = types.ModuleType('shmdist'); package.__path__ = [sys.argv[1]]\n"
        "import shmdist.errors; print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-S", "-c", code, os.path.dirname(errors.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "shmdist.errors" in loaded
    assert not {"traceback", "typing", "dataclasses", "inspect", "signal", "numpy"} & loaded
