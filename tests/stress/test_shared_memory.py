"""Arrays on their way between all processes, while one of them is killed at moments of chance."""

import gc
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import anonymous_bytes, settled_state, shared_bytes, until, within
from tests.integration.test_shared_memory import warm

KILLS = 100
MIB = 1 << 20

# ---------------------------------------------------------------------- on workers

traffic = threading.Event()  # set while there is to be some
wrong = []


def step(array, rest):
    """Write to a shared array, and pass it on."""
    array[sd.myid() % len(array)] += 1
    return sd.remotecall_fetch(step, rest[0], array, rest[1:]) if rest else array[1:]


def mirror(array):
    array += 1
    return array


def one_exchange(chance, others):
    peer = chance.choice(others)
    kind = chance.randrange(4)
    if kind < 2:
        size = chance.choice([4096, 35_000, 40_000, 200_000])
        value = np.full(size, chance.random())
        back = sd.remotecall_fetch(mirror, peer, value)
        assert np.array_equal(back, value + 1), "a value is not what was sent"
    elif kind == 2:
        shared = sd.shared.zeros(chance.choice([100, 100_000]))
        back = sd.remotecall_fetch(step, peer, shared, chance.sample(others, min(2, len(others))))
        back[0] = 5
        assert shared[1] == 5, "a shared array came back as a copy"
    else:
        future = sd.remotecall(mirror, peer, np.ones(50_000))
        assert sd.remotecall_fetch(lambda f: f.fetch()[3], chance.choice(others), future) == 2


def exchange(seed):
    """Exchange arrays with all others until told to stop; errors other than a death are noted."""
    chance = random.Random(seed)
    traffic.set()
    while traffic.is_set():
        others = [pid for pid in sd.procs() if pid != sd.myid()]
        try:
            one_exchange(chance, others)
        except (sd.ProcessExitedException, ValueError) as error:
            if isinstance(error, ValueError) and "there is no process" not in str(error):
                wrong.append(repr(error))
        except BaseException as error:
            wrong.append(repr(error))


def stop_exchange():
    traffic.clear()
    found, wrong[:] = list(wrong), []
    return found


def whole(dead):
    """Return what this process has of dead ones; `state` asserts that its tables are whole."""
    state = current_node().sharing.state()
    text = [f"lent {serial} to {counts}" for serial, counts in state["lent"].items() if dead & counts.keys()]
    text += [lease for lease in state["held"] if any(f"of process {pid}," in lease for pid in dead)]
    return text + [f"owed to {pid}" for pid in dead & state["unsent_releases"].keys()]


def what_holds(dead):
    """Return where this process's threads are, for what it waits, and whether the collector finds what it has."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [
        f"{names.get(ident)}: "
        + " < ".join(f"{each.name}:{each.lineno}" for each in traceback.extract_stack(at)[:-9:-1])
        for ident, at in sys._current_frames().items()
    ]
    node = current_node()
    pending = [(reply.call_id, reply.pid, reply.done) for reply in list(node.requests.pending.values())]
    own = [f"pending {pending}", f"queued {list(node.tasks.queued)}, running {list(node.tasks.running)}"]
    return "\n".join([*stacks, *own, f"collected {gc.collect()}, then {whole(dead)}"])


# ---------------------------------------------------------------------- here


def broadcasts(pids, stop, bad):
    """Send arrays to all workers at once, until told to stop."""
    number = 0
    while not stop.is_set():
        number += 1
        array = np.full(40_000, float(number))
        shared = sd.shared.zeros(64)

        def body(n, array=array, shared=shared, number=number):
            shared[n] = n
            array[n] += 1
            return float(array[n]) - number >= 1 and array[n:]

        try:
            pool = sd.CachingPool([pid for pid in list(pids) if pid in sd.workers()])
            back = sd.pmap(body, pool, range(12), retry_delays=[0.0] * 5)
            if any(each is False for each in back):
                bad.append("a broadcast array is not whole")
            del back
        except (sd.ProcessExitedException, ValueError, sd.CompositeException):
            pass
        except BaseException as error:
            bad.append(repr(error))


def nothing_of(dead, pid, when):
    """Wait until a process has nothing of dead ones."""
    found = []

    def nothing():
        found[:] = sd.remotecall_fetch(whole, pid, dead)
        return not found

    try:
        until(nothing, 30)  # a call that holds some may be the first one on workers that were just started
    except AssertionError:
        more = [f"process {each}:\n{sd.remotecall_fetch(what_holds, each, dead)}" for each in sd.procs()]
        raise AssertionError("\n\n".join([f"{when}: process {pid} still has {found}", *more])) from None


def test_one_of_four_is_killed_at_any_moment(cluster, fresh):
    """Survivors' tables are whole, they have nothing of the dead and lend it nothing; memory comes back."""
    pids = set(fresh(4))
    for number, pid in enumerate(pids):
        sd.remote_do(exchange, pid, number)
    stop, bad = threading.Event(), []
    thread = threading.Thread(target=broadcasts, args=(pids, stop, bad))
    thread.start()
    dead, spare = set(), fresh(4)
    begun = time.monotonic()
    try:
        for kill in range(KILLS):
            threading.Event().wait(random.random() / 20)
            victim = random.choice(sorted(pids))
            os.kill(current_node().peers.members[victim].ospid, signal.SIGKILL)
            pids.discard(victim)
            dead.add(victim)
            until(lambda victim=victim: victim not in sd.procs(), 5)
            for pid in (1, *pids):
                nothing_of(dead, pid, f"kill {kill}")
            if kill >= 20 and time.monotonic() - begun > 60:
                break  # this machine is slow
            if not spare:
                spare += fresh(8)  # together, for a start takes long beside such traffic
            new = spare.pop()
            pids.add(new)
            sd.remote_do(exchange, new, 100 + kill)
    finally:
        stop.set()
        thread.join(20)
        for pid in pids:
            bad += sd.remotecall_fetch(stop_exchange, pid)
    assert not thread.is_alive() and not bad, bad
    everybody = (1, *pids, *spare, *cluster)
    lent = {}

    def nothing():
        lent.update({pid: sd.remotecall_fetch(settled_state, pid)["blocks lent"] for pid in everybody})
        return not any(lent.values())

    try:
        until(nothing, 10)
    except AssertionError:
        raise AssertionError(f"still lent: {lent}") from None
    ospids = [os.getpid(), *(peer.ospid for pid, peer in current_node().peers.members.items() if pid != 1)]
    until(lambda: shared_bytes(ospids) < 8 * MIB, 12, "memory is given back")


