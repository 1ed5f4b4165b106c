"""Heartbeat: finds hosts that have fallen silent, and gives up their processes.

A cable that is pulled or a machine that is suspended ends no connection: nothing comes any
more, and nothing says so.  Each process looks at its links to other hosts, twenty times within
`SHMDIST_HEARTBEAT_TIMEOUT`, and shuts those on which nothing has come for nearly so long.  The
rest follows as from any link that ends: the thread that waits for that process gets
`ProcessExitedException`, with calls under way or none, and a write that is blocked there ends.

What is a sign of life, by kind of link:

======================= ============================= ======================================
link                    process 1 hears               the worker hears
======================= ============================= ======================================
direct TCP              the kernel there              the kernel there
                        (``transport.keepalive``)
through a login         the SSH server there, which   HEARTBEAT, sent every third of the time:
                        it asks, and the kernel there see below
                        (``connection.heard``)
relayed by process 1    nothing of its own: process 1 hears whether the two workers live, and
                        tells each when the other does not
AF_UNIX                 nothing: both ends have one kernel, which ends the link with the process
a manager's own         ``connection.heard()``, a     HEARTBEAT
                        value that changes with each
                        sign, if it is there
======================= ============================= ======================================

A worker's watchdog hears what the worker does, and through a login also what comes on the worker's
standard input, where process 1 sends a byte every fourth of the time.

So in all the cases that matter:

- *cut off, suspended, switched off*: no kernel and no server answers; silent.
- *stopped, or holding its interpreter for minutes*: kernel and server answer; alive.
- *not reading*, so that a write to it is blocked: its kernel goes on asking whether we are
  alive, and these questions count as signs; alive.
- *an SSH server that hangs, or is behind a proxy* and is gone: the kernel at the other end of the
  connection answers for it; silent after no more than two and a half times as long.
- *held up ourselves*: a look counts for no more than the time between two looks.

Through a login the worker's own kernel talks with the SSH server beside it, which does not
tell that its client is gone.  So process 1 sends HEARTBEAT there, and the worker counts bytes that
came.  There, and only there, a process 1 that is stopped or holds its interpreter for longer than
the timeout is taken for dead by its workers.

A worker that cannot hear process 1 any more ends itself.  One thread does all this, in processes
that have such links; it sleeps between looks.  The timeout of a link is the one that was set when
the link was made, as it is for the kernel's questions.

That thread needs the interpreter, which a function of a worker may hold for hours.  So beside each
worker that was launched by SSH there is a small process, its watchdog, which hears what the worker's
heartbeat monitor hears and kills a worker that does not end itself.  It acts after that monitor, and
within the timeout: *nothing of a cluster outlives its connection by more than*
`SHMDIST_HEARTBEAT_TIMEOUT`.  See ``worker.watchdog``.  Workers of a manager's own, and those on systems
that do not count what comes on a socket (macOS), live on until the function comes back.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import Any

from shmdist._log import Log
from shmdist.runtime.peers import Peers
from shmdist.runtime.reactor import Reactor
from shmdist.transport import keepalive
from shmdist.transport.link import Link
from shmdist.transport.messages import Kind

_BEATS = 6  # pauses between two beats
_log = Log("heartbeat")


class _LinkHealth:
    """What is known of one link: its timeout is the one that was set when it was made."""

    __slots__ = ("beaten", "silence", "timeout")

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.silence = keepalive.SilenceTimer(timeout / keepalive.LOOKS, timeout * keepalive.LIMIT)
        self.beaten = time.monotonic()


class HeartbeatMonitor:
    """Looks after the links of a process to other hosts; see the module's docstring."""

    def __init__(self, peers: Peers, reactor: Reactor) -> None:
        self._peers, self._reactor = peers, reactor
        self._links: dict[Link, _LinkHealth] = {}
        self._lock = threading.Lock()  # guards `_links` and `_running`
        self._running = False
        self._closed = False
        self._woken = threading.Event()  # there is a new link, or no more to be done
        #: Process ids of members whose hosts have fallen silent.
        self.silent: set[int] = set()
        #: Whether only bytes of process 1 tell that it lives: its connection passes an SSH server.
        self.carried = False

    def __repr__(self) -> str:
        return f"<HeartbeatMonitor: {len(self._links)} links, silent {sorted(self.silent)}>"

    def watch(self, link: Link) -> None:
        """Look after a link to another host from now on."""
        timeout = keepalive.timeout()
        if not timeout:
            return
        with self._lock:
            self._links[link] = _LinkHealth(timeout)
            self._woken.set()
            if self._running or self._closed:
                return
            self._running = True
        try:
            self._reactor.start(self._run)
        except BaseException:
            self._running = False
            raise

    def close(self) -> None:
        """Let the thread end."""
        self._closed = True
        self._woken.set()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._lock:
                self._woken.clear()  # before all else: what is new after this wakes the thread again
                for link in [link for link in self._links if link.closed]:
                    del self._links[link]
                links = list(self._links.items())
                if not links or self._closed:
                    self._running = False
                    return
            now = time.monotonic()
            for link, watched in links:
                if self._look(link, watched, now):
                    self._give_up(link, watched.timeout)
                elif now - watched.beaten >= watched.silence.pause * _BEATS:
                    watched.beaten = now
                    self._beat(link)
            self._woken.wait(min(watched.silence.pause for _, watched in links))

    def _look(self, link: Link, watched: _LinkHealth, now: float) -> bool:
        """Return whether nothing has come on a link for too long."""
        heard = self._heard(link)
        return heard is not None and watched.silence.look(now, heard)

    def _heard(self, link: Link) -> Any:
        """Return what changes with each sign of life; None where there is nothing to hear."""
        ask = getattr(link.connection, "heard", None)
        if ask is not None:
            return ask()
        carried = self.carried and link.pid == 1
        counts = keepalive.counts(link.socket)
        return counts[carried] if counts is not None else None

    def _beat(self, link: Link) -> None:
        """Let the other side hear this process, where no kernel does that."""
        # Bytes that are under way are as good, and what is stuck is not to be added to.
        if self._peers.pid == 1 and link.bridged and not link.is_writing:
            self._reactor.post(link, int(Kind.HEARTBEAT), 0, 0)

    def _give_up(self, link: Link, timeout: float) -> None:
        _log.warning("nothing has come from the host of process %d for %g s", link.pid, timeout)
        self.silent.add(link.pid)
        if self._peers.is_worker and link.pid == 1:
            limit = f"{timeout:g} s (SHMDIST_HEARTBEAT_TIMEOUT)"
            _tell(f"nothing has come from process 1 for {limit}: this worker ends")
        abort = getattr(link.connection, "abort", None)
        if abort is not None:  # what carries the link must not hold up those who end it
            with contextlib.suppress(Exception):
                abort()
        link.shut()


def _tell(text: str) -> None:
    """Print why this worker ends, if that can be done without waiting; process 1 may hear it yet."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"{text}\n".encode())


__all__ = ["HeartbeatMonitor"]
