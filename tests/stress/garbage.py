"""A program: traffic from four threads while the collector runs at random, and finalizers use shmdist.

Run as ``python -m tests.stress.garbage SEED SECONDS FOLDER``. It prints what was done, and what was wrong.
To `FOLDER` go the stacks of all threads of each process that gets SIGUSR1, and a file for each thread of
traffic that is touched when it gets on.
"""

import collections
import concurrent.futures
import faulthandler
import json
import operator
import os
import random
import signal
import sys
import threading
import time

import numpy as np

import shmdist as sd
from tests.integration import helpers
from tests.stress import litter

OFTEN = 3000  # calls and returns of functions, about, to a collection besides those at allocations
SETTLING = 20  # seconds after which what is left at the end is left for good
KEPT = 30  # descriptors that stay after the first use of all


def watch(folder):
    """Have the stacks of this process's threads written on SIGUSR1; returns its process id."""
    file = open(os.path.join(folder, f"stacks.{os.getpid()}"), "w")  # noqa: SIM115 - open to the end
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    faulthandler.enable(file)
    return os.getpid()


# ---------------------------------------------------------------------- traffic


def same(found, right):
    """Raise unless both are equal."""
    assert found == right, f"{found!r:.200} instead of {right!r:.200}"


def small_call(dice, pid, number):
    same(sd.remotecall_fetch(operator.neg, pid, number), -number)


def large_call(dice, pid, number):
    size = dice.choice((100, 3000, 20000, 300000))
    same(sd.remotecall_fetch(np.sum, pid, np.full(size, number)), size * number)


def large_value(dice, pid, number):
    size = dice.choice((3000, 20000, 300000))
    same(sd.remotecall_fetch(np.full, pid, size, number).sum(), size * number)


def echo(dice, pid, number):
    array = np.full(dice.choice((10, 20000)), number)
    back = sd.remotecall(np.negative, pid, array).fetch()
    back += array
    assert not back.any()


def future(dice, pid, number):
    made = sd.Future(dice.choice((pid, None)))
    made.put((number, np.arange(dice.choice((5, 20000)))))
    value = sd.remotecall_fetch(operator.getitem, pid, made, 0) if dice.random() < 0.5 else made.fetch()[0]
    same(value, number)


def fetched_by_many(dice, pid, number):
    """Fetch what finalizers fetch as well."""
    value = number if dice.random() < 0.5 else (number,)
    made = sd.Future(pid) if dice.random() < 0.5 else sd.remotecall(echo_back, pid, value)
    if made._reply is None:
        made.put(value)
    litter.site.fresh.append((made, value))
    litter.litter("fresh future")
    if dice.random() < 0.5:
        made.wait()
    if dice.random() < 0.5:
        same(sd.remotecall_fetch(litter.fetched, pid, made, True), value)
    same(made.fetch(), value)


def echo_back(value):
    return value


def channel(dice, pid, number):
    made = sd.RemoteChannel(lambda: sd.Channel(4), dice.choice((pid, sd.myid())))
    items = [number, bytes(20000), np.full(20000, number), litter.Litter(dice.choice(litter.KINDS))]
    for item in items:
        made.put(item)
    same(made.take(), number)
    same(sd.remotecall_fetch(len, pid, made.take()), 20000)
    assert (made.take() == items[2]).all()
    if dice.random() < 0.5:
        made.take()
    if dice.random() < 0.5:
        made.close()


def shared_array(dice, pid, number):
    array = sd.shared.zeros(dice.choice((10, 5000)))
    sd.remotecall_fetch(array.__setitem__, pid, 3, number)
    same(array[3], number)
    same(sd.remotecall_fetch(np.sum, pid, array[2:5]), number)
    litter.in_cycle(array[1:], array)


def a_map(dice, pid, number):
    pool = dice.choice((sd.WorkerPool, sd.CachingPool))([pid])
    function = dice.choice((operator.neg, lambda x: -x))
    elements = range(number, number + dice.randint(1, 40))
    same(sd.pmap(function, elements, pool=pool, batch_size=dice.choice((None, 1, 3))), [-x for x in elements])


def map_of_litter(dice, pid, number):
    function = litter.Litter(dice.choice(litter.KINDS), cycle=dice.random() < 0.5)
    same(sd.pmap(function, range(5), pool=sd.WorkerPool([pid])), list(range(5)))


