"""Calls of a process to itself: they begin in the order in which they were made.

One thread has the *turn*: it takes the calls one after the other, and runs them.  So short
calls need neither a thread each nor a hand-over.  While more calls wait behind the one that
runs, another thread, the *follower*, looks now and then; when the same call has run for a
whole nap, the follower takes the turn and goes on with the next one.  The former thread
leaves when its call has ended.  So a call that takes long, or blocks, holds up the others
by a nap or two, and a thousand of them may block at once.

*The turn is taken only from a thread that is inside the function it was given.*  That is
what keeps the order: :meth:`OwnCalls._call` notes it in the step before the call, and between
the two the interpreter does not change threads.  Or from one that waits before it has come so far, in
a finalizer of the program's: what it waits for may be a call behind its own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.errors import CapturedException, capture
from shmdist.runtime.interrupts import ThreadState, current
from shmdist.runtime.threads import Attempt, ThreadPool
from shmdist.runtime.waiting import Waiter

_OVERTAKE_SECONDS = 1e-3  # a call runs before the next is begun beside it; as in ``runtime.reactor``
_TRIES = 3  # times that a call is tried to be begun
_SHORTEST = _OVERTAKE_SECONDS / 10  # the same when the call before it was a long one as well
_log = Log("own_calls")

Job = Callable[[], None]


class _Turn:
    """The right of one thread to take the next call."""

    __slots__ = ("inside", "thread_state")

    def __init__(self) -> None:
        self.inside = False  # its thread is, or was, inside the function of the call it took last
        self.thread_state: ThreadState | None = None  # of its thread

    def is_over(self) -> bool:
        """Return whether the next call may begin though the one that was taken last has not ended."""
        state = self.thread_state
        return self.inside or (state is not None and (state.leading or state.waits_for is not None))


class Threads(Protocol):
    """What is needed of the reactor."""

    threads: ThreadPool

    def start(self, job: Job, /) -> None:
        """Run a job on another thread."""

    def complete(self, waiter: Waiter, /) -> None:
        """Complete a waiter from any thread."""

    def wait(self, waiter: Waiter, /) -> bool:
        """Wait until a waiter is done."""


class OwnCalls:
    """The calls of one process to itself that have not begun, and who begins them.

    Attributes
    ----------
    made : int
        How many calls were made.
    begun : int
        The first so many are known to have begun.
    """

    def __init__(self, reactor: Threads) -> None:
        self._reactor = reactor
        self._lock = threading.Lock()  # guards all below; nothing else is done while it is held
        self._waiting: deque[tuple[int, Job]] = deque()
        self._taken = 0  # number of the call taken last
        self._turn: _Turn | None = None
        self._followed = False  # there is a follower, or one is being started
        self.made = 0
        self.begun = 0

    def __repr__(self) -> str:
        return f"<OwnCalls {self.made} made, {self.begun} begun, {len(self._waiting)} waiting>"

    def begin(
        self,
        f: Callable[..., Any],
        args: Any,
        kwargs: Any,
        task: Any,
        ended: Callable[[Any, CapturedException | None], None],
    ) -> None:
        """Run a call on another thread, when the calls before it have begun.

        Parameters
        ----------
        f, args, kwargs : callable, sequence, mapping
            The call.
        task : LocalTask
            By which it can be interrupted.
        ended : callable
            Told the value, or the error, on the thread that ran it.

        Raises
        ------
        RuntimeError, MemoryError
            The system has no room for another thread; the call will not be run.
        """

        def job() -> None:
            thread_state = current()
            value, captured = None, None
            thread_state.begin(task)
            task.thread_state = thread_state
            try:
                try:
                    thread_state.enter_user_code()
                    value = self._call(f, args, kwargs)
                finally:
                    thread_state.leave_user_code()
            except BaseException as error:
                captured = capture(error)
            thread_state.end()
            firmly(ended, value, captured)

        def failed(error: Exception) -> None:
            thread_state = current()
            if thread_state.task is task:
                thread_state.end()
            ended(None, capture(error))

        self.put(Attempt(job, failed))

    def put_callback(self, job: Job) -> None:
        """Run `job` on another thread as a call of nobody's; it holds up those behind it for a nap or two."""
        thread_state = current()
        with thread_state:
            self._put(lambda: self._call(job, (), {}), thread_state, is_call=False)

    def put(self, job: Job) -> None:
        """Run `job` on another thread, when the calls before it have begun."""
        thread_state = current()
        thread_state.enter()  # no interrupt must come between the noting of a call and its thread
        try:
            self._put(job, thread_state)
        finally:
            thread_state.leave()

    def _put(self, job: Job, thread_state: ThreadState, is_call: bool = True) -> None:
        with self._lock:
            turn = _Turn() if self._turn is None else None
            entry = (self.made + 1, job)
            self._waiting.append(entry)
            self.made += 1
            if is_call:
                thread_state.last_local_call = self.made
            if turn is not None:
                self._turn = turn
            elif self._followed:
                return
            else:
                self._followed = True
        try:
            if turn is None:
                self._reactor.start(Attempt(self._follow, lambda error: self._follow()))
            else:
                self._reactor.start(Attempt(lambda: self._run(turn), lambda error: self._run(turn)))
        except BaseException:
            with self._lock:
                if turn is None:
                    self._followed = False
                else:
                    self._turn = None
                if entry not in self._waiting:
                    return  # the thread that has the turn took it meanwhile
                self._waiting.remove(entry)
            raise

    def _call(self, f: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the function of a job; from here on the next call may begin."""
        turn = self._turn
        if turn is not None and turn.thread_state is current():  # else it is another thread's by now
            turn.inside = True
        return f(*args, **kwargs)

    def catch_up(self) -> None:
        """Wait until the calls that the calling thread has made have begun."""
        thread_state = current()
        if thread_state.last_local_call <= self.begun:
            return
        waiter = Waiter()
        thread_state.enter()
        try:
            self.put(lambda: self._reactor.complete(waiter))
            self._reactor.wait(waiter)
        finally:
            thread_state.leave()

    def _run(self, turn: _Turn) -> None:
        """Take calls and run them, for as long as the turn is this thread's."""
        turn.thread_state = current()
        job, failures = None, 0
        while True:
            if job is None:
                with self._lock:
                    if self._turn is not turn:
                        return
                    self.begun = self._taken  # it has ended
                    if not self._waiting:
                        self._turn = None
                        return
                    self._taken, job = self._waiting.popleft()
                    turn.inside = False
            try:
                self._reactor.threads.guarded(job)
            except Exception:
                failures += 1  # it has not begun
                if failures < _TRIES:
                    continue
            except BaseException:
                _log.exception("an error in a thread of shmdist")
            job, failures = None, 0  # it holds what the call was given

    def _follow(self, seen: int = 0) -> None:
        """Body of the follower: take the turn when a call takes long and others wait behind it.

        Behind a long one, the call `seen` that is about to begin probably takes long, too.
        """
        nap = _SHORTEST if seen else _OVERTAKE_SECONDS
        while True:
            time.sleep(nap)
            nap = min(2 * nap, _OVERTAKE_SECONDS)
            with self._lock:
                if not self._waiting:
                    self._followed = False
                    return
                former = self._turn
                # There is none where its thread could not be started.
                if former is None or (seen == self._taken and former.is_over()):
                    turn, more = _Turn(), len(self._waiting) > 1
                    self._turn, self._followed, self.begun = turn, more, self._taken
                    break
                seen = self._taken
        if more:
            try:
                self._reactor.start(
                    Attempt(lambda: self._follow(seen + 1), lambda error: self._follow(seen + 1))
                )
            except Exception:  # no room for another thread: they wait for this one
                with self._lock:
                    self._followed = False
        firmly(self._run, turn)


__all__ = ["OwnCalls"]
