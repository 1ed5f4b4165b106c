"""A worker that is killed while a large message is on its way to it or from it."""

import os
import signal
import threading

import numpy as np
import pytest

import shmdist as sd
from tests.integration.helpers import until


def kill_in_transfer(fresh, direction, nbytes):
    """Kill a fresh worker in the middle of a transfer; whoever waits is told in a second."""
    import time

    [pid] = fresh()
    ospid = sd.remotecall_fetch(os.getpid, pid)
    sd.remotecall_fetch(len, pid, np.ones(1))  # it has imported numpy
    caught = []
    killed = []

    def transfer():
        try:
            if direction == "receiving":
                sd.remotecall_fetch(len, pid, np.ones(nbytes, "B"))
            else:
                sd.remotecall_fetch(lambda n: __import__("numpy").ones(n, "B"), pid, nbytes)
        except BaseException as error:
            caught.append((error, time.monotonic()))
        else:
            caught.append((None, time.monotonic()))

    thread = threading.Thread(target=transfer)
    thread.start()
    if direction == "receiving":
        # The worker stands still with the beginning of the message, so that the writer is blocked.
        os.kill(ospid, signal.SIGSTOP)
    else:
        until(lambda: _incoming(pid) or caught, 10)
    os.kill(ospid, signal.SIGKILL)
    killed.append(time.monotonic())
    thread.join(10)
    assert not thread.is_alive(), "the caller still waits"
    error, when = caught[0]
    if direction == "sending" and error is None:
        pytest.skip("the transfer was faster than the kill")
    assert isinstance(error, sd.ProcessExitedException), error
    assert when - killed[0] < 1.0
    assert error.signal == "SIGKILL"


def _incoming(pid):
    from shmdist.runtime.node import current_node

    link = current_node().links.get(pid)
    return link is None or link._incoming is not None
