"""What a cluster costs that has nothing to do."""

import os
import time
from pathlib import Path

import shmdist as sd

SECONDS = 10


def cpu_seconds(ospid):
    """Return the time that a process has had a processor, its system calls included."""
    fields = Path(f"/proc/{ospid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench_idle(benchmark, record, workers):
    ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in workers]
    ospids.append(os.getpid())  # the master, in which the threads of the peer's pool are counted too
    before = [cpu_seconds(ospid) for ospid in ospids]
    benchmark.pedantic(time.sleep, (SECONDS,), rounds=1)
    after = [cpu_seconds(ospid) for ospid in ospids]
    busiest = max(end - begin for begin, end in zip(before, after, strict=True))
    record("idle: the busiest of 3 processes", 100 * busiest / SECONDS, 100, "one processor", 0.005, unit="%")
