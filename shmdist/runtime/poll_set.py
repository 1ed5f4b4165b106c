"""Everything a process polls: links, rings, the output of its workers, the ends of processes.

One thread at a time reads, the leader (``runtime.reactor``). It looks into the
ring segment first, for that costs no system call; while anything lies there it asks the system only
every so often, so that neither path waits for ever.

Errors
------
*The reading goes on, whatever raises in it*: no memory, no thread, a fault of ours. All that a turn of
:meth:`PollSet._poll` reads is kept in `_frames`, `_ended`, and in the links (``transport.frame_reader``)
until it is handed out, and the next turn takes it up there. A frame that cannot be handed out fails what it
concerns, or is handled once more where it is no call, operation or answer (:meth:`PollSet._fail`). A
link whose frames raise time after time is ended.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.runtime.interrupts import ThreadState, current
from shmdist.runtime.peers import Peers
from shmdist.runtime.reserve import Reserve
from shmdist.runtime.ring_exchange import LIVELY, RingExchange
from shmdist.runtime.threads import ThreadPool
from shmdist.serialization import codec
from shmdist.transport.link import Link
from shmdist.transport.messages import Frame, Kind
from shmdist.transport.poller import FEW, make_poller

_WITH_DESCRIPTOR, _HEARTBEAT = {int(Kind.SEGMENT), int(Kind.RING)}, int(Kind.HEARTBEAT)
_TRIES = 24  # times, in two seconds, that what has come is tried to be taken, until its link is ended
_RETRY_SECONDS = 1e-3  # until the second one; then twice as many each time
_log = Log("reactor")


class Events(NamedTuple):
    """What the reactor calls; the node tells it. None of the first five may block or run users' code.

    Attributes
    ----------
    route : callable
        Hands a frame to what waits for it; returns what is to be run once the lead is let go of: a call, a
        frame (an operation), or None.
    fail : callable
        Fails what a frame concerns that could not be handed out; returns a call to be refused, or None.
    control : callable
        Handles a frame that is neither call, operation nor answer.
    added : callable
        A link is about to be read.
    read_output : callable
        A worker has printed something: the descriptor can be read.
    ended : callable
        A link has been read to its end; on a thread of its own.
    operate : callable
        Runs an operation.
    run, refuse : callable
        Run a call, or answer for it with an error.
    woken : callable
        A standby thread was woken: finalizers have left something to be done.
    stopping, closing : callable
        The threads are about to end, and the links to be closed.
    """

    route: Callable[[Frame], Any]
    fail: Callable[[Frame, Exception], Any]
    control: Callable[[Frame], None]
    added: Callable[[Link], None]
    read_output: Callable[[int], object]
    ended: Callable[[Link], None]
    operate: Callable[[Frame], None]
    run: Callable[[Any, ThreadState], None]
    refuse: Callable[[Any, BaseException], None]
    woken: Callable[[], None]
    stopping: Callable[[], None]
    closing: Callable[[], None]


class PollSet:
    """The descriptors and the memory that a process reads."""

    threads: ThreadPool
    _inbox: deque[Any]
    soon: Callable[[Callable[[], None]], None]
    start: Callable[[Callable[[], None]], None]
    _events: Events

    def __init__(self, peers: Peers, reserve: Reserve) -> None:
        self._reserve = reserve
        self.poller = make_poller()
        self._wait, self._outputs = self.poller.poll, self.poller.outputs
        self.rings = RingExchange(peers, self)
        self._frames: list[Frame] = []  # what one turn of reading brought; the leader's
        self._ended: list[Link] = []  # links that have been read to their ends
        self._failures = 0  # turns that failed, one after the other
        self._ring_turns = 0
        self._links: dict[int, Link] = {}  # by descriptor
        self._watched: dict[int, Callable[[], None]] = {}  # descriptors of processes, by what to do

    def post(
        self, link: Link, kind: int, flags: int, call_id: int, payload: codec.Payload | None = None
    ) -> None:
        """Send a frame without ever blocking; from any thread. After an error it is not sent."""
        with current():
            if not link.post(codec.frame(kind, flags, 0, call_id, payload)):
                firmly(self.flush, link)

    def flush(self, link: Link) -> None:
        """Have what was posted written by a thread that may wait."""
        self.soon(lambda: (link.flush(block=True), None)[1])

    def add(self, link: Link) -> None:
        """Read `link` from now on."""
        self._events.added(link)
        if not self.threads.ensure_standby() and not len(self.threads):
            raise RuntimeError("can't start new thread: shmdist needs one to read the connections")
        self._links[link.fd] = link
        self.poller.add(link.fd)

    def watch(self, fd: int, action: Callable[[], None]) -> None:
        """Run `action` once, on a thread of its own, when `fd` becomes readable."""
        self._watched[fd] = action
        self.threads.ensure_standby()
        self.poller.add(fd)

    def links(self) -> list[Link]:
        """Return the links that are read."""
        return list(self._links.values())

    def unwatch(self, fd: int) -> None:
        """Forget a watched descriptor; its owner closes it after this."""
        self.poller.remove(fd)
        self._watched.pop(fd, None)

    def _poll(self, timeout: float) -> bool:
        """Read what has come, waiting at most `timeout` seconds; False if nothing. The lead is held."""
        frames = self._frames
        try:
            inbound = self.rings.inbound
            if self._failures:
                events: Sequence[tuple[int, int]] = self._take_up(frames)
            elif inbound is None:
                events = self._wait(timeout, FEW)
            elif inbound.has_new() or (timeout and inbound.mark_asleep()):
                inbound.mark_awake()
                for receiver in inbound.take(frames):
                    self.rings.read(receiver.link, frames)
                self._ring_turns += 1
                events = () if self._ring_turns & 15 else self._wait(0, FEW)  # neither path may wait for ever
            else:
                events = self._wait(timeout, FEW)
                if timeout:
                    inbound.mark_awake()
            if not events and not frames and not self._failures:
                return False
            if events:
                self._read(events, frames)
            if self.poller.has_outputs:
                # A call's output was written before its result, so after the result has been
                # read the output is there to be read, and must be taken first.
                outputs = self._outputs(0, FEW)
                for fd, _ in self._outputs(0) if len(outputs) == FEW else outputs:
                    self._events.read_output(fd)
            if frames:
                handed = 0
                try:
                    route, inbox = self._events.route, self._inbox
                    for frame in frames:
                        try:
                            item = route(frame)
                            if item is not None:
                                inbox.append(item)
                        except Exception as error:
                            self._fail(frame, error)
                        handed += 1
                finally:
                    del frames[:handed]
            if self._ended:
                self._end_links()
            self._failures = 0
        except Exception as error:
            self._failed(error)
        return True

    def hand_out_segments(self) -> None:
        """Map the segments that are offered in what has been read, ahead of the rest; the lead is held."""
        for frame in self._frames:
            if frame.kind in _WITH_DESCRIPTOR:  # all of them, for the descriptors come in their order
                self._events.control(frame)
                frame.kind = _HEARTBEAT  # it is handled, and has nothing more to say

    def _close_links(self) -> None:
        for link in list(self._links.values()):
            self.poller.remove(link.fd)
            link.close()
        self._links.clear()

    def _abandon_links(self) -> None:
        """Give their descriptors back in a forked child."""
        for link in list(self._links.values()):
            link.abandon()
        self._links.clear()

    def _read(self, events: Sequence[tuple[int, int]], frames: list[Frame]) -> None:
        """Read the links that have something, and see to the processes that have ended."""
        for fd, _ in events:
            link = self._links.get(fd)
            if link is not None:
                if not link.read(frames):
                    if link not in self._ended:
                        self._ended.append(link)
                elif link.reads == LIVELY and link.is_local:
                    self.soon(functools.partial(self.rings.offer, link))
            elif not self.poller.is_kick(fd):
                # First, for `action` may close it at once, and its number be another one's then.
                action = self._watched.pop(fd, None)
                self.poller.remove(fd)
                if action is not None:
                    try:
                        self.soon(action)
                    except Exception:
                        self._watched[fd] = action
                        firmly(self.poller.add, fd)  # a later turn tries again
                        raise

    def _end_links(self) -> None:
        """Let go of the links that have been read to their ends."""
        while self._ended:
            link = self._ended[-1]
            if self._links.get(link.fd) is link:  # else that was done in a turn that failed later
                self.poller.remove(link.fd)
                link.shut()
                self.rings.forget(link)
                # First, for `link_ended` closes the descriptor, and its number is another link's then.
                del self._links[link.fd]
                try:
                    self.soon(functools.partial(self._events.ended, link))
                except Exception:
                    self._links[link.fd] = link
                    raise
            del self._ended[-1]

    def _take_up(self, frames: list[Frame]) -> Sequence[tuple[int, int]]:
        """Begin a turn after one that failed: with what has been read, and is not taken."""
        unfinished = [(fd, 0) for fd, link in list(self._links.items()) if link.unfinished]
        if self._failures > _TRIES:
            for event in unfinished:
                try:
                    self._read([event], frames)
                except Exception:
                    if (link := self._links[event[0]]) not in self._ended:
                        self._ended.append(link)
            unfinished = []
            self._end_links()
        self._read(unfinished, frames)
        if self.rings.inbound is not None:
            for receiver in self.rings.inbound.take(frames):
                self.rings.read(receiver.link, frames)
        return self._wait(0, FEW)

    def _failed(self, error: Exception) -> None:
        """Take note of a turn of reading that failed.

        Raises
        ------
        RecursionError
            It is this thread's own: another one, or a later call, takes up what is left.
        """
        if isinstance(error, RecursionError):
            self._failures = self._failures or 1
            raise error
        self._failures += 1
        self._reserve.open()
        _log.exception("an error in the thread that reads: %r", error)
        if self._failures > 1:
            time.sleep(_RETRY_SECONDS * (1 << min(self._failures, 7)))

    def put_off(self, frame: Frame) -> None:
        """Leave a frame to a thread that has let go of the reading; called by the one that reads."""
        self._inbox.append(frame)

    def _fail(self, frame: Frame, error: Exception) -> None:
        """Fail what a frame concerns that could not be handed out."""
        self._reserve.open()
        _log.exception("%r could not be handled: %r", frame, error)
        for _ in range(3):
            try:
                call = self._events.fail(frame, error)
                if call is not None:
                    self._inbox.append(call)
            except Exception:
                continue
            return
