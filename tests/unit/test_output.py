"""What workers print: lines cut over reads, kept for the error that tells of a death, and shown."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.runtime import output as module
from shmdist.runtime.output import Outputs
from tests.unit.test_channels import Threads


class Worker:
    """The writing ends of a worker's pipes."""

    def __init__(self, outputs: Outputs, pid: int = 2, rest: bytes = b"") -> None:
        self.outputs, self.pid = outputs, pid
        self.fd, self._out = os.pipe()
        self.error_fd, self._err = os.pipe()
        outputs.add(self.fd, pid, error=False, rest=rest)
        outputs.add(self.error_fd, pid, error=True)

    def print(self, data: bytes) -> None:
        os.write(self._out, data)

    def error(self, data: bytes) -> None:
        os.write(self._err, data)

    def end(self) -> None:
        for fd in (self._out, self._err):
            with suppress(OSError):
                os.close(fd)


@pytest.fixture
def outputs() -> Iterator[Outputs]:
    outputs = Outputs()
    yield outputs
    for fd in list(outputs._pipes):
        outputs.close(fd)


@pytest.fixture
def worker(outputs: Outputs) -> Iterator[Worker]:
    worker = Worker(outputs)
    yield worker
    worker.end()


def shown(outputs: Outputs) -> list[str]:
    lines = [text for _, text in outputs.lines]
    outputs.lines.clear()
    return lines