def abandoned_map(dice, pid, number):
    source = iter(range(10**6)) if dice.random() < 0.5 else live_source()
    results = sd.pgenerate(
        dice.choice((operator.neg, litter.Litter(dice.choice(litter.KINDS)))),
        source,
        pool=sd.WorkerPool([pid]),
        ordered=dice.random() < 0.5,
    )
    next(results)
    if dice.random() < 0.8:
        litter.in_cycle(results)
    else:
        results.close()


def live_source():
    made = sd.Channel(4)
    made.put(1)
    return made


def loop(dice, pid, number):
    same(sd.distributed(operator.add)(lambda i: i * i)(range(20)), 2470)


def an_error(dice, pid, number):
    try:
        sd.remotecall_fetch(divmod, pid, number, 0)
    except ZeroDivisionError as error:
        litter.in_cycle(error)
    else:
        raise AssertionError("no error")


def own_call(dice, pid, number):
    same(sd.remotecall(operator.neg, sd.myid(), number).fetch(), -number)
    same(sd.async_(operator.neg, number).fetch(), -number)


def local_channel(dice, pid, number):
    made = sd.Channel(3)
    made.put(number)
    made.put(litter.Litter(dice.choice(litter.KINDS)))
    same(made.take(), number)


def litter_as_argument(dice, pid, number):
    """Have litter go about as an argument, a function, and a value."""
    kind, cycle = dice.choice(litter.KINDS), dice.random() < 0.5
    same(sd.remotecall_fetch(isinstance, pid, litter.Litter(kind, cycle), int), False)
    same(sd.remotecall(litter.Litter(kind, cycle), pid, number).fetch(), number)
    dropped = sd.remotecall(litter.Litter, pid, kind, cycle)
    if dice.random() < 0.5:
        same(dropped.fetch().kind, kind)
    if dice.random() < 0.5:
        sd.remotecall_wait(litter.Litter, pid, kind)


def litter_there(dice, pid, number):
    sd.remotecall_fetch(litter.litter_much, pid, dice.choices(litter.KINDS, k=3))


def pool_calls(dice, pid, number):
    """Use a pool that finalizers of all processes use, too."""
    pool = litter.site.pool[0]
    same(sd.remotecall_fetch(operator.neg, pool, number), -number)
    same(sd.remotecall(operator.neg, pool, number).fetch(), -number)
    if dice.random() < 0.2:
        taken = pool.take()
        try:
            litter_there(dice, taken, number)
        finally:
            pool.put(taken)


def several(dice, pid, number):
    """Wait for several at once."""
    with sd.sync():
        begun = [sd.remotecall(operator.neg, pid, number), sd.spawn(abs, number), sd.async_(abs, number)]
    same(sorted(sd.fetch(begun)), [-number, number, number])
    begun = [sd.remotecall(operator.neg, pid, each) for each in range(5)]
    done, left = concurrent.futures.wait(begun, 30)
    same((len(done), len(left)), (5, 0))


def closed_channel(dice, pid, number):
    """Close a channel at which somebody waits."""
    made = sd.RemoteChannel(lambda: sd.Channel(1), dice.choice((pid, sd.myid())))
    waiting = sd.remotecall(list, pid, made) if dice.random() < 0.5 else sd.async_(list, made)
    made.put(number)
    made.close()
    same(waiting.fetch(), [number])


def everywhere(dice, pid, number):
    name = f"number_of_{threading.get_ident()}"
    sd.everywhere(f"{name} = {name}_now", **{f"{name}_now": number})
    same(sd.remotecall_eval("__main__", pid, name), number)


def tokens(dice, pid, number):
    """Put and take what finalizers do too."""
    litter._put()
    litter._take()


def from_there(dice, pid, number):
    """Have a worker call others."""
    sd.remotecall_fetch(some_traffic, pid, dice.random(), sd.myid(), number)


COMMON = (
    small_call,
    large_call,
    large_value,
    echo,
    future,
    fetched_by_many,
    channel,
    shared_array,
    abandoned_map,
    an_error,
    own_call,
    local_channel,
    litter_as_argument,
    litter_there,
    tokens,
    pool_calls,
)
RARE = (a_map, map_of_litter, loop, several, closed_channel, from_there, from_there)
RARER = (everywhere,)


