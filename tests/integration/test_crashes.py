"""Workers that crash in C code, or are ended for lack of memory: the error tells what happened, and where."""

import sys
import uuid
from pathlib import Path

import pytest

import shmdist as sd
from tests.integration.helpers import Script


def crash_here(address):
    import ctypes

    ctypes.string_at(address)


def test_a_crash_in_c_code_tells_where(fresh, cluster, capfd):
    [pid] = fresh()
    with pytest.raises(sd.ProcessExitedException) as caught:
        sd.remotecall_fetch(crash_here, pid, 0)
    error = caught.value
    assert error.signal == "SIGSEGV"
    tail = "\n".join(error.stderr_tail)
    assert "Segmentation fault" in tail and "in crash_here" in tail
    assert "in crash_here" in str(error)
    assert sd.remotecall_fetch(abs, cluster[0], -1) == 1


def test_a_crash_among_many_busy_threads_tells_where(fresh, capfd):
    """What the others did is not told: it would push the crash out of the lines that are kept."""
    [pid] = fresh()
    gate = sd.RemoteChannel(lambda: sd.Channel(1), pid)
    waiting = [sd.remotecall(gate.take, pid) for _ in range(30)]
    with pytest.raises(sd.ProcessExitedException) as caught:
        sd.remotecall_fetch(crash_here, pid, 0)
    assert "in crash_here" in "\n".join(caught.value.stderr_tail)
    assert len(caught.value.stderr_tail) < 45
    for future in waiting:
        with pytest.raises(sd.ProcessExitedException):
            future.fetch(timeout=5)


def test_the_users_own_choice_of_crash_report_stays(fresh, capfd):
    [pid] = fresh(1, exeflags=["-X", "faulthandler"])
    with pytest.raises(sd.ProcessExitedException) as caught:
        sd.remotecall_fetch(crash_here, pid, 0)
    assert "in crash_here" in capfd.readouterr().err + str(caught.value)


# ---------------------------------------------------------------------- lack of memory

MEMORY = 400 << 20  # bytes that a program and its worker may have together


def make_group(limit):
    """Return the folder of a new cgroup whose processes may have so much memory; skip where it cannot be."""
    with open("/proc/self/cgroup") as file:
        entries = [line.strip().split(":", 2) for line in file]
    for _, controllers, own in entries:
        if "memory" in controllers.split(","):
            path, parent, names = own, Path("/sys/fs/cgroup/memory"), ["memory.limit_in_bytes"]
            break
    else:
        path = next((path for _, controllers, path in entries if not controllers), "/")
        parent, names = Path("/sys/fs/cgroup"), ["memory.max", "memory.swap.max"]
    group = parent / path.lstrip("/") / f"shmdist-test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this system does not let us make cgroups: {error}")
    try:
        for name, value in zip(names, (limit, 0), strict=False):
            (group / name).write_text(str(value))
    except OSError as error:
        group.rmdir()
        pytest.skip(f"this system does not let us limit a cgroup's memory: {error}")
    return group


@pytest.fixture
def group():
    """A cgroup for one program, with little memory."""
    made = make_group(MEMORY)
    yield made
    left = (made / "cgroup.procs").read_text().split()
    made.rmdir()
    assert not left


def test_a_worker_that_the_system_ends_for_lack_of_memory(group):
    source = """
import os, numpy as np, shmdist as sd
a, b = sd.addprocs(2)
def devour():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # process 1 is not to be the one
    kept = []
    while True:
        kept.append(np.ones(16 << 20, "B"))
try:
    sd.remotecall_fetch(devour, a)
except sd.ProcessExitedException as error:
    assert error.signal == "SIGKILL" and error.oom, error
    assert "probably out of memory" in str(error) and "fewer workers" in str(error), error
else:
    raise AssertionError
assert sd.workers() == [b] and sd.remotecall_fetch(abs, b, -1) == 1
os.kill(sd.remotecall_fetch(os.getpid, b), 9)
try:
    sd.remotecall_fetch(abs, b, 1)
except sd.ProcessExitedException as error:
    assert error.signal == "SIGKILL" and not error.oom, error
else:
    raise AssertionError
"""
    start = f'echo $$ > {group}/cgroup.procs && exec "$0" -c "$1"'
    Script(command=["sh", "-c", start, sys.executable, source]).end().clean()
