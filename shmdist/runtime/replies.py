"""Pending replies and operations, and how errors are packed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Protocol

from shmdist._firmly import firmly
from shmdist.errors import CapturedException, RemoteException, capture, remote_exception
from shmdist.runtime.threads import Attempt
from shmdist.runtime.waiting import Waiter
from shmdist.serialization import codec
from shmdist.serialization.channel_items import Item
from shmdist.transport.link import Link
from shmdist.transport.messages import IS_ERROR, NOT_RUN, Frame, Kind

_RESULT = int(Kind.RESULT)


class PendingReply(Waiter):
    """An answer that is waited for.

    Attributes
    ----------
    frame : Frame or None
        The RESULT, not yet read.
    error : BaseException or None
        Why there will be none.
    callback : callable or None
        Called with the reply when its outcome is there, by whoever reads: it must not block, and where
        it raises (it had no memory) it must have done nothing, for it is called again.
        After it `done` is set, unless it has done so, and those who wait are woken.
    """

    __slots__ = ("call_id", "callback", "error", "frame", "pid")

    def __init__(
        self, call_id: int, pid: int, callback: Callable[[PendingReply], None] | None = None
    ) -> None:
        self.done = False
        self.locks = ()
        self.call_id = call_id
        self.pid = pid
        self.callback = callback
        self.frame: Frame | None = None
        self.error: BaseException | None = None


class Responder(Protocol):
    """What answers: the client of requests, which is their server as well."""

    #: Others' operations that are not yet answered, by process and call.
    waiting: dict[tuple[int, int], PendingOperation]

    @property
    def pid(self) -> int:
        """The number of this process."""

    def start(self, job: Callable[[], None], /) -> None:
        """Run a job on another thread."""

    def answer(self, link: Link, call_id: int, flags: int, payload: codec.Payload | None, /) -> bool:
        """Answer a request; False when the other side is gone."""

    def post(self, link: Link, kind: int, flags: int, call_id: int, /) -> None:
        """Send a frame without ever blocking."""

    def dump_error(self, captured: CapturedException, /) -> codec.Payload:
        """Pickle an error that is an answer."""


class PendingOperation:
    """A remote process's request on a reference that lives here: what answers it.

    It is a ``Completion``: a channel resolves or fails it, now or later, from any thread.
    Until it is answered it stands in ``Responder.waiting``, and may be withdrawn; then too it is
    answered, by the word that it was not done. *Exactly one answer goes out.* A withdrawal that comes
    before it is known how it waits is made up for when that is known (:meth:`waits`): of the two
    threads one sets `hurried` and then looks at `_way`, the other one does it the other way round.

    Attributes
    ----------
    given_up : bool
        No thread waits for it any more: it need not even be tried.
    hurried : bool
        It must not wait.
    undo : callable or None
        Given a value that cannot be sent, or that nobody took.
    """

    __slots__ = (
        "_answered",
        "_ended",
        "_responder",
        "_way",
        "call_id",
        "given_up",
        "hurried",
        "link",
        "undo",
    )

    def __init__(self, responder: Responder, link: Link, call_id: int) -> None:
        self._responder = responder
        self.link = link
        self.call_id = call_id
        self.undo: Callable[[Any], None] | None = None
        self.given_up = self.hurried = False
        self._answered = self._ended = False
        self._way: Callable[[], bool] | None = None  # withdraws it; false when it is decided already

    def resolve(self, value: object) -> None:
        """Answer with a value; where that cannot be it is undone, and the answer is the error."""
        try:
            self._end()
            payload = (
                value.to_send() if type(value) is Item else codec.dumps(value, "the value of the reference")
            )
            if payload.buffers:
                # It may have to wait for its receiver, and this thread may be the one that reads.
                self._responder.start(
                    Attempt(lambda: self._answer(value, payload), lambda error: self._undo(value, error))
                )
            else:
                self._answer(value, payload)
        except Exception as error:  # it cannot be pickled; or there is no memory, or no thread
            self._undo(value, error)

    def _answer(self, value: object, payload: codec.Payload) -> None:
        there = self._responder.answer(self.link, self.call_id, 0, payload)
        self._answered = True
        if not there and self.undo is not None:
            firmly(self.undo, value)

    def _undo(self, value: object, error: Exception) -> None:
        """Answer with an error in the place of a value."""
        if not self._answered and self.undo is not None:
            firmly(self.undo, value)
        firmly(self.fail, error)

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        if self._answered:
            return
        self._end()
        responder = self._responder
        if isinstance(error, RemoteException) and error.pid == responder.pid and error.__traceback__ is None:
            captured = error.captured  # a future's own, made from it just now
        else:
            captured = capture(error)
        responder.answer(self.link, self.call_id, IS_ERROR, responder.dump_error(captured))
        self._answered = True

    def not_done(self) -> None:
        """Answer that it was withdrawn; who has withdrawn it calls this."""
        self._end()
        self._responder.post(self.link, _RESULT, NOT_RUN, self.call_id)
        self._answered = True

    def waits(self, way: Callable[[], bool]) -> None:
        """Note how it is withdrawn. It may have been answered meanwhile: then `way` returns false."""
        self._way = way
        if self._ended:
            self._way = None  # it holds the operation itself, most likely
        elif self.hurried and way():
            firmly(self.not_done)

    def withdraw(self, *, given_up: bool) -> None:
        """Let it wait no longer; on the reading thread."""
        if given_up:
            self.given_up = True
        self.hurried = True
        way = self._way
        if way is not None and way():
            firmly(self.not_done)

    def _end(self) -> None:
        self._ended = True
        self._way = None
        self._responder.waiting.pop((self.link.pid, self.call_id), None)


def pack_error(captured: CapturedException) -> tuple[Any, ...]:
    """Make an error ready to be sent so that it arrives whatever the exception inside is like.

    Returns
    -------
    tuple
        Name of its type, its message and the text of its traceback; and pickles of it, one of which can
        be read where the class is known.
    """
    pickles = []
    try:
        pickles.append(codec.pickle_whole(captured))
    except Exception:
        pass
    if not pickles or captured.has_own_pickling:  # which may fail where it is read
        try:
            pickles.append(codec.pickle_whole(captured.by_fields(_sendable)))
        except Exception:
            pass
    if not pickles:
        pickles.append(codec.pickle_whole(captured.stand_in()))
    return captured.type_name, captured.message, captured.traceback_text, *pickles


def _sendable(value: Any) -> bool:
    try:
        codec.pickle_whole(value)
    except Exception:
        return False
    return True


def unpack_error(pid: int, type_name: str, message: str, text: str, *pickles: bytes) -> RemoteException:
    """Return the error of process `pid` that :func:`pack_error` packed."""
    captured = None
    for each in pickles:
        try:
            captured = pickle.loads(each)
            break
        except Exception as error:
            failure = error
    if captured is None:
        note = f"\n(the exception itself could not be unpickled here: {type(failure).__name__}: {failure})\n"
        captured = CapturedException(RuntimeError(message), type_name, message, text + note)
        return RemoteException(pid, captured)
    try:
        captured.traceback_text = _with_source(captured.traceback_text)
    except Exception:
        pass  # an adornment
    return remote_exception(pid, captured)


def _with_source(text: str) -> str:
    """Put lines of source in a traceback that the process which made it could not read.

    Functions that go by value may come from a notebook's cells, or from files on this host alone.
    """
    import linecache
    import re

    lines = text.split("\n")
    for place in range(len(lines) - 1, -1, -1):
        frame = re.match(r'( *)File "(.+)", line (\d+), in ', lines[place])
        if frame is None or "".join(lines[place + 1 : place + 2]).startswith(frame[1] + "  "):
            continue
        source = linecache.getline(frame[2], int(frame[3])).strip()
        if source:
            lines.insert(place + 1, f"{frame[1]}  {source}")
    return "\n".join(lines)
