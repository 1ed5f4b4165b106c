"""A remote call in the process that runs it: from the frame to the answer.

A call is in ``queued`` from the moment its frame is read, and in ``running`` from the
moment a thread begins with it.  Whoever takes it *out* of a table owns what comes next,
and taking out of a dict is one atomic step:

- out of ``queued``: the thread that runs it, or the canceller, who answers "not run";
- out of ``running``: the thread that ran it, or the canceller who answers for a thread
  that sits in a system call which no Python exception can end.  The late result of such
  a thread is dropped.

Calls of one link start in the order in which they were read, whichever threads they are
given to: each takes a ticket, and goes through the link's gate when its arguments are
read and its turn has come.
"""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmdist.errors import CapturedException, SerializationError, capture
from shmdist.runtime import children
from shmdist.runtime.reftable import RRID
from shmdist.runtime.strand import current
from shmdist.wire import atoms, codec, names, values
from shmdist.wire.messages import (
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

if TYPE_CHECKING:
    from shmdist.runtime.node import Node
    from shmdist.runtime.strand import Strand

_RESULT = int(Kind.RESULT)
_SMALL = 1 << 12  # bytes of an atom, which cannot change, of which a copy goes ahead of any fetch
_AGAIN = 0.02  # seconds until it is looked whether a signal has come
_GRACE = 0.1  # seconds a call gets to end by itself when it is interrupted


class Task:
    """One remote call."""

    __slots__ = ("frame", "interrupted", "key", "link", "strand", "ticket")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.link = frame.link
        self.key = (self.link.pid, frame.call_id)
        self.interrupted = False
        self.strand: Strand | None = None
        self.ticket = -1

    def __repr__(self) -> str:
        return f"<Task {self.key[1]} of process {self.key[0]}, lane {self.frame.lane}>"


class Tasks:
    """The calls that this process runs or is going to run."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.queued: dict[tuple[int, int], Task] = {}
        self.running: dict[tuple[int, int], Task] = {}

    def __repr__(self) -> str:
        return f"<Tasks {len(self.running)} running, {len(self.queued)} queued>"

    def accept(self, frame: Frame) -> Task:
        """Make the task of a CALL frame; on the reading thread."""
        task = Task(frame)
        if frame.flags & WANT_STORE:
            # Now, not when it ends: others may ask for the value before it is there.
            self._node.create(RRID(*task.key), "future", task.key[0])
        self.queued[task.key] = task
        return task

    def run(self, task: Task, strand: Strand) -> None:
        """Run `task` on this thread, whose strand is `strand`, at depth 1."""
        key = task.key
        self.running[key] = task
        if self.queued.pop(key, None) is None:  # cancelled before it began
            self.running.pop(key, None)
            self._pass_gate(task)
            return
        frame = task.frame
        payload: codec.Payload | None = None
        function: Any
        args: Any
        kwargs: Any
        value: Any = None
        error: BaseException | None = None
        strand.begin(task)
        task.strand = strand
        try:
            try:
                # Not exposed yet: reading may import modules, and an import that is interrupted
                # leaves locks behind on which other calls would wait for ever.
                function, args, kwargs = self._read(task)
                if task.ticket >= 0:
                    self._pass_gate(task)
                strand.expose()
                value = function(*args, **kwargs)
                if frame.flags & WANT_VALUE:
                    payload = _dump_value(value, function)
            finally:
                strand.cover()
        except BaseException as caught:
            error = caught
        strand.end()
        if task.ticket >= 0:
            self._pass_gate(task)
        # From here on nothing of the call's arguments may be held: their memory goes back
        # with the answer, or is itself the answer.
        function = args = kwargs = None
        if not frame.flags & WANT_STORE:
            value = None
        if self.running.pop(key, None) is None:  # somebody answered for it, or will in the parent
            if children.is_child():
                children.end(error)
            return
        try:
            self._finish(task, value, error, payload)
        except Exception as failure:
            self._last_resort(task, failure)
        finally:
            # Its traceback holds this frame, and those of the call, with the arguments in them.
            error = None

    def _finish(
        self, task: Task, value: Any, error: BaseException | None, payload: codec.Payload | None
    ) -> None:
        """Answer for a call that has ended."""
        frame = task.frame
        store = frame.flags & WANT_STORE
        self._node.flush_own_output()
        if store:
            self._store(task, value, error)
        elif error is not None:
            self._answer_error(task, error)
        elif payload is not None:
            if payload.buffers:
                self._node.sharing.mark_moving(payload, task.link.pid)
            self._node.answer(task.link, frame.call_id, 0, payload)

    def _last_resort(self, task: Task, failure: BaseException) -> None:
        """Answer in the plainest way: the answer itself could not be made."""
        kind = MemoryError if isinstance(failure, MemoryError) else RuntimeError
        text = f"the outcome of the call could not be sent: {type(failure).__name__}: {failure!s:.500}"
        captured = CapturedException(kind(text), kind.__name__, text, f"{kind.__name__}: {text}")
        blob = pickle.dumps(captured, 5)
        payload = codec.pickled((self._node.pid, captured.type_name, text, captured.traceback_text, blob))
        flags = IS_ERROR | (STORED if task.frame.flags & WANT_STORE else 0)
        self._node.answer(task.link, task.frame.call_id, flags, payload)

    def _read(self, task: Task) -> Any:
        """Read function and arguments of `task`."""
        frame, node = task.frame, self._node
        if frame.flags & BROKEN:
            raise MemoryError("this process had no memory to receive the call's arguments")
        try:
            if frame.flags & HAS_REFS or frame.buffers:
                call = codec.loads(frame, node.give_back)
            else:
                by = frame.flags & (BY_NAME | BY_VALUE)
                if by != BY_NAME:
                    codec.prepare(frame.body)
                call = _LOADS[by](frame.body)
        except Exception as error:
            hint = codec.unreadable(error, "the call's function or arguments").args[0]
            error.add_note(f"{hint} (on process {node.pid}, {sys.executable})")
            raise
        frame.body = b""  # the arguments are what is needed of it
        frame.buffers = []
        if frame.flags & BY_ID:
            return node.functions.get(task.link.pid, call[0]), call[1], call[2]
        return call

    def _pass_gate(self, task: Task) -> None:
        """Wait for the calls before this one to have started, then let the next start."""
        ticket, link = task.ticket, task.link
        if ticket < 0:
            return
        task.ticket = -1
        if link.calls_started != ticket:
            with link.gate:
                link.gate_waiters += 1
                while link.calls_started != ticket and not link.closed:
                    link.gate.wait()
                link.gate_waiters -= 1
        link.calls_started = ticket + 1
        if link.gate_waiters:
            with link.gate:
                link.gate.notify_all()

    def abandon(self) -> None:
        """Leave all calls to the parent, in a forked child; one that forked ends the child when it ends."""
        strand = current()
        if strand.task is not None:
            strand.task.frame.flags &= ~(WANT_VALUE | WANT_STORE)
            strand.guard = threading.Lock()  # its holder may be a thread of the parent
            children.note()
        self.running.clear()

    # ------------------------------------------------------------------ answers

    def _store(self, task: Task, value: Any, error: BaseException | None) -> None:
        """Keep the outcome here as the caller's Future, and tell him that it is there."""
        node = self._node
        frame = task.frame
        captured = None
        if error is not None:
            captured = capture(error)
            _let_go_of_frames(error)
        node.store(task.key, value, captured)
        if captured is not None:
            node.answer(task.link, frame.call_id, STORED | IS_ERROR, node.dump_error(captured))
        elif type(value) in atoms.ATOMS and sys.getsizeof(value) < _SMALL:
            node.answer(task.link, frame.call_id, STORED, codec.dumps(value))
        else:
            node.answer(task.link, frame.call_id, STORED, None)

    def _answer_error(self, task: Task, error: BaseException) -> None:
        node = self._node
        captured = capture(error)
        if task.frame.flags & WANT_VALUE:
            node.answer(task.link, task.frame.call_id, IS_ERROR, node.dump_error(captured))
        else:  # remote_do: nobody waits, so it is printed where it happened
            print(f"remote_do failed on process {node.pid}:\n{captured.traceback_text}", file=sys.stderr)  # noqa: T201 - the contract

    # ------------------------------------------------------------------ interrupts

    def cancel(self, key: tuple[int, int]) -> bool:
        """Give up a call: withdraw it, or interrupt it; False when it is not here."""
        if self.withdraw(key):
            return True
        task = self.running.get(key)
        if task is None:
            return False
        self.interrupt(task)
        return True

    def withdraw(self, key: tuple[int, int]) -> bool:
        """Take back a call that has not begun, and answer so; False when it has."""
        task = self.queued.pop(key, None)
        if task is not None:
            codec_refs = codec.references(task.frame)
            if codec_refs:
                self._node.give_back(list(codec_refs))
            # The task may lie in its lane for long yet; what it would have worked on, goes back.
            task.frame.body, task.frame.buffers = b"", []
            task.frame.flags &= ~HAS_REFS
            if task.frame.flags & WANT_STORE:
                self._node.store(key, None, capture(KeyboardInterrupt("cancelled before it began")))
            self._node.post(task.link, _RESULT, NOT_RUN, task.frame.call_id)
        return task is not None

    def interrupt(self, task: Task) -> None:
        """Raise KeyboardInterrupt in a running call."""
        if task.interrupted:
            return
        task.interrupted = True
        strand = task.strand
        if strand is None:
            return  # it looks at `interrupted` before it begins
        strand.strike(task)
        later = self._node.dispatcher.later
        if strand.signalled:
            later(_AGAIN, lambda: self._make_sure(task, strand))
        else:
            later(_GRACE, lambda: self._answer_for(task))

    def _make_sure(self, task: Task, strand: Strand) -> None:
        """Repeat a signal: one that comes just before a system call begins does not end that."""
        pause = _AGAIN
        while self.running.get(task.key) is task and strand.task is task and not strand.struck:
            strand.strike(task)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def interrupt_all(self) -> None:
        """Interrupt every call that runs here."""
        for task in list(self.running.values()):
            self.interrupt(task)

    def _answer_for(self, task: Task) -> None:
        """Answer for a thread that an exception does not reach, in a system call say."""
        if self.running.get(task.key) is not task or self.running.pop(task.key, None) is None:
            return
        error = KeyboardInterrupt("interrupted in a system call; its thread ends when the call returns")
        if task.frame.flags & WANT_STORE:
            self._store(task, None, error)
        else:
            self._answer_error(task, error)


#: What reads a call, by its flags.
_LOADS: dict[int, Callable[[Any], Any]] = {0: pickle.loads, BY_NAME: names.load, BY_VALUE: values.load}


def _let_go_of_frames(error: BaseException) -> None:
    """Drop an error's tracebacks, whose text is kept: their frames hold the arguments of the call."""
    errors: list[BaseException | None] = [error]
    seen = set()
    while errors:
        each = errors.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        each.__traceback__ = None
        errors += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            errors += each.exceptions


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


class Functions:
    """Functions sent ahead of their calls, by sender and number; read on first use."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._table: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return len(self._table)

    def put(self, frame: Frame) -> None:
        """Keep a FUNC frame; on the reading thread, so it is not read yet."""
        self._table[frame.link.pid, frame.call_id] = [[frame], threading.Lock(), None]

    def drop(self, pid: int, number: int) -> None:
        """Forget a function."""
        entry = self._table.pop((pid, number), None)
        if entry is not None:
            try:
                frame = entry[0].pop()
            except IndexError:
                return  # it has been read, or is just being
            self._node.give_back(list(codec.references(frame)))

    def forget(self, pid: int) -> None:
        """Forget all functions of a process that is gone."""
        for key in [key for key in self._table if key[0] == pid]:
            self.drop(*key)

    def get(self, pid: int, number: int) -> Any:
        """Return a function, reading it when it is asked for first.

        Raises
        ------
        LookupError
            It was dropped.
        Exception
            Whatever reading it raises; every call of it raises the same.
        """
        entry = self._table.get((pid, number))
        if entry is None:
            raise LookupError(f"function {number} of process {pid} is not kept here any more")
        if entry[2] is None:
            with entry[1]:  # several calls may want it at once; it is read one time
                if entry[2] is None:
                    try:
                        frame = entry[0].pop()  # one step: whoever has it sees to the references in it
                    except IndexError:
                        raise LookupError(f"function {number} of process {pid} was dropped") from None
                    entry[2] = self._read(frame)
        function, failure = entry[2]
        if failure is not None:
            raise failure
        return function

    def _read(self, frame: Frame) -> tuple[Any, Exception | None]:
        """Read a function, or say why it cannot be read."""
        try:
            if frame.flags & BROKEN:
                raise MemoryError("this process had no memory to receive the function")
            return codec.loads(frame, self._node.give_back), None
        except Exception as error:
            error.add_note(codec.unreadable(error, "the function").args[0])
            return None, error
