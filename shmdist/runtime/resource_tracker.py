"""multiprocessing beside the workers of this host: its authentication key and its one resource tracker.

``SharedMemory`` is registered with a resource tracker by each process that creates or attaches it, and
unlinked by that tracker when its last process ends. A worker with a tracker of its own would so unlink
at its end what the program goes on using. As the processes of ``multiprocessing`` itself do, a worker
therefore uses the tracker of process 1: the pipe that leads to it is opened by its number there
(``/proc/PID/fd``). It is asked for when it is first needed, for most programs need no tracker at all.
"""

from __future__ import annotations

import os
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shmdist._log import Log
from shmdist.runtime import imports
from shmdist.serialization import codec
from shmdist.transport.messages import WANT_VALUE

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

_MODULE = "multiprocessing.resource_tracker"
_log = Log("tracker")


def set_authkey(key: str) -> None:
    """Make process 1's secret this process's."""
    from multiprocessing.process import current_process

    current_process().authkey = bytes.fromhex(key)


def use_tracker_of_process_1(node: Node) -> None:
    """Have this worker, on the host of process 1, start no resource tracker of its own."""
    imports.when_imported(_MODULE, lambda module: _redirect(module, node))


def _redirect(module: ModuleType, node: Node) -> None:
    tracker: Any = module._resource_tracker
    asking = threading.Lock()  # held while process 1 is asked, by the first to come
    asked = False

    def ask() -> None:
        nonlocal asked
        with asking:  # else the others would start a tracker meanwhile
            if asked or tracker._fd is not None:
                return
            try:
                tracker._fd = _open(node)
            except Exception as error:
                _log.warning("this worker gets a resource tracker of its own: %s", error)
            asked = True

    def first(method: Any) -> Any:
        def ensure_running(*args: Any) -> Any:
            if not asked and tracker._fd is None and os.getpid() == node.ospid:
                ask()
            return method(*args)

        return ensure_running

    # The second is what the methods of later Pythons call.
    for name in ("ensure_running", "_ensure_running_and_write"):
        if hasattr(tracker, name):
            setattr(tracker, name, first(getattr(tracker, name)))
            if hasattr(module, name):
                setattr(module, name, getattr(tracker, name))


def _open(node: Node) -> int:
    """Return a descriptor of the pipe to the tracker of process 1."""
    ospid, fd = node.requests.call(1, WANT_VALUE, codec.dumps_call(pipe_of_tracker, (), {}), pipe_of_tracker)
    return os.open(f"/proc/{ospid}/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)


def pipe_of_tracker() -> tuple[int, int]:
    """Return this process's id and its descriptor of the pipe to the resource tracker, started if need be."""
    from multiprocessing import resource_tracker

    return os.getpid(), resource_tracker.getfd()  # type: ignore[return-value]  # a number once it runs


__all__ = ["pipe_of_tracker", "set_authkey", "use_tracker_of_process_1"]
