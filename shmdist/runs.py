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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shmdist.errors import RemoteException, SerializationError, capture
from shmdist.memory.segment import SLOTS
from shmdist.pools import Shipped
from shmdist.runtime.node import Node, Reply, current_node
from shmdist.runtime.strand import Cell, current
from shmdist.wire import codec
from shmdist.wire.messages import BY_ID, IS_ERROR, NO_LANE, NOT_RUN, WANT_VALUE, Kind

WINDOW = 2  # batches of a run that a worker has at a time
_GROW = 16  # a batch is at most so many times as large as the one before
_LONG = 0.02  # seconds of work in a batch, at most
_SHORT = 0.001  # seconds of work below which a smaller batch is not worth its message
_STEAL = 0.002  # seconds of work below which a waiting batch is not worth taking back
_CALL, _CANCEL = int(Kind.CALL), int(Kind.CANCEL)

#: An element's place in the input, and its arguments.
Item = tuple[int, tuple[Any, ...]]
#: An outcome: place, whether it succeeded, value or error.
Outcome = tuple[int, bool, Any]


class _Batch:
    """Elements that went out together."""

    __slots__ = ("items", "pid", "recalled", "reply")

    def __init__(self, pid: int, items: list[Item]) -> None:
        self.pid = pid
        self.items = items
        self.reply: Reply | None = None
        self.recalled = False


class Results:
    """What a batch came to, where it ran.

    Attributes
    ----------
    seconds : float
        What it took.
    values : list
        One for each element that ended; None for those in `errors`.
    errors : dict or None
        Packed errors, by place in the batch.
    """

    __slots__ = ("errors", "seconds", "values")

    def __init__(self, seconds: float, values: list[Any], errors: dict[int, Any] | None) -> None:
        self.seconds = seconds
        self.values = values
        self.errors = errors

    def __reduce__(self) -> Any:
        return Results, (self.seconds, self.values, self.errors)

    def without_unsendable(self) -> Results:
        """Return the same with errors in the place of values that cannot be sent."""
        errors = dict(self.errors or {})
        values = list(self.values)
        for place, value in enumerate(values):
            try:
                codec.dumps(value, "the result")
            except SerializationError as error:
                errors[place] = current_node().pack_error(capture(error))
                values[place] = None
        return Results(self.seconds, values, errors)


def run_batch(f: Callable[..., Any], batch: list[tuple[Any, ...]], note: Callable[[int], None] | None) -> Results:
    """Run `f` on each element of `batch`; an error ends that element alone.

    KeyboardInterrupt and other errors that are no `Exception` end the batch: the elements
    after it have not begun.
    """
    values: list[Any] = []
    errors: dict[int, Any] = {}
    elements = iter(batch)
    add = values.append
    start = time.perf_counter()
    while True:
        try:
            if note is None:
                for arguments in elements:
                    add(f(*arguments))
            else:
                for arguments in elements:
                    note(len(values))
                    add(f(*arguments))
            break
        except Exception as error:
            errors[len(values)] = current_node().pack_error(capture(error))
            add(None)
        except BaseException as error:
            errors[len(values)] = current_node().pack_error(capture(error))
            add(None)
            break
    return Results(time.perf_counter() - start, values, errors or None)


class BatchRunner:
    """A function as it is sent for a run: takes batches, notes how far it is."""

    __slots__ = ("f",)

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f

    def __reduce__(self) -> Any:
        return BatchRunner, (self.f,)

    def __call__(self, batch: list[tuple[Any, ...]]) -> Results:
        """Run a batch, on a worker."""
        return run_batch(self.f, batch, _noter())


def _noter() -> Callable[[int], None] | None:
    """Return what notes an element of the running call on this worker's page."""
    task = current().task
    page = current_node().settings.get("page")
    if task is None or page is None:
        return None
    numbers = page.numbers
    place = 2 * (task.frame.lane % SLOTS)
    numbers[place + 1] = 0
    numbers[place] = task.frame.call_id

    def note(element: int) -> None:
        numbers[place + 1] = element

    return note


