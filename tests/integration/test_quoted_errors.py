"""Errors of wrong calls quote the function that was called, in its own order of arguments, and name the cure."""

import numpy as np
import pytest

import shmdist as sd


def generator():
    yield 1


def capture_and_call(channel, pid):
    sd.remotecall_fetch(lambda: channel.take(), pid)


WRONG = {
    "spawnat, order": (lambda pid: sd.spawnat(abs, pid, -3), TypeError, r"spawnat\(pid, f, \*args\).*order"),
    "spawn, value": (lambda pid: sd.spawn(abs(-3)), TypeError, r"^spawn\(f, \*args\).*not what it returns"),
    "spawn, order": (lambda pid: sd.spawn(pid, abs), TypeError, r"^spawn\(f, \*args\).*spawnat\(pid, f"),
    "fetchany, order": (lambda pid: sd.fetchany(pid, abs), TypeError, r"^fetchany\(f.*fetchfrom\(pid, f"),
    "fetchfrom, order": (lambda pid: sd.fetchfrom(abs, pid), TypeError, r"^fetchfrom\(pid, f, \*args\)"),
    "fetchfrom, value": (lambda pid: sd.fetchfrom(pid, abs(-3)), TypeError, r"^fetchfrom\(pid, f, \*args\)"),
    "remotecall, order": (lambda pid: sd.remotecall(pid, abs), TypeError, r"^remotecall\(f, where.*order"),
    "remotecall_wait": (lambda pid: sd.remotecall_wait(pid, abs), TypeError, r"^remotecall_wait\(f, where"),
    "remotecall_fetch": (
        lambda pid: sd.remotecall_fetch(pid, abs),
        TypeError,
        r"^remotecall_fetch\(f, where",
    ),
    "remote_do": (lambda pid: sd.remote_do(pid, abs), TypeError, r"^remote_do\(f, where"),
    "remote, order": (lambda pid: sd.remote(abs, pid), TypeError, r"^remote\(pool, f\).*order"),
    "remote, value": (lambda pid: sd.remote(abs(-3)), TypeError, r"^remote\(pool, f\)"),
    "remote, pool": (lambda pid: sd.remote("x", abs), TypeError, r"^remote\(pool, f\): pool must be.*'x'"),
    "a text as pid": (
        lambda pid: sd.remotecall_wait(abs, "2", 3),
        TypeError,
        r"^remotecall_wait.*integer.*'2'",
    ),
    "a list as pid": (lambda pid: sd.remotecall(abs, [pid], 3), TypeError, r"WorkerPool\(pids\)"),
    "a bool as pid": (lambda pid: sd.remotecall(abs, True, 3), TypeError, "integer.*True"),
    "spawnat, text": (lambda pid: sd.spawnat("2", abs, 3), TypeError, r"spawnat\(pid, f.*'any', not '2'"),
    "spawnat, bool": (lambda pid: sd.spawnat(True, abs, 3), TypeError, r"spawnat\(pid, f.*not True"),
    "Future": (lambda pid: sd.Future(True), TypeError, "process ids are integers, not True"),
    "push": (lambda pid: sd.WorkerPool([pid]).push("3"), TypeError, "process ids are integers, not '3'"),
    "WorkerPool": (lambda pid: sd.WorkerPool([2.0]), TypeError, "process ids are integers, not 2.0"),
    "rmprocs": (lambda pid: sd.rmprocs(True), TypeError, "process ids are integers, not True"),
    "procs": (lambda pid: sd.procs("2"), TypeError, "process ids are integers, not '2'"),
    "RemoteChannel, size": (
        lambda pid: sd.RemoteChannel(1000),
        ValueError,
        r"no process 1000.*RemoteChannel\(lambda: Channel\(1000\)\)",
    ),
    "RemoteChannel, bool": (lambda pid: sd.RemoteChannel(True), TypeError, "process ids are integers"),
    "a channel sent": (
        lambda pid: sd.remotecall_fetch(print, pid, [sd.Channel(1)]),
        sd.SerializationError,
        r"RemoteChannel\(lambda: Channel\(n\)\).*args\[0\]\[0\]",
    ),
    "a channel captured": (
        lambda pid: capture_and_call(sd.Channel(1), pid),
        sd.SerializationError,
        "RemoteChannel.*captures channel",
    ),
    "a generator sent": (
        lambda pid: sd.remotecall_fetch(list, pid, generator()),
        sd.SerializationError,
        r"generator.*list\(\.\.\.\)",
    ),
    "a generator returned": (
        lambda pid: sd.remotecall_fetch(generator, pid),
        sd.SerializationError,
        r"generator.*list\(\.\.\.\)",
    ),
    "on_error": (
        lambda pid: sd.pmap(abs, [1], on_error="ignore"),
        TypeError,
        "on_error must be callable.*lambda",
    ),
    "retry_check": (
        lambda pid: sd.pmap(abs, [1], retry_check=True),
        TypeError,
        "retry_check must be callable",
    ),
    "retry_delays": (
        lambda pid: sd.pmap(abs, [1], retry_delays=3),
        TypeError,
        "retry_delays must be an iterable",
    ),
    "retry_delays, text": (
        lambda pid: sd.pmap(abs, [1], retry_delays="3"),
        TypeError,
        "retry_delays.*seconds",
    ),
    "retry_delays, items": (
        lambda pid: sd.pmap(lambda x: {}[x], [1], retry_delays=["soon"]),
        TypeError,
        "retry_delays must give seconds, not 'soon'",
    ),
    "reducer": (
        lambda pid: sd.distributed(sum)(abs)(range(3)),
        TypeError,
        r"reducer.*two arguments.*operator\.add",
    ),
    "reducer of one": (lambda pid: sd.distributed(len, range(3))(abs), TypeError, "reducer.*two arguments"),
    "reducer of numpy": (lambda pid: sd.distributed(np.max, range(3))(abs), TypeError, r"numpy\.maximum"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls(cluster, wrong):
    call, kind, text = WRONG[wrong]
    with pytest.raises(kind, match=text):
        call(cluster[0])


def test_integers_of_numpy_are_process_ids(cluster):
    pid = np.int64(cluster[0])
    assert sd.remotecall_fetch(sd.myid, pid) == sd.fetchfrom(pid, sd.myid) == cluster[0]
    assert sd.spawnat(pid, sd.myid).fetch() == sd.remotecall_wait(sd.myid, pid).fetch() == cluster[0]
    sd.remote_do(abs, pid, 1)
    assert sd.Future(pid).where == sd.RemoteChannel(pid).where == cluster[0]
    assert cluster[0] in sd.procs(pid) and sd.WorkerPool([pid]).workers() == cluster[:1]
    pool = sd.WorkerPool()
    pool.push(pid)
    assert pool.take() == cluster[0] and type(pool.workers()[0]) is int
    assert sd.everywhere("2 * 3", pid) == 6


def test_reducers_with_defaults_are_reducers(cluster):
    def add(a, b=0):
        return a + b

    assert sd.distributed(add, range(5))(lambda i: i) == 10
    assert sd.distributed(lambda *both: sum(both), range(5))(lambda i: i) == 10
    for reducer, value in ((max, 4), (min, 0), (np.add, 10), (np.maximum, 4)):
        assert sd.distributed(reducer, range(5))(lambda i: i) == value
