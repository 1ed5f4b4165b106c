"""An array that goes to several workers of one other host crosses the network once."""

import os
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import shmdist as sd
from shmdist.evaluation import _At
from shmdist.runtime import host_copies
from shmdist.runtime.node import current_node
from shmdist.scheduling.function_broadcast import BroadcastFunction
from shmdist.serialization.arrays import LINE
from shmdist.transport import listener
from tests.integration import helpers
from tests.integration.helpers import until, within
from tests.integration.kinds import KINDS, same
from tests.integration.sshd import Host, can_make_hosts, later

MIB = 1 << 20
N = MIB // 8  # items of 8 bytes in a MiB
SENT = 120  # where the system tells how many bytes of a connection have arrived


class ByTCP(sd.LocalManager):
    """Workers of this host that are reached as those of another one are: no AF_UNIX, no shared memory."""

    def default_params(self):
        return {**super().default_params(), "restrict": False}

    def connect(self, id, config):
        return listener.connect(("tcp", (config.bind_addr, config.port)))


@pytest.fixture(scope="module", autouse=True)
def _default_pool():
    sd.default_worker_pool()  # made on first use, and it has a channel


@pytest.fixture
def far(fresh):
    """Adds workers that are far from this process, and near each other."""

    def add(n, **params):
        pids = fresh(ByTCP(n), **params)
        assert not any(current_node().peers.links[pid].is_local for pid in pids)
        return pids

    return add


class Sent:
    """How many MiB went to workers since it was made, or since it was last looked at."""

    def __init__(self, pids):
        self._links = [current_node().peers.links[pid] for pid in pids]
        self._before = self._count()

    def _count(self):
        infos = [
            link.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            for link in self._links
            if not link.closed
        ]
        return sum(struct.unpack_from("Q", info, SENT)[0] for info in infos)

    def mib(self):
        before, self._before = self._before, self._count()
        return round((self._before - before) / MIB, 1)


def write(array):
    """Write to an array, as nobody else may see."""
    array += 1
    return float(array.min()), float(array.max())


def kept():
    """Return what this process still has of others' copies."""
    return list(current_node().sharing.copies.lending.table)


def all_forgotten(pids):
    return not any(sd.remotecall_fetch(kept, pid) for pid in pids)


# ---------------------------------------------------------------------- what is sent once


def test_everywhere(far):
    pids = far(3)
    sent = Sent(pids)
    array = np.zeros(4 * N)
    for _ in range(2):
        sd.everywhere("big += 1; answer = float(big.sum())", pids, big=array)
        assert 4 <= sent.mib() < 4.2
        assert [sd.remotecall_fetch(sd.remotecall_eval, pid, "__main__", 1, "1") for pid in pids] == [1] * 3
        assert [sd.remotecall_eval("__main__", pid, "answer") for pid in pids] == [4.0 * N] * 3
    assert not array.any()
    assert all_forgotten(pids)
    sd.clear(["big"], pids)


def test_closure_of_a_map_and_of_a_loop(far):
    pids = far(3)
    pool = sd.WorkerPool(pids)
    sent = Sent(pids)
    array = np.arange(4.0 * N)
    assert sd.pmap(lambda i: float(array[i]), range(12), pool=pool, batch_size=1) == list(range(12))
    assert 4 <= sent.mib() < 4.2

    @sd.distributed(np.add)
    def total(i):
        return array[i]

    assert total(range(100)) == 4950
    assert 4 <= sent.mib() < 4.2
    until(lambda: all_forgotten(pids))


def test_caching_pool_sends_what_was_captured(far):
    pids = far(3)
    pool = sd.CachingPool(pids)
    array = np.zeros(4 * N)

    def look():
        return write(array)

    sent = Sent(pids)
    started = [sd.remotecall(look, pool)]
    array += 7  # the call has returned
    started += [sd.remotecall(look, pool) for _ in range(2)]
    assert [future.fetch() for future in started] == [(1.0, 1.0)] * 3
    assert 4 <= sent.mib() < 4.2
    assert sorted(sd.remotecall_fetch(look, pool)[0] for _ in range(3)) == [2.0, 2.0, 2.0]
    assert sent.mib() < 0.1
    sd.clear(pool)
    until(lambda: all_forgotten(pids))


