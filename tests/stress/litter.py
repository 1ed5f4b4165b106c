"""Objects whose finalizers use shmdist in every way, and what these came to; one `Site` a process."""

import collections
import functools
import gc
import itertools
import logging
import operator
import random
import sys
import threading
import time
import weakref

import numpy as np

import shmdist as sd

REFUSED = "a finalizer"  # how the error begins with which one is told that it cannot do that here
MOST = 60  # objects in cycles of one process
LONG = 30  # seconds after which what a finalizer waits for is lost
BIG = 20000  # elements of an array that travels in shared memory
_busy = threading.local()  # a finalizer in a finalizer would never end


class Site:
    """What the finalizers of this process use, and what they came to.

    Attributes
    ----------
    others : list of int
        The other processes.
    channels : list of RemoteChannel
        One on each process, without bounds. Only tokens are put there.
    futures : list of Future
        Of calls on each process, fetched by many. Each has its process's id.
    pool : list of WorkerPool
        One, that all processes use.
    """

    def __init__(self, others, channels, futures, pool):
        self.others, self.channels, self.futures, self.pool = others, channels, futures, pool
        self.tokens = itertools.count(1)
        # Nothing here is counted with a lock held, for a finalizer may come there; each step is one.
        self.arrived = itertools.count()  # its next number is how many calls of finalizers have come
        self.sent = []  # the processes to which finalizers here have sent calls
        self.maybe_sent = []  # those where the sending was interrupted
        self.put, self.took = [], []  # tokens
        self.open = []  # those whose putting was interrupted: they may be put or not
        self.worked = {kind: itertools.count() for kind in ACTIONS}
        self.refused = {kind: itertools.count() for kind in ACTIONS}
        self.skipped, self.interrupted = itertools.count(), itertools.count()
        self.interrupted_takes = itertools.count()  # each may have taken one that is noted nowhere
        self.wrong = []
        self.fresh = collections.deque(
            maxlen=8
        )  # futures that others fetch as well, each with what it comes to
        self.watched = {}  # weak references whose callbacks are finalizers, too

    def peer(self):
        """Return some other process."""
        return random.choice(self.others)

    def note(self, text):
        """Note what should not have been."""
        self.wrong.append(text)


site = None


def set_up(others, channels, futures, pool):
    """Make this process's site, and have errors that nobody would see noted there."""
    global site
    site = Site(others, channels, futures, pool)
    sys.unraisablehook = functools.partial(_unraisable, site, sys.__unraisablehook__)
    threading.excepthook = lambda shown: site.note(f"in {shown.thread}: {_chain(shown.exc_value)}")
    logging.getLogger("shmdist").addHandler(_Noted(logging.WARNING))


def _unraisable(site, show, shown):
    """Note what a finalizer raised; show it where the interpreter ends, and this module's names are gone."""
    if _chain is None:
        show(shown)
    elif shown.exc_type is KeyboardInterrupt:  # in a callback of the collector; it is answered for the call
        next(site.interrupted)
    else:
        site.note(f"not raised, in {shown.object!r:.200}: {_chain(shown.exc_value)}")


class _Noted(logging.Handler):
    def emit(self, record):
        site.note(f"logged: {record.getMessage()} {_chain(record.exc_info[1]) if record.exc_info else ''}")


# ---------------------------------------------------------------------- objects


def finalize(kind):
    """Do what a finalizer does, and note what it came to."""
    if site is None:
        return
    if getattr(_busy, "now", False):
        next(site.skipped)
        return
    _busy.now = True
    try:
        ACTIONS[kind]()
        next(site.worked[kind])
    except sd.ShmdistError as error:
        if REFUSED in str(error):
            next(site.refused[kind])
        else:
            site.note(f"{kind}: {_chain(error)}")
    except KeyboardInterrupt:  # of the call that the thread runs, or of an abandoned map
        next(site.interrupted)
    except BaseException as error:
        site.note(f"{kind}: {_chain(error)}")
    finally:
        _busy.now = False


def _chain(error):
    """Describe an error, with those that led to it."""
    import traceback

    return "".join(traceback.format_exception(error))[-3000:]


class _Mark:
    """Part of what is left to the collector: tells how much that is."""

    made, ended = itertools.count(), itertools.count()

    def __init__(self):
        next(self.made)

    def __del__(self):
        next(self.ended)


def is_full():
    """Tell whether there is enough litter: one thread at a time runs finalizers, and they wait for others."""
    return number(_Mark.made) - number(_Mark.ended) > MOST


class Litter:
    """Something whose finalizer does `kind`; may be sent, called, and be a value or an item."""

    def __init__(self, kind, cycle=False):
        self.kind = kind
        if cycle and not is_full():
            self.me, self.mark = self, _Mark()

    def __call__(self, *args):
        return sum(args)

    def __reduce__(self):
        return Litter, (self.kind, hasattr(self, "me"))

    def __del__(self):
        finalize(self.kind)


