"""Interrupts of remote calls: raised in the user code they are meant for, or not at all."""

from __future__ import annotations

import gc
import itertools
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from shmdist.runtime.interrupts import ThreadState
from shmdist.runtime.waiting import Waiter
from tests.unit.test_channels import Threads
from tests.unit.test_interrupts import ctrl_c, threads

__all__ = ["threads"]  # a fixture


@pytest.fixture(autouse=True)
def no_finalizers() -> Iterator[None]:
    """What other tests left is not collected here: Python swallows what is raised in a finalizer."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Task:
    """What thread states need of a remote call."""

    interrupted = False


def run_task(thread_state: ThreadState, task: Any, user: Callable[[], Any]) -> BaseException | None:
    """Run user code as `runtime.executor` does; nothing may escape."""
    error: BaseException | None = None
    thread_state.begin(task)
    task.thread_state = thread_state
    try:
        try:
            thread_state.enter_user_code()
            user()
        finally:
            thread_state.leave_user_code()
    except BaseException as caught:
        error = caught
    thread_state.end()
    return error


def interrupt(task: Any) -> None:
    """As `CallExecutor.interrupt` does."""
    task.interrupted = True
    thread_state = getattr(task, "thread_state", None)
    if thread_state is not None:
        thread_state.interrupt_call(task)


class Striker:
    """Interrupts a task when the thread that runs it is at a certain line, counted from the beginning."""

    def __init__(self, thread_state: ThreadState, moment: int, gap: int) -> None:
        self.thread_state, self.moment, self.gap = thread_state, moment, gap
        self.task: Any = Task()
        self.passed = 0
        self.target: ThreadState | None = None
        self.struck = False  # the interrupter is through
        self.exposed = False  # and found user code running

    def run(self, user: Callable[[], Any]) -> BaseException | None:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            return run_task(self.thread_state, self.task, user)
        finally:
            sys.settrace(before)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not self.struck:
            self.passed += 1
            if self.passed == self.moment:
                self.task.interrupted = True
                self.target = getattr(self.task, "thread_state", None)
            # While this thread has the guard, the interrupter waits for it.
            if self.passed >= self.moment + self.gap and not self.thread_state.guard._is_owned():
                self.struck = True
                if self.target is not None:
                    self.exposed = self.thread_state.task is self.task and not self.thread_state.runtime_depth
                    self.target.interrupt_call(self.task)
        return self.trace


class TestCalls:
    """Interrupts of remote calls, from another thread."""

    @pytest.fixture
    def thread_state(self) -> Iterator[ThreadState]:
        """A thread state of a thread of the runtime; the tests run its task on this thread."""
        thread_state = ThreadState()
        thread_state.runtime_depth = 1
        yield thread_state
        assert (thread_state.runtime_depth, thread_state.task, thread_state.has_deferred) == (1, None, False)

    @staticmethod
    def from_outside(task: Any) -> None:
        thread = threading.Thread(target=interrupt, args=(task,))
        thread.start()
        thread.join()

    def test_in_user_code(self, thread_state: ThreadState) -> None:
        task = Task()
        reached = []

        def user() -> None:
            self.from_outside(task)
            for _ in range(100):  # at the next bytecode, in an innocent place
                reached.append(1)
            reached.append(2)

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)
        assert 2 not in reached

    def test_in_the_runtime_it_is_put_off_until_the_door(self, thread_state: ThreadState) -> None:
        task = Task()
        reached: list[object] = []

        def user() -> None:
            thread_state.enter()
            thread_state.enter()
            self.from_outside(task)
            thread_state.leave()
            assert thread_state.interrupted()
            reached.append("inside")
            try:
                thread_state.leave()
            finally:
                reached.append(thread_state.runtime_depth)
            reached.append("after")

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)
        assert reached == ["inside", 0]

    def test_delivered_by_a_wait(self, thread_state: ThreadState) -> None:
        task = Task()

        def user() -> None:
            waiter, lock = Waiter(), threading.Lock()
            lock.acquire()
            waiter.add(lock)
            thread_state.enter()
            try:
                thread_state.waits_for = waiter
                self.from_outside(task)
                assert lock.acquire(False)
                thread_state.raise_deferred()
            finally:
                thread_state.waits_for = None
                thread_state.leave()

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)

    def test_before_it_begins(self, thread_state: ThreadState) -> None:
        task = Task()
        interrupt(task)
        reached: list[int] = []
        assert isinstance(run_task(thread_state, task, lambda: reached.append(1)), KeyboardInterrupt)
        assert not reached

    def test_after_it_has_ended(self, thread_state: ThreadState) -> None:
        task, other = Task(), Task()
        assert run_task(thread_state, task, lambda: None) is None
        self.from_outside(task)
        assert run_task(thread_state, other, lambda: self.from_outside(task)) is None

    def test_between_user_code_and_the_end(self, thread_state: ThreadState) -> None:
        task = Task()
        thread_state.begin(task)
        thread_state.enter_user_code()
        thread_state.leave_user_code()
        self.from_outside(task)
        assert thread_state.has_deferred is False or thread_state.runtime_depth == 1
        thread_state.end()
        assert run_task(thread_state, Task(), lambda: None) is None

    def test_user_code_that_swallows_it(self, thread_state: ThreadState) -> None:
        task = Task()
        caught = []

        def user() -> None:
            try:
                self.from_outside(task)
                for _ in range(100):
                    pass
            except KeyboardInterrupt:
                caught.append(1)

        assert run_task(thread_state, task, user) is None
        assert caught
        assert run_task(thread_state, Task(), lambda: None) is None

    @pytest.mark.parametrize("gap", [0, 1, 5])
    def test_at_each_line(self, thread_state: ThreadState, gap: int) -> None:
        """Wherever the thread stands, of the task's code and of the thread state's own.

        `gap` lines of this thread pass between the interrupter's two steps.
        """

        def user() -> None:
            thread_state.enter()
            thread_state.enter()
            thread_state.leave()
            thread_state.leave()

        outcomes = set()
        for moment in itertools.count(1):
            striker = Striker(thread_state, moment, gap)
            error = striker.run(user)
            assert error is None or isinstance(error, KeyboardInterrupt)
            assert (thread_state.runtime_depth, thread_state.has_deferred, thread_state.task) == (
                1,
                False,
                None,
            ), moment
            for _ in range(10):
                pass  # what was still on its way would be raised here
            if striker.exposed:
                assert error is not None, moment
            outcomes.add(type(error))
            if not striker.struck:
                break  # the moment is after the end
        assert outcomes == {KeyboardInterrupt, type(None)}
        assert moment > 40

    def test_at_any_moment(self, threads: Threads) -> None:
        """Raised in the task it is meant for, or not at all; nothing escapes and no other task is hit."""
        rounds = 300
        tasks: list[Any] = [Task() for _ in range(rounds)]
        begun = [threading.Event() for _ in range(rounds)]
        over = threading.Event()

        def runner() -> list[bool]:
            thread_state = ThreadState()
            thread_state.runtime_depth = 1
            outcomes = []
            for i, task in enumerate(tasks):

                def user(i: int = i) -> None:
                    begun[i].set()
                    for _ in range(200 if i % 3 else 5000):  # time for the interrupt to come
                        thread_state.enter()
                        thread_state.leave()

                error = run_task(thread_state, task, user)
                assert error is None or isinstance(error, KeyboardInterrupt)
                # Here the thread is the runtime's: an exception would end the test.
                assert (thread_state.runtime_depth, thread_state.has_deferred, thread_state.task) == (
                    1,
                    False,
                    None,
                )
                outcomes.append(error is not None)
            over.set()
            return outcomes

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            running = threads.start(runner)
            delay = random.Random(1)
            for i in range(rounds):
                if i % 3 == 0:
                    while not (begun[i].wait(0.01) or over.is_set()):
                        pass
                    for _ in range(delay.randrange(3000)):
                        pass
                    interrupt(tasks[i])
            outcomes = running()
        finally:
            sys.setswitchinterval(before)
        assert len(outcomes) == rounds
        assert not any(hit for i, hit in enumerate(outcomes) if i % 3)
        assert any(outcomes)


class TestSignalledCalls:
    """Interrupts of calls on a worker's main thread, by a signal that is the process's."""

    @pytest.fixture
    def thread_state(self) -> Iterator[ThreadState]:
        thread_state = ThreadState()
        thread_state.runtime_depth = 1
        thread_state.signalled = True
        before = signal.signal(signal.SIGINT, thread_state.on_signal)
        yield thread_state
        signal.signal(signal.SIGINT, before)
        assert (thread_state.runtime_depth, thread_state.task, thread_state.has_deferred) == (1, None, False)

    def test_in_user_code(self, thread_state: ThreadState) -> None:
        task = Task()
        reached = []

        def user() -> None:
            interrupt(task)
            for _ in range(100):
                pass
            reached.append(1)

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)
        assert not reached

    def test_in_the_runtime_it_is_put_off_until_the_door(self, thread_state: ThreadState) -> None:
        task = Task()
        reached = []

        def user() -> None:
            thread_state.enter()
            interrupt(task)
            ctrl_c()
            reached.append("inside")
            thread_state.leave()
            reached.append("after")

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)
        assert reached == ["inside"]

    def test_once_for_a_task(self, thread_state: ThreadState) -> None:
        """Ctrl-C in a terminal reaches the worker as well; what clears up must not be hit again."""
        task = Task()
        cleared = []

        def user() -> None:
            try:
                interrupt(task)
                ctrl_c()
            finally:
                ctrl_c()
                thread_state.enter()
                ctrl_c()
                thread_state.leave()
                cleared.append(1)

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)
        assert cleared
        other = Task()
        assert isinstance(run_task(thread_state, other, lambda: interrupt(other)), KeyboardInterrupt)

    def test_what_a_finalizer_swallows_comes_again(self, thread_state: ThreadState) -> None:
        """Once for all finalizers of a collection, and then in the task."""
        task, reached, swallowed = Task(), [], []

        class Ends:
            def __del__(self) -> None:
                try:
                    ctrl_c()
                    reached.append(self)
                except KeyboardInterrupt:
                    swallowed.append(1)
                assert not thread_state.interrupt_delivered
                ctrl_c()

        def user() -> None:
            task.interrupted = True
            cycle: list[Any] = [Ends(), Ends()]
            cycle.append(cycle)
            del cycle
            gc.collect()
            reached.append("after")
            ctrl_c()
            reached.append("never")

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)
        assert swallowed == [1] and len(reached) == 2 and "never" not in reached
        reached.clear()

    def test_in_a_wait_of_a_finalizer_as_well(self, thread_state: ThreadState) -> None:
        task, swallowed = Task(), []

        class Ends:
            def __del__(self) -> None:
                thread_state.enter()
                try:
                    ctrl_c()
                    thread_state.raise_deferred()
                except KeyboardInterrupt:
                    swallowed.append(1)
                finally:
                    thread_state.leave()

        def user() -> None:
            task.interrupted = True
            cycle: list[Any] = [Ends()]
            cycle.append(cycle)
            del cycle
            gc.collect()
            assert swallowed and not thread_state.interrupt_delivered
            ctrl_c()

        assert isinstance(run_task(thread_state, task, user), KeyboardInterrupt)

    def test_a_signal_for_nobody(self, thread_state: ThreadState) -> None:
        ctrl_c()  # idle
        task = Task()
        assert run_task(thread_state, task, ctrl_c) is None  # running, not interrupted
        task.interrupted = True
        ctrl_c()  # ended

    def test_before_it_begins(self, thread_state: ThreadState) -> None:
        task = Task()
        task.interrupted = True
        reached: list[int] = []
        assert isinstance(run_task(thread_state, task, lambda: reached.append(1)), KeyboardInterrupt)
        assert not reached