@pytest.mark.skipif(shutil.disk_usage("/dev/shm").total < 8 << 30, reason="no 8 GiB of memory")
def test_three_gibibytes(fresh):
    [pid] = fresh()
    array = np.ones(3 << 30, "B")
    array[-1] = 7
    with within(30):
        assert sd.remotecall_fetch(lambda a: (len(a), int(a[-1]), a.flags.writeable), pid, array) == (
            3 << 30,
            7,
            True,
        )
        del array
        shared = sd.shared.empty(3 << 30, "B")
        shared[-1] = 9
        assert sd.remotecall_fetch(lambda a: int(a[-1]), pid, shared) == 9


@pytest.mark.parametrize("nbytes", [8 * MIB, MIB // 2])
def test_a_thousand_rounds_leave_memory_as_it_was(fresh, nbytes):
    """Resident and shared memory of both sides after 50 rounds, and after 1,000."""
    [pid] = fresh()
    ospids = [os.getpid(), current_node().peers.members[pid].ospid]
    array = np.ones(nbytes, "B")

    def memory():
        return [*map(anonymous_bytes, ospids), shared_bytes(ospids)]

    for turn in range(1000):
        assert len(sd.remotecall_fetch(mirror, pid, array)) == nbytes
        if turn == 50:
            before = memory()
    # An array comes by the socket when memory is just being given back, here what an earlier test
    # used: then the allocator keeps what it lay in, as much as three times that.
    for then, now in zip(before, memory(), strict=True):
        assert now - then < 4 * nbytes + 3 * MIB, (before, memory())


def test_a_killed_sender_leaves_no_descriptor_behind(fresh):
    """Segments that are offered while their owner is killed."""
    before = None
    for turn in range(8):
        a, b = fresh(2)
        warm(a, MIB)

        def offer(b):
            while True:
                kept = [sd.shared.zeros(2 << 20, "B") for _ in range(3)]
                sd.remotecall_fetch(len, b, kept[0])
                sd.remotecall_fetch(lambda x: x[0], 1, kept[1])

        sd.remote_do(offer, a, b)
        threading.Event().wait(0.05 + random.random() / 20)
        os.kill(current_node().peers.members[a].ospid, signal.SIGKILL)
        until(lambda a=a: a not in sd.procs())
        now = [shared_bytes([current_node().peers.members[b].ospid]), shared_bytes([os.getpid()])]
        assert until(lambda b=b: shared_bytes([current_node().peers.members[b].ospid]) < 8 * MIB, 5), now
        sd.rmprocs(b)
        until(lambda: not current_node().sharing.state()["held"], 5)
        fds = len(os.listdir("/proc/self/fd"))
        before = fds if turn == 1 else before
        assert turn < 2 or fds <= before + 2
