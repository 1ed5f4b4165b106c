"""Two links with mailboxes: one order over both roads, nothing lost, and no sleep through a message.

Each side has a fence between two of its steps, and there the other side may do anything. So
the tests put the other side's actions there, which makes every interleaving that matters one
that a single thread can play.
"""

import contextlib
import gc
import os
import select
import socket
import sys
import weakref
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.memory.mapping import PAGE
from shmdist.transport import messages, native, ring, ring_slots
from shmdist.transport.link import Link, LinkClosed
from shmdist.transport.messages import Kind
from shmdist.transport.poller import WakeupFd
from shmdist.transport.ring import LEFT, MAX_MESSAGE_BYTES, REFUSED, SLOT_BYTES, SLOTS, Keeping
from tests.unit.test_link import contents, encode, pattern

#: The sides of a ring, in Python and, where it was compiled, in C.
MODULES = {"python": ring_slots} | ({"c": native.module} if native.module else {})
BOXES = {
    name: type("Box", (Keeping, module.RingScanner), {"receiver_type": module.RingReader})
    for name, module in MODULES.items()
}
SIDES = [(sender, receiver) for sender in MODULES for receiver in MODULES]
every_side = pytest.mark.parametrize("sides", SIDES, ids="-".join)
every_receiver = pytest.mark.parametrize("sides", [(each, each) for each in MODULES], ids="-".join)


class Watched(bytes):
    """A frame whose length is asked for when the sender in Python has seen that the receiver looks."""

    then = None

    def __len__(self):
        then, self.then = self.then, None
        if then is not None:
            then()
        return super().__len__()


class World:
    """A sender and a receiver, whose fences call what the test likes."""

    def __init__(self, sides, with_kick=True):
        self.sender, self.receiver = sides
        a, b = socket.socketpair()
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
        self.a, self.b = Link(Connection(a.detach()), 2), Link(Connection(b.detach()), 1)
        self.box = BOXES[self.receiver].make(1)
        self.b.ring_in = self.box.open_slot(self.b)
        self.a.ring_out = MODULES[self.sender].RingWriter(self.box.segment, self.b.ring_in.slot)
        self.kick = WakeupFd()
        self.a.kick_out = os.dup(self.kick.setter) if with_kick else -1
        self.sent, self.got, self.number = [], [], 0
        self.awake = False
        self.roads = set()
        self.at_sender = self.at_receiver = ()  # what the other side does at the next fences
        self.before_sending = ()
        self.wakeups = []  # links with somebody at the other end who is to be woken
        self.box.fence = lambda: self.during("at_receiver")
        self.a.ring_out.fence = self.at_fence

    def at_fence(self):
        """The sender is at a fence: before it moves the head, or after that."""
        if self.before_sending:
            self.during("before_sending")
        else:
            self.during("at_sender")

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
        frame = b"".join(encode(pattern(size), call_id=number))
        if post or size > MAX_MESSAGE_BYTES:
            self.a.post([frame])
        else:
            if self.sender == "python" and not ring_slots._WEAK:  # it has no fence before the head is moved
                frame = Watched(frame)
                frame.then = lambda: self.during("before_sending")
            self.a.send([frame], interrupted=self.make_room)
        self.at_sender = self.before_sending = ()

    def send_quietly(self, size):
        """Send, and leave the waking to :meth:`ring`."""
        self.number += 1
        self.sent.append((self.number, size))
        frame = b"".join(encode(pattern(size), call_id=self.number))
        self.a.send([frame], interrupted=self.make_room, wakeups=self.wakeups)

    def ring(self):
        while self.wakeups:
            self.wakeups.pop().wake()

    def make_room(self):
        """The receiver reads while the sender waits for room."""
        self.read_socket()
        return False

    def flush(self):
        self.a.flush(block=False)

    # -- the receiver

    def take(self, frames):
        for frame in frames:
            if frame.kind == Kind.HEARTBEAT:
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
        for receiver in self.box.take(frames):
            receiver.link.read_mail(frames)
        self.roads |= {"mail"} if frames else set()
        self.take(frames)

    def wake(self):
        self.awake = True
        self.box.mark_awake()

    def sleep(self, then=()):
        """Try to sleep; it must not succeed while there is a message that nothing will wake it for."""
        self.at_receiver = then
        self.awake = False
        if self.box.mark_asleep():
            self.wake()
            self.read_mail()
        self.at_receiver = ()

    # -- what must hold

    def check(self):
        assert self.got == self.sent[: len(self.got)], "not in the order in which they were sent"
        if not self.awake and len(self.got) < len(self.sent) and not self.a._outbox and not self.wakeups:
            poller = select.poll()
            poller.register(self.b.fd, select.POLLIN)
            poller.register(self.kick.fileno(), select.POLLIN)
            assert poller.poll(0), "it sleeps, and nothing wakes it"

    def finish(self):
        self.ring()
        self.check()
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


