"""Other tools' processes inside of a task: joblib, multiprocessing, concurrent.futures; nothing of them stays."""

import os

import pytest

from tests.integration.helpers import run_script

HEAD = """
import os, shmdist as sd
from tests.integration.helpers import children, is_alive, until

def with_pool(kind):
    import multiprocessing
    with multiprocessing.get_context(kind).Pool(2) as pool:
        return pool.map(abs, range(-20, 0))

def with_executor(kind):
    import concurrent.futures, multiprocessing
    context = multiprocessing.get_context(kind)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        return list(executor.map(abs, range(-20, 0)))

def with_process(kind):
    import multiprocessing
    context = multiprocessing.get_context(kind)
    here, there = context.Pipe()
    process = context.Process(target=there.send, args=(list(range(20, 0, -1)),))
    process.start()
    found = here.recv()
    process.join()
    assert process.exitcode == 0
    return found

def with_joblib(backend):
    import joblib, numpy as np
    big = np.arange(200_000.0)  # goes by a file that is mapped
    take = joblib.delayed(lambda n, array: int(array[n]))
    return joblib.Parallel(n_jobs=2, backend=backend)(take(n, big) for n in range(20, 0, -1))

def check(tool, kind, pids):
    futures = [sd.remotecall(tool, pid, kind) for pid in pids]
    for future in futures:
        assert future.fetch(timeout=30) == list(range(20, 0, -1)), (tool, kind)
    assert [sd.remotecall_fetch(abs, pid, -pid) for pid in pids] == pids

def left(pid):
    found = []
    for child in children(sd.remotecall_fetch(os.getpid, pid)):
        try:
            with open(f"/proc/{child}/cmdline") as file: text = file.read()
        except OSError:
            text = "ends now"
        if "resource_tracker" not in text: found.append(text)
    return found

pids = sd.addprocs(2, exeflags=["-W", "ignore::DeprecationWarning"])
"""


@pytest.mark.parametrize("tool", ["with_pool", "with_executor", "with_process"])
def test_multiprocessing(tool):
    run_script(
        HEAD
        + f"""
check({tool}, "fork", pids)
check({tool}, "spawn", pids)
until(lambda: not any(map(left, pids)), 5, "children of the workers are gone")
"""
    ).clean()


def test_joblib(tmp_path):
    """Its processes stay for the next call, as in any program; they end with the worker, and with the program."""
    pytest.importorskip("joblib")
    run_script(
        HEAD
        + """
check(with_joblib, "threading", pids)
check(with_joblib, "loky", pids)
check(with_joblib, "loky", pids[:1])
ospids = children(sd.remotecall_fetch(os.getpid, pids[0]))
assert len(ospids) >= 2
sd.rmprocs(pids[0])
until(lambda: not any(map(is_alive, ospids)), 10, "joblib's processes are gone")
""",
        env={"JOBLIB_TEMP_FOLDER": str(tmp_path)},
    ).clean()
    assert os.listdir(tmp_path) == []
