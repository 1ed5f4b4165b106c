"""A thread of the runtime, and the handing over of its job.

``threading.Thread.start`` waits for the new thread's word that it runs. A thread that finds no memory for
its first steps (its first frame, a lock) dies without that word, and who started it would wait for ever. Or
it dies a little later, with the job that it was to do.

So a job lies where it is taken from once: by the thread, when it needs nothing more to begin, or by who
started it, when the thread is gone. The latter is seen by the function that the system was given to run,
which nobody else holds. Nothing needs to be done, or to be had, on the dying thread.

Threads of the runtime are ``threading.Thread`` and not those of ``_thread``, which need less to begin: users'
functions run on them. There they are seen by their names in logs, profiles and ``threading.enumerate``, and
a child forked there gets a main thread that Python before 3.13 can end.

The collector may run on a thread from its first step on, before it has taken its job. A finalizer that waited
there could wait for who started the thread, and waits for it. So a thread is inside the runtime from then on
(:func:`is_own`, asked by ``interrupts.current``).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

_FIRST_LOOK_SECONDS = 1e-3  # until the first look whether a thread that has not begun is still there
_MAX_LOOK_SECONDS = 0.05  # between two looks at most

Job = Callable[[], None]


class DaemonThread(threading.Thread):
    """A daemon thread that does one job, or takes it up as the first.

    Parameters
    ----------
    job : callable or None
        What it is started for.
    name : str
        The thread's.
    live : callable, optional
        Runs on the thread, with the thread as argument: makes what it needs, takes the job by :meth:`take`,
        and does it. It calls :meth:`tell` in any case.
    """

    def __init__(
        self, job: Job | None, name: str, live: Callable[[DaemonThread], None] | None = None
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._job = [job]  # taken out once
        self._live = live
        self._word = threading.Lock()  # released by the thread when it has begun
        self._word.acquire()
        self._body: weakref.ref[Any] | None = None  # what the system runs
        # `start` below waits in its own way. A Python that has no such attribute waits in both.
        with contextlib.suppress(AttributeError):
            self._started.wait = _no_wait  # type: ignore[attr-defined]  # Python's own

    @property
    def _bootstrap(self) -> Any:
        """What Python gives to the system to run."""
        # No frame holds it, so that no error does with which the thread dies.
        body = functools.partial(_begin, super()._bootstrap)  # type: ignore[misc]  # Python's own
        self._body = weakref.ref(body)
        return body

    def start(self) -> None:
        """Start it, and wait until it has taken its job.

        Raises
        ------
        RuntimeError, MemoryError
            No thread can be had; the job is not done.
        """
        super().start()
        look = _FIRST_LOOK_SECONDS
        try:
            while not self._word.acquire(timeout=look):
                if self._body is not None and self._body() is None:
                    break
                look = min(2 * look, _MAX_LOOK_SECONDS)
        except Exception:
            pass  # it has taken its job, or it finds none
        try:
            self.take()
        except IndexError:
            return
        with contextlib.suppress(Exception), threading._active_limbo_lock:  # type: ignore[attr-defined]
            threading._limbo.pop(self, None)  # type: ignore[attr-defined]  # those that are being started
        raise RuntimeError("can't start new thread: there is no memory for its first steps")

    def take(self) -> Job | None:
        """Take the job.

        Raises
        ------
        IndexError
            It is taken: who started the thread has given it up.
        """
        return self._job.pop()

    def tell(self) -> None:
        """Tell who started this thread that it has the job, or takes none."""
        self._word.release()

    def run(self) -> None:
        """Do the job."""
        if self._live is not None:
            self._live(self)
            return
        try:
            job = self.take()
        finally:
            self.tell()
        if job is not None:
            job()


def _begin(bootstrap: Job) -> None:
    """Begin a thread: the outermost function of each."""
    bootstrap()


def is_own() -> bool:
    """Return whether the calling thread is one of these; in any step of it."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code is _begin.__code__


def _no_wait(timeout: float | None = None) -> bool:
    """Stand in for the wait for a new thread's word."""
    return True


__all__ = ["DaemonThread", "Job", "is_own"]