class _Plain:
    """Something in a cycle, to which weak references lead."""

    def __init__(self):
        self.me, self.mark = self, _Mark()


def _watch(kind):
    """Leave a cycle, at whose end a callback of a weak reference does `kind`."""
    plain = _Plain()
    key = next(site.tokens)

    def gone(_):
        site.watched.pop(key, None)
        finalize(kind)

    site.watched[key] = weakref.ref(plain, gone)


def _suspend(kind):
    """Leave a generator half done, in a cycle, which does `kind` when it is closed."""

    def generate():
        me, mark = made, _Mark()  # noqa: F841 - the cycle
        try:
            yield
        finally:
            finalize(kind)

    made = generate()
    next(made)


def litter(kind, how=None):
    """Leave something that only the collector ends, and that does `kind` then; if there is not too much."""
    if is_full():
        return
    how = how or random.choice(("object", "object", "callback", "generator", "finalize"))
    if how == "object":
        Litter(kind, cycle=True)
    elif how == "callback":
        _watch(kind)
    elif how == "generator":
        _suspend(kind)
    else:
        plain = _Plain()
        weakref.finalize(plain, finalize, kind).atexit = False


def litter_much(kinds):
    """Do so for each of some kinds."""
    for kind in kinds:
        litter(kind)


def in_cycle(*things):
    """Leave things to the collector; if there is not too much."""
    if is_full():
        return
    cycle = [*things, _Mark()]
    cycle.append(cycle)


# ---------------------------------------------------------------------- what finalizers do


def arrive():
    """Note a call of a finalizer."""
    next(site.arrived)


def _expect(found, right):
    if found != right:
        site.note(f"{found!r:.200} instead of {right!r:.200}")


def _send():
    pid = site.peer()
    try:
        sd.remote_do(arrive, pid)
        site.sent.append(pid)
    except KeyboardInterrupt:  # of the call, or just after it
        site.maybe_sent.append(pid)
        raise


def _put():
    token = next(site.tokens) * 8 + sd.myid()
    try:
        random.choice(site.channels).put(token)
        site.put.append(token)
    except KeyboardInterrupt:  # of the put, or just after it
        site.open.append(token)
        raise


def _take():
    try:
        site.took.append(random.choice(site.channels).take(timeout=0))
    except TimeoutError:
        pass
    except KeyboardInterrupt:  # of the take, or just after it
        next(site.interrupted_takes)
        raise


def _future():
    future = random.choice(site.futures)
    future.isready()
    _expect(future.fetch(timeout=LONG), future.where)


def _fresh_future():
    try:
        future, value = random.choice(site.fresh)
    except IndexError:
        return
    how = random.random()
    if how < 0.3:
        _expect(sd.remotecall_fetch(fetched, site.peer(), future, how < 0.1), value)
    elif how < 0.5:
        future.isready()
        future.wait(timeout=LONG)
    _expect(future.fetch(timeout=LONG), value)


def fetched(future, sent_on):
    """Return the value of a future, which comes to this process."""
    if sent_on:
        return sd.remotecall_fetch(fetched, site.peer(), future, False)
    return future.fetch(timeout=LONG)


def doze():
    """Be long about nothing, in steps that end soon: Python 3.11 with a hook stands still while one is interrupted."""
    for _ in range(2000):
        time.sleep(0.005)


def _cancel():
    sd.remotecall(doze, site.peer()).cancel()


def _time_out():
    try:
        sd.RemoteChannel(lambda: sd.Channel(1), site.peer()).take(timeout=0.01)
    except TimeoutError:
        return
    site.note("took what is not there")


def _call_back():
    called = sd.remotecall(abs, site.peer(), -1)
    called.add_done_callback(lambda future: _expect(future.result(), 1))


def _future_put():
    future = sd.Future(site.peer())
    future.put(5)
    _expect(future.fetch(timeout=LONG), 5)


def _pool():
    _expect(sd.remotecall_fetch(operator.neg, site.pool[0], 3), -3)
    sd.remotecall(operator.neg, site.pool[0], 3)


def _map():
    _expect(sd.pmap(operator.neg, range(5), pool=sd.WorkerPool([site.peer()])), [0, -1, -2, -3, -4])


def _abandon():
    results = sd.pgenerate(operator.neg, itertools.count(), ordered=False)
    next(results)
    in_cycle(results)


def _local():
    channel = sd.Channel(2)
    channel.put(1)
    _expect((channel.take(), len(channel)), (1, 0))
    channel.close()
    _expect(sd.Future().put(1).fetch(), 1)


def _shared():
    array = sd.shared.ones(1000)
    _expect(sd.remotecall_fetch(np.sum, site.peer(), array), 1000)


def _drop():
    peer = site.peer()
    in_cycle(
        sd.remotecall(np.ones, peer, BIG),
        sd.RemoteChannel(lambda: sd.Channel(1), peer),
        sd.Future(peer),
        sd.shared.zeros(1000),
        sd.CachingPool(site.others),
        sd.WorkerPool(site.others),
    )


