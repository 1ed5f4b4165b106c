"""The last step of death in the counting: what one told that was killed before it sent.

A process T that passes on what O owns, a reference or a shared array, to R tells O "+1 for R", and
then writes the frame to R.  Killed between the two, or amid the frame, it leaves a count of R that R
has nothing for, and will never give back.  T may have been about to write many such frames.

The protocol
------------
- *Told.*  Each word about a count names its teller: who wrote it, or nobody when that is the owner.
  O keeps, beside the counts of each thing, ``told[R, T]``: what T told about R.
- *Receipts.*  R keeps, for each thing, how many counts of it came in frames of T, for each T that
  is not the owner; noted when the frame is read, before anybody can look into it or drop it.
- *Giving back.*  A "-1" of R names a teller of whom R has a receipt for the thing, any of them, and
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
4. Which of several tellers a "-1" names changes told and receipts by the same, so w - a stays.
5. A word of T that arrives after the answer (it went another way, or was lost with a host) is void,
   and if its frame arrived the receipt has stood for it: w - a may be below zero, and is added.
6. No frame of T is noted after the answer: once T is lost at R, what comes of it is refused
   (:meth:`Ownership.arrived`, :meth:`Sharing.adopt`), for its count is taken off.

R may be O, for references: it asks itself, as it read T's words and frames from one link. R may be
lost before it answers: its counts go with it, as always. O may be: nobody counts any more. Owner
and holder without a way between them have process 1 carry question and answer, as they have it carry
counts. A host that goes silent may take words with it; the audit puts also those counts right.

It costs a value sent by its owner nothing but a comparison.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from shmdist._log import Log
from shmdist.runtime.reftable import RRID
from shmdist.wire import codec
from shmdist.wire.messages import Frame, Kind

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

_AUDIT = int(Kind.AUDIT)
_log = Log("audits")


class Audits:
    """A node's part in audits, as owner and as holder."""

    def __init__(self, node: Node) -> None:
        self._node = node
        #: Owners that asked about a teller that is not lost here yet; guarded by the node's lock.
        self._waiting: dict[int, set[int]] = {}
        node.controls[_AUDIT] = self._on_audit
        node.lost_hooks.append(self._lost)

    def __repr__(self) -> str:
        return f"<Audits, asked about {sorted(self._waiting)}>"

    def ask_about(self, teller: int) -> None:
        """Ask all of whom a lost process told something that was not given back; never blocks."""
        node = self._node
        with node.lock:
            holders = node.refs.told_by(teller)
        with node.sharing.lock:
            holders |= node.sharing.arena.told_by(teller)
        for holder in holders:
            if holder == node.pid:
                self._conclude(teller, holder, *self._receipts(node.pid, teller))
            else:
                self._send(holder, (teller, node.pid))

    def _lost(self, pid: int) -> None:
        """A process is gone: what it told is audited, and what was asked about it answered."""
        node = self._node
        with node.lock:
            node.receipts.forget(pid)
            owners = self._waiting.pop(pid, set())
            for others in self._waiting.values():
                others.discard(pid)
        for owner in owners:
            self._answer(owner, pid)
        self.ask_about(pid)

    def _on_audit(self, frame: Frame) -> None:
        """Handle a question or an answer; on the reading thread."""
        teller, asker, *found = pickle.loads(frame.body)
        if found:
            self._conclude(teller, asker, *found)
            return
        with self._node.lock:
            if teller not in self._node.graves:
                self._waiting.setdefault(teller, set()).add(asker)
                return
        self._answer(asker, teller)

    def _answer(self, owner: int, teller: int) -> None:
        self._send(owner, (teller, self._node.pid, *self._receipts(owner, teller)))

    def _receipts(self, owner: int, teller: int) -> tuple[dict[Any, int], dict[Any, int]]:
        """Return the receipts from a teller for blocks and references of an owner, and forget them."""
        node = self._node
        with node.sharing.lock:
            blocks = node.sharing.receipts.take(owner, teller)
        with node.lock:
            refs = node.receipts.take(owner, teller)
        return blocks, {tuple(rrid): count for rrid, count in refs.items()}

    def _conclude(self, teller: int, holder: int, blocks: dict[int, int], refs: dict[Any, int]) -> None:
        """Make what a teller told about a holder what that has receipts for."""
        node = self._node
        with node.sharing.lock:
            node.sharing.arena.audited(holder, teller, blocks)
        with node.lock:
            freed = node.refs.audited(holder, teller, {RRID(*key): count for key, count in refs.items()})
        if freed:  # their values' finalizers are users' code
            node.dispatcher.start(lambda: node.drop(freed))

    def _send(self, pid: int, body: Any) -> None:
        """Send a question or an answer, on a thread that may block."""
        payload = codec.pickled(body)

        def send() -> None:
            try:
                self._node.way_to(pid).send(codec.frame(_AUDIT, 0, 0, pid, payload))
            except Exception as error:
                if pid not in self._node.graves:  # else there is nothing to settle with it
                    _log.info("process %d could not be told of an audit: %s", pid, error)

        self._node.dispatcher.start(send)
