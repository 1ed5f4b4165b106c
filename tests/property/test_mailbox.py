"""Two links with mailboxes: one order over both roads, nothing lost, and no sleep through a message.

Each side has a fence between two of its steps, and there the other side may do anything. So
the tests put the other side's actions there, which makes every interleaving that matters one
that a single thread can play.
"""

import contextlib
import os
import select
import socket
from multiprocessing.connection import Connection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.memory import mailbox as module
from shmdist.memory.mailbox import MOST, RING, SLOTS, Mailbox, Sender
from shmdist.memory.segment import PAGE
from shmdist.wire.link import Link, LinkClosed
from shmdist.wire.messages import Kind
from shmdist.wire.poller import Kick
from tests.unit.test_link import contents, encode, pattern


class Watched(list):
    """Parts whose number is asked for when the sender has seen that the receiver looks."""

    def __init__(self, parts, then):
        super().__init__(parts)
        self.then = then

    def __len__(self):
        then, self.then = self.then, None
        if then is not None:
            then()
        return super().__len__()


class World:
    """A sender and a receiver, whose fences call what the test likes."""

    def __init__(self, with_kick=True):
        a, b = socket.socketpair()
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
        self.a, self.b = Link(Connection(a.detach()), 2), Link(Connection(b.detach()), 1)
        self.box = Mailbox.make(1)
        self.b.mail_in = self.box.add()
        self.a.mail_out = Sender(self.box.segment, self.b.mail_in.slot)
        self.kick = Kick()
        self.a.kick_out = os.dup(self.kick.setter) if with_kick else -1
        self.sent, self.got, self.number = [], [], 0
        self.awake = False
        self.roads = set()
        self.at_sender = self.at_receiver = ()  # what the other side does at the next fences
        self.box._fence = lambda: self.during("at_receiver")
        self.a.mail_out._fence = lambda: self.during("at_sender")

    def during(self, name):
        actions, _ = getattr(self, name), setattr(self, name, ())
        for action, *rest in actions:
            getattr(self, action)(*rest)

    # -- the sender

    def send(self, size, *, post=False, first=(), then=()):
        self.at_sender, self.before_sending = then, first
        self.number += 1
        number = self.number
        self.sent.append((number, size))
        parts = encode(pattern(size), call_id=number)
        if post or size > MOST:
            self.a.post([b"".join(parts)])
        else:
            self.a.send(Watched(parts, lambda: self.during("before_sending")), interrupted=self.make_room)
        self.at_sender = ()

    def make_room(self):
        """The receiver reads while the sender waits for room."""
        self.read_socket()
        return False

    def flush(self):
        self.a.flush(block=False)

    # -- the receiver

    def take(self, frames):
        for frame in frames:
            if frame.kind == Kind.BEAT:
                continue  # a wake-up
            self.got.append((frame.call_id, len(frame.body)))
            assert contents(frame) == (pattern(len(frame.body)),)

    def read_socket(self):
        frames = []
        assert self.b.read(frames)
        self.take(frames)

    def read_mail(self):
        frames = []
        self.kick.clear()
        self.box.look()
        self.b.read_mail(frames)
        self.roads |= {"mail"} if frames else set()
        self.take(frames)

    def wake(self):
        self.awake = True
        self.box.words[0] = 1

    def sleep(self, then=()):
        """Try to sleep; it must not succeed while there is a message that nothing will wake it for."""
        self.at_receiver = then
        self.awake = False
        if self.box.sleep():
            self.wake()
            self.read_mail()
        self.at_receiver = ()

    # -- what must hold

    def check(self):
        assert self.got == self.sent[: len(self.got)], "not in the order in which they were sent"
        if not self.awake and len(self.got) < len(self.sent) and not self.a._outbox:
            poller = select.poll()
            poller.register(self.b.fd, select.POLLIN)
            poller.register(self.kick.fileno(), select.POLLIN)
            assert poller.poll(0), "it sleeps, and nothing wakes it"

    def finish(self):
        for _ in range(1000):
            if len(self.got) == len(self.sent):
                break
            self.flush()
            self.read_socket()
            self.read_mail()
        assert self.got == self.sent

    def close(self):
        self.a.close()
        self.b.close()
        self.kick.close()


SIZES = st.sampled_from([0, 1, 7, 80, 1000, MOST - 28, MOST - 27, RING, 3 * RING]) | st.integers(0, MOST)
PLAIN = (
    st.tuples(st.just("send"), SIZES)
    | st.tuples(st.just("send"), st.integers(0, 200))
    | st.tuples(st.sampled_from(["read_socket", "read_mail", "wake", "wake", "flush"]))
)
RECEIVER = st.lists(st.tuples(st.sampled_from(["read_mail", "read_socket", "wake", "sleep"])), max_size=3)
SENDER = st.lists(st.tuples(st.just("send"), st.integers(0, 300)), max_size=3)
STEPS = st.lists(PLAIN | st.tuples(st.just("post"), SIZES), max_size=60) | st.lists(
    PLAIN
    | st.tuples(st.just("send during"), SIZES, RECEIVER, RECEIVER)
    | st.tuples(st.just("sleep during"), SENDER),
    max_size=60,
)