def some_traffic(seed, pid, number):
    """Do a few things with process `pid`, and leave litter."""
    dice = random.Random(seed)
    litter.change_threshold()
    for each in dice.choices(COMMON, k=3):
        litter.litter(dice.choice(litter.KINDS))
        each(dice, pid, number)


class Traffic:
    """The threads and what they came to."""

    def __init__(self, seed, seconds, folder, pids):
        self.seed, self.folder, self.pids = seed, folder, pids
        self.until = time.monotonic() + seconds
        self.done = collections.Counter()
        self.failures = []

    def run(self, number):
        """Be one thread of traffic."""
        dice = random.Random(self.seed * 10 + number)
        done, path = collections.Counter(), os.path.join(self.folder, f"traffic.{number}")
        each = None
        try:
            while time.monotonic() < self.until and not self.failures:
                for _ in range(dice.randint(0, 3)):
                    litter.litter(dice.choice(litter.KINDS))
                chosen = dice.random()
                each = dice.choice(COMMON if chosen < 0.85 else RARE if chosen < 0.99 else RARER)
                with open(path, "w") as file:
                    file.write(each.__name__)
                each(dice, dice.choice(self.pids), dice.randint(1, 1000))
                done[each.__name__] += 1
                litter.change_threshold()
        except BaseException as error:
            self.failures.append(f"{getattr(each, '__name__', each)}: {litter._chain(error)}")
        finally:
            os.path.exists(path) and os.remove(path)
        self.done.update(done)

    def run_all(self):
        """Run four threads, this one among them."""
        threads = [
            threading.Thread(target=self.run, args=(number,), name=f"traffic {number}")
            for number in (1, 2, 3)
        ]
        for thread in threads:
            thread.start()
        self.run(0)
        for thread in threads:
            thread.join()


# ---------------------------------------------------------------------- the program


def states(pids):
    """Return what is left on each process."""
    found = {pid: sd.remotecall_fetch(helpers.settled_state, pid) for pid in pids}
    return {1: helpers.settled_state(), **found}


def leftovers(before, now):
    """Return what is there now and was not before."""
    left = []
    for pid, state in now.items():
        for name, value in state.items():
            former = before[pid][name]
            if name == "references":
                left += [f"process {pid}: {text}" for key, text in value.items() if key not in former]
            elif name == "descriptors":
                if value > former:
                    left.append(f"process {pid}: {value - former} more descriptors")
            elif value and value != former:
                left.append(f"process {pid}: {name}: {value}")
    return left


def settle(before, pids):
    """Wait until nothing is left but what was there before; return what still is."""
    end = time.monotonic() + SETTLING
    while (left := leftovers(before, states(pids))) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def accounts(pids):
    """Return the numbers of all processes once no call of a finalizer is on its way."""
    end = time.monotonic() + SETTLING
    while True:
        found = {1: litter.counted(), **{pid: sd.remotecall_fetch(litter.counted, pid) for pid in pids}}
        wrong = []
        for pid, each in found.items():
            sent, maybe = (
                sum(other[what].get(pid, 0) for other in found.values()) for what in ("sent", "maybe sent")
            )
            if not sent <= each["arrived"] <= sent + maybe:
                wrong.append(
                    f"process {pid} got {each['arrived']} of {sent} calls, {maybe} may have been sent"
                )
        if not wrong or time.monotonic() > end:
            return found, wrong
        time.sleep(0.05)


def check_tokens(pids, channels):
    """Return what is wrong with the tokens: each that was put was taken once, or is still there.

    Finalizers run for a while after the traffic has ended, and a token is put before it is noted.
    """
    end, left = time.monotonic() + SETTLING, collections.Counter()
    while True:
        for each in channels:
            while len(each):
                left[each.take()] += 1
        found, wrong = accounts(pids)
        wrong += wrong_tokens(found, left)
        if not wrong or time.monotonic() > end:
            return found, wrong
        time.sleep(0.05)


def wrong_tokens(found, left):
    """Return what is wrong, when these are left in the channels."""
    put = collections.Counter(token for each in found.values() for token in each["put"])
    took = left + collections.Counter(token for each in found.values() for token in each["took"])
    maybe = [token for each in found.values() for token in each["open"]]
    put += collections.Counter(token for token in maybe if token in took and token not in put)
    lost = list(put - took)
    # An interrupt that comes just after a take is no loss of the channel's.
    open_takes = sum(each["interrupted takes"] for each in found.values())
    wrong = [f"token {token} was put and lost" for token in lost] if len(lost) > open_takes else []
    return wrong + [f"token {token} was taken and not put, or twice" for token in took - put]


