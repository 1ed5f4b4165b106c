"""The state of a thread: what it runs, and when it may be interrupted. Defers and delivers interrupts.

An interrupt (Ctrl-C on process 1, ``interrupt``/cancel on a worker) is an exception that
Python raises between two bytecodes.  Inside the runtime that would be the end of a
half-read frame or of a lock, so there it is put off:

- ``runtime_depth`` > 0 means that the thread is inside the runtime.  An interrupt then only sets
  ``has_deferred`` and wakes the thread if it waits; the runtime raises it with
  :meth:`ThreadState.raise_deferred` where nothing is half done.
- ``runtime_depth`` == 0 means that user code runs, and an interrupt is raised right there. What changes
  tables, or holds a lock that others need, is never done there: ``with current():``.

On process 1 the main thread enters the runtime by putting its own SIGINT handler in
place and leaves by putting the former one back: whatever program shmdist is used in
keeps its own handling of Ctrl-C.  From the moment the handler is in place interrupts are
put off, so there is no gap between the handler and ``runtime_depth``. Handlers of other signals, which
may raise as well, are in ``runtime.deferred_signals``, on a worker's main thread too.

Finalizers
----------
The garbage collector may run wherever Python allocates, also where this thread holds a lock of the
runtime or reads the links. A finalizer that it runs there must not take a lock, send or wait: the thread
would wait for itself. Hence three rules:

- *A lock of the runtime is taken at ``runtime_depth`` > 0 only*: by a thread that has entered, or one of
  the runtime's own.
- *Who enters where a collection has begun at ``runtime_depth`` > 0 gets an error*
  (:meth:`ThreadState.enter`). So a finalizer comes to no lock there, and what it asks for fails with a
  text that says why. It works as anywhere else where the collection began in user code. Finalizers of the
  runtime's own ask :func:`collecting` first and leave what they have to do to another thread
  (``ReferenceCounts.hand_over``), or only append to a deque.
- *No object of a user is dropped while a lock is held*, for its finalizer runs there and then, without a
  collection. Where one is dropped by the thread that reads, it cannot wait (``Reactor.wait``).

That a collection runs, and on which thread, is noted by functions in C: what the handler of a signal
raises in a callback of the collector would be lost. :attr:`ThreadState.collection_at_entry` tells whether the
collection began before this thread entered, by a finalizer in user code, or after.
"""

from __future__ import annotations

# The C half of `signal`, which has no stubs: the wrapper costs two microseconds an entry.
import _signal  # type: ignore[import-not-found]  # has no stubs
import functools
import gc
import math
import signal
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable
from typing import Any

from shmdist._ending import Ending
from shmdist._signals import is_interruption
from shmdist.errors import FinalizerError
from shmdist.runtime.daemon_thread import is_own
from shmdist.runtime.deferred_signals import DeferredSignalHandlers
from shmdist.runtime.waiting import Waiter

_SIGINT, _DEFAULT = int(signal.SIGINT), int(signal.SIG_DFL)


