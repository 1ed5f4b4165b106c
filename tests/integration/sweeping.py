"""A small cluster, what is done with it while something fails at one call after the other, and its proof."""

import gc
import logging
import operator
import os
import random
import signal
import sys
import threading
import time

import numpy as np

import shmdist as sd
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node
from tests.integration.injection import Injector

TRIES = (
    4  # times that an operation is done until the error comes: threads share the work now this way, now that
)
# Part of the names of the sites that finalizers pass.
IN_FINALIZERS = (
    "__del__",
    "see_to_released",
    "ReferenceCounts.run_soon",
    "ReferenceCounts.hand_over",
    "_ask_for_housekeeping",
)
LARGE = 40000  # numbers of an array that goes through a block
_injector = Injector()
_swallowed = []  # what Python let not out of a finalizer


def begin(act, target=None):
    _injector.begin(act, target)


def end():
    """Return whether it came, and the sites that were passed."""
    return _injector.end(), list(_injector.sites)


def quiet():
    """Have nothing logged, for what is logged keeps the frames of the errors; nor printed by finalizers."""
    logging.getLogger("shmdist").setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda what: _swallowed.append(what.exc_type)


def state():
    """Return what is lent, held and awaited in this process, whose tables are whole."""
    node = current_node()
    with node.lock:
        node.counts.refs._check()
        node.counts.receipts._check()
        counts = {tuple(rrid): dict(entry.counts) for rrid, entry in node.counts.refs.entries.items()}
    shared = node.sharing.state()
    return {
        "blocks lent": shared["lent"],
        "blocks held": sorted(shared["held"]),
        "blocks owed": shared["unsent_releases"],
        "receipts": [repr(table) for table in (node.counts.receipts, node.sharing.receipts) if len(table)],
        "references": counts,
        "released": len(node.counts.released),
        "unsent_releases": {
            owner: counts for owner, counts in list(node.counts.unsent_releases.items()) if counts
        },
        "freed": len(node.counts.freed),
        "pending": sorted(list(node.requests.pending)),
        "waiting": sorted(list(node.requests.waiting)),
        "unclaimed takes": sorted(list(node.requests.unclaimed_takes)),
        "queued": sorted(list(node.tasks.queued)),
        "running": len(node.tasks.running),
        "lanes": len(node.reactor.lanes),
        "functions": len(node.functions),
        "who waits at channels": {
            tuple(rrid): len(entry.value._takers) + len(entry.value._putters)
            for rrid, entry in list(node.counts.refs.entries.items())
            if isinstance(entry.value, sd.Channel)
        },
    }


def settle():
    gc.collect()
    current_node().sharing.blocks.pay()


def _back(home, number):
    return sd.remotecall_fetch(operator.neg, home, number)


def _same(value):
    return value


def _fail():
    raise KeyError("mine")


def _fails(worker):
    try:
        sd.remotecall_fetch(_fail, worker)
    except KeyError as error:
        return error.args == ("mine",)
    return False


def _cancelled(worker):
    future = sd.remotecall(time.sleep, worker, 0.002)
    future.cancel()
    return future.cancelled() or future.fetch(timeout=10) is None


def _stopped(worker, ospid):
    # By another thread: who has no memory for what is left of a frame waits until it can be written.
    going_on = threading.Timer(0.1, os.kill, (ospid, signal.SIGCONT))
    going_on.start()
    os.kill(ospid, signal.SIGSTOP)
    try:
        futures = [sd.remotecall(len, worker, bytes(100_000)) for _ in range(5)]
    finally:
        going_on.join()
    return [future.fetch(timeout=10) for future in futures] == [100_000] * 5


def _in_no_time(channel):
    try:
        channel.take(timeout=0)
    except TimeoutError as error:
        return "raised at" not in str(error)
    return False


