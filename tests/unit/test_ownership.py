"""References dropped by finalizers: told soon, whoever asked first and whoever was faster."""

from shmdist.runtime.node import Node
from shmdist.runtime.reftable import RRID


def asked(node):
    """Count how often standby threads are woken."""
    wakes = []
    node.dispatcher.poller.wake = lambda: wakes.append(True)
    return wakes


def test_drops_that_come_together_wake_once():
    node = Node(1)
    wakes = asked(node)
    for number in range(5):
        node.release(1, RRID(1, number))
    assert len(wakes) == 1
    node.housekeeping()
    assert not node.released
    node.release(1, RRID(1, 9))
    assert len(wakes) == 2


def test_who_comes_too_late_leaves_the_way_free():
    """Another thread has told them meanwhile: the next drop must wake somebody all the same."""
    node = Node(1)
    wakes = asked(node)
    node.release(1, RRID(1, 1))
    node.released.clear()
    node.housekeeping()
    node.release(1, RRID(1, 2))
    assert len(wakes) == 2


def test_an_errand_is_run():
    node = Node(1)
    wakes, done = asked(node), []
    node.errand(lambda: done.append(True))
    assert len(wakes) == 1
    node.housekeeping()
    assert done