class ThreadState:
    """The runtime's side of one thread.

    `guard` orders the interrupts of a remote call against the runtime's entries and exits
    of the thread that runs it; without a call nobody else writes here. The same thread may take it again:
    nothing is called while it is held, but a profiler or debugger in Python, and that may run the collector.
    """

    __slots__ = (
        "collection_at_entry",
        "guard",
        "handler",
        "handlers",
        "has_deferred",
        "ident",
        "interrupt_delivered",
        "interrupt_pending",
        "interrupted_collection",
        "kick",
        "last_local_call",
        "leading",
        "main",
        "previous",
        "runtime_depth",
        "send_deadline",
        "signalled",
        "task",
        "waits_for",
    )

    def __init__(self) -> None:
        self.runtime_depth = 0
        self.has_deferred = False  # something is to be delivered
        self.interrupt_pending = False  # and that is an interrupt of the task
        self.waits_for: Waiter | None = None  # what it sleeps on
        self.leading = False  # it reads the links
        self.kick: Callable[[], None] | None = None  # wakes it when it reads
        self.task: Any = None  # the remote call it runs, a runtime.task.Task
        self.main = False  # process 1's main thread, where Python runs signal handlers
        self.signalled = False  # a worker's main thread: interrupted by a signal
        self.interrupt_delivered = False  # the interrupt of this task has come
        self.interrupted_collection: Any = None  # the collection in whose finalizers it came, by its dict
        self.handler = self._on_sigint
        self.previous: Any = None  # the SIGINT handler found on entering
        self.handlers = DeferredSignalHandlers(self._on_signal)  # of other signals; of main threads alone
        self.last_local_call = 0  # the last call of this thread to its own process (``own_calls``)
        self.send_deadline = math.inf  # by the monotonic clock: what is not written by then is given up
        self.collection_at_entry: Any = None  # the collection that had begun last when this thread entered
        self.guard = threading.RLock()
        self.ident = threading.get_ident()

    def __repr__(self) -> str:
        return f"<ThreadState depth={self.runtime_depth} has_deferred={self.has_deferred} task={self.task!r}>"

    def enter(self) -> None:
        """Enter the runtime: from here on interrupts are put off.

        Raises
        ------
        FinalizerError
            A finalizer calls this, and the thread is inside the runtime already.
        """
        if self.runtime_depth:
            if self.collection_at_entry is not _phases["start"] and collecting():
                raise FinalizerError(
                    "a finalizer (__del__, or a callback of a weak reference) cannot do this here: the"
                    " garbage collector ran it while shmdist was at work on this thread. Close what must be"
                    " closed explicitly, or use remote_do, which another thread then sends"
                )
        else:
            self.collection_at_entry = _phases["start"]
        if self.main and not self.runtime_depth:
            try:
                self.handlers.enter()
                self.previous = _signal.signal(_SIGINT, self.handler)
            except BaseException:
                self._give_back()
                raise
        elif self.task is not None:
            try:
                if self.signalled and not self.runtime_depth:
                    self.handlers.enter()
                with self.guard:
                    self.runtime_depth += 1
            except BaseException:
                self._give_back()
                raise
            return
        self.runtime_depth += 1

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *failure: object) -> None:
        self.leave()

    def refresh_signal_handlers(self) -> None:
        """Take the place of handlers that are new, before a long wait; inside the runtime.

        Raises
        ------
        BaseException
            What one of them raised before that; nothing may be half done here.
        """
        if self.main or self.signalled:
            self.handlers.look()
            self.handlers.take_over()

    def leave(self) -> None:
        """Leave the runtime, and raise what was put off.

        Raises
        ------
        KeyboardInterrupt
            Or whatever the program's own SIGINT handler raises.
        """
        if self.task is not None:
            try:
                with self.guard:
                    self.runtime_depth -= 1
            finally:
                if not self.runtime_depth and (self.handlers.taken or self.has_deferred):
                    self._give_back()
            return
        self.runtime_depth -= 1
        if self.main and not self.runtime_depth:
            try:
                # None: a handler that was not installed from Python; it cannot be put back.
                previous = self.previous
                found = _signal.signal(_SIGINT, _DEFAULT if previous is None else previous)
                if found is not self.handler:  # the program has set another one meanwhile
                    _signal.signal(_SIGINT, found)
            finally:
                if self.handlers.taken or self.has_deferred:
                    self._give_back()

    def _give_back(self) -> None:
        """Give the handlers their places back, and deliver what came meanwhile; outside the runtime."""
        try:
            self.handlers.give_back()
        finally:
            if self.has_deferred:
                self.raise_deferred()

    def _on_sigint(self, signum: int, stack: Any) -> None:
        self.interrupt_pending = self.has_deferred = True
        self.wake()

    def _on_signal(self, signum: int, stack: Any) -> None:
        self.handlers.caught.append(signum)
        self.has_deferred = True
        self.wake()

    def wake(self) -> None:
        """Wake the thread out of its wait, so that it sees `has_deferred`.  Takes no lock."""
        if self.leading and self.kick is not None:
            self.kick()
        waiter = self.waits_for
        if waiter is not None:
            waiter.wake()

    def interrupted(self) -> bool:
        """Return whether an interrupt was put off, or the time is up."""
        return self.has_deferred or time.monotonic() > self.send_deadline

    def raise_deferred_or_timeout(self) -> None:
        """Raise that for which this was :meth:`interrupted`; nothing may be half done here."""
        if self.has_deferred:
            self.raise_deferred()
        else:
            raise TimeoutError("not sent in time: the process does not read")

    def raise_deferred(self) -> None:
        """Raise the interrupt, and call the handlers, that were put off; nothing may be half done here."""
        caught = self.handlers.caught
        while caught:
            number = caught.pop(0)
            handler = self.handlers.handler(number)
            self.has_deferred = bool(caught) or self.interrupt_pending
            if callable(handler):
                self._call(handler, number)
        due, self.interrupt_pending, self.has_deferred = self.interrupt_pending, False, False
        if not due:
            return
        if self.task is not None:
            self.interrupt_delivered = self.interrupt_delivered or not collecting()
            raise KeyboardInterrupt
        if self.main:
            previous = self.previous
            if callable(previous):
                self._call(previous, _SIGINT)
            elif previous == signal.SIG_DFL:
                raise KeyboardInterrupt

    def _call(self, handler: Callable[[int, Any], Any], number: int) -> None:
        """Call a handler of the program's, for which the time limit of what it ends does not hold."""
        until, self.send_deadline = self.send_deadline, math.inf
        try:
            handler(number, sys._getframe(2))
        finally:
            self.send_deadline = until

    # -------------------------------------------------- interrupting a remote call

    def interrupt_call(self, task: Any) -> None:
        """Raise KeyboardInterrupt in `task`, if this thread runs it; from another thread."""
        if self.signalled:
            signal.pthread_kill(self.ident, _SIGINT)  # reaches system calls as well
            return
        with self.guard:
            if self.task is not task:
                return
            if self.runtime_depth:
                self.interrupt_pending = self.has_deferred = True
                self.wake()
            else:
                _raise_in(self.ident, KeyboardInterrupt)

    def on_signal(self, signum: int, stack: Any) -> None:
        """Handle SIGINT on a worker's main thread, for good; an idle one is unharmed."""
        task = self.task
        # Once for a task: a Ctrl-C that a terminal sends as well must not hit what clears up after it.
        if task is None or not task.interrupted or self.interrupt_delivered:
            return
        if collecting():  # a finalizer is broken off, once; what it raises is lost, so the signal is repeated
            if self.interrupted_collection is _phases["start"]:
                return
            self.interrupted_collection = _phases["start"]
        else:
            self.interrupt_delivered = True
        if self.runtime_depth:
            self.interrupt_pending = self.has_deferred = True
            self.wake()
        else:
            raise KeyboardInterrupt

    def again(self) -> Ending:
        """Return what brings an interrupt once more when it ends: in a finalizer what is raised is lost.

        The finalizer keeps it in a variable of its own, so that it ends with the finalizer's frame.
        """
        if self.main or self.signalled:
            self.interrupt_delivered = False
            return Ending(interrupt_main)
        return Ending(_raising_in(self.ident, KeyboardInterrupt))

    def begin(self, task: Any) -> None:
        """Begin to run `task` on this thread; the runtime's depth is 1."""
        if self.signalled:  # nobody else writes here
            self.has_deferred = self.interrupt_pending = self.interrupt_delivered = False
            self.task = task
            return
        with self.guard:
            self.task = task
            self.has_deferred = self.interrupt_pending = self.interrupt_delivered = False

    def end(self) -> None:
        """End the task: from here on no interrupt of it can arrive."""
        if self.signalled:
            self.runtime_depth = 1
            self.task = None
            self.has_deferred = self.interrupt_pending = False
            return
        with self.guard:
            self.task = None
            self.has_deferred = self.interrupt_pending = False
            self.runtime_depth = 1

    def enter_user_code(self) -> None:
        """Leave the runtime for user code of the task; raise an interrupt put off."""
        if self.signalled:
            self.runtime_depth = 0
            if self.has_deferred or self.task.interrupted:
                self.interrupt_pending = self.interrupt_pending or self.task.interrupted
                self.raise_deferred()
            return
        with self.guard:
            self.runtime_depth = 0
            pending = self.has_deferred
        if pending or self.task.interrupted:
            self.interrupt_pending = self.interrupt_pending or self.task.interrupted
            self.raise_deferred()

    def leave_user_code(self) -> None:
        """Come back into the runtime from user code of the task."""
        if self.signalled:
            self.runtime_depth = 1
            return
        with self.guard:
            self.runtime_depth = 1
        # An exception set before that is raised here at the latest, and not after `end`.  To
        # take it back there is no way: done when none is set, it leaves CPython 3.11 with a
        # flag that slows every call down, and in which a traced thread loops for ever.
        _checkpoint()


