"""Future: written once, cached, counted, sent about; and its face of concurrent.futures."""

import asyncio
import concurrent.futures
import copy
import pickle
import threading

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.serialization import codec
from shmdist.transport.messages import NOT_RUN
from tests.integration.helpers import meet_and_wait, reference_count, until, within


@pytest.fixture
def gate():
    """A channel on process 1 for calls to wait at."""
    return sd.RemoteChannel(lambda: sd.Channel(100))


def waiting_call(pid, gate):
    """Begin a call that waits at `gate`, and return its future when it has begun."""
    started = sd.RemoteChannel(lambda: sd.Channel(1))
    future = sd.remotecall(meet_and_wait, pid, started, gate)
    started.take(timeout=5)
    return future


def test_written_once(cluster):
    for pid in (1, cluster[0]):
        future = sd.Future(pid)
        assert future.where == pid
        assert not future.isready() and not sd.isready(future)
        assert sd.put(future, [1]) is future
        assert future.isready()
        with pytest.raises(sd.ShmdistError, match="already has a value"):
            future.put(2)
        assert future.fetch() == [1]
        assert sd.fetch(future) == [1]
        with pytest.raises(sd.ShmdistError, match="already has a value"):
            future.put(3)
        with pytest.raises(TypeError):
            sd.take(future)


def test_results_cannot_be_overwritten(cluster):
    future = sd.remotecall(list, cluster[0], "ab").wait()
    with pytest.raises(sd.ShmdistError, match="already has a value"):
        future.put(2)
    assert future.fetch() == ["a", "b"]


def test_fetch_caches_and_frees_the_remote_value(cluster):
    before = sd.remotecall_fetch(reference_count, cluster[0])
    future = sd.remotecall(list, cluster[0], "ab").wait()
    assert sd.remotecall_fetch(reference_count, cluster[0]) == before + 1
    value = future.fetch()
    until(lambda: sd.remotecall_fetch(reference_count, cluster[0]) == before)
    assert future.fetch() is value


def test_dropped_unfetched_futures_are_freed(cluster):
    before = sd.remotecall_fetch(reference_count, cluster[0])
    futures = [sd.remotecall(list, cluster[0], "ab") for _ in range(100)]
    for future in futures:
        future.wait()
    assert sd.remotecall_fetch(reference_count, cluster[0]) == before + 100
    del futures, future
    until(lambda: sd.remotecall_fetch(reference_count, cluster[0]) == before)


def test_fetch_of_anything_else_is_itself():
    thing = object()
    assert sd.fetch(thing) is thing


def test_wait_does_not_fetch(cluster):
    future = sd.remotecall(list, cluster[0], "abc")
    assert sd.wait(future) is future
    assert future.isready()
    assert sd.remotecall_fetch(reference_count, cluster[0]) >= 1
    assert future.fetch() == ["a", "b", "c"]


def test_timeouts(cluster, gate):
    call = waiting_call(cluster[0], gate)
    unwritten = [sd.Future(1), sd.Future(cluster[0])]
    for future in (call, *unwritten):
        for method in ("fetch", "wait", "result", "exception"):
            with pytest.raises(TimeoutError), within(2):
                getattr(future, method)(timeout=0.02)
        for function in (sd.fetch, sd.wait):
            with pytest.raises(TimeoutError):
                function(future, timeout=0)
    gate.put("go")
    assert call.fetch(timeout=5) == "go"
    for future in unwritten:
        future.put(7)
        assert future.fetch(timeout=1) == 7


def test_sent_to_others_before_it_is_ready(cluster, gate):
    a, b, c = cluster[:3]
    future = waiting_call(a, gate)
    readers = [sd.remotecall(sd.fetch, pid, future) for pid in (1, a, b, c)]
    gate.put({"value": 1})
    assert [reader.fetch(timeout=5) for reader in readers] == [{"value": 1}] * 4
    assert future.fetch() == {"value": 1}


