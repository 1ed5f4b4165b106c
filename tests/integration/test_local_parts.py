"""What a map or loop runs on its own process ends with it."""

import os
import signal
import threading
import time

import pytest

import shmdist as sd
from shmdist import loops
from shmdist.runtime.interrupts import current
from shmdist.scheduling import engine, local_thread
from tests.integration.helpers import Script, run_script, until, within


def parts(home, how):
    """Return a function of elements: on process `home` they go on for ever, elsewhere one fails then."""
    begun, ended = (sd.RemoteChannel(lambda: sd.Channel(float("inf"))) for _ in range(2))

    def part(_):
        if sd.myid() != home:
            begun.fetch()  # one runs there
            raise ValueError("enough")
        try:
            begun.put(None)
            if how == "waits":
                sd.RemoteChannel(lambda: sd.Channel(0), 1).take()
            while True:
                time.sleep(0.002)
        finally:
            ended.put(None)

    return part, begun, ended


def end_together(begun, ended):
    until(lambda: len(begun) <= len(ended), what="what ran on the map's own process has ended")


ROADS = {
    "map": lambda f, pool: sd.pmap(f, range(4), pool=pool, batch_size=1),
    "batches": lambda f, pool: sd.pmap(f, range(40), pool=pool, batch_size=5),
    "generator": lambda f, pool: list(sd.pgenerate(f, range(4), pool=pool, ordered=False)),
    "static loop": lambda f, pool: sd.distributed(max, pool=pool)(f)(range(2)),
    "dynamic loop": lambda f, pool: sd.distributed(max, pool=pool, schedule="dynamic", chunk=1)(f)(range(4)),
    "loop without reducer": lambda f, pool: sd.distributed(pool=pool)(f)(range(2)).wait(),
}


@pytest.mark.parametrize("home", [0, 1])
@pytest.mark.parametrize("road", ROADS)
def test_by_an_error(cluster, road, home):
    home = 1 if home == 0 else cluster[0]
    part, begun, ended = parts(home, "runs")
    run, pids = ROADS[road], [home, cluster[1]]
    with within(10), pytest.raises(ValueError, match="enough"):
        sd.remotecall_fetch(lambda: run(part, pids), home)
    end_together(begun, ended)


def test_where_it_waits_inside_the_runtime(cluster):
    part, begun, ended = parts(1, "waits")
    with within(10), pytest.raises(ValueError, match="enough"):
        sd.pmap(part, range(4), pool=[1, cluster[1]], batch_size=1)
    end_together(begun, ended)


def test_by_close(cluster):
    part, begun, ended = parts(1, "runs")

    def first(k):
        return part(k) if sd.myid() == 1 else begun.fetch()

    results = sd.pgenerate(first, range(9), pool=[1, cluster[1]], ordered=False)
    next(results)
    results.close()
    end_together(begun, ended)


def test_by_an_interrupt_of_the_call_that_runs_the_map(cluster):
    home = cluster[0]
    part, begun, ended = parts(home, "runs")
    never = sd.RemoteChannel(lambda: sd.Channel(0))

    def run():
        def either(k):
            return part(k) if sd.myid() == home else never.take()

        return sd.pmap(either, range(2), pool=[home, cluster[1]], batch_size=1)

    call = sd.remotecall(run, home)
    begun.fetch(timeout=10)
    sd.interrupt(home)
    with within(10), pytest.raises(sd.RemoteException, match="KeyboardInterrupt"):
        call.fetch(timeout=10)
    end_together(begun, ended)


def test_not_distributed():
    begun, ended = threading.Barrier(3), threading.Semaphore(0)

    def part(k):
        try:
            begun.wait(10)
            if k == 0:
                raise ValueError("enough")
            while True:
                time.sleep(0.002)
        finally:
            ended.release()

    with pytest.raises(ValueError, match="enough"):
        sd.pmap(part, range(3), distributed=False)
    for _ in range(3):
        assert ended.acquire(timeout=10)


def test_by_ctrl_c():
    script = Script("""
import threading, time
import shmdist as sd
sd.addprocs(1)
ended = sd.RemoteChannel(lambda: sd.Channel(9))
told = sd.RemoteChannel(lambda: sd.Channel(9))
def part(k):
    try:
        told.put(sd.myid())
        while True:
            time.sleep(0.002)
    finally:
        ended.put(sd.myid())
threading.Thread(target=lambda: print({told.take(), told.take()}, flush=True)).start()
try:
    sd.pmap(part, range(2), pool=[1, 2])
except KeyboardInterrupt:
    print("interrupted", sorted(ended.take(timeout=10) for _ in range(2)))
assert sd.pmap(abs, [-1, -2], pool=[1, 2]) == [1, 2]
""")
    assert script.line() == "{1, 2}"
    os.kill(script.process.pid, signal.SIGINT)
    assert script.end().clean() == "interrupted [1, 2]\n"


@pytest.mark.parametrize("road", ["map", "static loop", "dynamic loop"])
def test_by_ctrl_c_while_it_is_begun(cluster, monkeypatch, road):
    begun = []

    def run_on_thread(*args):
        with current():
            begun.append(local_thread.run_on_thread(*args))
            os.kill(os.getpid(), signal.SIGINT)
        return begun[-1]

    for module in loops, engine:
        monkeypatch.setattr(module, "run_on_thread", run_on_thread)
    with pytest.raises(KeyboardInterrupt):
        ROADS[road](float, [1, cluster[0]])
    assert begun and all(task.interrupted for task in begun)


def test_its_own_errors_and_interrupts_are_no_end(cluster):
    """A KeyboardInterrupt that an element raises itself is its error."""

    def part(k):
        if k == 3:
            raise KeyboardInterrupt("mine")
        return k

    got = sd.pmap(
        part, range(6), pool=[1, cluster[0]], batch_size=2, on_error=lambda e: str(e).split("\n")[0]
    )
    assert got == [0, 1, 2, "mine", 4, 5]


def test_an_element_that_forks():
    script = """
import multiprocessing, os
import shmdist as sd
def part(k):
    child = os.fork()
    if not child:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with sd.addprocs(1) as pids:
    assert sd.pmap(part, range(6), pool=[1, *pids], batch_size=1) == [7] * 6
print("fine")
"""
    quiet = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}  # of Python 3.12, for forks beside threads
    assert run_script(script, env=quiet).clean() == "fine\n"
