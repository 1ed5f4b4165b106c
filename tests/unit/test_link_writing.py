"""Links: who writes when, and that each frame stays whole whatever happens to its writer."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from shmdist.transport import link as module
from shmdist.transport.link import Link, LinkClosed, SendInterrupted
from shmdist.transport.messages import Frame, Kind
from tests.unit.test_channels import Threads
from tests.unit.test_link import collect, contents, encode, fill, pair, pattern, read_to_end, ready, threads

__all__ = ["pair", "threads"]  # fixtures

Pair = tuple[Link, Link]


class Waiting:
    """An `interrupted` for send: tells when it is asked, and answers as it is told."""

    def __init__(self, answer: bool = False) -> None:
        self.asked = threading.Event()
        self.answer = answer

    def __call__(self) -> bool:
        self.asked.set()
        return self.answer


class TestSend:
    def test_more_parts_than_a_system_call_takes(self, pair: Pair) -> None:
        a, b = pair
        buffers = [b"%d" % (i % 10) for i in range(3 * module._IOV_MAX + 1)]
        a.send(encode(b"body", *buffers))
        a.send([*encode(b"x" * 3000)[:2], *[b"", b"x"] * 3000, *[b""] * 3000])
        first, second = collect(b, 2)
        assert contents(first) == (b"body", *buffers)
        assert contents(second) == (b"x" * 3000,)

    def test_many_empty_parts_first(self, pair: Pair) -> None:
        a, b = pair
        a.send([*[b""] * 3000, *encode(b"body")])
        assert collect(b, 1)[0].body == b"body"

    def test_several_frames_at_once(self, pair: Pair) -> None:
        a, b = pair
        a.send([*encode(b"1"), *encode(b"2", b"x"), b"".join(encode(b"3"))])
        assert [frame.body for frame in collect(b, 3)] == [b"1", b"2", b"3"]

    def test_waits_until_the_other_side_reads(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        array = bytearray(pattern(1 << 20))
        waiting = Waiting()
        done = threads.start(a.send, encode(b"body", memoryview(array)), waiting)  # type: ignore[arg-type]
        assert waiting.asked.wait(5)
        [frame] = collect(b, 1)
        done()
        array[:] = bytes(len(array))  # the caller's again
        assert contents(frame) == (b"body", pattern(1 << 20))

    def test_interrupted_before_the_first_byte(self, pair: Pair) -> None:
        a, b = pair
        count = fill(a)
        with pytest.raises(SendInterrupted) as caught:
            a.send(encode(b"taken back"), lambda: True)
        assert not caught.value.begun
        assert [frame.call_id for frame in collect(b, count)] == [9] * count
        a.send(encode(b"next"))
        assert collect(b, 1)[0].body == b"next"

    def test_interrupted_behind_what_was_posted(self, pair: Pair) -> None:
        a, b = pair
        count = fill(a)
        assert not a.post(encode(pattern(100_000)))
        with pytest.raises(SendInterrupted) as caught:
            a.send(encode(b"taken back"), lambda: True)
        assert not caught.value.begun
        frames = collect_while_flushing(a, b, count + 1)
        assert contents(frames[-1]) == (pattern(100_000),)

    def test_interrupted_while_another_writes(self, pair: Pair) -> None:
        a, b = pair
        with a._write, pytest.raises(SendInterrupted) as caught:
            a.send(encode(b"taken back"), lambda: True)
        assert not caught.value.begun
        a.send(encode(b"next"))
        assert collect(b, 1)[0].body == b"next"

    def test_interrupted_in_the_middle(self, pair: Pair) -> None:
        a, b = pair
        array = bytearray(pattern(1 << 20))
        buffers = [memoryview(array), b"", b"last"]
        with pytest.raises(SendInterrupted) as caught:
            a.send(encode(b"body", *buffers), lambda: True)  # type: ignore[arg-type]
        assert caught.value.begun
        array[:] = bytes(len(array))  # the caller's again
        assert a.post(encode(b"behind it")) is False
        first, second = collect_while_flushing(a, b, 2)
        assert contents(first) == (b"body", pattern(1 << 20), b"", b"last")
        assert second.body == b"behind it"

    def test_the_next_sender_writes_the_rest_first(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        with pytest.raises(SendInterrupted):
            a.send(encode(pattern(1 << 20)), lambda: True)
        done = threads.start(a.send, encode(b"next"))
        first, second = collect(b, 2)
        done()
        assert (contents(first), second.body) == ((pattern(1 << 20),), b"next")

    def test_interrupted_without_memory_for_the_rest(
        self, pair: Pair, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A frame that has begun and cannot be kept is written to its end first."""
        a, b = pair
        monkeypatch.setattr(Link, "_keep", lambda self, rest, fd: False)
        waiting = Waiting(True)
        done = threads.start(a.send, encode(pattern(1 << 20)), waiting)
        assert waiting.asked.wait(5)
        assert contents(collect(b, 1)[0]) == (pattern(1 << 20),)
        done()

    def test_keep_is_all_or_nothing(self, pair: Pair) -> None:
        a, _ = pair
        assert not a._keep([memoryview(bytearray(1 << 30))] * (1 << 18), -1)  # more than any memory
        assert not a._outbox

    def test_close_while_a_sender_waits(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        first, second = Waiting(), Waiting()
        writing = threads.start(a.send, encode(pattern(1 << 20)), first)
        assert first.asked.wait(5)
        behind = threads.start(a.send, encode(b"behind"), second)
        assert second.asked.wait(5)
        a.close()
        for result in (writing, behind):
            with pytest.raises(LinkClosed):
                result()
        assert read_to_end(b) == []

    def test_the_other_side_goes_while_a_sender_waits(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        waiting = Waiting()
        done = threads.start(a.send, encode(pattern(1 << 20)), waiting)
        assert waiting.asked.wait(5)
        b.close()
        with pytest.raises(LinkClosed):
            done()

    def test_a_half_written_frame_is_the_end_of_the_link(
        self, pair: Pair, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else the next frame would be taken for the rest of it."""
        a, b = pair

        class Sock:
            def __init__(self, sock: socket.socket) -> None:
                self.sock = sock
                self.sendmsg = sock.sendmsg
                self.shutdown = sock.shutdown
                self.detach = sock.detach

            def send(self, data: bytes) -> int:
                self.sendmsg = self.fail  # type: ignore[assignment]
                return self.sock.send(data)

            def fail(self, parts: object) -> int:
                raise OSError("out of buffers")

        monkeypatch.setattr(a, "_sock", Sock(a._sock))
        with pytest.raises(LinkClosed, match="out of buffers"):
            a.send([b"".join(encode(pattern(1 << 20)))])
        with pytest.raises(LinkClosed):
            a.send(encode(b"next"))
        assert read_to_end(b) == []


class TestPatience:
    """A sender with patience leaves what a process does not read in the outbox."""

    def test_the_rest_is_queued_and_is_a_copy(self, pair: Pair) -> None:
        a, b = pair
        array = bytearray(pattern(1 << 20))
        assert a.send(encode(b"body", memoryview(array)), patience=0.0) is False  # type: ignore[arg-type]
        array[:] = bytes(len(array))  # the caller's again
        assert a.is_stuck
        assert a.is_writing
        [frame] = collect_while_flushing(a, b, 1)
        assert contents(frame) == (b"body", pattern(1 << 20))
        assert not a.is_stuck
        assert not a.is_writing
        assert a._queued == 0

    def test_it_is_blocked_until_all_is_written(self, pair: Pair) -> None:
        """Also when something was taken of late: what comes next would wait behind the rest."""
        a, b = pair
        assert a.send(encode(pattern(3 << 20)), patience=0.0) is False
        end = a.end
        frames: list[Frame] = []
        assert b.read(frames)
        assert a.flush(block=False) is False
        assert not frames
        assert a.is_blocked
        assert not a.has_written(end)
        frames = collect_while_flushing(a, b, 1)
        assert not a.is_blocked
        assert a.has_written(end)
        assert a.end == end

    def test_frames_stay_in_order(self, pair: Pair) -> None:
        a, b = pair
        answers = [a.send(encode(b"%d" % i, pattern(100_000, i)), patience=0.001) for i in range(9)]
        assert answers.count(False) == 1  # one flush is enough
        assert a.post(encode(b"9"))
        assert a.send(encode(b"10"), patience=0.001)
        frames = collect_while_flushing(a, b, 11)
        assert [bytes(frame.body) for frame in frames] == [b"%d" % i for i in range(11)]
        assert a._queued == 0

    def test_behind_another_writer(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        waiting = Waiting()
        done = threads.start(a.send, encode(pattern(1 << 20)), waiting)
        assert waiting.asked.wait(5)
        assert a.send(encode(b"behind"), patience=0.001) is False
        first, second = collect(b, 2)
        done()
        assert (contents(first), second.body) == ((pattern(1 << 20),), b"behind")

    def test_behind_a_flush(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        assert a.send(encode(b"1", pattern(1 << 20)), patience=0.001) is False
        flushed = threads.start(lambda: a.flush(block=True))
        for i in range(5):
            a.send(encode(b"%d" % i, pattern(50_000)), patience=0.001)
        frames = collect(b, 6)
        assert flushed()
        assert [bytes(frame.body) for frame in frames] == [b"1", b"0", b"1", b"2", b"3", b"4"]
        assert a._queued == 0

    def test_a_reader_that_goes_on_is_waited_for(self, pair: Pair, threads: Threads) -> None:
        """So what is large goes without a copy."""
        a, b = pair
        done = threads.start(lambda: a.send(encode(pattern(1 << 22)), patience=10.0))
        assert contents(collect(b, 1)[0]) == (pattern(1 << 22),)
        assert done() is True
        assert not a.is_stuck

    def test_beyond_the_bound_it_waits(
        self, pair: Pair, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = pair
        monkeypatch.setattr(module, "most_queued", lambda: 2 << 20)
        assert a.send(encode(b"1", pattern(1 << 20)), patience=0.001) is False
        with pytest.raises(SendInterrupted) as caught:
            a.send(encode(b"2", pattern(2 << 20)), lambda: True, patience=0.001)
        assert not caught.value.begun
        waiting = Waiting()
        third = encode(b"3", pattern(2 << 20))
        done = threads.start(lambda: a.send(third, waiting, patience=0.001) or a.flush(block=True))
        assert waiting.asked.wait(5)
        assert [bytes(frame.body) for frame in collect(b, 2)] == [b"1", b"3"]
        done()
        assert a._queued == 0

    def test_a_frame_that_is_too_large_alone_is_not_copied(
        self, pair: Pair, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = pair
        monkeypatch.setattr(module, "most_queued", lambda: 1 << 20)
        waiting = Waiting()
        done = threads.start(lambda: a.send(encode(pattern(4 << 20)), waiting, patience=0.001))
        assert waiting.asked.wait(5)
        assert not a._outbox
        assert contents(collect(b, 1)[0]) == (pattern(4 << 20),)
        assert done() is True

    def test_without_memory_it_waits(
        self, pair: Pair, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = pair
        monkeypatch.setattr(Link, "_keep", lambda self, rest, fd: False)
        waiting = Waiting()
        done = threads.start(lambda: a.send(encode(pattern(1 << 20)), waiting, patience=0.001))
        assert waiting.asked.wait(5)
        assert contents(collect(b, 1)[0]) == (pattern(1 << 20),)
        assert done() is True

    @pytest.mark.parametrize("end", ["close", "abandon"])
    def test_the_end_drops_what_is_queued(self, pair: Pair, end: str) -> None:
        a, _ = pair
        assert a.send(encode(pattern(1 << 20)), patience=0.001) is False
        getattr(a, end)()
        assert not a.is_writing
        assert a._queued == 0
        with pytest.raises(LinkClosed):
            a.send(encode(b"next"), patience=0.001)

    def test_a_process_that_is_gone(self, pair: Pair) -> None:
        a, b = pair
        assert a.send(encode(pattern(1 << 20)), patience=0.001) is False
        b.close()
        assert a.flush(block=True)
        assert a._queued == 0
        with pytest.raises(LinkClosed):
            a.send(encode(b"next"), patience=0.001)


class TestQueuedDescriptors:
    """A descriptor goes with its frame from the outbox as well; the one that was given stays the caller's."""

    @pytest.fixture
    def pipe(self) -> Iterator[tuple[int, int]]:
        ends = os.pipe()
        yield ends
        for fd in ends:
            os.close(fd)

    @staticmethod
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    @staticmethod
    def leads_to(fd: int, pipe: tuple[int, int]) -> bool:
        same = os.fstat(fd).st_ino == os.fstat(pipe[1]).st_ino
        os.close(fd)
        return same

    def test_it_comes_with_its_frame(self, pair: Pair, pipe: tuple[int, int]) -> None:
        a, b = pair
        if not a.is_local:
            pytest.skip("descriptors go over AF_UNIX")
        before, count = self.count(), fill(a)
        assert a.send(encode(b"1"), patience=0.0) is False
        a.send(encode(b"2"), fd=pipe[1], patience=0.0)
        a.send(encode(b"3"), patience=0.0)
        assert self.count() == before + 1
        frames = collect_while_flushing(a, b, count + 3)
        assert [bytes(frame.body) for frame in frames[count:]] == [b"1", b"2", b"3"]
        assert self.leads_to(b.take_fd(frames[count + 1]), pipe)
        assert b.take_fd(frames[0]) == -1
        assert self.count() == before
        assert a._queued == 0

    def test_a_frame_that_finds_no_room_at_all(self, pair: Pair, pipe: tuple[int, int]) -> None:
        """It is the first in the outbox, and none of it was written."""
        a, b = pair
        if not a.is_local:
            pytest.skip("descriptors go over AF_UNIX")
        before, count = self.count(), fill(a)
        assert a.send(encode(pattern(100_000)), fd=pipe[1], patience=0.0) is False
        frames = collect_while_flushing(a, b, count + 1)
        assert contents(frames[-1]) == (pattern(100_000),)
        assert self.leads_to(b.take_fd(frames[-1]), pipe)
        assert self.count() == before

    def test_a_frame_that_is_half_written(self, pair: Pair, pipe: tuple[int, int]) -> None:
        a, b = pair
        if not a.is_local:
            pytest.skip("descriptors go over AF_UNIX")
        before = self.count()
        a.send(encode(pattern(1 << 20)), fd=pipe[1], patience=0.0)
        [frame] = collect_while_flushing(a, b, 1)
        assert contents(frame) == (pattern(1 << 20),)
        assert self.leads_to(b.take_fd(frame), pipe)
        assert self.count() == before

    def test_the_end_of_the_link(self, pair: Pair, pipe: tuple[int, int]) -> None:
        a, _ = pair
        if not a.is_local:
            pytest.skip("descriptors go over AF_UNIX")
        fill(a)
        before = self.count()
        for _ in range(3):
            a.send(encode(b"queued"), fd=pipe[1], patience=0.0)
        assert self.count() == before + 3
        a.close()
        assert self.count() < before

    def test_none_can_be_had(
        self, pair: Pair, pipe: tuple[int, int], threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then the sender waits, as it does when the outbox is full."""
        a, b = pair
        if not a.is_local:
            pytest.skip("descriptors go over AF_UNIX")

        def refuse(fd: int) -> int:
            raise OSError(24, "too many open files")

        monkeypatch.setattr(module.os, "dup", refuse)
        count, waiting = fill(a), Waiting()
        done = threads.start(lambda: a.send(encode(b"waits"), waiting, pipe[1], patience=0.0))
        assert waiting.asked.wait(5)
        frames = collect(b, count + 1)
        assert bytes(frames[-1].body) == b"waits"
        assert done() is True
        assert self.leads_to(b.take_fd(frames[-1]), pipe)


def collect_while_flushing(a: Link, b: Link, count: int) -> list[Frame]:
    frames: list[Frame] = []
    while len(frames) < count:
        a.flush(block=False)
        assert b.read(frames)
    return frames


class TestPost:
    def test_never_blocks(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        bodies = [pattern(50_000, i) for i in range(20)]
        answers = [a.post(encode(body)) for body in bodies]
        # Asked for a flush exactly once: one is enough.
        assert answers.count(False) == 1
        flushed = threads.start(lambda: a.flush(block=True))
        frames = collect(b, len(bodies))
        assert flushed()
        assert [bytes(frame.body) for frame in frames] == bodies
        assert not a._outbox

    def test_asks_again_when_the_flush_has_begun(self, pair: Pair) -> None:
        a, b = pair
        for _ in range(2):
            while a.post(encode(pattern(50_000))):
                pass
            assert a.post(encode(b"asked for already"))
            before = len(a._outbox)
            with a._write:
                assert not a.flush(block=False)
            assert len(a._outbox) == before
            while a._outbox:
                b.read([])
                a.flush(block=False)
            assert a.flush(block=True)
        assert a._asked is False

    def test_copies(self, pair: Pair) -> None:
        a, b = pair
        count = fill(a)
        array = bytearray(b"old")
        assert not a.post([*encode(b"", b"123")[:-1], memoryview(array)])
        array[:] = b"new"
        assert contents(collect_while_flushing(a, b, count + 1)[-1]) == (b"", b"old")

    def test_while_another_writes(self, pair: Pair) -> None:
        """The writer may give up, so the poster is told to have it flushed; and told once."""
        a, b = pair
        with a._write:
            assert a.post(encode(b"1")) is False
            assert a.post(encode(b"2")) is True
        assert not ready(b.fd, 0)
        assert a.flush(block=True)
        assert [frame.body for frame in collect(b, 2)] == [b"1", b"2"]

    def test_what_is_posted_while_a_sender_gives_up_is_not_lost(self, pair: Pair, threads: Threads) -> None:
        a, b = pair
        count = fill(a)
        waiting = Waiting()
        sending = threads.start(a.send, encode(b"taken back"), waiting)
        assert waiting.asked.wait(5)
        assert a.post(encode(b"posted")) is False
        flushing = threads.start(lambda: a.flush(block=True))
        waiting.answer = True
        with pytest.raises(SendInterrupted):
            sending()
        frames = collect(b, count + 1)
        assert flushing()
        assert frames[-1].body == b"posted"

    def test_a_sender_writes_what_was_posted_before_it_and_meanwhile(
        self, pair: Pair, threads: Threads
    ) -> None:
        a, b = pair
        count = fill(a)
        assert not a.post(encode(b"before"))
        waiting = Waiting()
        sending = threads.start(a.send, encode(b"sent"), waiting)
        assert waiting.asked.wait(5)
        a.post(encode(b"meanwhile"))
        frames = collect(b, count + 3)
        sending()
        order = [frame.body for frame in frames[count:]]
        assert order[0] == b"before"
        assert sorted(order) == [b"before", b"meanwhile", b"sent"]


class TestWake:
    def test_nobody_who_writes_is_waited_for(self, pair: Pair) -> None:
        a, _b = pair
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        a.set_wakeup_fd(os.dup(bell), True)
        assert a.supports_group_wakeup
        with a._write:
            a.wake()
        assert os.eventfd_read(bell) == 1
        a.close()
        a.wake()
        assert not ready(bell, 0)
        os.close(bell)

    def test_without_a_descriptor_it_is_a_frame(self, pair: Pair) -> None:
        a, b = pair
        a.wake()
        [frame] = collect(b, 1)
        assert frame.kind == Kind.HEARTBEAT
        with a._write:
            a.wake()
        assert not ready(b.fd, 0)
        a.send(encode(b"body"))
        assert [frame.kind for frame in collect(b, 2)] == [Kind.HEARTBEAT, 1]
        a.shut()
        a.wake()
        assert not a.is_writing

    def test_a_descriptor_too_many_is_closed(self, pair: Pair) -> None:
        a, b = pair
        fds = [os.eventfd(0), os.eventfd(0)]
        for fd in fds:
            a.set_wakeup_fd(fd, False)
        assert a.kick_out == fds[0]
        with pytest.raises(OSError):
            os.fstat(fds[1])
        b.shut()
        b.set_wakeup_fd(late := os.eventfd(0), False)
        with pytest.raises(OSError):
            os.fstat(late)


def test_many_writers(pair: Pair, threads: Threads) -> None:
    """Frames of eight threads arrive whole, and those of one in its order."""
    a, b = pair
    writers, each = 8, 30
    start = threading.Barrier(writers)

    def write(number: int) -> None:
        sizes = random.Random(number)
        start.wait()
        for i in range(each):
            body = b"%d %d" % (number, i)
            parts = encode(body, pattern(sizes.choice([0, 5, 3000, 70_000]), i), call_id=number)
            way = sizes.random()
            if way < 0.4:
                a.send(parts)
            elif way < 0.7:
                if not a.send(parts, patience=0.0001):
                    a.flush(block=True)
            elif not a.post(parts):
                a.flush(block=True)

    done = [threads.start(write, number) for number in range(writers)]
    frames = collect(b, writers * each)
    for result in done:
        result()
    for number in range(writers):
        mine = [frame for frame in frames if frame.call_id == number]
        assert [bytes(frame.body) for frame in mine] == [b"%d %d" % (number, i) for i in range(each)]
        sizes = random.Random(number)
        for i, frame in enumerate(mine):
            assert bytes(frame.buffers[0]) == pattern(sizes.choice([0, 5, 3000, 70_000]), i)
            sizes.random()
