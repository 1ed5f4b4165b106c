"""Tables of blocks, counts and free workers change whole or not at all, whatever is raised where inside them."""

import logging
import operator
import sys

import numpy as np
import pytest

import shmdist as sd
from shmdist.memory import arena, leases
from shmdist.refcount import receipts, table
from shmdist.runtime import count_audit, counts, segment_exchange, sharing
from shmdist.runtime.node import current_node
from shmdist.scheduling import pool_state
from tests.integration.helpers import until

TABLES = {
    module.__file__ for module in (arena, leases, receipts, count_audit, counts, table, sharing, pool_state)
}
#: What comes after the decision (to give back, above all) is not to fail as well; locks do not.
_LEFT_OUT = {"release", "__exit__", "leave", "__del__", "<genexpr>"}
#: What only undoes or gives back: where that fails too there is no way left.
_UNDOES = {
    "take_back",
    "revoke",
    "unregister_for",
    "_owe",
    "_give_up",
    "_stay",
    "untake",
    "give_back",
    "_rebuild",
}
#: An error in here leaves open whether a frame goes.
_WRITES = {"send", "post", "flush"}
#: What does something once more; there the error comes inside.
_TRIES_AGAIN = {"firmly"}
_MOST = 400


class Raiser:
    """Raises an error at call number `due` that this thread makes inside the tables."""

    def __init__(self, due, error):
        self.due, self.error = due, error
        self.not_inside = set() if error is MemoryError else {"_poll"}  # reading, of which another test is
        self.at = None

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *failure):
        sys.setprofile(None)

    def _profile(self, frame, event, arg):
        if event == "c_call":
            name = arg.__name__
        elif event == "call":
            name, frame = frame.f_code.co_name, frame.f_back
        else:
            return
        if (
            frame is None
            or frame.f_code.co_filename not in TABLES
            or name in _LEFT_OUT | _WRITES | _TRIES_AGAIN
        ):
            return
        each = frame
        for _ in range(16):
            if each is None:
                break
            if each.f_code.co_name in _UNDOES | _LEFT_OUT | self.not_inside:
                return
            each = each.f_back
        self.due -= 1
        if self.due < 0:
            sys.setprofile(None)
            self.at = f"{name} in {frame.f_code.co_qualname}"
            raise self.error(f"raised at {self.at}")


@pytest.fixture(autouse=True)
def _no_log(caplog):
    """What is logged keeps the frames of the errors, and with them what was read."""
    caplog.set_level(logging.CRITICAL + 1, "shmdist")
    yield
    current_node().sharing.maintainer._trouble = (
        ""  # of a descriptor that was lost: no warning for later tests
    )


def _same(value):
    return value


def _operations(worker, other):
    large, shared = np.ones(40000), sd.shared.zeros(40000)
    remote, local = sd.RemoteChannel(lambda: sd.Channel(9), worker), sd.RemoteChannel(lambda: sd.Channel(9))
    pool, caching = sd.WorkerPool([worker, other]), sd.CachingPool([worker, other])
    future = sd.remotecall(_same, other, 5)

    def through(channel):
        channel.put(large)
        return channel.take(timeout=10).sum() == 40000

    return (
        {
            "array": lambda: sd.remotecall_fetch(np.sum, worker, large) == 40000,
            "array home": lambda: sd.remotecall_fetch(_same, worker, large).sum() == 40000,
            "result": lambda: sd.remotecall_fetch(np.ones, worker, 40000).sum() == 40000,
            "shared": lambda: sd.remotecall_fetch(np.sum, worker, shared[5:]) == 0,
            "made shared": lambda: sd.shared.ones(40000).sum() == 40000,
            "remote channel": lambda: through(remote),
            "local channel": lambda: through(local),
            "reference": lambda: sd.remotecall_fetch(_same, worker, future).fetch(timeout=10) == 5,
            "own reference": lambda: sd.remotecall_fetch(_same, worker, local) == local,
            "future": lambda: sd.remotecall(np.sum, worker, large).fetch(timeout=10) == 40000,
            "local future": lambda: sd.remotecall(operator.neg, 1, 4).fetch(timeout=10) == -4,
            "pool": lambda: sd.remotecall_fetch(operator.neg, pool, 4) == -4,
            "caching pool": lambda: sd.remotecall(operator.neg, caching, 4).fetch(timeout=10) == -4,
            "new channel": lambda: not len(sd.RemoteChannel()),
            "map": lambda: sd.pmap(np.sum, [large, large], pool=pool) == [40000, 40000],
        },
        (remote, local),
        (pool, caching),
    )


def _check(channels, pools):
    node = current_node()
    node.sharing.state()
    for channel in channels:  # what was given up may have been put all the same
        while len(channel):
            channel.take(timeout=10)
    for pool in pools:
        until(lambda state=pool._state: sorted(state._items) == sorted(state.members) and not state.loans)


@pytest.mark.parametrize("error", [MemoryError, OSError])
def test_an_error_at_each_call(fresh, error):
    worker, other = fresh(2)
    operations, channels, pools = _operations(worker, other)
    wrong = []
    for name, operation in operations.items():
        assert operation() and operation(), name
        due = missed = 0
        while missed < 2 and due < _MOST:
            with Raiser(due, error) as raiser:
                try:
                    outcome = bool(operation())
                except Exception as caught:
                    outcome = caught
            missed += raiser.at is None
            due += 1
            if outcome is not True and not (isinstance(outcome, error) or "raised at" in str(outcome)):
                wrong.append((name, raiser.at, repr(outcome)))
            del outcome
            _check(channels, pools)
        assert operation(), name
    assert wrong == []


def _down(depth, operation):
    return operation() if depth == 0 else _down(depth - 1, operation)


def test_at_each_depth_of_the_stack(fresh):
    worker, other = fresh(2)
    operations, channels, pools = _operations(worker, other)
    limit = sys.getrecursionlimit()
    for name, operation in operations.items():
        assert operation(), name
        for depth in range(limit - 180, limit):
            try:
                _down(depth, operation)
            except (RecursionError, sd.SerializationError, sd.RemoteException):
                pass
        _check(channels, pools)
        assert operation(), name


def _few_descriptors(few):
    import os
    import resource

    _, high = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) if few else high, high))


def _accepted(pid):
    peer = current_node().sharing.offers.peers.get(pid)
    return peer is not None and any(peer.accepted.values())


@pytest.mark.filterwarnings("ignore:shmdist. arrays to local processes:RuntimeWarning")
def test_who_had_no_descriptor_for_a_segment_is_asked_again(fresh, monkeypatch):
    monkeypatch.setattr(segment_exchange, "RETRY_SECONDS", 0.0)
    (worker,) = fresh()
    shared = sd.shared.zeros(40000)
    sd.remotecall_fetch(_few_descriptors, worker, True)
    with pytest.raises(MemoryError, match="cannot be given the shared array"):
        sd.remotecall_fetch(np.sum, worker, shared)
    assert not _accepted(worker)
    sd.remotecall_fetch(_few_descriptors, worker, False)
    assert sd.remotecall_fetch(np.sum, worker, shared) == 0
    assert _accepted(worker)
