"""The thread that reads goes on, whatever raises at whatever place of its path; each error is a call's own."""

import contextlib
import logging
import operator
import sys
import time
import types

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime import reactor as reactor_module
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node
from tests.integration import raising

ERRORS = [MemoryError, OSError, RuntimeError, RecursionError]
PATHS = [
    pytest.param(MemoryError, raising.READING, id="MemoryError, reading alone"),
    *(pytest.param(error, raising.SERVING, id=error.__name__) for error in ERRORS),
]
_LONGEST = 120  # calls on the path of one operation, and some


@pytest.fixture(autouse=True)
def _no_log(caplog):
    """What is logged keeps the frames of the errors, and with them what was read."""
    caplog.set_level(logging.CRITICAL + 1, "shmdist")
    yield
    current_node().sharing.maintainer._trouble = (
        ""  # a descriptor lost by an error: the warning is not for later tests
    )


def _back(number):
    return sd.remotecall_fetch(operator.neg, 1, number)


def _operations(worker, channel):
    large, small = np.ones(40000), np.ones(300)
    return {
        "short": lambda: sd.remotecall_fetch(operator.neg, worker, 4) == -4,
        "array": lambda: sd.remotecall_fetch(operator.mul, worker, large, 2).sum() == 80000,
        "small array": lambda: sd.remotecall_fetch(operator.mul, worker, small, 2).sum() == 600,
        "long": lambda: len(sd.remotecall_fetch(bytes, worker, 100_000)) == 100_000,
        "called back": lambda: sd.remotecall_fetch(_back, worker, 3) == -3,
        "future": lambda: sd.remotecall(operator.neg, worker, 4).fetch(timeout=10) == -4,
        "channel": lambda: (channel.put(5), channel.take(timeout=10))[1] == 5,
        "map": lambda: sd.pmap(operator.neg, range(5), pool=sd.WorkerPool([worker])) == [0, -1, -2, -3, -4],
    }


def _raise_at_each(path, error, worker, channel):
    """Do each operation with an error at each call on the path; returns what went wrong."""
    wrong = []
    for name, operation in _operations(worker, channel).items():
        missed = due = 0
        while missed < 2 and due < _LONGEST:
            raiser = raising.Raiser(path, due, error)
            raiser.start()
            try:
                outcome = bool(operation())
            except Exception as caught:
                outcome = caught
            finally:
                raiser.stop()
            missed += raiser.at is None
            due += 1
            told = isinstance(outcome, (error, sd.RemoteException)) and (
                "raised at" in str(outcome) or "no memory" in str(outcome)
            )
            if outcome is not True and not told:
                wrong.append((name, raiser.at, repr(outcome)))
            while len(channel):  # a take that failed after it was asked for may have given its item back
                channel.take(timeout=10)
            assert sd.remotecall_fetch(operator.neg, worker, due) == -due
            if name == "array":
                assert sd.remotecall_fetch(np.sum, worker, np.ones(40000)) == 40000
    return wrong


@pytest.mark.parametrize(("error", "path"), PATHS)
def test_an_error_at_each_call_of_the_path(fresh, error, path):
    worker = fresh()[0]
    channel = sd.RemoteChannel(lambda: sd.Channel(10), worker)
    assert _raise_at_each(path, error, worker, channel) == []
    assert current().runtime_depth == 0  # Ctrl-C is the program's


def _raise_in_worker(path, due, error):
    """Have an error raised on this thread, a worker's main one, the next time that it reads."""
    raiser = raising.Raiser(path, due, error)
    raiser.start()


@pytest.mark.parametrize(("error", "path"), PATHS)
def test_an_error_on_a_workers_main_thread(fresh, error, path):
    worker = fresh()[0]
    sd.remotecall_fetch(np.sum, worker, np.ones(40000))
    for due in range(40):
        try:
            sd.remotecall_fetch(_raise_in_worker, worker, path, due, error)
            assert sd.remotecall(operator.neg, worker, due).fetch(timeout=20) == -due
            assert sd.remotecall(np.sum, worker, np.ones(40000)).fetch(timeout=20) == 40000
        except sd.RemoteException as caught:
            assert "raised at" in str(caught)
        # Where other threads of the worker have read all that, it comes now.
        with contextlib.suppress(sd.RemoteException):
            sd.remotecall_fetch(sys.setprofile, worker, None)
        assert sd.remotecall(operator.neg, worker, due).fetch(timeout=20) == -due


def test_an_error_while_a_thread_naps(fresh, monkeypatch):
    """The next one is woken as before, also where the error cannot be logged."""
    [pid] = fresh()
    reactor = current_node().reactor
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(
            reactor_module, "time", types.SimpleNamespace(sleep=_no_memory, monotonic=time.monotonic)
        )
        reactor._wait_for_previous_leader()
    assert not reactor._napping
    assert sd.remotecall_fetch(_back, pid, 3) == -3


def _no_memory(*_):
    raise MemoryError
