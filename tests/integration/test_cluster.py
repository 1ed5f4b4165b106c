"""Members: adding, removing, asking who is there; parameters and topologies."""

import os
import sys
import threading

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import (
    Script,
    cpu_ticks,
    is_alive,
    loop_for_ever,
    run_script,
    sleep_long,
    tell_and_run,
    until,
    within,
)


def test_without_workers():
    """Everything works on process 1 alone."""
    Script(
        """
import os, shmdist as sd
assert (sd.myid(), sd.nprocs(), sd.nworkers(), sd.procs(), sd.workers()) == (1, 1, 1, [1], [1])
assert sd.other_procs() == sd.other_workers() == []
assert sd.procs(1) == [1]
assert sd.remotecall_fetch(os.getpid, 1) == sd.fetchany(os.getpid) == os.getpid()
assert sd.spawn(abs, -1).fetch() == sd.spawnat("any", abs, -1).fetch() == 1
assert sd.remote(abs)(-1) == 1
c = sd.RemoteChannel(); c.put(1); assert c.take() == 1
f = sd.Future(); f.put(2); assert f.fetch() == 2
sd.interrupt()
assert len(sd.cluster_cookie()) >= 32
assert sd.cluster_cookie("secret") == sd.cluster_cookie() == "secret"
sd.addprocs(1)
assert sd.remotecall_fetch(sd.cluster_cookie, 2) == "secret"
try:
    sd.cluster_cookie("other")
except sd.ShmdistError:
    pass
else:
    raise AssertionError
assert (sd.nprocs(), sd.nworkers(), sd.procs(), sd.workers()) == (2, 1, [1, 2], [2])
assert sd.other_procs() == sd.other_workers() == [2]
for pid, procs, other in ((1, [1, 2], [2]), (2, [1, 2], [1])):
    assert sd.remotecall_fetch(sd.procs, pid) == procs
    assert sd.remotecall_fetch(sd.other_procs, pid) == other
    assert sd.remotecall_fetch(sd.workers, pid) == [2]
assert sd.remotecall_fetch(sd.other_workers, 2) == []
"""
    ).end().clean()


def test_who_is_there(cluster):
    everybody = sd.procs()
    assert everybody == sorted(everybody) and everybody[0] == 1 and set(cluster) <= set(everybody)
    assert sd.procs(1) == sd.procs(cluster[0]) == everybody
    for pid in cluster:
        assert sd.remotecall_fetch(sd.myid, pid) == pid
        assert sd.remotecall_fetch(sd.procs, pid) == everybody
        assert sd.remotecall_fetch(sd.nprocs, pid) == len(everybody)
        assert pid not in sd.remotecall_fetch(sd.other_procs, pid)
    with pytest.raises(ValueError, match="no process 999"):
        sd.procs(999)


def test_add_and_remove(cluster):
    before = sd.procs()
    with sd.addprocs(2) as pids:
        assert isinstance(pids, list) and len(pids) == 2 and all(type(pid) is int for pid in pids)
        assert sd.procs() == before + pids
        for pid in cluster:  # the older ones know the new ones
            assert sd.remotecall_fetch(sd.remotecall_fetch, pid, sd.myid, pids[1]) == pids[1]
            until(lambda pid=pid: sd.remotecall_fetch(sd.procs, pid) == before + pids)
        ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in pids]
    assert sd.procs() == before
    assert not any(is_alive(ospid) for ospid in ospids)
    for pid in pids:
        with pytest.raises(sd.ProcessExitedException):
            sd.remotecall_fetch(abs, pid, 1)
        until(lambda pid=pid: pid not in sd.remotecall_fetch(sd.procs, cluster[0]))
    sd.rmprocs(*pids)  # again does no harm
    with sd.addprocs(1) as more:
        assert more[0] > max(pids), "ids are never used again"


def test_rmprocs_forms(fresh):
    pids = fresh(4)
    assert sd.rmprocs(pids[0]) is None
    assert sd.rmprocs([pids[1], pids[2]]) is None
    task = sd.rmprocs(pids[3], waitfor=0)
    task.wait(timeout=5)
    until(lambda: not set(pids) & set(sd.procs()))
    with pytest.raises(ValueError, match="process 1"):
        sd.rmprocs(1)
    with pytest.raises(ValueError, match="999"):
        sd.rmprocs(999)
    with pytest.raises(TypeError):
        sd.rmprocs("2")