def test_in_closures_and_containers(cluster):
    a, b = cluster[:2]
    future = sd.remotecall(list, a, "xy")
    assert sd.remotecall_fetch(lambda: future.fetch(), b) == ["x", "y"]
    future = sd.remotecall(list, a, "xy")
    held = {"deep": [(future,)]}
    back = sd.remotecall_fetch(lambda h: h["deep"][0][0], b, held)
    assert isinstance(back, sd.Future) and back == future and hash(back) == hash(future)
    assert back.fetch() == ["x", "y"]
    assert sd.remotecall_fetch(lambda h: h["deep"][0][0].fetch(), b, held) == ["x", "y"]


def test_returned_from_a_call(cluster):
    a, b = cluster[:2]
    inner = sd.remotecall_fetch(lambda: sd.remotecall(lambda: [sd.myid()], b), a)
    assert inner.where == b
    assert inner.fetch(timeout=5) == [b]
    outer = sd.remotecall(lambda: sd.remotecall(lambda: [sd.myid()], b), a).fetch()
    assert outer.fetch(timeout=5) == [b]


def test_written_by_a_third_process(cluster):
    a, b, c = cluster[:3]
    future = sd.Future(a)
    reader = sd.remotecall(sd.fetch, c, future)
    sd.remotecall_fetch(lambda f: sd.put(f, "from b") and None, b, future)
    assert reader.fetch(timeout=5) == "from b"
    assert future.fetch(timeout=5) == "from b"


def test_indexing_runs_on_the_owner(cluster):
    a, b = cluster[:2]
    future = sd.remotecall(lambda: {"k": [1, 2, 3], (): "empty"}, a).wait()
    assert future["k"] == [1, 2, 3]
    assert future[()] == {"k": [1, 2, 3], (): "empty"}
    assert sd.remotecall_fetch(lambda f: f["k"][1], b, future) == 2
    with pytest.raises(KeyError) as caught:
        future["none"]
    assert isinstance(caught.value, sd.RemoteException)
    array = sd.remotecall(lambda: __import__("numpy").arange(12).reshape(3, 4), a)
    assert array[1, 2] == 6
    assert array[:, 1].tolist() == [1, 5, 9]
    here = sd.Future()
    here.put([5, 6])
    assert here[1] == 6 and here[()] == [5, 6]


def test_errors_are_kept(cluster):
    future = sd.remotecall(int, cluster[0], "x")
    for _ in range(2):
        with pytest.raises(ValueError, match="invalid literal"):
            future.fetch()
    assert future.wait() is future and "failed" in repr(future)
    assert isinstance(future.exception(), ValueError)
    assert future.isready() and future.done() and not future.cancelled()
    with pytest.raises(ValueError):
        sd.remotecall_fetch(sd.fetch, cluster[1], future)


def test_errors_reach_third_processes(cluster, gate):
    a, b = cluster[:2]

    def fail(gate):
        gate.take()
        raise KeyError("gone")

    future = sd.remotecall(fail, a, gate)
    readers = [sd.remotecall(sd.fetch, b, future), sd.remotecall(lambda f: sd.wait(f).fetch(), b, future)]
    gate.put(1)
    for reader in readers:
        with pytest.raises(KeyError) as caught:
            reader.fetch(timeout=5)
        assert isinstance(caught.value, sd.RemoteException)
    with pytest.raises(KeyError):
        sd.wait(future).fetch()


def test_inert_outside_a_cluster(cluster):
    future = sd.remotecall(list, cluster[0], "ab")
    inert = pickle.loads(pickle.dumps(future))
    assert "inert" in repr(inert)
    with pytest.raises(sd.ShmdistError, match="pickled outside"):
        inert.fetch()
    future.fetch()
    assert copy.copy(future) is future and copy.deepcopy(future) is future
    assert "inert" in repr(pickle.loads(pickle.dumps(sd.Future())))


# ------------------------------------------------------------------ values that cannot be pickled


LOCK = threading.Lock()


class BecomesALock:
    """Can be sent once: what arrives cannot be sent on."""

    def __reduce__(self):
        return threading.Lock, ()


def _try_fetch(future):
    try:
        return type(future.fetch(timeout=5)).__name__
    except sd.SerializationError as error:
        return f"SerializationError: {error}"


