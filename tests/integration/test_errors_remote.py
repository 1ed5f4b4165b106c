"""What goes wrong in remote calls: how it arrives, and that nothing else suffers from it."""

import sys
import threading

import numpy as np
import pytest

import shmdist as sd
from tests.integration.helpers import within


@pytest.fixture
def pid(cluster):
    """A worker that must still answer after the test."""
    yield cluster[0]
    with within(2):
        assert sd.remotecall_fetch(abs, cluster[0], -1) == 1


def test_two_faces(pid):
    with pytest.raises(ValueError, match="invalid literal") as caught:
        sd.remotecall_fetch(int, pid, "x")
    error = caught.value
    assert isinstance(error, sd.RemoteException) and isinstance(error, sd.ShmdistError)
    assert error.pid == pid
    assert type(error.captured.ex) is ValueError and error.captured.ex.args == error.args
    with pytest.raises(sd.RemoteException):
        sd.remotecall_fetch(int, pid, "x")


def test_the_remote_traceback_is_in_the_text(pid):
    def outer():
        def inner():
            return {}["needle"]

        return inner()

    for call in (lambda: sd.remotecall_fetch(outer, pid), lambda: sd.remotecall(outer, pid).fetch()):
        with pytest.raises(KeyError) as caught:
            call()
        text = str(caught.value)
        assert "needle" in text and "inner" in text and "outer" in text and "test_errors_remote.py" in text
        assert "runtime/executor.py" not in text, "frames of the library help nobody"


def test_source_that_only_the_caller_has(pid):
    """As in a notebook, whose cells are files for `linecache` alone."""
    import linecache

    source = "def outer():\n    return inner()\n\ndef inner():\n    return {}['needle']  # in a cell\n"
    linecache.cache["/no/cell.py"] = (len(source), None, source.splitlines(True), "/no/cell.py")
    namespace = {"__name__": "__main__"}
    exec(compile(source, "/no/cell.py", "exec"), namespace)
    try:
        for call in (
            sd.remotecall_fetch,
            lambda *a: sd.remotecall(*a).fetch(),
            lambda *a: sd.pmap(lambda _: a[0](), [1]),
        ):
            with pytest.raises(KeyError) as caught:
                call(namespace["outer"], pid)
            text = str(caught.value)
            assert '/no/cell.py", line 2, in outer\n    return inner()\n' in text
            assert "/no/cell.py\", line 5, in inner\n    return {}['needle']  # in a cell\n" in text
            assert text.count("in a cell") == 1
    finally:
        del linecache.cache["/no/cell.py"]


def test_errors_on_this_process_have_two_faces_too():
    with pytest.raises(ValueError) as caught:
        sd.remotecall_fetch(int, 1, "x")
    assert isinstance(caught.value, sd.RemoteException) and caught.value.pid == 1
    with pytest.raises(ValueError) as caught:
        sd.remotecall(int, 1, "x").fetch(timeout=5)
    assert isinstance(caught.value, sd.RemoteException) and caught.value.pid == 1


def test_errors_through_several_processes(cluster):
    a, b = cluster[:2]
    with pytest.raises(ZeroDivisionError) as caught:
        sd.remotecall_fetch(lambda: sd.remotecall_fetch(lambda: 1 / 0, b), a)
    assert isinstance(caught.value, sd.RemoteException)
    assert type(caught.value.captured.ex) is not sd.RemoteException


class _Odd(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"{code}/{detail}")
        self.code, self.detail = code, detail


class _Slotted(Exception):
    __slots__ = ("extra",)

    def __init__(self, extra):
        self.extra = extra


