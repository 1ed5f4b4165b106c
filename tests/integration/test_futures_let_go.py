"""Futures that are fetched, by which their owners forget the values, while others ask for them or send them."""

import threading

import pytest

import shmdist as sd
from shmdist.references import future as future_module
from shmdist.references import future_interface
from shmdist.runtime.node import current_node
from tests.integration.helpers import until


@pytest.mark.parametrize("where", ["here", "there"])
@pytest.mark.parametrize("ask", ["fetch", "wait", "isready", "put", "done callback"])
def test_what_is_asked_of_one_that_is_fetched_meanwhile(cluster, monkeypatch, ask, where):
    future = sd.Future(1 if where == "here" else cluster[0]).put([5])

    def fetched_first(function):
        def run(*args, **options):
            monkeypatch.undo()
            assert future.fetch() == [5]
            settle(future)
            return function(*args, **options)

        return run

    for module, name in ((future_module, "ask"), (future_interface, "ask_later")):
        monkeypatch.setattr(module, name, fetched_first(getattr(module, name)))
    monkeypatch.setattr(type(future), "_entry", fetched_first(type(future)._entry))
    if ask == "put":
        with pytest.raises(sd.ShmdistError, match="already has a value"):
            future.put(6, timeout=3)
    elif ask == "done callback":
        called = threading.Event()
        future.add_done_callback(lambda _: called.set())
        assert called.wait(3)
    else:
        getattr(future, ask)(timeout=3)
    assert future.fetch() == [5] and future.isready()
    monkeypatch.undo()
    settle(future)
    assert not sd.remotecall_fetch(has_entry, future.where, tuple(future._rrid))


def settle(future):
    """Return when the owner has been told of what was let go of."""
    current_node().counts.flush_released()
    sd.remotecall_fetch(int, future.where)


def has_entry(rrid):
    node = current_node()
    with node.lock:
        return rrid in node.counts.refs.entries


def test_sent_in_a_function_that_goes_to_others_after_it_is_fetched(cluster):
    future = sd.remotecall(list, cluster[0], "ab")
    pool = sd.CachingPool(cluster[1:2])
    function = lambda n: [*future.fetch(timeout=5), n]  # noqa: E731
    assert sd.pmap(function, [1], pool=pool) == [["a", "b", 1]]
    assert future.fetch() == ["a", "b"]
    settle(future)
    pool.push(cluster[2])
    assert sd.pmap(function, range(20), pool=pool, batch_size=1) == [["a", "b", n] for n in range(20)]
    del function
    pool.clear()
    until(lambda: not sd.remotecall_fetch(has_entry, cluster[0], tuple(future._rrid)))


def test_fetched_by_another_thread_while_it_is_sent(cluster, monkeypatch):
    future = sd.Future(cluster[0]).put([5])
    node = current_node()

    def count(refs, *args):
        monkeypatch.undo()
        assert future.fetch() == [5]
        settle(future)
        node.counts.count(refs, *args)

    monkeypatch.setattr(type(node.counts), "count", lambda self, *args: count(*args))
    assert sd.remotecall_fetch(sd.fetch, cluster[1], future, timeout=5) == [5]
    until(lambda: not sd.remotecall_fetch(has_entry, cluster[0], tuple(future._rrid)))
