"""Copies of values: where their bytes are received, and who is asked for what."""

import socket
from multiprocessing.connection import Connection

import pytest

from shmdist.runtime import host_copy_receiver
from shmdist.runtime.host_copies import HostCopySender
from shmdist.runtime.host_copy_receiver import GONE, HERE, HOST_COPY
from shmdist.runtime.node import Node
from shmdist.serialization import codec
from shmdist.serialization.arrays import LINE
from shmdist.transport.link import Link
from shmdist.transport.messages import BROKEN, TOKEN, BlockRef, OutgoingFrames, PeerInfo

NBYTES = LINE + 5


@pytest.fixture
def links():
    near, far = socket.socketpair()
    made = [Link(Connection(sock.detach()), pid) for sock, pid in ((near, 2), (far, 1))]
    yield made
    for link in made:
        link.close()


class Rooms:
    """Has room for one copy."""

    def __init__(self):
        self.memory = bytearray(NBYTES)

    def room(self, number, size, sender):
        if (number, size, sender) != (7, NBYTES, 1):
            raise MemoryError
        return self.memory


class TestReceiving:
    def frames(self, links, number):
        near, far = links
        payload = codec.pickled(("here", number))
        payload.buffers.append(b"x" * NBYTES)
        near.post([*codec.frame(HOST_COPY, 0, 0, number, payload), *codec.frame(HOST_COPY, 0, 0, 99, None)])
        frames = []
        while len(frames) < 2:
            near.flush(block=False)
            far.read(frames)
        return frames

    def test_into_the_room_that_was_asked_for(self, links):
        rooms = links[1].sharing = Rooms()
        here, other = self.frames(links, 7)
        assert rooms.memory == b"x" * NBYTES
        assert here.buffers[0] is rooms.memory
        assert other.call_id == 99

    @pytest.mark.parametrize("sharing", [Rooms(), None])
    def test_without_room_the_link_goes_on(self, links, sharing):
        links[1].sharing = sharing
        here, other = self.frames(links, 8)
        assert here.flags & BROKEN and here.call_id == 8
        assert other.call_id == 99


class Asked(HostCopySender):
    """Notes what is asked, and answers as it is told."""

    def __init__(self, node):
        super().__init__(node.sharing, node.requests, node.counts)
        self.node = node
        self.log, self.answers = [], {}

    def _ask(self, copy, pid, what, seconds):
        copy.asked.add(pid)
        self.log.append((pid, what[0], *what[2:3]))
        return self.answers.get((pid, what[0]), HERE)


class Sends:
    """A link that takes everything."""

    is_local = False

    def __init__(self, pid):
        self.pid = pid
        self.sent = self.posted = 0

    def send(self, parts, interrupted=None, fd=-1, wakeups=None, patience=None):
        self.sent += sum(map(len, parts))
        return True

    def post(self, parts):
        self.posted += 1
        return True


@pytest.fixture
def copies():
    """Of process 1; 2, 3, 4 are on one other host, 5 is on a third, and 6 and 7 may not be connected."""
    node = Node(1)
    hosts = {1: "a", 2: "b", 3: "b", 4: "b", 5: "c", 6: "d", 7: "d"}
    for pid, host in hosts.items():
        links = frozenset() if host == "d" else None
        node.peers.members[pid] = PeerInfo(pid, host, host, 0, (), links)
        node.peers.links[pid] = Sends(pid)
    yield Asked(node)
    node.peers.links.clear()
    node.reactor.close()


def payload_of(nbytes=NBYTES):
    payload = codec.Payload()
    payload.parts.append(b"body")
    payload.buffers.append(memoryview(bytes(nbytes)))
    payload.spread = {}
    return payload


def placed(copies, payload, pid):
    """Return what stands for the buffer, and note what was asked and sent."""
    parts = OutgoingFrames()
    ([buffer], in_block) = copies.place(payload, 4, pid, parts)
    assert not in_block
    assert bool(parts.kept) == (type(buffer) is BlockRef)
    return buffer


class TestSending:
    def test_one_gets_the_bytes_and_the_others_take_them(self, copies):
        payload = payload_of()
        tokens = [placed(copies, payload, pid) for pid in (2, 3, 4, 3)]
        assert [type(token) for token in tokens] == [BlockRef] * 4 and len(set(tokens)) == 1
        number, sender, _, offset, nbytes, _ = TOKEN.unpack(tokens[0])
        assert (sender, offset, nbytes) == (1, 0, NBYTES)
        assert copies.log == [(2, "room", NBYTES), (3, "take", 2), (4, "take", 2)]
        sent = [copies.node.peers.links[pid].sent for pid in (2, 3, 4)]
        assert sent[0] > NBYTES and sent[1:] == [0, 0]
        assert payload.spread[0,].number == number

    @pytest.mark.parametrize("pid", [5, 6, 7])
    def test_who_is_alone_is_sent_the_bytes(self, copies, pid):
        assert placed(copies, payload_of(), pid) == bytes(NBYTES)
        assert copies.log == []

    def test_small_ones_and_those_for_one_call_are_sent(self, copies):
        assert placed(copies, payload_of(LINE - 1), 2) == bytes(LINE - 1)
        payload = payload_of()
        payload.spread = None
        assert placed(copies, payload, 2) == bytes(NBYTES)
        assert copies.log == []

    def test_without_room_it_is_left_alone(self, copies):
        copies.answers = {(2, "room"): host_copy_receiver.APART, (3, "room"): None}
        for _ in range(2):
            assert placed(copies, payload_of(), 2) == bytes(NBYTES)
            assert placed(copies, payload_of(), 3) == bytes(NBYTES)
        assert copies.log == [(2, "room", NBYTES), (3, "room", NBYTES)]

    def test_the_next_one_lends_when_the_first_is_gone(self, copies):
        payload = payload_of()
        placed(copies, payload, 2)
        copies.answers = {(3, "take"): GONE}
        assert type(placed(copies, payload, 3)) is BlockRef
        assert type(placed(copies, payload, 4)) is BlockRef
        assert copies.log[1:] == [(3, "take", 2), (3, "room", NBYTES), (4, "take", 3)]

    def test_one_that_does_not_answer_is_sent_the_bytes(self, copies):
        payload = payload_of()
        placed(copies, payload, 2)
        copies.answers = {(3, "take"): None}
        assert placed(copies, payload, 3) == bytes(NBYTES)
        assert type(placed(copies, payload, 4)) is BlockRef
        assert copies.log[1:] == [(3, "take", 2), (4, "take", 2)]

    def test_it_is_withdrawn_with_its_payload(self, copies):
        payload = payload_of()
        parts = OutgoingFrames()
        copies.place(payload, 4, 2, parts)
        payload.spread = {}
        assert not copies.node.counts.deferred_jobs, "a frame waits to be written"
        del parts
        [run_soon] = copies.node.counts.deferred_jobs
        run_soon()
        assert [copies.node.peers.links[pid].posted for pid in (2, 3)] == [1, 0]
