"""Lanes: calls of one lane run one after the other, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmdist.runtime.task import Task


class Lanes:
    """The lanes of all callers. A lane exists while one of its calls runs or is about to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards `_waiting`
        self._waiting: dict[tuple[int, int], deque[Task]] = {}

    def __repr__(self) -> str:
        return f"<Lanes {len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, task: Task) -> bool:
        """Let `task` into its lane; True when it is the first, and may run."""
        key = (task.key[0], task.frame.lane)
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is not None:
                waiting.append(task)
                return False
            self._waiting[key] = deque()
            return True

    def leave(self, task: Task) -> Task | None:
        """Let `task` out, which has ended; returns the one that runs next."""
        key = (task.key[0], task.frame.lane)
        with self._lock:
            waiting = self._waiting[key]
            if waiting:
                return waiting.popleft()
            del self._waiting[key]
            return None
