"""A worker that does not read holds up nobody: what is sent to it waits, and the others are served."""

import concurrent.futures
import contextlib
import ctypes
import gc
import operator
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration import helpers
from tests.integration.helpers import Script, is_alive, until, within

SIZE = 1 << 20  # numbers, 8 MiB


@contextlib.contextmanager
def stopped(pid):
    """Let a process stand still."""
    ospid = current_node().peers.members[pid].ospid
    os.kill(ospid, signal.SIGSTOP)
    try:
        until(lambda: "(stopped)" in pathlib.Path(f"/proc/{ospid}/status").read_text())
        yield ospid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ospid, signal.SIGCONT)


@pytest.mark.parametrize("transport", ["shared memory", "stream"])
def test_calls_return_at_once_and_run_in_order(cluster, transport):
    """Also where memory is shared already."""
    pid, other, _ = cluster
    array = np.ones(SIZE)
    if transport == "shared memory":
        for _ in range(3):
            sd.remotecall_fetch(np.sum, pid, array)
    runs = sd.RemoteChannel(lambda: sd.Channel(100), other)
    with within(10):
        with stopped(pid):
            calls = []
            for n in range(8):
                array[:] = n
                calls.append(sd.remotecall(lambda n, x: (runs.put(n), x.sum())[1], pid, n, array))
            array[:] = -1  # its values were sent
            for _ in range(20):
                assert sd.remotecall_fetch(abs, other, -1) == 1
            assert not any(call.isready() for call in calls)
        assert [call.fetch() for call in calls] == [n * SIZE for n in range(8)]
    assert sorted(runs.take() for _ in calls) == list(range(8))


def test_a_worker_that_holds_the_interpreter(cluster):
    pid, other, _ = cluster
    with within(10):
        held = sd.remotecall(hold_the_interpreter, pid, 1.0)
        calls = [sd.remotecall(np.sum, pid, np.ones(SIZE)) for _ in range(4)]
        assert sd.remotecall_fetch(sd.myid, other) == other
        assert not held.isready()
        assert [call.fetch() for call in calls] == [SIZE] * 4


