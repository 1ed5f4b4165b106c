"""Worker processes of this host: how one ended, and what it shares with the program's other children.

`subprocess` takes a child that somebody else has reaped for one that exited with code 0: a program
that ignores SIGCHLD, where the system reaps, or one that calls ``os.wait``. The status then is what the
system still knows by the process's pidfd (Linux 6.15 and later), or unknown.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Mapping
from typing import Any

#: ``ioctl`` of a pidfd: struct pidfd_info, of which the first 8 bytes say what is asked for and what is
#: there, and the last 4 are the exit status, as `os.waitpid` returns it.
_SIZE = 64
_GET_INFO = 3 << 30 | _SIZE << 16 | 0xFF << 8 | 11
_HAS_EXIT = 8


def authkey() -> str:
    """Return the secret by which multiprocessing's processes know each other, to be told to workers."""
    from multiprocessing.process import current_process

    return current_process().authkey.hex()


def hash_seed(environment: Mapping[str, str], params: Mapping[str, Any]) -> str:
    """Return a worker's ``PYTHONHASHSEED``: the user's in `environment`, or that of all workers."""
    mine = environment.get("PYTHONHASHSEED", "random")
    cluster: str = params.get("hash_seed", "random")
    return mine if mine.isdecimal() else cluster


class WorkerProcess(subprocess.Popen[bytes]):
    """A process that knows whether its exit status is true.

    Attributes
    ----------
    pidfd : int
        Of the process, opened while it lived; -1: there is none. It stays its opener's.
    """

    pidfd = -1
    _reaped_elsewhere = False

    def exit_status(self) -> int | None:
        """Return what :meth:`poll` does; None also when nobody knows."""
        code = self.poll()
        return None if self._reaped_elsewhere else code

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Ask the system for the status; `Popen` calls it, with its lock held."""
        try:
            return os.waitpid(self.pid, wait_flags)
        except ChildProcessError:
            status = _status_by_pidfd(self.pidfd)
            self._reaped_elsewhere = status is None
            return self.pid, status or 0


def _status_by_pidfd(pidfd: int) -> int | None:
    """Return the exit status of a process that has been reaped; None when it cannot be had."""
    if pidfd < 0:
        return None
    import fcntl

    info = bytearray(_SIZE)
    struct.pack_into("Q", info, 0, _HAS_EXIT)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:  # an older kernel
        return None
    (there,) = struct.unpack_from("Q", info)
    status: int = struct.unpack_from("i", info, _SIZE - 4)[0]
    return status if there & _HAS_EXIT else None


__all__ = ["WorkerProcess", "authkey", "hash_seed"]
