"""Each way to be stuck, from each moment, while a program does each of six things; and at any moment.

With ``-s`` it prints how many elements the others ran meanwhile, and in how many seconds.
"""

import os
import pathlib
import random
import signal
import threading
import time

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration import stuck
from tests.integration.helpers import until, within
from tests.integration.sshd import needs_sshd

TIMEOUT = 5.0  # seconds after which a silent host is taken for lost

cells = pytest.mark.parametrize(
    ("operation", "moment"),
    [(operation, "before") for operation in stuck.OPERATIONS]
    + [(operation, "during") for operation in stuck.TOGETHER],
)


def enough(work, moment, kept=0):
    """Tell whether all is done that can be done without the stuck worker, which keeps some of a map's elements."""
    kept = kept if work.kind in MAPS else 0
    if moment == "before":
        return work.others >= stuck.ALONE[work.kind] - kept
    return len(work.done) >= stuck.TOGETHER[work.kind] - kept


MAPS = ("pmap", "pgenerate", "dynamic reduction", "broadcast")


def begin(work, trouble, moment):
    if moment == "before":
        trouble.begin()
        work.start()
    else:
        work.start()
        until(lambda: work.done, 20)
        trouble.begin()
    return work


def report(how, work, moment):
    others, seconds = work.others, work.seconds
    print(
        f"\n{how:8} {moment:6} {work.kind:18} {others:3} of others, {len(work.done):3} in all, {seconds:5.2f} s",
        end="",
    )


@cells
@pytest.mark.parametrize("how", [stuck.Stopped, stuck.Holding])
def test_the_others_go_on(cluster, tmp_path, how, operation, moment):
    pid = cluster[0]
    trouble = how(pid, tmp_path)
    work = begin(stuck.Work(operation, cluster, pid), trouble, moment)
    try:
        until(lambda: enough(work, moment), 9, f"{operation}: {work.done}")
        report(how.__name__, work, moment)
    finally:
        trouble.end()
    assert work.join() == stuck.OUTCOMES[operation]
    assert len(work.done) == (3 if operation == "everywhere" else stuck.COUNT), "each ran once"
    stuck.forget_names(cluster)


@needs_sshd
@cells
def test_a_silent_host(fresh, host, server, operation, moment):
    """What was not written whole goes to others when it is lost; the rest is an error."""
    local = fresh(2)
    [pid] = sd.addprocs([server.text], **server.params())
    sd.remotecall_fetch(np.sum, pid, stuck.array())
    work = begin(stuck.Work(operation, [pid, *local], pid), stuck.Silent(host), moment)
    # Nothing is taken back from another host: of large elements one is on its way, of small ones two.
    kept = 2 if moment == "before" and operation == "broadcast" else 1
    until(lambda: enough(work, moment, kept), 20, f"{operation}: {work.done}")
    report("Silent", work, moment)
    lost = pid not in sd.procs()
    outcome = work.join()
    print(f", lost {work.took:5.2f} s after the beginning", end="")
    assert not lost, "it took as long as to give the host up"
    if isinstance(outcome, sd.CompositeException):
        [outcome] = outcome.exceptions
    assert isinstance(outcome, sd.ProcessExitedException) or outcome == stuck.OUTCOMES[operation], outcome
    if operation != "everywhere":
        assert len(work.done) <= stuck.COUNT, "none ran twice"
    until(lambda: pid not in sd.procs(), 2 * TIMEOUT)
    stuck.forget_names([1, *local])


class Tally:
    """Counts, in a file that all processes map, how often each element ran."""

    def __init__(self, path, count):
        self.path, self.count = str(path), count

    def counts(self):
        return np.memmap(self.path, dtype="u1", mode="r+", shape=(self.count,))

    def __call__(self, n):
        self.counts()[n] += 1
        if n % 7 == 0:
            time.sleep(0.001)
        return n


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_stopped_again_and_again(cluster, tmp_path, batch_size):
    """Each element runs once, whoever stands still when; and all come back."""
    count = 4000
    tally = Tally(tmp_path / "tally", count)
    ospids = [current_node().peers.members[pid].ospid for pid in cluster]
    over = threading.Event()

    def stop_some():
        while not over.is_set():
            ospid = random.choice(ospids)
            os.kill(ospid, signal.SIGSTOP)
            over.wait(random.random() * 0.08)
            os.kill(ospid, signal.SIGCONT)
            over.wait(random.random() * 0.02)

    thread = threading.Thread(target=stop_some)
    thread.start()
    try:
        for round_ in range(8):
            pathlib.Path(tally.path).write_bytes(bytes(count))
            with within(30):
                if round_ % 2:
                    results = list(sd.pgenerate(tally, range(count), pool=cluster))
                else:
                    results = sd.pmap(tally, range(count), pool=cluster, batch_size=batch_size)
            assert results == list(range(count))
            assert (tally.counts() == 1).all()
    finally:
        over.set()
        thread.join()
