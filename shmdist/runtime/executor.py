"""Runs incoming calls, from the frame to the answer.

A call is in ``queued`` from the moment its frame is read, and in ``running`` from the
moment a thread begins with it.  Whoever takes it *out* of a table owns what comes next,
and taking out of a dict is one atomic step:

- out of ``queued``: the thread that runs it, or the canceller, who answers "not run";
- out of ``running``: the thread that ran it, or the canceller who answers for a thread
  that sits in a system call which no Python exception can end.  The late result of such
  a thread is dropped.

Calls of one link start in the order in which they were read, whichever threads they are
given to: each takes a ticket, and goes through the link's gate when its arguments are
read and its turn has come. One that stands still while its arguments are read (it sleeps, waits for a
lock or for a remote call) loses its place when the next call is ready: it holds up itself alone. One that
gets on keeps its place, however slow: to import a package or to read a large argument may take seconds,
and what the next call finds must not depend on that. `_MAX_GATE_SECONDS` bounds this.
A call that is refused gives its place up without waiting for its turn.

What tells an error must not need what is lacking: memory and descriptors that are kept back
(``runtime.reserve``) are given up for as long as that takes.
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from shmdist._firmly import firmly
from shmdist.errors import (
    CapturedException,
    ProcessExitedException,
    SerializationError,
    add_note,
    capture,
    drop_tracebacks,
)
from shmdist.memory.progress_page import BEGUN, LANES, ProgressPage
from shmdist.refcount.table import RRID, AlreadySet
from shmdist.runtime import forked_child
from shmdist.runtime.contexts import CallContext
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.function_store import FunctionStore
from shmdist.runtime.interrupts import ThreadState, current
from shmdist.runtime.requests import RequestClient
from shmdist.runtime.reserve import Reserve
from shmdist.runtime.sharing import SharedMemory
from shmdist.runtime.thread_frames import frames_of
from shmdist.serialization import atoms, codec, function_names, pickled_functions
from shmdist.transport import native
from shmdist.transport.link import Link
from shmdist.transport.messages import (
    BROKEN,
    BY_ID,
    BY_NAME,
    BY_VALUE,
    HAS_REFS,
    IS_ERROR,
    NOT_RUN,
    STORED,
    WANT_STORE,
    WANT_VALUE,
    Frame,
    Kind,
)

_RESULT = int(Kind.RESULT)
_GATE_LOOK_SECONDS = 0.25  # between two looks at a call whose arguments are read while the next one waits
_IDLE_CPU_SECONDS = 1e-3  # of processor time between two looks below which it stands still
_MAX_GATE_SECONDS = 60.0  # that it may hold that up while it gets on
_IMPORT = "<frozen importlib._bootstrap>"  # in the frames of an import
_SMALL_ATOM_BYTES = 1 << 12  # of an atom, which cannot change, of which a copy goes ahead of any fetch
_REPEAT_SIGNAL_SECONDS = 0.02  # until it is looked whether a signal has come
_INTERRUPT_GRACE_SECONDS = 0.1  # a call gets to end by itself when it is interrupted


def _begin_in_c(page: ProgressPage, lane: int, call_id: int) -> bool:
    begun: bool = native.module.begin(page.numbers, BEGUN + lane % LANES, LANES, call_id)
    return begun


#: The same in C takes a quarter of the time, which each batch of a map pays.
_begin = ProgressPage.begin if native.module is None else _begin_in_c


class IncomingCall:
    """One remote call."""

    __slots__ = (
        "cancelled",
        "frame",
        "interrupted",
        "key",
        "link",
        "refusal",
        "stored",
        "thread_state",
        "ticket",
    )

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.link = frame.link
        self.key = (self.link.pid, frame.call_id)
        self.interrupted = False
        self.stored = False  # its Future has its outcome; whether that is told is another matter
        self.cancelled = False  # the outcome of its Future is decided: a Cancelled
        self.thread_state: ThreadState | None = None
        self.ticket = -1
        self.refusal: Exception | None = None  # why it is not run

    def __repr__(self) -> str:
        return f"<IncomingCall {self.key[1]} of process {self.key[0]}, lane {self.frame.lane}>"


class CallExecutor:
    """The calls that this process runs or is going to run.

    Parameters
    ----------
    requests, counts, sharing, functions : RequestClient, ReferenceCounts, SharedMemory, FunctionStore
        By which it answers, keeps outcomes, returns blocks, and finds functions that were sent ahead.
    reserve : Reserve
        Given up for as long as an error is told that says that something is lacking.
    flush_output : callable
        Writes out what calls printed, before their results go.
    """

    def __init__(
        self,
        requests: RequestClient,
        counts: ReferenceCounts,
        sharing: SharedMemory,
        functions: FunctionStore,
        reserve: Reserve,
        flush_output: Callable[[], None],
    ) -> None:
        self._requests, self._counts, self._sharing = requests, counts, sharing
        self._functions, self._reserve, self._flush_output = functions, reserve, flush_output
        self._reactor = requests.reactor
        self.queued: dict[tuple[int, int], IncomingCall] = {}
        self.running: dict[tuple[int, int], IncomingCall] = {}
        self.context = CallContext()
        #: A local worker's, on which process 1 takes calls back (``memory.progress_page``).
        self.page: ProgressPage | None = None

    def __repr__(self) -> str:
        return f"<CallExecutor {len(self.running)} running, {len(self.queued)} queued>"

    def accept(self, frame: Frame) -> IncomingCall:
        """Make the task of a CALL frame; on the reading thread."""
        task = IncomingCall(frame)
        if frame.flags & WANT_STORE:
            # Now, not when it ends: others may ask for the value before it is there.
            self._counts.create(RRID(*task.key), "future", task.key[0])
        self.queued[task.key] = task
        return task

    def run(self, task: IncomingCall, thread_state: ThreadState) -> None:
        """Run `task` on this thread, whose thread state is `thread_state`, at depth 1."""
        key = task.key
        if key in self.running:
            return  # it was handed out twice, for the first time raised when it was done
        self.running[key] = task
        if self.queued.pop(key, None) is None:  # cancelled before it began
            self.running.pop(key, None)
            self._pass_gate(task)
            return
        frame = task.frame
        page = self.page
        if frame.lane and page is not None and key[0] == 1 and not _begin(page, frame.lane, key[1]):
            self.running.pop(key, None)
            self._pass_gate(task)
            self._answer_not_run(task)
            return
        payload: codec.Payload | None = None
        function: Any
        args: Any
        kwargs: Any
        value: Any = None
        error: BaseException | None = None
        thread_state.begin(task)
        task.thread_state = thread_state
        try:
            try:
                # Not exposed yet: reading may import modules, and an import that is interrupted
                # leaves locks behind on which other calls would wait for ever.
                function, args, kwargs = self._read(task)
                if task.ticket >= 0:
                    self._pass_gate(task)
                context = self.context.base.copy()
                if self.context.prepare is not None:
                    context.run(self.context.prepare)
                thread_state.enter_user_code()
                value = context.run(function, *args, **kwargs)
                if frame.flags & WANT_VALUE:
                    payload = _dump_value(value, function)
            finally:
                thread_state.leave_user_code()
        except BaseException as caught:
            error = caught
            if _lacks_means(caught):
                self._reserve.open()
        thread_state.end()
        if task.ticket >= 0:
            self._pass_gate(task)
        # From here on nothing of the call's arguments may be held: their memory goes back
        # with the answer, or is itself the answer.
        function = args = kwargs = None
        # A reference in the result has no other count here than the result's, until the answer has told one.
        if not frame.flags & WANT_STORE and (payload is None or not payload.refs):
            value = None
        if self.running.pop(key, None) is None:  # somebody answered for it, or will in the parent
            if forked_child.is_child():
                forked_child.end(error)
            return
        try:
            self._finish(task, value, error, payload)
        except Exception as failure:
            if error is not None:
                self._finish_again(task, error)
            else:
                error = failure
                self._reserve.open()
                firmly(self._last_resort, task, failure)
        finally:
            if error is not None:
                self._reserve.fill()
            # Its traceback holds this frame, and those of the call, with the arguments in them.
            error = None

    def refuse(self, task: IncomingCall, error: BaseException) -> None:
        """Answer for a call that cannot be run, with an error; runs nothing of the user's."""
        queued, running = self.queued.pop(task.key, None), self.running.pop(task.key, None)
        if queued is not None or running is not None:  # else it is answered
            firmly(self._refuse, task, error)

    def _refuse(self, task: IncomingCall, error: BaseException) -> None:
        """Answer for a call with an error; again after one."""
        self._give_place_up(task)
        task.frame.body, task.frame.buffers = b"", []  # references in it go back
        task.frame.flags &= ~HAS_REFS
        self._finish_again(task, error)

    def _finish_again(self, task: IncomingCall, error: BaseException) -> None:
        """Answer with an error for a call, in the plainest way where no other one works."""
        self._reserve.open()
        try:
            self._finish(task, None, error, None)
        except Exception as failure:
            firmly(self._last_resort, task, failure)

    def _finish(
        self, task: IncomingCall, value: Any, error: BaseException | None, payload: codec.Payload | None
    ) -> None:
        """Answer for a call that has ended."""
        frame = task.frame
        store = frame.flags & WANT_STORE
        self._flush_output()
        if store:
            self._store(task, value, error)
        elif error is not None:
            self._answer_error(task, error)
        elif payload is not None:
            try:
                if payload.buffers:
                    self._sharing.mark_moving(payload, task.link.pid)
                self._requests.answer(task.link, frame.call_id, 0, payload)
            except BaseException:
                self._sharing.blocks.stay(payload)
                raise

    def _last_resort(self, task: IncomingCall, failure: BaseException) -> None:
        """Answer in the plainest way: the answer itself could not be made."""
        kind = MemoryError if isinstance(failure, MemoryError) else RuntimeError
        text = f"the outcome of the call could not be sent: {type(failure).__name__}: {failure!s:.500}"
        captured = CapturedException(kind(text), kind.__name__, text, f"{kind.__name__}: {text}")
        if task.frame.flags & WANT_STORE:
            with contextlib.suppress(AlreadySet):
                self._counts.store(task.key, None, captured)
        blob = pickle.dumps(captured, 5)
        payload = codec.pickled((self._requests.pid, captured.type_name, text, captured.traceback_text, blob))
        flags = IS_ERROR | (STORED if task.frame.flags & WANT_STORE else 0)
        self._requests.answer(task.link, task.frame.call_id, flags, payload)

    def _read(self, task: IncomingCall) -> Any:
        """Read function and arguments of `task`."""
        frame = task.frame
        if frame.flags & BROKEN:
            raise MemoryError("this process had no memory to receive the call's arguments")
        try:
            if frame.flags & HAS_REFS or frame.buffers:
                call = codec.loads(frame, self._counts.give_back)
            else:
                by = frame.flags & (BY_NAME | BY_VALUE)
                if by != BY_NAME:
                    codec.prepare(frame.body)
                call = _LOADS[by](frame.body)
        except Exception as error:
            hint = codec.unreadable(error, "the call's function or arguments").args[0]
            add_note(error, f"{hint} (on process {self._requests.pid}, {sys.executable})")
            raise
        frame.body = b""  # the arguments are what is needed of it
        frame.buffers = []
        if frame.flags & BY_ID:
            return self._functions.get(task.link.pid, call[0]), call[1], call[2]
        return call

    def _pass_gate(self, task: IncomingCall) -> None:
        """Wait for the calls before this one to have started, then let the next start."""
        ticket, link = task.ticket, task.link
        if ticket < 0:
            return
        if link.calls_started < ticket:
            with link.gate:
                turn = link.at_gate[ticket] = threading.Condition(link.gate)
                try:
                    self._wait_for_turn(link, ticket, turn)
                finally:
                    del link.at_gate[ticket]
        if link.calls_started <= ticket:  # else it has lost its place
            link.calls_started = ticket + 1
        task.ticket = -1
        # Looked at after that: who gives his place up enters it here, and then looks whose turn it is.
        if link.at_gate or link.given_up:
            with link.gate:
                link.start_next(-1)

    def _wait_for_turn(self, link: Link, ticket: int, turn: threading.Condition) -> None:
        """Wait until the calls of a link before this one have started, or stand still; its gate is held.

        Only who is next looks what the others do.
        """
        head, since, looked, seen = -1, 0.0, 0.0, None
        while link.calls_started < ticket and not link.closed:
            first = ticket == min(link.at_gate)
            if turn.wait(_GATE_LOOK_SECONDS if first else _MAX_GATE_SECONDS) or not first:
                continue
            now = time.monotonic()
            if head != link.calls_started:
                head, since, seen = link.calls_started, now, None
            elif now - looked > 2 * _GATE_LOOK_SECONDS:
                seen = None  # this thread could not run either
            used = self._time_used(link, head)
            stands = used is not None and seen is not None and abs(used - seen) < _IDLE_CPU_SECONDS
            if stands or now - since > _MAX_GATE_SECONDS:
                link.start_next(head)
            seen, looked = used, now

    def _time_used(self, link: Link, ticket: int) -> float | None:
        """Return the processor seconds of the thread that reads a call's arguments.

        -1 when the call has ended, or waits in the runtime; None when it gets on without using any.
        """
        known = [*self.queued.values(), *self.running.values()]
        thread_states = [task.thread_state for task in known if task.link is link and task.ticket == ticket]
        if not thread_states:
            return -1.0
        thread_state = thread_states[0]
        if thread_state is None:
            return None  # it is about to begin
        if thread_state.leading or thread_state.waits_for is not None:
            return -1.0
        if any(frame.f_code.co_filename == _IMPORT for frame in frames_of(thread_state.ident)):
            return None
        clock = getattr(time, "pthread_getcpuclockid", None)  # not on macOS
        return 0.0 if clock is None else time.clock_gettime(clock(thread_state.ident))

    def _give_place_up(self, task: IncomingCall) -> None:
        """Let the next call start, when it comes to that, without this one; never waits."""
        ticket, link = task.ticket, task.link
        if ticket >= 0:
            task.ticket = -1
            with link.gate:
                link.given_up.add(ticket)
                link.start_next(-1)

    def abandon(self) -> None:
        """Leave all calls to the parent, in a forked child; one that forked ends the child when it ends."""
        thread_state = current()
        if thread_state.task is not None:
            thread_state.guard = threading.RLock()  # its holder may be a thread of the parent
        if isinstance(thread_state.task, IncomingCall):
            thread_state.task.frame.flags &= ~(WANT_VALUE | WANT_STORE)
            forked_child.note()
        self.running.clear()

    # ------------------------------------------------------------------ answers

    def _store(self, task: IncomingCall, value: Any, error: BaseException | None) -> None:
        """Keep the outcome here as the caller's Future, and tell him that it is there."""
        requests = self._requests
        frame = task.frame
        captured = None
        if task.cancelled:
            self._store_cancelled(task)
            self._reactor.post(task.link, _RESULT, NOT_RUN, frame.call_id)
            return
        if error is not None:
            captured = capture(error)
            drop_tracebacks(error)
        if not task.stored:  # to tell it may be tried again
            self._counts.store(task.key, value, captured)
            task.stored = True
        if captured is not None:
            requests.answer(task.link, frame.call_id, STORED | IS_ERROR, requests.dump_error(captured))
        elif type(value) in atoms.ATOMS and sys.getsizeof(value) < _SMALL_ATOM_BYTES:
            requests.answer(task.link, frame.call_id, STORED, codec.dumps(value))
        else:
            requests.answer(task.link, frame.call_id, STORED, None)

    def _answer_error(self, task: IncomingCall, error: BaseException) -> None:
        requests = self._requests
        captured = capture(error)
        if task.frame.flags & WANT_VALUE:
            requests.answer(task.link, task.frame.call_id, IS_ERROR, requests.dump_error(captured))
        elif not (self._reactor.closing and isinstance(error, ProcessExitedException)):  # all of them end
            # remote_do: no thread waits, so it is printed where it happened
            text = f"remote_do failed on process {self._requests.pid}:\n{captured.traceback_text}"
            print(text, file=sys.stderr)  # noqa: T201 - the contract

    # ------------------------------------------------------------------ interrupts

    def cancel(self, key: tuple[int, int], *, for_good: bool = False) -> bool:
        """Give up a call: withdraw it, or interrupt it; False when it is not here.

        `for_good` ends the wait of all who hold its Future at once, whenever the call itself ends.
        """
        if self.withdraw(key):
            return True
        task = self.running.get(key)
        if task is None:
            return False
        if for_good and task.frame.flags & WANT_STORE:
            task.cancelled = True
        self.interrupt(task)
        if task.cancelled:
            self._reactor.soon(lambda: self._store_cancelled(task))
        return True

    def withdraw(self, key: tuple[int, int]) -> bool:
        """Take back a call that has not begun, and answer so; False when it has."""
        task = self.queued.pop(key, None)
        if task is not None:
            firmly(self._answer_not_run, task)
        return task is not None

    def _answer_not_run(self, task: IncomingCall) -> None:
        """Answer for a call that will not begin; again after an error."""
        # The task may lie in its lane for long yet; what it would have worked on, goes back.
        task.frame.body, task.frame.buffers = b"", []
        task.frame.flags &= ~HAS_REFS
        if task.frame.flags & WANT_STORE:
            self._reactor.soon(lambda: self._store_cancelled(task))
        self._reactor.post(task.link, _RESULT, NOT_RUN, task.frame.call_id)

    def _store_cancelled(self, task: IncomingCall) -> None:
        """Let the Future of a call be a cancelled one, unless it has its value already."""
        from shmdist._cancelled import Cancelled  # not on the start-up path, nor on the thread that reads

        what = f"a call of process {task.key[0]} was cancelled"
        with contextlib.suppress(AlreadySet):
            self._counts.store(task.key, None, capture(Cancelled(what, task.key)))

    def interrupt(self, task: IncomingCall) -> None:
        """Raise KeyboardInterrupt in a running call."""
        if task.interrupted:
            return
        task.interrupted = True
        thread_state = task.thread_state
        if thread_state is None:
            return  # it looks at `interrupted` before it begins
        firmly(thread_state.interrupt_call, task)
        later = self._reactor.later
        with contextlib.suppress(Exception):  # no thread can be had: once must do
            if thread_state.signalled:
                later(_REPEAT_SIGNAL_SECONDS, lambda: self._make_sure(task, thread_state))
            else:
                later(_INTERRUPT_GRACE_SECONDS, lambda: self._answer_for(task))

    def _make_sure(self, task: IncomingCall, thread_state: ThreadState) -> None:
        """Repeat a signal: one that comes just before a system call begins does not end that."""
        pause = _REPEAT_SIGNAL_SECONDS
        while self.running.get(task.key) is task and thread_state.task is task:
            if thread_state.interrupt_delivered:
                break
            thread_state.interrupt_call(task)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def interrupt_all(self) -> None:
        """Interrupt every call that runs here, and those that have come and are about to."""
        for task in [*self.queued.values(), *self.running.values()]:
            self.interrupt(task)

    def _answer_for(self, task: IncomingCall) -> None:
        """Answer for a thread that an exception does not reach, in a system call say."""
        if self.running.get(task.key) is not task or self.running.pop(task.key, None) is None:
            return
        error = KeyboardInterrupt("interrupted in a system call; its thread ends when the call returns")
        if task.frame.flags & WANT_STORE:
            self._store(task, None, error)
        else:
            self._answer_error(task, error)


#: What reads a call, by its flags.
_LOADS: dict[int, Callable[[Any], Any]] = {
    0: pickle.loads,
    BY_NAME: function_names.load,
    BY_VALUE: pickled_functions.load,
}


def _lacks_means(error: BaseException) -> bool:
    """Return whether an error says that this process has no more memory, or descriptors."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    )


def _dump_value(value: Any, function: Any) -> codec.Payload:
    """Pickle a result.

    A result that stands for many may leave out those that cannot be sent: the function's
    method ``without_unsendable`` then returns what can.
    """
    try:
        return codec.dumps_value(value, function)
    except SerializationError:
        salvage = getattr(function, "without_unsendable", None)
        if salvage is None:
            raise
        return codec.dumps(salvage(value))
