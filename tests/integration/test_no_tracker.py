"""Shared memory without multiprocessing's resource tracker: nobody unlinks it, nobody warns of it."""

import pytest

from tests.integration.test_shared_limits import in_own_mounts, no_memfd  # noqa: F401 - a fixture

TRAFFIC = """
from tests.integration.helpers import children
a, b = sd.addprocs(2)
until_by_block(a, MIB)
until_by_block(b, MIB)
back = [sd.remotecall_fetch(lambda n: np.full(MIB, n, "B"), pid, pid) for pid in (a, b)]
shared = [sd.remotecall_fetch(sd.shared.full, pid, 1000, pid) for pid in (a, b)]
for pid in (a, b): sd.remotecall_wait(lambda *arrays: globals().update(kept=arrays), pid, *back, *shared)
def tracked():
    import sys
    module = sys.modules.get("multiprocessing.resource_tracker")
    return module is not None and module._resource_tracker._pid is not None
for pid in (1, a, b):
    assert not sd.remotecall_fetch(tracked, pid), pid
ospids = {sd.remotecall_fetch(os.getpid, pid) for pid in (a, b)}
assert children() == ospids and not any(children(ospid) for ospid in ospids)
sd.rmprocs(a)
os.kill(sd.remotecall_fetch(os.getpid, b), 9)
until(lambda: sd.nprocs() == 1)
for pid, array, view in zip((a, b), back, shared):
    assert (array == pid).all() and (view == pid).all(), "memory went with the worker"
    array += 1; view += 1
assert not caught, caught
"""
USERS_OWN = """
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=1000)
block.buf[5] = 7
c, = sd.addprocs(1)
def there(array): return array + 1
assert (sd.remotecall_fetch(there, c, np.zeros(MIB, "B")) == 1).all()
block.close(); block.unlink()
"""


@pytest.mark.parametrize("users", ["", USERS_OWN], ids=["alone", "beside the program's own"])
def test_memory_without_names(users):
    assert in_own_mounts(TRAFFIC + users, "mount -t tmpfs shmdist /dev/shm") == ""


def test_memory_with_names(no_memfd):  # noqa: F811 - the fixture
    source = TRAFFIC + "del back, shared, array, view\nprint(os.listdir('/dev/shm'))"
    assert in_own_mounts(source, "mount -t tmpfs shmdist /dev/shm", no_memfd) == "[]\n"
