"""Objects whose finalizers use shmdist in every way, and calls during which the collector runs all the time."""

import contextlib
import gc
import itertools
import operator
import random
import threading
import time

import numpy as np

import shmdist as sd

ARRIVED = itertools.count()  # its next number is how many calls of finalizers have come to this process
REFUSED = "a finalizer"  # how the error begins with which one is told that it cannot do that here


def arrive():
    """Note a call of a finalizer."""
    next(ARRIVED)


def arrived():
    """Tell how many have come."""
    return ARRIVED.__reduce__()[1][0]


class Tally:
    """What finalizers came to."""

    def __init__(self):
        self.sent = self.worked = self.refused = 0
        self.wrong = []
        self.busy = threading.local()  # one in another would never end


class InCycle:
    """An object that only the collector ends, and that does something then."""

    def __init__(self, tally, action):
        self.tally, self.action = tally, action
        self.me = self

    def __del__(self):
        tally = self.tally
        if getattr(tally.busy, "now", False):
            return
        tally.busy.now = True
        try:
            self.action()
            tally.worked += 1
        except sd.ShmdistError as error:
            if REFUSED in str(error):
                tally.refused += 1
            else:
                tally.wrong.append(error)
        except BaseException as error:
            tally.wrong.append(error)
        finally:
            tally.busy.now = False


def abandon_map(ordered=True):
    """Leave a map half done, in a cycle."""
    results = sd.pgenerate(operator.neg, itertools.count(), ordered=ordered)
    next(results)
    cycle = [results]
    cycle.append(cycle)


def abandon_live_map():
    """Likewise one whose input is a channel, which a thread of its own reads."""
    channel = sd.Channel(4)
    channel.put(1)
    results = sd.pgenerate(operator.neg, channel)
    next(results)
    cycle = [results]
    cycle.append(cycle)


def actions(tally, worker):
    """Return what finalizers do."""
    shared = sd.RemoteChannel(lambda: sd.Channel(float("inf")), worker)
    local = sd.Channel(float("inf"))
    future = sd.remotecall(abs, worker, -1)
    big = np.ones(20000)

    def send():
        sd.remote_do(arrive, worker)
        tally.sent += 1

    def put_and_take():
        shared.put(1)
        shared.take()

    return [
        send,
        put_and_take,
        lambda: sd.remotecall(len, worker, bytes(30000)),
        lambda: sd.remotecall_fetch(abs, worker, -1),
        lambda: sd.remotecall_fetch(np.sum, worker, big),
        lambda: sd.remotecall_fetch(abs, sd.myid(), -1),
        lambda: sd.remotecall(abs, sd.myid(), -1).fetch(),
        lambda: (local.put(1), local.take(), len(local)),
        lambda: sd.Channel(1).close(),
        lambda: sd.shared.zeros(1000),
        lambda: sd.async_(abs, 1),
        lambda: sd.Future().put(1).fetch(),
        lambda: (future.isready(), future.fetch()),
        lambda: sd.RemoteChannel(lambda: sd.Channel(1), worker),
        lambda: sd.pmap(operator.neg, range(4), pool=sd.WorkerPool([worker])),
    ]


def _traffic(worker, number):
    assert sd.remotecall_fetch(operator.neg, worker, number) == -number
    assert sd.remotecall(operator.neg, worker, number).fetch() == -number
    assert sd.remotecall_fetch(np.sum, worker, np.ones(20000)) == 20000
    assert sd.remotecall_fetch(np.sum, worker, sd.shared.ones(2000)) == 2000
    channel = sd.RemoteChannel(lambda: sd.Channel(2), worker)
    channel.put(number)
    assert channel.take() == number
    local = sd.RemoteChannel(lambda: sd.Channel(2))
    local.put(number)
    assert local.take() == number
    assert sd.remotecall(operator.neg, sd.myid(), number).fetch() == -number


def collect_under_traffic(worker, rounds, seed, threads=3):
    """Let calls go on while the collector runs at nearly every allocation; returns the tally's fields.

    So many rounds on each thread, and on until finalizers have met both: a thread inside, and one outside.
    """
    tally = Tally()
    what = actions(tally, worker)
    end = time.monotonic() + 10
    failures = []

    def run(number):
        random_ = random.Random(seed + number)
        try:
            for done in itertools.count():
                met = tally.worked and tally.refused and tally.sent
                if failures or (met and done >= rounds) or time.monotonic() > end:
                    break
                for _ in range(3):
                    InCycle(tally, random_.choice(what))
                    sd.remotecall_fetch(operator.neg, worker, number)
                if number == 0 and sd.myid() == 1:
                    random_.choice([abandon_map, abandon_live_map, lambda: abandon_map(False)])()
                gc.set_threshold(random_.randint(1, 40), 20, 20)
                _traffic(worker, number)
        except BaseException as error:
            failures.append(error)

    before = gc.get_threshold()
    started = sd.remotecall_fetch(arrived, worker)
    try:
        running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
        for each in running:
            each.start()
        for each in running:
            each.join(max(0.0, end + 5 - time.monotonic()))
        stuck = sum(each.is_alive() for each in running)
    finally:
        gc.set_threshold(*before)
    what.clear()
    gc.collect()
    if not stuck:
        deadline = time.monotonic() + 5
        with contextlib.suppress(sd.ShmdistError):
            while sd.remotecall_fetch(arrived, worker) - started < tally.sent and time.monotonic() < deadline:
                threading.Event().wait(0.01)
    came = None if stuck else sd.remotecall_fetch(arrived, worker) - started
    return (
        stuck,
        [repr(error) for error in failures + tally.wrong],
        tally.worked,
        tally.refused,
        tally.sent,
        came,
    )
