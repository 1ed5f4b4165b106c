"""Parameters bear the names that the documentation gives them, and may be given by these."""

import operator
import sys

import pytest

import shmdist as sd


def test_of_addprocs(cluster):
    with sd.addprocs(n=2) as pids:
        assert len(pids) == 2
    with sd.addprocs(n=sd.LocalManager(1)) as pids:
        assert len(pids) == 1
    with pytest.raises(TypeError, match="no parameter 'what'"):
        sd.addprocs(what=2)


def test_procs_of_everywhere(cluster):
    a, b, c = cluster
    sd.everywhere("placed = 0")
    sd.everywhere("placed = q", procs=[a, b], q=1)
    assert [sd.everywhere("placed", pid) for pid in (1, *cluster)] == [0, 1, 1, 0]
    assert sd.everywhere("placed + q", procs=a, q=1) == 2
    assert sd.everywhere(code_or_def="placed", procs=c) == 0
    sd.everywhere("globals().pop('q', None)")
    with pytest.raises(NameError):
        sd.everywhere("procs", a)


@pytest.mark.parametrize("form", ["keyword", "positional", "with bindings"])
def test_procs_of_everywhere_as_a_decorator(cluster, form):
    a, b, _ = cluster
    decorate = {
        "keyword": lambda: sd.everywhere(procs=[a, b]),
        "positional": lambda: sd.everywhere([a, b]),
        "with bindings": lambda: sd.everywhere(procs=[a, b], q=3),
    }[form]()

    @decorate
    def decorated():
        return globals().get("q", 0)

    try:
        there = [sd.everywhere("'decorated' in globals()", pid) for pid in (1, *cluster)]
        assert there == [False, True, True, False]
        assert sd.everywhere("decorated()", procs=b) == (3 if "bindings" in form else 0)
    finally:
        sd.everywhere("for name in ('decorated', 'q'): globals().pop(name, None)")


def test_procs_of_everywhere_for_one_process(cluster):
    @sd.everywhere(procs=cluster[0])
    class Decorated:
        pass

    assert isinstance(Decorated, type)
    there = [sd.everywhere("bool(globals().pop('Decorated', None))", pid) for pid in cluster]
    assert there == [True, False, False]


def test_of_clear(cluster):
    sd.everywhere("cleared = 1")
    sd.clear("cleared", pids=[cluster[0]])
    assert [sd.everywhere("cleared", pid) for pid in cluster] == [None, 1, 1]
    sd.clear(names=["cleared"], pids=cluster)
    assert [sd.everywhere("cleared", pid) for pid in cluster] == [None] * 3
    pool = sd.CachingPool([1])
    assert sd.clear(pool=pool) is pool
    for wrong in ({}, {"names": "cleared", "pool": pool}):
        with pytest.raises(TypeError, match="give one of them"):
            sd.clear(**wrong)
    assert sys.modules["__main__"].__dict__.pop("cleared") == 1


def test_of_distributed(cluster):
    assert sd.distributed(reducer=operator.add)(lambda i: i)(range(4)) == 6
    assert sd.distributed(reducer=operator.add, iterable=range(4))(lambda i: i) == 6
    assert sd.distributed(operator.add, iterable=range(4))(lambda i: i) == 6


def test_of_remote(cluster):
    assert sd.remote(f=abs)(-3) == 3
    assert sd.remote(pool=sd.WorkerPool([1]), f=sd.myid)() == 1
    assert sd.remote(sd.WorkerPool([cluster[0]]), f=sd.myid)() == cluster[0]


def test_of_others(cluster):
    pool = sd.WorkerPool(pids=cluster)
    sd.set_default_worker_pool(pool=sd.default_worker_pool())
    assert sd.CachingPool(pids=cluster).workers() == pool.workers()
    assert sd.remotecall_eval(module_name="__main__", procs=1, code="1 + 1") == 2
    assert sd.splitrange(first=1, last=2, np=1) == [range(1, 3)]
    assert sd.timedwait(test=lambda: True, timeout=1, pollint=0.1) == "ok"
    assert sd.procs(pid=1) == [1, *cluster]
    channel = sd.RemoteChannel(factory=lambda: sd.Channel(size=1), pid=1)
    assert sd.channel_from_id(rrid=sd.remoteref_id(ref=channel)) is not None
    assert sd.Future(pid=cluster[0]).where == cluster[0]