class World:
    """Two workers, and what this process does with them.

    Parameters
    ----------
    worker, other : int
        The workers.
    """

    names = (
        "short", "long", "long there", "larger there", "stopped", "small array", "array", "array home", "result",
        "shared", "shared of another", "made shared", "called back", "failing", "remote channel", "local channel",
        "in no time", "reference", "own reference", "future", "future's value", "local future", "put future",
        "pool", "caching pool", "new channel", "cancelled", "map",
    )  # fmt: skip

    def __init__(self, worker, other):
        self.home, self.worker, self.other = sd.myid(), worker, other
        large, small, shared = np.ones(LARGE), np.ones(300), sd.shared.zeros(LARGE)
        remote = sd.RemoteChannel(lambda: sd.Channel(9), worker)
        local = sd.RemoteChannel(lambda: sd.Channel(9))
        pool, caching = sd.WorkerPool([worker, other]), sd.CachingPool([worker, other])
        future, there = sd.remotecall(_same, other, 5), sd.remotecall_fetch(sd.shared.zeros, other, LARGE)
        ospid = sd.remotecall_fetch(os.getpid, worker)
        self.channels, self.pools = (remote, local), (pool, caching)

        def through(channel):
            channel.put(large)
            return channel.take(timeout=10).sum() == LARGE

        fetch, home = sd.remotecall_fetch, self.home
        self.operations = {
            "short": lambda: fetch(operator.neg, worker, 4) == -4,
            "long": lambda: len(fetch(bytes, worker, 100_000)) == 100_000,
            "long there": lambda: fetch(len, worker, bytes(100_000)) == 100_000,
            "larger there": lambda: fetch(len, worker, bytes(250_000)) == 250_000,
            "stopped": lambda: _stopped(worker, ospid),
            "small array": lambda: fetch(operator.mul, worker, small, 2).sum() == 600,
            "array": lambda: fetch(np.sum, worker, large) == LARGE,
            "array home": lambda: fetch(_same, worker, large).sum() == LARGE,
            "result": lambda: fetch(np.ones, worker, LARGE).sum() == LARGE,
            "shared": lambda: fetch(np.sum, worker, shared[5:]) == 0,
            "shared of another": lambda: fetch(np.sum, worker, there[5:]) == 0,
            "made shared": lambda: sd.shared.ones(LARGE).sum() == LARGE,
            "called back": lambda: fetch(_back, worker, home, 3) == -3,
            "failing": lambda: _fails(worker),
            "remote channel": lambda: through(remote),
            "local channel": lambda: through(local),
            "in no time": lambda: _in_no_time(remote),
            "reference": lambda: fetch(_same, worker, future).fetch(timeout=10) == 5,
            "own reference": lambda: fetch(_same, worker, local) == local,
            "future": lambda: sd.remotecall(np.sum, worker, large).fetch(timeout=10) == LARGE,
            "future's value": lambda: sd.remotecall(np.ones, worker, LARGE).fetch(timeout=10).sum() == LARGE,
            "local future": lambda: sd.remotecall(operator.neg, home, 4).fetch(timeout=10) == -4,
            "put future": lambda: sd.Future(worker).put(4).fetch(timeout=10) == 4,
            "pool": lambda: fetch(operator.neg, pool, 4) == -4,
            "caching pool": lambda: sd.remotecall(operator.neg, caching, 4).fetch(timeout=10) == -4,
            "new channel": lambda: not len(sd.RemoteChannel()),
            "cancelled": lambda: _cancelled(worker),
            "map": lambda: sd.pmap(np.sum, [large, large], pool=pool) == [LARGE, LARGE],
        }
        assert tuple(self.operations) == self.names
        self._hook, self._level = sys.unraisablehook, logging.getLogger("shmdist").level
        for pid in self.pids():
            sd.remotecall_fetch(quiet, pid)

    def close(self):
        """Let go of all that it has."""
        sys.unraisablehook = self._hook
        logging.getLogger("shmdist").setLevel(self._level)
        self.operations = self.channels = self.pools = self.before = None
        # Of a descriptor that was lost: no warning for later tests.
        current_node().sharing.maintainer._trouble = ""

    def pids(self):
        return self.home, self.worker, self.other

    # ------------------------------------------------------------------ one site after the other

    def sweep(self, side, acts, count=None, *, names=None, at="", seed=0, begun=lambda *_: None, skip=()):
        """Try sites; return what was wrong, and how many were tried.

        Parameters
        ----------
        side : {"home", "worker"}
            Where the errors come.
        acts : list of Raise or Interrupt
            What is done there.
        count : int, optional
            So many sites of each, drawn by chance, the same each time with one `seed`; default all.
        names : collection of str, optional
            Operations.
        at : str
            What the name of a site must contain.
        begun : callable
            Told operation, act and site before each try.
        """
        wrong, tried, passed = [], 0, {}
        for act in acts:
            if act.at_returns not in passed:
                passed[act.at_returns] = [
                    (name, site)
                    for name, operation in self.operations.items()
                    if names is None or name in names
                    for site in self.record(side, operation, act)
                    if at in site
                ]
            sites = [each for each in passed[act.at_returns]]
            if count is not None:
                sites = random.Random(f"{side} {act!r} {seed}").sample(sites, min(count, len(sites)))
            self.before = self.settled()
            for name, site in sites:
                if f"{name} {act!r} {site}" in skip:
                    continue
                begun(name, act, site)
                hit, faults = self.try_one(side, self.operations[name], site, act)
                tried += hit
                wrong += [(name, repr(act), site, fault) for fault in faults]
        return wrong, tried

    def record(self, side, operation, act, times=3):
        """Return the sites that an operation passes on a side."""
        pid, sites = self._pid(side), {}
        for _ in range(times):
            operation()
            sd.remotecall_fetch(begin, pid, act)
            operation()
            time.sleep(0.012)  # what follows of it: references that are given back
            sites.update(dict.fromkeys(sd.remotecall_fetch(end, pid)[1]))
        return list(sites)

    def _pid(self, side):
        return self.home if side == "home" else self.worker

    def try_one(self, side, operation, site, act):
        """Do an operation while something comes at a site; returns whether it did, and what is wrong then."""
        for _ in range(TRIES):
            try:
                return self._try_one(side, operation, site, act)
            except (
                KeyboardInterrupt
            ):  # something ended between two steps, and it came in the finalizer of that
                sd.remotecall_fetch(end, self._pid(side))
        if any(name in site for name in IN_FINALIZERS):  # it is raised just after that, which is here
            return True, self.compare()
        return False, ["an interrupt came late each time"]

    def _try_one(self, side, operation, site, act):
        pid, faults, hit = self._pid(side), [], False
        for _ in range(TRIES):
            outcomes, between = [], False
            steps = (
                self._as_new,
                lambda: sd.remotecall_fetch(begin, pid, act, site),
                operation,
                lambda: sd.remotecall_fetch(end, pid)[0],
                self._as_new,
            )
            while len(outcomes) < len(steps):
                try:
                    try:
                        outcome = steps[len(outcomes)]()
                    except BaseException as caught:
                        if not act.told(caught):
                            faults.append(f"{type(caught).__name__}: {caught}")
                        outcome = act
                        del caught
                    outcomes.append(outcome)
                except KeyboardInterrupt:
                    between = True  # something ended here, and it came in the finalizer of that
            if outcomes[2] is not act and not outcomes[2]:
                faults.append("a wrong value")
            # It may have come in the last step.
            hit = outcomes[3] if outcomes[3] is not act else (sd.remotecall_fetch(end, pid)[0] or True)
            if hit or faults:
                break
        # One of a call on another thread may come when that has its value.
        mine = "on another thread" not in site
        come = between or act in outcomes or _swallowed
        if hit and mine and act.at_returns and side == "home" and not come:
            faults.append("the interrupt was lost")
        _swallowed.clear()
        if current().runtime_depth:
            faults.append("interrupts are put off for good")
            current().runtime_depth = 0
        try:
            for each in (self.worker, self.other):
                assert sd.remotecall_fetch(_back, each, self.home, 3) == -3
            assert operation(), "a wrong value"
        except BaseException as caught:
            faults.append(f"does not go on: {caught!r}")
        return bool(hit), faults + self.compare()

    @staticmethod
    def _as_new():
        """Let the call that this code belongs to, on a worker, be one that was never interrupted."""
        thread_state = current()
        if thread_state.task is not None:
            thread_state.task.interrupted = thread_state.interrupt_delivered = False

    # ------------------------------------------------------------------ the proof

    def states(self):
        return {pid: sd.remotecall_fetch(state, pid) for pid in self.pids()}

    def settled(self):
        """Return the states when nothing is on its way any more."""
        last = None
        while True:
            for pid in self.pids():
                sd.remotecall_fetch(settle, pid)
            time.sleep(0.02)
            now = self.states()
            if now == last:
                return now
            last = now

    def compare(self, patience=1.0):
        """Return what is left, or missing, that is not so before long."""
        deadline, pause = time.monotonic() + patience, 0.001
        while True:
            for channel in self.channels:  # what was given up may have been put, or come back, all the same
                while len(channel):
                    channel.take(timeout=10)
            now = self.states()
            left = [
                f"process {pid}: {key}: {self.before[pid][key]} -> {value}"[:500]
                for pid, each in now.items()
                for key, value in each.items()
                if self.before[pid][key] != value
            ]
            states = [pool._state for pool in self.pools]
            left += [repr(s) for s in states if sorted(s._items) != sorted(s.members) or s.loans or s._takers]
            if not left or time.monotonic() > deadline:
                break
            if pause > 0.005:
                for pid in self.pids():
                    sd.remotecall_fetch(settle, pid)
            time.sleep(pause)
            pause *= 1.5
        if left:  # the next one is not to be blamed for it
            self.before = now
            for each in states:
                each.loans.clear()
                each._items.extend(pid for pid in each.members if pid not in each._items)
        return left


def sweep_here(worker, other, side, acts, count=None, names=None):
    """Sweep with this process, a worker, as the one that calls."""
    world = World(worker, other)
    try:
        return world.sweep(side, acts, count, names=names)
    finally:
        world.close()
