"""Interrupts: put off inside the runtime, raised at its door, and never lost, doubled or late."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from shmdist.runtime.interrupts import ThreadState, current
from shmdist.runtime.waiting import Waiter
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
    def thread_state(self) -> Iterator[ThreadState]:
        thread_state = ThreadState()
        thread_state.main = True
        before = signal.getsignal(signal.SIGINT)
        yield thread_state
        after = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
        assert after == before
        assert (thread_state.runtime_depth, thread_state.has_deferred) == (0, False)

    @pytest.fixture
    def handle(self) -> Iterator[Callable[[Any], None]]:
        before = signal.getsignal(signal.SIGINT)

        def handle(handler: Any) -> None:
            signal.signal(signal.SIGINT, handler)

        yield handle
        signal.signal(signal.SIGINT, before)

    def test_without_an_interrupt(self, thread_state: ThreadState) -> None:
        thread_state.enter()
        assert thread_state.runtime_depth == 1
        thread_state.leave()

    def test_put_off_inside_and_raised_on_leaving(self, thread_state: ThreadState) -> None:
        thread_state.enter()
        assert not thread_state.interrupted()
        ctrl_c()
        assert thread_state.interrupted()
        with pytest.raises(KeyboardInterrupt):
            thread_state.leave()
        assert not thread_state.interrupted()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()  # outside, it is raised at once

    def test_nested(self, thread_state: ThreadState) -> None:
        thread_state.enter()
        thread_state.enter()
        ctrl_c()
        thread_state.leave()
        assert thread_state.has_deferred
        thread_state.enter()
        thread_state.leave()
        assert thread_state.has_deferred
        with pytest.raises(KeyboardInterrupt):
            thread_state.leave()

    def test_delivered_where_nothing_is_half_done(self, thread_state: ThreadState) -> None:
        thread_state.enter()
        try:
            ctrl_c()
            with pytest.raises(KeyboardInterrupt):
                thread_state.raise_deferred()
        finally:
            thread_state.leave()  # not raised a second time

    def test_many_are_one(self, thread_state: ThreadState) -> None:
        thread_state.enter()
        for _ in range(3):
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            thread_state.leave()

    def test_the_programs_own_handler_is_called(
        self, thread_state: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        seen: list[tuple[int, FrameType | None]] = []
        handle(lambda signum, stack: seen.append((signum, stack)))
        thread_state.enter()
        ctrl_c()
        assert not seen
        thread_state.leave()
        [(signum, stack)] = seen
        assert signum == signal.SIGINT
        assert stack is not None
        ctrl_c()
        assert len(seen) == 2

    def test_the_programs_own_handler_raises(
        self, thread_state: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        def handler(signum: int, stack: FrameType | None) -> None:
            raise LookupError("mine")

        handle(handler)
        thread_state.enter()
        ctrl_c()
        with pytest.raises(LookupError, match="mine"):
            thread_state.leave()
        assert signal.getsignal(signal.SIGINT) is handler

    def test_the_handler_may_use_the_runtime(
        self, thread_state: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        depths = []

        def handler(signum: int, stack: FrameType | None) -> None:
            thread_state.enter()
            depths.append(thread_state.runtime_depth)
            thread_state.leave()

        handle(handler)
        thread_state.enter()
        ctrl_c()
        thread_state.raise_deferred()  # inside
        ctrl_c()
        thread_state.leave()  # at the door
        assert depths == [2, 1]
        assert signal.getsignal(signal.SIGINT) is handler

    def test_ignored_stays_ignored(self, thread_state: ThreadState, handle: Callable[[Any], None]) -> None:
        handle(signal.SIG_IGN)
        thread_state.enter()
        ctrl_c()
        thread_state.leave()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        ctrl_c()

    def test_the_systems_default_becomes_an_exception(
        self, thread_state: ThreadState, handle: Callable[[Any], None]
    ) -> None:
        handle(signal.SIG_DFL)
        thread_state.enter()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            thread_state.leave()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    def test_an_error_passes_with_the_handler_put_back(self, thread_state: ThreadState) -> None:
        with pytest.raises(ZeroDivisionError):
            try:
                thread_state.enter()
                raise ZeroDivisionError
            finally:
                thread_state.leave()

    def test_wakes_a_wait(self, thread_state: ThreadState) -> None:
        kicks: list[str] = []
        thread_state.kick = lambda: kicks.append("kick")
        waiter, lock = Waiter(), threading.Lock()
        lock.acquire()
        waiter.add(lock)
        thread_state.enter()
        thread_state.waits_for = waiter
        ctrl_c()
        assert lock.acquire(False)
        assert not kicks
        thread_state.waits_for, thread_state.leading = None, True
        ctrl_c()
        assert kicks == ["kick"]
        with pytest.raises(KeyboardInterrupt):
            thread_state.leave()

    def test_other_threads_leave_the_handler_alone(self, threads: Threads) -> None:
        before = signal.getsignal(signal.SIGINT)

        def elsewhere() -> int:
            thread_state = current()
            assert not thread_state.main
            thread_state.enter()
            assert signal.getsignal(signal.SIGINT) is before
            thread_state.leave()
            return thread_state.runtime_depth

        assert threads.start(elsewhere)() == 0

    def test_a_profiler_may_use_the_runtime_wherever_it_is_called(self, threads: Threads) -> None:
        """As the finalizers may that run in it, of which the collector comes to some."""

        def elsewhere() -> int:
            thread_state = current()
            thread_state.begin(ThreadState())
            thread_state.runtime_depth, calls = 0, 0

            def hook(frame: FrameType, event: str, function: Any) -> None:
                nonlocal calls
                thread_state.enter()
                thread_state.leave()
                calls += 1

            sys.setprofile(hook)
            thread_state.enter()
            thread_state.leave()
            sys.setprofile(None)
            assert thread_state.runtime_depth == 0
            thread_state.end()
            return calls

        assert threads.start(elsewhere)() > 3

    def test_current(self, threads: Threads) -> None:
        assert current() is current()
        assert current().main
        assert threads.start(current)() is not current()
        assert "depth=0" in repr(current())


class TestCells:
    def test_wakes_all(self) -> None:
        waiter = Waiter()
        locks = [threading.Lock() for _ in range(3)]
        for lock in locks:
            lock.acquire()
            waiter.add(lock)
        waiter.remove(locks[1])
        waiter.remove(locks[1])
        waiter.wake()
        assert [lock.locked() for lock in locks] == [False, True, False]
        waiter.wake()  # awake already
        waiter.add(locks[1])
        waiter.wake()
        assert not locks[1].locked()