def hold_the_interpreter(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def test_short_calls_without_end(cluster):
    """Which the threads do that are there: with one more for each that is late, all would be later still."""
    pid = cluster[0]
    before = sd.remotecall_fetch(threads_made, pid)
    with within(10):
        with stopped(pid):
            calls = [sd.remotecall(abs, pid, -n) for n in range(5000)]
        assert [call.fetch() for call in calls] == list(range(5000))
    assert sd.remotecall_fetch(threads_made, pid) - before < 200


def test_short_calls_while_the_main_thread_waits(fresh):
    pid, other = fresh(2)
    call = sd.remotecall(sd.remotecall_fetch, pid, time.sleep, other, 1.0)
    with within(10):
        calls = [sd.remotecall(abs, pid, -n) for n in range(5000)]
        assert [call.fetch() for call in calls] == list(range(5000))
    call.fetch()


def threads_made():
    return current_node().reactor.threads._serial


def test_a_worker_that_dies_with_calls_queued(fresh):
    [pid] = fresh()
    sharing = current_node().sharing
    before = sharing.state()["lent"]
    future = sd.remotecall(np.ones, 1, 10)
    with within(10):
        with stopped(pid) as ospid:
            calls = [sd.remotecall(lambda *args: 1, pid, np.ones(SIZE), future) for _ in range(5)]
            os.kill(ospid, signal.SIGKILL)
        for call in calls:
            with pytest.raises(sd.ProcessExitedException):
                call.fetch()
    until(lambda: sharing.state()["lent"] == before)


def test_a_shared_array_is_sent_at_once(fresh):
    """Also one whose memory the stopped worker has not mapped: it comes to that before the call."""
    pid, other = fresh(2)
    array = sd.shared.ones(SIZE)
    with within(10):
        with stopped(pid):
            calls = [sd.remotecall(change, pid, array[n : n + 1], n) for n in range(20)]
            assert sd.remotecall_fetch(np.sum, other, array) == SIZE
            assert not any(call.isready() for call in calls)
        assert [call.fetch() for call in calls] == [1] * 20
    assert array[:20].tolist() == list(range(20))


def change(array, n):
    former, array[0] = array[0], n
    return former


def test_a_shared_array_that_cannot_be_mapped_after_all():
    """The calls fail, their counts come back, and later ones are sent when there are descriptors again."""
    program = """
import resource
from shmdist.runtime import segment_exchange as offers
from shmdist.runtime.node import current_node
shared = sd.shared.ones(1 << 20)
sharing = current_node().sharing
before = sharing.state()["lent"]
calls = [sd.remotecall(np.sum, pid, shared) for _ in range(3)]
limits = resource.prlimit(ospid, resource.RLIMIT_NOFILE)
opened = {int(name) for name in os.listdir(f"/proc/{ospid}/fd")}
resource.prlimit(ospid, resource.RLIMIT_NOFILE, (min(set(range(1000)) - opened), limits[1]))
os.kill(ospid, signal.SIGCONT)
for call in calls:
    try:
        call.fetch()
    except sd.RemoteException as error:
        print(type(error.__cause__ or error).__name__, "no memory to receive" in str(error), *(str(error).splitlines() if "no memory to receive" not in str(error) else ()))
resource.prlimit(ospid, resource.RLIMIT_NOFILE, limits)
until(lambda: sharing.state()["lent"] == before)
try:
    sd.remotecall(np.sum, pid, shared)
except MemoryError as error:
    print("descriptor" in str(error))

def is_sent():
    try:
        return sd.remotecall_fetch(np.sum, pid, shared) == 1 << 20
    except MemoryError:
        return False

until(is_sent, 2 * offers.RETRY_SECONDS)
print("sent")
"""
    ended = Script(PROGRAM + program).end(40)
    assert ended.code == 0, ended
    assert ended.out.split("\n")[3:] == ["True", "sent", ""], ended
    assert all(line.endswith("True") for line in ended.out.split("\n")[:3]), ended


def test_results_for_a_worker_that_stands_still(cluster):
    """Who has sent them runs other calls; the threads come back, and so do the results."""
    pid, server, other = cluster
    with within(20):
        asking = sd.remotecall(ask_many, pid, server, 8)
        until(lambda: sd.remotecall_fetch(len, server, running) == 8 or asking.isready())
        with stopped(pid):
            sd.remotecall_fetch(gate.set, server)
            until(lambda: not sd.remotecall_fetch(len, server, running))
            until(lambda: len(sd.remotecall_fetch(helpers.settled_state, server)["running"]) == 0)
            assert sd.remotecall_fetch(sd.remotecall_fetch, other, abs, server, -1) == 1
            assert not asking.isready()
        assert asking.fetch() == [n * SIZE for n in range(8)]
        sd.remotecall_fetch(gate.clear, server)


class There(list):
    """A list that is not sent, but found in the module of whoever asks for it."""

    def __reduce__(self):
        return _there, ("running",)


class Gate:
    def __init__(self):
        self._event = threading.Event()

    def set(self):
        self._event.set()

    def clear(self):
        self._event.clear()

    def wait(self):
        self._event.wait(10)

    def __reduce__(self):
        return _there, ("gate",)


def _there(name):
    return globals()[name]


running, gate = There(), Gate()


def ask_many(server, count):
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda n: float(sd.remotecall_fetch(answer, server, n).sum()), range(count)))


def answer(n):
    running.append(n)
    gate.wait()
    running.remove(n)
    return np.full(SIZE, float(n))


