"""Handlers of other signals than SIGINT: they raise, or call the library, where nothing is half done."""

import pytest

from tests.integration.helpers import Script

BEGIN = """
import operator, os, signal, sys, threading, time
import numpy as np
import shmdist as sd

class Late(Exception):
    pass

def late(*_):
    raise Late("it takes too long")

def alarm(handler, seconds=0.2):
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)

def is_late(function, *args, **kwargs):
    alarm(late)
    try:
        function(*args, **kwargs)
    except Late as error:
        assert type(error) is Late
    else:
        assert False, "the alarm has been lost"
    assert signal.getsignal(signal.SIGALRM) is late

def works():
    assert sd.pmap(abs, range(-20, 0)) == list(range(20, 0, -1))
    assert [sd.remotecall_fetch(sd.myid, pid) for pid in sd.workers()] == sd.workers()
"""


WAITS = [
    "sd.remotecall_fetch, time.sleep, pids[0], 60",
    "sd.remotecall(time.sleep, pids[0], 60).fetch,",
    "sd.pmap, time.sleep, [60] * 4",
    "list, sd.pgenerate(time.sleep, [60] * 4)",
    "sd.distributed(operator.add)(lambda i: time.sleep(60)), range(4)",
    "sd.RemoteChannel(lambda: sd.Channel(1), pids[0]).take,",
    "sd.RemoteChannel(lambda: sd.Channel(1)).take,",
    "sd.Channel(1).take,",
    "sd.Future().fetch,",
    "sd.timedwait, lambda: False, 60",
    "taken.take,",
    "sd.remotecall_fetch, len, pids[0], [Slow() for _ in range(1000)]",
    "sd.rmprocs, busy",
]


@pytest.mark.parametrize("thread", [False, True], ids=["alone", "beside another"])
def test_one_that_raises_ends_the_wait(thread):
    Script(
        BEGIN
        + f"""
class Slow:
    def __reduce__(self):
        time.sleep(0.01)
        return int, ()

pids = sd.addprocs(2)
[busy] = sd.addprocs(1)
os.kill(sd.remotecall_fetch(os.getpid, busy), signal.SIGSTOP)  # it does not end when it is told to
taken = sd.WorkerPool(pids)
taken.take(), taken.take()
end = threading.Event()
def work():
    while not end.is_set():
        assert sd.remotecall_fetch(abs, pids[1], -1) == 1
other = threading.Thread(target=work)
if {thread}:
    other.start()
for wait in {WAITS!r}:
    print(wait)
    function, *args = eval(wait)
    is_late(function, *args)
    assert sd.pmap(abs, range(-20, 0), pool=sd.WorkerPool(pids)) == list(range(20, 0, -1))
    assert [sd.remotecall_fetch(sd.myid, pid) for pid in pids] == pids
end.set()
if {thread}:
    other.join()
"""
    ).end(90).clean()


def test_many_alarms_in_a_traffic_of_calls():
    Script(
        BEGIN
        + """
import gc, random
pids = sd.addprocs(2)
swallowed = []  # by Python, which lets nothing out of a finalizer
sys.unraisablehook = lambda what: swallowed.append(what.exc_type)
gc.disable()
for turn in range(300):
    if turn % 30 == 0:  # the next handler is a new one for the library
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for _ in range(100):
            sd.remotecall_fetch(abs, pids[0], -1)
    try:
        alarm(late, random.uniform(0.001, 0.01))
        end = time.monotonic() + 20
        while time.monotonic() < end and not swallowed:
            sd.remotecall_fetch(abs, pids[0], -1)
            sd.pmap(abs, [1, 2])
            sd.remotecall(abs, pids[1], 1).fetch()
    except Late:
        pass
    else:
        assert swallowed.pop() is Late, turn
signal.signal(signal.SIGALRM, signal.SIG_DFL)
works()
"""
    ).end(90).clean()


