"""How many workers there are when nobody says: one for each CPU that the program may use."""

import os

import pytest

from tests.integration.helpers import run_script
from tests.integration.test_shared_limits import in_own_mounts

FOLDER = "/sys/fs/cgroup"
COUNTED = """
import shmdist as sd
os.sched_getaffinity = lambda pid: set(range(64))
os.cpu_count = os.process_cpu_count = lambda: 64
print(sd.LocalManager().n)
"""


def test_affinity():
    source = """
import os, shmdist as sd
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
pids = sd.addprocs()
print(len(pids), sd.remotecall_fetch(lambda: len(os.sched_getaffinity(0)), pids[0]))
"""
    assert run_script(source).clean() == "1 1\n"


def groups(lines, files):
    """Return shell commands that make a process see these cgroups."""
    listed = "".join(line + "\\n" for line in lines)
    made = [f"mount -t tmpfs shmdist {FOLDER}"]
    for path, text in files.items():
        made += [
            f"mkdir -p {FOLDER}/{os.path.dirname(path)}",
            f"echo {text} > {FOLDER}/{path}",
        ]
    return " && ".join(
        [*made, f"printf '{listed}' > {FOLDER}/list", f"mount --bind {FOLDER}/list /proc/$$/cgroup"]
    )


GROUPS = {
    "no limit": (["0::/box"], {"box/cpu.max": "max 100000"}, 64),
    "version 2, of a service: the root has no file": (["0::/a/box"], {"a/box/cpu.max": "250000 100000"}, 3),
    "version 2, in a container": (["0::/"], {"cpu.max": "200000 100000"}, 2),
    "version 2, an outer group has less": (
        ["0::/a/b"],
        {"a/cpu.max": "100000 100000", "a/b/cpu.max": "800000 100000"},
        1,
    ),
    "version 1": (
        ["5:cpu,cpuacct:/box", "1:name=systemd:/box"],
        {"cpu/box/cpu.cfs_quota_us": "400000", "cpu/box/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1, no limit": (
        ["5:cpu:/box"],
        {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"},
        64,
    ),
    "version 1, a container that is told its path on the host": (
        ["5:cpu:/docker/abc", "0::/"],
        {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
        1,
    ),
    "no cgroups": ([], {"other": "file"}, 64),
}


@pytest.mark.parametrize("name", GROUPS)
def test_quota(name):
    lines, files, expected = GROUPS[name]
    assert in_own_mounts(COUNTED, groups(lines, files)) == f"{expected}\n"
