"""From nothing to workers that have answered; each time in a program of its own."""

import statistics
import subprocess
import sys
from pathlib import Path

import conftest

OURS = """
import time, shmdist as sd
begin = time.perf_counter()
pids = sd.addprocs({n})
for pid in pids:
    sd.remotecall_fetch(abs, pid, -1)
print(time.perf_counter() - begin)
sd.rmprocs(pids)
"""
PEER = """
import time, multiprocessing
if __name__ == "__main__":
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool({n}) as pool:
        pool.map(abs, range({n}), chunksize=1)
        print(time.perf_counter() - begin)
"""


def _run(tmp_path: Path, source, n):
    path = tmp_path / "program.py"
    path.write_text(source.format(n=n))
    return float(subprocess.run([sys.executable, path], check=True, capture_output=True, text=True).stdout)


def bench_two_workers(benchmark, tmp_path):
    ours, peer = [], []
    for _ in range(5):
        ours.append(_run(tmp_path, OURS, 2))
        peer.append(_run(tmp_path, PEER, 2))
    benchmark.pedantic(_run, (tmp_path, OURS, 2), rounds=1)
    conftest.record(
        "start of 2 workers", statistics.median(ours), statistics.median(peer), "Pool(2), spawn", 1.0
    )


def bench_many_workers(benchmark, tmp_path):
    one = statistics.median(_run(tmp_path, OURS, 1) for _ in range(3))
    many = benchmark.pedantic(_run, (tmp_path, OURS, 64), rounds=1)
    conftest.record("start of 64 workers, beside 64 starts of one", many, 64 * one, "64 x addprocs(1)", 1.0)
