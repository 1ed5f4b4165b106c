"""The engine under ``pmap`` and ``@distributed``: many elements, in batches, over many workers.

How a run goes
--------------
The function is pickled once and sent once to each worker (`pools.Shipped`). Elements go
out in batches, on a lane of their own, so that a worker runs the batches of one run one
after the other, however many are on their way to it. Each worker has up to `WINDOW`
batches: the next one is there before the last is done.

The batch size follows from what elements have cost so far: large enough that messages do
not count, small enough that the end comes for all workers at about the same time. A
worker that has nothing left is given what still waits behind another's running batch.

What happens when a worker dies
-------------------------------
A local worker notes on a page of memory, which outlives it, which element it has begun.
That element has lost its worker, and is an error or is retried. The others of its batches
are given to other workers: those before it were done, but their results died with the
worker. Where there is no page, elements of a batch of several are sent once more, one by
one, and only an element that was alone is held to have lost its worker.

Interrupts
----------
Whatever leaves the generator before its end (an error, Ctrl-C, ``close()``) cancels all
batches that are out.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shmdist.batches import BatchRunner, Results
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.replies import Reply, unpack_error
from shmdist.runtime.strand import Cell, current
from shmdist.shipping import Shipped
from shmdist.wire import codec
from shmdist.wire.link import LinkClosed
from shmdist.wire.messages import BY_ID, IS_ERROR, NOT_RUN, WANT_VALUE, Kind, Parts

WINDOW = 2  # batches of a run that a worker has at a time, at least
_DEEPEST = 32  # and at most, when they are short
_AHEAD = 0.0005  # seconds of work that a worker should have waiting
_MESSAGE = 15e-6  # seconds that a message costs its receiver, roughly
_JOINED = 1 << 16  # bytes of several frames that are written as one piece
_GROW = 16  # a batch is at most so many times as large as the one before
_LONG = 0.02  # seconds of work in a batch, at most
_PROBED = 512  # elements it is given for that, at most, when they are cheap to send
_CHEAP = frozenset({int, float, bool, complex, type(None)})  # types of such elements
_BRIEF = 0.002  # seconds of work that may go out in one batch at the end
_SHORT = 0.0003  # seconds of work below which a smaller batch is not worth its message
_STUCK = 0.005  # seconds after which a batch that waits behind another one is taken back
_STEAL = 0.002  # seconds of work below which a waiting batch is not worth taking back
_CALL, _CANCEL = int(Kind.CALL), int(Kind.CANCEL)

#: Places in the input, as a range or a list; then their values; or the error of one.
Outcome = tuple[Sequence[int], list[Any], BaseException | None]


class _Batch:
    """Elements that went out together: their places in the input, and themselves."""

    __slots__ = ("call_id", "elements", "pid", "places", "recalled", "results", "sent")

    def __init__(self, pid: int, places: Sequence[int], elements: list[Any]) -> None:
        self.pid = pid
        self.places = places
        self.elements = elements
        self.call_id = 0
        self.recalled = False
        self.sent = 0.0  # when; seconds of the monotonic clock
        self.results: Results | None = None  # of a batch that ran on this process


class Run:
    """One run over many elements; :meth:`outcomes` is the run itself.

    Parameters
    ----------
    f : BatchRunner or Shipped
        The function; a Shipped BatchRunner is kept by its owner.
    elements : iterator
        Read as far as there is room.
    pids : callable
        Returns the workers.
    total : int, optional
        How many elements there are, if known.
    batch_size : int, optional
        Fixed size of batches; default adaptive.
    room : callable, optional
        Returns how many more elements may go out now.
    retry : callable, optional
        Given an element's place and its error; returns the seconds until it is tried once
        more, or None when its error stands.
    """

    def __init__(
        self,
        f: BatchRunner | Shipped,
        elements: Iterator[Any],
        pids: Callable[[], list[int]],
        *,
        total: int | None = None,
        batch_size: int | None = None,
        room: Callable[[], int] | None = None,
        retry: Callable[[int, BaseException], float | None] | None = None,
    ) -> None:
        self.node: Node = current_node()
        self.kept = isinstance(f, Shipped)
        self.shipped: Shipped = f if isinstance(f, Shipped) else Shipped(f)
        self.elements = elements
        self.exhausted = False
        self.pids = pids
        self.total = total
        self.drawn = 0
        self.batch_size = batch_size
        self.room = room
        self.retry = retry
        self.lane = 1 + next(self.node.lanes) % 0xFFFFFFFE
        self.cell = Cell()
        self.inbox: deque[Any] = deque()  # replies, and batches that ran here, as they come
        self.out: dict[int, list[_Batch]] = {}  # batches by worker
        self.calls: dict[int, _Batch] = {}  # batches by call
        self.redo: deque[tuple[int, Any]] = deque()  # to go out again in batches
        self.alone: deque[tuple[int, Any]] = deque()  # to go out again one by one
        self.later: list[tuple[float, int, Any]] = []  # retries: when, place, element
        self.cost: float | None = None  # seconds an element takes, of late
        self.stuck = False  # a batch waits behind another, and a worker has nothing to do
        self.largest = 1  # the largest batch so far
        self.cheap = False
        self.known: Any = None  # finds blocks of arrays that go out many times
        if batch_size is None and total is not None:
            first = list(itertools.islice(elements, 1))
            self.elements = itertools.chain(first, elements)
            self.cheap = bool(first) and _is_cheap(first[0])

    # ------------------------------------------------------------------ the run

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes as they come."""
        strand = current()
        ready: list[Outcome] = []
        try:
            while True:
                self._dispatch(ready)
                if ready:
                    # Work is under way while the caller looks at these.
                    done, ready = ready, []
                    yield from done
                    continue
                if not self.calls and not any(self.out.values()) and not self.later:
                    return
                strand.enter()
                try:
                    self._wait()
                finally:
                    strand.leave()
                if self.node.has_output:
                    self.node.print_output()
                self._collect(ready)
        finally:
            self._cancel()

    def _wait(self) -> None:
        """Wait for a batch to come back, or for a retry's time."""
        timeout = None
        if self.later:
            timeout = max(0.0, self.later[0][0] - time.monotonic())
        if self.stuck:
            timeout = min(timeout or _STUCK, _STUCK)
        self.cell.done = False
        if not self.inbox:
            self.node.dispatcher.wait(self.cell, timeout)

    def _cancel(self) -> None:
        """Cancel what is out, and let the workers forget the function."""
        for call_id, batch in list(self.calls.items()):
            reply = self.node.pending.get(call_id)
            if reply is not None:
                self.node.cancel(reply)
            del batch
        self.calls.clear()
        self.out.clear()
        if not self.kept:
            self.shipped.drop()

    # ------------------------------------------------------------------ going out

    def _dispatch(self, ready: list[Outcome]) -> None:
        """Give workers what they have room for."""
        while self.later and self.later[0][0] <= time.monotonic():
            self.alone.append(heapq.heappop(self.later)[1:])
        if self.exhausted and not self.redo and not self.alone:
            self._recall()
            return
        graves = self.node.graves
        pids = [pid for pid in self.pids() if pid not in graves]
        if not pids:
            self._fail_all(ready)
            return
        window = self._window(len(pids))
        have = {pid: len(self.out.get(pid, ())) for pid in pids}
        # A worker that has half its window is left alone: then several batches go out at once.
        hungry = [pid for pid in pids if 2 * have[pid] <= window]
        plan: dict[int, list[_Batch]] = {}
        # Every worker gets its first batch before any gets its second.
        for level, pid in itertools.product(range(window), hungry):
            if have[pid] <= level:
                batch = self._next_batch(pid, len(pids))
                if batch is None:
                    break
                plan.setdefault(pid, []).append(batch)
                have[pid] += 1
        for pid, batches in plan.items():
            self._send(pid, batches, ready)

    def _window(self, workers: int) -> int:
        """Return how many batches a worker should have: some work ahead, but no more."""
        if self.cost is None:
            return WINDOW
        one = self.cost * self._next_size(workers) + _MESSAGE
        return max(WINDOW, min(_DEEPEST, int(_AHEAD / one)))

    def _fail_all(self, ready: list[Outcome]) -> None:
        """There are no workers left: every element that is not done has lost its worker."""
        error = self.node.death(max(self.node.graves, default=0))
        while self.later:
            self.redo.append(heapq.heappop(self.later)[1:])
        while (batch := self._next_batch(0, 1)) is not None:
            for place in batch.places:
                ready.append(((place,), [], error))

    def _next_batch(self, pid: int, workers: int) -> _Batch | None:
        """Return the next batch, None when there is nothing to do for now."""
        if self.alone:
            place, element = self.alone.popleft()
            return _Batch(pid, (place,), [element])
        size = self._next_size(workers)
        if self.redo:
            again = [self.redo.popleft() for _ in range(min(size, len(self.redo)))]
            return _Batch(pid, [place for place, _ in again], [element for _, element in again])
        if self.exhausted:
            return None
        if self.room is not None:
            size = min(size, self.room())
            if size <= 0:
                return None
        elements = list(itertools.islice(self.elements, size))
        count = len(elements)
        if count < size:
            self.exhausted = True
            if not count:
                return None
        start = self.drawn
        self.drawn += count
        self.largest = max(self.largest, count)
        return _Batch(pid, range(start, start + count), elements)

    def _next_size(self, workers: int) -> int:
        """Return how many elements the next batch should have."""
        if self.batch_size is not None:
            return self.batch_size
        if self.cost is None:
            # Unknown yet: a few for the worker to try, if it costs little to get them back.
            few = 1 if self.total is None else min(_PROBED, self.total // (8 * workers))
            return max(1, few) if self.cheap else 1
        cost = max(self.cost, 1e-8)
        size = _LONG / cost
        if self.total is not None:
            share = (self.total - self.drawn) / workers
            # The rest goes out in one batch each when it is little, else in ever smaller ones.
            fair = share if cost * share < _BRIEF else share / 2
            size = min(size, max(fair, _SHORT / cost))
        return max(1, min(int(size), self.largest * _GROW))

    def _send(self, pid: int, batches: list[_Batch], ready: list[Outcome]) -> None:
        """Send batches to a worker, in one go."""
        node = self.node
        out = self.out.setdefault(pid, [])
        if pid == node.pid:
            for batch in batches:
                out.append(batch)
                self._start_here(batch)
            return
        payloads = []
        for batch in batches:
            try:
                probe = self.cost is None and len(batch.elements) > 1 and self.batch_size is None
                arguments = (self.shipped.number, (batch.elements, probe), _NO_KEYWORDS)
                if len(batch.elements) == 1:
                    payload = codec.dumps_arguments(arguments, batch.elements[0])
                else:
                    payload = codec.dumps(arguments, "the elements")
            except Exception as error:
                if len(batch.elements) == 1:
                    self._end(batch.places[0], batch.elements[0], error, ready)
                else:  # one by one, so that an element that cannot be sent costs no other
                    self.alone.extend(zip(batch.places, batch.elements, strict=True))
                continue
            payloads.append((batch, payload))
        if not payloads:
            return
        strand = current()
        strand.enter()
        parts, sending = Parts(), False
        try:
            together = codec.Payload()
            parts.join(self._function_for(pid, together))
            link = node.links[pid]
            for batch, payload in payloads:
                batch.sent = time.monotonic()
                call_id = batch.call_id = next(node.call_ids)
                self.calls[call_id] = batch
                out.append(batch)
                node.pending[call_id] = Reply(call_id, pid, self._arrived)
                payload.known = self.known
                parts.join(codec.frame(_CALL, WANT_VALUE | BY_ID, self.lane, call_id, payload, link))
                together.refs += payload.refs
            if len(parts) > 1 and sum(map(len, parts)) < _JOINED:
                parts[:] = [b"".join(parts)]
            sending = True
            node.send(link, parts, together)
        except (LinkClosed, KeyError):
            pass  # its death is on its way, and fails what was sent to it
        except Exception:
            if pid not in node.graves:
                raise
        finally:
            if not sending:  # a later frame of them could not be made
                node.sharing.take_back(parts, pid)
            strand.leave()
        if pid in node.graves:
            self._fail_sent(pid, [batch for batch, _ in payloads])

    def _function_for(self, pid: int, together: codec.Payload) -> Parts:
        """Return the frame of the function, to go ahead of the first batch; or see it sent."""
        shipped = self.shipped
        if self.kept or pid in shipped.there or pid not in self.node.links:
            shipped.send_to(pid)
            return Parts()
        shipped.there.add(pid)
        together.refs += shipped.payload.refs
        link = self.node.links[pid]
        return codec.frame(int(Kind.FUNC), 0, 0, shipped.number, shipped.payload, link)

    def _fail_sent(self, pid: int, batches: list[_Batch]) -> None:
        """A worker was gone before these were sent: nobody else will fail them."""
        for batch in batches:
            if not batch.call_id:
                self.redo.extend(zip(batch.places, batch.elements, strict=True))
                continue
            reply = self.node.pending.pop(batch.call_id, None)
            if reply is not None:
                self.node.fail(reply, self.node.death(pid))

    def _arrived(self, reply: Reply) -> None:
        """Take note of a reply; on the reading thread."""
        self.inbox.append(reply)
        self.node.dispatcher.complete(self.cell)

    def _start_here(self, batch: _Batch) -> None:
        """Run a batch on a thread of this process."""

        def run() -> None:
            strand = current()
            depth, strand.depth = strand.depth, 0
            batch.results = self.shipped.f(batch.elements)
            strand.depth = depth
            self.inbox.append(batch)
            self.node.dispatcher.complete(self.cell)

        self.node.dispatcher.start(run)

    def _recall(self) -> None:
        """Take batches back that wait behind others, for workers that have nothing left."""
        pids = self.pids()
        self.stuck = False
        if all(self.out.get(pid) for pid in pids):
            return
        now = time.monotonic()
        for pid in pids:
            batches = self.out.get(pid, [])
            if len(batches) < 2 or pid == self.node.pid:
                continue
            batch = batches[-1]
            # It may also be short, but wait behind one that takes unexpectedly long.
            long = self.cost is None or self.cost * len(batch.elements) > _STEAL or now - batch.sent > _STUCK
            link = self.node.links.get(pid)
            self.stuck = self.stuck or not batch.recalled
            if not batch.recalled and long and link is not None:
                batch.recalled = True
                self.node.post(link, _CANCEL, NOT_RUN, batch.call_id)

    # ------------------------------------------------------------------ coming back

    def _collect(self, ready: list[Outcome]) -> None:
        """Take the batches that have come back apart."""
        while self.inbox:
            arrived = self.inbox.popleft()
            if isinstance(arrived, _Batch):
                self.out[arrived.pid].remove(arrived)
                assert arrived.results is not None
                self._take(arrived, arrived.results, ready)
                continue
            reply: Reply = arrived
            batch = self.calls.pop(reply.call_id)
            self.out[batch.pid].remove(batch)
            frame = reply.frame
            if frame is None:
                self._lost(batch, reply, ready)
            elif frame.flags & NOT_RUN:
                self.redo.extend(zip(batch.places, batch.elements, strict=True))
            else:
                try:
                    results = self.node.read_result(frame, batch.pid, "a batch of elements")
                except Exception as error:
                    self._broken(batch, error, ready, begun=not frame.flags & IS_ERROR)
                else:
                    self._take(batch, results, ready)

    def _take(self, batch: _Batch, results: Results, ready: list[Outcome]) -> None:
        """Take a batch's results."""
        seconds, values, errors = results
        count = len(values)
        if count:
            cost = seconds / count
            self.cost = cost if self.cost is None else 0.5 * (self.cost + cost)
        places = batch.places
        if errors is None and count == len(places):
            ready.append((places, values, None))
            return
        errors = errors or {}
        for index, (place, element, value) in enumerate(zip(places, batch.elements, values, strict=False)):
            if index in errors:
                self._end(place, element, unpack_error(batch.pid, *errors[index]), ready)
            else:
                ready.append(((place,), [value], None))
        if count < len(places):  # a probe's time was up, or it was interrupted: these have not begun
            self.redo.extend(zip(places[count:], batch.elements[count:], strict=True))

    def _broken(self, batch: _Batch, error: Exception, ready: list[Outcome], *, begun: bool) -> None:
        """The batch as a whole failed: it, or what it came to, could not be read."""
        if begun or len(batch.elements) == 1:
            for place, element in zip(batch.places, batch.elements, strict=True):
                self._end(place, element, error, ready)
        else:
            # It never began; one by one, the culprit shows.
            self.alone.extend(zip(batch.places, batch.elements, strict=True))

    def _lost(self, batch: _Batch, reply: Reply, ready: list[Outcome]) -> None:
        """The worker of a batch is gone."""
        error = reply.error
        assert error is not None
        self.shipped.forget(batch.pid)
        pairs = list(zip(batch.places, batch.elements, strict=True))
        words = self.node.last_words.get(batch.pid)
        if words is not None:
            begun = words.get(reply.call_id)
            if begun is None or begun >= len(pairs):
                self.redo.extend(pairs)  # it waited behind another batch: nobody's fault
                return
            self.redo.extend(pairs[:begun] + pairs[begun + 1 :])
            self._end(*pairs[begun], error, ready)
        elif len(pairs) == 1:
            self._end(*pairs[0], error, ready)
        else:
            self.alone.extend(pairs)

    def _end(self, place: int, element: Any, error: BaseException, ready: list[Outcome]) -> None:
        """An element has failed: it is tried again, or that is its outcome."""
        delay = None if self.retry is None else self.retry(place, error)
        if delay is None:
            ready.append(((place,), [], error))
        else:
            heapq.heappush(self.later, (time.monotonic() + delay, place, element))


_NO_KEYWORDS: dict[str, Any] = {}


def _is_cheap(element: Any) -> bool:
    """Tell whether elements like this one may be sent twice."""
    if type(element) is tuple:
        return len(element) < 8 and all(type(part) is not tuple and _is_cheap(part) for part in element)
    return type(element) in _CHEAP or (type(element) is str and len(element) < 100)