SIZES = st.sampled_from(
    [0, 1, 7, 80, 1000, MAX_MESSAGE_BYTES - 28, MAX_MESSAGE_BYTES - 27, SLOT_BYTES, 3 * SLOT_BYTES]
) | st.integers(0, MAX_MESSAGE_BYTES)
PLAIN = (
    st.tuples(st.just("send"), SIZES)
    | st.tuples(st.sampled_from(["send", "send_quietly"]), st.integers(0, 200))
    | st.tuples(st.sampled_from(["read_socket", "read_mail", "wake", "wake", "flush", "ring"]))
)
RECEIVER = st.lists(st.tuples(st.sampled_from(["read_mail", "read_socket", "wake", "sleep"])), max_size=3)
SENDER = st.lists(st.tuples(st.just("send"), st.integers(0, 300)), max_size=3)
STEPS = st.lists(PLAIN | st.tuples(st.just("post"), SIZES), max_size=60) | st.lists(
    PLAIN
    | st.tuples(st.just("send during"), SIZES, RECEIVER, RECEIVER)
    | st.tuples(st.just("sleep during"), SENDER),
    max_size=60,
)


@every_side
@pytest.mark.parametrize(("weak", "with_kick"), [(False, True), (True, True), (False, False)])
@settings(max_examples=60, deadline=None)
@given(looking=st.booleans(), steps=STEPS)
def test_every_interleaving(sides, weak, with_kick, looking, steps):
    world = World(sides, with_kick)
    before, ring_slots._WEAK = ring_slots._WEAK, weak
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
        ring_slots._WEAK = before
        world.close()


@pytest.fixture(params=SIDES, ids="-".join)
def world(request):
    world = World(request.param)
    yield world
    world.close()