class Run:
    """One run over many elements; :meth:`outcomes` is the run itself.

    Parameters
    ----------
    f : callable or Shipped
        The function; a Shipped one, a BatchRunner's, is kept by its owner.
    items : iterator of Item
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
        Given an item and its error; returns the seconds until it is tried once more, or
        None when its error stands.
    """

    def __init__(
        self,
        f: Any,
        items: Iterator[Item],
        pids: Callable[[], list[int]],
        *,
        total: int | None = None,
        batch_size: int | None = None,
        room: Callable[[], int] | None = None,
        retry: Callable[[Item, BaseException], float | None] | None = None,
    ) -> None:
        self.node: Node = current_node()
        self.kept = isinstance(f, Shipped)
        self.shipped: Shipped = f if self.kept else Shipped(BatchRunner(f))
        self.items = items
        self.exhausted = False
        self.pids = pids
        self.total = total
        self.drawn = 0
        self.batch_size = batch_size
        self.room = room
        self.retry = retry
        self.lane = 1 + next(self.node.lanes) % 0xFFFFFFFE
        self.cell = Cell()
        self.inbox: deque[_Batch] = deque()
        self.out: dict[int, list[_Batch]] = {}  # batches by worker
        self.redo: deque[Item] = deque()  # to go out again in batches
        self.alone: deque[Item] = deque()  # to go out again one by one
        self.later: list[tuple[float, int, Item]] = []  # retries: when, a tie-breaker, what
        self.count = itertools.count()
        self.cost: float | None = None  # seconds an element takes, of late
        self.largest = 0  # the largest batch so far

    # ------------------------------------------------------------------ the run

    def outcomes(self) -> Iterator[Outcome]:
        """Yield each element's outcome, as they come."""
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
                if not any(self.out.values()) and not self.later:
                    if self.exhausted and not self.redo and not self.alone:
                        return
                    if self.room is None or self.room() > 0:
                        continue
                    return  # the caller wants no more for now, and has all there was
                strand.enter()
                try:
                    self._wait()
                finally:
                    strand.leave()
                self._collect(ready)
        finally:
            self._cancel()

    def _wait(self) -> None:
        """Wait for a batch to come back, or for a retry's time."""
        if self.inbox:
            return
        timeout = None
        if self.later:
            timeout = max(0.0, self.later[0][0] - time.monotonic())
        self.cell.done = False
        if not self.inbox:
            self.node.dispatcher.wait(self.cell, timeout)

    def _cancel(self) -> None:
        """Cancel what is out, and let the workers forget the function."""
        for batches in self.out.values():
            for batch in batches:
                if batch.reply is not None:
                    self.node.cancel(batch.reply)
        self.out.clear()
        if not self.kept:
            self.shipped.drop()

    # ------------------------------------------------------------------ going out

    def _dispatch(self, ready: list[Outcome]) -> None:
        """Give workers what they have room for."""
        while self.later and self.later[0][0] <= time.monotonic():
            self.alone.append(heapq.heappop(self.later)[2])
        pids = [pid for pid in self.pids() if pid not in self.node.graves]
        if not pids:
            self._fail_all(ready)
            return
        for depth in range(WINDOW):
            for pid in pids:
                if len(self.out.get(pid, ())) > depth:
                    continue
                items = self._next_items(len(pids))
                if not items:
                    if depth == 0:
                        self._recall(pids)
                    return
                self._send(pid, items, ready)

    def _fail_all(self, ready: list[Outcome]) -> None:
        """There are no workers left: every element that is not done has lost its worker."""
        while items := self._next_items(1):
            for item in items:
                self._end(item, self.node.death(max(self.node.graves, default=0)), ready, final=True)
        while self.later:
            item = heapq.heappop(self.later)[2]
            self._end(item, self.node.death(max(self.node.graves, default=0)), ready, final=True)

    def _next_items(self, workers: int) -> list[Item]:
        """Return the next batch's elements."""
        if self.alone:
            return [self.alone.popleft()]
        size = self._next_size(workers)
        items: list[Item] = []
        while self.redo and len(items) < size:
            items.append(self.redo.popleft())
        if self.exhausted or len(items) == size:
            return items
        if self.room is not None:
            size = min(size, len(items) + self.room())
        for item in itertools.islice(self.items, size - len(items)):
            items.append(item)
        self.drawn += len(items)
        if len(items) < size:
            self.exhausted = True
        self.largest = max(self.largest, len(items))
        return items

    def _next_size(self, workers: int) -> int:
        """Return how many elements the next batch should have."""
        if self.batch_size is not None:
            return self.batch_size
        if self.cost is None:
            return 1
        cost = max(self.cost, 1e-8)
        size = _LONG / cost
        if self.total is not None:
            fair = (self.total - self.drawn) / (2 * workers)
            size = min(size, max(fair, _SHORT / cost))
        return max(1, min(int(size), max(1, self.largest) * _GROW))

    def _send(self, pid: int, items: list[Item], ready: list[Outcome]) -> None:
        """Send a batch to a worker."""
        batch = _Batch(pid, items)
        node = self.node
        if pid == node.pid:
            self.out.setdefault(pid, []).append(batch)
            node.dispatcher.start(lambda: self._run_here(batch))
            return
        try:
            arguments = (self.shipped.number, ([item[1] for item in items],), {})
            payload = codec.dumps(arguments, "the element" if len(items) == 1 else "the elements")
        except Exception as error:
            if len(items) == 1:
                self._end(items[0], error, ready)
            else:
                self.alone.extend(items)  # so that one that cannot be sent costs no other
            return
        self.out.setdefault(pid, []).append(batch)

        def arrived(reply: Reply) -> None:
            batch.reply = reply
            self.inbox.append(batch)
            node.dispatcher.complete(self.cell)

        strand = current()
        strand.enter()
        try:
            self.shipped.send_to(pid)
            reply = node.request(pid, _CALL, WANT_VALUE | BY_ID, payload, lane=self.lane, callback=arrived)
            if batch.reply is None:
                batch.reply = reply
        except Exception:
            if pid not in node.graves:
                raise
            self.out[pid].remove(batch)
            self.redo.extend(items)
        finally:
            strand.leave()

    def _run_here(self, batch: _Batch) -> None:
        """Run a batch on a thread of this process."""
        strand = current()
        depth, strand.depth = strand.depth, 0
        runner = self.shipped.f
        results = run_batch(runner.f, [item[1] for item in batch.items], None)
        strand.depth = depth
        batch.reply = None
        batch.items = list(batch.items)
        self._here[id(batch)] = results
        self.inbox.append(batch)
        self.node.dispatcher.complete(self.cell)

    @property
    def _here(self) -> dict[int, Results]:
        """Results of batches that ran on this process."""
        return self.__dict__.setdefault("_results_here", {})  # type: ignore[no-any-return]

    def _recall(self, pids: list[int]) -> None:
        """Take batches back that wait behind others, for workers that have nothing left."""
        if not any(not self.out.get(pid) for pid in pids):
            return
        for pid in pids:
            batches = self.out.get(pid, [])
            if len(batches) < 2 or pid == self.node.pid:
                continue
            batch = batches[-1]
            long = self.cost is None or self.cost * len(batch.items) > _STEAL
            if not batch.recalled and batch.reply is not None and long:
                batch.recalled = True
                link = self.node.links.get(pid)
                if link is not None:
                    self.node.post(link, _CANCEL, NOT_RUN, batch.reply.call_id)

    # ------------------------------------------------------------------ coming back

    def _collect(self, ready: list[Outcome]) -> None:
        """Take the batches that have come back apart."""
        while self.inbox:
            batch = self.inbox.popleft()
            batches = self.out.get(batch.pid, [])
            if batch in batches:
                batches.remove(batch)
            if batch.pid == self.node.pid:
                self._take(batch, self._here.pop(id(batch)), ready)
                continue
            reply = batch.reply
            assert reply is not None
            if reply.error is not None:
                self._lost(batch, reply, ready)
            elif reply.frame is not None and reply.frame.flags & NOT_RUN:
                self.redo.extend(batch.items)
            else:
                try:
                    results = self.node.open(reply, "a batch")
                except Exception as error:
                    remote = reply.frame is not None and bool(reply.frame.flags & IS_ERROR)
                    self._broken(batch, error, ready, remote=remote)
                else:
                    self._take(batch, results, ready)

    def _take(self, batch: _Batch, results: Results, ready: list[Outcome]) -> None:
        """Take a batch's results."""
        count = len(results.values)
        if count:
            cost = results.seconds / count
            self.cost = cost if self.cost is None else 0.5 * (self.cost + cost)
        errors = results.errors
        if errors is None:
            for (index, _), value in zip(batch.items, results.values, strict=False):
                ready.append((index, True, value))
        else:
            for place, (item, value) in enumerate(zip(batch.items, results.values, strict=False)):
                if place in errors:
                    self._end(item, self.node.unpack_error(batch.pid, *errors[place]), ready)
                else:
                    ready.append((item[0], True, value))
        if count < len(batch.items):  # interrupted: these have not begun
            self.redo.extend(batch.items[count:])

    def _broken(self, batch: _Batch, error: Exception, ready: list[Outcome], *, remote: bool) -> None:
        """The batch as a whole failed: it could not be read, there or here."""
        if len(batch.items) == 1 or not remote:
            for item in batch.items:
                self._end(item, error, ready)
        elif isinstance(error, RemoteException) and not isinstance(error, Exception):
            self.redo.extend(batch.items)
        else:
            self.alone.extend(batch.items)  # it never began: one by one, the culprit shows

    def _lost(self, batch: _Batch, reply: Reply, ready: list[Outcome]) -> None:
        """The worker of a batch is gone."""
        error = reply.error
        assert error is not None
        self.shipped.forget(batch.pid)
        batches = self.out.get(batch.pid, [])
        words = self.node.last_words.get(batch.pid)
        if words is not None:
            begun = words.get(reply.call_id)
            if begun is None or begun >= len(batch.items):
                # It waited behind another batch, or nothing is known of it: nobody's fault.
                self.redo.extend(batch.items)
                return
            self.redo.extend(batch.items[:begun] + batch.items[begun + 1 :])
            self._end(batch.items[begun], error, ready)
        elif batch.recalled or (batches and len(batch.items) > 1):
            self.redo.extend(batch.items)
        elif len(batch.items) == 1:
            self._end(batch.items[0], error, ready)
        else:
            self.alone.extend(batch.items)

    def _end(self, item: Item, error: BaseException, ready: list[Outcome], *, final: bool = False) -> None:
        """An element has failed: it is tried again, or that is its outcome."""
        delay = None if final or self.retry is None else self.retry(item, error)
        if delay is None:
            ready.append((item[0], False, error))
        else:
            heapq.heappush(self.later, (time.monotonic() + delay, next(self.count), item))


