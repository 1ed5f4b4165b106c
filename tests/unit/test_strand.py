"""Interrupts: put off inside the runtime, raised at its door, and never lost, doubled or late."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from shmdist.runtime.interrupts import ThreadState, Waiter, current
from tests.unit.test_channels import Threads


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    for thread in threads.all:
        thread.join(30)
        assert not thread.is_alive()


def ctrl_c() -> None:
    """Have SIGINT arrive, and its handler run, before this returns."""
    signal.raise_signal(signal.SIGINT)


class TestMainThread:
    @pytest.fixture
    def strand(self) -> Iterator[ThreadState]:
        strand = ThreadState()
        strand.main = True
        before = signal.getsignal(signal.SIGINT)
        yield strand
        after = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
        assert after == before
        assert (strand.depth, strand.pending) == (0, False)

    @pytest.fixture
    def handle(self) -> Iterator[Callable[[Any], None]]:
        before = signal.getsignal(signal.SIGINT)

        def handle(handler: Any) -> None:
            signal.signal(signal.SIGINT, handler)

        yield handle
        signal.signal(signal.SIGINT, before)

    def test_without_an_interrupt(self, strand: ThreadState) -> None:
        strand.enter()
        assert strand.depth == 1
        strand.leave()

    def test_put_off_inside_and_raised_on_leaving(self, strand: ThreadState) -> None:
        strand.enter()
        assert not strand.interrupted()
        ctrl_c()
        assert strand.interrupted()
        with pytest.raises(KeyboardInterrupt):
            strand.leave()
        assert not strand.interrupted()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()  # outside, it is raised at once

    def test_nested(self, strand: ThreadState) -> None:
        strand.enter()
        strand.enter()
        ctrl_c()
        strand.leave()
        assert strand.pending
        strand.enter()
        strand.leave()
        assert strand.pending
        with pytest.raises(KeyboardInterrupt):
            strand.leave()

    def test_delivered_where_nothing_is_half_done(self, strand: ThreadState) -> None:
        strand.enter()
        try:
            ctrl_c()
            with pytest.raises(KeyboardInterrupt):
                strand.deliver()
        finally:
            strand.leave()  # not raised a second time

    def test_many_are_one(self, strand: ThreadState) -> None:
        strand.enter()
        for _ in range(3):
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            strand.leave()

    def test_the_programs_own_handler_is_called(
        self, strand: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        seen: list[tuple[int, FrameType | None]] = []
        handle(lambda signum, stack: seen.append((signum, stack)))
        strand.enter()
        ctrl_c()
        assert not seen
        strand.leave()
        [(signum, stack)] = seen
        assert signum == signal.SIGINT
        assert stack is not None
        ctrl_c()
        assert len(seen) == 2

    def test_the_programs_own_handler_raises(
        self, strand: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        def handler(signum: int, stack: FrameType | None) -> None:
            raise LookupError("mine")

        handle(handler)
        strand.enter()
        ctrl_c()
        with pytest.raises(LookupError, match="mine"):
            strand.leave()
        assert signal.getsignal(signal.SIGINT) is handler

    def test_the_handler_may_use_the_runtime(
        self, strand: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        depths = []

        def handler(signum: int, stack: FrameType | None) -> None:
            strand.enter()
            depths.append(strand.depth)
            strand.leave()

        handle(handler)
        strand.enter()
        ctrl_c()
        strand.deliver()  # inside
        ctrl_c()
        strand.leave()  # at the door
        assert depths == [2, 1]
        assert signal.getsignal(signal.SIGINT) is handler

    def test_ignored_stays_ignored(self, strand: ThreadState, handle: Callable[[Any], None]) -> None:
        handle(signal.SIG_IGN)
        strand.enter()
        ctrl_c()
        strand.leave()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        ctrl_c()

    def test_the_systems_default_becomes_an_exception(
        self, strand: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        handle(signal.SIG_DFL)
        strand.enter()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            strand.leave()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    def test_an_error_passes_with_the_handler_put_back(self, strand: ThreadState) -> None:
        with pytest.raises(ZeroDivisionError):
            try:
                strand.enter()
                raise ZeroDivisionError
            finally:
                strand.leave()

    def test_wakes_a_wait(self, strand: ThreadState) -> None:
        kicks: list[str] = []
        strand.kick = lambda: kicks.append("kick")
        cell, lock = Waiter(), threading.Lock()
        lock.acquire()
        cell.add(lock)
        strand.enter()
        strand.cell = cell
        ctrl_c()
        assert lock.acquire(False)
        assert not kicks
        strand.cell, strand.leading = None, True
        ctrl_c()
        assert kicks == ["kick"]
        with pytest.raises(KeyboardInterrupt):
            strand.leave()

    def test_other_threads_leave_the_handler_alone(self, threads: Threads) -> None:
        before = signal.getsignal(signal.SIGINT)

        def elsewhere() -> int:
            strand = current()
            assert not strand.main
            strand.enter()
            assert signal.getsignal(signal.SIGINT) is before
            strand.leave()
            return strand.depth

        assert threads.start(elsewhere)() == 0

    def test_a_profiler_may_use_the_runtime_wherever_it_is_called(self, threads: Threads) -> None:
        """As the finalizers may that run in it, of which the collector comes to some."""

        def elsewhere() -> int:
            strand = current()
            strand.begin(ThreadState())
            strand.depth, calls = 0, 0

            def hook(frame: FrameType, event: str, function: Any) -> None:
                nonlocal calls
                strand.enter()
                strand.leave()
                calls += 1

            sys.setprofile(hook)
            strand.enter()
            strand.leave()
            sys.setprofile(None)
            assert strand.depth == 0
            strand.end()
            return calls

        assert threads.start(elsewhere)() > 3

    def test_current(self, threads: Threads) -> None:
        assert current() is current()
        assert current().main
        assert threads.start(current)() is not current()
        assert "depth=0" in repr(current())


class TestCells:
    def test_wakes_all(self) -> None:
        cell = Waiter()
        locks = [threading.Lock() for _ in range(3)]
        for lock in locks:
            lock.acquire()
            cell.add(lock)
        cell.remove(locks[1])
        cell.remove(locks[1])
        cell.wake()
        assert [lock.locked() for lock in locks] == [False, True, False]
        cell.wake()  # awake already
        cell.add(locks[1])
        cell.wake()
        assert not locks[1].locked()
