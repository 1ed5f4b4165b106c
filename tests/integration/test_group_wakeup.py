"""Several workers woken at once: by a bell, when they can listen to one."""

import os

import pytest

from tests.integration.helpers import Script

BEGIN = """
import operator, os, random, time
import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.transport.link import Link
from tests.integration.helpers import until

def listening():
    return [link.pid for link in current_node().peers.links.values() if link.hears_group_wakeup]

def settle(pids):
    "Map until all of these workers listen to the bell."
    def step():
        time.sleep(0.002)  # they fall asleep, else there is nobody to wake
        sd.pmap(abs, range(100))
        return set(pids) <= set(listening())
    until(step, 20, "the workers have the bell")
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="there are no bells here")


def test_maps_and_loops_wake_by_the_bell():
    Script(
        BEGIN
        + """
pids = sd.addprocs(3)
settle(pids)
rung = []
mail = current_node().reactor.rings
ring = mail._group_wakeup.set
mail._group_wakeup.set = lambda: (rung.append(1), ring())
wakes, wake = [], Link.wake
Link.wake = lambda link: (wakes.append(link.pid), wake(link))
loop = sd.distributed(operator.add)(abs)
for turn in range(60):
    time.sleep(random.random() / 200)
    assert sd.pmap(operator.neg, range(300)) == [-x for x in range(300)]
    time.sleep(random.random() / 200)
    assert loop(range(1000)) == 499500
assert len(rung) > 20, (rung, wakes)
assert len(wakes) < 3 * len(rung)  # a single one that slept; beside a load it is more often one
assert sd.remotecall_fetch(abs, pids[0], -1) == 1
"""
    ).end(60).clean()


def test_few_of_many_are_woken_one_by_one():
    Script(
        BEGIN
        + """
pids = sd.addprocs(5)
settle(pids)
mail = current_node().reactor.rings
mail._group_wakeup.set = lambda: 1 / 0
two = sd.WorkerPool(pids[:2])
for turn in range(20):
    time.sleep(random.random() / 200)
    assert sd.pmap(operator.neg, range(300), pool=two) == [-x for x in range(300)]
"""
    ).end(60).clean()


def test_some_cannot_listen():
    Script(
        BEGIN
        + """
listener, *others = sd.addprocs(1) + sd.addprocs(2, env={"SHMDIST_POLLER": "select"})
settle([listener])
for turn in range(40):
    time.sleep(random.random() / 200)
    assert sd.pmap(operator.neg, range(300)) == [-x for x in range(300)]
assert listening() == [listener]
"""
    ).end(60).clean()


def test_a_bell_that_gets_lost_on_its_way():
    Script(
        BEGIN
        + """
pids = sd.addprocs(2)
def lose():
    from shmdist.runtime.node import current_node
    link = current_node().peers.links[1]
    take = link.take_fd
    link.take_fd = lambda frame: (os.close(take(frame)), -1)[1]
sd.pmap(abs, range(10))
until(lambda: sd.remotecall_fetch(lambda: current_node().peers.links[1].ring_out is not None, pids[1]))
sd.remotecall_wait(lose, pids[1])
settle(pids[:1])
for turn in range(40):
    time.sleep(random.random() / 200)
    assert sd.pmap(operator.neg, range(300)) == [-x for x in range(300)]
assert listening() == pids[:1]
"""
    ).end(60).clean()


def test_descriptors_go_with_the_workers_and_children_have_none():
    Script(
        BEGIN
        + """
def open_files():
    return len(os.listdir("/proc/self/fd"))
def bells(pid):
    return sd.remotecall_fetch(lambda: len(current_node().reactor.rings._group_wakeups), pid)
pids = sd.addprocs(2)
settle(pids)
assert [bells(pid) for pid in pids] == [1, 1]
child = os.fork()
if not child:
    mail = sd.runtime.node.current_node().reactor.rings
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
def turn():
    more = sd.addprocs(2)
    settle(pids + more)
    sd.rmprocs(more)
turn()
sd.pmap(abs, range(100))
time.sleep(0.2)
before = open_files()
for _ in range(3):
    turn()
    until(lambda: open_files() <= before, 10, "descriptors are back")
assert sd.pmap(abs, [-1, -2]) == [1, 2]
# A worker that has other workers of its own to wake has a bell of its own.
def inner():
    for _ in range(200):
        time.sleep(0.002)
        sd.pmap(abs, range(100), pool=sd.WorkerPool(pids[1:] + [1]))
    return current_node().reactor.rings._group_wakeup is not None
assert sd.remotecall_fetch(inner, pids[0])
assert bells(1) == 1
sd.rmprocs(pids)
until(lambda: not current_node().reactor.rings._group_wakeups, 10, "the worker's bell is forgotten")
"""
    ).end(60).clean()


def test_none_sleeps_while_what_is_for_another_is_pickled():
    Script(
        BEGIN
        + """
import tempfile

pids = sd.addprocs(2)
settle(pids)
mark = os.path.join(tempfile.mkdtemp(), "begun")

class Element:
    def __init__(self, first):
        self.first = first
    def __reduce__(self):
        if self.first:
            time.sleep(0.01)
        else:
            until(lambda: os.path.exists(mark), 10, "the first worker has begun")
        return Element, (self.first,)

def begin(element):
    if element.first:
        open(mark, "w").close()
    return element.first

time.sleep(0.1)
assert sd.pmap(begin, [Element(True), Element(False)], batch_size=1) == [True, False]
os.remove(mark)
time.sleep(0.1)
from shmdist.loops import scatter
assert scatter(begin, [(pids[0], (Element(True),)), (pids[1], (Element(False),))]) == [True, False]
"""
    ).end(60).clean()
