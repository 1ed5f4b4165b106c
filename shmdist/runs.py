"""The engine under ``pmap`` and ``@distributed``: many elements, in batches, over many workers.

How a run goes
--------------
The function is pickled once and sent once to each worker (`shipping.Shipped`). Elements go
out in batches, on a lane of their own, so that a worker runs the batches of one run one
after the other, however many are on their way to it. Each worker has a window of batches:
the next one is there before the last is done (`sizes`). However they are batched, elements
are apart from one another as calls of their own are (`wire.apart`).

A worker that has nothing left is given what still waits on others: first batches that wait
behind another one, then the later half of a batch that runs, and so on until nothing waits
behind an element that takes long (`assignments`).

What happens when a worker dies
-------------------------------
A local worker notes on a page of memory, which outlives it, which element it has begun;
process 1 tells the others what the page says when it tells of the death. That element has
lost its worker, and is an error or is retried. The others of its batches are given to
other workers: those before it were done, but their results died with the worker.

Where there is no page, or no news of it, the batch that the worker had first is the one it
was at: the others have not begun. Its elements are sent once more, one by one, and one
that was alone is held to have lost its worker. So one death costs a run one element at most.

Interrupts
----------
Whatever leaves the generator before its end (an error, Ctrl-C, ``close()``) cancels all
batches that are out.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from shmdist.assignments import Assignments, Batch, Division
from shmdist.batches import BatchRunner, Results, note_key
from shmdist.errors import ProcessExitedException
from shmdist.runtime.dispatch import SPIN
from shmdist.runtime.mail import Together
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.replies import Reply, unpack_error
from shmdist.runtime.strand import Cell, current
from shmdist.shipping import Shipped
from shmdist.sizes import Sizes, is_cheap
from shmdist.wire import codec
from shmdist.wire.apart import Unreadable, pack
from shmdist.wire.link import LinkClosed, Unwoken
from shmdist.wire.messages import BY_ID, IS_ERROR, NOT_RUN, WANT_VALUE, Kind, Parts

_JOINED = 1 << 16  # bytes of several frames that are written as one piece
_AGAIN = 0.005  # seconds until work is looked for again that can be taken back
_DEADLY = 3  # workers that may die over a batch before it is held to be the cause
_CALL, _FUNC = int(Kind.CALL), int(Kind.FUNC)

#: Places in the input, as a range or a list; then their values; or the error of one.
Outcome = tuple[Sequence[int], list[Any], BaseException | None]


class Run:
    """One run over many elements; :meth:`outcomes` is the run itself.

    Parameters
    ----------
    f : BatchRunner or Shipped
        The function; a Shipped BatchRunner is kept by its owner.
    elements : iterable
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
    known : Repeated, optional
        Arrays that go out many times.
    """

    def __init__(
        self,
        f: BatchRunner | Shipped,
        elements: Iterable[Any],
        pids: Callable[[], list[int]],
        *,
        total: int | None = None,
        batch_size: int | None = None,
        room: Callable[[], int] | None = None,
        retry: Callable[[int, BaseException], float | None] | None = None,
        known: Any = None,
    ) -> None:
        self.node: Node = current_node()
        self.kept = isinstance(f, Shipped)
        self.shipped: Shipped = f if isinstance(f, Shipped) else Shipped(f)
        # A range need not be read: a part of it is a range as well, and costs nothing to send.
        self.range = elements if type(elements) is range else None
        self.elements = iter(elements)
        self.exhausted = False
        self.pids = pids
        self.drawn = 0
        self.room = room
        self.retry = retry
        self.lane = 1 + next(self.node.lanes) % 0xFFFFFFFE
        self.cell = Cell()
        self.inbox: deque[Any] = deque()  # what has come: replies, batches that ran here, divisions
        self.out = Assignments(self.node, self._arrived)
        self.calls: dict[int, Batch] = {}  # batches by call
        self.redo: deque[tuple[int, Any]] = deque()  # to go out again in batches
        self.alone: deque[tuple[int, Any]] = deque()  # to go out again one by one
        self.later: list[tuple[float, int, Any]] = []  # retries: when, place, element
        self.mourned: list[int] = []  # workers that this run has lost
        self.unreachable: set[int] = set()  # workers to which there is no link, for they are dying
        self.deadly: Counter[int] = Counter()  # workers lost over elements not known to have begun, by place
        self.known = known
        cheap = False
        # Where results are wanted one by one, a quick one must not wait for a slow one behind it.
        if batch_size is None and total is not None and room is None:
            first = list(itertools.islice(self.elements, 1))
            self.elements = itertools.chain(first, self.elements)
            cheap = bool(first) and is_cheap(first[0])
        self.sizes = Sizes(total, batch_size, cheap)

    # ------------------------------------------------------------------ the run

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes as they come."""
        ready: list[Outcome] = []
        try:
            while True:
                self._dispatch(ready)
                if ready:
                    # Work is under way while the caller looks at these.
                    done, ready = ready, []
                    yield from done
                    continue
                if not self.out and not self.later:
                    return
                strand = current()  # asked each time: the generator may go on in another thread
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
        if self.out.stuck:
            timeout = _AGAIN if timeout is None else min(timeout, _AGAIN)
        self.cell.done = False
        if not self.inbox:
            self.node.dispatcher.wait(self.cell, timeout, spin=SPIN if self.sizes.brief else 0.0)

    def _cancel(self) -> None:
        """Cancel what is out, and let the workers forget the function."""
        with current():
            self._clear_up()

    def _clear_up(self) -> None:
        for reply in [self.node.pending.get(call_id) for call_id in self.calls]:
            if reply is not None:
                self.node.cancel(reply)
        self.calls.clear()
        self.known = None  # its blocks go back now, and not when the collector comes by; so do elements:
        self.inbox = deque(maxlen=0)  # a division may still be answered
        del self.out  # which leads back to this run
        if not self.kept:
            self.shipped.drop()

    # ------------------------------------------------------------------ going out

    def _dispatch(self, ready: list[Outcome]) -> None:
        """Give workers what they have room for."""
        while self.later and self.later[0][0] <= time.monotonic():
            self.alone.append(heapq.heappop(self.later)[1:])
        graves, unreachable = self.node.graves, self.unreachable
        pids = [pid for pid in self.pids() if pid not in graves and pid not in unreachable]
        if self.exhausted and not self.redo and not self.alone:
            self.out.rebalance(pids, self.sizes.cost)
            return
        if not pids:
            self._fail_next(ready)
            return
        self.out.stuck = False
        window = self.sizes.window(self.drawn, len(pids))
        have = {pid: self.out.count(pid) for pid in pids}
        # A worker that has half its window is left alone: then several batches go out at once.
        hungry = [pid for pid in pids if 2 * have[pid] <= window]
        plan: dict[int, list[Batch]] = {}
        # Every worker gets its first batch before any gets its second.
        for level, pid in itertools.product(range(window), hungry):
            if have[pid] <= level:
                batch = self._next_batch(pid, len(pids))
                if batch is None:
                    break
                plan.setdefault(pid, []).append(batch)
                have[pid] += 1
        with Together(self.node.dispatcher.mail) as unwoken:
            for pid, batches in plan.items():
                self._send(pid, batches, ready, unwoken)
                unwoken.turn()
        if not plan and hungry:
            self.out.rebalance(pids, self.sizes.cost)

    def _fail_next(self, ready: list[Outcome]) -> None:
        """There are no workers left: elements that are not done have lost theirs."""
        if self.out:
            return  # what is out comes back first, by its worker's death if not otherwise
        lost = self.mourned[-1] if self.mourned else max(self.unreachable, default=0)
        # The input is read on by one element at a time, for it may have no end.
        places = [place for place, _ in [*self.redo, *self.alone]] + [place for _, place, _ in self.later]
        self.redo.clear()
        self.alone.clear()
        self.later.clear()
        if not places:
            batch = self._draw(0, 1)
            places = [] if batch is None else list(batch.places)
        for place in places:
            ready.append(((place,), [], self.node.death(lost)))

    def _next_batch(self, pid: int, workers: int) -> Batch | None:
        """Return the next batch, None when there is nothing to do for now."""
        if self.alone:
            place, element = self.alone.popleft()
            return Batch(pid, (place,), [element])
        size = self.sizes.next(self.drawn, workers)
        if self.redo:
            again = [self.redo.popleft() for _ in range(min(size, len(self.redo)))]
            return Batch(pid, [place for place, _ in again], [element for _, element in again])
        return self._draw(pid, size)

    def _draw(self, pid: int, size: int) -> Batch | None:
        """Return a batch of elements read from the input."""
        if self.exhausted:
            return None
        if self.room is not None:
            size = min(size, self.room())
            if size <= 0:
                return None
        start = self.drawn
        if self.range is None:
            elements: Any = list(itertools.islice(self.elements, size))
        else:
            elements = self.range[start : start + size]
            if size == 1:  # a number costs less to send than the range of it
                elements = list(elements)
        count = len(elements)
        if count < size:
            self.exhausted = True
            if not count:
                return None
        self.drawn += count
        return Batch(pid, range(start, start + count), elements)

    def _send(self, pid: int, batches: list[Batch], ready: list[Outcome], unwoken: Unwoken) -> None:
        """Send batches to a worker, in one go; `unwoken` as in ``Link.leave``."""
        node = self.node
        if pid == node.pid:
            for batch in batches:
                self._start_here(batch)
            return
        payloads = []
        for batch in batches:
            payload = self._pickle(batch, ready)
            if payload is not None:
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
                call_id = batch.call_id = next(node.call_ids)
                self.calls[call_id] = batch
                self.out.add(batch)
                node.pending[call_id] = Reply(call_id, pid, self._arrived)
                if payload.buffers:
                    payload.known = self.known
                self.sizes.weigh(payload, len(batch.elements))
                parts.join(codec.frame(_CALL, WANT_VALUE | BY_ID, self.lane, call_id, payload, link))
                together.refs += payload.refs
            if len(parts) > 1 and sum(map(len, parts)) < _JOINED:
                parts[:] = [b"".join(parts)]
            sending = True
            node.send(link, parts, together, unwoken=unwoken)
        except (LinkClosed, KeyError):
            pass  # its death is on its way, and fails what was sent to it
        except ProcessExitedException:
            self.unreachable.add(pid)  # it is dying
        except Exception:
            if pid not in node.graves:
                raise
        finally:
            if not sending:  # a later frame of them could not be made
                node.sharing.take_back(parts, pid)
            strand.leave()
        if pid in node.graves or pid in self.unreachable:
            self._fail_sent(pid, [batch for batch, _ in payloads])

    def _pickle(self, batch: Batch, ready: list[Outcome]) -> codec.Payload | None:
        """Pickle a batch; elements that cannot be sent are failed, and the others go again without them."""
        number, sizes, elements = self.shipped.number, self.sizes, batch.elements
        try:
            if len(elements) == 1:
                return codec.dumps_arguments((number, (elements, False), _NO_KEYWORDS), elements[0])
            probe = sizes.cost is None and sizes.fixed is None
            return codec.dumps((number, (pack(elements), probe), _NO_KEYWORDS), "the elements")
        except Exception as caught:
            whole = caught
        for place, element in batch.pairs():
            try:
                codec.dumps(element, "the element", f"element {place}")
            except Exception as error:
                self._end(place, element, error, ready)
            else:
                if len(elements) == 1:  # it was otherwise a moment ago
                    self._end(place, element, whole, ready)
                else:
                    self.redo.append((place, element))
        return None

    def _function_for(self, pid: int, together: codec.Payload) -> Parts:
        """Return the frame of the function, to go ahead of the first batch; or see it sent."""
        shipped = self.shipped
        if self.kept or pid in shipped.there or pid not in self.node.links:
            shipped.send_to(pid)
            return Parts()
        shipped.there.add(pid)
        together.refs += shipped.payload.refs
        link = self.node.links[pid]
        return codec.frame(_FUNC, 0, 0, shipped.number, shipped.payload, link)

    def _fail_sent(self, pid: int, batches: list[Batch]) -> None:
        """A worker was gone before these were sent: nobody else will fail them."""
        for batch in batches:
            if not batch.call_id:
                self.redo.extend(batch.pairs())
                continue
            reply = self.node.pending.pop(batch.call_id, None)
            if reply is not None:
                self.node.fail(reply, self.node.death(pid))

    def _arrived(self, what: Reply | Batch | Division) -> None:
        """Take note of something that has come; on any thread."""
        self.inbox.append(what)
        self.node.dispatcher.complete(self.cell)

    def _start_here(self, batch: Batch) -> None:
        """Run a batch on a thread of this process."""
        node = self.node
        batch.call_id = next(node.call_ids)
        self.out.add(batch)

        def run() -> None:
            strand = current()
            depth, strand.depth = strand.depth, 0
            key = (node.pid, batch.call_id)
            batch.results = self.shipped.f.run(list(batch.elements), False, key)  # type: ignore[attr-defined]  # a BatchRunner
            strand.depth = depth
            self._arrived(batch)

        node.dispatcher.start(run)

    # ------------------------------------------------------------------ coming back

    def _collect(self, ready: list[Outcome]) -> None:
        """Take the batches that have come back apart."""
        while self.inbox:
            arrived = self.inbox.popleft()
            if type(arrived) is Reply:
                batch = self.calls.pop(arrived.call_id)
                first = self.out.batches[batch.pid][0] is batch
                self.out.remove(batch)
                self._open(batch, arrived, first, ready)
            elif type(arrived) is Batch:
                self.out.remove(arrived)
                assert arrived.results is not None
                self._take(arrived, arrived.results, ready)
            else:
                self._divided(arrived)

    def _open(self, batch: Batch, reply: Reply, first: bool, ready: list[Outcome]) -> None:
        """Read what a batch came to; `first` tells that it was the first that its worker had."""
        frame = reply.frame
        if frame is None:
            assert reply.error is not None
            self._lost(batch, reply.error, first, ready)
        elif frame.flags & NOT_RUN:
            self.redo.extend(batch.pairs())
        else:
            try:
                results = self.node.read_result(frame, batch.pid, "a batch of elements")
            except Exception as error:
                self._broken(batch, error, ready, begun=not frame.flags & IS_ERROR)
            else:
                self._take(batch, results, ready)

    def _divided(self, division: Division) -> None:
        """Give what was taken out of a running batch to other workers."""
        batch, kept = division.batch, division.read(self.node)
        if kept is None or kept >= len(batch.elements):
            return
        if batch in self.out.batches[batch.pid]:  # else its answer was here first, and told the same
            self.redo.extend(batch.cut(kept))
            batch.final = kept < 2

    def _take(self, batch: Batch, results: Results, ready: list[Outcome]) -> None:
        """Take a batch's results."""
        seconds, values, errors = results
        count = len(values)
        if count:
            self.sizes.learn(seconds, count)
        places = batch.places
        if errors is None and count == len(places) and type(values) is list:
            ready.append((places, values, None))
            return
        errors = errors or {}
        for index, (place, element, value) in enumerate(zip(places, batch.elements, values, strict=False)):
            if index in errors:
                self._end(place, element, unpack_error(batch.pid, *errors[index]), ready)
            elif type(value) is Unreadable:
                error = codec.unreadable(value.error, f"a result from process {batch.pid}")
                error.__cause__ = value.error
                self._end(place, element, error, ready)
            else:
                ready.append(((place,), [value], None))
        if count < len(places):  # these have not begun: a probe's time was up, say
            self.redo.extend(zip(places[count:], batch.elements[count:], strict=True))

    def _broken(self, batch: Batch, error: Exception, ready: list[Outcome], *, begun: bool) -> None:
        """The batch as a whole failed: it, or what it came to, could not be read."""
        if begun or len(batch.elements) == 1:
            for place, element in batch.pairs():
                self._end(place, element, error, ready)
        else:
            # It never began; one by one, the culprit shows.
            self.alone.extend(batch.pairs())

    def _lost(self, batch: Batch, error: BaseException, first: bool, ready: list[Outcome]) -> None:
        """The worker of a batch is gone."""
        pid, pairs = batch.pid, batch.pairs()
        self.shipped.forget(pid)
        first = first and pid not in self.mourned
        self.mourned.append(pid)
        words = self.node.last_words.get(pid)
        begun = None if words is None else words.get(note_key((self.node.pid, batch.call_id)))
        if begun is not None and begun < len(pairs):
            self.redo.extend(pairs[:begun] + pairs[begun + 1 :])
            self._end(*pairs[begun], error, ready)
        elif not first:
            self.redo.extend(pairs)  # it waited behind another batch: nobody's fault
        elif words is not None and self._harmless(pairs):
            self.redo.extend(pairs)
        elif len(pairs) == 1:
            self._end(*pairs[0], error, ready)
        else:
            self.alone.extend(pairs)

    def _harmless(self, pairs: list[tuple[int, Any]]) -> bool:
        """Tell whether a batch may be tried again whose worker died when it was to begin it.

        Mostly that is nobody's fault. But reading an element may also end a process, which
        must not go on to the last worker.
        """
        self.deadly.update(place for place, _ in pairs)
        return max(self.deadly[place] for place, _ in pairs) < _DEADLY

    def _end(self, place: int, element: Any, error: BaseException, ready: list[Outcome]) -> None:
        """An element has failed: it is tried again, or that is its outcome."""
        delay = None if self.retry is None else self.retry(place, error)
        if delay is None:
            ready.append(((place,), [], error))
        else:
            heapq.heappush(self.later, (time.monotonic() + delay, place, element))


_NO_KEYWORDS: dict[str, Any] = {}