def test_rmprocs_of_busy_workers(fresh):
    pids = fresh(2)
    started = sd.RemoteChannel(lambda: sd.Channel(9))
    futures = [
        sd.remotecall(tell_and_run, pid, started, f)
        for pid, f in zip(pids, (loop_for_ever, sleep_long), strict=True)
    ]
    ospids = [started.take(timeout=5) for _ in pids]
    with within(4):
        sd.rmprocs(*pids, waitfor=4)
    for future in futures:
        with pytest.raises(sd.ProcessExitedException):
            future.fetch(timeout=1)
    assert not any(is_alive(ospid) for ospid in ospids)


def test_a_worker_that_ignores_exit_is_killed(fresh):
    [pid] = fresh()
    started = sd.RemoteChannel(lambda: sd.Channel(9))
    from tests.integration.helpers import hold_the_interpreter

    sd.remotecall(tell_and_run, pid, started, hold_the_interpreter)
    ospid = started.take(timeout=5)
    with within(2), pytest.raises(TimeoutError, match=str(pid)):
        sd.rmprocs(pid, waitfor=0.1)
    until(lambda: not is_alive(ospid) and pid not in sd.procs(), 5)
    with pytest.raises(sd.ProcessExitedException, match="SIGKILL during its removal by rmprocs") as caught:
        sd.remotecall_fetch(abs, pid, -1)
    assert "memory" not in str(caught.value)
    with pytest.raises(ValueError, match="waitfor"):
        sd.rmprocs(fresh(1), waitfor=-1)


def test_parameters(fresh, tmp_path):
    [pid] = fresh(1, dir=str(tmp_path), env={"NEEDLE": "in it", "NUMBER": 5}, exeflags=["-X", "utf8", "-O"])
    assert sd.remotecall_fetch(os.getcwd, pid) == str(tmp_path)
    assert sd.remotecall_fetch(os.getenv, pid, "NEEDLE") == "in it"
    assert sd.remotecall_fetch(os.getenv, pid, "NUMBER") == "5"
    assert sd.remotecall_fetch(lambda: (sys.flags.utf8_mode, sys.flags.optimize), pid) == (1, 1)
    assert sd.remotecall_fetch(lambda: sys.executable, pid) == sys.executable


def test_exename(fresh, tmp_path):
    link = tmp_path / "other python"
    link.write_text(f'#!/bin/sh\nexport SEEN=it\nexec {sys.executable} "$@"\n')
    link.chmod(0o755)
    [pid] = fresh(1, exename=str(link))
    assert sd.remotecall_fetch(os.getenv, pid, "SEEN") == "it"


def test_blas_threads_are_one_unless_asked_otherwise(fresh, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    [one] = fresh()
    [many] = fresh(1, enable_threaded_blas=True)
    [own] = fresh(1, env={"OMP_NUM_THREADS": "3"})
    get = os.getenv
    assert sd.remotecall_fetch(get, one, "OMP_NUM_THREADS") == "1"
    assert sd.remotecall_fetch(get, one, "OPENBLAS_NUM_THREADS") == "1"
    assert sd.remotecall_fetch(get, one, "MKL_NUM_THREADS") == "7", "the user's own setting is kept"
    assert sd.remotecall_fetch(get, many, "OMP_NUM_THREADS") is None
    assert sd.remotecall_fetch(get, own, "OMP_NUM_THREADS") == "3"
    assert "OMP_NUM_THREADS" not in os.environ
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads():
        import numpy  # noqa: F401
        import threadpoolctl

        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    assert set(sd.remotecall_fetch(threads, one)) <= {1}
    assert threadpoolctl


def test_wrong_parameters():
    with pytest.raises(TypeError, match="topolgy") as caught:
        sd.addprocs(1, topolgy="custom")
    assert "topology" in str(caught.value) and "exeflags" in str(caught.value)
    with pytest.raises(ValueError, match="topology"):
        sd.addprocs(1, topology="ring")
    for number in (0, -1):
        with pytest.raises(ValueError):
            sd.addprocs(number)
    for thing in (1.5, True, object()):
        with pytest.raises((TypeError, ValueError)):
            sd.addprocs(thing)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"exename": "/nowhere/python"}, "/nowhere/python"),
        ({"exename": "/bin/false"}, "ended before it was up"),
        ({"dir": "/nowhere"}, "/nowhere"),
        ({"exeflags": ["--no-such-flag"]}, "no-such-flag"),
    ],
)
def test_workers_that_do_not_come_up(params, expected):
    before = sd.procs()
    with within(10), pytest.raises(sd.LaunchWorkerError, match=expected):
        sd.addprocs(2, **params)
    assert sd.procs() == before


