"""The state of a thread: what it runs, and when it may be interrupted. Defers and delivers interrupts.

An interrupt (Ctrl-C on process 1, ``interrupt``/cancel on a worker) is an exception that
Python raises between two bytecodes.  Inside the runtime that would be the end of a
half-read frame or of a lock, so there it is put off:

- ``depth`` > 0 means that the thread is inside the runtime.  An interrupt then only sets
  ``pending`` and wakes the thread if it waits; the runtime raises it with
  :meth:`ThreadState.deliver` where nothing is half done.
- ``depth`` == 0 means that user code runs, and an interrupt is raised right there. What changes
  tables, or holds a lock that others need, is never done there: ``with current():``.

On process 1 the main thread enters the runtime by putting its own SIGINT handler in
place and leaves by putting the former one back: whatever program shmdist is used in
keeps its own handling of Ctrl-C.  From the moment the handler is in place interrupts are
put off, so there is no gap between the handler and ``depth``. Handlers of other signals, which
may raise as well, are in ``runtime.deferred_signals``, on a worker's main thread too.

Finalizers
----------
The garbage collector may run wherever Python allocates, also where this thread holds a lock of the
runtime or reads the links. A finalizer that it runs there must not take a lock, send or wait: the thread
would wait for itself. Hence three rules:

- *A lock of the runtime is taken at ``depth`` > 0 only*: by a thread that has entered, or one of the
  runtime's own.
- *Who enters where a collection has begun at ``depth`` > 0 gets an error* (:meth:`ThreadState.enter`). So a
  finalizer comes to no lock there, and what it asks for fails with a text that says why. It works as
  anywhere else where the collection began in user code. Finalizers of the runtime's own ask
  :func:`collecting` first and leave what they have to do to another thread (``node.hand_over``), or only
  append to a deque.
- *No object of a user is dropped while a lock is held*, for its finalizer runs there and then, without a
  collection. Where one is dropped by the thread that reads, it cannot wait (``Reactor.wait``).

That a collection runs, and on which thread, is noted by functions in C: what the handler of a signal
raises in a callback of the collector would be lost. :attr:`ThreadState.since` tells whether the collection
began before this thread entered, by a finalizer in user code, or after.
"""

from __future__ import annotations

# The C half of `signal`, which has no stubs: the wrapper costs two microseconds an entry.
import _signal  # type: ignore[import-not-found]  # has no stubs
import functools
import gc
import math
import os
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

_SIGINT, _DEFAULT = int(signal.SIGINT), int(signal.SIG_DFL)


_adding = threading.Lock()  # guards the locks of all cells; nothing else is done while it is held


def _after_fork() -> None:
    """Make the lock anew in a forked child: its holder may be a thread of the parent."""
    global _adding
    _adding = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Waiter:
    """Something that threads wait for.

    Attributes
    ----------
    done : bool
        Set once, by whoever completes the cell; then `locks` are released.
    locks : tuple of lock
        Where the waiting threads sleep while another one reads for them.
    """

    __slots__ = ("__weakref__", "done", "locks")
    #: Whoever completes it knows how to wake a thread that reads (``Reactor.complete``).
    kicked = True

    def __init__(self) -> None:
        self.done = False
        self.locks: tuple[Any, ...] = ()

    def add(self, lock: Any) -> None:
        """Let a thread sleep on `lock` until the cell is done."""
        with _adding:
            self.locks += (lock,)

    def remove(self, lock: Any) -> None:
        """The thread sleeps no more."""
        with _adding:
            self.locks = tuple(each for each in self.locks if each is not lock)

    def wake(self) -> None:
        """Wake the threads that sleep here, done or not."""
        for lock in self.locks:
            try:
                lock.release()
            except RuntimeError:
                pass  # awake already


class WakeCallback:
    """Stands for the lock of a cell whose thread does not sleep on a lock, but reads."""

    __slots__ = ("release",)

    def __init__(self, kick: Callable[[], None]) -> None:
        self.release = kick


