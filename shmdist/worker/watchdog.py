"""The watchdog: a process that kills a worker of another host which cannot end itself.

A function may hold the interpreter for hours, in C code.  No thread of the worker runs then, and
so neither does its heartbeat monitor: when the path to process 1 is cut, it would live on until the function
comes back.  The watchdog has an interpreter of its own.  It hears what the heartbeat monitor hears, from the
same kernel, and when there was silence for so long that the heartbeat monitor should have acted, it kills the
worker, and those of its process group.

Protocol
--------
- *Birth.*  The worker forks it twice, when it has one thread and little memory.  So it is no
  child of the worker: the user's ``os.wait()`` never finds a child that is not the user's.  It has a
  session of its own, ignores the signals that ask to end, and keeps three descriptors:

  ============ ===========================================================================
  *worker*     a pidfd of the worker, made by the worker itself; readable when it has ended
  *control*    one end of a pair of sockets; the worker has the other
  *lifeline*   the worker's standard input, that is, the channel of its login
  ============ ===========================================================================

- *Watching.*  When the worker has joined, it sends over *control* its socket to process 1, and one byte:
  what counts as heard there, 0 for segments and 1 for bytes (`carried`, see ``runtime.heartbeat``).  From
  then on the watchdog looks.  What was heard is that count, and the number of bytes that came on *lifeline*.
- *Silence.*  The rule is that of ``keepalive.SilenceTimer``, with `_GRACE_FRACTION` more.  Both look `LOOKS`
  times in the timeout, so after the last sign of life the monitor acts within 0.85 to 0.9 of the
  timeout and the watchdog within 0.95 to 1.0: a worker that can do so ends by itself.
- *The master is gone.*  At the end of *lifeline* the watchdog writes one byte to *control*, and the
  worker ends in order.  A path that has ended, this or the socket's, is silent from then on: a
  worker that does not end is killed as above.
- *The worker has ended.*  *worker* says so at once, and the watchdog ends; so nothing waits for its
  copies of the socket and of the channel.  Where there is no pidfd it asks at each look.  The worker
  shuts its links down before it closes them, which copies do not hinder.
- *The worker has become another program.*  *control* ends, for it is not inherited; the watchdog ends.
  Forked children of the worker close it, which is only to be tidy: *worker* tells of the worker's end.
- *The watchdog is gone*, killed by somebody: *control* ends, and the worker reads *lifeline* itself.

What counts while the worker reads nothing, as it does not while its interpreter is held
--------------------------------------------------------------------------------------
Tried on Linux 6.18, with sockets that no thread reads:

- Segments: those of keep-alives come, whatever lies in the buffer.  When the buffer is full, process
  1's kernel asks more and more rarely for room, but this one goes on with its keep-alives, and gets
  answers.  Only where the buffers of both directions are full do both ask more and more rarely,
  up to the limit that ``keepalive.keep_alive`` sets.  Linux before 6.15 knows no such limit: there a
  worker may be taken for cut off if process 1 holds its interpreter too, both do for longer than the
  timeout, and arrays are stuck both ways.
- Bytes: they count as they fall into the buffer, until it is full.  Then none come.  So through a
  login a worker to which a large array is stuck would seem cut off, and HEARTBEAT could not be sent
  either.  Hence process 1 also sends bytes on the channel of the worker's standard input, which has
  room of its own (``managers.ssh.tunnel.Pulse``).  When the path is cut while an array is on it, the last
  bytes are those that the SSH server still had; they may come some tenths of a second after the cut.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import time
from typing import NoReturn

from shmdist._log import Log
from shmdist.transport import keepalive

_GRACE_FRACTION = 0.1  # of the timeout, beyond the heartbeat monitor's limit
_END = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL
_DEAF = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_log = Log("watchdog")


class Watchdog:
    """The worker's side: makes the process, and talks with it.

    Parameters
    ----------
    lifeline : int
        Descriptor that ends when process 1 is gone; stays the caller's.
    """

    def __init__(self, lifeline: int) -> None:
        self._lifeline = lifeline
        self._control: socket.socket | None = None
        timeout = keepalive.timeout()
        if timeout:
            try:
                self._control = _begin(lifeline, timeout)
            except OSError as error:  # no process or descriptor is to be had: the heartbeat monitor remains
                _log.warning("no watchdog could be started: %s", error)

    def __repr__(self) -> str:
        return f"<Watchdog, {'not running' if self._control is None else 'begun'}>"

    def watch(self, link: socket.socket, carried: bool) -> None:
        """Have the worker killed when nothing comes on its link to process 1."""
        if self._control is not None:
            with contextlib.suppress(OSError):  # it is gone
                socket.send_fds(self._control, [bytes([carried])], [link.fileno()])

    def wait(self) -> None:
        """Wait until process 1 is gone, by what the lifeline tells."""
        with contextlib.suppress(OSError):
            if self._control is not None and self._control.recv(1):
                return
        with contextlib.suppress(OSError):
            while os.read(self._lifeline, 1 << 16):
                pass

    def close(self) -> None:
        """Give the pair of sockets back, in a forked child."""
        if self._control is not None:
            self._control.close()


def _begin(lifeline: int, timeout: float) -> socket.socket:
    """Start the process; return this one's end of the pair of sockets."""
    ours, theirs = socket.socketpair()
    worker, pidfd = os.getpid(), -1
    try:
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # an old kernel, or a sandbox
                pidfd = os.pidfd_open(worker)
        child = os.fork()
        if not child:
            _fork_again(_WatchdogProcess(worker, pidfd, theirs, lifeline, timeout))
        status = 0
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored the system keeps none
            _, status = os.waitpid(child, 0)
        if status:
            raise OSError("the second fork failed")
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        if pidfd >= 0:
            os.close(pidfd)
    return ours


