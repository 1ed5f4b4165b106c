"""The runtime's thread pool: threads are made when needed, kept for reuse, and a few stand by.

When no thread can be had
-------------------------
The system may have no room for another thread (``ulimit -u``, a cgroup's ``pids.max``, no memory for its
stack), and a process makes ``SHMDIST_MAX_THREADS`` at most. Then:

- :meth:`ThreadPool.start`, for jobs that may take long, raises, also where a thread was made and died before
  it took the job (``runtime.daemon_thread``). The caller fails what needed the thread. Such a job is never
  queued: what would end the calls that block might stand behind them.
- :meth:`ThreadPool.soon`, for short jobs of the runtime that must not be lost, queues the job for the thread
  that is free next, and wakes one that stands by.
- :meth:`ThreadPool.ensure_standby` returns False. No call is run without a thread behind it that reads: it
  is refused (``runtime.reactor``). So the last thread that stands by never leaves the reading.

Errors
------
*A job that was taken is not lost, whatever raises around it*: it stays with its thread (`_Member.job`) until
it has been run. What the job itself raises is logged, and told to an :class:`Attempt`. A job of
:meth:`ThreadPool.soon` is done again, so it is such as can be.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.memory.mapping import try_to_map
from shmdist.runtime.daemon_thread import DaemonThread, Job
from shmdist.runtime.interrupts import ThreadState, current

_MAX_PARKED = 2  # threads kept standing by
_MAX_IDLE = 32  # other threads kept for reuse
_IDLE_SECONDS = 10.0  # an idle thread waits for work before it ends
#: Idle threads that stay, for what is to be done when the program ends: Python 3.12.0 and 3.12.1 make
#: none any more when atexit handlers run.
_RESERVE = 8 if (3, 12) <= sys.version_info < (3, 12, 2) else 0
_DEFAULT_MAX_THREADS = 4096  # threads by default: 100 MiB of memory where all of them block
_DEFAULT_STACK_BYTES = 8 << 20  # of a thread's stack, where no limit says otherwise
_STANDBY_SECONDS = 0.02  # in which a thread that has answered a call is ready for the next one
_THREAD_START_BYTES = 8 << 20  # that must be left beside its stack: for its first steps, and for who reads
_TRIES = 3  # times that a job is told that it has failed, and that a thread tries to go on
_log = Log("threads")


def _nothing(*told: object) -> None:
    """Do nothing: the thread is made to be there."""


class Attempt:
    """A job, and what is told of its failure."""

    __slots__ = ("_job", "failed")

    def __init__(self, job: Job, failed: Callable[[Exception], None]) -> None:
        self._job, self.failed = job, failed

    def __call__(self) -> None:
        """Do it."""
        self._job()


def surely(job: Job) -> Attempt:
    """Return a job that is done again where it fails: there was no memory, say."""
    return Attempt(job, lambda error: job())


class _Member:
    """A thread of the crew: its job, and the lock it sleeps on while it is `idle`."""

    __slots__ = ("idle", "job", "lock")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.idle = False
        self.lock = threading.Lock()
        self.lock.acquire()


class ThreadPool:
    """A crew of daemon threads that run jobs, stand by, or idle, in this order.

    Parameters
    ----------
    stand_by : callable
        Given its thread state and a callable: sleeps until there is something to do, calls that to say
        that the thread stands by no more, and does what there is to do.
    wake : callable
        Wakes a thread that stands by; safe in finalizers.
    """

    def __init__(
        self, stand_by: Callable[[ThreadState, Job], None], wake: Callable[[], None] = lambda: None
    ) -> None:
        self._stand_by = stand_by
        self._wake = wake
        self.most = most_threads()
        self._lock = threading.Lock()  # guards all below
        self.parked: set[_Member] = set()  # threads that stand by, or are about to
        self._idle: list[_Member] = []
        self._all: set[DaemonThread] = set()
        self._late: deque[Job] = deque()  # jobs that no thread could be made for; the next free one's
        self._serial = 0
        self._reserved = not _RESERVE
        self._vain_until = 0.0  # no use to wait for a thread to stand by
        self.closing = False

    def __repr__(self) -> str:
        return f"<ThreadPool {len(self._all)}, {len(self.parked)} standing by, {len(self._idle)} idle>"

    def __len__(self) -> int:
        return len(self._all)

    def start(self, job: Job) -> None:
        """Run `job` on another thread; it is inside the runtime there.

        Raises
        ------
        RuntimeError, MemoryError
            No thread can be had; the job will not be run.
        """
        if self.closing and sys.is_finalizing():  # Python would wait for ever for the thread to begin
            raise RuntimeError("can't start new thread: the program is at its end")
        thread_state = current()
        thread_state.enter()  # an interrupt of users' code must not lose the job, or a half-made thread
        try:
            with self._lock:
                idle = self._idle.pop() if self._idle else None
            if idle is not None:
                idle.job = job
                idle.lock.release()
            else:
                self._spawn(_Member(), job)
        finally:
            thread_state.leave()

    def soon(self, job: Job) -> None:
        """Run a short `job` on another thread; when none can be had, on the one that is free next."""
        try:
            self.start(surely(job))
        except Exception:
            self._late.append(surely(job))
            self._wake()

    def later(self, delay: float, job: Job) -> None:
        """Run `job` on another thread, `delay` seconds from now at the earliest."""

        def sleep_and_run() -> None:
            time.sleep(delay)
            job()

        self.start(sleep_and_run)

    def ensure_standby(self) -> bool:
        """Make sure that a thread stands by; False when none can be had."""
        if self.parked:
            return True
        thread_state = current()
        thread_state.enter()  # as in `start`
        try:
            member = _Member()
            with self._lock:
                if self.parked or self.closing:
                    return True
                self.parked.add(member)  # counted before it runs, so that nobody makes a second one
            try:
                self._spawn(member, None)
            except (RuntimeError, MemoryError):
                return self._wait_for_standby()
            return True
        finally:
            thread_state.leave()

    def _wait_for_standby(self) -> bool:
        """Wait a moment for a thread that has just done its job; a shorter one where all of them block."""
        now = time.monotonic()
        # Not so long each time, but for as long as a thread takes that has just sent its answer.
        limit = now + (_STANDBY_SECONDS if now >= self._vain_until else _STANDBY_SECONDS / 10)
        while not self.parked and time.monotonic() < limit:
            time.sleep(_STANDBY_SECONDS / 40)
        if not self.parked:
            self._vain_until = time.monotonic() + _STANDBY_SECONDS
        return bool(self.parked)

    def _spawn(self, member: _Member, job: Job | None) -> None:
        """Make a thread that runs `job`, or one that stands by, which is counted already."""
        thread = None
        try:
            if len(self._all) >= self.most:
                raise RuntimeError(
                    f"can't start new thread: SHMDIST_MAX_THREADS allows {self.most}, and so many calls run"
                )
            _probe()
            with self._lock:
                self._serial += 1
                name = f"shmdist-{self._serial}"
            thread = DaemonThread(job, name, functools.partial(self._live, member))
            with self._lock:
                self._all.add(thread)
            thread.start()
        except BaseException as error:
            late = "shutdown" in str(error)  # Python 3.12.0 and 3.12.1 make none when atexit handlers run
            with self._lock:
                self._all.discard(thread)
                self.parked.discard(member)
                if late and job is not None:
                    self._late.append(job)
                elif job is None and self._idle:
                    self._idle.pop().lock.release()  # it has no job, so it stands by
            if not late:
                raise
            return
        if not self._reserved:
            self._reserved = True
            with contextlib.suppress(RuntimeError, MemoryError):  # `job` has its thread
                for _ in range(_RESERVE):
                    self._spawn(_Member(), _nothing)

    def _live(self, member: _Member, thread: DaemonThread) -> None:
        """Body of every thread."""
        failures = 0
        try:
            try:
                thread_state = current()
                thread_state.runtime_depth = 1
                stand_by = functools.partial(
                    self._stand_by, thread_state, functools.partial(self.parked.discard, member)
                )
                member.job = thread.take()
            except Exception:
                return  # who started it knows, or is told by the job that is still there
            finally:
                firmly(thread.tell)
            while not self.closing and failures < _TRIES:
                try:
                    if not self._go_on(member, stand_by):
                        return
                    failures = 0
                except Exception:
                    failures += 1  # its job is still with it
        finally:
            with self._lock:
                self.parked.discard(member)
                if member in self._idle:
                    self._idle.remove(member)
                self._all.discard(thread)

    def _go_on(self, member: _Member, stand_by: Job) -> bool:
        """Run the thread's job, stand by, or wait for a job; False when the thread is to end."""
        if member.job is not None:
            self.guarded(member.job)
            member.job = None  # it must not outlive its run: it holds what it is given
        if member.idle:  # an error kept it from its sleep
            self._sleep(member)
            return True
        with self._lock:
            if self._late and member not in self.parked:
                member.job = self._late.popleft()
                return True
            if len(self.parked) < _MAX_PARKED:
                self.parked.add(member)
                self._vain_until = 0.0
        if member in self.parked:
            self.guarded(stand_by)
            return True
        with self._lock:
            if len(self._idle) >= _MAX_IDLE or self.closing:
                return False
            self._idle.append(member)
            member.idle = True
        return self._sleep(member)

    def _sleep(self, member: _Member) -> bool:
        """Wait for a job; False when none has come for long."""
        while not member.lock.acquire(timeout=_IDLE_SECONDS):
            with self._lock:
                if member in self._idle and (self.closing or len(self._idle) > _RESERVE):
                    self._idle.remove(member)
                    return False
                # else a job is on its way, or it stays
        member.idle = False
        return True

    def refusal(self, reason: object) -> RuntimeError:
        """Return the error of a call for which there is no thread."""
        return RuntimeError(
            f"there is no thread for this call: {reason} ({len(self._all)} run in this process). Make fewer"
            " calls that block at once, or raise the limit: ulimit -u or -v, the cgroup's pids.max,"
            " SHMDIST_MAX_THREADS"
        )

    def guarded(self, job: Job) -> None:
        """Run `job`; an error in it is logged, and ends nothing else. The job is told, if it wants to be."""
        run: Callable[..., None] = job
        told: tuple[Exception, ...] = ()
        for _ in range(1 + _TRIES):
            try:
                run(*told)
                return
            except Exception as error:
                if not self.closing:
                    _log.exception("an error in a thread of shmdist")
                run, told = getattr(job, "failed", _nothing), (error,)

    def close(self) -> None:
        """Let all threads end when they have done what they are at."""
        with current(), self._lock:
            self.closing = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.lock.release()

    def join(self, timeout: float) -> bool:
        """Wait for the threads' end; False when some are left after `timeout` seconds."""
        me = threading.current_thread()
        deadline = time.monotonic() + timeout
        with current(), self._lock:
            threads = [thread for thread in self._all if thread is not me]
        for thread in threads:
            with contextlib.suppress(RuntimeError):  # one just being made, which will see that it is to end
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)


def most_threads() -> int:
    """Return how many threads the runtime of a process makes at most."""
    try:
        return max(2, int(os.environ.get("SHMDIST_MAX_THREADS", "")))
    except ValueError:
        return _DEFAULT_MAX_THREADS


def _probe() -> None:
    """See whether there is memory for a thread, where memory is limited.

    A thread that finds none for its very first steps may die in the C library, and the process with it.

    Raises
    ------
    RuntimeError
        There is none.
    """
    try:
        import resource
    except ImportError:
        return
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        stack = threading.stack_size() or resource.getrlimit(resource.RLIMIT_STACK)[0]
        try:
            nbytes = (stack if 0 < stack < 1 << 40 else _DEFAULT_STACK_BYTES) + _THREAD_START_BYTES
            try_to_map(nbytes)
        except (OSError, MemoryError):
            raise RuntimeError("can't start new thread: there is no memory for its stack") from None