@pytest.mark.parametrize("looks", [True, False])
def test_the_road_through_memory(world, looks):
    world.send(10)  # by the socket: nobody knows yet what has been read of it
    if looks:
        world.wake()
    world.read_socket()
    for _ in range(3 * SLOT_BYTES // 100):
        world.send(60)
        assert not world.got or world.got[-1][0] == world.number - 1
        world.read_mail()
    assert world.roads == {"mail"}
    assert world.got == world.sent


def test_a_full_slot_is_no_obstacle(world):
    world.wake()
    world.send(0)
    world.read_socket()
    for _ in range(SLOT_BYTES // 1000 + 20):
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
    world.gone = lambda: (world.box.mark_asleep(), world.b.close())
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


@pytest.mark.parametrize("nonsense", ["length", "end", "head"])
def test_nonsense_ends_the_link(world, nonsense):
    world.wake()
    world.send(5)
    world.read_socket()
    world.send(6)
    slot = world.b.ring_in.slot
    words = world.box.segment.view.cast("Q")
    ring = (PAGE + slot * SLOT_BYTES) // 8
    if nonsense == "length":
        words[ring] = SLOT_BYTES * 2
    elif nonsense == "end":
        words[ring] = 0
        words[8 + slot] = SLOT_BYTES + 8
        words[ring + 1] = MAX_MESSAGE_BYTES
    else:
        words[8 + slot] = 1 << 40
        words[ring + (8 + 28 + 6 + 15 & -8) // 8] = 0
    frames = []
    (receiver,) = world.box.take(frames)
    frames.clear()
    with pytest.raises(OSError, match="makes no sense"):
        receiver.link.read_mail(frames)
    assert frames == []


@pytest.mark.parametrize("cut", [5, 28, 30])
def test_a_part_of_a_frame_ends_the_link_and_nothing_comes_twice(world, cut):
    world.wake()
    world.send(5)
    world.read_socket()
    whole = b"".join(encode(pattern(6), call_id=8))
    for message in (whole, whole[:cut]):
        assert world.a.ring_out.put(message, world.a._sent) == LEFT
    frames = []
    (receiver,) = world.box.take(frames)
    with pytest.raises(OSError, match="part of a frame"):
        receiver.link.read_mail(frames)
    receiver.link.read_mail(frames)
    assert world.box.take(frames) == []
    assert [contents(frame) for frame in frames] == [(pattern(6),)]


def test_frames_with_buffers_and_several_at_once_keep_their_order(world):
    world.wake()
    world.send(5)
    world.read_socket()
    frames = [encode(pattern(number), call_id=number) for number in (1, 2, 3)]
    with_buffer = encode(b"body", b"x" * 100, call_id=4)
    for message in (frames[0], frames[1] + frames[2], with_buffer, frames[0]):
        assert world.a.ring_out.put(b"".join(message), world.a._sent) == LEFT
    found = []
    for receiver in world.box.take(found):
        receiver.link.read_mail(found)
    assert [frame.call_id for frame in found] == [1, 2, 3, 4, 1]
    assert all(frame.link is world.b for frame in found)
    assert contents(found[3]) == (b"body", b"x" * 100)
    assert world.box.take(found) == []


@every_receiver
@settings(max_examples=150, deadline=None)
@given(
    lies=st.lists(
        st.integers(0, 200) | st.sampled_from([0, MAX_MESSAGE_BYTES, SLOT_BYTES, (1 << 64) - 1]), max_size=40
    ),
    at=st.sampled_from([0, 0, 28, 28, 29]),
    head=st.integers(0, 600) | st.integers(0, (1 << 64) - 1),
)
def test_whatever_lies_there_is_borne(sides, lies, at, head):
    box = BOXES[sides[1]].make(1)
    receiver = box.open_slot("link")
    view = box.segment.view
    slot = PAGE + receiver.slot * SLOT_BYTES
    for number, what in enumerate(lies):
        start = slot + 8 * number + at * (number % 3 > 0)
        view[start : start + 8] = what.to_bytes(8, "little")
    view.cast("Q")[8 + receiver.slot] = head
    for _ in range(2):
        for left in box.take([]):
            try:
                left.open()
                left.done()
            except OSError:
                pass
    box.mark_asleep()


@every_receiver
def test_slots_are_had_once(sides):
    box = BOXES[sides[1]].make(1)
    links = [object() for _ in range(SLOTS)]
    receivers = [box.open_slot(link) for link in links]
    assert sorted(each.slot for each in receivers) == list(range(SLOTS))
    assert [each.link for each in receivers] == links
    assert box.open_slot(None) is None
    box.used.discard(5)
    box.remove(receivers[5])
    again = box.open_slot(None)
    assert again.slot == 5
    last = MODULES[sides[0]].RingWriter(box.segment, SLOTS - 1)
    box.mark_awake()
    assert box.take([]) == []
    assert not box.has_new()
    assert not box.spin()
    receivers[-1].seen(3)
    assert last.put(b"x" * MAX_MESSAGE_BYTES, 3) == LEFT
    assert box.has_new()
    assert box.spin()
    assert box.take([]) == [receivers[-1]]
    assert [bytes(message) for message in receivers[-1].open()] == [b"x" * MAX_MESSAGE_BYTES]
    assert box.segment.size == PAGE + SLOTS * SLOT_BYTES


@every_receiver
def test_a_slot_that_is_used_again_goes_on_where_it_was(sides):
    box = BOXES[sides[1]].make(1)
    box.mark_awake()
    for turn in range(3):
        receiver = box.open_slot(None)
        sender = MODULES[sides[0]].RingWriter(box.segment, receiver.slot)
        assert sender.put(b"stale", 0) == REFUSED  # until the socket has been read
        receiver.seen(7)
        assert sender.put(bytearray(b"x" + b"y" * turn), 7) == LEFT
        assert [bytes(message) for message in receiver.open()] == [b"x" + b"y" * turn]
        receiver.done()
        box.remove(receiver)
        box.used.discard(receiver.slot)


@pytest.mark.skipif(native.module is None, reason="it was not compiled here")
class TestInC:
    def test_it_is_what_lies_beside_it(self):
        folder = Path(ring_slots.__file__).parent
        sources = b"".join(path.read_bytes() for path in sorted(folder.glob("_native*.[ch]")))
        assert f"{zlib.crc32(sources):08x}" == native.module.SOURCE, "compile it: tools/venv does"
        assert native.module.LAYOUT == (
            SLOTS,
            SLOT_BYTES,
            MAX_MESSAGE_BYTES,
            REFUSED,
            LEFT,
            ring_slots.UNSEEN,
        )
        assert ring.RingWriter is native.module.RingWriter

    def test_bad_arguments_are_errors(self):
        c = native.module
        box = BOXES["c"].make(1)
        for slot in (-1, SLOTS):
            with pytest.raises(ValueError, match="no such slot"):
                c.RingWriter(box.segment, slot)
            with pytest.raises(ValueError, match="no such slot"):
                c.RingReader(box.segment, slot, None)
        sender, receiver = c.RingWriter(box.segment, 0), c.RingReader(box.segment, 0, None)
        for make in (
            lambda: c.RingWriter(object(), 0),
            lambda: c.RingWriter(box.segment),
            lambda: box.add(object()),
            lambda: box.take(()),
            lambda: sender.put(b""),
            lambda: sender.put("text", (1 << 64) - 1),
            lambda: sender.put(b"", "1"),
            lambda: receiver.seen(None),
            lambda: c.settle(PAGE, object),
        ):
            with pytest.raises((TypeError, AttributeError)):
                make()
        with pytest.raises(OverflowError):
            receiver.seen(-1)
        with pytest.raises(RuntimeError, match="already"):
            sender.__init__(box.segment, 0)

        class Small:
            view = memoryview(bytearray(PAGE))

        with pytest.raises(ValueError, match="too small"):
            c.RingWriter(Small, 0)

    def test_what_was_not_made_does_nothing(self):
        c = native.module
        assert c.RingWriter.__new__(c.RingWriter).put(b"x", 0) == REFUSED
        assert c.RingReader.__new__(c.RingReader).open() == []
        c.RingReader.__new__(c.RingReader).done()
        c.RingReader.__new__(c.RingReader).seen(1)
        scanner = c.RingScanner.__new__(c.RingScanner)
        for step in (
            scanner.mark_awake,
            scanner.mark_asleep,
            scanner.has_new,
            scanner.spin,
            lambda: scanner.take([]),
        ):
            with pytest.raises(RuntimeError):
                step()

    def test_a_test_that_fails_at_a_fence_is_heard(self):
        box = BOXES["c"].make(1)
        receiver = box.open_slot(None)
        receiver.seen(0)
        sender = native.module.RingWriter(box.segment, receiver.slot)
        sender.fence = box.fence = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            sender.put(b"x", 0)
        with pytest.raises(ZeroDivisionError):
            box.mark_asleep()

    def test_nothing_is_kept(self):
        def turn():
            world = World(("c", "c"))
            world.wake()
            world.send(0)
            world.read_socket()
            world.send(3)
            world.read_mail()
            world.close()
            gone = [weakref.ref(world), weakref.ref(world.b), weakref.ref(world.box.segment)]
            del world
            gc.collect()
            return [each() for each in gone]

        assert turn() == [None, None, None]

    def test_frames_are_the_same(self):
        frame = messages.Frame(kind=1, flags=2, lane=3, call_id=4, body=b"5", buffers=[6])
        assert frame.link is None
        fields = ("kind", "flags", "lane", "call_id", "body", "buffers", "link")
        assert [getattr(frame, name) for name in fields] == [1, 2, 3, 4, b"5", [6], None]
        frame.link, frame.body = frame, b""
        gone = [sys.getrefcount(frame)]
        assert gone == [3]
        with pytest.raises(AttributeError):
            frame.other = 1
        with pytest.raises(TypeError):
            messages.Frame(1)
