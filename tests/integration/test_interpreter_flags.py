"""The interpreter of a local worker behaves as the program's does: flags, warnings, and the hash of texts."""

import os
import sys

import pytest

import shmdist as sd
from tests.integration.helpers import ROOT, run_script

SAME = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os
import shmdist as sd
import numpy as np
def state():
    flags = dict((name, getattr(sys.flags, name)) for name in dir(sys.flags) if not name.startswith(("_", "n_")))
    flags = dict((name, value) for name, value in flags.items() if isinstance(value, int))
    del flags["safe_path"]  # the current directory is in no worker's way
    return flags, sorted(sys.warnoptions), sys._xoptions, os.environ.get("PYTHONHASHSEED")
[pid] = sd.addprocs(1)
assert sd.remotecall_fetch(state, pid) == state(), (sd.remotecall_fetch(state, pid), state())
x = np.ones(100_000)
assert sd.remotecall_fetch(np.sum, pid, x) == 1e5 and sd.pmap(str, range(3)) == ["0", "1", "2"]
channel = sd.RemoteChannel(lambda: sd.Channel(1), pid)
channel.put({{b"x": x}})
assert (channel.take()[b"x"] == x).all()
def fails(): raise ValueError(b"needle")
try: sd.remotecall_fetch(fails, pid)
except ValueError: pass
try: sd.remotecall_fetch(lambda: os._exit(3), pid)
except sd.ProcessExitedException: pass
"""


@pytest.mark.parametrize("flags", ["-E", "-I -bb -W error", "-X dev -W error -OO -B -s -X utf8=0 -X mine=3"])
def test_flags_reach_workers(flags):
    assert run_script("", command=[sys.executable, *flags.split(), "-c", SAME]).clean() == ""


def test_exeflags_come_last(fresh):
    [pid] = fresh(exeflags=["-I", "-OO"])
    assert sd.remotecall_fetch(lambda: (sys.flags.isolated, sys.flags.optimize), pid) == (1, 2)


SEEDS = """
import os, sys
import shmdist as sd
def look(): return hash("x"), hash(b"y"), os.environ.get("PYTHONHASHSEED")
first = sd.addprocs(2)
sd.rmprocs(first[1])
found = {sd.remotecall_fetch(look, pid) for pid in [first[0], *sd.addprocs(sd.LocalManager(1))]}
[of_workers] = found
print(*of_workers)
mine = look()
assert mine[2] == of_workers[2]
if (mine[2] or "random") != "random": assert mine == of_workers
[other] = sd.addprocs(1, env={"PYTHONHASHSEED": 11})
assert sd.remotecall_fetch(look, other)[2] == "11" and sd.remotecall_fetch(look, other) != of_workers
"""


@pytest.mark.parametrize("seed", ["random", "77"])
def test_one_hash_for_all_workers(seed):
    one, two = (run_script(SEEDS, env={"PYTHONHASHSEED": seed}).clean() for _ in range(2))
    assert (one == two) == seed.isdecimal(), (
        "a seed of the user's is kept, and one of ours is each program's own"
    )


def test_no_seed_is_left_in_the_environment(fresh):
    [pid] = fresh()
    assert sd.remotecall_fetch(os.environ.get, pid, "PYTHONHASHSEED") == os.environ.get("PYTHONHASHSEED")
