"""Interrupts of the thread that takes what an input gives."""

import os
import signal
import sys
import threading
import time

import pytest

from shmdist.scheduling import input_reader


class _Run:
    closed = False

    def outcomes(self):
        try:
            while True:
                yield 1
        finally:
            self.closed = True


def test_a_second_interrupt_while_a_map_ends_leaves_no_run_behind():
    class Feed(input_reader.Feed):
        def let_go(self):
            os.kill(os.getpid(), signal.SIGINT)
            super().let_go()

    run = _Run()
    outcomes = input_reader.outcomes_read_here(run, Feed(lambda: [1]))
    assert next(outcomes) == 1
    with pytest.raises(KeyboardInterrupt):
        outcomes.close()
    assert run.closed


def _raising_at(function, number):
    """Return a trace function that raises KeyboardInterrupt at one line of a function, by its number there."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code is not function.__code__:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("number", range(1, 5))
def test_an_interrupt_while_the_reader_is_woken_leaves_no_thread_behind(number):
    let_go = threading.Event()

    def numbers():
        try:
            yield from range(100)
        finally:
            let_go.set()

    feed = input_reader.Feed(numbers)
    reader = input_reader.Reader(feed)
    fed = threading.Event()
    feed.fed = fed.set
    assert feed.take(1, 0) == [] and feed.limit == 0
    feed.limit = 1
    reader.wake()
    assert fed.wait(10)
    former = sys.gettrace()
    sys.settrace(_raising_at(input_reader.Reader.wake, number))
    try:
        reader.wake()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(former)
    feed.close()
    assert let_go.wait(10) and reader._over.done


def test_an_interrupt_that_comes_too_late_for_the_input_is_nothing(monkeypatch):
    """`close` interrupts a reader that has just left the input."""
    raised = []
    monkeypatch.setattr(threading, "excepthook", lambda shown: raised.append(shown.exc_value))
    feed = input_reader.Feed(lambda: iter(()))
    reader = input_reader.Reader(feed, interruptible=True)
    reader.wake()
    while reader._strand is None or reader._strand.task is not reader:
        time.sleep(0.001)
    feed.closed = True
    input_reader.interrupt(reader._strand, reader)
    reader.wake()
    reader.close()
    assert reader._over.done
    while reader._strand.task is reader:
        time.sleep(0.001)
    time.sleep(0.01)
    assert raised == []