def test_inert_whatever_the_value(cluster):
    for future in (sd.Future().put(threading.Lock()), sd.remotecall(BecomesALock, cluster[0])):
        future.fetch()
        inert = pickle.loads(pickle.dumps({"future": future}))["future"]
        assert "inert" in repr(inert) and inert == future
        with pytest.raises(sd.ShmdistError, match="pickled outside"):
            inert.fetch()
    for value in ([1, 2], "text", {"deep": (None, 1.5)}):
        future = sd.Future().put(value)
        future.fetch()
        assert pickle.loads(pickle.dumps(future)).fetch() == value
    future = sd.Future().put(lambda: 5)
    future.fetch()
    assert pickle.loads(pickle.dumps(future)).fetch()() == 5  # by value, where by name there is no way


def test_inert_with_an_error_that_cannot_be_pickled():
    class Odd(Exception):
        def __init__(self):
            super().__init__("odd")
            self.lock = threading.Lock()

    def fail():
        raise Odd

    future = sd.remotecall(fail, 1)
    with pytest.raises(Odd):
        future.fetch()
    with pytest.raises(sd.RemoteException, match="odd"):
        pickle.loads(pickle.dumps(future)).fetch()


def test_sent_on_by_its_owner_it_can_be_fetched_there(cluster):
    a, b = cluster[:2]
    for future in (sd.Future().put(LOCK), sd.remotecall(lambda: LOCK, 1)):
        assert type(future.fetch()).__name__ == "lock"
        assert "Future" in sd.remotecall_fetch(repr, a, future)
        assert "SerializationError: the value" in sd.remotecall_fetch(_try_fetch, a, future)
        back = sd.remotecall_fetch(lambda f: f, b, [future])[0]
        assert back == future and back.fetch() is future.fetch()
        assert sd.remotecall_fetch(lambda f: f.isready(), a, future)


def test_sent_on_by_another_process_it_is_fetched_or_says_why(cluster):
    a, b = cluster[:2]
    future = sd.remotecall(BecomesALock, a)
    sd.remotecall_fetch(_keep, b, future.wait())
    assert type(future.fetch()).__name__ == "lock"
    channel = sd.RemoteChannel(lambda: sd.Channel(1))
    channel.put(future)
    for pid in (a, b):  # b's reference keeps the value
        assert sd.remotecall_fetch(_try_fetch, pid, future) in ("BecomesALock", "lock")
    sd.remotecall_fetch(_keep, b, None)
    until(lambda: not sd.remotecall_fetch(_has, a, sd.remoteref_id(future)))
    for pid in (a, b):
        text = sd.remotecall_fetch(_try_fetch, pid, future)
        assert text.startswith("SerializationError") and "has it no more" in text
    assert sd.remotecall_fetch(lambda f: f.isready() and f.wait() is f, b, future)
    with pytest.raises(sd.ShmdistError, match="already has a value"):
        sd.remotecall_fetch(lambda f: f.put(1), b, future)
    again = sd.remotecall_fetch(lambda f: f, b, future)  # a reference without a count, sent on
    with pytest.raises(sd.SerializationError):
        again.fetch(timeout=5)


def _keep(ref):
    _kept[:] = [ref]


_kept = []


def _has(rrid):
    return current_node().counts.has_value(rrid)


def test_part_of_its_own_value(cluster):
    future, other = sd.Future(), sd.Future()
    future.put(["mine", other, future])
    other.put(["other", future])
    other.fetch()
    got = sd.remotecall_fetch(lambda f: [f.fetch()[0], f.fetch()[1].fetch()[0], f], cluster[0], future)
    assert got[:2] == ["mine", "other"] and got[2] == future
    future.fetch()
    got = sd.remotecall_fetch(lambda f: [f.fetch()[0], f.fetch()[2].fetch()[0]], cluster[0], future)
    assert got == ["mine", "mine"]
    assert pickle.loads(pickle.dumps(future)).fetch()[0] == "mine"
    del future.fetch()[:], other.fetch()[:]  # else they hold each other for ever
    sd.remotecall_fetch(lambda: None, cluster[0])


