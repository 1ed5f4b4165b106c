"""Looking at the frames of other threads, while they run and while objects are collected."""

import gc
import subprocess
import sys
import threading

from shmdist.runtime.thread_frames import frames_of, frames_of_all

PROGRAM = """
import gc, random, sys, threading, time
from shmdist.runtime.thread_frames import frames_of

class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.sleep(0)  # the other thread goes on

def deep(n):
    return sum(range(3)) if n == 0 else deep(n - 1)

def work():
    while not stop:
        deep(random.randrange(12))

stop = False
sys.setswitchinterval(1e-6)
thread = threading.Thread(target=work)
thread.start()
thresholds = gc.get_threshold()
gc.set_threshold(7, 5, 5)
for _ in range(2000):
    Cycle()
    for frame in frames_of(thread.ident):
        frame.f_code
assert gc.isenabled()
gc.set_threshold(*thresholds)
stop = True
thread.join()
print("ok")
"""


def test_a_thread_that_runs_while_objects_are_collected():
    """Python 3.11 without its collector off here ends with SIGSEGV."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_frames_are_innermost_first():
    def inner():
        return frames_of(threading.get_ident())

    names = [frame.f_code.co_name for frame in inner()]
    assert names[:2] == ["frames_of", "inner"]
    assert frames_of_all()[threading.get_ident()][1].f_code.co_name == "test_frames_are_innermost_first"


def test_a_thread_that_has_ended_has_none():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert frames_of(thread.ident) == []


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        frames_of(0)
        assert not gc.isenabled()
    finally:
        gc.enable()
    frames_of(0)
    assert gc.isenabled()
