"""References that are made on a worker and come with a result: they are there, and nothing is left of others."""

import os
import random
import signal
import threading
import time

import shmdist as sd
from tests.integration.helpers import reference_count, until


def make():
    return sd.RemoteChannel(lambda: sd.Channel(2), sd.myid())


def make_more(number):
    return {"channel": make(), "number": number}


def test_the_only_reference_may_be_a_result(cluster):
    """It is counted for the caller before the call's own is gone."""
    pid = cluster[0]
    for number in range(600):
        for channel in (sd.remotecall_fetch(make, pid), sd.RemoteChannel(lambda: sd.Channel(2), pid)):
            channel.put(number)
            assert channel.take() == number
    for found in sd.pmap(make_more, range(300), pool=sd.WorkerPool([pid]), batch_size=1):
        found["channel"].put(found["number"])
        assert found["channel"].take() == found["number"]


def test_an_interrupt_leaves_no_channel(cluster):
    pid = cluster[0]
    before = sd.remotecall_fetch(reference_count, pid)
    rng, interrupted = random.Random(7), 0

    def press(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    for _ in range(60):
        thread = threading.Thread(target=press, args=(rng.random() * 1e-3,))
        try:
            try:
                thread.start()
                while True:
                    sd.RemoteChannel(pid)
            finally:
                thread.join()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 60
    until(lambda: sd.remotecall_fetch(reference_count, pid) == before)
