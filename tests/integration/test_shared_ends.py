"""Programs that end, are killed, or fork while they hold received and shared arrays."""

import signal

import pytest

from tests.integration.helpers import run_script

# ---------------------------------------------------------------------- the end of the program

HEAD = """
import builtins, gc, os, signal, sys, threading
import numpy as np, shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import until
def warm(pid, nbytes=1 << 20):
    def there():
        before = sd.remotecall_fetch(lambda: current_node().sharing.arena._serial, pid)
        sd.remotecall_fetch(lambda n: np.ones(n, "B"), pid, nbytes)
        return sd.remotecall_fetch(lambda: current_node().sharing.arena._serial, pid) > before
    until(there, 10)
    until(lambda: (sd.remotecall_fetch(len, pid, np.ones(nbytes, "B")), current_node().sharing.arena._serial)[1], 10)
a, b = sd.addprocs(2)
warm(a)
value = sd.remotecall_fetch(lambda: np.ones(1 << 20, "B"), a)
shared = sd.shared.ones(1 << 20)
theirs = sd.remotecall_fetch(sd.shared.ones, b, 1 << 20)
builtins.kept_value, builtins.kept_view = value, value[5:]
sys.kept = memoryview(value), shared[::2], theirs[1:]
class Cycle:
    def __init__(self): self.me, self.array = self, (value, shared, theirs)
cycle = Cycle()
sd.everywhere("import builtins; builtins.kept = kept", kept=(value, shared, theirs))
"""

ENDS = {
    "falls off the end": "",
    "sys.exit": "sys.exit(0)",
    "removes all workers": "sd.rmprocs(a, b); value += 1; shared += 1; theirs += 1; print(int(theirs[0]))",
    "closes in a thread": "t = threading.Thread(target=lambda: value.sum()); t.start()",
    "workers die": "[os.kill(current_node().peers.members[p].ospid, 9) for p in (a, b)]; until(lambda: sd.nprocs() == 1); theirs += 1",
    "broadcast held": """
def closure(): return value
pool = sd.CachingPool([a])
print(len(sd.remotecall_fetch(closure, pool)))
builtins.broadcast = sd.remotecall_fetch(lambda: [sd.pmap(lambda n: value, sd.CachingPool([b]), range(2)), value], a)
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_with_arrays_in_its_hands_says_nothing(end):
    run_script(HEAD + ENDS[end]).clean()


def test_a_killed_program_leaves_nothing():
    ended = run_script(HEAD + "os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.code == -signal.SIGKILL and ended.err == "", ended


# ---------------------------------------------------------------------- forks

FORK = (
    HEAD
    + """
def child(body):
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(writes)
            assert os.read(reads, 1) == b"g"
            body()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(reads)
    def go():
        os.write(writes, b"g")
        os.close(writes)
        assert os.waitpid(pid, 0)[1] == 0
    return go
def churn():
    for n in range(12):
        sd.remotecall_fetch(lambda a: a * 0 + 77, a, np.full(1 << 20, 77, "B"))
def no_leases():
    gc.collect()
    current_node().sharing.blocks.pay()
    return not current_node().sharing.state()["held"]
"""
)

FORKS = {
    "values stay as they were, though the parent drops them": """
def body(value=value):
    assert np.all(value == 1), "the block was used again under the child's feet"
    value[:] = 9
go = child(body)
del body, value, builtins.kept_value, builtins.kept_view, cycle, sys.kept, builtins.kept, kept
gc.collect()
churn()
go()
del shared, theirs
until(no_leases)
""",
    "what the child writes to a value the parent does not see": """
def body():
    value[:] = 9
    assert value[0] == 9 and builtins.kept_view[0] == 9
go = child(body)
churn()
go()
assert np.all(value == 1)
assert sd.remotecall_fetch(np.sum, a, value) == value.sum()
""",
    "what the parent writes to a value the child does not see": """
def body():
    assert np.all(value == 1), "the parent's writes are seen"
    assert builtins.kept_view[0] == 1
go = child(body)
value[:] = 7
churn()
go()
assert np.all(value == 7)
assert sd.remotecall_fetch(np.sum, a, value) == 7 * len(value)
back = sd.remotecall_fetch(lambda x: x, a, value)
assert np.all(back == 7)
del back
value[:] = 1
""",
    "a value that was apart goes back as it should": """
mine = sd.remotecall_fetch(lambda: np.full(1 << 20, 3, "B"), a)
go = child(lambda: None)
mine[:] = 4
go()
where = mine.ctypes.data
del mine
gc.collect()
kept_back = []
for n in range(100):
    kept_back.append(sd.remotecall_fetch(lambda n=n: np.full(1 << 20, 20 + n, "B"), a))
    assert np.all(kept_back[-1] == 20 + n), "what lies in the block is not what is seen"
    if kept_back[-1].ctypes.data == where: break
assert n < 99, "the block was not used again"
del kept_back
""",
    "shared arrays stay shared": """
def body():
    assert shared[0] == 2 and theirs[0] == 2
    shared[1] = theirs[1] = 5
go = child(body)
shared[0] = theirs[0] = 2
go()
assert shared[1] == theirs[1] == 5
assert sd.remotecall_fetch(lambda x: float(x[1]), a, theirs) == 5
""",
    "a broadcast is the child's own": """
def closure():
    value[0] += 1
    pid = os.fork()
    if not pid:
        value[1] = 200
        os._exit(int(value[0] != 2))
    status = os.waitpid(pid, 0)[1]
    return status, int(value[0]), int(value[1])
pool = sd.CachingPool([a, b])
assert sd.remotecall_fetch(closure, pool) == (0, 2, 1)
assert value[0] == 1
""",
    "multiprocessing": """
import multiprocessing
context = multiprocessing.get_context("fork")
def read(n):
    value[n] = 50
    return int(value[n + 1])
with context.Pool(2) as pool:
    assert pool.map(read, range(0, 100, 2)) == [1] * 50
    churn()
    assert pool.map(read, range(0, 100, 2)) == [1] * 50
assert np.all(value == 1)
""",
    "many forks while arrays go round": """
stop = threading.Event()
wrong = []
def traffic(pid):
    n = 0
    while not stop.is_set():
        n += 1
        back = sd.remotecall_fetch(lambda a: a, pid, np.full(1 << 18, n % 200, "B"))
        if not np.all(back == n % 200): wrong.append(n)
threads = [threading.Thread(target=traffic, args=(p,)) for p in (a, b)]
for t in threads: t.start()
for _ in range(8):
    child(lambda: np.testing.assert_array_equal(value, 1))()
stop.set()
for t in threads: t.join()
assert not wrong
""",
    "no descriptors left for the fork": """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 4096))
pid = os.fork()
if not pid: os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
churn()
assert np.all(value == 1)
""",
    "the child has a cluster of its own": """
def body():
    [p] = sd.addprocs(1)
    assert sd.remotecall_fetch(np.sum, p, value) == 1 << 20
    mine = sd.shared.zeros(10)
    assert not sd.shared.is_shared(shared) and sd.shared.is_shared(mine)
    sd.remotecall_wait(lambda x: x.fill(3), p, shared)
    assert shared[0] != 3
    sd.rmprocs(p)
go = child(body)
churn()
go()
""",
}


def test_forks():
    """In one program; the one that lets go of the arrays comes last."""
    first, *rest = FORKS.values()
    head = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + FORK
    run_script(head + "\n".join([*rest, first])).clean()