class ThreadState:
    """The runtime's side of one thread.

    `guard` orders the interrupts of a remote call against the runtime's entries and exits
    of the thread that runs it; without a call nobody else writes here. The same thread may take it again:
    nothing is called while it is held, but a profiler or debugger in Python, and that may run the collector.
    """

    __slots__ = (
        "cell",
        "cut",
        "depth",
        "due",
        "guard",
        "handler",
        "handlers",
        "ident",
        "kick",
        "leading",
        "main",
        "own",
        "pending",
        "previous",
        "signalled",
        "since",
        "struck",
        "task",
        "until",
    )

    def __init__(self) -> None:
        self.depth = 0
        self.pending = False  # something is to be delivered
        self.due = False  # and that is an interrupt of the task
        self.cell: Waiter | None = None  # what it sleeps on
        self.leading = False  # it reads the links
        self.kick: Callable[[], None] | None = None  # wakes it when it reads
        self.task: Any = None  # the remote call it runs, a runtime.task.Task
        self.main = False  # process 1's main thread, where Python runs signal handlers
        self.signalled = False  # a worker's main thread: interrupted by a signal
        self.struck = False  # the interrupt of this task has come
        self.cut: Any = None  # the collection in whose finalizers it came, by its dict
        self.handler = self._on_sigint
        self.previous: Any = None  # the SIGINT handler found on entering
        self.handlers = DeferredSignalHandlers(self._on_signal)  # of other signals; of main threads alone
        self.own = 0  # the last call of this thread to its own process (``own_calls``)
        self.until = math.inf  # by the monotonic clock: what is not written by then is given up
        self.since: Any = None  # the collection that had begun last when this thread entered
        self.guard = threading.RLock()
        self.ident = threading.get_ident()

    def __repr__(self) -> str:
        return f"<ThreadState depth={self.depth} pending={self.pending} task={self.task!r}>"

    def enter(self) -> None:
        """Enter the runtime: from here on interrupts are put off.

        Raises
        ------
        FinalizerError
            A finalizer calls this, and the thread is inside the runtime already.
        """
        if self.depth:
            if self.since is not _phases["start"] and collecting():
                raise FinalizerError(
                    "a finalizer (__del__, or a callback of a weak reference) cannot do this here: the"
                    " garbage collector ran it while shmdist was at work on this thread. Close what must be"
                    " closed explicitly, or use remote_do, which another thread then sends"
                )
        else:
            self.since = _phases["start"]
        if self.main and not self.depth:
            try:
                self.handlers.enter()
                self.previous = _signal.signal(_SIGINT, self.handler)
            except BaseException:
                self._give_back()
                raise
        elif self.task is not None:
            try:
                if self.signalled and not self.depth:
                    self.handlers.enter()
                with self.guard:
                    self.depth += 1
            except BaseException:
                self._give_back()
                raise
            return
        self.depth += 1

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *failure: object) -> None:
        self.leave()

    def look(self) -> None:
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
                    self.depth -= 1
            finally:
                if not self.depth and (self.handlers.taken or self.pending):
                    self._give_back()
            return
        self.depth -= 1
        if self.main and not self.depth:
            try:
                # None: a handler that was not installed from Python; it cannot be put back.
                previous = self.previous
                found = _signal.signal(_SIGINT, _DEFAULT if previous is None else previous)
                if found is not self.handler:  # the program has set another one meanwhile
                    _signal.signal(_SIGINT, found)
            finally:
                if self.handlers.taken or self.pending:
                    self._give_back()

    def _give_back(self) -> None:
        """Give the handlers their places back, and deliver what came meanwhile; outside the runtime."""
        try:
            self.handlers.give_back()
        finally:
            if self.pending:
                self.deliver()

    def _on_sigint(self, signum: int, stack: Any) -> None:
        self.due = self.pending = True
        self.wake()

    def _on_signal(self, signum: int, stack: Any) -> None:
        self.handlers.caught.append(signum)
        self.pending = True
        self.wake()

    def wake(self) -> None:
        """Wake the thread out of its wait, so that it sees `pending`.  Takes no lock."""
        if self.leading and self.kick is not None:
            self.kick()
        cell = self.cell
        if cell is not None:
            cell.wake()

    def interrupted(self) -> bool:
        """Tell whether an interrupt was put off, or the time is up."""
        return self.pending or time.monotonic() > self.until

    def stop(self) -> None:
        """Raise that for which this was :meth:`interrupted`; nothing may be half done here."""
        if self.pending:
            self.deliver()
        else:
            raise TimeoutError("not sent in time: the process does not read")

    def deliver(self) -> None:
        """Raise the interrupt, and call the handlers, that were put off; nothing may be half done here."""
        caught = self.handlers.caught
        while caught:
            number = caught.pop(0)
            handler = self.handlers.handler(number)
            self.pending = bool(caught) or self.due
            if callable(handler):
                self._call(handler, number)
        due, self.due, self.pending = self.due, False, False
        if not due:
            return
        if self.task is not None:
            self.struck = self.struck or not collecting()
            raise KeyboardInterrupt
        if self.main:
            previous = self.previous
            if callable(previous):
                self._call(previous, _SIGINT)
            elif previous == signal.SIG_DFL:
                raise KeyboardInterrupt

    def _call(self, handler: Callable[[int, Any], Any], number: int) -> None:
        """Call a handler of the program's, for which the time limit of what it ends does not hold."""
        until, self.until = self.until, math.inf
        try:
            handler(number, sys._getframe(2))
        finally:
            self.until = until

    # -------------------------------------------------- interrupting a remote call

    def interrupt_call(self, task: Any) -> None:
        """Raise KeyboardInterrupt in `task`, if this thread runs it; from another thread."""
        if self.signalled:
            signal.pthread_kill(self.ident, _SIGINT)  # reaches system calls as well
            return
        with self.guard:
            if self.task is not task:
                return
            if self.depth:
                self.due = self.pending = True
                self.wake()
            else:
                _raise_in(self.ident, KeyboardInterrupt)

    def on_signal(self, signum: int, stack: Any) -> None:
        """Handle SIGINT on a worker's main thread, for good; an idle one is unharmed."""
        task = self.task
        # Once for a task: a Ctrl-C that a terminal sends as well must not hit what clears up after it.
        if task is None or not task.interrupted or self.struck:
            return
        if collecting():  # a finalizer is broken off, once; what it raises is lost, so the signal is repeated
            if self.cut is _phases["start"]:
                return
            self.cut = _phases["start"]
        else:
            self.struck = True
        if self.depth:
            self.due = self.pending = True
            self.wake()
        else:
            raise KeyboardInterrupt

    def again(self) -> Ending:
        """Return what brings an interrupt once more when it ends: in a finalizer what is raised is lost.

        The finalizer keeps it in a variable of its own, so that it ends with the finalizer's frame.
        """
        if self.main or self.signalled:
            self.struck = False
            return Ending(interrupt_main)
        return Ending(_raising_in(self.ident, KeyboardInterrupt))

    def begin(self, task: Any) -> None:
        """Begin to run `task` on this thread; the runtime's depth is 1."""
        if self.signalled:  # nobody else writes here
            self.pending = self.due = self.struck = False
            self.task = task
            return
        with self.guard:
            self.task = task
            self.pending = self.due = self.struck = False

    def end(self) -> None:
        """End the task: from here on no interrupt of it can arrive."""
        if self.signalled:
            self.depth = 1
            self.task = None
            self.pending = self.due = False
            return
        with self.guard:
            self.task = None
            self.pending = self.due = False
            self.depth = 1

    def expose(self) -> None:
        """Leave the runtime for user code of the task; raise an interrupt put off."""
        if self.signalled:
            self.depth = 0
            if self.pending or self.task.interrupted:
                self.due = self.due or self.task.interrupted
                self.deliver()
            return
        with self.guard:
            self.depth = 0
            pending = self.pending
        if pending or self.task.interrupted:
            self.due = self.due or self.task.interrupted
            self.deliver()

    def cover(self) -> None:
        """Come back into the runtime from user code of the task."""
        if self.signalled:
            self.depth = 1
            return
        with self.guard:
            self.depth = 1
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
    """Tell whether an error of a function that the calling thread ran is an interrupt of this thread itself.

    That is Ctrl-C on process 1's main thread, or the interrupt of the remote call that the thread
    runs, or what a handler of another signal raised; a KeyboardInterrupt on another thread, as a
    SystemExit on any, is the function's own.
    """
    strand = current()
    own = isinstance(error, KeyboardInterrupt) and (strand.main or strand.task is not None)
    return own or is_interruption(error)


