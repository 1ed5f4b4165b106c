"""Repairs counts after a process died between announcing a reference to its owner and sending it.

A process T that passes on what O owns, a reference or a shared array, to R tells O "+1 for R", and
then writes the frame to R.  Killed between the two, or amid the frame, it leaves a count of R that R
has nothing for, and will never give back.  T may have been about to write many such frames.

The protocol
------------
- *Told.*  Each word about a count names its reporter: who wrote it, or nobody when that is the owner.
  O keeps, beside the counts of each thing, ``told[R, T]``: what T told about R.
- *Receipts.*  R keeps, for each thing, how many counts of it came in frames of T, for each T that
  is not the owner; noted when the frame is read, before anybody can look into it or drop it.
- *Giving back.*  A "-1" of R names a reporter of whom R has a receipt for the thing, any of them, and
  the receipt is gone.  Without one it names nobody.  O takes it off the count, and off told.
- *Audit.*  When O has lost T it asks each R of whom T told something that is not given back.  R
  answers when it has lost T itself, which is when all frames of T have been read: with its
  receipts from T for things of O, which it forgets.  O makes its told those receipts, and the count
  follows.  From then on the count is like one from O; what names T about R is void.

Why that is right.  Let a be the frames from T that R noted for a thing, w what T told and wrote of
it, g what R gave back in T's name.  Then told is w - g as far as it arrived, receipts are a - g as
far as it left, and what is to be taken off is w - a.

1. What R gave back before the answer and arrived before it, is in both; the difference is w - a.
2. What R gave back in T's name before the answer and arrives after it (words of two threads may
   overtake each other), is in the receipts and not in told: it is taken off with the answer, and
   void when it comes.
3. What R gives back after the answer names T no more. If it overtakes the answer, the count is less
   than it will be by what R does not hold any more, and still has w - a too many: never too low.
4. Which of several reporters a "-1" names changes told and receipts by the same, so w - a stays.
5. A word of T that arrives after the answer (it went another way, or was lost with a host) is void,
   and if its frame arrived the receipt has stood for it: w - a may be below zero, and is added.
6. No frame of T is noted after the answer: once T is lost at R, what comes of it is refused
   (:meth:`ReferenceCounts.arrived`, :meth:`SharedMemory.adopt`), for its count is taken off.

R may be O, for references: it asks itself, as it read T's words and frames from one link. R may be
lost before it answers: its counts go with it, as always. O may be: nobody counts any more. Owner
and holder without a way between them have process 1 carry question and answer, as they have it carry
counts. A host that goes silent may take words with it; the audit puts also those counts right.

It costs a value sent by its owner nothing but a comparison.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from shmdist._log import Log
from shmdist.errors import ShmdistError
from shmdist.refcount.table import RRID
from shmdist.runtime.block_counts import BlockCounts
from shmdist.runtime.counts import ReferenceCounts
from shmdist.serialization import codec
from shmdist.transport.link import LinkClosed
from shmdist.transport.messages import Frame, Kind

_AUDIT = int(Kind.AUDIT)
_log = Log("count_audit")


class CountAudit:
    """A node's part in audits, as owner and as holder."""

    def __init__(self, counts: ReferenceCounts, blocks: BlockCounts) -> None:
        self._counts, self._blocks, self._peers = counts, blocks, counts.peers
        #: Owners that asked about a reporter that is not lost here yet; guarded by the node's lock.
        self._waiting: dict[int, set[int]] = {}
        self._peers.lost_hooks.append(self._lost)

    def __repr__(self) -> str:
        return f"<CountAudit, asked about {sorted(self._waiting)}>"

    def ask_about(self, reporter: int) -> None:
        """Ask all of whom a lost process told something that was not given back; never blocks."""
        with self._peers.lock:
            holders = self._counts.refs.holders_reported_by(reporter)
        with self._blocks.lock:
            holders |= self._blocks.arena.holders_reported_by(reporter)
        for holder in holders:
            if holder == self._peers.pid:
                self._answer_myself(reporter)
            else:
                self._send(holder, lambda: (reporter, self._peers.pid))

    def _answer_myself(self, reporter: int) -> None:
        """Conclude an audit of this process as owner with itself as holder."""
        pid = self._peers.pid
        found: dict[str, Any] = {}
        self._counts.reactor.soon(
            lambda: self._conclude(reporter, pid, *self._receipts(found, pid, reporter))
        )

    def _lost(self, pid: int) -> None:
        """A process is gone: what it told is audited, and what was asked about it answered."""
        with self._peers.lock:
            self._counts.receipts.forget(pid)
            for others in self._waiting.values():
                others.discard(pid)
            owners = list(self._waiting.get(pid, ()))
        for owner in owners:
            self._answer(owner, pid)
        with self._peers.lock:
            self._waiting.pop(pid, None)
        self.ask_about(pid)

    def on_audit(self, frame: Frame) -> None:
        """Handle a question or an answer; on the reading thread."""
        reporter, asker, *found = pickle.loads(frame.body)
        if found:
            self._conclude(reporter, asker, *found)
            return
        with self._peers.lock:
            if reporter not in self._peers.lost:
                self._waiting.setdefault(reporter, set()).add(asker)
                return
        self._answer(asker, reporter)

    def _answer(self, owner: int, reporter: int) -> None:
        found: dict[str, Any] = {}
        self._send(owner, lambda: (reporter, self._peers.pid, *self._receipts(found, owner, reporter)))

    def _receipts(
        self, found: dict[str, Any], owner: int, reporter: int
    ) -> tuple[dict[Any, int], dict[Any, int]]:
        """Return the receipts from a reporter for blocks and references of an owner, and forget them.

        They are put down in `found`, for when this is asked again after an error.
        """
        if "blocks" not in found:
            with self._blocks.lock:
                found["blocks"] = self._blocks.receipts.take(owner, reporter)
        if "refs" not in found:
            with self._peers.lock:
                found["refs"] = self._counts.receipts.take(owner, reporter)
        return found["blocks"], {tuple(rrid): count for rrid, count in found["refs"].items()}

    def _conclude(self, reporter: int, holder: int, blocks: dict[int, int], refs: dict[Any, int]) -> None:
        """Make what a reporter told about a holder what that has receipts for; again after an error."""
        with self._blocks.lock:
            self._blocks.arena.audited(holder, reporter, blocks)
        counts = {RRID(*key): count for key, count in refs.items()}
        with self._peers.lock:
            self._counts.freed += self._counts.refs.audited(holder, reporter, counts)
        if self._counts.freed:  # their values' finalizers are users' code
            self._counts.reactor.soon(self._counts.drop)

    def _send(self, pid: int, body: Callable[[], Any]) -> None:
        """Send a question or an answer, on a thread that may block."""

        def send() -> None:
            try:
                payload = codec.pickled(body())
                self._peers.way_to(pid).send(codec.frame(_AUDIT, 0, 0, pid, payload))
            except (LinkClosed, ConnectionError, ShmdistError) as error:
                if pid not in self._peers.lost:  # else there is nothing to settle with it
                    _log.info("process %d could not be told of an audit: %s", pid, error)

        self._counts.reactor.soon(send)
