"""Arrays: given to a worker, got from one, used by several; beside the standard library, joblib and Ray."""

import subprocess
import sys
import time

import conftest
import numpy as np
import pytest

import shmdist as sd

MIB = 1 << 20
BIG = 64 * MIB


def size(array):
    return array.nbytes


def same(array):
    return array


def double(array):
    return array * 2


def touch(array):
    """Use an array: read an element of each page."""
    return array[::512].sum()


@pytest.fixture(scope="module")
def big():
    return np.ones(BIG // 8)


@pytest.fixture(scope="module")
def warm(workers, big):
    """A worker with which arrays of this size have gone both ways for a while."""
    pid = workers[0]
    settle(lambda: sd.remotecall_fetch(double, pid, big))
    return pid


def settle(function):
    """Call until the memory that it needs is there: it is made in the background."""
    for _ in range(6):
        function()
        sd.timedwait(lambda: False, 0.1)


def rested(function):
    """Measure when what the other one left behind, pages to be freed above all, has been done."""
    time.sleep(0.03)
    return conftest.seconds(function)


def bench_argument(compare, pool, warm, big):
    compare(
        "argument of 64 MiB",
        lambda: sd.remotecall_fetch(size, warm, big),
        lambda: pool.apply(size, (big,)),
        peer_name="Pool.apply",
        most=1 / 25,
        rounds=15,
        measure=rested,
    )


def bench_argument_and_one_copy(compare, warm, big):
    target = np.empty_like(big)
    compare(
        "argument of 64 MiB, beside one copy",
        lambda: sd.remotecall_fetch(size, warm, big),
        lambda: np.copyto(target, big),
        peer_name="numpy.copyto",
        most=1.5,
        rounds=40,
    )


@pytest.mark.parametrize("mib", [1, 64, 1024])
def bench_shared(compare, warm, big, mib):
    target = np.empty_like(big)
    shared = sd.shared.ones(mib * MIB // 8)
    compare(
        f"shared argument of {mib} MiB",
        lambda: sd.remotecall_fetch(size, warm, shared),
        lambda: np.copyto(target, big),
        peer_name="copyto of 64 MiB",
        most=0.2,
        rounds=40,
    )


def bench_shared_is_flat(compare, warm):
    small, large = sd.shared.ones(MIB // 8), sd.shared.ones(1024 * MIB // 8)
    compare(
        "shared argument of 1 GiB, of 1 MiB",
        lambda: sd.remotecall_fetch(size, warm, large),
        lambda: sd.remotecall_fetch(size, warm, small),
        peer_name="shmdist, 1 MiB",
        most=1.5,
        rounds=100,
    )


def bench_there_and_back(compare, pool, warm, big):
    compare(
        "64 MiB there and back",
        lambda: sd.remotecall_fetch(same, warm, big),
        lambda: pool.apply(same, (big,)),
        peer_name="Pool.apply",
        most=1 / 40,
        rounds=9,
        measure=rested,
    )


def bench_new_result(compare, warm, big):
    shared, target = sd.shared.array(big), np.empty_like(big)
    settle(lambda: sd.remotecall_fetch(double, warm, shared))
    compare(
        "new result of 64 MiB",
        lambda: sd.remotecall_fetch(double, warm, shared),
        lambda: np.copyto(target, big * 2),
        peer_name="in process, and a copy",
        most=1.5,
        rounds=40,
    )


class Fresh:
    """Measures with a new array each time: who keeps the last one's file has no use of it."""

    def __init__(self):
        self._next = 0.0

    def __call__(self, function):
        self._next += 1
        array = np.full(256 * MIB // 8, self._next)
        return conftest.seconds(lambda: function(array))


def ours_by_four(workers):
    pool = sd.WorkerPool(workers)
    return lambda array: sd.pmap(touch, [array] * 4, pool=pool, batch_size=1)


def bench_used_by_four(compare, pool, workers):
    ours, fresh = ours_by_four(workers), Fresh()
    settle(lambda: fresh(ours))
    compare(
        "256 MiB used by four tasks",
        ours,
        lambda array: pool.map(touch, [array] * 4, chunksize=1),
        peer_name="Pool.map",
        most=1 / 60,
        rounds=3,
        measure=fresh,
    )


def bench_used_by_four_and_joblib(compare, workers):
    joblib = pytest.importorskip("joblib")
    ours, fresh = ours_by_four(workers), Fresh()
    settle(lambda: fresh(ours))
    with joblib.Parallel(n_jobs=2) as parallel:
        compare(
            "256 MiB used by four tasks",
            ours,
            lambda array: parallel(joblib.delayed(touch)(array) for _ in range(4)),
            peer_name="joblib",
            most=1.0,
            rounds=7,
            measure=fresh,
        )


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=2 << 30,
    )
    yield ray
    ray.shutdown()


def bench_used_by_four_and_ray(compare, workers, ray):
    ours, fresh = ours_by_four(workers), Fresh()
    settle(lambda: fresh(ours))
    task = ray.remote(lambda array: array[::512].sum())  # by value: its workers cannot import this file

    def theirs(array):
        reference = ray.put(array)
        return ray.get([task.remote(reference) for _ in range(4)])

    settle(lambda: fresh(theirs))
    compare(
        "256 MiB used by four tasks",
        ours,
        theirs,
        peer_name="Ray",
        most=1.0,
        rounds=15,
        measure=fresh,
    )


def bench_8_kib(compare, workers):
    pid, small = workers[0], np.ones(1024)
    compare(
        "argument of 8 KiB",
        lambda: sd.remotecall_fetch(size, pid, small),
        lambda: sd.remotecall_fetch(abs, pid, 1),
        peer_name="shmdist, without it",
        most=1.5,
        rounds=25,
        measure=lambda function: conftest.seconds(function, calls=200),
    )


STREAM = """
import multiprocessing, statistics, sys, time
import numpy as np
import shmdist as sd

def size(array):
    return array.nbytes

def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin

if __name__ == "__main__":
    array = np.ones(64 << 17)
    with multiprocessing.Pool(2) as pool, sd.addprocs(2) as pids:
        ours, theirs = [], []
        for _ in range(10):
            ours.append(seconds(lambda: sd.remotecall_fetch(size, pids[0], array)))
            theirs.append(seconds(lambda: pool.apply(size, (array,))))
        print(statistics.median(ours[1:]), statistics.median(theirs[1:]))
"""

FIRST = """
import sys, time
import numpy as np
import shmdist as sd

def size(array):
    return array.nbytes

with sd.addprocs(1) as pids:
    sd.remotecall_fetch(size, pids[0], np.ones(1000))
    for mib in (48, 64, 80):
        array = np.ones(mib << 17)
        begin = time.perf_counter()
        sd.remotecall_fetch(size, pids[0], array)
        print(time.perf_counter() - begin)
        sd.timedwait(lambda: False, 0.2)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a program of its own, and returns the numbers that it prints."""

    def run(program, limit=None):
        if limit is not None:
            monkeypatch.setenv("SHMDIST_ARENA_LIMIT", limit)
        path = tmp_path / "program.py"
        path.write_text(program)
        done = subprocess.run([sys.executable, path], check=True, stdout=subprocess.PIPE, text=True)
        monkeypatch.delenv("SHMDIST_ARENA_LIMIT", raising=False)
        return [float(word) for word in done.stdout.split()]

    return run


def bench_by_stream(record, run):
    """Without shared memory, as to another host."""
    ours, theirs = run(STREAM, limit="0")
    record("argument of 64 MiB by stream", ours, theirs, "Pool.apply", 1 / 4)


def bench_first_transfer(compare, run):
    compare(
        "first transfer of 48, 64, 80 MiB",
        None,
        "0",
        peer_name="the stream alone",
        most=1.15,  # the same road: all between is noise
        rounds=7,
        measure=lambda limit: sum(run(FIRST, limit)),
    )
