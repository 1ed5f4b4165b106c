"""Signs of life of the other host: TCP keep-alive, and the timer of its silence.

`SHMDIST_HEARTBEAT_TIMEOUT` (seconds; 20) is how long a host may be silent.  What counts as a
sign of life must not need the other process's interpreter: a function that holds it for
minutes, or a stopped process, is not a dead host.

On a TCP socket each side's kernel asks the other's for a sign whenever a third of the time
was silent (``SO_KEEPALIVE``).  Kernels answer for processes that cannot.  How many segments
have come on a socket stands in ``TCP_INFO``, so one who looks at that count sees whether the
other host lives, also while a write is blocked (see ``runtime.heartbeat``).

``TCP_USER_TIMEOUT`` would do half of this, and harm: it ends a connection whose peer has not
read for so long, although the peer's kernel answers every probe.  And without looking, a
write to a host that is gone would be retried for a quarter of an hour.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys

DEFAULT_TIMEOUT = 20.0  # seconds
MIN_TIMEOUT = 2.0  # the kernel counts in whole seconds, and two signs must have been missed
LOOKS = 20  # within the timeout, at what has come
LIMIT = 0.825  # of the timeout; between two looks, so that the 17th without a sign is the one
_TCP_RTO_MAX_MS = 44 if sys.platform == "linux" else None  # since 6.15; the module socket has no name for it
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_COUNTS = struct.Struct("128xQII")  # of struct tcp_info: bytes received; segments out, and in


def timeout() -> float:
    """Return how many seconds a host may be silent; 0: for ever.

    Raises
    ------
    ValueError
        `SHMDIST_HEARTBEAT_TIMEOUT` is no number of seconds.
    """
    text = os.environ.get("SHMDIST_HEARTBEAT_TIMEOUT", "").strip()
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT
        if not 0 <= seconds < 1e6:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"SHMDIST_HEARTBEAT_TIMEOUT must be a number of seconds, 0 for no limit, not {text!r}"
        ) from None
    return max(seconds, MIN_TIMEOUT) if seconds else 0.0


def keep_alive(sock: socket.socket, seconds: float) -> None:
    """Have the kernel ask for signs of life on a TCP socket.

    It ends the connection by itself a little later than one who looks at the counts would:
    that is for a process whose own threads are held up.

    Where something waits to be sent, it is that which is sent again and again, or the question whether
    there is room for it.  These come ever more rarely; here, still some times in `seconds`.
    """
    if not seconds:
        return
    idle = min(max(1, int(seconds / 3)), 32767)  # the kernel takes no more
    pause = max(1, int(seconds / 30))
    count = max(2, min(100, round((seconds - idle) / pause) + 1))
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", pause), ("TCP_KEEPCNT", count)):
            option = getattr(socket, name, None)
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if _TCP_RTO_MAX_MS is not None:
            # Fifteen unanswered ones end the connection: that is to be later than `seconds`.
            most = min(max(1000, int(seconds * 1000 / 6)), 120_000)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, most)


def counts(sock: socket.socket) -> tuple[int, int] | None:
    """Return how many segments and how many bytes have come on a TCP socket.

    None where the system does not tell, or the socket is closed.
    """
    if _TCP_INFO is None:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _COUNTS.size)
    except OSError:
        return None
    if len(info) < _COUNTS.size:
        return None
    nbytes, _, segments = _COUNTS.unpack(info)
    return segments, nbytes


class SilenceTimer:
    """How long nothing has been heard; pure.

    A look counts for no more time than there is between looks: one who was held up himself, and
    did not look for minutes, has not heard silence for minutes.

    Parameters
    ----------
    pause : float
        Seconds between looks.
    limit : float
        Seconds of silence that are too long.

    Examples
    --------
    >>> silence = SilenceTimer(pause=1.0, limit=2.5)
    >>> [silence.look(now, heard=7) for now in (0.0, 60.0, 61.0)]
    [False, False, False]
    >>> silence.look(62.0, heard=7)
    True
    """

    __slots__ = ("_heard", "_last", "limit", "pause", "seconds")

    def __init__(self, pause: float, limit: float) -> None:
        self.pause, self.limit = pause, limit
        self.seconds = 0.0
        self._last: float | None = None
        self._heard: object = None

    def __repr__(self) -> str:
        return f"<Silence of {self.seconds:.1f} s, {self.limit:.1f} s are too long>"

    def look(self, now: float, heard: object) -> bool:
        """Take note of what has been heard up to `now`; True when it was silent for too long."""
        if self._last is None or heard != self._heard:
            self.seconds = 0.0
        else:
            self.seconds += min(now - self._last, self.pause)
        self._last, self._heard = now, heard
        return self.seconds >= self.limit


__all__ = ["SilenceTimer", "counts", "keep_alive", "timeout"]