def check_pool(pool, pids):
    """Return what is wrong with the pool: all its workers are free."""
    try:
        free = [pool.take(timeout=SETTLING) for _ in pids]
    except TimeoutError:
        return [f"workers of the pool are lost: {pool._state!r}"]
    return [] if sorted(free) == pids else [f"the pool has lent one worker twice: {free}"]


def make_sites(pids):
    """Set all processes up; returns the channels and the pool."""
    everybody = [1, *pids]
    pool = sd.WorkerPool(pids)
    channels = [sd.RemoteChannel(lambda: sd.Channel(float("inf")), pid) for pid in everybody]
    for pid in everybody:
        futures = [sd.remotecall(sd.myid, owner) for owner in everybody]
        others = [each for each in everybody if each != pid]
        if pid == 1:
            litter.set_up(others, list(channels), futures, [pool])
        else:
            sd.remotecall_fetch(litter.set_up, pid, others, channels, futures, [pool])
    return channels, pool


def use_all(pids):
    """Do everything once, so that what the first use of it leaves is there before."""
    dice = random.Random(1)
    for pid in pids:
        for each in (*COMMON, *RARE, *RARER):
            each(dice, pid, 5)
        for other in pids:
            sd.remotecall_fetch(sd.remotecall_fetch, pid, int, other)
    sd.remotecall_fetch(some_traffic, pids[0], 1, pids[1], 5)


def main(seed, seconds, folder):
    """Run it all; returns what was wrong."""
    watch(folder)
    ospids = {}
    with sd.addprocs(2) as added:
        pids = list(added)
        for pid in pids:
            ospids[pid] = sd.remotecall_fetch(watch, pid, folder)
        sd.default_worker_pool()
        make_sites(pids)
        use_all(pids)
        for pid in [1, *pids]:
            sd.remotecall_fetch(litter.tear_down, pid)
            sd.remotecall_fetch(helpers.settle_down, pid)
        time.sleep(0.2)
        before = states(pids)
        channels, pool = make_sites(pids)
        for pid in [1, *pids]:
            if pid != 1:
                sd.remotecall_fetch(litter.begin, pid, seed * 10 + pid, OFTEN)
        litter.begin(seed, OFTEN)
        traffic = Traffic(seed, seconds, folder, pids)
        traffic.run_all()
        litter.end()
        for pid in pids:
            sd.remotecall_fetch(litter.end, pid)
        found, wrong = check_tokens(pids, channels)
        wrong += traffic.failures
        wrong += [f"process {pid}: {text}" for pid, each in found.items() for text in each["wrong"]]
        wrong += check_pool(pool, pids)
        channels.clear()
        del pool
        for pid in [1, *pids]:
            sd.remotecall_fetch(litter.tear_down, pid)
        wrong += [f"left: {text}" for text in settle(before, pids)]
    wrong += [f"worker {pid} is left" for pid, ospid in ospids.items() if helpers.is_alive(ospid)]
    tell(traffic, found)
    return wrong


def tell(traffic, found):
    """Print what was done."""
    total = {
        "operations": sum(traffic.done.values()),
        "collections": sum(each["collections"] for each in found.values()),
        "worked": sum(sum(each["worked"].values()) for each in found.values()),
        "refused": sum(sum(each["refused"].values()) for each in found.values()),
        "skipped": sum(each["skipped"] for each in found.values()),
        "interrupted": sum(each["interrupted"] for each in found.values()),
        "tokens": sum(len(each["put"]) for each in found.values()),
    }
    kinds = {
        kind: [sum(each[what][kind] for each in found.values()) for what in ("worked", "refused")]
        for kind in litter.KINDS
    }
    print(json.dumps({**total, "by kind": kinds, "traffic": dict(traffic.done)}))


if __name__ == "__main__":
    from tests.stress import garbage  # this program, by the name by which workers know it

    failures = garbage.main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
    for failure in failures[:50]:
        print("WRONG:", failure)
    sys.exit(bool(failures))