def test_views_of_one_array(far):
    pids = far(2)
    array = np.arange(4.0 * N)
    windows = [array[start : start + 2 * N] for start in range(0, 2 * N, N // 8)]
    sent = Sent(pids)
    expected = [(window[0] + 1, window[-1] + 1) for window in windows]
    for batch_size in (1, 5):
        assert sd.pmap(write, windows, pool=sd.WorkerPool(pids), batch_size=batch_size) == expected
        assert 4 <= sent.mib() < 4.2
    assert array[0] == 0 and array[-1] == 4 * N - 1
    until(lambda: all_forgotten(pids))


def test_one_array_many_times_to_one_worker(far):
    pids = far(1)
    array = np.zeros(2 * N)
    sent = Sent(pids)
    assert sd.pmap(write, [array] * 10, pool=sd.WorkerPool(pids), batch_size=1) == [(1.0, 1.0)] * 10
    assert 2 <= sent.mib() < 2.2


def test_a_large_body(far):
    pids = far(3)
    numbers = list(range(200_000, 600_000))
    sent = Sent(pids)
    assert sd.pmap(lambda i: numbers[i], range(6), pool=sd.WorkerPool(pids), batch_size=1) == numbers[:6]
    assert sent.mib() < 2.5, "2 MiB when pickled"


def test_every_kind_of_array(far):
    pids = far(2)
    numbers = np.arange(4.0, LINE / 2)
    values = {name: make(numbers) for name, make in KINDS.items()}
    shipped = sd.CachingPool(pids)
    got = [future.fetch() for future in [sd.remotecall(lambda: values, shipped) for _ in range(2)]]
    for each in got:
        for name, value in values.items():
            same(each[name], value if not isinstance(value, np.ma.MaskedArray) else value.copy())
    sd.clear(shipped)


def test_what_goes_to_one_alone_is_sent_as_ever(far):
    pids = far(2, topology="master_worker")
    sent = Sent(pids)
    sd.everywhere("", pids, big=np.zeros(4 * N))
    assert 8 <= sent.mib() < 8.2
    assert not any(sd.remotecall_fetch(copied, pid) for pid in pids)


def copied():
    """Tell whether this process's arena was ever used."""
    return current_node().sharing.arena._serial > 0


def test_workers_without_shared_memory(far):
    pids = far(2, env={"SHMDIST_ARENA_LIMIT": "0"})
    sent = Sent(pids)
    for _ in range(2):
        sd.everywhere("answer = float(big.sum())", pids, big=np.ones(N))
        assert [sd.remotecall_eval("__main__", pid, "answer") for pid in pids] == [N] * 2
    assert 4 <= sent.mib() < 4.2


# ---------------------------------------------------------------------- death, and who does not answer


def when_asked(monkeypatch, verb, action):
    """Do something once, when a process has been asked (`verb` "room") or is about to be."""
    original, done = host_copies.HostCopySender._ask, []

    def ask(self, copy, pid, what, seconds):
        mine = what[0] == verb and not done
        if mine and verb == "take":
            done.append(True)
            action(what[2])
        answer = original(self, copy, pid, what, seconds)
        if mine and verb == "room":
            done.append(True)
            action(pid)
        return answer

    monkeypatch.setattr(host_copies.HostCopySender, "_ask", ask)


def ospid_of(pid):
    return current_node().peers.members[pid].ospid


def kill(pid):
    ospid = ospid_of(pid)
    os.kill(ospid, signal.SIGKILL)
    until(lambda: pid in current_node().peers.lost)


class ToAll:
    """Sends one function to workers in their order, and has each run it."""

    def __init__(self, function):
        self._shipped = BroadcastFunction(function)

    def __call__(self, pids):
        """Return the values, and None of the workers that died."""
        return [self._value(future) for future in self.begin(pids)]

    def begin(self, pids):
        """Return the futures."""
        futures = []
        for pid in pids:
            try:
                futures.append(sd.remotecall(self._shipped.f, _At(pid, self._shipped)))
            except sd.ProcessExitedException:
                futures.append(None)
        return futures

    def _value(self, future):
        try:
            return None if future is None else future.fetch(timeout=20)
        except sd.ProcessExitedException:
            return None

    def drop(self):
        self._shipped.drop()


@pytest.mark.parametrize("when", ["room", "take"])
def test_the_first_dies(far, monkeypatch, when):
    """Before it has the bytes, or when it is about to lend them."""
    pids = far(4)
    array = np.zeros(32 * N)
    sent = Sent(pids[1:])
    if when == "room":

        def stop_and_kill(pid):
            ospid = ospid_of(pid)
            os.kill(ospid, signal.SIGSTOP)  # so that the bytes cannot all get there
            later(0.3, lambda: os.kill(ospid, signal.SIGKILL))

        when_asked(monkeypatch, "room", stop_and_kill)
    else:
        when_asked(monkeypatch, "take", kill)
    to_all = ToAll(lambda: write(array))
    with within(10):
        first, *others = to_all(pids)
    assert first in ([(1.0, 1.0), None] if when == "take" else [None])
    assert others == [(1.0, 1.0)] * 3
    assert 32 <= sent.mib() < 32.5
    to_all.drop()
    until(lambda: all_forgotten(pids[1:]))


def test_the_first_dies_later(far):
    """The others keep what they have, and lend it."""
    pids = far(4)
    array = np.zeros(8 * N)
    sent = Sent(pids[1:])
    to_all = ToAll(lambda: write(array))
    assert to_all(pids[:3]) == [(1.0, 1.0)] * 3
    kill(pids[0])
    assert to_all(pids[1:]) == [(2.0, 2.0), (2.0, 2.0), (1.0, 1.0)]
    assert sent.mib() < 0.1
    to_all.drop()
    until(lambda: all_forgotten(pids[1:]))


def test_one_that_takes_dies(far, monkeypatch):
    pids = far(3)
    array = np.zeros(8 * N)
    sent = Sent(pids[::2])
    when_asked(monkeypatch, "take", lambda lender: kill(pids[1]))
    to_all = ToAll(lambda: write(array))
    assert to_all(pids) == [(1.0, 1.0), None, (1.0, 1.0)]
    assert 8 <= sent.mib() < 8.2
    to_all.drop()
    until(lambda: all_forgotten(pids[::2]))
    until(lambda: not any(sd.remotecall_fetch(lent, pid) for pid in pids[::2]))


def lent():
    return current_node().sharing.state()["lent"]


def test_a_lender_that_stands_still(far, monkeypatch):
    """It holds its interpreter, say: nobody waits for it for long, and the next one lends."""
    monkeypatch.setattr(host_copies, "ANSWER_SECONDS", 0.5)
    pids = far(4)
    array = np.zeros(8 * N)
    stopped = []

    def stop(lender):
        stopped.append(ospid_of(lender))
        os.kill(stopped[0], signal.SIGSTOP)

    when_asked(monkeypatch, "take", stop)
    to_all = ToAll(lambda: write(array))
    sent = Sent(pids[1:])
    try:
        with within(5):
            first, *others = to_all.begin(pids[1:])
            assert [future.fetch() for future in others] == [(1.0, 1.0)] * 2
        assert stopped == [ospid_of(pids[1])]
    finally:
        os.kill(stopped[0], signal.SIGCONT)
    assert first.fetch() == (1.0, 1.0)
    assert 16 <= sent.mib() < 16.5
    to_all.drop()
    until(lambda: all_forgotten(pids))


def test_a_lender_that_is_busy(far):
    """Python code that runs there holds up nobody."""
    pids = far(3)
    array = np.zeros(8 * N)
    loop = sd.remotecall(helpers.loop_for_ever, pids[0])
    sent = Sent(pids)
    to_all = ToAll(lambda: write(array))
    with within(10):
        assert to_all(pids) == [(1.0, 1.0)] * 3
    assert 8 <= sent.mib() < 8.2
    loop.cancel()
    to_all.drop()


def test_the_sender_dies(far):
    """What it sent stays; what it had others keep for it goes."""
    pids = far(4)
    sender, takers = pids[0], pids[1:]
    left = sd.RemoteChannel(lambda: sd.Channel(10))
    sd.remote_do(broadcast_and_wait, sender, takers, left)
    assert left.take(timeout=10) == [(1.0, 1.0)] * 3
    kill(sender)
    until(lambda: all_forgotten(takers))
    until(lambda: not any(sd.remotecall_fetch(lent, pid) for pid in takers))


def broadcast_and_wait(pids, told):
    array = np.zeros(4 * N)
    to_all = ToAll(lambda: write(array))
    told.put(to_all(pids))
    threading.Event().wait()


# ---------------------------------------------------------------------- real hosts


@pytest.fixture
def two_hosts(start):
    """Two hosts that have no way to each other: servers, and the lines to them."""
    if not can_make_hosts():
        pytest.skip("this machine does not let us make network namespaces (ip netns, from iproute2)")
    made = [Host(203), Host(204)]
    servers = [start(host.name, address=host.address, prefix=host.prefix) for host in made]
    servers[0].known_hosts.write_text(servers[0].known_line() + servers[1].known_line())
    yield servers, [host._line for host in made]
    for host in made:
        host.remove()


def crossed(line):
    """Return how many MiB went over a line to its host."""
    return int(Path(f"/sys/class/net/{line}/statistics/tx_bytes").read_text()) / MIB


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("lazy", [True, False])
def test_two_hosts(two_hosts, tunnel, lazy):
    servers, lines = two_hosts
    machines = [(server.text, 3) for server in servers]
    with (
        within(60),
        sd.addprocs(machines, tunnel=tunnel, lazy=lazy, **servers[0].params()) as pids,
    ):
        before = [crossed(line) for line in lines]
        array = np.random.default_rng(0).random(16 * N)
        to_all = ToAll(lambda: (float(array.sum()), write(array)))
        expected = (float(array.sum()), (float(array.min() + 1), float(array.max() + 1)))
        assert to_all(pids) == [expected] * 6
        for line, former in zip(lines, before, strict=True):
            assert 16 <= crossed(line) - former < 20
        to_all.drop()
        until(lambda: all_forgotten(pids))
        # From a worker of one host to those of the other.
        groups = sorted({tuple(sd.procs(pid)) for pid in pids})
        before = crossed(lines[0]) + crossed(lines[1])
        got = sd.remotecall_fetch(broadcast, groups[0][0], groups[1], array)
        assert got == [(float(array.min() + 1), float(array.max() + 1))] * 3
        # To the sender, and from there on through process 1.
        assert 32 <= crossed(lines[0]) + crossed(lines[1]) - before < 40


def test_to_process_1_and_its_workers(two_hosts, fresh):
    """From a worker of another host."""
    servers, lines = two_hosts
    near = [1, *fresh(2)]
    with within(30), sd.addprocs([servers[0].text], **servers[0].params()) as [sender]:
        received = Path(f"/sys/class/net/{lines[0]}/statistics/rx_bytes")
        sd.remotecall_eval("__main__", sender, f"import numpy; big = numpy.zeros({8 * N})")
        before = int(received.read_text()) / MIB
        assert sd.remotecall_fetch(broadcast, sender, near) == [(1.0, 1.0)] * 3
        assert 8 <= int(received.read_text()) / MIB - before < 10
        until(lambda: all_forgotten(near))


def broadcast(pids, array=None):
    array = sys.modules["__main__"].big if array is None else array
    to_all = ToAll(lambda: write(array))
    try:
        return to_all(pids)
    finally:
        to_all.drop()


def test_a_shared_array_that_is_copied_warns_once(far, monkeypatch):
    [pid] = far(1)
    monkeypatch.setattr(current_node().sharing.copies, "_warned", False)
    table = sd.shared.zeros(1000)
    with pytest.warns(UserWarning, match=r"not of this host.*copy of a shared array") as caught:
        sd.remotecall_fetch(lambda: table.fill(1), pid)
        assert sd.remotecall_fetch(np.sum, pid, table) == 0
    assert len(caught) == 1 and caught[0].filename == __file__  # the line that called