def _fork_again(watch: _WatchdogProcess) -> NoReturn:
    """Go on as a process that is nobody's child, and never return to what the worker does."""
    code = 1
    try:
        os.setsid()
        if not os.fork():
            watch.settle()
            watch.run()
        code = 0
    finally:
        os._exit(code)


class _WatchdogProcess:
    """The watchdog's side."""

    def __init__(
        self, worker: int, pidfd: int, control: socket.socket, lifeline: int, timeout: float
    ) -> None:
        self.worker, self.pidfd, self.control, self.lifeline = worker, pidfd, control, lifeline
        self.pause = timeout / keepalive.LOOKS
        self.silence = keepalive.SilenceTimer(self.pause, timeout * (keepalive.LIMIT + _GRACE_FRACTION))
        self.link: socket.socket | None = None
        self.carried = False
        self.beats = 0  # bytes that came on the lifeline
        self.ended = False  # nothing will come any more
        self.poller = select.poll()

    def __repr__(self) -> str:
        return f"<_Watch of process {self.worker}, {self.silence!r}{', ended' if self.ended else ''}>"

    def settle(self) -> None:
        """Keep nothing of the worker's but what is needed, and be told from it in a list of processes."""
        for number in _DEAF:
            signal.signal(number, signal.SIG_IGN)
        gc.disable()  # pages that it does not touch stay the worker's
        os.chdir("/")
        keep = {self.pidfd, self.control.fileno(), self.lifeline}
        for fd in {int(name) for name in os.listdir("/dev/fd")} - keep:
            with contextlib.suppress(OSError):
                os.close(fd)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in {0, 1, 2} - {null}:
            os.dup2(null, fd)
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
            file.write("shmdist-watcher")
        for fd in keep - {-1}:
            self.poller.register(fd, select.POLLIN)

    def run(self) -> None:
        """Look until the worker has ended."""
        while self.is_alive():
            asleep = self.pidfd >= 0 and not self.ended and self.link is None
            for fd, _ in self.poller.poll(None if asleep else self.pause * 1000):
                if fd == self.pidfd or (fd == self.control.fileno() and not self.take_link()):
                    return
                if fd == self.lifeline:
                    self.read_lifeline()
                elif self.link is not None and fd == self.link.fileno():
                    self.end(fd)
            heard = self.heard()
            if heard is not None and self.silence.look(time.monotonic(), heard):
                self.kill()
                return

    def is_alive(self) -> bool:
        """Return whether the worker lives, where no pidfd does."""
        if self.pidfd < 0:
            try:
                os.kill(self.worker, 0)
            except ProcessLookupError:
                return False
        return True

    def take_link(self) -> bool:
        """Take the worker's socket to process 1; False when the worker has no other end any more."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, 1, 1)
        except OSError:
            return False
        if data and fds:
            self.link, self.carried = socket.socket(fileno=fds[0]), bool(data[0])
            self.poller.register(self.link, _END)
        return bool(data)

    def read_lifeline(self) -> None:
        """Count what comes on the lifeline; tell the worker of its end."""
        try:
            count = len(os.read(self.lifeline, 1 << 16))
        except OSError:
            count = 0
        self.beats += count
        if not count:
            self.end(self.lifeline)
            with contextlib.suppress(OSError):
                self.control.send(b"\0")

    def end(self, fd: int) -> None:
        """Note that a path has ended."""
        self.poller.unregister(fd)
        self.ended = True

    def heard(self) -> object:
        """Return what changes with each sign of life; None where there is nothing to hear."""
        if self.ended:
            return "the end"
        counts = keepalive.counts(self.link) if self.link is not None else None
        return (counts[self.carried], self.beats) if counts is not None else None

    def kill(self) -> None:
        """Kill the worker, and what it has started as long as that has not left its process group."""
        with contextlib.suppress(OSError):
            leads = os.getpgid(self.worker) == self.worker
            os.kill(-self.worker if leads else self.worker, signal.SIGKILL)


__all__ = ["Watchdog"]
