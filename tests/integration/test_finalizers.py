"""The garbage collector may run anywhere: no finalizer, of shmdist's or of a program's own, blocks anything."""

import gc
import itertools
import os
import signal

import pytest

import shmdist as sd
from shmdist.errors import FinalizerError
from shmdist.runtime.interrupts import current
from shmdist.scheduling.engine import MapRun
from tests.integration import helpers

PROGRAM = """
import faulthandler, threading
faulthandler.dump_traceback_later(18, exit=True)
import shmdist as sd
from tests.integration import finalizers
a, b = sd.addprocs(2)
print(*sd.remotecall_fetch(finalizers.collect_under_traffic, {where}, {other}, 3, 7), sep="|")
"""


@pytest.mark.parametrize(
    ("where", "other", "pure"),
    [("1", "b", ""), ("1", "b", "1"), ("a", "1", "")],
    ids=["1", "1, pure", "a worker"],
)
def test_the_collector_runs_at_every_allocation(where, other, pure):
    program = PROGRAM.format(where=where, other=other)
    ended = helpers.Script(program, env={**os.environ, "SHMDIST_PURE": pure}).end(timeout=25)
    assert ended.code == 0, ended
    stuck, wrong, worked, refused, sent, came = ended.out.strip().split("|")
    assert (stuck, wrong) == ("0", "[]"), ended
    assert int(worked) > 0 and int(refused) > 0, ended
    assert int(came) == int(sent) > 0, ended  # what is sent by a finalizer is sent, sooner or later


class Waits:
    """Something to call, whose finalizer waits for a call, and keeps there what that came to."""

    outcomes = sd.Channel(float("inf"))

    def __init__(self, pid):
        self.pid = pid

    def __call__(self, *args):
        return sum(args)

    def __del__(self):
        try:
            self.outcomes.put(sd.remotecall_fetch(abs, self.pid, -1))
        except BaseException as error:
            self.outcomes.put(error)


def _take_outcome():
    return Waits.outcomes.take(timeout=5)


def _values(where, pids):
    """Let `pids` come to hold objects whose finalizers wait, in every way, and drop them."""
    sd.remotecall_fetch(isinstance, where, Waits(pids[1]), int)
    yield "argument"
    sd.remotecall(isinstance, where, Waits(pids[1]), int).fetch()
    yield "argument of a future's call"
    sd.remotecall_fetch(Waits(pids[1]), where)
    yield "function"
    sd.pmap(Waits(pids[1]), range(4), pool=sd.WorkerPool([where]))
    yield "function of a map"
    results = sd.pgenerate(Waits(pids[1]), itertools.count(), pool=sd.WorkerPool([where]))
    next(results)
    results.close()
    yield "function of an abandoned map"
    pool = sd.CachingPool([where])
    sd.pmap(Waits(pids[1]), range(4), pool=pool)
    pool.clear()
    yield "function of a caching pool"
    sd.remotecall(Waits, where, pids[1]).wait()
    yield "value of a future"
    channel = sd.RemoteChannel(lambda: sd.Channel(1), where)
    sd.remotecall_fetch(channel.put, where, Waits(pids[1]))
    del channel
    yield "item of a channel"


def test_an_object_that_the_runtime_drops_may_wait_in_its_finalizer(cluster):
    for way in _values(cluster[0], cluster):
        assert sd.remotecall_fetch(_take_outcome, cluster[0]) == 1, way
    while not Waits.outcomes.isempty():  # of those made here
        assert Waits.outcomes.take() == 1


class InCycle:
    """An object that only the collector ends, and that then does something, and keeps what that came to."""

    def __init__(self, action):
        self.me, self.action, self.outcome = self, action, []

    def __del__(self):
        try:
            self.outcome.append(self.action())
        except BaseException as error:
            self.outcome.append(error)


@pytest.mark.parametrize("ask", ["fetch", "wait", "isready"])
def test_what_a_finalizer_is_refused_is_not_a_future_s_outcome(cluster, ask):
    future = sd.Future(cluster[0]).put([5])
    outcome = InCycle(getattr(future, ask)).outcome
    with current():
        gc.collect()
    assert [type(each) for each in outcome] == [FinalizerError]
    assert future.fetch() == [5]


def test_no_interrupt_is_lost_in_the_end_of_an_abandoned_map(cluster, monkeypatch):
    results = sd.pgenerate(abs, itertools.count(), pool=sd.WorkerPool(cluster[:1]))
    next(results)
    results = [results]
    results.append(results)
    ended = []

    def interrupted(run):
        os.kill(os.getpid(), signal.SIGINT)
        clear_up(run)
        ended.append(run)

    clear_up = MapRun._clear_up
    monkeypatch.setattr(MapRun, "_clear_up", interrupted)
    del results
    with pytest.raises(KeyboardInterrupt):  # not in the finalizer, where Python would drop it
        gc.collect()
        helpers.until(lambda: False)
    helpers.until(lambda: ended)
    ended.clear()


def test_what_a_finalizer_begins_is_not_the_block_s_that_it_runs_in(cluster):
    with sd.sync():
        begun = InCycle(lambda: (sd.remotecall(divmod, cluster[0], 1, 0), sd.async_(divmod, 1, 0))).outcome
        gc.collect()
        fine = sd.remotecall(abs, cluster[0], -1)
    assert fine.fetch() == 1
    for each in begun[0]:
        with pytest.raises(ZeroDivisionError):
            each.fetch()


LAST = """
import sys, threading, shmdist as sd
a, b = sd.addprocs(2)
class Ends:
    def __init__(self, action): self.me, self.action = self, action
    def __del__(self): self.action()
def there(): print("there", flush=True)
Ends(lambda: {action})
print("ok", flush=True)
"""


@pytest.mark.parametrize(
    "action",
    [
        "sd.remotecall_fetch(there, a)",
        "sd.remotecall(there, b).fetch()",
        "sd.async_(lambda: sd.remotecall_fetch(there, a)).fetch()",
    ],
)
def test_finalizers_of_what_is_left_at_the_end_of_the_program(action):
    printed = helpers.run_script(LAST.format(action=action)).clean()
    assert [line.rpartition("\t")[2] for line in printed.splitlines()] == ["ok", "there"]


def test_a_finalizer_that_waits_at_the_end_of_the_program_for_what_does_not_come():
    with helpers.within(15):
        ended = helpers.run_script(LAST.format(action="sd.RemoteChannel(a).take()"))
    assert (ended.code, ended.out) == (0, "ok\n") and "ProcessExitedException" in ended.err, ended


def test_finalizers_of_what_is_left_at_the_end_of_a_worker():
    program = """
import shmdist as sd
a, b = sd.addprocs(2)
class Ends:
    def __init__(self): self.me = self
    def __del__(self): sd.remotecall_fetch(print, b, "from", sd.myid())
sd.remotecall_fetch(lambda: (Ends(), None)[1], a)
sd.rmprocs(a)
"""
    assert helpers.run_script(program).clean() in (
        "      From worker 3:\tfrom 2\n",
        "",
    )  # or it had to be quick
