"""When all workers have died, work for them is an error, until the program adds or removes some."""

import os
import signal
import threading

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.scheduling import engine
from tests.integration.helpers import run_script, until

PREAMBLE = """
import operator, os, signal
import shmdist as sd
from shmdist.scheduling import engine as runs

def end(pid, how):
    try:
        sd.remotecall_fetch(how, pid)
    except sd.ProcessExitedException:
        pass
    else:
        raise AssertionError

def refused(call, *args, **kwargs):
    try:
        value = call(*args, **kwargs)
        if isinstance(value, sd.Future | sd.Task):
            value = value.fetch(timeout=5)
    except sd.ShmdistError as error:
        text = str(error)
        assert text.startswith("no workers left (2 died: process 2 exited with code 3, "), text
        assert "process 3 was killed by SIGKILL" in text and "process 0" not in text, text
    else:
        raise AssertionError(f"{call} went on with {value!r}")

def roads():
    body = lambda x: x
    yield sd.pmap, body, range(9)
    yield lambda: list(sd.pgenerate(body, range(9))),
    for options in ({}, {"schedule": "dynamic"}, {"vectorized": True}):
        yield lambda options=options: sd.distributed(operator.add, **options)(body)(range(9)),
        yield lambda options=options: sd.distributed(**options)(body)(range(9)),
    pool = sd.default_worker_pool()
    yield pool.take, 5
    yield pool.wait, 5
    for call in (sd.remotecall, sd.remotecall_fetch, sd.remotecall_wait, sd.remote_do):
        yield call, body, pool, 1
    yield sd.remote(body), 1
    yield sd.spawn, body, 1
    yield sd.spawnat, "any", body, 1
    yield sd.fetchany, body, 1
    yield sd.fetchfrom, "any", body, 1
    yield sd.clear, "body"
"""

DEATHS = """
end(2, lambda: os._exit(3))
end(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""

ROADS = """
for road in roads():
    refused(*road)
assert sd.workers() == [1] and sd.pmap(abs, [-1], distributed=False) == [1]
"""


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize(
    "after",
    [
        "sd.rmprocs(3)\nassert sd.default_worker_pool().workers() == [1]\n",
        "pids = sd.addprocs(1)\nassert sd.default_worker_pool().workers() == pids == sd.workers()\n",
    ],
    ids=["removed", "added"],
)
def test_every_road_says_so_until_the_program_acts(after, pool_first):
    made = "sd.default_worker_pool()\n" if pool_first else ""
    works = """
for road in roads():
    value = road[0](*road[1:])
    if isinstance(value, sd.Future | sd.Task):
        value.wait()
    elif isinstance(value, int) and value in sd.workers():
        sd.default_worker_pool().put(value)
print("fine")
"""
    script = PREAMBLE + "sd.addprocs(2)\n" + made + DEATHS + ROADS + after + works
    assert run_script(script).clean() == "fine\n"


def test_a_removal_is_no_death():
    script = """
with sd.addprocs(2):
    end(2, lambda: os._exit(3))
    sd.rmprocs(3)  # the last to go was removed
    assert sd.pmap(lambda x: sd.myid(), range(3)) == [1] * 3
with sd.addprocs(1) as pids:
    end(pids[0], lambda: os._exit(3))
assert sd.pmap(lambda x: sd.myid(), range(3)) == [1] * 3  # the end of the block took note of it
pids = sd.addprocs(2)
tasks = [sd.rmprocs(pid, waitfor=0) for pid in pids]
assert sd.spawn(sd.myid).fetch() == 1 and set(sd.pmap(lambda x: sd.myid(), range(3))) == {1}
for task in tasks:
    task.wait()
print("fine")
"""
    assert run_script(PREAMBLE + script).clean() == "fine\n"


def test_workers_that_never_joined_are_not_missed():
    script = """
try:
    sd.addprocs(1, exeflags=["-c", "raise SystemExit(4)"])
except sd.LaunchWorkerError:
    pass
assert sd.pmap(lambda x: sd.myid(), range(3)) == [1] * 3 and sd.spawn(sd.myid).fetch() == 1
print("fine")
"""
    assert run_script(PREAMBLE + script).clean() == "fine\n"


def test_the_elements_of_the_last_map_are_told_of_their_worker():
    script = """
