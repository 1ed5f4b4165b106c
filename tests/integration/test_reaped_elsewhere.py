"""How a worker ended is told truly where the program ignores SIGCHLD, or reaps its children itself."""

import pytest

from tests.integration.helpers import run_script

REAPERS = {
    "nobody": "",
    "ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "handler": """
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: pass
signal.signal(signal.SIGCHLD, reap)
""",
    "thread": """
def reap():
    while True:
        try: os.wait()
        except ChildProcessError: time.sleep(0.001)
threading.Thread(target=reap, daemon=True).start()
""",
}
SCRIPT = """
import os, signal, threading, time
import shmdist as sd
{reaper}
{old}
for end, told in [(lambda: os.kill(os.getpid(), 9), "SIGKILL"), (lambda: os._exit(3), "code 3"), (lambda: os._exit(0), "code 0")]:
    [pid] = sd.addprocs(1)
    try: sd.remotecall_fetch(end, pid)
    except sd.ProcessExitedException as error:
        known = {{told}} if not {unknown} else {{told, "exit status unknown"}}
        assert any(each in str(error) for each in known), str(error)
    else: raise AssertionError(told)
with sd.addprocs(2) as pids:
    import subprocess
    for pid in pids:
        assert sd.remotecall_fetch(lambda: subprocess.run(["sh", "-c", "exit 5"]).returncode, pid) == 5
assert sd.workers() == [1]
try: sd.addprocs(1, exename="/bin/false")
except sd.LaunchWorkerError as error: assert error.exitcode in (None, 1), error.exitcode
"""
#: The system does not tell by a pidfd how a process ended that has been reaped.
OLD = "import shmdist.managers.processes as p; p._GET_INFO = 0"


@pytest.mark.parametrize("reaper", REAPERS)
def test_how_a_worker_ended(reaper):
    unknown = reaper != "nobody"
    assert run_script(SCRIPT.format(reaper=REAPERS[reaper], old=OLD, unknown=unknown)).clean() == ""


def test_the_system_tells_later():
    """Linux 6.15 and later; the status is unknown before."""
    import os

    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    ignored = REAPERS["ignored"]
    assert run_script(SCRIPT.format(reaper=ignored, old="", unknown=release < (6, 15))).clean() == ""