class TestReading:
    def test_lines(self, outputs: Outputs, worker: Worker) -> None:
        worker.print(b"one\n\ntwo\r\nthr")
        assert outputs.read(worker.fd)
        assert list(outputs.lines) == [(2, "one"), (2, ""), (2, "two")]
        assert outputs.read(worker.fd)
        outputs.lines.clear()
        worker.print(b"ee\nf")
        assert outputs.read(worker.fd)
        assert shown(outputs) == ["three"]

    def test_an_unfinished_last_line(self, outputs: Outputs, worker: Worker) -> None:
        worker.print(b"one\ntw")
        worker.end()
        assert outputs.read(worker.fd)
        assert not outputs.read(worker.fd)
        assert shown(outputs) == ["one", "tw"]
        assert not outputs.read(worker.fd)
        assert shown(outputs) == []

    def test_the_end_without_a_word(self, outputs: Outputs, worker: Worker) -> None:
        worker.end()
        assert not outputs.read(worker.fd)
        assert shown(outputs) == []

    def test_what_was_read_before(self, outputs: Outputs) -> None:
        worker = Worker(outputs, 3, b"early\nbe")
        worker.print(b"ginning\n")
        outputs.read(worker.fd)
        worker.end()
        assert list(outputs.lines) == [(3, "early"), (3, "beginning")]

    def test_streams_are_not_mixed(self, outputs: Outputs, worker: Worker) -> None:
        worker.print(b"o")
        worker.error(b"e")
        for fd in (worker.fd, worker.error_fd):
            outputs.read(fd)
        worker.print(b"ut\n")
        worker.error(b"rr\n")
        for fd in (worker.fd, worker.error_fd):
            outputs.read(fd)
        assert shown(outputs) == ["out", "err"]

    def test_not_utf8(self, outputs: Outputs, worker: Worker) -> None:
        worker.print(b"\xff\xfe ok\nna\xc3")
        outputs.read(worker.fd)
        worker.print(b"\xafve\n")
        outputs.read(worker.fd)
        assert shown(outputs) == ["\ufffd\ufffd ok", "naïve"]

    def test_a_line_without_end(
        self, outputs: Outputs, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_LONGEST", 100)
        for _ in range(3):
            worker.print(b"." * 51)
            outputs.read(worker.fd)
        assert shown(outputs) == ["." * 102]
        worker.print(b"\n")
        outputs.read(worker.fd)
        assert shown(outputs) == ["." * 51]

    def test_more_than_is_read_at_once(
        self, outputs: Outputs, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_CHUNK", 7)
        monkeypatch.setattr(module, "_TURN", 21)
        worker.print(b"".join(b"%d\n" % i for i in range(20)))
        outputs.read(worker.fd)
        assert 0 < len(outputs.lines) < 20  # the links get their turn
        while outputs.read(worker.fd) and len(outputs.lines) < 20:
            pass
        assert shown(outputs) == [str(i) for i in range(20)]

    def test_unknown_pipes(self, outputs: Outputs) -> None:
        assert not outputs.read(-1)
        outputs.close(-1)
        assert outputs.tail(7) == []
        assert outputs.fds(7) == []
        outputs.drain(7)
        outputs.forget(7)

    @settings(max_examples=40, deadline=None)
    @given(
        lines=st.lists(st.text(st.sampled_from("ab é\r"), max_size=4), max_size=8),
        end=st.booleans(),
        cuts=st.sets(st.integers(0, 60)),
    )
    def test_any_cutting_gives_the_same_lines(self, lines: list[str], end: bool, cuts: set[int]) -> None:
        outputs = Outputs()
        worker = Worker(outputs)
        data = "\n".join(lines).encode() + b"\n" * end
        places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
        for i, place in enumerate(places[1:]):
            worker.print(data[places[i] : place])
            assert outputs.read(worker.fd)
        worker.end()
        assert not outputs.read(worker.fd)
        if lines and not end and not lines[-1]:
            del lines[-1]  # nothing after the last newline is no line
        if not lines and end:
            lines = [""]
        assert shown(outputs) == [line.rstrip("\r") for line in lines]
        for fd in outputs.fds(2):
            outputs.close(fd)


class TestTail:
    def test_last_lines_of_stderr(self, outputs: Outputs, worker: Worker) -> None:
        worker.print(b"not this\n")
        worker.error(b"".join(b"%d\n" % i for i in range(module._TAIL + 5)) + b"unfinished")
        outputs.read(worker.fd)
        outputs.read(worker.error_fd)
        assert outputs.tail(2) == [str(i) for i in range(5, module._TAIL + 5)]
        worker.end()
        outputs.read(worker.error_fd)
        assert outputs.tail(2)[-1] == "unfinished"
        outputs.close(worker.error_fd)
        assert outputs.tail(2)[-1] == "unfinished"
        outputs.forget(2)
        assert outputs.tail(2) == []

    def test_each_workers_own(self, outputs: Outputs) -> None:
        workers = [Worker(outputs, pid) for pid in (2, 3)]
        for each in workers:
            each.error(b"%d\n" % each.pid)
            outputs.read(each.error_fd)
            each.end()
        assert (outputs.tail(2), outputs.tail(3)) == (["2"], ["3"])
        assert outputs.fds(3) == [workers[1].fd, workers[1].error_fd]

    @pytest.mark.parametrize("ended", [True, False], ids=["closed", "a child of it holds the pipe"])
    def test_drain(self, outputs: Outputs, worker: Worker, ended: bool) -> None:
        worker.print(b"last")
        worker.error(b"x" * 60_000 + b"\nTraceback: it died")
        if ended:
            worker.end()
        outputs.drain(2)
        assert sorted(shown(outputs)) == ["Traceback: it died", "last", "x" * 60_000]
        assert outputs.tail(2)[-1] == "Traceback: it died"
        outputs.drain(2)
        assert shown(outputs) == []


class _Broken(io.StringIO):
    def write(self, text: str) -> int:
        super().write(text)
        raise RuntimeError("this stream is broken")

    def flush(self) -> None:
        raise ValueError("and this")


class TestShow:
    @pytest.fixture
    def say(self, outputs: Outputs) -> Callable[..., None]:
        def say(*lines: str) -> None:
            outputs.lines.extend((2, line) for line in lines)

        return say

    def test_as_julia_shows_it(
        self, outputs: Outputs, say: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        say("one", "two")
        outputs.show()
        outputs.show()
        assert capsys.readouterr().out == "      From worker 2:\tone\n      From worker 2:\ttwo\n"

    def test_where_stdout_is_now(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        say("one")
        outputs.show()
        assert stream.getvalue() == "      From worker 2:\tone\n"

    def test_a_broken_stream(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdout", None)
        say("one", "two")
        outputs.show()
        assert not outputs.lines
        stream = _Broken()
        monkeypatch.setattr(sys, "stdout", stream)
        say("three", "four")
        outputs.show()
        assert not outputs.lines
        assert "three" in stream.getvalue()
        stream = io.StringIO()  # type: ignore[assignment]
        monkeypatch.setattr(sys, "stdout", stream)
        say("ŝ")
        outputs.show()
        assert "ŝ" in stream.getvalue()

    def test_an_interrupt_while_showing(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Interrupted(io.StringIO):
            def write(self, text: str) -> int:
                raise KeyboardInterrupt

        monkeypatch.setattr(sys, "stdout", Interrupted())
        say("one", "two")
        with pytest.raises(KeyboardInterrupt):
            outputs.show()
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        outputs.show()  # its lock is free
        assert "two" in stream.getvalue()

    def test_a_stream_that_shows_in_turn(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Eager(io.StringIO):
            def write(self, text: str) -> int:
                outputs.show()
                return super().write(text)

        stream = Eager()
        monkeypatch.setattr(sys, "stdout", stream)
        say("one", "two")
        outputs.show()
        assert stream.getvalue().count("From worker") == 2

    def test_many_threads(self, outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        start = threading.Barrier(4)

        def show() -> None:
            start.wait()
            for _ in range(100):
                outputs.show()

        threads = Threads()
        done = [threads.start(show) for _ in range(3)]
        start.wait()
        for i in range(300):
            outputs.lines.append((2, str(i)))
        for result in done:
            result()
        outputs.show()
        assert [line.split("\t")[1] for line in stream.getvalue().splitlines()] == [
            str(i) for i in range(300)
        ]


class TestEnd:
    def test_close(self, outputs: Outputs, worker: Worker) -> None:
        outputs.close(worker.fd)
        with pytest.raises(OSError):
            os.fstat(worker.fd)
        assert outputs.fds(2) == [worker.error_fd]
        assert not outputs.read(worker.fd)

    def test_abandon_in_a_forked_child(self, outputs: Outputs, worker: Worker) -> None:
        """A thread that is not there any more may hold each lock, and the lines are the parent's to show."""
        worker.print(b"line\nrest")
        outputs.read(worker.fd)
        held, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with outputs._reading, outputs._showing:
                held.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        outputs.abandon()
        outputs.show()
        assert not outputs.lines
        assert outputs.fds(2) == []
        with pytest.raises(OSError):
            os.fstat(worker.fd)
        leave.set()
        thread.join()