def test_inside_of_others_that_cannot_be_sent(cluster):
    inner = sd.Future().put({"lock": LOCK})
    inner.fetch()
    outer = sd.Future().put([inner, "rest"])
    outer.fetch()
    assert sd.remotecall_fetch(lambda f: f.fetch()[1], cluster[0], outer) == "rest"
    with pytest.raises(sd.SerializationError, match="lock"):
        sd.remotecall_fetch(len, cluster[0], [outer, LOCK])


def test_a_fetched_one_is_indexed_here(cluster):
    future = sd.remotecall(lambda: {"a": 1, "lock": BecomesALock()}, cluster[0])
    future.fetch()
    assert future["a"] == 1
    with pytest.raises(KeyError):
        future["b"]


def test_values_known_to_be_sendable_are_not_tried(cluster, monkeypatch):
    np = pytest.importorskip("numpy")

    def trial(obj):
        raise AssertionError("tried")

    monkeypatch.setattr(codec, "can_send", trial)
    for value in (1, "text", b"x" * 100_000, None, np.ones(100_000), np.ones((300, 300))[:, ::2]):
        future = sd.Future().put(value)
        future.fetch()
        assert sd.remotecall_fetch(lambda f: f._outcome is not None, cluster[0], future)


def test_repr_shows_the_state(cluster, gate):
    future = waiting_call(cluster[0], gate)
    assert "pending" in repr(future)
    gate.put(1)
    future.wait(timeout=5)
    assert "ready" in repr(future) or "fetched" in repr(future)
    future.fetch()
    assert "fetched" in repr(future)


