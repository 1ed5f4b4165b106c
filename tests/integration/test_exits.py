"""Errors that are no `Exception`, of functions that run on this process: they end neither it nor a map."""

import threading

import pytest

import shmdist as sd

KINDS = [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException]


def fail(kind, x):
    if x == 1:
        raise kind("needle")
    return x


def check(error, kind):
    assert type(error) is sd.RemoteException
    assert type(error.captured.ex) is kind and error.pid == sd.myid()
    return "caught"


def aside(function):
    """Run a function on a thread of its own, where KeyboardInterrupt is no Ctrl-C."""
    return sd.async_(function).fetch(timeout=20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"pool": [1]}, {"distributed": False}])
def test_in_maps(cluster, kind, how):
    how = {key: sd.WorkerPool(value) if key == "pool" else value for key, value in how.items()}

    def run():
        with pytest.raises(sd.RemoteException) as caught:
            sd.pmap(lambda x: fail(kind, x), range(3), **how)
        check(caught.value, kind)
        return sd.pmap(lambda x: fail(kind, x), range(3), on_error=lambda e: check(e, kind), **how)

    assert aside(run) == [0, "caught", 2]
    if kind is not KeyboardInterrupt or "pool" not in how:
        assert run() == [0, "caught", 2]


@pytest.mark.parametrize("kind", KINDS)
def test_retries(cluster, kind):
    left = [kind, kind]

    def once(x):
        if left:
            raise left.pop()
        return x

    pool = sd.WorkerPool([1])
    assert aside(lambda: sd.pmap(once, range(3), pool=pool, retry_delays=[0, 0])) == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_in_pgenerate(cluster, kind):
    def run():
        values = sd.pgenerate(lambda x: fail(kind, x), range(3), pool=sd.WorkerPool([1]))
        assert next(values) == 0
        with pytest.raises(sd.RemoteException) as caught:
            next(values)
        check(caught.value, kind)

    aside(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reducer", [max, None])
def test_in_loops(cluster, kind, reducer):
    if reducer is None:
        loop = sd.distributed(lambda x: fail(kind, x), pool=sd.WorkerPool([1]))
        error = loop(range(3)).exception(timeout=20)
    else:
        with pytest.raises(sd.RemoteException) as caught:
            aside(lambda: sd.distributed(reducer, pool=sd.WorkerPool([1]))(lambda x: fail(kind, x))(range(3)))
        error = caught.value
    check(error, kind)


@pytest.mark.parametrize("where", [[1], None])
def test_in_everywhere(cluster, where):
    with pytest.raises(sd.CompositeException) as caught:
        sd.everywhere("import sys; sys.exit(3)", where)
    assert all(type(error) is sd.RemoteException for error in caught.value.exceptions)
    assert sorted(error.pid for error in caught.value.exceptions) == (where or [1, *cluster])


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_worker_that_calls_itself(cluster, kind):
    def run():
        pool = sd.WorkerPool([sd.myid()])
        return aside(
            lambda: sd.pmap(lambda x: fail(kind, x), range(3), pool=pool, on_error=lambda e: check(e, kind))
        )

    assert sd.remotecall_fetch(run, cluster[0]) == [0, "caught", 2]


def test_ctrl_c_stays_what_it_is(cluster):
    """On process 1's main thread it is the user's, and no element's."""
    pool = sd.WorkerPool([1])
    calls = [
        lambda f: sd.pmap(f, range(3), pool=pool, on_error=lambda error: "swallowed"),
        lambda f: list(sd.pgenerate(f, range(3), pool=pool)),
        lambda f: sd.distributed(max, pool=pool)(f)(range(3)),
        lambda f: sd.remotecall_fetch(f, 1, 1),
    ]
    for call in calls:
        with pytest.raises(KeyboardInterrupt) as caught:
            call(lambda x: fail(KeyboardInterrupt, x))
        assert not isinstance(caught.value, sd.RemoteException)


def test_an_interrupt_ends_a_map_on_the_worker_itself(cluster):
    """An interrupted call must not go on with the next element."""

    def run(started):
        def wait(x):
            started.put(x)
            threading.Event().wait()

        return sd.pmap(wait, range(3), pool=sd.WorkerPool([sd.myid()]), on_error=lambda error: "swallowed")

    started = sd.RemoteChannel(lambda: sd.Channel(10))
    call = sd.remotecall(run, cluster[0], started)
    assert started.take(timeout=10) == 0
    sd.interrupt(cluster[0])
    error = call.exception(timeout=20)
    assert type(error) is sd.RemoteException and type(error.captured.ex) is KeyboardInterrupt
    assert not started.isready()


def test_without_workers_the_program_goes_on():
    from tests.integration.helpers import Script

    Script(
        """
import sys
import shmdist as sd

assert sd.pmap(lambda x: sys.exit(3), [1], on_error=lambda e: "caught") == ["caught"]
assert sd.pmap(lambda x: sys.exit(3), [1], on_error=lambda e: "caught", distributed=False) == ["caught"]
"""
    ).end(30).clean()
