"""The engine under ``pmap`` and ``@distributed``: many elements, in batches, over many workers.

How a run goes
--------------
The function is pickled once and sent once to each worker (`function_broadcast`). Elements go out in batches,
on a lane of their own, so that a worker runs the batches of one run one after the other, however many are on
their way to it. Each worker has a window of batches: the next one is there before the last is done
(`batch_sizing`). However they are batched, elements are apart from one another as calls of their own are
(`serialization.isolated_items`).

A worker that has nothing left is given what still waits on others: first batches that have not begun, then
the later half of a batch that runs, and so on until nothing waits behind an element that takes long, or
behind a worker that stands still (`assignments`).

What happens when a worker dies
-------------------------------
A local worker notes on a page of memory, which outlives it, which element it has begun; process 1 tells the
others what the page says when it tells of the death. That element has lost its worker, and is an error or is
retried. The others of its batches go to other workers: results of those before it died with the worker.

Where there is no page, or no news of it, the batch that the worker had first is the one it was at, if all
of it was written. Its elements are sent once more, one by one, and one that was alone is held to have lost
its worker. So one death costs a run one element at most.

Interrupts
----------
Whatever leaves the generator before its end (an error, Ctrl-C, ``close()``) cancels what is out.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from shmdist._firmly import firmly
from shmdist.errors import ProcessExitedException, capture, no_workers_left
from shmdist.runtime.interrupts import collecting, current, is_interrupt
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.reactor import SPIN_SECONDS
from shmdist.runtime.replies import PendingReply, pack_error, unpack_error
from shmdist.runtime.ring_exchange import BatchedWakeups
from shmdist.runtime.waiting import Waiter
from shmdist.scheduling.assignments import Assignments, Batch, SplitRequest
from shmdist.scheduling.batch import BatchRunner, Results, note_key
from shmdist.scheduling.batch_sizing import WINDOW, BatchSizer, is_cheap
from shmdist.scheduling.element_errors import name_element
from shmdist.scheduling.failures import Failures
from shmdist.scheduling.function_broadcast import BroadcastFunction
from shmdist.scheduling.input_reader import Feed
from shmdist.scheduling.local_thread import run_on_thread
from shmdist.serialization import codec
from shmdist.serialization.isolated_items import LoadFailure, pack
from shmdist.transport.link import LinkClosed, Wakeups
from shmdist.transport.messages import BY_ID, IS_ERROR, NOT_RUN, WANT_VALUE, Kind, OutgoingFrames

_MAX_JOINED_BYTES = 1 << 16  # of several frames that are written as one piece
_REBALANCE_SECONDS = 0.005  # until work is looked for again that can be taken back
_DEADLY = 3  # workers that may die over a batch before it is held to be the cause
_CALL = int(Kind.CALL)
_NO_KEYWORDS: dict[str, Any] = {}

#: Places in the input, as a range or a list; then their values; or the error of one.
Outcome = tuple[Sequence[int], list[Any], BaseException | None]


class MapRun:
    """One run over many elements; :meth:`outcomes` is the run itself.

    Parameters
    ----------
    f : BatchRunner or BroadcastFunction
        The function; one that is broadcast is kept by its owner.
    elements : iterable or Feed
        Read as far as there is room. A Feed: live; somebody else reads it.
    pids : callable
        Returns the workers.
    total, batch_size : int, optional
        How many elements there are, if known; fixed size of batches, by default adaptive.
    room : callable, optional
        Given how many elements have gone out, returns how many more may go out now.
    retry : callable, optional
        Given an element's place and its error; returns the seconds until it is tried once
        more, or None when its error stands.
    known : Repeated, optional
        Arrays that go out many times.
    describe : callable
        Tells in an element's error, given with its place and the element, whose error it is.
    """

    def __init__(
        self,
        f: BatchRunner | BroadcastFunction,
        elements: Iterable[Any] | Feed,
        pids: Callable[[], list[int]],
        *,
        total: int | None = None,
        batch_size: int | None = None,
        room: Callable[[int], int] | None = None,
        retry: Callable[[int, BaseException], float | None] | None = None,
        known: Any = None,
        describe: Callable[[BaseException, int, Any], None] = name_element,
    ) -> None:
        self.node: Node = current_node()
        self.kept = isinstance(f, BroadcastFunction)
        self.shipped: BroadcastFunction = f if isinstance(f, BroadcastFunction) else BroadcastFunction(f)
        # A range need not be read: a part of it is a range as well, and costs nothing to send.
        self.range = elements if type(elements) is range else None
        self.feed = elements if isinstance(elements, Feed) else None
        self.elements: Iterator[Any] = iter(()) if isinstance(elements, Feed) else iter(elements)
        self.exhausted = False
        self.starved = False  # a worker could have been given more, had it been read
        self.failure: BaseException | None = None  # of the input; raised when all before it is done
        self.pids = pids
        self.drawn = 0
        self.room = room
        self.retry = retry
        self.describe = describe
        self.lane = 1 + next(self.node.requests.lanes) % 0xFFFFFFFE
        self.waiter = Waiter()
        if self.feed is not None:
            self.feed.fed = partial(self.node.reactor.complete, self.waiter)
        self.inbox: deque[Any] = deque()  # what has come: replies, batches that ran here, divisions
        self.out = Assignments(self.node, self.lane, self._arrived)
        self.calls: dict[int, Batch] = {}  # batches by call
        self.redo: deque[tuple[int, Any]] = deque()  # to go out again in batches
        self.alone: deque[tuple[int, Any]] = deque()  # to go out again one by one
        self.later: list[tuple[float, int, Any]] = []  # retries: when, place, element
        self.lost_workers: list[int] = []  # workers that this run has lost
        self.unreachable: set[int] = set()  # workers to which there is no link, for they are dying
        self.deadly: Counter[int] = Counter()  # workers lost over elements not known to have begun, by place
        self.failures = Failures()
        self.known = known
        cheap = False
        # Where results are wanted one by one, a quick one must not wait for a slow one behind it.
        if batch_size is None and total is not None and room is None:
            first = list(itertools.islice(self.elements, 1))
            self.elements = itertools.chain(first, self.elements)
            cheap = bool(first) and is_cheap(first[0])
        self.sizes = BatchSizer(total, batch_size, cheap)

    # ------------------------------------------------------------------ the run

    def outcomes(self) -> Iterator[Any]:
        """Yield outcomes as they come; None for a feed that asks: elements are to be read now."""
        ready: list[Outcome] = []
        try:
            while True:
                self._dispatch(ready)
                if ready:
                    # Work is under way while the caller looks at these.
                    done, ready = ready, []
                    yield from done
                    continue
                if self.starved and self.feed is not None and self.feed.asks and not self.inbox:
                    yield None
                    continue
                if not self.out and not self.later:
                    if self.redo or self.alone:
                        continue  # a worker could not be reached: others get what it was to have
                    if self.exhausted or not self.starved:
                        break
                thread_state = current()  # asked each time: the generator may go on in another thread
                thread_state.enter()
                try:
                    self._wait()
                finally:
                    thread_state.leave()
                if self.node.has_output:
                    self.node.print_output(*[it.pid for it in list(self.inbox) if type(it) is PendingReply])
                self._collect(ready)
            failure, self.failure = self.failure, None
            if failure is not None:
                try:
                    raise failure
                finally:
                    del failure  # else error, traceback and this frame would be a circle
        finally:
            try:
                self._cancel()
            except BaseException:  # an interrupt may have come before it began
                self._cancel()
                raise

    def _wait(self) -> None:
        """Wait for a batch to come back, for the input to be read, or for a retry's time."""
        timeout = self.feed.patience if self.feed is not None and self.starved else None
        if self.later:
            due = max(0.0, self.later[0][0] - time.monotonic())
            timeout = due if timeout is None else min(timeout, due)
        if self.out.stuck:
            timeout = _REBALANCE_SECONDS if timeout is None else min(timeout, _REBALANCE_SECONDS)
        self.waiter.done = False
        fed = self.starved and self.feed is not None and not self.feed.hungry
        if not self.inbox and not fed:
            self.node.reactor.wait(self.waiter, timeout, spin=SPIN_SECONDS if self.sizes.brief else 0.0)

    def _cancel(self) -> None:
        """Cancel what is out, and let the workers forget the function."""
        if collecting():  # an abandoned generator
            self.node.counts.hand_over(self._cancel)
            return
        with current():
            self._clear_up()

    def _clear_up(self) -> None:
        """Let go of all that the run has; again after an error, until it is done."""
        if not hasattr(self, "out"):
            return
        for reply in filter(None, [self.node.requests.pending.get(call_id) for call_id in self.calls]):
            firmly(self.node.requests.cancel, reply)
        self.calls.clear()
        self.out.forget()
        self.known = None  # its blocks go back now, and not when the collector comes by; so do elements:
        self.inbox, self.elements = deque(maxlen=0), iter(())  # a division may still be answered
        if self.feed is not None:
            self.feed.close()
            self.feed.disconnect()
            self.feed = None
        if not self.kept:
            firmly(self.shipped.drop)
        del self.out  # which leads back to this run

    # ------------------------------------------------------------------ going out

    def _dispatch(self, ready: list[Outcome]) -> None:
        """Give workers what they have room for."""
        self.starved = False
        while self.later and self.later[0][0] <= time.monotonic():
            self.alone.append(heapq.heappop(self.later)[1:])
        leaving, unreachable = self.node.peers.leaving, self.unreachable
        pids = [pid for pid in self.pids() if pid not in leaving and pid not in unreachable]
        held = self.failures.held_back(pids) if self.failures.streaks and self.out else ()
        if self.exhausted and not self.redo and not self.alone:
            self._rebalance(pids, held, ready)
            return
        if not pids:
            self._fail_next(ready)
            return
        self.out.stuck = False
        window = self.sizes.window(self.drawn, len(pids))
        have = {pid: self.out.count(pid) for pid in pids}
        # Not those that have half their window: then several batches go out at once.
        hungry = self.out.able([pid for pid in pids if 2 * have[pid] <= window and pid not in held])
        plan: dict[int, list[Batch]] = {}
        # Every worker gets its first batch before any gets its second.
        for level, pid in itertools.product(range(window), hungry):
            if have[pid] <= level:
                batch = self._next_batch(pid, pids)
                if batch is None:
                    if self.alone:  # which are not for this one
                        continue
                    break
                plan.setdefault(pid, []).append(batch)
                self.failures.sent(pid)
                have[pid] += 1
        with BatchedWakeups(self.node.reactor.rings) as wakeups:
            for pid, batches in plan.items():
                self._send(pid, batches, ready, wakeups)
                wakeups.turn()
        if not plan and hungry:
            self._rebalance(pids, held, ready)

    def _rebalance(self, pids: list[int], held: Collection[int], ready: list[Outcome]) -> None:
        """Take work back for workers that have none, and send what came of it."""
        taken = self.out.rebalance(pids, self.sizes.cost, held)
        for batch in taken:
            del self.calls[batch.call_id]
            self._again(batch.pairs())
        if taken:
            self._dispatch(ready)

    def _fail_next(self, ready: list[Outcome]) -> None:
        """There are no workers left: elements that are not done have lost theirs."""
        if self.out:
            return  # what is out comes back first, by its worker's death if not otherwise
        # The input is read on by one element at a time, for it may have no end.
        pairs = [*self.redo, *self.alone, *(each[1:] for each in self.later)]
        self.redo.clear()
        self.alone.clear()
        self.later.clear()
        if not pairs:
            batch = self._draw(0, 1)
            pairs = [] if batch is None else batch.pairs()
        for place, element in pairs:
            error = self._no_workers(place)
            self.describe(error, place, element)
            ready.append(((place,), [], error))

    def _no_workers(self, place: int) -> BaseException:
        """Return the error of an element that is left when all workers are gone."""
        if self.lost_workers and place not in self.failures.places:
            return self.node.peers.death(self.lost_workers[-1])
        gone = sorted({*self.lost_workers, *self.pids(), *self.unreachable})
        return no_workers_left(self.node.peers.deaths(gone), "add others")

    def _again(self, pairs: Iterable[tuple[int, Any]]) -> None:
        """Let elements go out again that have not begun, or whose results were lost."""
        failed = self.failures.places
        for pair in pairs:
            (self.alone if pair[0] in failed else self.redo).append(pair)

    def _next_batch(self, pid: int, pids: list[int]) -> Batch | None:
        """Return the next batch, None when there is nothing to do for now."""
        if self.alone:
            found = self.failures.take(self.alone, pid, pids)
            if found is not None:
                batch = Batch(pid, found[:1], [found[1]])
                batch.avoids = self.failures.places.get(found[0], ())
                return batch
        size = self.sizes.next(self.drawn, len(pids))
        if self.redo:
            again = [self.redo.popleft() for _ in range(min(size, len(self.redo)))]
            return Batch(pid, [place for place, _ in again], [element for _, element in again])
        return self._draw(pid, size)

    def _draw(self, pid: int, size: int) -> Batch | None:
        """Return a batch of elements read from the input."""
        if self.exhausted:
            return None
        start = self.drawn
        ahead = 2 * WINDOW * size
        if self.room is not None:
            ahead = self.room(start)
            size = min(size, ahead)
            if size <= 0:
                return None
        elements: Any = []
        if self.range is not None:
            elements = self.range[start : start + size]
            if size == 1:  # a number costs less to send than the range of it
                elements = list(elements)
        elif self.feed is not None:
            elements = self._take_fed(self.feed, size, ahead)
        else:
            try:
                elements.extend(itertools.islice(self.elements, size))
            except Exception as error:  # what came before it is there
                if is_interrupt(error):
                    raise
                self.failure = error
        count = len(elements)
        if count < size and self.feed is None:
            self.exhausted = True
        if not count:
            return None
        self.drawn += count
        return Batch(pid, range(start, start + count), elements)

    def _take_fed(self, feed: Feed, size: int, ahead: int) -> list[Any]:
        """Return elements that have been read already; none when there are none yet, or none any more."""
        elements = feed.take(size, ahead)
        if not elements:
            self.exhausted, self.failure = feed.exhausted, feed.error
            self.starved = not self.exhausted
        return elements

    def _send(self, pid: int, batches: list[Batch], ready: list[Outcome], wakeups: Wakeups) -> None:
        """Send batches to a worker, in one go; `wakeups` as in ``Link.leave``."""
        node = self.node
        if pid == node.pid:
            for batch in batches:
                self._start_here(batch)
            return
        pickled = ((batch, self._pickle(batch, ready)) for batch in batches)
        payloads = [(batch, payload) for batch, payload in pickled if payload is not None]
        if not payloads:
            return
        thread_state = current()
        thread_state.enter()
        parts, sent, written = OutgoingFrames(), 0, 0
        try:
            together = codec.Payload()
            self.shipped.go_ahead(pid, together, parts, alone=self.kept)
            link = node.peers.links[pid]
            for batch, payload in payloads:
                if sent and not parts and link.is_blocked:
                    break
                sent += 1
                call_id = batch.call_id = next(node.requests.call_ids)
                self.calls[call_id] = batch
                self.out.add(batch)
                node.requests.pending[call_id] = PendingReply(call_id, pid, self._arrived)
                if payload.buffers:
                    payload.known = self.known
                self.sizes.weigh(payload, len(batch.elements))
                codec.frame(_CALL, WANT_VALUE | BY_ID, self.lane, call_id, payload, link, parts)
                together.refs += payload.refs
                if sent < len(payloads) and (payload.is_short or sum(map(len, parts)) < _MAX_JOINED_BYTES):
                    continue
                if len(parts) > 1 and sum(map(len, parts)) < _MAX_JOINED_BYTES:
                    parts[:] = [b"".join(parts)]
                node.requests.send(link, parts, together, wakeups=wakeups)
                for joined, _ in payloads[written:sent] if not link.is_local else ():
                    joined.link, joined.end = link, link.end
                written = sent
                if sent < len(payloads):
                    parts, together = OutgoingFrames(), codec.Payload()
        except (LinkClosed, KeyError, ProcessExitedException) as error:
            if not sent or isinstance(error, ProcessExitedException):
                self.unreachable.add(pid)  # else its death is on its way, and fails what was sent to it
        except Exception:
            if pid not in node.peers.lost:
                raise
        finally:
            node.sharing.blocks.take_back(parts, pid)  # a later frame of them could not be made, say
            thread_state.leave()
        if pid in node.peers.lost or pid in self.unreachable:
            self._fail_sent(pid, [batch for batch, _ in payloads[:sent]])
        for batch, _ in payloads[sent:]:
            self._again(batch.pairs())

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
        fine = []
        for place, element in batch.pairs():
            try:
                codec.dumps(element, "the element", f"element {place}")
            except Exception as error:
                self._end(place, element, error, ready)
            else:
                fine.append((place, element))
        if len(elements) == 1 and fine:  # it was otherwise a moment ago
            self._end(*fine[0], whole, ready)
        elif len(fine) < len(elements):
            self.redo.extend(fine)
        else:
            self.alone.extend(fine)  # each can be sent, but not all together
        return None

    def _fail_sent(self, pid: int, batches: list[Batch]) -> None:
        """A worker was gone before these were sent: nobody else will fail them."""
        for batch in batches:
            if (reply := self.node.requests.pending.pop(batch.call_id, None)) is not None:
                self.node.requests.fail(reply, self.node.peers.death(pid))

    def _arrived(self, what: PendingReply | Batch | SplitRequest) -> None:
        """Take note of something that has come; on any thread."""
        self.inbox.append(what)
        self.node.reactor.complete(self.waiter)

    def _start_here(self, batch: Batch) -> None:
        """Run a batch on a thread of this process."""
        node = self.node
        batch.call_id = next(node.requests.call_ids)
        self.out.add(batch)

        def ended(results: Results | None, failure: BaseException | None) -> None:
            if results is None:
                assert failure is not None
                results = 0.0, [None], {0: pack_error(capture(failure))}
            batch.results = results
            self._arrived(batch)

        arguments = (list(batch.elements), False, (node.pid, batch.call_id))
        runner: BatchRunner = self.shipped.f  # type: ignore[assignment]  # it is one
        with current():  # an interrupt must not come between the start and the note of it
            batch.task = run_on_thread(node, runner.run, arguments, ended)

    # ------------------------------------------------------------------ coming back

    def _collect(self, ready: list[Outcome]) -> None:
        """Take the batches that have come back apart."""
        while self.inbox:
            arrived = self.inbox.popleft()
            if type(arrived) is PendingReply:
                batch = self.calls.pop(arrived.call_id, None)
                if batch is None:  # it was taken back; or told twice, for the first time raised
                    self.out.back.pop(arrived.call_id, None)
                    continue
                first = self.out.batches[batch.pid][0] is batch
                self.out.remove(batch)
                self._open(batch, arrived, first, ready)
            elif type(arrived) is Batch:
                self.out.remove(arrived)
                assert arrived.results is not None
                self._take(arrived, arrived.results, ready)
            else:
                self._divided(arrived)

    def _open(self, batch: Batch, reply: PendingReply, first: bool, ready: list[Outcome]) -> None:
        """Read what a batch came to; `first` tells that it was the first that its worker had."""
        frame = reply.frame
        if isinstance(reply.error, ProcessExitedException):
            self._lost(batch, reply.error, first, ready)
        elif frame is None:  # it has come, and could not be taken: no memory, say
            assert isinstance(reply.error, Exception)
            self._broken(batch, reply.error, ready, begun=True)
        elif frame.flags & NOT_RUN:
            self._again(batch.pairs())
        else:
            try:
                results = self.node.requests.read_result(frame, batch.pid, "a batch of elements")
            except Exception as error:
                self._broken(batch, error, ready, begun=not frame.flags & IS_ERROR)
            else:
                self._take(batch, results, ready)

    def _divided(self, division: SplitRequest) -> None:
        """Give what was taken out of a running batch to other workers."""
        batch, kept = division.batch, division.read(self.node)
        if kept is None or kept >= len(batch.elements):
            return
        if batch in self.out.batches[batch.pid]:  # else its answer was here first, and told the same
            self._again(batch.cut(kept))
            batch.final = kept < 2

    def _take(self, batch: Batch, results: Results, ready: list[Outcome]) -> None:
        """Take a batch's results."""
        seconds, values, errors = results
        count = len(values)
        if count:
            self.sizes.learn(seconds, count)
        places = batch.places
        if errors or self.failures.streaks:
            self.failures.finished(batch.pid, count, errors or ())
        if errors is None and count == len(places) and type(values) is list:
            ready.append((places, values, None))
            return
        errors = errors or {}
        for index, (place, element, value) in enumerate(zip(places, batch.elements, values, strict=False)):
            if index in errors:
                self._end(place, element, unpack_error(batch.pid, *errors[index]), ready, batch.pid)
            elif type(value) is LoadFailure:
                error = codec.unreadable(value.error, f"a result from process {batch.pid}")
                error.__cause__ = value.error
                self._end(place, element, error, ready, batch.pid)
            else:
                ready.append(((place,), [value], None))
        if count < len(places):  # these have not begun: a probe's time was up, say
            self._again(zip(places[count:], batch.elements[count:], strict=True))

    def _broken(self, batch: Batch, error: Exception, ready: list[Outcome], *, begun: bool) -> None:
        """The batch as a whole failed: it, or what it came to, could not be read."""
        count = len(batch.elements)
        self.failures.finished(batch.pid, count, range(count))
        if begun or count == 1:
            for place, element in batch.pairs():
                each = copy.copy(error)  # for each has a place of its own
                each.__cause__ = error.__cause__
                self._end(place, element, each, ready, batch.pid)
        else:
            # It never began; one by one, the part at fault shows.
            self.alone.extend(batch.pairs())

    def _lost(self, batch: Batch, error: BaseException, first: bool, ready: list[Outcome]) -> None:
        """The worker of a batch is gone."""
        pid, pairs = batch.pid, batch.pairs()
        self.shipped.forget(pid)
        first = first and pid not in self.lost_workers
        self.lost_workers.append(pid)
        words = self.node.peers.last_progress.get(pid)
        begun = None if words is None else words.get(note_key((self.node.pid, batch.call_id)))
        if begun is not None and begun < len(pairs):
            self._again(pairs[:begun] + pairs[begun + 1 :])
            self._end(*pairs[begun], error, ready, pid)
        elif not first or batch.is_unsent:
            self._again(pairs)  # it waited, behind another batch or here: nobody's fault
        elif words is not None and self._harmless(pairs):
            self._again(pairs)
        elif len(pairs) == 1:
            self._end(*pairs[0], error, ready, pid)
        else:
            self.alone.extend(pairs)

    def _harmless(self, pairs: list[tuple[int, Any]]) -> bool:
        """Return whether a batch may be tried again whose worker died when it was to begin it.

        Mostly that is nobody's fault. But reading an element may also end a process, which
        must not go on to the last worker.
        """
        self.deadly.update(place for place, _ in pairs)
        return max(self.deadly[place] for place, _ in pairs) < _DEADLY

    def _end(
        self, place: int, element: Any, error: BaseException, ready: list[Outcome], pid: int = 0
    ) -> None:
        """An element has failed, on worker `pid` if any: it is tried again, or that is its outcome."""
        self.describe(error, place, element)
        delay = None if self.retry is None else self.retry(place, error)
        if delay is None:
            ready.append(((place,), [], error))
        else:
            if pid:
                self.failures.note(place, pid)
            heapq.heappush(self.later, (time.monotonic() + delay, place, element))
