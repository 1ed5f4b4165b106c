"""The end of the program: prompt, silent, with the right code; and workers that outlive nobody."""

import os
import signal

import pytest

from tests.integration.helpers import Script, marked, until, within

BUSY = {
    "idle": "",
    "busy in Python": "sd.remotecall(tell_and_run, 2, s, loop_for_ever); s.take()",
    "busy in sleep": "sd.remotecall(tell_and_run, 2, s, sleep_long); s.take()",
    "busy on several threads": "[sd.remotecall(tell_and_run, 2, s, sleep_long) for _ in range(3)]; [s.take() for _ in range(3)]",
    "holding the interpreter": "sd.remotecall(tell_and_run, 2, s, hold_the_interpreter); s.take()",
    "waiting in the runtime": "sd.remotecall(tell_and_run, 2, s, sd.RemoteChannel(3).take); s.take()",
}
ENDS = {
    "falls off its end": ("", 0, ""),
    "sys.exit": ("sys.exit(7)", 7, ""),
    "exception": ("raise LookupError('deliberate')", 1, "LookupError: deliberate"),
    "sys.exit in a thread": (
        "t = threading.Thread(target=sys.exit, args=(5,)); t.start(); t.join()",
        0,
        "",
    ),
    "a thread waits for a call": (
        "threading.Thread(target=lambda: sd.remotecall(sleep_long, 3).fetch(), daemon=True).start()",
        0,
        "",
    ),
}
HEAD = """
import sys, threading, shmdist as sd
from tests.integration.helpers import *
sd.addprocs(2)
s = sd.RemoteChannel(lambda: sd.Channel(10))
"""


@pytest.mark.parametrize("busy", BUSY)
def test_ends_promptly_whatever_workers_do(busy):
    script = Script(HEAD + BUSY[busy] + "\nprint('up', flush=True)\n")
    assert script.line() == "up"
    with within(5):
        script.end(5).clean()


@pytest.mark.parametrize("end", ENDS)
def test_exit_code_and_silence(end):
    source, code, error = ENDS[end]
    script = Script(HEAD + BUSY["busy in sleep"] + "\nprint('up', flush=True)\n" + source)
    assert script.line() == "up"
    with within(5):
        ended = script.end(5)
    assert ended.code == code, ended
    if error:
        assert ended.err.rstrip().endswith(error) and ended.err.count("Traceback") == 1, ended
    else:
        assert ended.err == "", ended


def test_rmprocs_then_end():
    Script(HEAD + "sd.rmprocs(sd.workers())\nassert sd.nprocs() == 1").end().clean()


def test_context_manager_then_end():
    Script(
        "import shmdist as sd\nwith sd.addprocs(2) as p:\n    pass\nassert sd.workers() == [1]"
    ).end().clean()


def test_references_alive_at_the_end():
    Script(
        HEAD
        + """
channel = sd.RemoteChannel(lambda: sd.Channel(3), 2)
futures = [sd.remotecall(list, 2 + n % 2, "ab") for n in range(20)]
sd.remotecall_fetch(lambda f, c: globals().update(kept=(f, c)), 3, futures, channel)
ring = [channel]; ring.append(ring)
"""
    ).end().clean()


def test_users_atexit_functions_run_and_may_still_call():
    ended = Script(
        """
import atexit, shmdist as sd
atexit.register(lambda: print("first registered, last run"))
sd.addprocs(1)
atexit.register(lambda: print("called", sd.remotecall_fetch(abs, 2, -3)))
"""
    ).end()
    assert ended.clean() == "called 3\nfirst registered, last run\n"


def test_workers_atexit_functions_run():
    ended = Script(
        """
import atexit, shmdist as sd
sd.addprocs(1)
sd.remotecall_fetch(lambda: __import__("atexit").register(print, "good bye") and None, 2)
"""
    ).end()
    assert "good bye" in ended.clean()


@pytest.mark.parametrize("busy", ["idle", "busy in Python", "holding the interpreter", "busy in sleep"])
def test_kill_9_of_the_program(busy):
    """Workers are gone in 5 s, the one that lets no other thread of it run as well."""
    script = Script(HEAD + BUSY[busy] + "\nprint('up', flush=True)\nthreading.Event().wait()")
    try:
        assert script.line() == "up"
        assert len(marked(script.mark)) == 3
        script.process.send_signal(signal.SIGKILL)
        until(lambda: not marked(script.mark), 5.0, "workers of a killed program are gone")
    finally:
        script.kill_all()
        script.process.communicate()


def test_kill_9_ends_what_workers_have_started():
    """A Pool's processes have both ends of its pipes: nothing would ever wake them."""
    script = Script(
        HEAD
        + """
def pool(started):
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.apply(abs, (-1,))
        started.put(None)
        pool.map(time.sleep, [1000] * 4)
sd.remotecall(pool, 2, s)
s.take()
print("up", flush=True)
threading.Event().wait()
"""
    )
    try:
        assert script.line() == "up"
        assert len(marked(script.mark)) == 5
        script.process.send_signal(signal.SIGKILL)
        until(lambda: not marked(script.mark), 5.0, "nothing of a killed program is left")
    finally:
        script.kill_all()
        script.process.communicate()


def test_kill_9_of_a_program_whose_forked_child_lives():
    """The child has copies of the pipes and links; they must not keep workers alive."""
    script = Script(
        HEAD
        + BUSY["holding the interpreter"]
        + """
child = os.fork()
if not child:
    os.environ.clear()
    os.execvp("sleep", ["sleep", "20"]) if len(sys.argv) > 1 else signal.pause()
print(child, flush=True)
threading.Event().wait()
"""
    )
    child = int(script.line())
    try:
        script.process.send_signal(signal.SIGKILL)
        until(lambda: set(marked(script.mark)) <= {child}, 5.0, "workers of a killed program are gone")
    finally:
        os.kill(child, signal.SIGKILL)
        script.kill_all()
        script.process.communicate()


def test_sigterm_of_the_program():
    script = Script(HEAD + BUSY["busy in Python"] + "\nprint('up', flush=True)\nthreading.Event().wait()")
    assert script.line() == "up"
    script.process.terminate()
    assert script.end(5).code == -signal.SIGTERM
