"""Workers that are stuck, in three ways, and six things that a program does meanwhile, with arrays of 8 MiB."""

import contextlib
import ctypes
import functools
import operator
import os
import pathlib
import signal
import sys
import threading
import time

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import until

SIZE = 1 << 20  # numbers, 8 MiB
COUNT = 12  # elements or calls
COST = 0.03  # seconds that an element takes


def array(n=1.0):
    import numpy as np

    return np.full(SIZE, float(n))


# ---------------------------------------------------------------------- how they are stuck


class Stopped:
    """A process of this host stands still."""

    def __init__(self, pid, folder):
        self._ospid = current_node().peers.members[pid].ospid

    def begin(self):
        os.kill(self._ospid, signal.SIGSTOP)
        until(lambda: "(stopped)" in pathlib.Path(f"/proc/{self._ospid}/status").read_text())

    def end(self):
        os.kill(self._ospid, signal.SIGCONT)


class Holding:
    """A worker runs C code that holds the interpreter, for `seconds` or until it is let go."""

    seconds = 10.0

    def __init__(self, pid, folder):
        self._pid = pid
        self._path = str(folder / f"fifo{pid}")

    def begin(self):
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self._path)
        self._call = sd.remotecall(hold_the_interpreter, self._pid, self._path, self.seconds)
        until(lambda: os.path.exists(self._path + ".begun"))

    def end(self):
        fd = os.open(self._path, os.O_RDWR)
        os.write(fd, b"x")
        self._call.wait()
        os.close(fd)
        os.unlink(self._path + ".begun")


class _PollFd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]


def hold_the_interpreter(path, seconds):
    fd = os.open(path, os.O_RDWR)
    wanted = _PollFd(fd, 1, 0)  # POLLIN
    open(path + ".begun", "w").close()
    ctypes.PyDLL(None).poll(ctypes.byref(wanted), 1, int(seconds * 1000))
    os.close(fd)


class Silent:
    """What is sent to a host, and what it sends, is lost; so it is lost itself in the end."""

    def __init__(self, host):
        self._host = host

    def begin(self):
        self._host.lose_all()

    def end(self):
        pass


# ---------------------------------------------------------------------- what a program does


class Work:
    """One operation on a pool, on a thread of its own; counts what it comes to.

    Parameters
    ----------
    kind : str
        A name in `OPERATIONS`.
    pids : list of int
        The pool.
    stuck : int
        That of them which is going to be stuck.

    Attributes
    ----------
    done : list of int
        On which processes elements have run, as they say.
    given : int
        How many results a generator has given.
    outcome : object
        What it returns, or the error that it raises.
    """

    def __init__(self, kind, pids, stuck):
        self.kind, self.pids, self.stuck = kind, pids, stuck
        self.done, self.given, self.outcome, self.took = [], 0, None, None
        self.said = sd.RemoteChannel(lambda: sd.Channel(10 * COUNT), 1)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._since = time.monotonic()
        self._listener.start()
        self._thread.start()
        return self

    def _listen(self):
        while (pid := self.said.take()) is not None:
            self.done.append(pid)

    def _run(self):
        try:
            self.outcome = OPERATIONS[self.kind](self)
        except Exception as error:
            self.outcome = error
        self.took = self.seconds

    @property
    def seconds(self):
        """How long it has been under way."""
        return time.monotonic() - self._since

    @property
    def others(self):
        """How many elements others than the stuck worker have run."""
        return sum(pid != self.stuck for pid in self.done)

    def join(self, timeout=30):
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"{self.kind} does not end"
        self.said.put(None)
        self._listener.join(timeout)
        return self.outcome

    @property
    def function(self):
        """What elements are given to: their sum, after a while, and after it is said that they are done."""
        return functools.partial(_sum, self.said)


def _sum(said, values):
    total = float(values.sum())
    time.sleep(COST)
    said.put(sd.myid())
    return total


def _first_times(said, values, n):
    time.sleep(COST)
    said.put(sd.myid())
    return float(values[0]) * n


def arrays(count=COUNT):
    return [array(n) for n in range(count)]


def sums(count=COUNT):
    return [float(n) * SIZE for n in range(count)]


def pmap(work):
    return sd.pmap(work.function, arrays(), pool=work.pids, batch_size=1)


def pgenerate(work):
    results = []
    for result in sd.pgenerate(work.function, map(array, range(COUNT)), pool=work.pids):
        results.append(result)
        work.given += 1
    return results


def reduction(work):
    return sd.distributed(operator.add, arrays(), pool=work.pids)(work.function)


def dynamic_reduction(work):
    return sd.distributed(operator.add, arrays(), pool=work.pids, schedule="dynamic", chunk=1)(work.function)


def everywhere(work):
    name = f"stuck_{os.urandom(4).hex()}"
    text = f"{name} = array\nsaid.put(me())"
    return sd.everywhere(text, work.pids, array=array(), said=work.said, me=sd.myid)


def broadcast(work):
    function = functools.partial(_first_times, work.said, array(2))
    return sd.pmap(function, range(COUNT), pool=work.pids, batch_size=1)


def pool_calls(work):
    pool = sd.WorkerPool(work.pids)
    function = work.function
    calls = [sd.remotecall(function, pool, values) for values in arrays()]
    return [call.fetch() for call in calls]


OPERATIONS = {
    "pmap": pmap,
    "pgenerate": pgenerate,
    "reduction": reduction,
    "dynamic reduction": dynamic_reduction,
    "everywhere": everywhere,
    "broadcast": broadcast,
    "pool calls": pool_calls,
}

#: What each returns.
OUTCOMES = {
    "pmap": sums(),
    "pgenerate": sums(),
    "reduction": sum(sums()),
    "dynamic reduction": sum(sums()),
    "everywhere": None,
    "broadcast": [2.0 * n for n in range(COUNT)],
    "pool calls": sums(),
}

#: How many elements the two others of three have run while the third is stuck that was so before it began. What a
#: map had given it is taken back; chunks of static loops, calls, and what `everywhere` runs, are bound to a worker.
ALONE = {
    "pmap": COUNT,
    "pgenerate": COUNT,
    "reduction": COUNT * 2 // 3,
    "dynamic reduction": COUNT,
    "everywhere": 2,
    "broadcast": COUNT,
    "pool calls": COUNT - 1,
}

#: How many elements have run in all while it is stuck that was not so when it began: it may be at one.
TOGETHER = {**dict.fromkeys(OPERATIONS, COUNT - 1), "reduction": COUNT * 2 // 3}
del TOGETHER["everywhere"]


def forget_names(pids):
    """Delete what `everywhere` has defined for these tests."""
    for pid in pids:
        sd.remotecall_fetch(_forget, pid)


def _forget():
    names = vars(sys.modules["__main__"])
    for name in [name for name in names if name.startswith("stuck_") or name in ("array", "said", "me")]:
        del names[name]
