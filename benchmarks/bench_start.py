"""From nothing to workers that have answered; each time in a program of its own, so that both start cold."""

import os
import subprocess
import sys

import pytest

OURS = """
import time
import shmdist as sd

begin = time.perf_counter()
pids = sd.addprocs({n})
for pid in pids:
    sd.remotecall_fetch(abs, pid, -1)
print(time.perf_counter() - begin)
sd.rmprocs(*pids)
assert sd.procs() == [1]
"""

# One worker could answer for all; so each first waits, at a barrier, until all are there.
PEER = """
import multiprocessing
import time

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    begin = time.perf_counter()
    with spawn.Pool({n}, initializer=spawn.Barrier({n}).wait) as pool:
        pool.map(abs, range({n}), chunksize=1)
        print(time.perf_counter() - begin)
"""


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a program, and returns the seconds that it prints."""
    # The standard library is compiled already, as an installed package is. Run from its source, shmdist is
    # once it has run; but where this is set each worker would compile it anew, and that would be measured.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(program):
        path = tmp_path / "program.py"  # a file: what spawn starts, reads it again
        path.write_text(program)
        done = subprocess.run([sys.executable, path], env=env, check=True, stdout=subprocess.PIPE, text=True)
        return float(done.stdout)

    return run


def bench_two_workers(compare, run):
    compare(
        "start of 2 workers",
        OURS.format(n=2),
        PEER.format(n=2),
        peer_name="Pool(2), spawn",
        most=1.0,
        rounds=9,
        measure=run,
    )


def bench_many_workers(compare, run):
    compare(
        "start of 64 workers, beside that of one",
        OURS.format(n=64),
        OURS.format(n=1),
        peer_name="addprocs(1)",
        most=64.0,
        rounds=3,
        measure=run,
    )
