"""Waits for many descriptors: one reader at a time, with a parked thread behind it.

Three sets, one inside the other, each an epoll instance that is itself pollable::

    park  >  links  >  outputs

``outputs`` holds the pipes on which workers print, ``links`` the connections and the
``kick`` descriptor that wakes a reader out of :meth:`Poller.poll`, and ``park`` is where
the standby threads sleep.  The reader polls ``links``.  A standby thread polls ``park``,
in which ``links`` is present as *one* descriptor: arming and disarming it is one system
call however many links there are, and it is armed one shot at a time, so that a message
wakes one thread and only while no thread reads.

Without epoll (macOS) the same interface is served by :class:`SelectPoller`, which parks
threads on a lock and wakes one each time the reading falls free: dearer, but equal
in meaning.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import threading
import time
from collections.abc import Sequence
from math import inf

_IN = 1  # EPOLLIN and POLLIN are 1 everywhere
_ONCE = 0x40000000  # EPOLLONESHOT
_EDGE = 0x80000000  # EPOLLET
_ALL = -1
#: As many events at once need no memory from the system's allocator. By default 1,023 would be asked for,
#: and 12 KiB for them each time.
FEW = 32
_PARK_SECONDS = 0.5  # after which a thread that SelectPoller has parked looks around


ONE = b"\1\0\0\0\0\0\0\0"


class WakeupFd:
    """A descriptor that is readable once :meth:`set`, until :meth:`clear`.

    Safe in signal handlers and finalizers: it takes no lock.
    """

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self._in = self._out = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._in, self._out = os.pipe()
            os.set_blocking(self._in, False)
            os.set_blocking(self._out, False)

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._in

    @property
    def setter(self) -> int:
        """The descriptor that makes it readable when `ONE` is written to it, by any process."""
        return self._out

    def set(self) -> None:
        """Make the descriptor readable."""
        # A full pipe or counter is readable already; a closed one has nobody left to wake.
        with contextlib.suppress(OSError):
            os.write(self._out, ONE)

    def clear(self) -> None:
        """Make the descriptor unreadable."""
        with contextlib.suppress(OSError):
            os.read(self._in, 1 << 16)  # as much as a pipe holds

    def close(self) -> None:
        """Close the descriptors."""
        fds = {self._in, self._out}
        # A finalizer may still call set(), and must not write into what gets these numbers next.
        self._in = self._out = -1
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)


class Poller:
    """Epoll sets for the reader, for the printed output and for the standby threads."""

    def __init__(self) -> None:
        self._outputs = select.epoll()
        self._links = select.epoll()
        self._park = select.epoll()
        self._kick = WakeupFd()
        self._wake = WakeupFd()
        self._always = WakeupFd()  # set for ever: arming it wakes a standby thread at once
        self._always.set()
        self._links_fd = self._links.fileno()
        self._outputs_fd = self._outputs.fileno()
        self._kick_fd = self._kick.fileno()
        self._always_fd = self._always.fileno()
        self._group_wakeups: set[int] = set()
        self._links.register(self._kick_fd, _IN)
        self._links.register(self._outputs_fd, _IN)
        self._park.register(self._links_fd, _ONCE)
        self._park.register(self._always_fd, _ONCE)
        self._park.register(self._wake.fileno(), _IN)
        self.has_outputs = False
        # The hot path: bound to the system's calls, for a Python function around costs as much.
        self.outputs = self._outputs.poll  # type: ignore[method-assign]  # hot
        self.poll = self._links.poll  # type: ignore[method-assign]  # hot
        self.arm = functools.partial(self._park.modify, self._links_fd, _IN | _ONCE)  # type: ignore[method-assign]  # hot
        self.disarm = functools.partial(self._park.modify, self._links_fd, _ONCE)  # type: ignore[method-assign]  # hot

    def add(self, fd: int) -> None:
        """Watch `fd` for reading."""
        self._links.register(fd, _IN)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`, a link's or an output's; unknown ones are ignored."""
        for poller in (self._links, self._outputs):
            with contextlib.suppress(OSError, ValueError):
                poller.unregister(fd)

    def add_output(self, fd: int) -> None:
        """Watch `fd`, a pipe on which a worker prints."""
        self._outputs.register(fd, _IN)
        self.has_outputs = True

    def outputs(self, timeout: float, maxevents: int = _ALL) -> Sequence[tuple[int, int]]:
        """Wait at most `timeout` seconds for output pipes that have something to read; returns some."""
        return self._outputs.poll(timeout, maxevents)

    def poll(self, timeout: float = -1, maxevents: int = _ALL) -> Sequence[tuple[int, int]]:
        """Wait at most `timeout` seconds (-1: for ever) for readable links, and return `maxevents` of them.

        Returns
        -------
        sequence of (descriptor, events)
            May hold the kick and the set of outputs, which :meth:`is_kick` knows.
        """
        return self._links.poll(timeout, maxevents)

    def is_kick(self, fd: int) -> bool:
        """Return whether `fd` is the poller's own: the kick, which is cleared, or the outputs."""
        if fd == self._kick_fd:
            self._kick.clear()
            return True
        return fd == self._outputs_fd or fd in self._group_wakeups

    #: Whether :meth:`add_group_wakeup` is there.
    supports_group_wakeup = hasattr(os, "eventfd")

    def add_group_wakeup(self, fd: int) -> None:
        """Wake the reader each time somebody writes to `fd`, an eventfd that others listen to as well.

        Nobody clears it, so only what changes counts.
        """
        self._group_wakeups.add(fd)
        self._links.register(fd, _IN | _EDGE)

    def remove_group_wakeup(self, fd: int) -> None:
        """Listen to a group wake-up no more."""
        with contextlib.suppress(OSError, ValueError):
            self._links.unregister(fd)
        self._group_wakeups.discard(fd)

    @property
    def kicker(self) -> int:
        """The descriptor by which another process can do as :meth:`kick`; it stays the poller's."""
        return self._kick.setter

    def kick(self) -> None:
        """Wake the thread in :meth:`poll`; the kick lasts until it is seen."""
        self._kick.set()

    def arm(self) -> None:
        """From now on the next message wakes one standby thread."""
        self._park.modify(self._links_fd, _IN | _ONCE)

    def disarm(self) -> None:
        """From now on messages are the caller's to read."""
        self._park.modify(self._links_fd, _ONCE)

    def nudge(self) -> None:
        """Wake one standby thread now, as if a message had come."""
        self._park.modify(self._always_fd, _IN | _ONCE)

    def wake(self) -> None:
        """Wake the standby threads for housekeeping; safe in finalizers."""
        self._wake.set()

    def unwake(self) -> None:
        """Take note of :meth:`wake`."""
        self._wake.clear()

    def park(self, timeout: float = -1) -> bool:
        """Sleep as a standby thread, for at most `timeout` seconds (-1: for ever).

        Returns
        -------
        bool
            True when woken by :meth:`wake` (perhaps among other things).
        """
        wake_fd = self._wake.fileno()
        return any(fd == wake_fd for fd, _ in self._park.poll(timeout))

    def close(self) -> None:
        """Close every descriptor of the poller's own."""
        for thing in (self._park, self._links, self._outputs, self._kick, self._wake, self._always):
            thing.close()


