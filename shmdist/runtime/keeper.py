"""What is done about shared memory off the path of calls: growing, giving back, paying dues.

The keeper is one thread of the runtime. It sleeps as long as nothing is to be done. What is
wanted of it is put down in a queue by whoever sends (a value for which there was no block), and
finalizers wake it when nobody else is going to look at what they queued.

It grows the arena after a value had to take the stream, up to `limit`, and only while the
system has memory to spare; pages are reserved and touched before they are used. What nobody
has used for `IDLE` seconds goes back to the system, whole segments at a time where it can be.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from typing import TYPE_CHECKING

from shmdist._log import Log
from shmdist.memory.arena import State
from shmdist.memory.segment import Segment, total_memory, whole_pages
from shmdist.wire.poller import Kick

if TYPE_CHECKING:
    from shmdist.runtime.sharing import Sharing

IDLE = 5.0  # seconds after which unused memory goes back
_TICK = 0.02  # seconds between looks while there is traffic
_LIVELY = 1.0  # seconds after the last use during which there is traffic
_SMALLEST = 8 << 20  # bytes of a segment, at least
_LARGEST = 256 << 20  # and at most, but for a single larger block
_STEP = 16 << 20  # bytes touched at a time
_BACK_OFF = 1.0  # seconds in which growing is not tried again after it failed
_log = Log("keeper")


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


class Keeper:
    """The thread that keeps a process's arena; see the module's docstring."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self._kick: Kick | None = None
        self._wants: deque[tuple[int, int]] = deque()  # bytes, and for whom
        self._last_use = 0.0
        self._retry_at = 0.0
        self._limit = -1
        self._trouble = ""  # why values take the stream; told once
        self._told: set[str] = set()
        self._kept: list[Segment] = []
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
                self.trouble(str(error))
        return self._limit

    @property
    def descriptors(self) -> int:
        """How many descriptors the keeper has open."""
        return 0 if self._kick is None else 1

    # ------------------------------------------------------------------ asked by others

    def used(self) -> None:
        """Note that a block was taken."""
        self._last_use = time.monotonic()
        if not self._running:
            self._ensure()

    def want(self, sizes: list[int], pid: int) -> None:
        """See to it that next time there are blocks of these sizes for a process."""
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
                self.trouble(_over(nbytes, limit))
        self.used()
        self.wake()

    def wake(self) -> None:
        """Wake the keeper; safe in finalizers."""
        kick = self._kick
        if kick is not None and self._sharing.holds.idle:
            self._sharing.holds.idle = False
            kick.set()

    def trouble(self, why: str) -> None:
        """Note why values take the stream; the program is warned of it once."""
        if why not in self._told:
            self._told.add(why)
            self._trouble = why
            _log.warning("arrays go by the socket: %s", why)
            if self._sharing.node.is_worker:
                self._tell()

    def _tell(self) -> None:
        """Warn the program; on its own thread, but for a worker."""
        why, self._trouble = self._trouble, ""
        if why:
            import warnings

            text = f"shmdist: arrays to local processes are copied through sockets, for {why}"
            if self._sharing.node.is_worker:
                with contextlib.suppress(Exception):
                    warnings.warn(text, RuntimeWarning, stacklevel=2)
            else:
                warnings.warn(text, RuntimeWarning, stacklevel=6)

    def keep_for_now(self, segment: Segment) -> None:
        """Keep a segment for some seconds."""
        self._kept.append(segment)
        self.used()
        self.wake()

    def close(self) -> None:
        """Let the thread end."""
        self.closing = True
        if self._kick is not None:
            self._kick.set()

    def _ensure(self) -> None:
        with self._sharing.lock:
            if self._running or self.closing:
                return
            self._running = True
            if self._kick is None:
                self._kick = Kick()
        self._sharing.node.dispatcher.start(self._run)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        kick = self._kick
        assert kick is not None
        poller = select.poll()
        poller.register(kick.fileno(), select.POLLIN)
        holds = self._sharing.holds
        while not self.closing:
            wait = self._wait_time()
            holds.idle = wait > _TICK
            # Looked at again now that finalizers and senders see that we sleep.
            if holds.idle and (holds.ended or self._wants):
                holds.idle = False
                wait = 0.0
            if poller.poll(None if wait == _FOR_EVER else int(wait * 1000)):
                kick.clear()
                holds.idle = False
                self._last_use = max(self._last_use, time.monotonic() - _LIVELY / 2)
                poller.poll(int(_TICK * 1000))  # more comes together; and what is being sent, is sent
                kick.clear()
            if not self.closing:
                self._turn()
        kick.close()

    def _wait_time(self) -> float:
        """Return the seconds until the next look."""
        quiet = time.monotonic() - self._last_use
        if quiet < _LIVELY:
            return _TICK
        sharing = self._sharing
        with sharing.lock:
            free = sharing.arena.total - sharing.arena.lent - sharing.arena.cold
        if free > 0 or sharing.owed or self._kept:
            return max(_TICK, IDLE - quiet)
        return _FOR_EVER

    def _turn(self) -> None:
        """Do what there is to do."""
        sharing = self._sharing
        while self._wants and not self.closing:
            nbytes, pid = self._wants.popleft()
            try:
                self._provide(nbytes, pid)
            except (OSError, MemoryError) as error:
                self._retry_at = time.monotonic() + _BACK_OFF
                self.trouble(str(error))
        sharing.pay()
        with sharing.lock:
            over = sharing.arena.total - sharing.arena.cold > max(self.limit, sharing.arena.lent)
        idle = time.monotonic() - self._last_use >= IDLE
        if idle:
            self._kept.clear()
        if over or idle:
            self._cool()

    def _provide(self, nbytes: int, pid: int) -> None:
        """Make sure that there is a warm block of `nbytes`."""
        sharing = self._sharing
        with sharing.lock:
            sharing.settle()
            if sharing.arena.has_warm(nbytes):
                return
            extent = sharing.arena.begin_warming(nbytes)
        if extent is not None:
            segment = sharing.holds.segments[sharing.pid, extent.segment]
            state = State.COLD
            try:
                segment.reserve(extent.offset, extent.size)
                _touch(segment, extent.offset, extent.size)
                state = State.WARM
            finally:
                with sharing.lock:
                    sharing.arena.end(extent, state)
            return
        with sharing.lock:
            total = sharing.arena.total
        size = whole_pages(max(nbytes, min(max(total, _SMALLEST), _LARGEST)))
        if total + size > self.limit:
            size = whole_pages(nbytes)
        if total + size > self.limit:
            self.trouble(_over(total + size, self.limit))
            return
        try:
            segment = self.make_segment(size)
        except MemoryError:
            segment = self.make_segment(nbytes)
        _touch(segment, 0, segment.size)
        with sharing.lock:
            sharing.add_segment(segment)
        sharing.offers.offer(pid, segment)

    def make_segment(self, nbytes: int) -> Segment:
        """Make a segment.

        Raises
        ------
        MemoryError
            There is not so much memory to spare.
        """
        size = whole_pages(max(nbytes, 1))
        try:
            return Segment.make(self._sharing.pid, next(self._sharing.numbers), size)
        except OSError as error:
            raise MemoryError(f"{size} bytes of shared memory cannot be had: {error}") from error

    def _cool(self) -> None:
        """Give everything back that nobody uses."""
        sharing = self._sharing
        for segment in list(sharing.holds.segments.values()):
            segment.drop_spares()
        with sharing.lock:
            extents = sharing.arena.begin_cooling()
        for extent in extents:
            sharing.holds.segments[sharing.pid, extent.segment].give_back(extent.offset, extent.size)
        with sharing.lock:
            for extent in extents:
                sharing.arena.end(extent, State.COLD)
            dropped = [number for number in sharing.arena.segments() if sharing.arena.drop_segment(number)]
        if dropped:
            sharing.offers.forget_segments(dropped)


_FOR_EVER = float("inf")


def _touch(segment: Segment, offset: int, size: int) -> None:
    for start in range(offset, offset + size, _STEP):
        segment.touch(start, min(_STEP, offset + size - start))


def _over(nbytes: int, limit: int) -> str:
    return f"{nbytes} bytes of shared memory are more than {limit} (set SHMDIST_ARENA_LIMIT to allow more)"
