"""What workers print: lines cut over reads, kept for the error that tells of a death, and shown."""

from __future__ import annotations

import contextvars
import fcntl
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.runtime import output as module
from shmdist.runtime.environment import OutputFile
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
    outputs._start = None  # lines stay queued
    yield outputs
    for fd in list(outputs._pipes):
        outputs.close(fd)


@pytest.fixture
def worker(outputs: Outputs) -> Iterator[Worker]:
    worker = Worker(outputs)
    yield worker
    worker.end()


def shown(outputs: Outputs) -> list[str]:
    lines = [text for _, text, _ in outputs.lines]
    outputs.lines.clear()
    return lines


def numbered(outputs: Outputs) -> list[tuple[int, str]]:
    return [(pipe.pid, text) for pipe, text, _ in outputs.lines]


class TestReading:
    def test_lines(self, outputs: Outputs, worker: Worker) -> None:
        worker.print(b"one\n\ntwo\r\nthr")
        assert outputs.read(worker.fd)
        assert numbered(outputs) == [(2, "one"), (2, ""), (2, "two")]
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
        with pytest.raises(OSError):  # it is closed by then: its number may be another pipe's at once
            os.fstat(worker.fd)

    def test_what_was_read_before(self, outputs: Outputs) -> None:
        worker = Worker(outputs, 3, b"early\nbe")
        worker.print(b"ginning\n")
        outputs.read(worker.fd)
        worker.end()
        assert numbered(outputs) == [(3, "early"), (3, "beginning")]

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
        monkeypatch.setattr(module, "_MAX_LINE_BYTES", 100)
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
        monkeypatch.setattr(module, "_READ_BYTES", 7)
        monkeypatch.setattr(module, "_MAX_READ_BYTES", 21)
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
        outputs._start = None
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
    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self.kind = kind

    def write(self, text: str) -> int:
        super().write(text)
        raise self.kind("this stream is broken")

    def flush(self) -> None:
        raise ValueError("and this")


