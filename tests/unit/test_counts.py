"""References dropped by finalizers: told soon, whoever asked first and whoever was faster."""

from collections import deque

import pytest

from shmdist.refcount.table import RRID
from shmdist.runtime.node import Node


@pytest.fixture
def node():
    node = Node(1)
    yield node
    node.reactor.close()


def asked(node):
    """Count how often standby threads are woken."""
    wakes = []
    node.reactor.poller.wake = lambda: wakes.append(True)
    return wakes


def test_drops_that_come_together_wake_once(node):
    wakes = asked(node)
    for number in range(5):
        node.counts.give_back([(RRID(1, number), 1)])
    assert len(wakes) == 1
    node.counts.housekeeping()
    assert not node.counts.released
    node.counts.give_back([(RRID(1, 9), 1)])
    assert len(wakes) == 2


def test_who_comes_too_late_leaves_the_way_free(node):
    """Another thread has told them meanwhile: the next drop must wake somebody all the same."""
    wakes = asked(node)
    node.counts.give_back([(RRID(1, 1), 1)])
    node.counts.released.clear()
    node.counts.housekeeping()
    node.counts.give_back([(RRID(1, 2), 1)])
    assert len(wakes) == 2


def test_an_errand_is_run(node):
    wakes, done = asked(node), []
    node.counts.run_soon(lambda: done.append(True))
    assert len(wakes) == 1
    node.counts.housekeeping()
    assert done


class SeenAMomentAgo(deque):
    """Jobs that another thread takes just after this one has seen that there are some."""

    def __bool__(self):
        return True


def test_another_thread_takes_the_last_job(node, caplog):
    asked(node)
    done, node.counts.deferred_jobs = [], SeenAMomentAgo()
    node.counts.run_soon(lambda: done.append(True))
    node.counts.housekeeping()
    assert done
    assert not caplog.records
