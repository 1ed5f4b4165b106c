"""Where shared memory cannot be had the stream carries values, and the program is told once."""

import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.integration.helpers import ROOT, Script, run_script

HEAD = """
import gc, os, resource, sys, warnings
import numpy as np, shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import shared_bytes, until
caught = []
warnings.showwarning = lambda message, category, *rest: caught.append((category.__name__, str(message)))
warnings.simplefilter("always")
MIB = 1 << 20
def taken(): return current_node().sharing.arena._serial
def there_and_back(pid, nbytes, keep=None):
    value = np.arange(nbytes, dtype="B")
    back = sd.remotecall_fetch(lambda a: a + 1, pid, value)
    assert np.array_equal(back, value + 1) and back.flags.writeable
    if keep is not None: keep.append(back)
def until_told(pid, nbytes, keep=None):
    until(lambda: (there_and_back(pid, nbytes, keep), caught)[1], 10, "a warning")
    for _ in range(5): there_and_back(pid, nbytes, keep)
    assert len(caught) == 1 and caught[0][0] == "RuntimeWarning", caught
    return caught[0][1]
def until_by_block(pid, nbytes):
    def by_block():
        before = taken()
        there_and_back(pid, nbytes)
        return taken() > before
    until(by_block, 10)
def limit(which, value):
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
def size():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
"""


def output_of(ended):
    """Return what a program that ended well printed, and its workers, which may be warned."""
    own = [line for line in ended.err.splitlines() if not line.startswith("      From worker ")]
    assert ended.code == 0 and own == [], ended
    return ended.out + ended.err


def run(source, **options):
    """Run a program that may be warned; returns what it printed."""
    return output_of(run_script(HEAD + textwrap.dedent(source), **options))


@pytest.fixture
def no_memfd(tmp_path):
    """The environment of a system that has no memfd."""
    (tmp_path / "sitecustomize.py").write_text("import os\ndel os.memfd_create\n")
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


