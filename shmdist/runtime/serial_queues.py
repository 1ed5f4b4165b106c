"""Serial queues (lanes): calls of one lane run one after the other, in the order in which they came.

When a call is refused, because there is no thread for it, those behind it in its lane are refused as well.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Protocol

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.runtime.interrupts import ThreadState
from shmdist.runtime.reserve import Reserve
from shmdist.transport.messages import Frame

_log = Log("reactor")


class Call(Protocol):
    """A call that has come, as far as a lane knows it."""

    key: tuple[int, int]
    frame: Frame
    refusal: Exception | None


class Runner(Protocol):
    """What runs calls, or answers for them."""

    def run(self, call: Any, thread_state: ThreadState, /) -> None:
        """Run a call on this thread."""

    def refuse(self, call: Any, error: BaseException, /) -> None:
        """Answer with an error."""


class SerialQueues:
    """The lanes of all callers. A lane exists while one of its calls runs or is about to."""

    def __init__(self, reserve: Reserve) -> None:
        self._reserve = reserve
        self._lock = threading.Lock()  # guards `_waiting`
        self._waiting: dict[tuple[int, int], deque[Call]] = {}

    def __repr__(self) -> str:
        return f"<SerialQueues {len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, task: Call) -> bool:
        """Let `task` into its lane; True when it is the first, and may run."""
        key = (task.key[0], task.frame.lane)
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is not None:
                waiting.append(task)
                return False
            self._waiting[key] = deque()
            return True

    def leave(self, task: Call) -> Call | None:
        """Let `task` out, which has ended; returns the one that runs next."""
        key = (task.key[0], task.frame.lane)
        with self._lock:
            waiting = self._waiting[key]
            if waiting:
                return waiting.popleft()
            del self._waiting[key]
            return None

    def run(self, runner: Runner, first: Call, thread_state: ThreadState) -> None:
        """Run a task and its lane after it, or refuse them; raises nothing."""
        task: Call | None = first
        while task is not None:
            refusal = task.refusal
            try:
                if refusal is None:
                    runner.run(task, thread_state)
                else:
                    runner.refuse(task, refusal)
            except Exception as error:
                self._reserve.open()
                _log.exception("%r failed: %r", task, error)
                if thread_state.task is task:
                    thread_state.end()
                firmly(runner.refuse, task, error)
            if not task.frame.lane:
                return
            task = firmly(self.leave, task)
            if task is not None:
                task.refusal = refusal