#: By what they do: send, wait, put, take, drop, use shared memory.
ACTIONS = {
    "send": _send,
    "send by future": lambda: sd.remotecall(len, site.peer(), bytes(30000)),
    "send an array": lambda: sd.remotecall(np.sum, site.peer(), np.ones(BIG)),
    "send here": lambda: sd.remotecall(abs, sd.myid(), -1),
    "wait": lambda: _expect(sd.remotecall_fetch(abs, site.peer(), -1), 1),
    "wait for a future": lambda: _expect(sd.remotecall(abs, site.peer(), -1).fetch(timeout=LONG), 1),
    "wait for its end": lambda: sd.remotecall_wait(abs, site.peer(), -1),
    "wait for an array": lambda: _expect(len(sd.remotecall_fetch(np.ones, site.peer(), BIG)), BIG),
    "wait here": lambda: _expect(sd.remotecall(abs, sd.myid(), -1).fetch(timeout=LONG), 1),
    "call here": lambda: _expect(sd.remotecall_fetch(abs, sd.myid(), -1), 1),
    "put": _put,
    "take": _take,
    "length": lambda: len(random.choice(site.channels)),
    "future": _future,
    "fresh future": _fresh_future,
    "put into a future": _future_put,
    "cancel": _cancel,
    "call back": _call_back,
    "time out": _time_out,
    "pool": _pool,
    "map": _map,
    "abandon a map": _abandon,
    "local": _local,
    "task": lambda: sd.async_(abs, 1),
    "wait for a task": lambda: _expect(sd.async_(abs, -1).fetch(timeout=LONG), 1),
    "make shared": lambda: sd.shared.zeros(1000),
    "send shared": _shared,
    "drop": _drop,
}
KINDS = list(ACTIONS)


# ---------------------------------------------------------------------- collections


class Collector:
    """Lets the collector run at random: at allocations, and at calls and returns of any function."""

    def __init__(self):
        self.thresholds = gc.get_threshold()
        self.started = False

    def start(self, often):
        """Begin; about once in so many calls and returns there is a collection besides those at allocations.

        Python 3.11 tells of those on this thread and those that are begun from now on.
        """
        self.started = True
        chance = 1 / often

        # At hand: it runs on some threads until the interpreter ends, when this module's names are gone.
        draw, choose, collect = random.random, random.choice, gc.collect

        def hook(*_):
            if draw() < chance:
                collect(choose((0, 0, 0, 0, 0, 0, 1, 1, 2)))

        if sys.version_info >= (3, 12):
            events = sys.monitoring.events
            sys.monitoring.use_tool_id(4, "shmdist's test of finalizers")
            for event in (events.PY_START, events.PY_RETURN, events.CALL):
                sys.monitoring.register_callback(4, event, hook)
            sys.monitoring.set_events(4, events.PY_START | events.PY_RETURN | events.CALL)
        else:
            threading.setprofile(hook)
            sys.setprofile(hook)

    def stop(self):
        """End all that, on this thread and in time on the others; then collect what there is."""
        gc.set_threshold(*self.thresholds)
        if self.started:
            self.started = False
            if sys.version_info >= (3, 12):
                sys.monitoring.set_events(4, 0)
                sys.monitoring.free_tool_id(4)
            else:
                threading.setprofile(None)
                sys.setprofile(None)


collector = Collector()


def change_threshold():
    """Have the collector run after some other number of allocations."""
    if collector.started:
        gc.set_threshold(random.choice((1, 2, 3, 5, 8, 13, 21, 34, 89)), random.randint(1, 20), 20)


def begin(seed, often):
    """Begin to collect at random."""
    random.seed(seed)
    collector.start(often)
    change_threshold()


def end():
    """End that, and let all finalizers run."""
    collector.stop()
    for _ in range(3):
        gc.collect()


def number(counter):
    """Return the next number of a counter, and leave it."""
    return counter.__reduce__()[1][0]


def counted():
    """Return what is known of the finalizers and collections of this process."""
    return {
        "arrived": number(site.arrived),
        "sent": dict(collections.Counter(site.sent)),
        "maybe sent": dict(collections.Counter(site.maybe_sent)),
        "put": list(site.put),
        "open": list(site.open),
        "took": list(site.took),
        "interrupted takes": number(site.interrupted_takes),
        "worked": {kind: number(counter) for kind, counter in site.worked.items()},
        "refused": {kind: number(counter) for kind, counter in site.refused.items()},
        "skipped": number(site.skipped),
        "interrupted": number(site.interrupted),
        "collections": sum(generation["collections"] for generation in gc.get_stats()),
        "wrong": list(site.wrong),
    }


def tear_down():
    """Let go of all that the site has."""
    for each in (site.channels, site.futures, site.pool, site.fresh, site.watched):
        each.clear()
    gc.collect()
