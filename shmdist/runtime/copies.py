"""Copies of values on other hosts: what goes to several processes of one crosses the network once.

Which values
------------
Those of which the library knows that they go to many: a payload with a ``spread`` (a function
sent ahead of its calls, with what it closes over), and arrays that a map sends over and over
(``payload.known``). Each is a :class:`Copy` with the sender, who numbers it.

How a value goes
----------------
For the first process of a host the sender asks for *room*: a block of that process's arena. The
bytes then go by the stream in a frame of their own, and are received straight into the block.
A frame that needs them has a token in the place of them: the copy's number, and which part.

Any further process of that host is asked to *take* the copy from one that has it, its lender. It
asks the lender to *give* it, by the local link of the two, is given a count for the block as
for any other (``runtime.sharing``), and tells the sender. Only then is a token sent to it: a token
is never refused. Each array is made over a private mapping of the block, in which what is
written stays its own; nobody writes to the block itself.

Whatever goes wrong, and whoever does not answer in time, the value goes by the stream, as it
would have without all this. Who could not share is left alone for a while (`ALONE`).

Who holds the block
-------------------
The first process owns the block, and has a count for it; each that took it has one. What a
process has of a copy stands in its table by sender and number, and changes by what comes from
the sender alone, by one link and so in order: from *room* or *take* until *forget*. Arrays made
of a copy keep its hold alive themselves, and need no counts of their own. The sender keeps
a copy as long as its payload, and as long as frames with tokens of it wait to be written.

Nobody waits for a user's code
------------------------------
Requests are noted by who reads, and done on threads of the runtime. A process whose
interpreter is held, by C code say, does not answer: the sender waits for `PATIENCE`, and as long
again as the bytes took to send, for they may still be on their way; then he sends them to
the next process as to the first of its host, and has it lend them from then on. What comes too
late finds its entry gone from the table, and is dropped.

Death, at each step
-------------------
- The first process dies before it has all the bytes: who takes from it is told so, and tells
  the sender, who makes it the first one.
- It dies later: the memory lives on in the others' mappings, and any of them lends it.
- One that takes it dies: its count is dropped by the owner, as any.
- The sender dies: his copies are struck from the tables. Arrays stay what they are.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmdist._log import Log
from shmdist.memory.holds import PRIVATE, Hold, Lease
from shmdist.runtime.strand import current
from shmdist.wire import codec
from shmdist.wire.arrays import LINE, contiguous
from shmdist.wire.link import Link, LinkClosed
from shmdist.wire.messages import BROKEN, TOKEN, Frame, Kind, Parts, PeerInfo, Token

if TYPE_CHECKING:
    from shmdist.runtime.sharing import Sharing

PATIENCE = 2.0  # seconds that another process may take to answer
ALONE = 30.0  # seconds for which a process that could not share is sent its own
_COPY, _RESULT = int(Kind.COPY), int(Kind.RESULT)
_HERE, _GONE, _APART = range(3)  # answers: it is here; the lender has it not; nothing can be shared
_log = Log("copies")

Key = tuple[int, int]  # of a copy: its sender, and its number there


class Copy:
    """A value that this process sends to many.

    Attributes
    ----------
    number : int
        What others know it by.
    there : set of int
        The processes that have it.
    lenders : dict of int to None
        Those of them that others are sent to, the first one first.
    asked : set of int
        The processes that may have something of it.
    patience : float
        Seconds to wait for who takes it.
    """

    __slots__ = ("_copies", "asked", "lenders", "number", "patience", "there")

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self.number = next(copies.node.call_ids)
        self.there: set[int] = set()
        self.lenders: dict[int, None] = {}
        self.asked: set[int] = set()
        self.patience = PATIENCE

    def __repr__(self) -> str:
        return f"<Copy {self.number}, at {sorted(self.there)}>"

    def __del__(self) -> None:
        try:
            if self.asked:
                copies, number, asked = self._copies, self.number, self.asked
                copies.node.errand(lambda: copies.withdraw(number, asked))
        except Exception:
            pass  # the program is at its end


class _Kept:
    """What this process has of another one's copy.

    Attributes
    ----------
    hold : Hold or None
        Of its block, once there is one.
    here : bool
        Whether the bytes are in the block.
    asking : list
        Who wants it and must wait for the bytes: link and request.
    """

    __slots__ = ("asking", "here", "hold")

    def __init__(self) -> None:
        self.hold: Hold | None = None
        self.here = False
        self.asking: list[tuple[Link, int]] = []


class _Part(Lease):
    """A part of a copy, seen through a mapping of its own: its count is that of the whole."""

    __slots__ = ("whole",)

    def __init__(self, whole: Hold, offset: int, nbytes: int) -> None:
        lease = whole.lease
        super().__init__(lease.segment, 0, lease.offset + offset, nbytes, PRIVATE)
        self.whole = whole


class Copies:
    """What a link to another host asks in the place of ``Sharing``; hangs on that as ``copies``."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self.node = node = sharing.node
        self._lock = threading.Lock()  # guards `_kept`; a leaf
        self._kept: dict[Key, _Kept] = {}
        self._alone: dict[int, float] = {}  # processes that could not share, and until when
        node.controls[Kind.COPY] = self._on_frame
        node.lost_hooks.append(self._lost)

    def __repr__(self) -> str:
        return f"<Copies kept {sorted(self._kept)}, alone {sorted(self._alone)}>"

    # ------------------------------------------------------------------ the sender

    def place(self, payload: codec.Payload, size: int, pid: int, done: Parts) -> tuple[list[Any], bool]:
        """Return what stands for a payload's buffers; parameters and result as of ``Sharing.place``."""
        spread, known = payload.spread, payload.known
        if spread is None and known is None:
            return [contiguous(source) for source in payload.buffers], False
        buffers = [
            contiguous(source) if token is None else token
            for index, source in enumerate(payload.buffers)
            for token in [self._place(payload, index, source, pid, done)]
        ]
        if spread is None or size < LINE:
            return buffers, False
        copy = spread.setdefault("body", Copy(self))
        if not self._give(copy, lambda: b"".join(payload.parts), size, pid, self._has_sibling(pid)):
            return buffers, False
        buffers.append(self._token(copy, 0, size, done))
        return buffers, True

    def _place(self, payload: codec.Payload, index: int, source: Any, pid: int, done: Parts) -> Token | None:
        """Return the token of a buffer; None when its bytes are to be sent."""
        nbytes = len(source)
        if nbytes < LINE:
            return None
        found = None if payload.known is None else payload.known.copy_of(source)
        if found is not None:
            copy, raw, offset, times = found
            # All of it, for this process will ask for the rest, or another one of its host.
            likely = len(raw) == nbytes or times >= len({peer.host for peer in self._members()})
            if not self._give(copy, lambda: raw, len(raw), pid, likely):
                return None
            return self._token(copy, offset, nbytes, done)
        if payload.spread is None:
            return None
        copy = payload.spread.setdefault((index,), Copy(self))
        if not self._give(copy, lambda: contiguous(source), nbytes, pid, self._has_sibling(pid)):
            return None
        return self._token(copy, 0, nbytes, done)

    def _token(self, copy: Copy, offset: int, nbytes: int, done: Parts) -> Token:
        done.kept.append(copy)
        return Token(TOKEN.pack(copy.number, self.node.pid, 0, offset, nbytes, PRIVATE))

    def _give(self, copy: Copy, raw: Callable[[], Any], nbytes: int, pid: int, likely: bool) -> bool:
        """See to it that process `pid` has a copy; False when it is better sent the bytes.

        `likely`: they are going to be needed there more than once.
        """
        if pid in copy.there:
            return True
        graves = self.node.graves
        while pid not in graves and self._alone.get(pid, 0.0) < time.monotonic():
            lender = self._lender(copy, pid)
            if lender is None:
                return likely and self._send_first(copy, raw, nbytes, pid)
            answer = self._ask(copy, pid, ("take", copy.number, lender, copy.patience), copy.patience)
            if answer == _HERE:
                copy.there.add(pid)
                copy.lenders[pid] = None
                return True
            if answer == _APART:
                self._leave_alone(pid)
            else:
                copy.lenders.pop(lender, None)
        return False

    def _send_first(self, copy: Copy, raw: Callable[[], Any], nbytes: int, pid: int) -> bool:
        """Send a copy to the first process of a host."""
        node = self.node
        if self._ask(copy, pid, ("room", copy.number, nbytes), PATIENCE) != _HERE:
            self._leave_alone(pid)
            return False
        begun = time.monotonic()
        payload = _pickled(("here", copy.number))
        payload.buffers.append(raw())
        try:
            node.send(node.links[pid], codec.frame(_COPY, 0, 0, copy.number, payload), None)
        except (LinkClosed, KeyError):
            return False  # its death is on its way
        copy.patience = PATIENCE + time.monotonic() - begun
        copy.there.add(pid)
        copy.lenders[pid] = None
        return True

    def _ask(self, copy: Copy, pid: int, what: Any, seconds: float) -> int | None:
        """Return a process's answer; None when there is none in time."""
        copy.asked.add(pid)
        return self._answer_of(self.node.request(pid, _COPY, 0, _pickled(what)), seconds)

    def _answer_of(self, reply: Any, seconds: float) -> int | None:
        self._wait(reply, seconds)
        frame = reply.frame
        return None if frame is None or frame.flags & BROKEN else pickle.loads(frame.body)

    def _wait(self, reply: Any, seconds: float) -> None:
        """Wait for a reply, but not for ever; as ``Node.wait_inside``."""
        strand = current()
        lock = threading.Lock()
        lock.acquire()
        reply.add(lock)
        deadline = time.monotonic() + seconds
        try:
            while not reply.done and time.monotonic() < deadline:
                lock.acquire(timeout=0.05)
                if strand.pending and not reply.done:
                    strand.deliver()
        finally:
            reply.remove(lock)
            self.node.pending.pop(reply.call_id, None)

    def _leave_alone(self, pid: int) -> None:
        self._alone[pid] = time.monotonic() + ALONE
        _log.info("process %d shares no copies for now", pid)

    def _members(self) -> list[PeerInfo]:
        return list(self.node.peers.values())

    def _lender(self, copy: Copy, pid: int) -> int | None:
        """Return a process that has the copy, and from which `pid` can take it."""
        peers = self.node.peers
        taker = peers.get(pid)
        for lender in list(copy.lenders):
            peer = peers.get(lender)
            if peer is not None and taker is not None and _may_share(peer, taker):
                return lender
        return None

    def _has_sibling(self, pid: int) -> bool:
        """Tell whether there is another process to which `pid` could lend a copy."""
        node = self.node
        peer = node.peers.get(pid)
        if peer is None:
            return False
        for other in self._members():
            if other.pid in (pid, node.pid) or not _may_share(peer, other):
                continue
            link = node.links.get(other.pid)
            if link is None or not link.is_local:
                return True
        return False

    def withdraw(self, number: int, pids: set[int]) -> None:
        """Let processes forget a copy."""
        for pid in pids:
            link = self.node.links.get(pid)
            if link is not None:
                self.node.post(link, _COPY, 0, 0, _pickled(("forget", number)))

    # ------------------------------------------------------------------ who has a copy

    def room(self, number: int, size: int, sender: int) -> Any:
        """Return the memory for the bytes of a copy that is coming; on the reading thread.

        Raises
        ------
        MemoryError
            None was asked for, or it was forgotten.
        """
        kept = self._kept.get((sender, number))
        if kept is None or kept.hold is None or kept.here or kept.hold.lease.nbytes != size:
            raise MemoryError(f"there is no room for copy {number} of process {sender}")
        return kept.hold.lease.view()

    def adopt(self, token: bytes, sender: int) -> Hold:
        """Return a hold of a part of a copy; on the reading thread.

        Raises
        ------
        LookupError
            It is not here.
        """
        number, _, _, offset, nbytes, _ = TOKEN.unpack(token)
        kept = self._kept.get((sender, number))
        # The bytes came before the token, though who reads may not have been told yet.
        if kept is None or kept.hold is None:
            raise LookupError(f"copy {number} of process {sender} is not here")
        self._sharing.keeper.used()
        return Hold(self._sharing.holds, _Part(kept.hold, offset, nbytes))

    def _on_frame(self, frame: Frame) -> None:
        """Handle a frame about copies; on the reading thread."""
        node, link = self.node, frame.link
        if frame.flags & BROKEN:
            self._arrived((link.pid, frame.call_id), False)
            return
        verb, *details = pickle.loads(frame.body)
        if verb == "here":
            self._arrived((link.pid, details[0]), True)
        elif verb == "forget":
            self._forget((link.pid, details[0]))
        elif verb == "give":
            self._give_up(link, frame.call_id, (details[0], details[1]))
        else:
            key, kept = (link.pid, details[0]), _Kept()
            with self._lock:
                former, self._kept[key] = self._kept.get(key), kept
            self._refuse(former)
            work = self._make_room if verb == "room" else self._take
            node.dispatcher.start(lambda: self._provide(link, frame.call_id, key, kept, work, details[1:]))

    def _provide(
        self, link: Link, call_id: int, key: Key, kept: _Kept, work: Callable[..., int], details: list[Any]
    ) -> None:
        """Get a copy's block, and tell its sender."""
        answer = _GONE
        try:
            answer = work(key, kept, *details)
        finally:
            if answer != _HERE:
                with self._lock:
                    if self._kept.get(key) is kept:
                        del self._kept[key]
            self.node.answer(link, call_id, 0, _pickled(answer))

    def _enter(self, key: Key, kept: _Kept, hold: Hold, here: bool) -> int:
        with self._lock:
            if self._kept.get(key) is not kept:
                return _GONE  # it took too long: nobody waits for it
            kept.hold, kept.here = hold, here
            return _HERE

    def _make_room(self, key: Key, kept: _Kept, nbytes: int) -> int:
        """Get a block of this process's arena."""
        hold = self._sharing.take_for_many(nbytes, grow=True)
        return _APART if hold is None else self._enter(key, kept, hold, False)

    def _take(self, key: Key, kept: _Kept, lender: int, seconds: float) -> int:
        """Get a block from a process of this host."""
        node = self.node
        if lender in node.graves:
            return _GONE
        try:
            link = node.link_to(lender)
        except ConnectionError:
            return _APART
        if not link.is_local:
            return _APART
        reply = node.request(lender, _COPY, 0, _pickled(("give", *key)))
        answer = self._answer_of(reply, seconds)
        if answer is None:
            return _GONE
        hold = reply.frame.buffers[0] if answer == _HERE and reply.frame is not None else None
        return self._enter(key, kept, hold, True) if type(hold) is Hold else answer or _APART

    def _give_up(self, link: Link, call_id: int, key: Key) -> None:
        """Lend a copy to another process of this host, now or when it is here; on the reading thread."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and not kept.here:
                kept.asking.append((link, call_id))
                return
        if kept is None:
            self.node.post(link, _RESULT, 0, call_id, _pickled(_GONE))
        else:
            self._lend(kept, link, call_id)

    def _lend(self, kept: _Kept, link: Link, call_id: int) -> None:
        hold = kept.hold
        assert hold is not None

        def lend() -> None:
            lease = hold.lease
            if not link.is_local or not self._sharing.offers.introduce(lease.segment, link.pid):
                self.node.answer(link, call_id, 0, _pickled(_APART))
                return
            payload = _pickled(_HERE)
            payload.buffers.append(lease.view())
            payload.spread = {0: hold}
            self.node.answer(link, call_id, 0, payload)

        self.node.dispatcher.start(lend)

    def _arrived(self, key: Key, here: bool) -> None:
        """The bytes of a copy are here, or were lost on their way."""
        if not here:
            self._forget(key)
            return
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return
            kept.here = True
            asking, kept.asking = kept.asking, []
        for link, call_id in asking:
            self._lend(kept, link, call_id)

    def _forget(self, key: Key) -> None:
        with self._lock:
            kept = self._kept.pop(key, None)
        self._refuse(kept)

    def _refuse(self, kept: _Kept | None) -> None:
        """Tell those who wait for a copy that it will not come."""
        if kept is not None:
            for link, call_id in kept.asking:
                self.node.post(link, _RESULT, 0, call_id, _pickled(_GONE))

    def _lost(self, pid: int) -> None:
        """A process is gone, and its copies with it."""
        with self._lock:
            keys = [key for key in self._kept if key[0] == pid]
        for key in keys:
            self._forget(key)
        self._alone.pop(pid, None)


def _may_share(one: PeerInfo, other: PeerInfo) -> bool:
    """Tell whether two processes are on one host, and may be connected."""
    return (
        one.host == other.host
        and (one.links is None or other.pid in one.links)
        and (other.links is None or one.pid in other.links)
    )


def _pickled(what: Any) -> codec.Payload:
    payload = codec.Payload()
    payload.parts.append(pickle.dumps(what, 5))
    return payload


__all__ = ["Copies", "Copy"]