def in_own_mounts(script, mounts, env=None):
    """Run a program that sees other file systems; the mounts end with it."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let us have mounts of our own")
    command = [
        unshare,
        "-m",
        "sh",
        "-c",
        f'{mounts} && exec "$0" -c "$1"',
        sys.executable,
        HEAD + textwrap.dedent(script),
    ]
    return output_of(Script(command=command, env=env).end())


def test_a_small_dev_shm_is_no_limit():
    in_own_mounts(
        """
        [pid] = sd.addprocs(1)
        until_by_block(pid, 100 * MIB)
        shared = sd.shared.ones(100 * MIB, "B")
        assert sd.remotecall_fetch(np.sum, pid, shared) == 100 * MIB
        assert not caught, caught
        """,
        "mount -t tmpfs -o size=64m shmdist /dev/shm",
    )


def test_a_small_dev_shm_without_memfd(no_memfd):
    """Named memory lives in it: what has no room takes the stream, and nobody is killed."""
    out = in_own_mounts(
        """
        [pid] = sd.addprocs(1)
        until_by_block(pid, 8 * MIB)
        assert "docker" in until_told(pid, 80 * MIB)
        assert os.listdir("/dev/shm") == []
        try:
            sd.shared.zeros(70 * MIB, "B")
        except MemoryError as error:
            print(error)
        until(lambda: sd.shared.zeros(1000) is not None)
        """,
        "mount -t tmpfs -o size=64m shmdist /dev/shm",
        no_memfd,
    )
    assert "--shm-size" in out and "No space left" in out


def test_no_room_at_all_in_dev_shm_without_memfd(no_memfd):
    in_own_mounts(
        """
        [pid] = sd.addprocs(1)
        until_told(pid, MIB)
        """,
        "mount -t tmpfs -o size=64m shmdist /dev/shm && head -c 67108864 /dev/zero > /dev/shm/full",
        no_memfd,
    )


def test_without_memfd(no_memfd):
    """Nothing is left in /dev/shm, also by workers that are killed."""
    run(
        """
        pids = sd.addprocs(2)
        for pid in pids: until_by_block(pid, MIB)
        shared = sd.shared.zeros(1000)
        sd.pmap(lambda n: shared.__setitem__(n, n), sd.CachingPool(pids), range(1000))
        assert shared.sum() == sum(range(1000))
        until(lambda: not [name for name in os.listdir("/dev/shm") if "shmdist" in name])  # one may be in the making
        os.kill(current_node().peers.members[pids[0]].ospid, 9)
        until(lambda: sd.nprocs() == 2)
        theirs = sd.remotecall_fetch(sd.shared.ones, pids[1], 1000)
        os.kill(current_node().peers.members[pids[1]].ospid, 9)
        until(lambda: sd.nprocs() == 1)
        assert theirs.sum() == 1000 and not caught
        """,
        env=no_memfd,
    )


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_limit_on_the_size_of_files(where):
    out = run(
        f"""
        [pid] = sd.addprocs(1)
        if {where!r} == "here":
            limit(resource.RLIMIT_FSIZE, 2 * MIB)
            assert "ulimit -f" in until_told(pid, 3 * MIB)
            try: sd.shared.zeros(3 * MIB, "B")
            except MemoryError as error: assert "ulimit -f" in str(error)
            else: raise AssertionError
        else:
            sd.remotecall_wait(limit, pid, resource.RLIMIT_FSIZE, 2 * MIB)
            for _ in range(10): there_and_back(pid, 3 * MIB)
            print("from here", flush=True)
            until(lambda: (there_and_back(pid, 3 * MIB), "memory" in sd.remotecall_fetch(lambda: current_node().sharing.maintainer._told, pid))[1])
            for _ in range(5): there_and_back(pid, 3 * MIB)
        """
    )
    assert out.count("RuntimeWarning: ") == (where == "there"), out
    assert where == "here" or "ulimit -f" in out


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_limit_on_address_space(where):
    """Whoever has no room to map memory gets values by the stream, and has the room for himself."""
    out = run(
        f"""
        [pid] = sd.addprocs(1)
        there_and_back(pid, 16 * MIB)
        def narrow(): limit(resource.RLIMIT_AS, size() + 260 * MIB)
        sd.remotecall_wait(narrow, pid if {where!r} == "there" else 1)
        kept = []
        for _ in range(6): there_and_back(pid, 16 * MIB, kept)
        mine = [sd.remotecall_wait(lambda a: a, pid, kept[0]) for _ in range(6)]
        assert all(np.array_equal(each, kept[0]) for each in kept)
        while mine: assert mine.pop().fetch()[5] == 6
        print(*[text for _, text in caught], sep="\\n")
        """,
        env={"MALLOC_ARENA_MAX": "1"},  # glibc takes 64 MiB of the room for each thread that allocates
    )
    assert out.count("arrays to local processes are copied through sockets") <= 2, out


def test_a_limit_that_is_reached_by_arrays_in_use():
    run(
        """
        [pid] = sd.addprocs(1)
        kept = []
        for _ in range(30): there_and_back(pid, MIB, kept)
        sd.remotecall_wait(lambda: None, pid)
        there = lambda: sd.remotecall_fetch(lambda: current_node().sharing.arena.total, pid)
        assert there() <= 16 * MIB and current_node().sharing.arena.total <= 16 * MIB
        assert all(np.array_equal(each, np.arange(MIB, dtype="B") + 1) for each in kept)
        mine = []
        def fill():
            mine.append(sd.remotecall(lambda a: a, pid, np.full(MIB, len(mine) % 256, "B")))
            return current_node().sharing.arena.lent > 14 * MIB
        until(fill)
        text = until_told(pid, 2 * MIB)
        assert "SHMDIST_ARENA_LIMIT" in text
        del kept[:]
        assert all(future.fetch()[-1] == n % 256 for n, future in enumerate(mine))
        del mine
        until_by_block(pid, MIB)
        shared = sd.shared.zeros(40 * MIB, "B")  # the limit is for copies, which there is another way for
        assert sd.remotecall_fetch(len, pid, shared) == 40 * MIB
        for _ in range(5): there_and_back(pid, MIB)
        assert len(caught) == 1, caught
        """,
        env={"SHMDIST_ARENA_LIMIT": "16M"},
    )


def test_a_value_larger_than_the_limit():
    run(
        """
        [pid] = sd.addprocs(1)
        assert "SHMDIST_ARENA_LIMIT" in until_told(pid, 3 * MIB)
        until_by_block(pid, 2 * MIB)
        assert len(caught) == 1
        """,
        env={"SHMDIST_ARENA_LIMIT": "2M"},
    )


def test_no_shared_memory_is_wanted():
    run(
        """
        [pid] = sd.addprocs(1)
        for _ in range(10): there_and_back(pid, MIB)
        assert not caught and not taken()
        assert sd.shared.ones(10).sum() == 10
        """,
        env={"SHMDIST_ARENA_LIMIT": "0"},
    )


@pytest.mark.parametrize("where", ["here", "there"])
def test_few_descriptors(where):
    run(
        f"""
        a, b = sd.addprocs(2)
        for _ in range(20):  # after so many all have mailboxes
            for pid in (a, b): there_and_back(pid, 100)
            sd.remotecall_fetch(sd.remotecall_fetch, a, abs, b, -1)
        def have(): return all(l.ring_in and l.kick_out >= 0 for l in current_node().peers.links.values())
        until(lambda: all(sd.remotecall_fetch(have, pid) for pid in (1, a)))
        def narrow(spare):
            limit(resource.RLIMIT_NOFILE, 4096)  # there may be none left to see how many there are
            fds = max(int(name) for name in os.listdir("/proc/self/fd"))
            limit(resource.RLIMIT_NOFILE, fds + spare)
        for spare in (4, 2, 1, 0):
            narrow(spare) if {where!r} == "here" else sd.remotecall_wait(narrow, a, spare)
            for nbytes in (MIB, 9 * MIB):
                for _ in range(6): there_and_back(a, nbytes); there_and_back(b, nbytes)
            for _ in range(3):
                sd.remotecall_fetch(lambda x: sd.remotecall_fetch(len, b, x), a, np.ones(MIB))
        assert len(caught) <= 2, caught  # there is none for a segment; a worker cannot get one
        """
    )


def test_thousands_of_live_arrays_with_few_descriptors():
    run(
        """
        [pid] = sd.addprocs(1)
        for p in (1, pid): sd.remotecall_wait(limit, p, resource.RLIMIT_NOFILE, 128)
        there_and_back(pid, 100)
        arrays = sd.pmap(lambda n: np.full(33_000, float(n)), range(1000))
        assert all(array[7] == n for n, array in enumerate(arrays))
        shared = [sd.shared.full(5000, n) for n in range(1000)]
        assert sd.remotecall_fetch(lambda s: sum(int(a[0]) for a in s), pid, shared) == sum(range(1000))
        broadcast = [np.full(33_000, n) for n in range(500)]
        assert set(sd.pmap(lambda n: sum(int(a[0]) for a in broadcast), sd.CachingPool([pid]), range(3))) == {sum(range(500))}
        assert not caught, caught
        """
    )


def test_the_memory_of_a_container():
    """Its limit is read before memory is asked for, for to exceed it would be the end of a process."""
    root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
    in_own_mounts(
        f"""
        [pid] = sd.addprocs(1)
        def set_used(mib):
            with open("{root}/box/{used}", "w") as file: file.write(str(mib * MIB))
        set_used(100)
        until_by_block(pid, 10 * MIB)
        set_used(190)
        assert "docker" in until_told(pid, 30 * MIB)
        try: sd.shared.zeros(30 * MIB, "B")
        except MemoryError as error: assert "--memory" in str(error)
        else: raise AssertionError
        set_used(0)
        until_by_block(pid, 30 * MIB)
        assert sd.shared.zeros(30 * MIB, "B")[5] == 0
        """,
        f"mount -t tmpfs shmdist {root} && mkdir {root}/box && "
        f"echo 209715200 > {root}/box/{limit} && echo 0 > {root}/box/{used} && echo 'inactive_file 0' > {root}/box/memory.stat && "
        f"printf '0::/box\\n' > {root}/box/groups && mount --bind {root}/box/groups /proc/$$/cgroup",
    )


def test_more_than_there_is():
    run(
        """
        [pid] = sd.addprocs(1)
        for nbytes in (1 << 45, 1 << 62):
            try: sd.shared.zeros(nbytes, "B")
            except MemoryError as error: assert "free memory" in str(error), error
            else: raise AssertionError
        try: sd.shared.zeros(1 << 80, "B")
        except ValueError as error: assert "dimension" in str(error), error  # numpy's own word for it
        else: raise AssertionError
        try: sd.remotecall_fetch(sd.shared.zeros, pid, 1 << 45)
        except MemoryError as error: assert "free memory" in str(error), error
        else: raise AssertionError
        there_and_back(pid, MIB)
        """
    )


def test_limits_of_threads():
    """A large copy wants a second thread; without it, it goes by itself."""
    run(
        """
        import threading
        [pid] = sd.addprocs(1)
        until_by_block(pid, 20 * MIB)
        start = threading.Thread.start
        def refuse(thread): raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
        try:
            for _ in range(3): there_and_back(pid, 20 * MIB)
        finally:
            threading.Thread.start = start
        """
    )