def test_a_worker_that_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("SHMDIST_WORKER_TIMEOUT", "0.3")
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec sleep 30\n")
    mute.chmod(0o755)
    with within(5), pytest.raises(sd.LaunchWorkerError, match=r"0\.3 s"):
        sd.addprocs(1, exename=str(mute))


def test_master_worker(fresh):
    a, b = fresh(2, topology="master_worker")
    assert sd.remotecall_fetch(sd.remotecall_fetch, a, sd.myid, 1) == 1
    with within(5), pytest.raises((ConnectionError, sd.ShmdistError), match="topology"):
        sd.remotecall_fetch(sd.remotecall_fetch, a, sd.myid, b)


def test_references_in_master_worker(fresh):
    """A worker may hold a reference to a value on one it is not connected with, and drop it."""
    a, b = fresh(2, topology="master_worker")
    from tests.integration.helpers import reference_count

    future, here = sd.remotecall(list, a, "ab").wait(), sd.Future()
    sd.remotecall_fetch(lambda *refs: None, b, future, here)
    del future, here
    until(lambda: (reference_count(), sd.remotecall_fetch(reference_count, a))[1] == 0)


class _Custom(sd.LocalManager):
    """Names its workers, and who is connected with whom."""

    def launch(self, params):
        for number, config in enumerate(super().launch(params)):
            config.ident = number
            config.connect_idents = {0: [1], 1: [], 2: []}[number]
            yield config


def test_custom_topology():
    with sd.addprocs(_Custom(3), topology="custom") as (a, b, c):
        assert sd.remotecall_fetch(sd.remotecall_fetch, a, sd.myid, b) == b
        assert sd.remotecall_fetch(sd.remotecall_fetch, b, sd.myid, a) == a
        for one, other in ((a, c), (c, a), (b, c), (c, b)):
            with pytest.raises((ConnectionError, sd.ShmdistError), match="topology"):
                sd.remotecall_fetch(sd.remotecall_fetch, one, sd.myid, other)


def _links():
    from shmdist.runtime.node import current_node

    return sorted(current_node().peers.links)


def test_lazy_and_eager_links(fresh):
    a, b = fresh(2)
    assert a not in sd.remotecall_fetch(_links, b) and b not in sd.remotecall_fetch(_links, a)
    sd.remotecall_fetch(sd.remotecall_fetch, a, abs, b, 1)
    assert a in sd.remotecall_fetch(_links, b) and b in sd.remotecall_fetch(_links, a)
    c, d = fresh(2, lazy=False)
    assert {1, a, b, d} <= set(sd.remotecall_fetch(_links, c))
    assert {1, a, b, c} <= set(sd.remotecall_fetch(_links, d))


def test_two_workers_dial_each_other_at_once(fresh):
    a, b = fresh(2)
    for one, other in ((a, b), (b, a)):
        sd.remotecall(lambda other: [sd.remotecall_fetch(abs, other, n) for n in range(20)], one, other)
    assert sd.remotecall_fetch(sd.remotecall_fetch, a, abs, b, -1) == 1
    sd.rmprocs(a)
    assert sd.remotecall_fetch(abs, b, -2) == 2


