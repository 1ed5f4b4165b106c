"""Runs a part of a map or loop on a thread of this process, so that it can be ended.

It ends as a remote call does: `KeyboardInterrupt` is raised in the function, at the next
bytecode, or at once where it waits inside the runtime. A system call it sits in is not
ended; then the thread ends when that returns. No thread waits for it in either case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shmdist.references.future import LocalTask
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import Node


def run_on_thread(
    node: Node,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    ended: Callable[[Any, BaseException | None], None],
) -> LocalTask:
    """Run ``f(*args)`` on another thread.

    Parameters
    ----------
    node : Node
        This process's.
    f, args : callable, tuple
        The call.
    ended : callable
        Called there with the value, or with None and the error; also after an interrupt.

    Returns
    -------
    LocalTask
        Its ``interrupt()`` ends the call; harmless when it has ended.
    """
    task = LocalTask()

    def run() -> None:
        thread_state = current()
        value, failure = None, None
        thread_state.begin(task)
        task.thread_state = thread_state
        try:
            try:
                thread_state.enter_user_code()
                value = node.tasks.context.new().run(f, *args)
            finally:
                thread_state.leave_user_code()
        except BaseException as error:
            failure = error
        thread_state.end()
        try:
            ended(value, failure)
        finally:
            value = failure = None  # its traceback holds this frame

    node.reactor.start(run)
    return task


__all__ = ["run_on_thread"]
