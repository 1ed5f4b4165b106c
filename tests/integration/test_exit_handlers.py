"""Handlers that run when the program ends, and its end beside them: no thread is needed that is not there yet."""

import pytest

from tests.integration.helpers import run_script, within

SETUP = "import atexit, os, sys, threading, time\nimport shmdist as sd\n"

#: What a program does, and what it prints.
ENDS = {
    "nothing": ("sd.addprocs(2)", ""),
    "calls": (
        "a, b = sd.addprocs(2)\n"
        "def end():\n"
        "    print(sd.remotecall(abs, a, -1).fetch(), sd.remotecall(abs, 1, -2).fetch(), sd.async_(abs, -3).fetch())\n"
        "    print(sd.pmap(abs, range(3), batch_size=1), list(sd.pgenerate(abs, range(3))))\n"
        "    sd.rmprocs(a)\n"
        "    sd.rmprocs(b, waitfor=0).fetch()\n"
        "    print(sd.workers())\n"
        "atexit.register(end)",
        "1 2 3\n[0, 1, 2] [0, 1, 2]\n[1]\n",
    ),
    "addprocs": (
        "atexit.register(lambda: print(sd.remotecall_fetch(sd.myid, sd.addprocs(1)[0])))",
        "2\n",
    ),
    "more workers": ("sd.addprocs(1)\natexit.register(lambda: print(sd.addprocs(1)))", "[3]\n"),
    "a map on a thread": (
        "sd.addprocs(2)\nbegun = sd.RemoteChannel(lambda: sd.Channel(9))\n"
        "def wait(x): begun.put(x); time.sleep(100)\n"
        "threading.Thread(target=sd.pmap, args=(wait, range(4)), daemon=True).start()\nbegun.take()",
        "",
    ),
}


@pytest.mark.parametrize("what", ENDS)
def test_what_handlers_may_do(what):
    source, printed = ENDS[what]
    with within(10):  # 12 s and more where the end waits for threads that are not made any more
        assert run_script(SETUP + source).clean() == printed


def test_a_handler_that_comes_too_late():
    source = """
def end():
    print(sd.workers(), sd.pmap(abs, range(2)))
    try: sd.addprocs(1)
    except sd.ShmdistError as error: print(error)
atexit.register(end)
sd.addprocs(1)
"""
    printed = run_script(SETUP + source).clean()
    assert printed.startswith("[1] [0, 1]\nthe program ends, and its workers have ended")