def test_two_threads_fetch_one_future(cluster, gate):
    future = waiting_call(cluster[0], gate)
    got = []
    threads = [threading.Thread(target=lambda: got.append(future.fetch(timeout=5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.put([1])
    for thread in threads:
        thread.join(5)
    assert got == [[1]] * 8


# ---------------------------------------------------------------------- concurrent.futures


def test_result_exception_done(cluster):
    future = sd.remotecall(pow, cluster[0], 2, 3)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(timeout=5) == 8
    assert future.exception() is None
    assert future.done() and not future.running() and not future.cancelled()


def test_wait_and_as_completed(cluster, gate):
    slow = waiting_call(cluster[0], gate)
    quick = [sd.remotecall(divmod, pid, 7, 2) for pid in cluster]
    done, pending = concurrent.futures.wait(
        [slow, *quick], return_when=concurrent.futures.FIRST_COMPLETED, timeout=5
    )
    assert done and done <= set(quick) and slow in pending
    done, pending = concurrent.futures.wait(quick, timeout=5)
    assert not pending
    with pytest.raises(TimeoutError):
        list(concurrent.futures.as_completed([slow], timeout=0.02))
    gate.put("late")
    order = list(concurrent.futures.as_completed([slow, *quick], timeout=5))
    assert set(order) == {slow, *quick}
    assert slow.result() == "late"


def test_done_callbacks(cluster, gate):
    future = waiting_call(cluster[0], gate)
    seen, called = [], threading.Event()
    future.add_done_callback(lambda f: (seen.append(f), called.set()))
    assert not called.is_set()
    gate.put("x")
    assert called.wait(5)
    assert seen == [future] and future.result() == "x"
    again = threading.Event()
    future.add_done_callback(lambda f: again.set())
    assert again.wait(5)


def test_done_callbacks_of_failed_futures(cluster):
    called = threading.Event()
    future = sd.remotecall(int, cluster[0], "x")
    future.add_done_callback(lambda f: called.set())
    assert called.wait(5)
    assert isinstance(future.exception(timeout=5), ValueError)


def test_done_callbacks_of_local_futures():
    future = sd.Future()
    called = threading.Event()
    future.add_done_callback(lambda f: called.set())
    future.put(3)
    assert called.wait(5)
    assert concurrent.futures.wait([future], timeout=5).done == {future}


def test_await(cluster, gate):
    async def main():
        quick = sd.remotecall(divmod, cluster[0], 7, 2)
        assert await quick == (3, 1)
        slow = waiting_call(cluster[1], gate)
        gate.put("item")
        first, second = await asyncio.gather(asyncio.wrap_future(slow), asyncio.wrap_future(quick))
        assert (first, second) == ("item", (3, 1))
        with pytest.raises(ValueError):
            await sd.remotecall(int, cluster[0], "x")
        return await asyncio.wait_for(sd.remotecall(abs, cluster[0], -5), 5)

    assert asyncio.run(main()) == 5


def test_awaits_run_side_by_side(cluster, gate):
    async def main():
        futures = [waiting_call(pid, gate) for pid in cluster]
        waiting = [asyncio.ensure_future(asyncio.wrap_future(future)) for future in futures]
        await asyncio.sleep(0)
        assert not any(each.done() for each in waiting)
        for n in range(len(futures)):
            gate.put(n)
        return sorted(await asyncio.wait_for(asyncio.gather(*waiting), 5))

    assert asyncio.run(main()) == list(range(len(cluster)))


def test_await_times_out_and_cancels(cluster, gate):
    async def main():
        future = waiting_call(cluster[0], gate)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(future), 0.05)
        return future

    future = asyncio.run(main())
    with pytest.raises(sd.Cancelled):
        future.fetch(timeout=5)
    gate.put("still here")
    assert gate.take(timeout=5) == "still here"


def test_cancel_of_a_running_call_interrupts_it(cluster, gate):
    future = waiting_call(cluster[0], gate)
    assert future.running() and not future.done()
    assert future.cancel()
    with pytest.raises((sd.RemoteException, concurrent.futures.CancelledError)) as caught:
        future.fetch(timeout=5)
    assert "waiting_call" in str(caught.value) or "cancelled" in str(caught.value)
    assert future.done() and future.cancelled()
    assert future.cancel(), "as in concurrent.futures: it is cancelled"
    gate.put("kept")
    assert gate.take(timeout=5) == "kept"


def test_a_cancelled_call_has_no_exception():
    """As in concurrent.futures: it raises CancelledError there."""
    future = sd.Future()
    future._settle(False, sd.Cancelled("withdrawn"))
    assert future.cancelled() and future.done()
    for method in (future.exception, future.result, future.fetch):
        with pytest.raises(concurrent.futures.CancelledError) as caught:
            method(timeout=5)
        assert isinstance(caught.value, sd.ShmdistError)
    value = sd.Future().put(sd.Cancelled("a value like any other"))
    assert isinstance(value.fetch(), sd.Cancelled) and not value.cancelled() and value.exception() is None


def test_a_call_cancelled_before_it_began(cluster):
    """Its lane is held by another one, as in a map."""
    future = sd.remotecall(abs, cluster[0], -1).wait()
    reply = future._reply
    frame = reply.frame
    frame.flags, frame.body = NOT_RUN, b""
    del future._outcome
    assert future.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.exception()
    done, pending = concurrent.futures.wait([future], timeout=5)
    assert done == {future} and not pending


def test_a_call_that_raises_what_another_was_told(cluster):
    def fail():
        raise sd.Cancelled("of another call")

    future = sd.remotecall(fail, cluster[0])
    assert isinstance(future.exception(timeout=5), sd.RemoteException) and not future.cancelled()
    assert concurrent.futures.wait([future], timeout=5).done == {future}
    assert future._state == "FINISHED"


def test_the_methods_that_references_have(cluster):
    for where in (1, cluster[0]):
        future = sd.Future(where)
        assert future.isempty() and sd.isempty(future) and future.isopen() and sd.isopen(future, timeout=5)
        future.put(1)
        assert not future.isempty(timeout=5) and not sd.isempty(future, timeout=5)
        assert not future.isopen() and not sd.isopen(future)
        for close in (future.close, lambda future=future: sd.close(future)):
            with pytest.raises(TypeError, match="written once"):
                close()
        with pytest.raises(TypeError, match="fetch"):
            sd.take(future)
        with pytest.raises(AttributeError, match="fetch"):
            future.take()


def test_cancel_of_an_ended_call_is_false(cluster):
    future = sd.remotecall(abs, cluster[0], -1)
    future.wait()
    assert not future.cancel() and not future.cancelled()
    assert future.fetch() == 1