class TestShow:
    """What is written, where, and who waits for it; by a thread, as in the program."""

    @pytest.fixture
    def outputs(self) -> Iterator[Outputs]:
        outputs = Outputs()
        yield outputs
        outputs.finish()
        assert not outputs._writer
        for fd in list(outputs._pipes):
            outputs.close(fd)

    @pytest.fixture
    def say(self, outputs: Outputs, worker: Worker) -> Callable[..., None]:
        def say(*lines: str) -> None:
            worker.print("".join(f"{line}\n" for line in lines).encode())
            outputs.read(worker.fd)

        return say

    def test_as_julia_shows_it(
        self, outputs: Outputs, say: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        say("one", "two")
        outputs.show((2,))
        outputs.show((2,))
        assert not outputs.busy
        assert capsys.readouterr().out == "      From worker 2:\tone\n      From worker 2:\ttwo\n"

    def test_each_stream_to_its_own(
        self,
        outputs: Outputs,
        worker: Worker,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SHMDIST_PREFIX", "0")
        for number in range(3):
            worker.print(b"out %d\n" % number)
            worker.error(b"err %d\n" % number)
            outputs.read(worker.fd)
            outputs.read(worker.error_fd)
        outputs.show((2,))
        assert capsys.readouterr() == ("out 0\nout 1\nout 2\n", "err 0\nerr 1\nerr 2\n")

    def test_a_text_without_newline_is_shown_with_its_workers_answer(
        self, outputs: Outputs, worker: Worker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        worker.print(b"dots ..")
        outputs.read(worker.fd)
        outputs.show((3,))
        assert outputs.busy and not capsys.readouterr().out
        outputs.show((2,))
        assert not outputs.busy and capsys.readouterr().out.endswith("\tdots ..\n")

    def test_where_stdout_is_now(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        say("one")
        outputs.show((2,))
        assert stream.getvalue() == "      From worker 2:\tone\n"

    def test_in_the_context_of_who_waits(
        self, outputs: Outputs, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By which a notebook knows the cell."""
        cell: contextvars.ContextVar[int] = contextvars.ContextVar("cell", default=0)
        seen = []

        class Cells(io.StringIO):
            def write(self, text: str) -> int:
                seen.append(cell.get())
                return len(text)

        monkeypatch.setattr(sys, "stdout", Cells())
        for number in (1, 2):
            cell.set(number)
            worker.print(b"text")
            outputs.read(worker.fd)
            outputs.show((2,))
        assert seen == [1, 2]

    def test_a_broken_stream(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdout", None)
        say("one", "two")
        outputs.show((2,))
        assert not outputs.busy
        for kind in (RuntimeError, KeyboardInterrupt, SystemExit):
            stream = _Broken(kind)
            monkeypatch.setattr(sys, "stdout", stream)
            say("three", "four")
            outputs.show((2,))
            assert not outputs.busy
            assert "three" in stream.getvalue()
        stream = io.StringIO()  # type: ignore[assignment]
        monkeypatch.setattr(sys, "stdout", stream)
        say("ŝ")
        outputs.show((2,))
        assert "ŝ" in stream.getvalue()

    @pytest.mark.parametrize("plain", [True, False])
    def test_a_stream_without_all_characters(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch, plain: bool
    ) -> None:
        read, write = os.pipe()
        kind = io.TextIOWrapper if plain else type("Other", (io.TextIOWrapper,), {})
        with (
            open(read, "rb") as reader,
            open(write, "wb", buffering=0) as file,
            kind(file, "ascii") as stream,
        ):
            monkeypatch.setattr(sys, "stdout", stream)
            say("ŝ")
            outputs.show((2,))
            assert reader.readline() == b"      From worker 2:\t\\u015d\n"
            monkeypatch.undo()

    def test_a_stream_that_shows_in_turn(
        self, outputs: Outputs, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Eager(io.StringIO):
            def write(self, text: str) -> int:
                outputs.show((2,))
                return super().write(text)

        stream = Eager()
        monkeypatch.setattr(sys, "stdout", stream)
        say("one", "two")
        outputs.show((2,))
        assert stream.getvalue().count("From worker") == 2

    def test_many_threads(self, outputs: Outputs, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        start = threading.Barrier(4)

        def show() -> None:
            start.wait()
            for _ in range(100):
                outputs.show((2,))

        threads = Threads()
        done = [threads.start(show) for _ in range(3)]
        start.wait()
        for i in range(300):
            worker.print(b"%d\n" % i)
            outputs.read(worker.fd)
        for result in done:
            result()
        outputs.show((2,))
        assert [line.split("\t")[1] for line in stream.getvalue().splitlines()] == [
            str(i) for i in range(300)
        ]

    def test_no_thread_to_be_had(
        self, outputs: Outputs, say: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        start, outputs._start = outputs._start, _no_thread
        say("one")
        outputs._start = start
        say("two")
        outputs.show((2,))
        assert capsys.readouterr().out.count("\n") == 2


def _no_thread(job: Callable[[], None]) -> None:
    raise RuntimeError("can't start new thread")


class TestBlocked:
    """Where nobody reads what the program prints."""

    @pytest.fixture
    def blocked(self) -> Iterator[Callable[[], Any]]:
        """Return what makes ``sys.stdout`` a pipe that takes little, for the time of a with block."""

        @contextmanager
        def block() -> Iterator[int]:
            read, write = os.pipe()
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
            with open(write, "w") as stream, redirect_stdout(stream):
                yield read
                with suppress(OSError):
                    os.close(read)

        yield block

    @pytest.fixture
    def outputs(self) -> Iterator[Outputs]:
        outputs = Outputs()
        yield outputs
        outputs.finish(0.1)
        for fd in list(outputs._pipes):
            outputs.close(fd)

    def test_who_waits_waits_no_more(
        self, outputs: Outputs, worker: Worker, blocked: Callable[[], Any]
    ) -> None:
        with blocked() as pipe:
            worker.print(b"x" * 60_000 + b"\n")
            outputs.read(worker.fd)
            outputs.show((2,))
            assert outputs.stalled and outputs.busy
            outputs.show((2,))
            got = b""
            while not got.endswith(b"\n"):
                got += os.read(pipe, 1 << 16)
            outputs.show((2,))
            assert got == b"      From worker 2:\t" + b"x" * 60_000 + b"\n"
            assert not outputs.stalled and not outputs.busy

    def test_a_pipe_of_which_much_waits_is_not_read(
        self, outputs: Outputs, worker: Worker, blocked: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with blocked() as pipe:
            monkeypatch.setattr(module, "_MAX_QUEUED_BYTES", 10_000)
            paused, resumed = threading.Event(), threading.Event()
            outputs.attach(_on_a_thread, lambda fd: paused.set(), lambda fd: resumed.set())
            count = 0
            while not paused.is_set():
                count += 1
                worker.print(b"y" * 999 + b"\n")
                assert outputs.read(worker.fd)
            worker.print(b"last\n")
            got = b""
            while got.count(b"\n") < count:
                got += os.read(pipe, 1 << 16)
            assert resumed.wait(10) and outputs.read(worker.fd)
            while not got.endswith(b"last\n"):
                got += os.read(pipe, 1 << 16)
            outputs.show((2,))
            assert len(got.splitlines()) == count + 1 > 10 and not outputs.busy

    def test_the_end_is_bounded(self, outputs: Outputs, worker: Worker, blocked: Callable[[], Any]) -> None:
        with blocked():
            worker.print(b"x" * 60_000 + b"\n")
            outputs.read(worker.fd)
            outputs.finish(0.1)
            assert not outputs._writer and not outputs.busy

    def test_what_the_program_prints_stands_before(
        self, outputs: Outputs, worker: Worker, blocked: Callable[[], Any]
    ) -> None:
        with blocked() as pipe:
            print("mine")
            worker.print(b"theirs\n")
            outputs.read(worker.fd)
            got = b""
            while got.count(b"\n") < 2:
                got += os.read(pipe, 4096)
            assert got == b"mine\n      From worker 2:\ttheirs\n"

    def test_an_interrupt_while_waiting(
        self, outputs: Outputs, worker: Worker, blocked: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with blocked():
            monkeypatch.setattr(module, "_STALL_SECONDS", 1000.0)
            worker.print(b"x" * 60_000 + b"\n")
            outputs.read(worker.fd)

            waits, wait = threading.Event(), outputs._changed.wait

            def wait_and_say_so(timeout: float) -> bool:
                waits.set()
                return wait(timeout)

            def press() -> None:
                waits.wait()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

            monkeypatch.setattr(outputs._changed, "wait", wait_and_say_so)

            _on_a_thread(press)
            with pytest.raises(KeyboardInterrupt):
                outputs.show((2,))


def _on_a_thread(job: Callable[[], None]) -> None:
    threading.Thread(target=job, daemon=True).start()


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
            with outputs._changed:
                held.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        outputs.abandon()
        outputs.show((2,))
        assert not outputs.lines
        assert outputs.fds(2) == []
        with pytest.raises(OSError):
            os.fstat(worker.fd)
        leave.set()
        thread.join()


def test_an_interrupt_of_a_write_does_not_mark_the_file_for_good():
    read, write = os.pipe()
    file = OutputFile(write)

    def trace(frame, event, _):
        if event == "line" and file.writing:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            file.write(b"a")
    finally:
        sys.settrace(former)
    file.write(b"b")
    assert not file.writing
    os.close(write)
    os.close(read)
