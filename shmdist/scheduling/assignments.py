"""Which worker has which batches of a map, and how batches are taken back from slow workers.

A worker has its batches in the order in which it runs them.  When another has nothing left:

- a batch that waits behind another one is taken back: on the worker's page, without its help
  (``memory.progress_page``); where there is none, a CANCEL with ``NOT_RUN`` withdraws it if it has not begun,
  and its answer says so;
- a batch that runs is divided: a call on its worker takes out the later half of what has
  not begun (`batches.divide`), and returns how many elements are left.  The batch's own
  answer may come before that; then it has fewer values than elements, and says the same.

Each happens only to a batch that has been there for longer than a batch should take, so a
run whose elements take what they were expected to never pays for it.

Workers that stand still
------------------------
A worker is stopped, say, or holds its interpreter:

- One that takes nothing of what is sent to it (``transport.link``) gets no batch while others can have it.
  Large batches are sent one by one, so that the first that waits keeps the others back.
- One that does not even begin its first batch within `_NOT_BEGUN_SECONDS` has all of them taken back when
  another has nothing left, by its page. It gets no others until it has answered for these: it has read
  them then, and found that they are not its own any more.
- What has begun stays with the worker, whatever becomes of it: no element runs twice. Where there is no
  page (other hosts, maps of workers), all that went out does, which is a window of batches at most.

Batches may also lie unread for long where there is no processor for all. Then the same elements must not
wander from one worker to the next: each time, what is unread is left there for twice as long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from shmdist.errors import ShmdistError
from shmdist.memory.progress_page import ProgressPage
from shmdist.references.future import LocalTask
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import Node
from shmdist.runtime.replies import PendingReply
from shmdist.scheduling.batch import Results, divide
from shmdist.serialization import codec
from shmdist.transport.link import Link
from shmdist.transport.messages import NOT_RUN, WANT_VALUE, Kind

_TAKE_BACK_SECONDS = 0.005  # after which a batch is taken back that waits, or divided that runs
_NOT_BEGUN_SECONDS = 0.02  # after which a first batch is taken back that its worker has not begun
_MIN_STOLEN_SECONDS = 0.002  # of work below which a waiting batch is not worth taking back
_CALL, _CANCEL = int(Kind.CALL), int(Kind.CANCEL)


class Batch:
    """Elements that went out together: their places in the input, and themselves."""

    __slots__ = (
        "avoids",
        "call_id",
        "elements",
        "end",
        "final",
        "link",
        "pid",
        "places",
        "recalled",
        "results",
        "since",
        "task",
    )

    def __init__(self, pid: int, places: Sequence[int], elements: Any) -> None:
        self.pid = pid
        self.places = places
        self.elements = elements  # a list or a range
        self.avoids: Sequence[int] = ()  # workers on which its element has failed before
        self.call_id = 0
        self.recalled = False
        self.link: Link | None = None  # by which it went to another host
        self.end = 0  # where it ends there: bytes
        self.final = len(elements) < 2  # not to be divided, or not now
        self.since = 0.0  # when it was sent, or came to be first; seconds of the monotonic clock
        self.results: Results | None = None  # of a batch that ran on this process
        self.task: LocalTask | None = None  # likewise

    def __repr__(self) -> str:
        return f"<Batch of {len(self.elements)} on process {self.pid}, call {self.call_id}>"

    @property
    def is_unsent(self) -> bool:
        """Whether it is known that its worker has not got all of it."""
        return self.link is not None and not self.link.has_written(self.end)

    def pairs(self) -> list[tuple[int, Any]]:
        """Return each place with its element."""
        return list(zip(self.places, self.elements, strict=True))

    def cut(self, keep: int) -> list[tuple[int, Any]]:
        """Take all but the first `keep` elements out; returns them with their places."""
        rest = list(zip(self.places[keep:], self.elements[keep:], strict=True))
        self.places, self.elements = self.places[:keep], self.elements[:keep]
        return rest


class SplitRequest:
    """A batch that was asked to be divided, and the answer: how many elements it keeps."""

    __slots__ = ("batch", "kept", "reply")

    def __init__(self, batch: Batch, reply: PendingReply | None = None, kept: int | None = None) -> None:
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
            kept: int | None = node.requests.read_result(self.reply.frame, self.batch.pid, "a division")
        except Exception:
            return None
        return kept


class Assignments:
    """Which worker has which batches of a run.

    Parameters
    ----------
    node : Node
        This process's.
    lane : int
        On which the batches go out.
    divided : callable
        Told of each Division, on any thread, when its answer is there.
    """

    def __init__(self, node: Node, lane: int, divided: Callable[[SplitRequest], None]) -> None:
        self._node = node
        self._lane = lane
        self._divided = divided
        self._unread = _NOT_BEGUN_SECONDS
        self.back: dict[int, int] = {}  # workers of batches that were taken back, by call, until they answer
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

    def is_blocked(self, pid: int) -> bool:
        """Return whether a worker takes nothing of what was sent to it."""
        link = self._node.peers.links.get(pid)
        return link is not None and link.is_blocked

    def forget(self) -> None:
        """Wait no more for what was taken back, and interrupt what runs on this process."""
        for call_id in self.back:
            self._node.requests.pending.pop(call_id, None)
        for batch in self.batches.get(self._node.pid, ()):
            if batch.task is not None:
                batch.task.interrupt()

    def _takes(self, pid: int) -> bool:
        """Return whether a worker takes what is sent to it, as far as is known."""
        return not self.is_blocked(pid) and (not self.back or pid not in self.back.values())

    def able(self, pids: list[int]) -> list[int]:
        """Return those of the workers `pids` that take what is sent to them; all when nothing is out."""
        links = self._node.peers.links
        for pid in pids:  # mostly none is left out
            link = links.get(pid)
            if link is not None and link.is_blocked:
                break
        else:
            if not self.back:
                return pids
        able = [pid for pid in pids if self._takes(pid)]
        if not (able or self):
            return pids
        self.stuck = True  # they may go on in a moment
        return able

    def rebalance(self, pids: Sequence[int], cost: float | None, held: Collection[int] = ()) -> list[Batch]:
        """Take work back for those of the workers `pids` that have none.

        Parameters
        ----------
        pids : sequence of int
            The workers.
        cost : float, optional
            Seconds that an element takes, as far as is known.
        held : collection of int
            Those of them that are to get nothing for now.

        Returns
        -------
        list of Batch
            They are out no more, and go to others; all else that is taken back comes with an answer.
        """
        self.stuck = False
        taken: list[Batch] = []
        idle = [pid for pid in pids if not self.batches.get(pid) and pid not in held and self._takes(pid)]
        if not idle:
            # One that takes nothing may do so in a moment, and nothing tells of that.
            waiting = any(len(self.batches.get(pid, ())) > 1 for pid in pids)
            self.stuck = waiting and any(map(self.is_blocked, pids))
            return taken
        now = time.monotonic()
        running: list[Batch] = []
        for pid in pids:
            batches = self.batches.get(pid)
            if not batches:
                continue
            last = batches[-1]
            page = self._node.pages.get(pid)
            waits = len(batches) > 1 and pid != self._node.pid
            unread = page is not None and self._is_unread(page, batches[0])
            if waits or unread:
                if not last.recalled and any(each not in last.avoids for each in idle):
                    self.stuck = True
                    if unread and now - batches[0].since > self._unread:
                        self._unread *= 2
                        taken += self._take_back(page, batches)
                    elif waits and self._is_worth(last, now, cost):
                        taken += self._take_back(page, batches)
            elif not batches[0].final:
                self.stuck = True
                if now - batches[0].since > _TAKE_BACK_SECONDS:
                    running.append(batches[0])
        running.sort(key=lambda batch: -len(batch.elements))
        for batch in running[: len(idle)]:
            self._divide(batch)
        return taken

    def _is_unread(self, page: ProgressPage, batch: Batch) -> bool:
        """Return whether a worker has not begun a batch, for all that its page says."""
        try:
            return page.begun(self._lane) < batch.call_id
        except ValueError:  # the worker is gone
            return False

    def _is_worth(self, batch: Batch, now: float, cost: float | None) -> bool:
        """Return whether it is worth it to take a batch back that waits behind another one."""
        # It may also be short, but wait behind one that takes unexpectedly long.
        if cost is None or cost * len(batch.elements) > _MIN_STOLEN_SECONDS:
            return True
        return now - batch.since > _TAKE_BACK_SECONDS

    def _take_back(self, page: ProgressPage | None, batches: list[Batch]) -> list[Batch]:
        """Take back what a worker has not begun; returns what is its own no more."""
        last = batches[-1]
        if page is None:
            link = self._node.peers.links.get(last.pid)
            if link is not None:
                last.recalled = True
                self._node.reactor.post(link, _CANCEL, NOT_RUN, last.call_id)
            return []
        try:
            begun = page.withdraw(self._lane, last.call_id)
        except ValueError:  # the worker is gone, and they come back by that
            return []
        taken = [batch for batch in batches if batch.call_id > begun]
        del batches[len(batches) - len(taken) :]
        self.back.update((batch.call_id, batch.pid) for batch in taken)
        return taken

    def _divide(self, batch: Batch) -> None:
        """Ask for the later half of what a running batch has not begun."""
        batch.final = True  # until the answer is there
        node = self._node
        if batch.pid == node.pid:
            self._divided(SplitRequest(batch, kept=divide((node.pid, batch.call_id))))
            return
        payload = codec.dumps((_divide_for, (node.pid, batch.call_id), {}))
        thread_state = current()
        thread_state.enter()
        try:
            with contextlib.suppress(ShmdistError, OSError):  # it is dying, and its batches come back
                node.requests.request(
                    batch.pid,
                    _CALL,
                    WANT_VALUE,
                    payload,
                    callback=lambda reply: self._divided(SplitRequest(batch, reply)),
                )
        finally:
            thread_state.leave()


def _divide_for(pid: int, call_id: int) -> int | None:
    """Divide a batch that process `pid` sent here; a remote call."""
    return divide((pid, call_id))


__all__ = ["Assignments", "Batch", "SplitRequest"]
