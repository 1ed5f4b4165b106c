"""A worker that is killed while a large message is on its way to it or from it."""

import os
import signal
import threading

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import until


def kill_in_transfer(fresh, direction, nbytes):
    """Kill a fresh worker in the middle of a transfer; whoever waits is told in a second."""
    import time

    [pid] = fresh()
    ospid = sd.remotecall_fetch(os.getpid, pid)
    sd.remotecall_fetch(len, pid, np.ones(1))  # it has imported numpy
    caught = []
    killed = []

    big = np.ones(nbytes, "B")  # now: making it takes longer than telling of a death

    def transfer():
        try:
            if direction == "receiving":
                sd.remotecall_fetch(len, pid, big)
            else:
                sd.remotecall_fetch(lambda n: __import__("numpy").ones(n, "B"), pid, nbytes)
        except BaseException as error:
            caught.append((error, time.monotonic()))
        else:
            caught.append((None, time.monotonic()))

    thread = threading.Thread(target=transfer)
    if direction == "receiving":
        # The worker stands still, so that the writer has got as far as the socket's buffer, and is blocked.
        os.kill(ospid, signal.SIGSTOP)
        thread.start()
        until(current_node().peers.links[pid]._write.locked, 10)
    else:
        thread.start()
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
    link = current_node().peers.links.get(pid)
    return link is None or link._incoming is not None