def scatter(f: Callable[..., Any], parts: Iterable[tuple[int, tuple[Any, ...]]]) -> list[Any]:
    """Run `f` once for each part, on the worker that the part names, all at once.

    Parameters
    ----------
    f : callable
        Pickled once, sent once to each worker.
    parts : iterable of (pid, arguments)
        What runs where.

    Returns
    -------
    list
        The values, in the order of `parts`.

    Raises
    ------
    RemoteException, ProcessExitedException
        Of the first part that failed, in their order; the others are cancelled.
    """
    node = current_node()
    shipped = Shipped(f)
    replies: list[Any] = []
    strand = current()
    try:
        for pid, arguments in parts:
            if pid == node.pid:
                replies.append(_Here(node, f, arguments))
                continue
            payload = codec.dumps((shipped.number, arguments, {}), "the chunk")
            strand.enter()
            try:
                shipped.send_to(pid)
                replies.append(node.request(pid, _CALL, WANT_VALUE | BY_ID, payload, lane=NO_LANE))
            finally:
                strand.leave()
        values = []
        for reply in replies:
            strand.enter()
            try:
                node.wait(reply)
            finally:
                strand.leave()
            if isinstance(reply, _Here):
                values.append(reply.get())
            else:
                values.append(node.open(reply, getattr(f, "__qualname__", "the loop")))
        return values
    finally:
        for reply in replies:
            if isinstance(reply, Reply):
                node.cancel(reply)
        shipped.drop()


class _Here(Cell):
    """A part that runs on a thread of this process."""

    __slots__ = ("error", "value")

    def __init__(self, node: Node, f: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.value: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            strand = current()
            depth, strand.depth = strand.depth, 0
            try:
                self.value = f(*arguments)
            except BaseException as error:
                self.error = node.unpack_error(node.pid, *node.pack_error(capture(error)))
            strand.depth = depth
            node.dispatcher.complete(self)

        node.dispatcher.start(run)

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value