class _Local(threading.local):
    """The strand of each thread."""

    strand: ThreadState | None = None
    start: Any = None  # the last collection on it, by its dict


_local = _Local()

#: The collection that began last, and the one that ended last, by the dict that the collector gives its
#: callbacks; the phase that came last is the last key.
_phases: dict[str, Any] = {"start": None, "stop": None}
gc.callbacks += [_phases.pop, _phases.__setitem__, functools.partial(setattr, _local)]


def collecting() -> bool:
    """Tell whether the collector runs on this thread, which is then inside a finalizer.

    What is raised there is lost. So a finalizer of the runtime's own that would deliver an interrupt leaves
    what it has to do to another thread, also where it might do it.
    """
    start = _phases["start"]
    # Asked once more at the end: collections of other threads may have come between.
    return start is _local.start and list(_phases)[-1] == "start" and start is _phases["start"]


def collection_runs() -> bool:
    """Tell whether the collector runs, on whichever thread: what it drops may not all have been noted yet."""
    return list(_phases)[-1] == "start"


def finalizing() -> bool:
    """Tell whether this is a finalizer that the collector runs on a thread inside the runtime."""
    strand = current()
    return strand.depth > 0 and strand.since is not _phases["start"] and collecting()


def current() -> ThreadState:
    """Return the calling thread's strand."""
    strand = _local.strand
    if strand is None:
        strand = ThreadState()
        strand.main = strand.ident == threading.main_thread().ident
        strand.depth = int(is_own())
        _local.strand = strand
    return strand


def enter() -> None:
    """Let the calling thread enter the runtime."""
    current().enter()


def leave() -> None:
    """Let the calling thread leave the runtime."""
    current().leave()
