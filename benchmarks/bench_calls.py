"""One call and its answer."""

import multiprocessing
import operator

import pytest

import shmdist as sd

CALLS = 300  # in a round; their median counts


def bench_call_and_pool_apply(compare, pool, workers):
    pid = workers[0]
    compare(
        "call of a no-op",
        lambda: sd.remotecall_fetch(operator.neg, pid, 1),
        lambda: pool.apply(operator.neg, (1,)),
        peer_name="Pool.apply",
        most=1 / 8,
        rounds=15,
        calls=CALLS,
    )


def _echo(connection):
    while True:
        connection.send(connection.recv())


@pytest.fixture
def pipe():
    """A process that sends back what it gets: no call, no function, nothing else."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_echo, args=(theirs,), daemon=True)
    process.start()
    ours.send(0)
    ours.recv()
    yield ours
    process.kill()
    process.join()


def bench_call_and_bare_pipe(compare, pipe, workers):
    pid = workers[0]

    def echo():
        pipe.send(1)
        pipe.recv()

    compare(
        "call of a no-op, beside a bare echo",
        lambda: sd.remotecall_fetch(operator.neg, pid, 1),
        echo,
        peer_name="multiprocessing.Pipe",
        most=0.6,
        rounds=15,
        calls=CALLS,
    )