class SelectPoller(Poller):
    """The same with :func:`select.poll` and a lock, for systems without epoll."""

    supports_group_wakeup = False

    def __init__(self) -> None:
        self._kick = WakeupFd()
        self._kick_fd = self._kick.fileno()
        self._table = threading.Lock()  # guards _fds, _outs and _generation
        self._fds: set[int] = {self._kick_fd}
        self._outs: set[int] = set()
        self._group_wakeups = set()
        self._outputs_fd = -1
        self._state = threading.Condition()  # guards _armed, _nudged, _woken, _closed
        self._armed = self._nudged = self._woken = self._closed = False
        self.has_outputs = False

    def add(self, fd: int) -> None:
        """Watch `fd` for reading."""
        with self._table:
            self._fds.add(fd)
        self.kick()

    def remove(self, fd: int) -> None:
        """Stop watching `fd`."""
        with self._table:
            self._fds.discard(fd)
            self._outs.discard(fd)
        self.kick()

    def add_output(self, fd: int) -> None:
        """Watch `fd`, a pipe on which a worker prints."""
        with self._table:
            self._outs.add(fd)
        self.has_outputs = True
        self.kick()

    @staticmethod
    def _select(fds: set[int], timeout: float) -> list[tuple[int, int]]:
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        return poller.poll(None if timeout < 0 else timeout * 1000)

    def outputs(self, timeout: float, maxevents: int = _ALL) -> Sequence[tuple[int, int]]:
        """Wait at most `timeout` seconds for output pipes that have something to read; returns all."""
        with self._table:
            outs = set(self._outs)
        return self._select(outs, timeout) if outs else []

    def poll(self, timeout: float = -1, maxevents: int = _ALL) -> Sequence[tuple[int, int]]:
        """Wait at most `timeout` seconds for readable links or outputs; returns all."""
        with self._table:
            fds, outs = set(self._fds), set(self._outs)
        found = self._select(fds | outs, timeout)
        ready = [(fd, event) for fd, event in found if fd in fds]
        if len(ready) < len(found):
            ready.append((self._outputs_fd, _IN))
        return ready

    def arm(self) -> None:
        """From now on the next message wakes one standby thread."""
        with self._state:
            self._armed = True
            self._state.notify()

    def disarm(self) -> None:
        """From now on messages are the caller's to read."""
        with self._state:
            if not self._armed:
                return
            self._armed = False
        self.kick()  # the standby thread may sit in poll()

    def nudge(self) -> None:
        """Wake one standby thread now, as if a message had come."""
        with self._state:
            self._nudged = True
            self._state.notify()
        self.kick()

    def wake(self) -> None:
        """Wake the standby threads for housekeeping; safe in finalizers."""
        self._woken = True  # no lock here: this runs in finalizers
        self.kick()

    def unwake(self) -> None:
        """Take note of :meth:`wake`."""
        self._woken = False

    def park(self, timeout: float = -1) -> bool:
        """Sleep as a standby thread; True when woken by :meth:`wake`."""
        end = inf if timeout < 0 else time.monotonic() + timeout
        while True:
            # A finalizer cannot notify, so its wake is looked for twice a second.
            turn = min(_PARK_SECONDS, max(0.0, end - time.monotonic()))
            with self._state:
                self._state.wait_for(lambda: self._armed or self._nudged or self._woken or self._closed, turn)
                if self._closed or self._woken or self._nudged:
                    self._nudged = False
                    return self._woken
                armed = self._armed
            if armed and self.poll(turn):
                with self._state:
                    if self._armed:
                        self._armed = False
                        return self._woken
            if time.monotonic() >= end:
                return False

    def close(self) -> None:
        """Wake who is parked and close the descriptors."""
        self._closed = True
        # In a forked child nobody may be left who would give the lock back.  A parked thread
        # that is not told looks by itself within `_PARK_SECONDS`.
        if self._state.acquire(False):
            self._state.notify_all()
            self._state.release()
        self._kick.close()


def make_poller() -> Poller:
    """Return the best poller of this system."""
    if hasattr(select, "epoll") and os.environ.get("SHMDIST_POLLER") != "select":
        return Poller()
    return SelectPoller()
