"""Processes that the user's program or a worker forks: the cluster is the parent's, and comes to no harm."""

import pytest

import shmdist as sd
from tests.integration.helpers import run_script

HEAD = """
import gc, os, sys, warnings, shmdist as sd
from tests.integration.helpers import *
warnings.simplefilter("ignore", DeprecationWarning)
sd.addprocs(2)
future = sd.remotecall(list, 2, "ab")
channel = sd.RemoteChannel(lambda: sd.Channel(5), 3)
waiting = sd.remotecall(sd.take, 2, channel)
def check():
    assert [sd.remotecall_fetch(abs, pid, -pid) for pid in (2, 3)] == [2, 3]
    assert sd.remotecall_fetch(sd.remotecall_fetch, 2, abs, 3, -3) == 3
    assert future.fetch() == ["a", "b"]
    channel.put("item")
    assert waiting.fetch(timeout=5) == "item"
"""

CHILDREN = {
    "_exit": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "collects garbage": "globals().pop('future'); globals().pop('channel'); gc.collect(); sys.exit(0)",
    "uses it alone": "assert sd.myid() == 1 and sd.procs() == [1] and sd.remotecall_fetch(abs, 1, -1) == 1; sys.exit(0)",
    "has a cluster of its own": "[p] = sd.addprocs(1); assert sd.remotecall_fetch(abs, p, -7) == 7; sys.exit(0)",
    "asks an old reference": """
try:
    channel.take(timeout=1)
except Exception as error:
    print(type(error).__name__, flush=True)
sys.exit(0)
""",
}


@pytest.mark.parametrize("child", CHILDREN)
def test_os_fork_in_the_program(child):
    body = "\n".join("    " + line for line in CHILDREN[child].strip().splitlines())
    ended = run_script(
        HEAD
        + f"""
child = os.fork()
if not child:
{body}
_, status = os.waitpid(child, 0)
assert status == 0, status
check()
"""
    )
    ended.clean()


def test_multiprocessing_fork_pool_side_by_side():
    run_script(
        HEAD
        + """
import multiprocessing
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    assert pool.map(abs, range(-50, 0)) == list(range(50, 0, -1))
    check()
    assert pool.map(len, ["a", "bc"]) == [1, 2]
check2 = [sd.remotecall(abs, 2 + n % 2, n).fetch() for n in range(50)]
"""
    ).clean()


def test_fork_while_other_threads_call():
    run_script(
        HEAD
        + """
stop = threading.Event()
def call():
    while not stop.is_set():
        assert sd.remotecall_fetch(abs, 2, -1) == 1
threads = [threading.Thread(target=call) for _ in range(2)]
for t in threads: t.start()
for _ in range(20):
    child = os.fork()
    if not child:
        sd.remotecall_fetch(abs, 1, 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for t in threads: t.join()
check()
"""
    ).clean()


def test_fork_in_a_worker(cluster):
    def fork_and_pool():
        import multiprocessing
        import os
        import warnings

        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if not child:
            os._exit(7)
        status = os.waitpid(child, 0)[1]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return os.waitstatus_to_exitcode(status), pool.map(abs, [-1, -2])

    assert sd.remotecall_fetch(fork_and_pool, cluster[0]) == (7, [1, 2])
    assert sd.remotecall_fetch(abs, cluster[0], -1) == 1


def test_subprocesses_and_pools_of_other_kinds_in_a_worker(cluster):
    def start():
        import concurrent.futures
        import subprocess
        import sys

        out = subprocess.run(
            [sys.executable, "-c", "print(5)"], capture_output=True, text=True, check=True
        ).stdout
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return out, list(pool.map(abs, [-1, -2]))

    assert sd.remotecall_fetch(start, cluster[0]) == ("5\n", [1, 2])
