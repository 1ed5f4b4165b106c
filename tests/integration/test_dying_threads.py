"""A thread that dies in its first steps, for lack of memory: every call ends, later ones work."""

import pytest

from tests.integration.helpers import run_script

#: Where a thread of the runtime dies: the function that raises there, and what.
PLACES = {
    "without a word": ("threading.Thread._bootstrap", MemoryError()),
    "before it is known": ("threading.Thread._bootstrap_inner", MemoryError()),
    "as it says that it runs": ("threading.Event.set", MemoryError()),
    "before it runs anything": (
        "shmdist.runtime.daemon_thread.DaemonThread.run",
        RuntimeError("can't allocate lock"),
    ),
    "before it takes its job": (
        "shmdist.runtime.interrupts.ThreadState.__init__",
        RuntimeError("can't allocate lock"),
    ),
}

PROGRAM = """
import sys, threading, time, traceback
import shmdist as sd

def die(place, error, dues):
    '''Have threads of the runtime die in their first steps: the first, and so on, counted from now.'''
    import functools, threading
    from shmdist.runtime import daemon_thread, interrupts
    owner = eval(place.rpartition(".")[0].replace("shmdist.runtime.", ""))
    name = place.rpartition(".")[2]
    original = owner.__dict__[name]
    seen, count, lock = set(), [0], threading.Lock()
    @functools.wraps(original)
    def raises(*args):
        ident = threading.get_native_id()
        with lock:
            is_new = ident not in seen and ident not in old
            seen.add(ident)
            count[0] += is_new
            dies = is_new and count[0] - 1 in dues
        if dies:
            died.append(ident)
            raise error
        return original(*args)
    import os
    old, died = {int(tid) for tid in os.listdir("/proc/self/task")}, []
    setattr(owner, name, raises)
    sys.modules["shmdist"].died = died
    sys.modules["shmdist"].mend = lambda: setattr(owner, name, original)

def mended():
    import shmdist
    shmdist.mend()
    return len(shmdist.died)

def quiet():
    import os
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)

def back(n):
    import shmdist as sd
    return sd.remotecall_fetch(abs, 1, -n)

def take(channel):
    import sys
    sys.modules["shmdist"].begun.append(1)
    return channel.take()

def have_taken(channel):
    import shmdist as sd
    return sd.remotecall_fetch(take, 1, channel)

def begin():
    import sys
    sys.modules["shmdist"].begun = []

def has_begun():
    import sys
    return len(sys.modules["shmdist"].begun)

def begun_on(pid):
    try:
        return sd.remotecall_fetch(has_begun, pid)
    except RuntimeError:
        return 0  # it was refused

def has_ended(future):
    try:
        return future.fetch(timeout=20) is not None
    except TimeoutError:
        raise
    except (RuntimeError, MemoryError) as error:
        return False

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)

sys.excepthook = lambda *error: print(*traceback.format_exception(*error))
a, = sd.addprocs(1)
sd.remotecall_fetch(back, a, 1)
quiet()  # Python tells of each thread that dies
sd.remotecall_fetch(quiet, a)
channel = sd.RemoteChannel(lambda: sd.Channel(80))
for pid in (a, 1):
    total = 0
    for turn, dues in enumerate(([0], [1], [2], [3], [0, 1], [1, 2], range(1, 5), range(50))):
        count = 10 + 6 * turn  # more than there are threads
        for each in (1, a): sd.remotecall_fetch(begin, each)
        sd.remotecall_fetch(die, pid, place, error, dues)
        called = [sd.remotecall(take if pid == a else have_taken, a, channel) for _ in range(count)]
        until(lambda: begun_on(pid) + sum(map(sd.isready, called)) >= count)
        called += [sd.remotecall(back, a, n) for n in range(1, 5)]
        local = []
        for n in range(1, 5):
            try:
                local.append(sd.remotecall(have_taken, 1, channel))
            except (RuntimeError, MemoryError):
                pass  # there is no thread for it here
        for n in range(count + 4):
            channel.put(n)
        outcomes = [has_ended(future) for future in called + local]
        died = sd.remotecall_fetch(mended, pid)
        total += died
        while len(channel): channel.take(timeout=20)
        assert sd.remotecall(abs, a, -2).fetch(timeout=20) == 2
        assert sd.remotecall(back, a, 3).fetch(timeout=20) == 3
        assert sd.pmap(abs, range(-5, 0)) == [5, 4, 3, 2, 1]
        assert died or all(outcomes)
    assert total >= 8, total
sd.rmprocs(a)
print("ok")
"""


@pytest.mark.parametrize("place", PLACES)
def test_every_call_ends(place):
    name, error = PLACES[place]
    program = f"place, error = {name!r}, {error!r}\n{PROGRAM}"
    assert run_script(program).out == "ok\n"
