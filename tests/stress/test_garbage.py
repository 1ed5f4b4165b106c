"""The collector runs at random under traffic, and finalizers use shmdist in every way: nothing is stuck or lost.

The program (``garbage``) goes on for 20 seconds. For longer, and with another seed::

    SHMDIST_GARBAGE_SECONDS=600 SHMDIST_GARBAGE_SEED=2 python -m pytest -s tests/stress/test_garbage.py
"""

import contextlib
import os
import signal
import sys
import time

import pytest

from tests.integration import helpers

SECONDS = float(os.environ.get("SHMDIST_GARBAGE_SECONDS", "20"))
SEED = os.environ.get("SHMDIST_GARBAGE_SEED", "1")
STUCK = 60  # seconds in which each thread of traffic gets on
AROUND = 90  # seconds for what comes before and after the traffic
pytestmark = pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="processes are found, and their stacks told, by /proc"
)


def ended(script):
    """Tell whether the program has ended."""
    return script.process.poll() is not None


def is_stuck(folder):
    """Tell whether a thread of traffic does not get on."""
    for path in folder.glob("traffic.*"):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if time.time() - path.stat().st_mtime > STUCK:
                return True
    return False


def stacks(folder):
    """Have all processes tell where their threads stand; return that."""
    told = sorted(folder.glob("stacks.*"))
    for path in told:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.suffix[1:]), signal.SIGUSR1)
    time.sleep(2)
    doing = [f"{path.name}: {path.read_text()}" for path in folder.glob("traffic.*")]
    return "\n\n".join([*doing, *(f"{path.name}:\n{path.read_text()}" for path in told)])


# It has its own limit of time, and tells more when that is over.
@pytest.fixture(autouse=True)
def no_time_limit():
    import faulthandler

    faulthandler.cancel_dump_traceback_later()


def test_garbage(tmp_path):
    where = f"seed {SEED}, Python {sys.version.split()[0]}"
    # To files, for nobody reads while it runs.
    with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
        command = [sys.executable, "-m", "tests.stress.garbage", SEED, str(SECONDS), str(tmp_path)]
        script = helpers.Script(command=command, cwd=helpers.ROOT, stdout=out, stderr=err)
        limit = time.monotonic() + SECONDS + AROUND
        try:
            while not ended(script):
                if is_stuck(tmp_path) or time.monotonic() > limit:
                    pytest.fail(f"stuck, with {where}:\n{stacks(tmp_path)}")
                time.sleep(0.1)
            helpers.until(lambda: not helpers.marked(script.mark), 5, f"no process is left, with {where}")
        finally:
            script.kill_all()
        out.seek(0)
        err.seek(0)
        told = out.read()
        assert (script.process.returncode, err.read()) == (0, ""), f"with {where}:\n{told}"
    print(f"{where}: {told}")