def test_add_from_several_threads():
    before = sd.procs()
    added, errors = [], []

    def add():
        try:
            added.extend(sd.addprocs(1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors and len(set(added)) == 3
    sd.rmprocs(added)
    assert sd.procs() == before


def test_not_restricted_workers_listen_by_tcp_too(fresh):
    a, b = fresh(2, restrict=False)
    assert sd.remotecall_fetch(sd.remotecall_fetch, a, sd.myid, b) == b
    families = [[family for family, _ in current_node().peers.members[pid].addresses] for pid in (a, b)]
    assert families == [["unix", "tcp"]] * 2
    assert all(current_node().peers.links[pid].is_local for pid in (a, b))


def test_not_restricted_workers_are_of_this_host(fresh):
    pids = fresh(2, restrict=False)
    x = sd.shared.zeros(1000)
    for pid in pids:
        sd.remotecall_wait(lambda: x[:500].fill(sd.myid()), pid)
        assert x[:500].sum() == 500 * pid
        assert sd.procs(pid) == sd.procs(1) and pid in sd.procs(pid)
    sd.remotecall_wait(lambda: sd.remotecall_wait(lambda: x[500:].fill(7.0), pids[1]), pids[0])
    assert x[500:].sum() == 3500


def test_where_there_is_no_way_by_unix(fresh):
    """As where `exename` puts a worker into another network namespace."""

    class Elsewhere(sd.LocalManager):
        def launch(self, params):
            for config in super().launch({**params, "restrict": False}):
                config.connect_at = ("unix", "\0shmdist-nobody-listens-here")
                yield config

    [pid] = fresh(Elsewhere(1))
    assert not current_node().peers.links[pid].is_local
    assert sd.remotecall_fetch(sd.myid, pid) == pid


def test_idle_workers_use_no_processor_time(fresh):
    pids = fresh(2)
    ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in pids]
    sd.remotecall_fetch(sd.remotecall_fetch, pids[0], abs, pids[1], 1)
    before = [cpu_ticks(ospid) for ospid in ospids]
    threading.Event().wait(1.0)
    used = [now - then for now, then in zip(map(cpu_ticks, ospids), before, strict=True)]
    assert max(used) <= 2, f"{used} ticks of {os.sysconf('SC_CLK_TCK')} a second"


def test_worker_id_from_socket(cluster):
    from shmdist.runtime.node import current_node

    link = current_node().peers.links[cluster[0]]
    assert sd.worker_id_from_socket(link.connection) == cluster[0]
    assert sd.worker_id_from_socket(sys.__stdin__) == -1


def test_too_many_open_files():
    """Wherever the limit strikes, the error says so, and nothing is left of what was under way."""
    Script(
        """
import os, resource, shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import children, until
[pid] = sd.addprocs(1)
sd.rmprocs(sd.addprocs(2))
for _ in range(20):
    sd.remotecall_fetch(abs, pid, 1)  # now it has a mailbox
until(lambda: current_node().peers.links[pid].ring_in is not None and current_node().peers.links[pid].kick_out >= 0)
def state():
    return len(os.listdir("/proc/self/fd")), len(children())
before = state()
for spare in range(1, 24):
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        pids = sd.addprocs(2)
    except sd.LaunchWorkerError as error:
        assert "open files" in str(error) and "ulimit -n" in str(error), error
        pids = error.pids
    assert sd.remotecall_fetch(abs, pid, -1) == 1
    sd.rmprocs(*pids)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] + 99, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    until(lambda: state() == before, 5, f"{spare} to spare: {state()} and not {before}")
"""
    ).end(60).clean()


def test_more_workers_than_open_files_allow():
    """Those that have come up work on, with many arrays too; and the rest come when the limit is raised."""
    run_script(
        """
import os, resource, numpy as np, shmdist as sd
def limit(number):
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
limit(len(os.listdir("/proc/self/fd")) + 70)
try:
    sd.addprocs(16)
except sd.LaunchWorkerError as error:
    assert "ulimit -n" in str(error), error
    pids = list(error.pids)
else:
    raise AssertionError
assert sd.workers() == (pids or [1]) and len(pids) < 16
sd.rmprocs(pids[2:])  # now there is room for what calls need
pids = pids[:2] or sd.addprocs(2)
arrays = [np.full(6000, n) for n in range(500)]
for pid in pids:
    back = sd.remotecall_fetch(lambda arrays: [a + 1 for a in arrays], pid, arrays)
    assert all(a[5] == n + 1 for n, a in enumerate(back))
shared = [sd.shared.full(50, n) for n in range(500)]
assert sd.pmap(lambda a: int(a[5]), shared) == list(range(500))
limit(1000)
assert len(sd.addprocs(2)) == 2 and sd.nworkers() == len(pids) + 2
"""
    ).clean()
