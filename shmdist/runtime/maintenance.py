"""Background maintenance of the arena: grows it, returns unused pages, and sends pending releases.

The maintainer is one thread of the runtime. It sleeps as long as nothing is to be done. What is
wanted of it is put down in a queue by whoever sends (a value for which there was no block), and
finalizers wake it when nobody else is going to look at what they queued.

It grows the arena after a value had to take the stream, up to `limit`, and only while the
system has memory to spare; pages are reserved and touched before they are used. What nobody
has used for `IDLE_SECONDS` goes back to the system, whole segments at a time where it can be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections import deque

from shmdist._log import Log, warn
from shmdist.memory.arena import State
from shmdist.memory.limits import total_memory
from shmdist.memory.mapping import whole_pages
from shmdist.memory.segment import Segment
from shmdist.runtime.block_counts import BlockCounts
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.segment_exchange import SegmentExchange
from shmdist.transport.poller import WakeupFd

IDLE_SECONDS = 5.0  # after which unused memory goes back
_TICK_SECONDS = 0.02  # between looks while there is traffic
_TRAFFIC_SECONDS = 1.0  # after the last use during which there is traffic
_MIN_SEGMENT_BYTES = 8 << 20  # of a segment, at least
_LARGEST = 256 << 20  # and at most, but for a single larger block
_TOUCH_BYTES = 16 << 20  # touched at a time
_GROW_RETRY_SECONDS = 1.0  # in which growing is not tried again after it failed
_KEEP_SECONDS = 1.0  # for which the memory of a process that is gone is kept for tokens on their way
_FEW, _MANY = 1 << 20, 64 << 20  # bytes of a segment made for small shared arrays: at least, and at most
_log = Log("maintainer")


def arena_limit() -> int:
    """Return how many bytes a process may keep in its arena: `SHMDIST_ARENA_LIMIT`, or a quarter of memory.

    Raises
    ------
    ValueError
        The variable is no number of bytes, with or without K, M or G.
    """
    text = os.environ.get("SHMDIST_ARENA_LIMIT", "").strip()
    if not text:
        return total_memory() // 4
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 0)
    try:
        return int(float(text[:-1]) * unit) if unit else int(text)
    except ValueError:
        raise ValueError(
            f"SHMDIST_ARENA_LIMIT must be a number of bytes, as 1073741824, 512M or 2G, not {text!r}"
        ) from None


class ArenaMaintainer:
    """The thread that keeps a process's arena; see the module's docstring."""

    def __init__(self, blocks: BlockCounts, counts: ReferenceCounts, offers: SegmentExchange) -> None:
        self._blocks, self._counts, self._offers = blocks, counts, offers
        blocks.wake, blocks.want = self.wake, self.want
        offers.report_trouble, offers.keep_for_now = self.trouble, self.keep_for_now
        self._kick: WakeupFd | None = None
        self._wants: deque[tuple[int, int | None]] = deque()  # bytes, and for whom
        self._last_use = 0.0
        self._retry_at = 0.0
        self._limit = -1
        self._trouble = ""  # why values take the stream; told once
        self._told: set[str] = set()  # kinds of trouble that were
        self._kept: deque[tuple[float, Segment]] = deque()  # and until when
        self._making: list[Segment] = []  # not entered yet
        self._running = False
        self.closing = False

    @property
    def limit(self) -> int:
        """Bytes that the arena may have."""
        if self._limit < 0:
            try:
                self._limit = arena_limit()
            except ValueError as error:
                self._limit = total_memory() // 4
                self.trouble("setting", str(error))
        return self._limit

    @property
    def descriptors(self) -> int:
        """How many descriptors are open: its own, and those of segments in the making."""
        return (self._kick is not None) + 2 * len(self._making)

    # ------------------------------------------------------------------ asked by others

    def used(self) -> None:
        """Note that a block was taken."""
        self._last_use = time.monotonic()
        if not self._running:
            self._ensure()

    def want(self, sizes: list[int], pid: int | None) -> None:
        """See to it that next time there are blocks of these sizes for a process, or for any."""
        limit = self.limit
        self._tell()
        if not limit:
            return  # it was asked for, so nobody need be told
        if time.monotonic() < self._retry_at:
            return
        for nbytes in sizes:
            if nbytes <= limit:
                self._wants.append((nbytes, pid))
            else:
                self.trouble("limit", _over(nbytes, limit))
        self.used()
        self.wake()

    def wake(self) -> None:
        """Wake the maintainer, or have it started; safe in finalizers."""
        holds, kick = self._blocks.holds, self._kick
        if not holds.idle:
            return
        try:
            holds.idle = False
            if kick is not None:
                kick.set()
            else:  # this process has only ever received
                self._counts.run_soon(self.used)
        except BaseException:  # an interrupt, which nothing puts off in a finalizer
            holds.idle = True  # the next one wakes it
            raise

    def trouble(self, kind: str, why: str) -> None:
        """Note why values take the stream; the program is warned once of each kind."""
        if kind not in self._told:
            self._told.add(kind)
            self._trouble = why
            _log.warning("arrays go by the socket: %s", why)
            if self._blocks.peers.is_worker:
                self._tell()

    def _tell(self) -> None:
        """Warn the program; on its own thread, but for a worker."""
        why, self._trouble = self._trouble, ""
        if why:
            text = f"shmdist: arrays to local processes are copied through sockets, for {why}"
            if self._blocks.peers.is_worker:
                with contextlib.suppress(Exception):
                    warn(text, RuntimeWarning)
            else:
                warn(text, RuntimeWarning)

    def keep_for_now(self, segment: Segment) -> None:
        """Keep a segment for a moment."""
        self._kept.append((time.monotonic() + _KEEP_SECONDS, segment))
        if not self._running:
            self._ensure()
        self.wake()

    def close(self) -> None:
        """Let the thread end."""
        self.closing = True
        if self._kick is not None:
            self._kick.set()

    def _ensure(self) -> None:
        with self._blocks.lock:
            if self._running or self.closing:
                return
            if self._kick is None:
                try:
                    self._kick = WakeupFd()
                except OSError as error:
                    self.trouble("maintainer", str(error))
                    return
            self._running = True
        try:
            self._blocks.reactor.start(self._run)
        except (RuntimeError, MemoryError) as error:  # no thread can be had: the next time, then
            self._running = False
            self.trouble("maintainer", str(error))

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        kick = self._kick
        assert kick is not None
        poller = select.poll()
        poller.register(kick.fileno(), select.POLLIN)
        holds = self._blocks.holds
        while not self.closing:
            wait = self._wait_time()
            holds.idle = wait > _TICK_SECONDS
            # Looked at again now that finalizers and senders see that we sleep.
            if holds.idle and (holds.ended or self._wants):
                holds.idle = False
                wait = 0.0
            if poller.poll(None if wait == _FOR_EVER else int(wait * 1000)):
                kick.clear()
                holds.idle = False
                self._last_use = max(self._last_use, time.monotonic() - _TRAFFIC_SECONDS / 2)
                poller.poll(int(_TICK_SECONDS * 1000))  # more comes together; and what is being sent, is sent
                kick.clear()
            if not self.closing:
                try:
                    self._turn()
                except Exception:  # no memory, say: what is not done now is done in the next turn
                    _log.exception("the maintainer of shared memory could not do its work")
        holds.idle = False
        kick.close()

    def _wait_time(self) -> float:
        """Return the seconds until the next look."""
        quiet = time.monotonic() - self._last_use
        if quiet < _TRAFFIC_SECONDS or self._kept:
            return _TICK_SECONDS
        blocks = self._blocks
        with blocks.lock:
            free = blocks.arena.total - blocks.arena.lent - blocks.arena.cold
            spares = any(len(segment.spares) for segment in blocks.holds.segments.values())
        if free > 0 or spares or blocks.unsent_releases:
            return max(_TICK_SECONDS, IDLE_SECONDS - quiet)
        return _FOR_EVER

    def _turn(self) -> None:
        """Do what there is to do."""
        blocks = self._blocks
        while self._wants and not self.closing:
            nbytes, pid = self._wants.popleft()
            if pid in blocks.peers.lost:
                continue
            try:
                self._provide(nbytes, pid)
            except MemoryError as error:
                self._retry_at = time.monotonic() + _GROW_RETRY_SECONDS
                self.trouble("memory", str(error))
            except Exception as error:  # the process for which it is has gone meanwhile, say
                _log.info("no block for process %d: %s", pid, error)
        blocks.pay()
        now = time.monotonic()
        idle = now - self._last_use >= IDLE_SECONDS
        if not idle:  # else they are taken down
            for segment in list(blocks.holds.segments.values()):
                segment.tidy_spares()
        while self._kept and self._kept[0][0] < now:
            self._kept.popleft()
        with blocks.lock:
            over = blocks.arena.total - blocks.arena.cold > max(self.limit, blocks.arena.lent)
        if over or idle:
            self._cool()

    def provide_now(self, nbytes: int) -> None:
        """Try to see to it that there is a warm block, on this thread: many are going to need it."""
        if nbytes <= self.limit and time.monotonic() >= self._retry_at:
            try:
                self._provide(nbytes, None)
            except MemoryError as error:
                self._retry_at = time.monotonic() + _GROW_RETRY_SECONDS
                self.trouble("memory", str(error))

    def _provide(self, nbytes: int, pid: int | None) -> None:
        """Make sure that there is a warm block of `nbytes`, and offer what is made for it to a process."""
        blocks = self._blocks
        with blocks.lock:
            blocks.settle()
            if blocks.arena.has_warm(nbytes):
                return
            there = blocks.arena.total - blocks.arena.cold
        size = whole_pages(nbytes)
        if there + size > self.limit:
            self.trouble("limit", _over(there + size, self.limit))
            return
        if self.warm(nbytes):
            return
        size = max(size, min(max(there, _MIN_SEGMENT_BYTES), _LARGEST))
        if there + size > self.limit:
            size = whole_pages(nbytes)
        try:
            segment = self.make_segment(size)
        except MemoryError:
            segment = self.make_segment(nbytes)
        self._making.append(segment)
        try:
            _touch(segment, 0, segment.size)
            with blocks.lock:
                blocks.add_segment(segment)
        finally:
            self._making.remove(segment)
        if pid is not None:
            self._offers.offer(pid, segment)

    def warm(self, nbytes: int, *, touch: bool = True) -> bool:
        """Warm a block that was given back to the system; False when there is none so large.

        Raises
        ------
        MemoryError
            There is not so much memory to spare.
        """
        blocks = self._blocks
        with blocks.lock:
            extent = blocks.arena.begin_warming(nbytes)
        if extent is None:
            return False
        segment = blocks.holds.segments[blocks.peers.pid, extent.segment]
        state = State.COLD
        try:
            segment.reserve(extent.offset, extent.size)
            if touch:
                _touch(segment, extent.offset, extent.size)
            state = State.WARM
        except OSError as error:
            raise _refused(extent.size, error) from error
        finally:
            with blocks.lock:
                blocks.arena.end(extent, state)
        return True

    def make_shared_segment(self, nbytes: int) -> Segment:
        """Make a segment for a shared array, and for some more when it is small.

        Each segment costs descriptors, here and wherever it is mapped, and of small arrays
        there may be thousands. Errors as those of :meth:`make_segment`.
        """
        with self._blocks.lock:
            there = self._blocks.arena.total - self._blocks.arena.cold
        size = min(max(there // 4, _FEW), _MANY)
        if nbytes < size and there + size <= self.limit:
            try:
                return self.make_segment(size)
            except MemoryError:
                pass
        return self.make_segment(nbytes)

    def make_segment(self, nbytes: int) -> Segment:
        """Make a segment.

        Raises
        ------
        MemoryError
            There is not so much memory to spare.
        """
        size = whole_pages(max(nbytes, 1))
        try:
            return Segment.make(self._blocks.peers.pid, next(self._blocks.numbers), size)
        except OSError as error:
            raise _refused(size, error) from error

    def _cool(self) -> None:
        """Give everything back that nobody uses."""
        blocks = self._blocks
        for segment in list(blocks.holds.segments.values()):
            segment.spares.drop()
        with blocks.lock:
            extents = blocks.arena.begin_cooling()
        for extent in extents:
            blocks.holds.segments[blocks.peers.pid, extent.segment].give_back(extent.offset, extent.size)
        with blocks.lock:
            for extent in extents:
                blocks.arena.end(extent, State.COLD)
            dropped = [number for number in blocks.arena.segments() if blocks.arena.drop_segment(number)]
        if dropped:
            self._offers.forget_segments(dropped)


_FOR_EVER = float("inf")


def _refused(nbytes: int, error: OSError) -> MemoryError:
    advice = _ADVICE.get(error.errno or 0, _MORE)
    return MemoryError(f"{nbytes} bytes of shared memory cannot be had: {error.strerror}; {advice}")


_MORE = "free memory, or give the machine or the container more (docker: --memory, --shm-size)"
_ADVICE = {
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files (sysctl fs.file-max)",
    errno.ENOMEM: "raise the limit on address space (ulimit -v) if there is one; else " + _MORE,
}


def _touch(segment: Segment, offset: int, size: int) -> None:
    for start in range(offset, offset + size, _TOUCH_BYTES):
        segment.touch(start, min(_TOUCH_BYTES, offset + size - start))


def _over(nbytes: int, limit: int) -> str:
    return f"{nbytes} bytes of shared memory are more than {limit} (set SHMDIST_ARENA_LIMIT to allow more)"