class _WithLock(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class _NoText(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class _RefusesPickle(Exception):
    def __reduce_ex__(self, protocol):
        raise RuntimeError("no pickling")


class _RefusesState(Exception):
    def __reduce__(self):
        return _RefusesState, (), {"x": 1}

    def __setstate__(self, state):
        raise RuntimeError("no state")


def test_odd_constructors(pid):
    def fail():
        raise _Odd(7, detail="deep")

    for call in (lambda: sd.remotecall_fetch(fail, pid), lambda: sd.remotecall(fail, pid).fetch()):
        with pytest.raises(_Odd, match="7/deep") as caught:
            call()
        assert (caught.value.code, caught.value.detail) == (7, "deep")
        assert caught.value.captured.ex.code == 7


@pytest.mark.parametrize("make", [lambda: _Slotted(3), _WithLock, _NoText, _RefusesPickle, _RefusesState])
def test_awkward_exceptions_arrive(pid, make):
    def fail():
        raise make()

    name = type(make()).__name__
    with within(2):
        with pytest.raises(sd.RemoteException) as caught:
            sd.remotecall_fetch(fail, pid)
        assert name in str(caught.value) and "fail" in str(caught.value)
        with pytest.raises(sd.RemoteException):
            sd.remotecall(fail, pid).fetch(timeout=5)
    assert sd.remotecall_wait(abs, pid, -2).fetch() == 2


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_base_exceptions_of_the_program(pid, kind):
    """They end the call, not the worker, and are a RemoteException alone."""

    def fail():
        raise kind("deliberate")

    for call in (
        lambda: sd.remotecall_fetch(fail, pid),
        lambda: sd.remotecall(fail, pid).fetch(timeout=5),
        lambda: sd.remotecall_wait(fail, pid),
    ):
        with within(2), pytest.raises(sd.RemoteException) as caught:
            call()
        assert not isinstance(caught.value, kind) or kind is BaseException
        assert kind.__name__ in str(caught.value) and "deliberate" in str(caught.value)
        assert isinstance(caught.value, Exception)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_base_exceptions_of_calls_here(kind):
    def fail():
        raise kind("deliberate")

    with pytest.raises(sd.RemoteException, match="deliberate"):
        sd.remotecall(fail, 1).fetch(timeout=5)
    if kind is SystemExit:  # the other may be the user's own Ctrl-C, which must not change its type
        with pytest.raises(sd.RemoteException, match="deliberate"):
            sd.remotecall_fetch(fail, 1)


def test_exception_groups_and_causes(pid):
    def group():
        raise ExceptionGroup("several", [ValueError("one"), KeyError("two")])

    with pytest.raises(ExceptionGroup) as caught:
        sd.remotecall_fetch(group, pid)
    assert isinstance(caught.value, sd.RemoteException)
    assert [type(each) for each in caught.value.exceptions] == [ValueError, KeyError]

    def chained():
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError as error:
            raise RuntimeError("outer") from error

    with pytest.raises(RuntimeError) as caught:
        sd.remotecall_fetch(chained, pid)
    assert "ZeroDivisionError" in str(caught.value) and "outer" in str(caught.value)


def test_unpicklable_arguments_name_the_culprit(pid):
    lock = threading.Lock()
    for call in (sd.remotecall, sd.remotecall_fetch, sd.remotecall_wait, sd.remote_do):
        with pytest.raises(sd.SerializationError, match="lock") as caught:
            call(print, pid, {"inner": [1, lock]})
        assert "inner" in str(caught.value)
    with pytest.raises(sd.SerializationError, match="lock"):
        sd.remotecall_fetch(lambda: lock, pid)


def test_unpicklable_results(pid):
    def result():
        return {"key": [0, threading.Lock()]}

    with within(2), pytest.raises(sd.SerializationError, match="lock") as caught:
        sd.remotecall_fetch(result, pid)
    assert "key" in str(caught.value)
    future = sd.remotecall(result, pid)
    with within(2), pytest.raises(sd.SerializationError, match="lock"):
        future.fetch()
    # It can stay where it is, and be used there.
    future = sd.remotecall(result, pid).wait()
    assert sd.remotecall_fetch(lambda f: len(f.fetch()["key"]), pid, future) == 2


class _ReduceRaises:
    def __reduce__(self):
        raise ZeroDivisionError("in __reduce__")


def test_reduce_raises(pid):
    with pytest.raises(sd.SerializationError, match="in __reduce__"):
        sd.remotecall_fetch(print, pid, _ReduceRaises())
    with pytest.raises(sd.SerializationError, match="in __reduce__"):
        sd.remotecall_fetch(lambda: _ReduceRaises(), pid)


class _Picky:
    """Refuses to be unpickled on one of the processes."""

    def __init__(self, where):
        self.where = where

    def __setstate__(self, state):
        self.__dict__.update(state)
        if (sd.myid() == 1) == (self.where == "master"):
            raise LookupError(f"not on the {self.where}")


def test_setstate_raises_on_the_worker(pid):
    for call in (
        lambda: sd.remotecall_fetch(print, pid, _Picky("worker")),
        sd.remotecall(id, pid, _Picky("worker")).fetch,
    ):
        with within(2), pytest.raises(LookupError, match="not on the worker") as caught:
            call()
        assert isinstance(caught.value, sd.RemoteException)


def test_setstate_raises_on_the_master(pid):
    with within(2), pytest.raises(sd.SerializationError, match="not on the master") as caught:
        sd.remotecall_fetch(_Picky, pid, "master")
    assert "LookupError" in str(caught.value)
    future = sd.remotecall(_Picky, pid, "master")
    for _ in range(2):
        with within(2), pytest.raises(sd.SerializationError, match="not on the master"):
            future.fetch()
    channel = sd.RemoteChannel(lambda: sd.Channel(2), pid)
    sd.remotecall_fetch(lambda c: c.put(_Picky("master")) and None, pid, channel)
    with within(2), pytest.raises(sd.SerializationError, match="not on the master"):
        channel.fetch()


def test_references_in_an_unreadable_body_are_given_back(cluster):
    """The fixture that looks for leftovers is the proof."""
    a, b = cluster[:2]
    future = sd.remotecall(list, a, "x")
    channel = sd.RemoteChannel(a)
    with pytest.raises(LookupError):
        sd.remotecall_fetch(print, b, [future, _Picky("worker"), channel])
    with pytest.raises(LookupError):
        sd.remotecall_fetch(print, a, [_Picky("worker"), future, channel])
    with pytest.raises(sd.SerializationError):
        sd.remotecall_fetch(lambda f: [f, _Picky("master")], b, future)
    with pytest.raises(sd.SerializationError):
        sd.remotecall_fetch(print, b, [future, channel, threading.Lock()])


def test_a_module_that_the_worker_lacks(pid, tmp_path, monkeypatch):
    (tmp_path / "only_here_module.py").write_text("def f():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here_module

    with within(3), pytest.raises(ModuleNotFoundError, match="only_here_module") as caught:
        sd.remotecall_fetch(only_here_module.f, pid)
    assert isinstance(caught.value, sd.RemoteException)
    assert sys.executable in str(caught.value)
    del sys.modules["only_here_module"]


def test_an_exception_class_that_the_caller_lacks(pid, tmp_path):
    (tmp_path / "only_there_module.py").write_text("class Lost(Exception):\n    pass\n")

    def fail(folder):
        import sys

        sys.path.insert(0, folder)
        try:
            import only_there_module
        finally:
            sys.path.remove(folder)
        raise only_there_module.Lost("far away")

    with within(3), pytest.raises(sd.RemoteException, match="far away") as caught:
        sd.remotecall_fetch(fail, pid, str(tmp_path))
    assert "only_there_module.Lost" in str(caught.value)


def test_recursion_and_memory_errors(pid):
    def deep():
        return deep()

    with within(5), pytest.raises(RecursionError):
        sd.remotecall_fetch(deep, pid)

    def nested():
        value = []
        for _ in range(100_000):
            value = [value]
        return value

    with within(5), pytest.raises((RecursionError, sd.SerializationError)):
        sd.remotecall_fetch(nested, pid)
    with within(5), pytest.raises(MemoryError):
        sd.remotecall_fetch(lambda: bytearray(1 << 60), pid)


def test_errors_of_remote_do_are_printed(pid, capsys):
    from tests.integration.helpers import until

    sd.remote_do(int, pid, "needle")
    seen = []
    until(lambda: seen.append(capsys.readouterr().err) or "ValueError" in "".join(seen))
    text = "".join(seen)
    assert "needle" in text and f"From worker {pid}" in text


def test_raising_a_remote_exception_again(cluster):
    a, b = cluster[:2]
    try:
        sd.remotecall_fetch(int, a, "x")
    except ValueError as error:
        caught = error

    def reraise(error):
        raise error

    with pytest.raises(ValueError) as again:
        sd.remotecall_fetch(reraise, b, caught)
    assert isinstance(again.value, sd.RemoteException)
    assert sd.remotecall_fetch(lambda e: (type(e).__name__, e.pid), b, caught)[1] == a


def test_stopiteration_in_a_call(pid):
    def fail():
        raise StopIteration("early")

    for where in (1, pid):
        with pytest.raises(sd.RemoteException, match="early") as caught:
            sd.remotecall_fetch(fail, where)
        assert not isinstance(caught.value, StopIteration), "a generator would swallow it"
        assert caught.value.captured.ex.value == "early"


def test_only_process_1_changes_the_cluster(pid):
    for function in (lambda: sd.addprocs(1), lambda: sd.rmprocs(2)):
        with pytest.raises(sd.ShmdistError, match="only process 1"):
            sd.remotecall_fetch(function, pid)


def huge():
    return np.broadcast_to(1.0, (10**12,))


ROADS = {
    "fetch": lambda pid: sd.remotecall_fetch(huge, pid),
    "future": lambda pid: sd.remotecall(huge, pid).fetch(timeout=10),
    "map": lambda pid: sd.pmap(lambda _: huge(), [1], pool=sd.WorkerPool([pid])),
    "among others": lambda pid: sd.remotecall_fetch(lambda: ["a", np.zeros(10**6), huge()], pid),
    "argument": lambda pid: sd.remotecall_fetch(len, pid, huge()),
}


@pytest.mark.parametrize("road", ROADS)
def test_a_result_that_is_too_large_to_be_sent(pid, road):
    with pytest.raises(MemoryError, match="Unable to allocate") as caught:
        ROADS[road](pid)
    if road != "argument":  # that is found here
        assert isinstance(caught.value, sd.RemoteException)
        assert isinstance(caught.value.captured.ex, MemoryError)
        assert caught.value.pid == pid
    assert "could not be unpickled" not in str(caught.value)


@pytest.mark.parametrize("where", ["here", "there"])
def test_an_item_that_is_too_large_is_not_put(pid, where):
    channel = sd.RemoteChannel(lambda: sd.Channel(2), pid)

    def put():
        with pytest.raises(MemoryError, match="Unable to allocate"):
            channel.put(huge())
        channel.put("small")

    put() if where == "here" else sd.remotecall_fetch(put, pid)
    assert len(channel) == 1 and channel.take(timeout=10) == "small"


def test_an_answer_that_cannot_be_made(pid):
    def break_answers():
        """Have the next answer fail, as in a process that can have no further thread."""
        from shmdist.runtime.node import current_node

        node = current_node()

        def fail(*args):
            del node.requests.answer
            raise RuntimeError("can't start new thread")

        node.requests.answer = fail

    with pytest.raises(sd.RemoteException, match="could not be sent: RuntimeError: can't start") as caught:
        sd.remotecall_fetch(break_answers, pid)
    assert isinstance(caught.value, RuntimeError)
    assert "could not be unpickled" not in str(caught.value)
