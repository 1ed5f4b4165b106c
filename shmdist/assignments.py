"""The batches of a run that are out, and how they are taken back from workers that are slow.

A worker has its batches in the order in which it runs them.  When another has nothing left:

- a batch that waits behind another one is recalled: a CANCEL with ``NOT_RUN`` withdraws it
  if it has not begun, and its answer says so;
- a batch that runs is divided: a call on its worker takes out the later half of what has
  not begun (`batches.divide`), and returns how many elements are left.  The batch's own
  answer may come before that; then it has fewer values than elements, and says the same.

Each happens only to a batch that has been there for longer than a batch should take, so a
run whose elements take what they were expected to never pays for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from shmdist.batches import Results, divide
from shmdist.errors import ShmdistError
from shmdist.runtime.node import Node
from shmdist.runtime.replies import Reply
from shmdist.runtime.strand import current
from shmdist.wire import codec
from shmdist.wire.messages import NOT_RUN, WANT_VALUE, Kind

_STUCK = 0.005  # seconds after which a batch is taken back that waits, or divided that runs
_STEAL = 0.002  # seconds of work below which a waiting batch is not worth taking back
_CALL, _CANCEL = int(Kind.CALL), int(Kind.CANCEL)


class Batch:
    """Elements that went out together: their places in the input, and themselves."""

    __slots__ = ("call_id", "elements", "final", "pid", "places", "recalled", "results", "since")

    def __init__(self, pid: int, places: Sequence[int], elements: Any) -> None:
        self.pid = pid
        self.places = places
        self.elements = elements  # a list or a range
        self.call_id = 0
        self.recalled = False
        self.final = len(elements) < 2  # not to be divided, or not now
        self.since = 0.0  # when it was sent, or came to be first; seconds of the monotonic clock
        self.results: Results | None = None  # of a batch that ran on this process

    def __repr__(self) -> str:
        return f"<Batch of {len(self.elements)} on process {self.pid}, call {self.call_id}>"

    def pairs(self) -> list[tuple[int, Any]]:
        """Return each place with its element."""
        return list(zip(self.places, self.elements, strict=True))

    def cut(self, keep: int) -> list[tuple[int, Any]]:
        """Take all but the first `keep` elements out; returns them with their places."""
        rest = list(zip(self.places[keep:], self.elements[keep:], strict=True))
        self.places, self.elements = self.places[:keep], self.elements[:keep]
        return rest


class Division:
    """A batch that was asked to be divided, and the answer: how many elements it keeps."""

    __slots__ = ("batch", "kept", "reply")

    def __init__(self, batch: Batch, reply: Reply | None = None, kept: int | None = None) -> None:
        self.batch = batch
        self.reply = reply
        self.kept = kept

    def read(self, node: Node) -> int | None:
        """Return the answer; None when the batch is as it was, or answers for itself."""
        if self.reply is None:
            return self.kept
        if self.reply.frame is None:
            return None  # the worker is gone
        try:
            kept: int | None = node.read_result(self.reply.frame, self.batch.pid, "a division")
        except Exception:
            return None
        return kept


class Assignments:
    """Which worker has which batches of a run.

    Parameters
    ----------
    node : Node
        This process's.
    divided : callable
        Told of each Division, on any thread, when its answer is there.
    """

    def __init__(self, node: Node, divided: Callable[[Division], None]) -> None:
        self._node = node
        self._divided = divided
        self.batches: dict[int, list[Batch]] = {}  # by worker, in the order in which it runs them
        self.stuck = False  # a batch may be taken back in a moment: `rebalance` wants to be asked again

    def __repr__(self) -> str:
        return f"<Assignments { ({pid: len(batches) for pid, batches in self.batches.items()}) }>"

    def __bool__(self) -> bool:
        return any(self.batches.values())

    def add(self, batch: Batch) -> None:
        """Note that a batch is about to be sent to its worker."""
        batch.since = time.monotonic()
        self.batches.setdefault(batch.pid, []).append(batch)

    def count(self, pid: int) -> int:
        """Return how many batches a worker has."""
        return len(self.batches.get(pid, ()))

    def remove(self, batch: Batch) -> None:
        """Note that a batch is out no more; the one behind it runs from now on."""
        batches = self.batches[batch.pid]
        batches.remove(batch)
        if batches:
            batches[0].since = time.monotonic()

    def rebalance(self, pids: Sequence[int], cost: float | None) -> None:
        """Take work back for those of the workers `pids` that have none.

        Parameters
        ----------
        pids : sequence of int
            The workers.
        cost : float, optional
            Seconds that an element takes, as far as is known.
        """
        self.stuck = False
        idle = sum(not self.batches.get(pid) for pid in pids)
        if not idle:
            return
        now = time.monotonic()
        running: list[Batch] = []
        for pid in pids:
            batches = self.batches.get(pid, [])
            if len(batches) > 1 and pid != self._node.pid:
                self._recall(batches[-1], now, cost)
            elif batches and not batches[0].final:
                self.stuck = True
                if now - batches[0].since > _STUCK:
                    running.append(batches[0])
        running.sort(key=lambda batch: -len(batch.elements))
        for batch in running[:idle]:
            self._divide(batch)

    def _recall(self, batch: Batch, now: float, cost: float | None) -> None:
        """Take a batch back that waits behind another one, if it is worth it."""
        # It may also be short, but wait behind one that takes unexpectedly long.
        worth = cost is None or cost * len(batch.elements) > _STEAL or now - batch.since > _STUCK
        link = self._node.links.get(batch.pid)
        self.stuck = self.stuck or not batch.recalled
        if not batch.recalled and worth and link is not None:
            batch.recalled = True
            self._node.post(link, _CANCEL, NOT_RUN, batch.call_id)

    def _divide(self, batch: Batch) -> None:
        """Ask for the later half of what a running batch has not begun."""
        batch.final = True  # until the answer is there
        node = self._node
        if batch.pid == node.pid:
            self._divided(Division(batch, kept=divide((node.pid, batch.call_id))))
            return
        payload = codec.dumps((_divide_for, (node.pid, batch.call_id), {}))
        strand = current()
        strand.enter()
        try:
            with contextlib.suppress(ShmdistError, OSError):  # it is dying, and its batches come back
                node.request(
                    batch.pid,
                    _CALL,
                    WANT_VALUE,
                    payload,
                    callback=lambda reply: self._divided(Division(batch, reply)),
                )
        finally:
            strand.leave()


def _divide_for(pid: int, call_id: int) -> int | None:
    """Divide a batch that process `pid` sent here; a remote call."""
    return divide((pid, call_id))


__all__ = ["Assignments", "Batch", "Division"]