def test_references_in_calls_that_are_queued(cluster):
    """They live until the call has them; each count comes back."""
    pid, owner, _ = cluster
    with within(10):
        with stopped(pid):
            futures = [sd.remotecall(np.full, owner, SIZE // 8, n) for n in range(6)]
            calls = [sd.remotecall(lambda f, x: f.fetch()[0], pid, f, np.ones(SIZE)) for f in futures]
            del futures
            gc.collect()
            assert sd.remotecall_fetch(abs, owner, -1) == 1
        assert [call.fetch() for call in calls] == list(range(6))


def test_references_that_the_stopped_worker_owns(cluster):
    """To pass them on, and to drop them, nobody waits for it."""
    pid, other, third = cluster
    futures = [sd.remotecall(abs, pid, -n) for n in range(6)]
    for future in futures:
        future.wait()
    with within(10):
        with stopped(pid):
            blocking = [sd.remotecall(np.sum, pid, np.ones(SIZE)) for _ in range(2)]
            for future in futures:
                sd.remotecall_wait(id, other, future)
            del future, futures
            gc.collect()
            assert sd.remotecall_fetch(abs, third, -1) == 1
        assert [call.fetch() for call in blocking] == [SIZE] * 2


def test_an_operation_with_a_time_limit_is_not_queued(fresh):
    [pid] = fresh()
    channel = sd.RemoteChannel(lambda: sd.Channel(10), pid)
    with within(10):
        with stopped(pid):
            calls = [sd.remotecall(np.sum, pid, np.ones(SIZE)) for _ in range(2)]
            with pytest.raises(TimeoutError, match="unsent"):
                channel.put(np.ones(SIZE), timeout=0.2)
        assert [call.fetch() for call in calls] == [SIZE] * 2
    assert not channel.isready()


PROGRAM = """
import os, signal, sys, threading
import numpy as np
import shmdist as sd
from shmdist.transport import link
from tests.integration.helpers import until

def is_in(names):
    frame, found = sys._current_frames()[threading.main_thread().ident], set()
    while frame is not None:
        found.add(frame.f_code.co_name)
        frame = frame.f_back
    return found >= names

def interrupt_in(*names):
    until(lambda: is_in(set(names)))
    os.kill(os.getpid(), signal.SIGINT)

pid, other = sd.addprocs(2)
ospid = sd.remotecall_fetch(os.getpid, pid)
sd.remotecall_fetch(np.sum, pid, np.ones(3))  # it has numpy, whatever it lacks later
os.kill(ospid, signal.SIGSTOP)
array = np.ones(1 << 20)
"""


def test_beyond_the_bound_a_call_waits_and_can_be_interrupted():
    program = """
link.most_queued = lambda: 20 << 20
calls = [sd.remotecall(np.sum, pid, array) for _ in range(2)]
thread = threading.Thread(target=interrupt_in, args=("remotecall", "_wait_for_writer"))
thread.start()
try:
    while len(calls) < 4:
        calls.append(sd.remotecall(np.sum, pid, array))
except KeyboardInterrupt:
    print(len(calls))
assert sd.remotecall_fetch(abs, other, -1) == 1
os.kill(ospid, signal.SIGCONT)
assert [call.fetch() for call in calls] == [1 << 20] * 2
assert sd.remotecall_fetch(np.sum, pid, array) == 1 << 20
"""
    ended = Script(PROGRAM + program, env={"SHMDIST_ARENA_LIMIT": "0"}).end(30)
    assert ended.clean() == "2\n"


def test_an_interrupt_while_the_call_is_queued():
    """It ends the waiting; the call that never began is withdrawn when the worker goes on."""
    program = """
thread = threading.Thread(target=interrupt_in, args=("remotecall_fetch", "wait"))
thread.start()
try:
    sd.remotecall_fetch(np.sum, pid, array)
except KeyboardInterrupt:
    print("interrupted")
os.kill(ospid, signal.SIGCONT)
assert sd.remotecall_fetch(np.sum, pid, array) == 1 << 20
"""
    assert Script(PROGRAM + program).end(30).clean() == "interrupted\n"


def test_a_program_ends_with_calls_queued():
    script = Script(
        """
import os, signal
import numpy as np
import shmdist as sd
pid, _ = sd.addprocs(2)
os.kill(sd.remotecall_fetch(os.getpid, pid), signal.SIGSTOP)
calls = [sd.remotecall(np.sum, pid, np.ones(1 << 20)) for _ in range(4)]
"""
    )
    with within(10):
        assert script.end(10).code == 0


def test_a_stopped_worker_with_calls_queued_is_removed(fresh):
    [pid] = fresh()
    with within(10), stopped(pid) as ospid:
        calls = [sd.remotecall(np.sum, pid, np.ones(SIZE)) for _ in range(4)]
        sd.rmprocs(pid)
        assert not is_alive(ospid)
        for call in calls:
            with pytest.raises(sd.ProcessExitedException):
                call.fetch()


# ------------------------------------------------------------------ many elements


@contextlib.contextmanager
def goes_on_after(pid, count, stop_after=0):
    """Let a process stand still until `count` elements are done by others; yields the function for them."""
    done = sd.RemoteChannel(lambda: sd.Channel(1000), 1)
    ospid = current_node().peers.members[pid].ospid
    taken = []

    def watch():
        try:
            while len(taken) < count:
                taken.append(done.take(timeout=10))
                if len(taken) == stop_after:
                    os.kill(ospid, signal.SIGSTOP)
        finally:
            os.kill(ospid, signal.SIGCONT)

    def total(array):
        done.put(float(array[0]))
        return float(array.sum())

    with contextlib.nullcontext() if stop_after else stopped(pid):
        thread = threading.Thread(target=watch)
        thread.start()
        with within(15):
            yield total
        thread.join(10)
    assert len(taken) == count


@pytest.mark.parametrize("big", [True, False])
@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_a_map_ends_without_a_worker_that_begins_nothing(cluster, batch_size, big):
    """What was sent to it is taken back; it finds that when it goes on, and the next map has it."""
    elements = [np.full(SIZE // 8, float(n)) for n in range(40)] if big else range(3000)
    with within(10):
        with stopped(cluster[0]):
            pids = sd.pmap(who, elements, pool=cluster, batch_size=batch_size)
            assert set(pids) <= set(cluster[1:])
            assert len(pids) == len(elements)
        meeting = sd.RemoteChannel(lambda: sd.Channel(9), 1)
        assert set(sd.pmap(meet, [meeting] * 3, pool=cluster, batch_size=1)) == set(cluster)


def who(_):
    return sd.myid()


def meet(channel):
    """Return when three calls are in it."""
    channel.put(sd.myid())
    until(lambda: channel.isready() and len(channel) >= 3)
    return sd.myid()


def test_a_generator_ends_without_a_worker_that_begins_nothing(cluster):
    with within(10), stopped(cluster[1]):
        assert list(sd.pgenerate(abs, range(-1000, 0), pool=cluster)) == list(range(1000, 0, -1))


def test_a_map_over_a_shared_array_goes_on(fresh):
    """Whose memory the stopped worker has not mapped."""
    pids = fresh(3)
    array = sd.shared.ones((60, 1000))
    with within(10), stopped(pids[2]):
        assert sd.pmap(np.sum, list(array), pool=pids, batch_size=1) == [1000.0] * 60


def test_what_was_taken_back_is_no_matter_of_life_and_death(fresh):
    """The worker dies before it has found out; another map has been cancelled meanwhile."""
    pids = fresh(3)
    with within(10):
        with stopped(pids[0]) as ospid:
            assert sd.pmap(abs, range(-100, 0), pool=pids, batch_size=1) == list(range(100, 0, -1))
            results = sd.pgenerate(abs, range(-100, 0), pool=pids)
            assert [next(results) for _ in range(50)] == list(range(100, 50, -1))
            results.close()
            os.kill(ospid, signal.SIGKILL)
        until(lambda: pids[0] not in sd.workers())
        assert sd.pmap(abs, range(-100, 0), pool=pids[1:]) == list(range(100, 0, -1))


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_a_map_goes_on_with_the_others(cluster, batch_size):
    """The stopped worker has its first batches at most, which may be read already."""
    elements = [np.full(SIZE // 8, float(n)) for n in range(60)]
    with goes_on_after(cluster[1], 48) as total:
        results = sd.pmap(total, elements, pool=cluster, batch_size=batch_size)
    assert results == [n * (SIZE // 8) for n in range(60)]


def test_a_stopped_worker_that_shares_no_memory_has_one_batch(fresh):
    pids = fresh(3)
    elements = (np.full(SIZE, float(n)) for n in range(20))
    with goes_on_after(pids[0], 19) as total:
        results = sd.pmap(total, elements, pool=pids, batch_size=1)
    assert results == [n * SIZE for n in range(20)]


def test_a_worker_that_stops_in_the_middle_of_a_map(cluster):
    elements = [np.full(SIZE // 8, float(n)) for n in range(60)]
    with goes_on_after(cluster[2], 48, stop_after=10) as total:
        results = sd.pmap(total, elements, pool=cluster, batch_size=1)
    assert results == [n * (SIZE // 8) for n in range(60)]


def test_a_loop_goes_on_with_the_others(cluster):
    array = np.ones(SIZE)
    with goes_on_after(cluster[0], 2) as total:
        assert sd.distributed(operator.add, range(3), pool=cluster)(lambda _: total(array)) == 3 * SIZE


def test_everywhere_reaches_the_others(cluster):
    name = f"stuck_{os.urandom(4).hex()}"
    with within(15), stopped(cluster[0]) as ospid:
        thread = threading.Thread(
            target=sd.everywhere, args=(f"{name} = array", cluster), kwargs={"array": np.ones(SIZE)}
        )
        thread.start()
        for pid in cluster[1:]:
            until(lambda pid=pid: sd.remotecall_fetch(is_defined, pid, name))
        os.kill(ospid, signal.SIGCONT)
        thread.join(10)
        assert sd.remotecall_fetch(is_defined, cluster[0], name)
    sd.everywhere(f"del {name}, array", cluster)


def is_defined(name):
    return name in vars(sys.modules["__main__"])


def test_a_generator_yields_what_the_others_have(cluster):
    """In order, so up to the first element that is with the stopped worker."""
    pid = cluster[2]
    with within(15), stopped(pid) as ospid:
        results = sd.pgenerate(np.sum, (np.full(SIZE, float(n)) for n in range(12)), pool=cluster)
        first = [next(results), next(results)]
        os.kill(ospid, signal.SIGCONT)
        assert first + list(results) == [n * SIZE for n in range(12)]


def test_calls_by_a_pool_go_on(cluster):
    with within(15), stopped(cluster[0]) as ospid:
        pool = sd.WorkerPool(cluster)
        calls = [sd.remotecall(np.sum, pool, np.ones(SIZE)) for _ in range(3)]
        until(lambda: sum(call.isready() for call in calls) == 2)
        os.kill(ospid, signal.SIGCONT)
        assert [call.fetch() for call in calls] == [SIZE] * 3
