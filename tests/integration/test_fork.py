"""Processes that the user's program or a worker forks: the cluster is the parent's, and comes to no harm."""

import os
import sys
import threading
from functools import partial

import numpy as np
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


def fork_and_go_on(child):
    """Fork; return how the child ended, and what it wrote to its stdout and stderr."""
    reads, writes = os.pipe()
    ospid = os.fork()
    if not ospid:
        os.dup2(writes, 1)
        os.dup2(writes, 2)
        os.close(reads)
        os.close(writes)
        return child()
    os.close(writes)
    with open(reads) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(ospid, 0)[1]), text


def exits(*args):
    print("so far")
    sys.exit(*args)


def fails():
    raise ValueError("in the child")


def forks_again():
    ospid = os.fork()
    return os.waitstatus_to_exitcode(os.waitpid(ospid, 0)[1]) if ospid else sys.exit(3)


def starts_a_thread():
    threading.Thread(target=lambda: print("late")).start()


WAYS = {
    "exit 0": (partial(exits, 0), 0, "so far\n"),
    "exit": (exits, 0, "so far\n"),
    "exit 5": (partial(exits, 5), 5, "so far\n"),
    "exit -1": (partial(exits, -1), 255, "so far\n"),
    "exit with a text": (partial(exits, "a text"), 1, "so far\na text\n"),
    "return": (partial(print, "so far"), 0, "so far\n"),
    "return what cannot be sent": (threading.Lock, 0, ""),
    "return an array": (partial(np.ones, 1 << 20), 0, ""),
    "fork again": (forks_again, 0, ""),
    "a thread": (starts_a_thread, 0, "late\n"),
    "broken streams": (partial(setattr, sys, "stdout", 5), 0, ""),
}
CALLS = {
    "fetch": lambda f, pid, *args: sd.remotecall_fetch(f, pid, *args),
    "future": lambda f, pid, *args: sd.remotecall(f, pid, *args).fetch(),
    "two hops": lambda f, pid, *args: sd.remotecall_fetch(sd.remotecall_fetch, pid, f, pid + 1, *args),
    "back": lambda f, pid, *args: sd.remotecall_fetch(sd.remotecall_fetch, pid, f, 1, *args),
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("way", "how"), [(way, how) for way in WAYS for how in CALLS if (way, how) != ("broken streams", "back")]
)
def test_a_child_ends_with_the_function_that_forked_it(cluster, way, how):
    child, code, text = WAYS[way]
    for _ in range(2):  # the worker serves on
        ended = CALLS[how](fork_and_go_on, cluster[0], child)
        assert ended[0] == code
        if how != "back":  # where pytest has streams of its own
            assert sorted(ended[1].splitlines()) == sorted(text.splitlines())


def test_a_child_that_fails_says_what_is_the_users(cluster):
    code, text = sd.remotecall_fetch(fork_and_go_on, cluster[0], fails)
    assert code == 1
    first, *lines, last = text.splitlines()
    assert first == "Traceback (most recent call last):" and last == "ValueError: in the child"
    files = [line.split('"')[1] for line in lines if line.startswith("  File ")]
    assert files == [__file__] * 2


def test_several_calls_at_once_fork(cluster):
    futures = [sd.remotecall(fork_and_go_on, cluster[0], partial(exits, n)) for n in range(8)]
    assert [future.fetch()[0] for future in futures] == list(range(8))
    assert sd.remotecall_fetch(abs, cluster[0], -1) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_children_of_elements(cluster, batch_size):
    ways = [partial(exits, 2), fails, partial(exits, "a text"), len, os.getpid, partial(exits, 0)]
    ended = sd.pmap(fork_and_go_on, ways, pool=sd.WorkerPool(cluster[:1]), batch_size=batch_size)
    assert [code for code, _ in ended] == [2, 1, 1, 1, 0, 0]
    texts = [text.splitlines() for _, text in ended]
    assert texts[0] == texts[5] == ["so far"] and texts[4] == []
    assert texts[1][-1] == "ValueError: in the child"


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
