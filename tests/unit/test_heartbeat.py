"""What looks after links to other hosts."""

import threading
import types

import pytest

from shmdist.runtime.heartbeat import HeartbeatMonitor
from shmdist.transport import keepalive
from tests.integration.helpers import until


class Link:
    """A link on which something comes while it is `noisy`."""

    def __init__(self, pid, noisy=False):
        self.pid, self.noisy = pid, noisy
        self.closed, self.bridged = False, False
        self.connection = types.SimpleNamespace(heard=self.heard)
        self.ended = threading.Event()
        self._count = 0

    def heard(self):
        self._count += self.noisy
        return self._count

    def shut(self):
        self.closed = True
        self.ended.set()


@pytest.fixture
def make_heart(monkeypatch):
    hearts, threads = [], []

    def start(body):
        threads.append(threading.Thread(target=body))
        threads[-1].start()

    def make(is_worker=False):
        peers = types.SimpleNamespace(pid=3 if is_worker else 1, is_worker=is_worker)
        hearts.append(HeartbeatMonitor(peers, types.SimpleNamespace(start=start)))
        return hearts[-1]

    yield make
    for heart in hearts:
        heart.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_one_that_is_silent_is_given_up_and_others_are_not(make_heart, monkeypatch):
    monkeypatch.setattr(keepalive, "timeout", lambda: 0.2)
    heart, silent, noisy = make_heart(), Link(2), Link(3, noisy=True)
    heart.watch(noisy)
    heart.watch(silent)
    assert silent.ended.wait(5)
    assert heart.silent == {2} and not noisy.closed


def test_a_link_that_is_new_need_not_wait_for_a_patient_one(make_heart, monkeypatch):
    monkeypatch.setattr(keepalive, "timeout", lambda: 600.0)
    heart, patient, hasty = make_heart(), Link(2), Link(3)
    heart.watch(patient)
    monkeypatch.setattr(keepalive, "timeout", lambda: 0.2)
    heart.watch(hasty)
    assert hasty.ended.wait(5)
    assert not patient.closed


@pytest.mark.parametrize(("is_worker", "pid", "told"), [(True, 1, True), (True, 2, False), (False, 2, False)])
def test_a_worker_says_why_it_ends(make_heart, monkeypatch, capfd, is_worker, pid, told):
    monkeypatch.setattr(keepalive, "timeout", lambda: 0.1)
    link = Link(pid)
    make_heart(is_worker).watch(link)
    assert link.ended.wait(5)
    assert ("nothing has come from process 1 for 0.1 s" in capfd.readouterr().err) is told


def test_closed_at_the_very_moment_before_it_sleeps(make_heart, monkeypatch):
    monkeypatch.setattr(keepalive, "timeout", lambda: 600.0)
    heart = make_heart()

    class Late(threading.Event):
        def clear(self):
            heart.close()
            super().clear()

    heart._woken = Late()
    heart.watch(Link(2))
    until(lambda: not heart._running, 5)
