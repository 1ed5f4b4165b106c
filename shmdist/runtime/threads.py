"""The runtime's threads: made when needed, kept for reuse, a few standing by."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

from shmdist._log import Log
from shmdist.runtime.strand import Strand, current

_PARKED = 2  # threads kept standing by
_IDLE = 32  # other threads kept for reuse
_IDLE_TIME = 10.0  # seconds an idle thread waits for work before it ends
_log = Log("threads")

Job = Callable[[], None]


class _Idle:
    """A thread kept for reuse: its lock to sleep on, and the job it is woken for."""

    __slots__ = ("job", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.job: Job | None = None


class Threads:
    """A crew of daemon threads that run jobs, stand by, or idle, in this order.

    Parameters
    ----------
    stand_by : callable
        Sleeps until there is something to do, calls :meth:`woken`, and does it.
    """

    def __init__(self, stand_by: Callable[[Strand], None]) -> None:
        self._stand_by = stand_by
        self._lock = threading.Lock()  # guards all below
        self.parked = 0  # threads that stand by, or are about to
        self._idle: list[_Idle] = []
        self._all: set[threading.Thread] = set()
        self._late: deque[Job] = deque()  # jobs that no thread could be made for; the next free one's
        self._serial = 0
        self.closing = False

    def __repr__(self) -> str:
        return f"<Threads {len(self._all)}, {self.parked} standing by, {len(self._idle)} idle>"

    def __len__(self) -> int:
        return len(self._all)

    def start(self, job: Job) -> None:
        """Run `job` on another thread; it is inside the runtime there."""
        strand = current()
        strand.enter()  # users' code comes here: an interrupt must not lose the job, or a half-made thread
        try:
            with self._lock:
                idle = self._idle.pop() if self._idle else None
            if idle is not None:
                idle.job = job
                idle.lock.release()
            else:
                self._spawn(job)
        finally:
            strand.leave()

    def later(self, delay: float, job: Job) -> None:
        """Run `job` on another thread, `delay` seconds from now at the earliest."""

        def sleep_and_run() -> None:
            time.sleep(delay)
            job()

        self.start(sleep_and_run)

    def ensure_standby(self) -> None:
        """Make sure that a thread stands by."""
        if self.parked > 0:
            return
        strand = current()
        strand.enter()  # as in `start`
        try:
            with self._lock:
                if self.parked or self.closing:
                    return
                self.parked += 1  # counted before it runs, so that nobody makes a second one
            self._spawn(None)
        finally:
            strand.leave()

    def woken(self) -> None:
        """Note that the calling thread stands by no more."""
        with self._lock:
            self.parked -= 1

    def _spawn(self, job: Job | None) -> None:
        with self._lock:
            self._serial += 1
            name = f"shmdist-{self._serial}"
            # In a list, for a thread keeps its arguments for as long as it lives.
            thread = threading.Thread(target=self._live, args=([job],), name=name, daemon=True)
            self._all.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no room for another one, or:
            with self._lock:
                self._all.discard(thread)
                self.parked -= job is None
                if "shutdown" not in str(error):
                    raise
                # Python 3.12.0 and 3.12.1 make no threads any more when atexit handlers run.
                if job is not None:
                    self._late.append(job)

    def _live(self, first: list[Job | None]) -> None:
        """Body of every thread."""
        job = first.pop()
        strand = current()
        strand.depth = 1
        counted = job is None
        try:
            while not self.closing:
                if job is not None:
                    self.guarded(job)
                    job = None
                with self._lock:
                    if self._late and not counted:
                        job = self._late.popleft()
                        continue
                    if not counted and self.parked < _PARKED:
                        self.parked += 1
                        counted = True
                if counted:
                    counted = False
                    self._stand_by(strand)
                    continue
                idle = _Idle()
                with self._lock:
                    if len(self._idle) >= _IDLE or self.closing:
                        return
                    self._idle.append(idle)
                if not idle.lock.acquire(timeout=_IDLE_TIME):
                    with self._lock:
                        if idle in self._idle:
                            self._idle.remove(idle)
                            return
                    idle.lock.acquire()  # a job is on its way
                job, idle.job = idle.job, None  # it must not outlive its run: it holds what it is given
        finally:
            with self._lock:
                self._all.discard(threading.current_thread())

    def guarded(self, job: Job) -> None:
        """Run `job`; an error in it is logged, and ends nothing else."""
        try:
            job()
        except Exception:
            if not self.closing:
                _log.exception("an error in a thread of shmdist")

    def close(self) -> None:
        """Let all threads end when they have done what they are at."""
        with self._lock:
            self.closing = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.lock.release()

    def join(self, timeout: float) -> bool:
        """Wait for the threads' end; False when some are left after `timeout` seconds."""
        me = threading.current_thread()
        deadline = time.monotonic() + timeout
        with self._lock:
            threads = [thread for thread in self._all if thread is not me]
        for thread in threads:
            with contextlib.suppress(RuntimeError):  # one just being made, which will see that it is to end
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)
