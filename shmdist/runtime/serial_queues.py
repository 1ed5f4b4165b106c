"""Serial queues (lanes): calls of one lane run one after the other, in the order in which they came.

When a call is refused, because there is no thread for it, those behind it in its lane are refused as well.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from shmdist._firmly import firmly
from shmdist._log import Log

if TYPE_CHECKING:
    from shmdist.runtime.executor import IncomingCall
    from shmdist.runtime.interrupts import ThreadState
    from shmdist.runtime.node import Node

_log = Log("reactor")


class SerialQueues:
    """The lanes of all callers. A lane exists while one of its calls runs or is about to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards `_waiting`
        self._waiting: dict[tuple[int, int], deque[IncomingCall]] = {}

    def __repr__(self) -> str:
        return f"<SerialQueues {len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, task: IncomingCall) -> bool:
        """Let `task` into its lane; True when it is the first, and may run."""
        key = (task.key[0], task.frame.lane)
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is not None:
                waiting.append(task)
                return False
            self._waiting[key] = deque()
            return True

    def leave(self, task: IncomingCall) -> IncomingCall | None:
        """Let `task` out, which has ended; returns the one that runs next."""
        key = (task.key[0], task.frame.lane)
        with self._lock:
            waiting = self._waiting[key]
            if waiting:
                return waiting.popleft()
            del self._waiting[key]
            return None

    def run(self, node: Node, first: IncomingCall, thread_state: ThreadState) -> None:
        """Run a task and its lane after it, or refuse them; raises nothing."""
        tasks = node.tasks
        task: IncomingCall | None = first
        while task is not None:
            refusal = task.refusal
            try:
                if refusal is None:
                    tasks.run(task, thread_state)
                else:
                    tasks.refuse(task, refusal)
            except Exception as error:
                node.reserve.open()
                _log.exception("%r failed: %r", task, error)
                if thread_state.task is task:
                    thread_state.end()
                firmly(tasks.refuse, task, error)
            if not task.frame.lane:
                return
            task = firmly(self.leave, task)
            if task is not None:
                task.refusal = refusal
