"""What a cluster costs that has nothing to do."""

import os
import time
from pathlib import Path

import conftest

import shmdist as sd

SECONDS = 10


def _cpu_seconds(ospid):
    fields = Path(f"/proc/{ospid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench_idle(benchmark, workers):
    ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in workers]
    before = [_cpu_seconds(ospid) for ospid in ospids]
    benchmark.pedantic(time.sleep, (SECONDS,), rounds=1)
    used = max(_cpu_seconds(ospid) - start for ospid, start in zip(ospids, before, strict=True))
    conftest.record("an idle worker, of one processor", 100 * used / SECONDS, 100.0, "the processor", 0.005, "%")
