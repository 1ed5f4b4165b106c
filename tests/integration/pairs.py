"""What `test_python_pairs` has other interpreters do: ``python -m tests.integration.pairs JOB``."""

import json
import operator
import os
import sys
import warnings

import numpy as np

import shmdist as sd
from tests.integration import helpers
from tests.integration.helpers import ROOT, until


class Point:
    """By reference where it can be imported."""

    def __init__(self, x):
        self.x = x


def double(x):
    return 2 * x


def move(point):
    return Point(point.x + 1)


def write_to(array):
    array += 1
    return float(array.sum())


def use_all(pids, shares=True):
    """Go through what a cluster is for."""
    a, b = pids
    assert [sd.remotecall_fetch(lambda: sys.version, pid) for pid in pids] == [sys.version] * 2
    assert sd.remotecall_fetch(double, a, 4) == 8 and sd.remotecall_fetch(move, b, Point(1)).x == 2
    assert sd.remotecall_fetch(sd.remotecall_fetch, a, lambda: sd.myid() + 1, b) == b + 1

    array = np.arange(1 << 20, dtype=float)
    there = sd.remotecall_fetch(lambda x: x * 2, a, array)
    assert np.array_equal(there, array * 2) and there.flags.writeable
    assert sd.remotecall_fetch(write_to, a, array) == array.sum() + array.size and array[0] == 0
    shared = sd.shared.zeros(1 << 16)
    with warnings.catch_warnings(record=True) as caught:
        assert sd.remotecall_fetch(write_to, b, shared) == shared.size and shared[-1] == shares
    assert len(caught) == (not shares), caught

    assert sd.pmap(lambda x: double(x) + 1, range(100)) == [2 * x + 1 for x in range(100)]
    total = sd.distributed(operator.add)(lambda i: array[i])
    assert total(range(1000)) == array[:1000].sum()

    future = sd.remotecall(np.ones, a, 1000)
    assert sd.remotecall_fetch(lambda f: f.fetch().sum(), b, future) == 1000
    channel = sd.RemoteChannel(lambda: sd.Channel(3), a)
    sd.remote_do(lambda: [channel.put((n, Point(n))) for n in range(9)], b)
    assert [channel.take(timeout=10)[1].x for _ in range(9)] == list(range(9))

    sd.everywhere("import math\nlimit = math.floor(base) + 1", base=41.5)
    assert [sd.remotecall_eval("__main__", pid, "limit") for pid in pids] == [42] * 2

    @sd.everywhere
    def above(x):
        return x > 42

    assert [sd.remotecall_eval("__main__", pid, "above(limit)") for pid in pids] == [False] * 2

    try:
        sd.remotecall_fetch(operator.truediv, a, 1, 0)
    except ZeroDivisionError as error:
        assert isinstance(error, sd.RemoteException) and error.pid == a


def end_one(pid):
    """Kill a worker in the middle of a call."""
    started = sd.RemoteChannel()
    call = sd.remotecall(helpers.tell_and_run, pid, started, helpers.sleep_long)
    ospid = started.take(timeout=10)
    os.kill(ospid, 9)
    error = call.exception(timeout=10)
    assert isinstance(error, sd.ProcessExitedException) and error.signal == "SIGKILL", error
    until(lambda: pid not in sd.procs())
    del call, error


def equal(params):
    """One round makes what stays; another leaves nothing."""
    sd.default_worker_pool()
    before = None
    for _ in range(2):
        with sd.addprocs(2) as pids:
            use_all(pids)
            end_one(pids[0])
            assert sd.remotecall_fetch(sd.myid, pids[1]) == pids[1]
        if before is None:
            before = helpers.settled_state()["descriptors"]
    until(lambda: helpers.settled_state()["descriptors"] <= before, what=f"no more than {before} descriptors")
    if params["machine"]:
        with sd.addprocs([(params["machine"], 2)], **params["ssh"], exename=sys.executable) as pids:
            use_all(pids, shares=False)
    sd.addprocs(2)  # they end with the program


def mixed(params):
    """Each of the others is refused, with a reason, soon; the cluster goes on."""
    [here] = sd.addprocs(1)
    mine = sys.version.split()[0]
    for other, version in params["others"].items():
        for what in (2, [params["machine"]]) if params["machine"] else (2,):
            ssh = params["ssh"] if what != 2 else {}
            try:
                with helpers.within(10):
                    sd.addprocs(what, exename=other, **ssh)
                raise AssertionError(f"{mine} took {version} in")
            except sd.LaunchWorkerError as error:
                first = str(error).splitlines()[0]
                assert all(text in first for text in (mine, version, "functions", "exename=")), first
            assert sd.procs() == [1, here]
            assert sd.remotecall_fetch(lambda x: x + 1, here, 1) == 2
            assert sd.remotecall_fetch(np.sum, here, np.ones(1 << 17)) == 1 << 17


if __name__ == "__main__":
    import tests.integration.pairs as importable

    assert sd.__file__.startswith(str(ROOT)), sd.__file__
    getattr(importable, sys.argv[1])(json.loads(sys.argv[2]))
