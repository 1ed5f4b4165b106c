"""How a map reads an input that may block, or change what it gave.

Live inputs
-----------
Sequences, and sets, dicts and the like, are read by the thread that sends the elements, when there is
room for them.  Any other input is *live*: to read it may take for ever, may wait for what the map itself
brings about, and may change what was read before.  So two threads share the work.  One reads, and
copies each element at once if it can change (:func:`as_of_now`).  The other sends, and takes what
comes back.  Between them stands a :class:`Feed`.

- The taker says how many elements may be read (``limit``): what workers have room for, and a little
  more.  The reader reads up to there, and then sleeps.
- The reader appends an element to ``_ready`` and then looks at ``notice``.  A taker that has too little sets
  ``hungry`` and ``notice`` and then looks into ``_ready``, and sleeps only when there was nothing.  So
  one of the two sees it.
- A taker that wants several elements and finds fewer waits for the others, but not longer than
  `_GATHER_SECONDS`: a quick input goes out in full batches, and a slow one at once.
- The end of the input, or its error, is noted after its last element was appended.  The taker sees
  it when it has taken all of them, and a run raises it when all of them are done.

Which thread is which:

- ``pmap`` reads on the calling thread (:func:`outcomes_read_here`).  So an input that belongs to its
  thread works (a database cursor, or what needs a lock that the caller holds), and Ctrl-C ends it as it ends
  any other code.  The same thread sends as long as the input is quick.  When a reading has taken longer than
  `_HELD_UP_SECONDS`, another thread takes the sending over, until the end of the map (:class:`_Driver`).
- ``pgenerate`` gives out results while it waits for the input, so it reads on a thread of its own, in
  a copy of the caller's context (:class:`Reader`); always the same thread, until the input's end.
- Channels are read in that way by ``pmap`` as well: no thread has a part in them, and an error
  of an element ends the map though the channel is empty.

The end
-------
A map that ends early closes its feed: the reader reads no more.  A reader that is asleep lets go of
the input before the map returns; so a generator to which nothing else refers is closed then, as if the
map's own loop had read it.  A reader that is inside ``next()`` is left alone, for nothing can end what
it does; it lets go of the input when that returns, and what it read is dropped.  Only the wait at a
channel is interrupted, and takes no item.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shmdist.runtime import call_target
from shmdist.runtime.interrupts import collecting, current, is_interrupt
from shmdist.runtime.node import current_node
from shmdist.runtime.waiting import Waiter
from shmdist.scheduling.inputs import as_of_now, constants

_GATHER_SECONDS = 0.0005  # that a batch waits for elements to come after its first
_HELD_UP_SECONDS = 0.005  # after which a thread that reads is held to be held up, once or twice
_REPEAT_INTERRUPT_SECONDS = 0.2  # after which it is interrupted once more
_CLOSE_TIMEOUT = 1.0  # that the end of a map waits for its reader to let go of the input


# ---------------------------------------------------------------------- the feed


class Feed:
    """The elements of a live input, on their way from the thread that reads to the one that sends.

    Parameters
    ----------
    source : callable
        Returns the input; called by the reader.

    Attributes
    ----------
    hungry : bool
        The taker wants to be told of elements.
    notice : bool
        Something has changed that the reader must look at: the taker is hungry, the feed was closed, or
        there are outcomes for the thread that reads.
    asks : bool
        The taker is to say when it waits for elements, instead of waiting.
    error : BaseException or None
        With which the input ended.
    fed, more, close : callable
        Tell the taker that there are elements; the reader, that there is room; and the reader, that the
        map is over. Set by the two.
    """

    def __init__(self, source: Callable[[], Iterable[Any]]) -> None:
        self._source: Any = source
        self._iterator: Iterator[Any] | None = None
        self._ready: list[Any] = []  # read, not taken; the reader appends, the taker cuts off the front
        self._read = 0  # how many elements have been read; the reader's
        self._taken = 0  # how many have been taken; the taker's
        self._wanted = 1  # the taker is told when so many are ready
        self._since = 0.0  # when the taker found some, but fewer than it wanted
        self.limit = 0
        self.hungry = False
        self.notice = False
        self.closed = False
        self.asks = False
        self.ended = False
        self.error: BaseException | None = None
        self.fed: Callable[[], None] = _nothing
        self.more: Callable[[], None] = _nothing
        self.close: Callable[[], None] = _nothing

    def __repr__(self) -> str:
        state = "closed" if self.closed else "ended" if self.ended else "open"
        return f"<Feed {state}, {self._read} read, {self._taken} taken, limit {self.limit}>"

    # -------------------------------------------------- the reader's

    @property
    def has_room(self) -> bool:
        """Whether the reader is to go on."""
        return self._read < self.limit and not self.ended and not self.closed

    def read(self, until: Any = ()) -> None:
        """Read while there is room; not further than to the next `notice` when `until` is not empty.

        Raises
        ------
        BaseException
            An interrupt of this thread. All other errors are the input's.
        """
        try:
            if self._iterator is None:
                self._iterator = iter(self._source())
                self._source = None
            while self.has_room and not until:
                self._fill(self._iterator, self.limit - self._read)
        except StopIteration:
            self.end(None)
        except BaseException as error:
            if is_interrupt(error):
                raise
            self.end(error)

    def _fill(self, iterator: Iterator[Any], room: int) -> None:
        """Read elements, as many as there is room for, or up to a notice."""
        ready, done = self._ready, 0
        try:
            for done in range(1, room + 1):  # noqa: B007 - used at the end
                element = next(iterator)
                if type(element) not in constants:
                    element = as_of_now(element)
                ready.append(element)
                element = None
                if self.notice:
                    self._notice()
                    return
        finally:
            self._read += done

    def _notice(self) -> None:
        """See what others want of the reader."""
        self.notice = False
        if self.hungry:
            if len(self._ready) >= self._wanted:
                self.hungry = False
                self.fed()
            else:
                self.notice = True

    def end(self, error: BaseException | None) -> None:
        """Note that the input has ended."""
        self.error = error
        self.ended = True
        self._iterator = self._source = None
        self.hungry = False
        self.fed()

    def let_go(self) -> None:
        """Let go of the input, which is not to be read any more, and of what was read."""
        self._iterator = self._source = None
        if self.closed:
            self._ready.clear()

    def disconnect(self) -> None:
        """Forget the two threads, which lead back here: what was read must not wait for the collector."""
        self.fed = self.more = self.close = _nothing
        self.error = None

    # -------------------------------------------------- the taker's

    def take(self, size: int, ahead: int) -> list[Any]:
        """Return the next elements, at most `size`; `ahead` more may then be read.

        An empty list: there are none now, and the taker is told of the next ones; or there
        are none any more, if the feed is :attr:`exhausted`.
        """
        self._wanted, self.hungry, self.notice = 1, True, True
        ended = self.ended  # looked at first: then all that was read is there
        ready = self._ready
        elements = ready[:size]
        if ended or len(elements) == size or (elements and not self._lingers(size)):
            self._since, self.hungry = 0.0, False
            del ready[: len(elements)]
            self._taken += len(elements)
        else:
            elements = []
        if self._taken + ahead > self.limit:
            self.limit = self._taken + ahead
            self.more()
        return elements

    def _lingers(self, size: int) -> bool:
        """Return whether to wait for more elements to come."""
        now = time.monotonic()
        self._since = self._since or now
        self._wanted = size
        return now - self._since < _GATHER_SECONDS

    @property
    def patience(self) -> float | None:
        """Seconds for which the taker waits at most; None: until it is told."""
        return max(0.0, self._since + _GATHER_SECONDS - time.monotonic()) if self._since else None

    @property
    def exhausted(self) -> bool:
        """Whether all elements have been taken that there will be."""
        return self.ended and not self._ready


def _nothing() -> None:
    """Tell nobody."""


def interrupt(thread_state: Any, task: Any) -> None:
    """Interrupt the next wait of the runtime on another thread, if that runs `task`."""
    if thread_state is None:
        return  # it has not begun, and will see that it need not
    with thread_state.guard:
        if thread_state.task is task:
            thread_state.interrupt_pending = thread_state.has_deferred = True
            thread_state.wake()


def _await_end(over: Waiter, thread_state: Any, task: Any) -> None:
    """Wait for the end of what was interrupted; once more, if only a finalizer that ran there has ended."""
    until = time.monotonic() + _CLOSE_TIMEOUT
    while not current_node().reactor.wait(over, _REPEAT_INTERRUPT_SECONDS) and time.monotonic() < until:
        interrupt(thread_state, task)


# ---------------------------------------------------------------------- a reader of its own


class Reader:
    """Reads a feed on a thread of its own.

    Parameters
    ----------
    feed : Feed
        What it fills.
    interruptible : bool
        The input is a channel: its reading is interrupted when the feed is closed.
    """

    interrupted = False  # as a remote call has it, for which `interruptible` readers pass

    def __init__(self, feed: Feed, interruptible: bool = False) -> None:
        self._feed = feed
        self._reactor = current_node().reactor
        self._context = contextvars.copy_context()
        if current().task is not None:
            self._context.run(call_target.nested.set, True)
        self._interruptible = interruptible
        self._lock = threading.Lock()  # guards the two below
        self._begun = False
        self._reading = False  # inside the input's code
        self._bed = threading.Lock()  # what it sleeps on; may be free while it is awake
        self._bed.acquire()
        self._strand: Any = None
        self._over = Waiter()
        feed.more, feed.close = self.wake, self.close

    def __repr__(self) -> str:
        state = "over" if self._over.done else "reading" if self._reading else "asleep"
        return f"<Reader {state} of {self._feed!r}>"

    def wake(self) -> None:
        """Let it read on: there is room, or the feed is closed. On any thread."""
        if not self._begun:
            with current():  # an interrupt must not come between the note and the start
                self._begin()
        with contextlib.suppress(RuntimeError):  # it is on its way already
            self._bed.release()

    def _begin(self) -> None:
        with self._lock:
            begun, self._begun = self._begun, True
        if begun:
            return
        try:
            self._reactor.start(self._run)
        except BaseException:
            self._over.done = True
            raise

    def close(self) -> None:
        """Let it end; returns when it has let go of the input, or is inside of it."""
        self._feed.closed = self._feed.notice = True
        with self._lock:
            begun, self._begun = self._begun, True
            reading, thread_state = self._reading, self._strand
        if not begun:
            self._feed.let_go()
            return
        self.wake()
        if reading and self._interruptible:
            interrupt(thread_state, self)
        if not reading or self._interruptible:
            _await_end(self._over, thread_state, self)

    def _run(self) -> None:
        """Body of its thread."""
        thread_state = self._strand = current()
        depth = thread_state.runtime_depth
        if self._interruptible:
            thread_state.begin(self)
        try:
            thread_state.runtime_depth = 0
            self._context.run(self._read)
        except KeyboardInterrupt:
            pass  # by `close`, when this thread was inside the input no longer
        finally:
            if self._interruptible:
                thread_state.end()
            thread_state.runtime_depth = depth
            self._reactor.complete(self._over)

    def _read(self) -> None:
        feed = self._feed
        try:
            while self._waits_for_room():
                try:
                    feed.read()
                except BaseException as error:  # the interrupt by `close`
                    feed.end(error)
        finally:
            feed.let_go()

    def _waits_for_room(self) -> bool:
        """Sleep until there is room; False when there is nothing more to read."""
        feed = self._feed
        while not feed.ended:
            with current(), self._lock:
                self._reading = feed.has_room
                if self._reading:
                    return True
                if feed.closed:
                    return False
            self._bed.acquire()
        return False


# ---------------------------------------------------------------------- a reader that is the caller


class _Driver:
    """Drives a run on another thread, from the moment on when the caller is held up by its input.

    Until then the caller does both: it reads when the run asks for elements. The run is a generator, and
    is suspended while the caller reads; so the other thread may go on with it then.
    """

    interrupted = False  # as a remote call has it, for which that thread's thread state takes it

    def __init__(self, run: Any, feed: Feed) -> None:
        self._reactor = current_node().reactor
        self._feed = feed
        self._waiter = Waiter()
        self._ended = Waiter()
        self._strand: Any = None
        self._watch_ended = threading.Lock()  # released when the watch is over
        self._watch_ended.acquire()
        self._lock = threading.Lock()  # guards the two below
        self._reading = 0  # the number of the reading that the caller is in; 0: of none
        self._readings = 0
        self._stopped = False
        self._context = contextvars.copy_context()
        self.run: Iterator[Any] = run.outcomes()
        self.outcomes: deque[Any] = deque()
        self.took_over = False
        self.over = False
        self.failure: BaseException | None = None
        feed.asks = True
        feed.more = self.tell
        self._watched = False

    def tell(self) -> None:
        """Wake the caller. On any thread."""
        self._reactor.complete(self._waiter)

    def read(self) -> None:
        """Read, for the run waits for elements; on the caller's thread."""
        self._readings += 1
        if self.took_over:
            self._feed.read(self.outcomes)
            return
        if not self._watched:
            with contextlib.suppress(Exception):  # no thread is to be had: then the input may hold the map up
                self._reactor.start(self._watch)
                self._watched = True
        with self._lock:
            self._reading = self._readings
        try:
            self._feed.read()
        finally:
            with self._lock:
                self._reading = 0

    def _watch(self) -> None:
        """Body of the thread: take over when a reading takes long."""
        seen = 0
        while not self._watch_ended.acquire(timeout=_HELD_UP_SECONDS):
            with self._lock:
                if self._stopped:
                    return
                reading = self._reading
                if reading and reading == seen:
                    self.took_over = True
                    break
            seen = reading
            if reading:
                self._feed.notice = True  # if it reads one after the other, it is to come back now
        else:
            return
        self._drive()

    def _drive(self) -> None:
        thread_state = self._strand = current()
        depth = thread_state.runtime_depth
        thread_state.begin(self)
        try:
            thread_state.runtime_depth = 0
            self._feed.asks = False
            if not self._stopped:
                self._context.run(self._collect)
        except BaseException as error:
            if not self._stopped:  # else nothing raises it, and it would keep what its frames have
                self.failure = error
        finally:
            thread_state.end()
            thread_state.runtime_depth = depth
            self.over = True
            self._reactor.complete(self._ended)
            self.tell()

    def _collect(self) -> None:
        for outcome in self.run:
            if outcome is not None:
                self.outcomes.append(outcome)
                self._feed.notice = True
                self.tell()

    def wait(self) -> None:
        """Sleep until there are outcomes, or there is room in the feed, or the run is over."""
        thread_state = current()
        thread_state.enter()
        try:
            self._waiter.done = False
            if not self.outcomes and not self.over and not self._feed.has_room:
                self._reactor.wait(self._waiter)
        finally:
            thread_state.leave()

    def stop(self) -> None:
        """End the run, and wait for that; not for ever, for it may be inside the program's own code."""
        if collecting():  # an abandoned generator
            current_node().counts.hand_over(self.stop)
            return
        try:
            with current():
                self._feed.closed = True
                self._feed.let_go()
                with self._lock:
                    self._stopped = True
                if self._watched and not self.took_over:
                    self._watch_ended.release()
                elif self.took_over and not self.over:
                    interrupt(self._strand, self)
                    _await_end(self._ended, self._strand, self)
        finally:  # also when a further interrupt comes out of that
            if not self.took_over or self.over:
                self.run.close()  # type: ignore[attr-defined]  # it is a generator
            self._feed.disconnect()


def outcomes_read_here(run: Any, feed: Feed) -> Iterator[Any]:
    """Yield the outcomes of a run whose input this thread reads.

    Parameters
    ----------
    run : Run
        Has `outcomes()`, which yields None when it waits for elements, if the feed asks.
    feed : Feed
        Its input.
    """
    driver = _Driver(run, feed)
    try:
        while not driver.took_over:
            outcome = next(driver.run, _END)
            if outcome is _END:
                return
            if outcome is None:
                driver.read()
            else:
                yield outcome
        while True:
            while driver.outcomes:
                yield driver.outcomes.popleft()
            if not driver.over and feed.has_room:
                driver.read()
            elif not driver.over:
                driver.wait()
            elif not driver.outcomes:  # looked at last, for what is there came before that
                break
    finally:
        driver.stop()
    if driver.failure is not None:
        try:
            raise driver.failure
        finally:
            driver.failure = None  # else error, traceback and this frame would be a circle


_END = object()

__all__ = ["Feed", "Reader", "outcomes_read_here"]