@pytest.mark.parametrize(("weak", "with_kick"), [(False, True), (True, True), (False, False)])
@settings(max_examples=120, deadline=None)
@given(looking=st.booleans(), steps=STEPS)
def test_every_interleaving(weak, with_kick, looking, steps):
    world = World(with_kick)
    before, module._WEAK = module._WEAK, weak
    try:
        if looking:
            world.wake()
            world.send(0)
            world.read_socket()
            world.read_mail()
        for kind, *rest in steps:
            if kind == "send during":
                world.send(rest[0], first=rest[1], then=rest[2])
            elif kind == "sleep during":
                world.sleep(then=rest[0])
            elif kind == "post":
                world.send(rest[0], post=True)
            else:
                getattr(world, kind)(*rest)
            world.check()
        world.finish()
    finally:
        module._WEAK = before
        world.close()


@pytest.fixture
def world():
    world = World()
    yield world
    world.close()


@pytest.mark.parametrize("looks", [True, False])
def test_the_road_through_memory(world, looks):
    world.send(10)  # by the socket: nobody knows yet what has been read of it
    if looks:
        world.wake()
    world.read_socket()
    for _ in range(3 * RING // 100):
        world.send(60)
        assert not world.got or world.got[-1][0] == world.number - 1
        world.read_mail()
    assert world.roads == {"mail"}
    assert world.got == world.sent


def test_a_full_slot_is_no_obstacle(world):
    world.wake()
    world.send(0)
    world.read_socket()
    for _ in range(RING // 1000 + 20):
        world.send(1000, post=True)
    world.finish()


def test_what_was_left_comes_before_the_end(world):
    world.wake()
    world.send(5)
    world.read_socket()
    world.send(6)
    world.a.close()
    frames = []
    assert not world.b.read(frames)
    assert [len(frame.body) for frame in frames] == [6]


def test_who_has_closed_leaves_nothing(world):
    world.wake()
    world.send(5)
    world.read_socket()
    world.a.shut()
    with pytest.raises(LinkClosed):
        world.a.send(encode(b"x"))


def test_a_wake_up_for_a_receiver_that_has_gone_is_no_error(world):
    world.wake()
    world.send(5)
    world.read_socket()
    world.at_sender = [("gone",)]
    world.gone = lambda: (world.box.sleep(), world.b.close())
    with contextlib.suppress(LinkClosed):
        world.a.send(encode(b"x"))


def test_what_was_posted_goes_first(world):
    world.wake()
    world.send(5)
    world.read_socket()
    world.a._outbox.append(b"".join(encode(pattern(3), call_id=2)))  # another thread is just writing it
    world.sent.append((2, 3))
    world.number = 2
    world.send(4)
    world.finish()


@pytest.mark.parametrize("nonsense", ["length", "head"])
def test_nonsense_ends_the_link(world, nonsense):
    world.wake()
    world.send(5)
    world.read_socket()
    world.send(6)
    if nonsense == "length":
        world.b.mail_in._lengths[0] = RING * 2
    else:
        world.box.words[world.b.mail_in._head_at] = 1 << 40
        world.b.mail_in._lengths[(8 + 28 + 6 + 15 & -8) >> 3] = 0
    with pytest.raises(OSError, match="makes no sense"):
        world.b.read_mail([])


@pytest.mark.parametrize("cut", [5, 28, 30])
def test_a_part_of_a_frame_ends_the_link_and_nothing_comes_twice(world, cut):
    world.wake()
    world.send(5)
    world.read_socket()
    whole = b"".join(encode(pattern(6), call_id=8))
    for message in (whole, whole[:cut]):
        assert world.a.mail_out.put([message], world.a._sent) == module.LEFT
    frames = []
    with pytest.raises(OSError, match="part of a frame"):
        world.b.read_mail(frames)
    world.b.read_mail(frames)
    assert [contents(frame) for frame in frames] == [(pattern(6),)]


def test_slots_are_had_once():
    box = Mailbox.make(1)
    receivers = [box.add() for _ in range(SLOTS)]
    assert sorted(each.slot for each in receivers) == list(range(SLOTS))
    assert box.add() is None
    box.used.discard(5)
    again = box.add()
    assert again.slot == 5
    last = Sender(box.segment, SLOTS - 1)
    box.words[0] = 1
    box.look()
    receivers[-1].seen(3)
    assert last.put([b"x" * MOST], 3) == module.LEFT
    assert box.stirred()
    assert [bytes(message) for message in receivers[-1].open()] == [b"x" * MOST]
    assert box.segment.size == PAGE + SLOTS * RING


def test_a_slot_that_is_used_again_goes_on_where_it_was():
    box = Mailbox.make(1)
    box.words[0] = 1
    for turn in range(3):
        receiver = box.add()
        sender = Sender(box.segment, receiver.slot)
        assert sender.put([b"stale"], 0) == module.REFUSED  # until the socket has been read
        receiver.seen(7)
        assert sender.put([b"x", b"y" * turn], 7) == module.LEFT
        assert [bytes(message) for message in receiver.open()] == [b"x" + b"y" * turn]
        receiver.done()
        box.used.discard(receiver.slot)
