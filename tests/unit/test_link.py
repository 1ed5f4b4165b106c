"""Links: framing under any cutting of the byte stream, frames there is no memory for, and the end."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import resource
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.serialization import codec
from shmdist.transport import frame_assembler
from shmdist.transport import frame_reader as module
from shmdist.transport.link import Link, LinkClosed, Part
from shmdist.transport.messages import BROKEN, HAS_REFS, Frame
from tests.unit.test_channels import Threads

CALL, RESULT = 1, 2
LACKING = 97  # bytes; in some tests there is no memory of this size
_HEADER = struct.Struct("<BBHIIQQ")  # as documented in messages, written down once more


def encode(body: bytes, *buffers: bytes, kind: int = CALL, flags: int = 0, call_id: int = 0) -> list[Part]:
    header = _HEADER.pack(kind, flags, 0, 7, len(buffers), call_id, len(body))
    table = b"".join(struct.pack("<Q", len(buffer)) for buffer in buffers)
    return [header, table, body, *buffers]


def pattern(size: int, seed: int = 1) -> bytes:
    return bytes((seed + i * 7) % 251 for i in range(min(size, 251))) * (size // 251) + bytes(size % 251)


def contents(frame: Frame) -> tuple[bytes, ...]:
    return (bytes(frame.body), *(bytes(buffer) for buffer in frame.buffers))


def ready(fd: int, seconds: float = 5.0) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def collect(link: Link, count: int) -> list[Frame]:
    """Read until `count` frames are there."""
    frames: list[Frame] = []
    while len(frames) < count:
        assert ready(link.fd)
        assert link.read(frames)
    assert len(frames) == count
    assert not ready(link.fd, 0) or link.read(frames)
    assert len(frames) == count
    return frames


def pump(sender: Link, receiver: Link, *messages: list[Part]) -> list[Frame]:
    """Send and receive on one thread."""
    for message in messages:
        sender.post(message)
    frames: list[Frame] = []
    while len(frames) < len(messages):
        sender.flush(block=False)
        assert receiver.read(frames)
    return frames


def read_to_end(link: Link) -> list[Frame]:
    frames: list[Frame] = []
    while link.read(frames):
        assert ready(link.fd)
    return frames


def fill(link: Link) -> int:
    """Fill the socket with empty frames; returns how many."""
    [frame] = [b"".join(encode(b"", call_id=9))]
    count = 0
    while True:
        try:
            assert link._sock.send(frame) == len(frame)
        except BlockingIOError:
            return count
        count += 1


Make = Callable[[], tuple[Link, Link]]


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    for thread in threads.all:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def pair(threads: Threads) -> Iterator[tuple[Link, Link]]:
    a, b = socket.socketpair()
    for sock in (a, b):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    links = Link(Connection(a.detach()), 2), Link(Connection(b.detach()), 1)
    yield links
    for link in links:
        link.close()


@pytest.fixture
def raw(pair: tuple[Link, Link]) -> tuple[Link, socket.socket]:
    """A link, and the bare socket of its other end."""
    return pair[1], pair[0]._sock


def tcp_pair() -> tuple[Link, Link]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        b, _ = server.accept()
    return Link(Connection(a.detach()), 2), Link(Connection(b.detach()), 1)


SIZES = [
    0,
    1,
    module._DIRECT - 1,
    module._DIRECT,
    module._DIRECT + 1,
    module._BUFFER_BYTES - _HEADER.size,
    module._BUFFER_BYTES,
    module._BUFFER_BYTES + 1,
    1 << 20,
]


class TestFraming:
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes_of_bodies(self, pair: tuple[Link, Link], size: int) -> None:
        a, b = pair
        body = pattern(size)
        frames = pump(a, b, encode(body, call_id=1), encode(b"next"), encode(body, call_id=3))
        assert [contents(frame) for frame in frames] == [(body,), (b"next",), (body,)]
        assert [frame.call_id for frame in frames] == [1, 0, 3]

    @pytest.mark.parametrize("size", SIZES)
    def test_sizes_of_buffers(self, pair: tuple[Link, Link], size: int) -> None:
        a, b = pair
        buffers = pattern(size), b"", pattern(size, 5), b"z"
        frames = pump(a, b, encode(b"", *buffers), encode(b"body", *buffers), encode(b"next"))
        assert [contents(frame) for frame in frames] == [(b"", *buffers), (b"body", *buffers), (b"next",)]

    def test_header(self, pair: tuple[Link, Link]) -> None:
        a, b = pair
        a.send([_HEADER.pack(255, 0x7E, 0, 2**32 - 1, 0, 2**64 - 1, 0)])
        [frame] = collect(b, 1)
        assert (frame.kind, frame.flags, frame.lane, frame.call_id) == (255, 0x7E, 2**32 - 1, 2**64 - 1)
        assert frame.link is b
        assert (frame.body, frame.buffers) == (b"", [])

    def test_many_small_ones_in_order(self, pair: tuple[Link, Link]) -> None:
        a, b = pair
        frames = pump(a, b, *(encode(b"%d" % i, call_id=i) for i in range(3000)))
        assert [(frame.call_id, frame.body) for frame in frames] == [(i, b"%d" % i) for i in range(3000)]

    def test_table_longer_than_the_read_buffer(self, pair: tuple[Link, Link]) -> None:
        a, b = pair
        count = module._BUFFER_BYTES // 8 + 1000
        buffers = [b"%d" % i if i % 1000 == 0 else b"" for i in range(count)]
        first, second = pump(a, b, encode(b"body", *buffers), encode(b"next"))
        assert contents(first) == (b"body", *buffers)
        assert second.body == b"next"

    @pytest.mark.parametrize("size", [1, module._BUFFER_BYTES + 1])
    def test_buffers_are_the_frames_own_and_writable(self, pair: tuple[Link, Link], size: int) -> None:
        a, b = pair
        first, second = pump(a, b, encode(b"b", b"x" * size), encode(b"b", b"y" * size))
        for frame in (first, second):
            [buffer] = frame.buffers
            with memoryview(buffer) as view:
                assert (view.readonly, view.nbytes, view.format) == (False, size, "B")
                assert view.obj is not b._buffer
            buffer[0] = 0
        assert contents(second) == (b"b", b"\0" + b"y" * (size - 1))

    def test_large_bodies_are_received_in_place(self, raw: tuple[Link, socket.socket]) -> None:
        link, sock = raw
        body = pattern(1 << 20)
        message = b"".join(encode(body))
        frames: list[Frame] = []
        sent = sock.send(message[:100])
        assert link.read(frames)
        incoming = link._incoming
        assert incoming is not None
        target = incoming.target
        while sent < len(message):
            sent += sock.send(message[sent:])
            assert link.read(frames)
        assert frames[0].body is target.obj or memoryview(frames[0].body).obj is target.obj
        assert contents(frames[0]) == (body,)

    def test_byte_by_byte(self, raw: tuple[Link, socket.socket]) -> None:
        link, sock = raw
        sizes = [(3,), (0,), (0, 0), (40, 5, 0, 2)]
        expected = [tuple(pattern(size) for size in frame) for frame in sizes]
        frames: list[Frame] = []
        for message in expected:
            data = b"".join(encode(*message))
            for i in range(len(data)):
                before = len(frames)
                assert sock.send(data[i : i + 1]) == 1
                assert link.read(frames)
                assert len(frames) == before + (i == len(data) - 1)
        assert [contents(frame) for frame in frames] == expected

    def test_one_link_gives_the_others_their_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = tcp_pair()
        monkeypatch.setattr(module, "_MAX_READ_BYTES", 1 << 10)
        try:
            for i in range(4):
                a.send(encode(pattern(module._BUFFER_BYTES), call_id=i))
                frames: list[Frame] = []
                while len(frames) < 1:
                    assert ready(b.fd)
                    before = b._end + (b._incoming.offset if b._incoming else 0)
                    assert b.read(frames)
                    after = b._end + (b._incoming.offset if b._incoming else module._BUFFER_BYTES)
                    assert after - before <= module._BUFFER_BYTES
        finally:
            a.close()
            b.close()

    def test_tcp(self) -> None:
        a, b = tcp_pair()
        try:
            assert a._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            [first, _second] = pump(a, b, encode(pattern(1 << 20), b"x"), encode(b"next"))
            assert contents(first) == (pattern(1 << 20), b"x")
            # A reset is the end, as an orderly end is.
            a._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            a._sock.detach()
            a.connection.close()
            assert ready(b.fd)
            assert not b.read([])
        finally:
            b.close()


FRAMES = st.lists(
    st.tuples(
        st.sampled_from([0, HAS_REFS, 0x10]),
        st.lists(st.sampled_from([0, 1, 20, 63, 64, 65, LACKING, 227, 256, 400]), min_size=1, max_size=4),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    frames=FRAMES,
    table=st.sampled_from([0, 31, 32, 33, 70]),
    cuts=st.lists(st.integers(0, 4000), max_size=20),
)
def test_any_cutting_gives_the_same_frames(
    frames: list[tuple[int, list[int]]], table: int, cuts: list[int]
) -> None:
    """Read buffer and thresholds are made small, and memory of one size cannot be had the first time."""
    found = False

    def allocate(nbytes: int) -> bytearray:
        nonlocal found
        if nbytes == LACKING and not found:
            raise MemoryError
        found = False
        return bytearray(nbytes)

    def read(link: Link, received: list[Frame]) -> bool:
        nonlocal found
        while True:
            try:
                return link.read(received)
            except MemoryError:  # references must not get lost
                found = True

    messages = [(flags, [pattern(size) for size in sizes]) for flags, sizes in frames]
    messages.append((0, [b"body", *[b"x"] * table]))
    data = b"".join(
        b"".join(encode(*parts, flags=flags, call_id=i)) for i, (flags, parts) in enumerate(messages)
    )
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    small = mock.patch.multiple(module, _BUFFER_BYTES=256, _DIRECT=64)
    with small, mock.patch.multiple(frame_assembler, allocate=allocate):
        a, b = socket.socketpair()
        link = Link(Connection(b.detach()), 1)
        received: list[Frame] = []
        with a:
            for begin, end in itertools.pairwise(places):
                a.sendall(data[begin:end])
                assert read(link, received)
                while ready(link.fd, 0):
                    assert read(link, received)
        assert not link.read(received)
        link.close()
    assert [frame.call_id for frame in received] == list(range(len(messages)))
    for frame, (flags, parts) in zip(received, messages, strict=True):
        refs = bool(flags & HAS_REFS) and len(parts) > 1
        lacking = [len(part) == LACKING and not (refs and at == 1) for at, part in enumerate(parts)]
        whole = (frame.flags, contents(frame)) == (flags, tuple(parts))
        if lacking == [True] and whole:
            continue  # it was in the read buffer, and needed no memory of its own
        if not any(lacking):
            assert whole
        elif refs:
            assert (frame.flags, contents(frame)) == (flags | BROKEN, (b"", parts[1]))
        else:
            assert (frame.flags, contents(frame)) == ((flags | BROKEN) & ~HAS_REFS, (b"",))


class TestNoMemory:
    @pytest.fixture
    def lacking(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        lacks: dict[int, type[Exception]] = {}

        def allocate(nbytes: int) -> bytearray:
            if nbytes in lacks:
                raise lacks[nbytes]
            return bytearray(nbytes)

        def lack(size: int, error: type[Exception] = MemoryError) -> None:
            lacks.clear()
            lacks[size] = error

        monkeypatch.setattr(frame_assembler, "allocate", allocate)
        return lack

    @pytest.mark.parametrize("size", [module._DIRECT, module._BUFFER_BYTES * 2 + 5])
    @pytest.mark.parametrize("where", [0, 1, 2])
    def test_the_frame_is_broken_and_the_next_arrives(
        self, pair: tuple[Link, Link], lacking: Callable[[int], None], size: int, where: int
    ) -> None:
        lacking(size)
        parts = [pattern(10_000), pattern(20_000), pattern(300_000)]
        parts[where] = pattern(size)
        first, second = pump(*pair, encode(*parts, flags=0x10, call_id=5), encode(b"next", pattern(70_000)))
        assert (first.kind, first.flags, first.call_id, contents(first)) == (CALL, BROKEN | 0x10, 5, (b"",))
        assert contents(second) == (b"next", pattern(70_000))
        assert not second.flags

    def test_references_are_kept(self, pair: tuple[Link, Link], lacking: Callable[[int], None]) -> None:
        lacking(100_000)
        for parts in ([pattern(100_000), b"refs"], [b"", b"refs", pattern(100_000), b"more"]):
            [frame] = pump(*pair, encode(*parts, flags=HAS_REFS))
            assert (frame.flags, contents(frame)) == (HAS_REFS | BROKEN, (b"", b"refs"))
        with pytest.raises(MemoryError):  # it is read again
            pump(*pair, encode(b"", pattern(100_000), flags=HAS_REFS))
        lacking(-1)
        frames: list[Frame] = []
        while not frames:
            pair[0].flush(block=False)
            assert pair[1].read(frames)
        assert contents(frames[0]) == (b"", pattern(100_000))

    @pytest.mark.parametrize("error", [MemoryError, ValueError, OverflowError])
    def test_errors_of_allocation(
        self, pair: tuple[Link, Link], lacking: Any, error: type[Exception]
    ) -> None:
        lacking(300_000, error)
        assert pump(*pair, encode(pattern(300_000)))[0].flags == BROKEN

    def test_two_to_the_62(self, raw: tuple[Link, socket.socket]) -> None:
        """The true allocation fails; what comes is read past for as long as it comes."""
        link, sock = raw
        sock.sendall(b"".join(encode(b"first")) + _HEADER.pack(RESULT, 0, 0, 0, 0, 6, 2**62))
        frames: list[Frame] = []
        for _ in range(5):
            sock.send(bytes(50_000))
            assert link.read(frames)
        assert [frame.body for frame in frames] == [b"first"]
        assert link._incoming is not None
        assert link._incoming.broken
        assert link._incoming.offset == 250_000

    @pytest.mark.parametrize("size", [2**63, 2**64 - 1])
    @pytest.mark.parametrize("nbuf", [0, 2])
    def test_lengths_without_sense_end_the_link(
        self, raw: tuple[Link, socket.socket], size: int, nbuf: int
    ) -> None:
        link, sock = raw
        header = _HEADER.pack(RESULT, 0, 0, 0, nbuf, 6, 3 if nbuf else size)
        sock.sendall(b"".join(encode(b"first")) + header + struct.pack("<QQ", 5, size))
        frames: list[Frame] = []
        assert not link.read(frames)
        assert [frame.body for frame in frames] == [b"first"]


class TestDescriptors:
    def test_one_that_is_lost_keeps_its_place(self, pair: tuple[Link, Link]) -> None:
        a, b = pair
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        [sent, *rest] = [os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)]
        filling = []
        try:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, limits[1])
            )
            with contextlib.suppress(OSError):
                while True:
                    filling.append(os.dup(sent))
            a.send(encode(b"lost"), fd=sent)
            frames: list[Frame] = []
            while not frames:
                assert b.read(frames)
            os.close(filling.pop())
            a.send(encode(b"here"), fd=rest[0])
            while len(frames) < 2:
                assert b.read(frames)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in filling:
                os.close(fd)
        assert [frame.body for frame in frames] == [b"lost", b"here"]
        assert [b.take_fd(frames[0]), b.take_fd(frames[0])] == [-1, -1]  # asked again, after an error say
        here = b.take_fd(frames[1])
        assert os.path.sameopenfile(here, rest[0])
        for fd in (here, sent, *rest):
            os.close(fd)
        b._fds.append(-1)  # nobody has taken it
        b.close()


class TestEnd:
    def test_in_the_middle_of_a_frame(self) -> None:
        message = b"".join(encode(b"body", b"buffer", bytes(100)))
        for cut in range(len(message)):
            a, b = socket.socketpair()
            link = Link(Connection(b.detach()), 1)
            with a:
                a.sendall(b"".join(encode(b"whole")) + message[:cut])
            assert [frame.body for frame in read_to_end(link)] == [b"whole"]
            assert not link.read([])  # and it stays so
            link.close()

    def test_in_the_middle_of_a_large_body(self, raw: tuple[Link, socket.socket]) -> None:
        link, sock = raw
        message = b"".join(encode(pattern(1 << 20)))
        sock.send(message[: 1 << 15])
        sock.shutdown(socket.SHUT_RDWR)
        assert read_to_end(link) == []

    def test_what_was_whole_by_then_is_delivered(self, pair: tuple[Link, Link]) -> None:
        a, b = pair
        for i in range(10):
            a.send(encode(b"%d" % i, b"x"))
        a.close()
        assert [frame.body for frame in read_to_end(b)] == [b"%d" % i for i in range(10)]

    def test_shut_here_delivers_what_has_come(self, pair: tuple[Link, Link]) -> None:
        a, b = pair
        a.send(encode(b"come"))
        b.shut()
        assert [frame.body for frame in read_to_end(b)] == [b"come"]
        with pytest.raises(LinkClosed):
            a.send(encode(b"more"))

    def test_read_after_close(self, pair: tuple[Link, Link]) -> None:
        pair[0].send(encode(b"come"))
        pair[1].close()
        assert not pair[1].read([])

    def test_send_and_post_after_close(self, pair: tuple[Link, Link]) -> None:
        a, _ = pair
        a.close()
        a.close()
        with pytest.raises(LinkClosed):
            a.send(encode(b"x"))
        assert a.post(encode(b"x"))
        assert a.flush(block=True)

    def test_post_to_a_peer_that_is_gone(self, pair: tuple[Link, Link]) -> None:
        a, b = pair
        b.close()
        assert a.post(encode(b"x"))
        with pytest.raises(LinkClosed):
            a.send(encode(b"x"))

    def test_the_descriptor_is_closed_once(self) -> None:
        a, b = socket.socketpair()
        link = Link(Connection(b.detach()), 1)
        fd = link.fd
        link.close()
        with pytest.raises(OSError):
            os.fstat(fd)
        others = os.pipe()  # most likely with the same number
        del link
        gc.collect()
        for other in others:
            os.fstat(other)
            os.close(other)
        a.close()

    def test_abandon_leaves_the_link_to_who_shares_it(self) -> None:
        a, b = socket.socketpair()
        link = Link(Connection(b.detach()), 1)
        parent = os.dup(link.fd)
        fd = link.fd
        link.abandon()
        with pytest.raises(OSError):
            os.fstat(fd)
        os.write(parent, b"still here")
        assert a.recv(100) == b"still here"
        os.close(parent)
        a.close()
        with pytest.raises(LinkClosed):
            link.send(encode(b"x"))

    def test_waiting_at_the_gate_ends(self, pair: tuple[Link, Link], threads: Threads) -> None:
        link = pair[0]
        waiting = threading.Event()

        def wait() -> bool:
            with link.gate:
                turn = link.at_gate[1] = threading.Condition(link.gate)
                waiting.set()
                return turn.wait_for(lambda: link.closed, 5)

        done = threads.start(wait)
        waiting.wait()
        link.close()
        assert done()

    def test_repr(self, pair: tuple[Link, Link]) -> None:
        a, _ = pair
        assert repr(a) == f"<Link to process 2, open, fd {a.fd}, 0 parts posted>"
        a.close()
        assert "closed" in repr(a)


def test_an_ended_link_needs_no_collector() -> None:
    """It would keep what it has of a frame that was not whole: blocks of others, say."""
    a, b = socket.socketpair()
    link = Link(Connection(b.detach()), 1)
    whole = b"".join(bytes(part) for part in codec.frame(1, 0, 0, 7, codec.pickled(bytes(1 << 20))))
    a.setblocking(False)
    a.send(whole[: 1 << 16])
    frames: list[Frame] = []
    assert link.read(frames) and link._incoming is not None and not frames
    link.close()
    assert link._incoming is None
    there = weakref.ref(link)
    gc.disable()
    try:
        del link
        assert there() is None
    finally:
        gc.enable()
    a.close()