def test_one_that_only_counts_is_called_at_once_and_the_wait_goes_on():
    Script(
        BEGIN
        + """
pids = sd.addprocs(1)
came = []
signal.signal(signal.SIGALRM, lambda *_: came.append(time.monotonic()))
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
assert sd.remotecall_fetch(lambda: (time.sleep(1), 5)[1], pids[0]) == 5
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(came) >= 5, came
works()
"""
    ).end(30).clean()


def test_one_that_calls_the_library():
    Script(
        BEGIN
        + """
pids = sd.addprocs(2)
got = []
def ask(*_):
    got.append(sd.remotecall_fetch(sd.myid, pids[1]))
    got.append(sd.pmap(abs, [-1, -2], pool=sd.WorkerPool(pids[1:])))
alarm(ask)
assert sd.remotecall_fetch(lambda: (time.sleep(1), 5)[1], pids[0]) == 5
assert got == [pids[1], [1, 2]]
def end(*_):
    sd.rmprocs(*pids)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
sd.pmap(time.sleep, [100] * 4)
"""
    ).end(20).clean(code=3)


@pytest.mark.parametrize(
    "wait", ["sd.remotecall_fetch(time.sleep, 2, 60)", "sd.pmap(time.sleep, [60] * 3)", "sd.Future().wait()"]
)
def test_a_program_that_exits_when_it_is_told_to(wait):
    ended = Script(
        BEGIN
        + f"""
sd.addprocs(2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    {wait}
finally:
    print("goes on", sd.remotecall_fetch(sd.myid, 3))
"""
    ).end(20)
    ended.clean(code=3)
    assert "goes on 3" in ended.out


def test_handlers_that_are_set_by_handlers_stay():
    Script(
        BEGIN
        + """
pids = sd.addprocs(1)
def first(*_):
    signal.signal(signal.SIGALRM, second)
    signal.signal(signal.SIGUSR1, second)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
def second(*_):
    pass
alarm(first)
sd.remotecall_fetch(time.sleep, pids[0], 0.5)
assert signal.getsignal(signal.SIGALRM) is second
assert signal.getsignal(signal.SIGUSR1) is second
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
for number in (signal.SIGALRM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
works()
assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL == signal.getsignal(signal.SIGUSR1)
"""
    ).end(20).clean()


def test_on_a_worker():
    Script(
        BEGIN
        + """
pids = sd.addprocs(2)

def inner():
    class Late(Exception):
        pass
    def late(*_):
        raise Late
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        sd.remotecall_fetch(time.sleep, pids[1], 60)
    except Late:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return sd.remotecall_fetch(sd.myid, pids[1])

for _ in range(3):
    assert sd.remotecall_fetch(inner, pids[0]) == pids[1]
works()
"""
    ).end(30).clean()


def test_interrupts_beside_other_signals():
    Script(
        BEGIN
        + """
pids = sd.addprocs(1)
signal.signal(signal.SIGUSR1, late)
def both():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGINT)
for _ in range(5):
    thread = threading.Thread(target=both)
    thread.start()
    end = time.monotonic() + 20
    seen = set()
    while len(seen) < 2 and time.monotonic() < end:
        try:
            while time.monotonic() < end:
                sd.remotecall_fetch(time.sleep, pids[0], 20)
        except (Late, KeyboardInterrupt) as error:
            seen |= {type(error), type(error.__context__)} - {type(None)}
    thread.join()
    assert seen == {Late, KeyboardInterrupt}, seen
works()
"""
    ).end(60).clean()


def test_many_interrupts_while_the_program_ends():
    for _ in range(2):
        ended = Script(
            BEGIN
            + """
import subprocess
sd.addprocs(2)
calls = [sd.remotecall(lambda: [None for _ in iter(int, 1)], pid) for pid in sd.workers()]
presses = f"import os, time\\nfor _ in range(150): os.kill({os.getpid()}, 2); time.sleep(0.002)"
subprocess.Popen([sys.executable, "-S", "-c", presses], stderr=subprocess.DEVNULL)
try:
    time.sleep(20)
except KeyboardInterrupt:
    pass
"""
        ).end(20)
        assert "at_exit" not in ended.err and "shmdist" not in ended.err, ended