def _checkpoint() -> None:
    """Do nothing; on entering a function Python raises what was set from another thread."""


def _raise_in(ident: int, kind: type[BaseException]) -> None:
    """Raise `kind` in another thread, when it next calls or returns from a function or goes round a loop."""
    _raising_in(ident, kind)()


def _raising_in(ident: int, kind: type[BaseException]) -> Callable[[], object]:
    """Return what does that, in C."""
    import ctypes

    raising = ctypes.pythonapi.PyThreadState_SetAsyncExc
    return functools.partial(raising, ctypes.c_ulong(ident), ctypes.py_object(kind))


def is_interrupt(error: BaseException) -> bool:
    """Return whether an error of a function that the calling thread ran interrupts this thread itself.

    That is Ctrl-C on process 1's main thread, or the interrupt of the remote call that the thread
    runs, or what a handler of another signal raised; a KeyboardInterrupt on another thread, as a
    SystemExit on any, is the function's own.
    """
    thread_state = current()
    own = isinstance(error, KeyboardInterrupt) and (thread_state.main or thread_state.task is not None)
    return own or is_interruption(error)


class _Local(threading.local):
    """The thread state of each thread."""

    thread_state: ThreadState | None = None
    start: Any = None  # the last collection on it, by its dict


_local = _Local()

