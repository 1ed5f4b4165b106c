"""What is set up once on a process holds in each later call there, and what a call sets is its own."""

import contextvars
import decimal

import numpy as np
import pytest

import shmdist as sd

CALLS = 8
PRECISION = 50
SETUP = f"""
import contextvars, decimal
import numpy as np
decimal.getcontext().prec = {PRECISION}
np.seterr(divide="raise")
level = contextvars.ContextVar("level", default="none")
level.set("set up")
"""


@pytest.fixture
def worker(fresh):
    [pid] = fresh()
    sd.everywhere(SETUP, procs=[pid])
    return pid


def state():
    """Return what the call finds in its context."""
    import __main__

    return decimal.getcontext().prec, np.geterr()["divide"], __main__.level.get()


def spoil(x=None):
    """Change all of it."""
    import __main__

    decimal.getcontext().prec = 3
    np.seterr(divide="ignore")
    __main__.level.set("spoilt")
    return x


def meet(f):
    """Run `f` when as many calls as the barrier is for have come."""
    import __main__

    __main__.barrier.wait()
    return f()


def at_once(pid, f):
    """Run `f` on a worker, on many threads at once; return the different values."""
    sd.everywhere(f"import threading; barrier = threading.Barrier({CALLS}, timeout=30)", procs=pid)
    return {future.fetch(timeout=30) for future in [sd.spawnat(pid, meet, f) for _ in range(CALLS)]}


EXPECTED = PRECISION, "raise", "set up"


def test_on_every_thread(worker):
    assert at_once(worker, state) == {EXPECTED}


def test_what_a_call_sets_is_its_own(worker):
    assert at_once(worker, spoil) == {None}
    assert at_once(worker, state) == {EXPECTED}
    assert sd.remotecall_fetch(spoil, worker) is None
    assert sd.remotecall_fetch(state, worker) == EXPECTED


def test_without_set_up(fresh):
    [pid] = fresh()
    sd.everywhere("import contextvars; level = contextvars.ContextVar('level', default='none')", procs=pid)
    assert at_once(pid, spoil) == {None}
    assert at_once(pid, state) == {(28, "warn", "none")}


def test_on_every_road(worker):
    pool = sd.WorkerPool([worker])
    assert sd.pmap(lambda x: state(), range(3), pool=pool, batch_size=1) == [EXPECTED] * 3
    assert sd.pmap(lambda x: state(), range(5), pool=pool) == [EXPECTED] * 5
    sd.pmap(spoil, range(5), pool=pool)
    assert list(sd.pgenerate(lambda x: state(), range(3), pool=pool)) == [EXPECTED] * 3
    assert sd.remotecall(state, worker).fetch() == EXPECTED
    assert sd.remotecall_fetch(state, sd.CachingPool([worker])) == EXPECTED
    channel = sd.RemoteChannel(lambda: [c := sd.Channel(1), c.put(state())][0], worker)
    assert channel.take() == EXPECTED
    assert sd.remotecall_fetch(lambda: sd.remotecall(state, sd.myid()).fetch(), worker) == EXPECTED
    sd.remotecall_fetch(lambda: sd.remotecall(spoil, sd.myid()).fetch(), worker)
    assert sd.everywhere("level.get()", procs=worker) == "set up"


def test_in_several_steps(worker):
    sd.everywhere("level.set('later')", procs=[worker])
    sd.remotecall_eval("decimal", worker, "getcontext().prec = 7")
    assert at_once(worker, state) == {(7, "raise", "later")}
    with pytest.raises(sd.RemoteException):
        sd.everywhere("np.seterr(divide='print'); 1 / 0", procs=worker)
    assert at_once(worker, state) == {(7, "print", "later")}


def test_on_process_1(worker):
    """Code runs in the caller's context there, and calls from others find what it has set."""
    import __main__

    def script():
        sd.everywhere(SETUP, procs=[1])
        mine = state()
        spoil()
        theirs = sd.remotecall_fetch(lambda: sd.remotecall_fetch(state, 1), worker)
        return mine, theirs, sd.remotecall(state, 1).fetch()

    base = sd.runtime.node.current_node().tasks.context
    before = base.base, base._decimal, base.prepare
    try:
        assert contextvars.Context().run(script) == (EXPECTED,) * 3
    finally:
        base.base, base._decimal, base.prepare = before
        for name in ("level", "barrier"):
            vars(__main__).pop(name, None)


def test_a_local_task_has_a_copy_of_its_callers():
    level = contextvars.ContextVar("level")

    def script():
        level.set("outer")
        sd.async_(level.set, "inner").wait()
        return level.get(), sd.async_(level.get).fetch()

    assert contextvars.Context().run(script) == ("outer", "outer")
    sd.pmap(lambda x: level.set("inner"), range(4), distributed=False)
    assert sd.pmap(lambda x: level.get("none"), range(4), distributed=False) == ["none"] * 4
