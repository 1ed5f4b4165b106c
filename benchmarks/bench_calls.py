"""One call and its answer."""

import functools
import multiprocessing
import operator

import conftest
import pytest

import shmdist as sd

# A turn is 200 calls, and their median counts: the first ones find the caches full of the other's data.
# pytest-benchmark's own table shows whole turns; the table after it, single calls.
measure = functools.partial(conftest.seconds, calls=200)


def bench_call_and_pool_apply(compare, pool, workers):
    pid = workers[0]
    compare(
        "call of a no-op",
        lambda: sd.remotecall_fetch(operator.neg, pid, 1),
        lambda: pool.apply(operator.neg, (1,)),
        peer_name="Pool.apply",
        most=1 / 8,
        rounds=25,
        measure=measure,
    )


def echo(connection):
    while True:
        connection.send(connection.recv())


@pytest.fixture
def pipe():
    """A pipe to a process that sends back what it gets: no call, no function, nothing else."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=echo, args=(theirs,), daemon=True)
    process.start()
    yield ours
    process.kill()
    process.join()


def bench_call_and_bare_pipe(compare, pipe, workers):
    pid = workers[0]

    def round_trip():
        pipe.send(1)
        pipe.recv()

    compare(
        "call of a no-op, beside a bare echo",
        lambda: sd.remotecall_fetch(operator.neg, pid, 1),
        round_trip,
        peer_name="multiprocessing.Pipe",
        most=0.6,
        rounds=25,
        measure=measure,
    )