sd.addprocs(2)
got = sd.pmap(lambda x: os._exit(3), range(6), on_error=lambda error: error)
assert {type(error) for error in got} == {sd.ProcessExitedException}, got
assert all(error.pid in (2, 3) and "code 3" in str(error) for error in got)
assert sd.workers() == [1]
print("fine")
"""
    assert run_script(PREAMBLE + script).clean() == "fine\n"


@pytest.mark.parametrize("kind", [sd.WorkerPool, sd.CachingPool])
def test_a_pool_of_ones_own(fresh, kind):
    pids = fresh(2)
    pool = kind(pids)
    taken = [pool.take(timeout=5) for _ in pids]
    waiting = sd.async_(pool.take)
    for pid in pids:
        os.kill(sd.remotecall_fetch(os.getpid, pid), signal.SIGKILL)
    with pytest.raises(sd.ShmdistError, match=r"no workers left \(2 died: process .* SIGKILL.*\); push"):
        waiting.fetch(timeout=5)
    for use in (
        lambda: sd.pmap(abs, [1], pool=pool),
        lambda: next(sd.pgenerate(abs, [1], pool=pool)),
        lambda: sd.distributed(max, pool=pool)(abs)([1]),
        lambda: sd.remotecall_fetch(abs, pool, 1),
        lambda: sd.remote(pool, abs)(1),
        lambda: pool.take(timeout=5),
    ):
        with pytest.raises(sd.ShmdistError, match="2 died"):
            use()
    for pid in taken:
        pool.put(pid)  # harmless
    [new] = fresh()
    pool.push(new)
    assert sd.remotecall_fetch(sd.myid, pool) == new
    sd.rmprocs(new)
    with pytest.raises(sd.ShmdistError, match="were removed"):
        pool.take(timeout=5)


def test_a_pool_on_a_worker(fresh, cluster):
    [lost] = fresh()
    pool = sd.remotecall_fetch(sd.WorkerPool, cluster[0], [lost])
    os.kill(sd.remotecall_fetch(os.getpid, lost), signal.SIGKILL)
    until(lambda: not pool.workers())
    with pytest.raises(sd.ShmdistError, match=f"1 died: process {lost} was killed by SIGKILL"):
        pool.take(timeout=5)

    def on_the_worker():
        with pytest.raises(sd.ShmdistError, match="1 died"):
            sd.pmap(abs, [1], pool=pool)
        return sd.pmap(abs, [-1])

    assert sd.remotecall_fetch(on_the_worker, cluster[0]) == [1]
    assert sd.remotecall_fetch(on_the_worker, cluster[1]) == [1]


def test_a_dying_worker_is_not_chosen(fresh, cluster, monkeypatch):
    """While it is found out how it ended, no call, pool or map goes there."""
    pids = fresh(2)
    node, known = current_node(), threading.Event()
    find_exit_cause = node.peers.find_exit_cause
    monkeypatch.setattr(node.peers, "find_exit_cause", lambda pid: known.wait(10) and find_exit_cause(pid))
    pool = sd.WorkerPool(pids)
    os.kill(sd.remotecall_fetch(os.getpid, pids[0]), signal.SIGKILL)
    until(lambda: pids[0] in node.peers.leaving)
    try:
        assert pids[0] not in sd.workers() and pids[0] in node.peers.members
        assert pids[0] not in {sd.spawn(sd.myid).fetch(timeout=5) for _ in range(8)}
        assert {sd.remotecall_fetch(sd.myid, pool) for _ in range(4)} == {pids[1]}
        for batch_size in (None, 1, 5):
            got = sd.pmap(lambda _: sd.myid(), range(20), pool=pool, batch_size=batch_size)
            assert set(got) == {pids[1]}
        assert sd.distributed(min, pool=pool)(lambda _: sd.myid())(range(20)) == pids[1]
    finally:
        known.set()
        until(lambda: pool.workers() == pids[1:])


def _over_the_dead(road, dead, ospid, others):
    """Run a map or loop on a worker that has no link yet to another one, which dies before it gets anything."""
    pool = sd.WorkerPool([dead, *others])
    os.kill(ospid, signal.SIGKILL)
    if road == "loop":
        return sd.distributed(max, pool=pool, schedule="dynamic", chunk=1)(abs)(range(9))
    if road == "generator":
        return list(sd.pgenerate(abs, range(9), pool=pool))
    options = {"batches": {"batch_size": 4}, "on_error": {"on_error": lambda error: -1}}
    return sd.pmap(abs, range(9), pool=pool, **options.get(road, {}))


@pytest.mark.parametrize("road", ["map", "batches", "generator", "loop", "on_error"])
def test_no_element_is_lost_when_the_first_worker_cannot_be_reached(cluster, fresh, road):
    home, spare, [dead] = *cluster[:2], fresh()
    others = [spare] if road == "batches" else []
    arguments = road, dead, sd.remotecall_fetch(os.getpid, dead), others
    if road == "on_error":
        assert sd.remotecall_fetch(_over_the_dead, home, *arguments) == [-1] * 9
    elif others:
        assert sd.remotecall_fetch(_over_the_dead, home, *arguments) == list(range(9))
    else:
        with pytest.raises(sd.ShmdistError, match="no workers left"):
            sd.remotecall_fetch(_over_the_dead, home, *arguments)


def test_elements_that_cannot_be_sent_together_are_sent_one_by_one(cluster, monkeypatch):
    def pack(elements):
        raise MemoryError("all together")

    monkeypatch.setattr(engine, "pack", pack)
    assert sd.pmap(abs, range(9), pool=cluster[:1], batch_size=3) == list(range(9))
