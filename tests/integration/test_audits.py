"""Processes that are killed after they told of a count, and before they sent what it counts."""

import gc
import os
import signal
import threading

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.transport.messages import Kind
from tests.integration.helpers import until

THREADS = 3
kept = []

# ---------------------------------------------------------------------- on workers

MAKE = {"future": lambda: sd.Future().put("a value"), "shared": lambda: sd.shared.zeros(1000)}


def keep(thing):
    kept.append(thing)


def let_go():
    kept.clear()
    gc.collect()


def counts(what):
    """Return who holds the futures whose value is `a value`, or shared arrays, that live here."""
    gc.collect()
    node = current_node()
    if what == "shared":
        node.sharing.blocks.pay()
        return list(node.sharing.state()["lent"].values())
    node.counts.flush_released()
    with node.lock:
        return [dict(entry.counts) for entry in node.counts.refs.entries.values() if entry.value == "a value"]


def pass_on(thing, to, times):
    for _ in range(times):
        sd.remotecall_wait(keep, to, thing)


def send_without_waiting(thing, to, times):
    for _ in range(times):
        sd.remote_do(keep, to, thing)


def die_sending(thing, to):
    """Pass a thing on from several threads, killed when each has told its owner and none has sent it."""
    link, together = current_node().peers.links[to], threading.Barrier(THREADS)
    send = link.send

    def stop(parts, *rest, **options):
        if parts[0][0] == Kind.CALL:
            together.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return send(parts, *rest, **options)

    link.send = stop
    for _ in range(THREADS):
        threading.Thread(target=sd.remote_do, args=(keep, to, thing)).start()


# ---------------------------------------------------------------------- here


def is_told(owner, what, expected):
    found = []

    def right():
        found[:] = sd.remotecall_fetch(counts, owner, what)
        return found == expected

    try:
        until(right, 5)
    except AssertionError:
        raise AssertionError(f"process {owner} counts {found}, not {expected}") from None


def teller_dies(what, owner, reporter, receiver):
    """Have `reporter` pass on what `owner` owns, twice to the end; then what is left is what was sent."""
    thing = sd.remotecall_fetch(MAKE[what], owner)
    sd.remotecall_wait(pass_on, reporter, thing, receiver, 2)
    sd.remote_do(die_sending, reporter, thing, receiver)
    del thing
    until(lambda: reporter not in sd.procs())
    is_told(owner, what, [{receiver: 2}])
    sd.remotecall_wait(let_go, receiver)
    is_told(owner, what, [])


@pytest.mark.parametrize("what", MAKE)
@pytest.mark.parametrize("roles", ["1 a", "a b", "a 1"])
def test_what_was_sent_is_left(cluster, fresh, what, roles):
    pids = {"1": 1, "a": cluster[0], "b": cluster[1]}
    owner, receiver = (pids[name] for name in roles.split())
    teller_dies(what, owner, *fresh(), receiver)


@pytest.mark.parametrize("owner", [1, "a"])
def test_a_reference_that_goes_home(cluster, fresh, owner):
    owner = cluster[0] if owner == "a" else owner
    teller_dies("future", owner, *fresh(), owner)


@pytest.mark.parametrize("what", MAKE)
def test_what_the_receiver_has_not_read_yet(cluster, fresh, what):
    """It stands still while the sender is killed, and the owner asks."""
    owner = cluster[0]
    reporter, receiver = fresh(2)
    thing = sd.remotecall_fetch(MAKE[what], owner)
    sd.remotecall_wait(pass_on, reporter, thing, receiver, 1)
    ospid = current_node().peers.members[receiver].ospid
    os.kill(ospid, signal.SIGSTOP)
    try:
        sd.remotecall_wait(send_without_waiting, reporter, thing, receiver, 4)
        sd.remote_do(die_sending, reporter, thing, receiver)
        del thing
        until(lambda: reporter not in sd.procs())
        is_told(owner, what, [{receiver: 5 + THREADS}])
    finally:
        os.kill(ospid, signal.SIGCONT)
    is_told(owner, what, [{receiver: 5}])
    sd.remotecall_wait(let_go, receiver)
    is_told(owner, what, [])


@pytest.mark.parametrize("what", MAKE)
def test_a_receiver_that_dies_before_it_answers(cluster, fresh, what):
    owner = cluster[0]
    reporter, receiver = fresh(2)
    thing = sd.remotecall_fetch(MAKE[what], owner)
    sd.remotecall_wait(pass_on, reporter, thing, receiver, 1)
    ospid = current_node().peers.members[receiver].ospid
    os.kill(ospid, signal.SIGSTOP)
    sd.remote_do(die_sending, reporter, thing, receiver)
    del thing
    until(lambda: reporter not in sd.procs())
    os.kill(ospid, signal.SIGKILL)
    is_told(owner, what, [])


class _Row(sd.LocalManager):
    """Workers in a row, each connected with its neighbours."""

    def launch(self, params):
        for number, config in enumerate(super().launch(params)):
            config.ident = number
            config.connect_idents = [number + 1]
            yield config


@pytest.mark.parametrize("what", MAKE)
def test_owner_and_receiver_that_are_not_connected(fresh, what):
    """Process 1 carries what they ask and answer."""
    owner, reporter, receiver = fresh(_Row(3), topology="custom")
    teller_dies(what, owner, reporter, receiver)