#: The collection that began last, and the one that ended last, by the dict that the collector gives its
#: callbacks; the phase that came last is the last key.
_phases: dict[str, Any] = {"start": None, "stop": None}
gc.callbacks += [_phases.pop, _phases.__setitem__, functools.partial(setattr, _local)]


def collecting() -> bool:
    """Return whether the collector runs on this thread, which is then inside a finalizer.

    What is raised there is lost. So a finalizer of the runtime's own that would deliver an interrupt leaves
    what it has to do to another thread, also where it might do it.
    """
    start = _phases["start"]
    # Asked once more at the end: collections of other threads may have come between.
    return start is _local.start and list(_phases)[-1] == "start" and start is _phases["start"]


def collection_runs() -> bool:
    """Return whether the collector runs, on any thread: what it drops may not all have been noted yet."""
    return list(_phases)[-1] == "start"


def finalizing() -> bool:
    """Return whether this is a finalizer that the collector runs on a thread inside the runtime."""
    state = current()
    return state.runtime_depth > 0 and state.collection_at_entry is not _phases["start"] and collecting()


def current() -> ThreadState:
    """Return the calling thread's thread_state."""
    thread_state = _local.thread_state
    if thread_state is None:
        thread_state = ThreadState()
        thread_state.main = thread_state.ident == threading.main_thread().ident
        thread_state.runtime_depth = int(is_own())
        _local.thread_state = thread_state
    return thread_state
