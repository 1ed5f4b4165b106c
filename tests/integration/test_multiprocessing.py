"""multiprocessing beside shmdist: its managers and shared memory on workers, and workers of its processes."""

import sys

import pytest

from tests.integration.helpers import run_script

BESIDE = """
import multiprocessing as mp, os, time
from multiprocessing import shared_memory
import shmdist as sd
from tests.integration.helpers import until

def peek(name, value=None):
    block = shared_memory.SharedMemory(name)
    if value is not None: block.buf[0] = value
    found = block.buf[0]
    block.close()
    return found

def make(value):
    block = shared_memory.SharedMemory(create=True, size=100)
    block.buf[0] = value
    block.close()
    return block.name

def drop(name):
    block = shared_memory.SharedMemory(name)
    block.unlink()
    block.close()

def is_there(name):
    try: peek(name)
    except FileNotFoundError: return False
    return True
"""

SHARED_MEMORY = """
early = make(5)
a, b = pids = sd.addprocs(2)
late = make(6)
theirs = sd.remotecall_fetch(make, a, 7)
assert [sd.remotecall_fetch(peek, pid, name) for pid in pids for name in (early, late, theirs)] == [5, 6, 7] * 2
third = sd.remotecall_fetch(make, a, 8)
sd.remotecall_fetch(drop, b, third)
ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in pids]
sd.rmprocs(*pids)
assert not is_there(third)
assert [peek(name) for name in (early, late, theirs)] == [5, 6, 7], "it went with a worker"
for name in (early, late, theirs): drop(name)
"""

KILLED = """
[pid] = sd.addprocs(1)
name = sd.remotecall_fetch(make, pid, 7)
os.kill(sd.remotecall_fetch(os.getpid, pid), 9)
until(lambda: sd.nprocs() == 1)
assert peek(name) == 7
drop(name)
"""

SIDE_BY_SIDE = """
[pid] = sd.addprocs(1)
sd.remotecall_fetch(lambda: __import__("multiprocessing.resource_tracker") and None, pid)
names = [future.fetch() for future in [sd.remotecall(make, pid, i) for i in range(8)]]
sd.rmprocs(pid)
assert [peek(name) for name in names] == list(range(8)), "it went with the worker"
for name in names: drop(name)
"""

MANAGERS = """
if __name__ == "__main__":
    with mp.Manager() as manager, sd.addprocs(2) as pids:
        table, queue, lock = manager.dict(), manager.Queue(), manager.Lock()
        def use(x):
            with lock: table[x] = x
            queue.put(x)
        sd.pmap(use, range(6), batch_size=1)
        assert dict(table) == {x: x for x in range(6)} and sorted(queue.get() for _ in range(6)) == list(range(6))
        key = bytes(mp.current_process().authkey)
        for pid in pids:
            assert sd.remotecall_fetch(lambda: bytes(mp.current_process().authkey), pid) == key
            ospid = sd.remotecall_fetch(os.getpid, pid)
            for file in ("environ", "cmdline"):
                shown = open(f"/proc/{ospid}/{file}", "rb").read()
                assert key not in shown and key.hex().encode() not in shown
"""

ON_A_WORKER = """
def square(x): return x * x
def pool_of(method):
    with mp.get_context(method).Pool(2) as pool: return pool.map(abs, [-1, -2])
[pid] = sd.addprocs(1)
assert sd.remotecall_fetch(pool_of, pid, "spawn") == [1, 2]
assert sd.remotecall_fetch(pool_of, pid, "fork") == [1, 2]
"""


@pytest.mark.parametrize(
    "source",
    [SHARED_MEMORY, SIDE_BY_SIDE, KILLED, MANAGERS, ON_A_WORKER],
    ids=["shared memory", "side by side", "killed", "managers", "on a worker"],
)
def test_beside(source):
    assert run_script(BESIDE + source).clean() == ""


CHILD = """
import concurrent.futures, dataclasses, enum, multiprocessing as mp
import shmdist as sd

SCALE = 3
class Color(enum.Enum): RED = 1
@dataclasses.dataclass
class Point:
    x: int
    def double(self): return Point(2 * self.x)
class Bad(ValueError): pass
def helper(x): return x * SCALE
def work(x): return helper(x)
def fails(x): raise Bad(x)

def child(remove=True):
    pids = sd.addprocs(1)
    pid = pids[0]
    assert sd.pmap(work, range(4)) == [0, 3, 6, 9]
    assert sd.pmap(lambda x: x + SCALE, range(2), batch_size=1) == [3, 4]
    assert sd.remotecall_fetch(Point.double, pid, Point(2)) == Point(4)
    assert sd.remotecall_fetch(lambda: Color.RED, pid) is Color.RED
    assert [sd.remotecall_fetch(work, pid, x) for x in range(3)] == [0, 3, 6]
    try: sd.remotecall_fetch(fails, pid, 1)
    except Bad: pass
    else: raise AssertionError
    @sd.everywhere
    def everybody(): return sd.myid()
    assert sd.everywhere("everybody()", procs=pid) == pid
    if remove: sd.rmprocs(pids)
    return 5

if __name__ == "__main__":
    context = mp.get_context({method!r})
    for daemon in (False, True):
        process = context.Process(target=child, args=(daemon,), daemon=daemon)
        process.start()
        process.join(30)
        assert process.exitcode == 0, process.exitcode
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        assert executor.submit(child, False).result() == 5
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_child_has_workers_of_its_own(method, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(CHILD.replace("{method!r}", repr(method)))
    assert run_script("", command=[sys.executable, str(path)]).clean() == ""
