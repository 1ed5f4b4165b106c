"""What every poller promises, for each of them: who is woken by what, and how often."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

import pytest

from shmdist.transport import poller as module
from shmdist.transport.poller import Poller, SelectPoller, WakeupFd, make_poller
from tests.unit.test_channels import Threads

BRIEF = 0.02  # seconds that pass when nothing happens
LONG = 20.0  # seconds that would pass if what must happen did not
EPOLL = pytest.mark.skipif(not hasattr(select, "epoll"), reason="no epoll here")


class Pipe:
    """A pipe: the descriptor of its reading end, made readable and unreadable."""

    def __init__(self) -> None:
        self.fd, self._out = os.pipe()

    def write(self) -> None:
        os.write(self._out, b"x")

    def read(self) -> None:
        os.read(self.fd, 100)

    def end(self) -> None:
        os.close(self._out)
        self._out = -1

    def close(self) -> None:
        for fd in (self.fd, self._out):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    for thread in threads.all:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def make_pipe() -> Iterator[Callable[[], Pipe]]:
    made: list[Pipe] = []

    def make() -> Pipe:
        made.append(Pipe())
        return made[-1]

    yield make
    for pipe in made:
        pipe.close()


@pytest.fixture(params=[pytest.param(Poller, marks=EPOLL), SelectPoller])
def poller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Poller]:
    monkeypatch.setattr(module, "_PARK_SECONDS", BRIEF / 2)
    poller: Poller = request.param()
    yield poller
    poller.close()


@pytest.fixture
def pipe(poller: Poller, make_pipe: Callable[[], Pipe]) -> Iterator[Pipe]:
    """A pipe that the poller watches."""
    pipe = make_pipe()
    poller.add(pipe.fd)
    yield pipe
    poller.remove(pipe.fd)


def settle(poller: Poller) -> None:
    """Take note of kicks that adding and disarming may have made."""
    for fd, _ in poller.poll(0):
        poller.is_kick(fd)


def ready(poller: Poller, timeout: float = 0) -> set[int]:
    return {fd for fd, _ in poller.poll(timeout) if not poller.is_kick(fd)}


def woken(poller: Poller, timeout: float = LONG) -> bool:
    """Park; tell whether something else than the time ended it."""
    begun = time.monotonic()
    poller.park(timeout)
    return time.monotonic() - begun < timeout


def park_two(poller: Poller, threads: Threads) -> SimpleQueue[bool]:
    """Park two threads; each puts what `park` returned."""
    left: SimpleQueue[bool] = SimpleQueue()
    for _ in range(2):
        threads.start(lambda: left.put(poller.park(LONG)))
    return left


class TestReading:
    def test_readable_until_read(self, poller: Poller, pipe: Pipe) -> None:
        assert ready(poller) == set()
        pipe.write()
        assert ready(poller, LONG) == {pipe.fd}
        assert ready(poller) == {pipe.fd}
        pipe.read()
        assert ready(poller) == set()

    def test_the_end_is_readable(self, poller: Poller, pipe: Pipe) -> None:
        pipe.end()
        assert ready(poller, LONG) == {pipe.fd}

    def test_only_what_is_added(self, poller: Poller, pipe: Pipe, make_pipe: Callable[[], Pipe]) -> None:
        other = make_pipe()
        other.write()
        assert ready(poller) == set()
        poller.add(other.fd)
        assert ready(poller) == {other.fd}
        pipe.write()
        assert ready(poller) == {pipe.fd, other.fd}
        poller.remove(other.fd)
        assert ready(poller) == {pipe.fd}

    def test_remove_what_is_unknown(self, poller: Poller, pipe: Pipe, make_pipe: Callable[[], Pipe]) -> None:
        other = make_pipe()
        poller.remove(other.fd)
        poller.remove(pipe.fd)
        poller.remove(pipe.fd)
        poller.add(pipe.fd)
        pipe.write()
        assert ready(poller) == {pipe.fd}

    def test_a_timeout(self, poller: Poller, pipe: Pipe) -> None:
        settle(poller)
        begun = time.monotonic()
        assert not poller.poll(BRIEF)
        assert time.monotonic() - begun > BRIEF / 2

    def test_an_addition_reaches_who_polls_already(
        self, poller: Poller, make_pipe: Callable[[], Pipe], threads: Threads
    ) -> None:
        pipe = make_pipe()
        pipe.write()
        polling = threading.Event()

        def read() -> set[int]:
            polling.set()
            while not (found := ready(poller, LONG)):
                pass
            return found

        found = threads.start(read)
        polling.wait()
        poller.add(pipe.fd)
        assert found() == {pipe.fd}
        poller.remove(pipe.fd)


class TestKick:
    def test_lasts_until_seen(self, poller: Poller) -> None:
        settle(poller)
        poller.kick()
        poller.kick()
        for _ in range(2):
            [(fd, _)] = poller.poll(LONG)
        assert poller.is_kick(fd)
        assert not poller.poll(0)

    def test_wakes_the_reader(self, poller: Poller, threads: Threads) -> None:
        polling = threading.Event()

        def read() -> bool:
            polling.set()
            [(fd, _)] = poller.poll(LONG)
            return poller.is_kick(fd)

        seen = threads.start(read)
        polling.wait()
        poller.kick()
        assert seen()

    def test_a_link_is_none(self, poller: Poller, pipe: Pipe) -> None:
        assert not poller.is_kick(pipe.fd)


class TestOutputs:
    def test_apart_from_links(self, poller: Poller, pipe: Pipe, make_pipe: Callable[[], Pipe]) -> None:
        before = poller.has_outputs
        output, silent = make_pipe(), make_pipe()
        poller.add_output(output.fd)
        poller.add_output(silent.fd)
        assert (before, poller.has_outputs) == (False, True)
        assert list(poller.outputs(0)) == []
        output.write()
        [(fd, _)] = [(fd, event) for fd, event in poller.poll(LONG) if fd != poller._kick_fd]
        assert fd not in (output.fd, pipe.fd)
        assert poller.is_kick(fd)
        assert [fd for fd, _ in poller.outputs(0)] == [output.fd]
        pipe.write()
        assert ready(poller) == {pipe.fd}
        poller.remove(output.fd)
        assert list(poller.outputs(0)) == []
        pipe.read()
        assert ready(poller) == set()

    def test_without_any(self, poller: Poller) -> None:
        assert list(poller.outputs(0)) == []


class TestParking:
    def test_disarmed_at_first(self, poller: Poller, pipe: Pipe) -> None:
        pipe.write()
        assert not woken(poller, BRIEF)

    def test_armed_before_the_message(self, poller: Poller, pipe: Pipe) -> None:
        settle(poller)
        poller.arm()
        assert not woken(poller, BRIEF)
        pipe.write()
        assert woken(poller)

    def test_armed_after_the_message(self, poller: Poller, pipe: Pipe) -> None:
        pipe.write()
        poller.arm()
        assert woken(poller)

    def test_armed_while_parked(self, poller: Poller, pipe: Pipe, threads: Threads) -> None:
        pipe.write()
        parked = threads.start(woken, poller)
        poller.arm()
        assert parked()

    def test_the_message_comes_while_parked(self, poller: Poller, pipe: Pipe, threads: Threads) -> None:
        settle(poller)
        poller.arm()
        parked = threads.start(woken, poller)
        pipe.write()
        assert parked()

    def test_once_each_time_armed(self, poller: Poller, pipe: Pipe) -> None:
        pipe.write()
        for _ in range(2):
            poller.arm()
            assert woken(poller)
            assert not woken(poller, BRIEF)

    def test_one_thread_of_two(self, poller: Poller, pipe: Pipe, threads: Threads) -> None:
        settle(poller)
        poller.arm()
        left = park_two(poller, threads)
        pipe.write()
        left.get(timeout=LONG)
        with pytest.raises(Empty):
            left.get(timeout=BRIEF)
        poller.arm()
        left.get(timeout=LONG)

    def test_not_when_disarmed_again(self, poller: Poller, pipe: Pipe) -> None:
        settle(poller)
        poller.arm()
        poller.disarm()
        poller.disarm()
        pipe.write()
        assert not woken(poller, BRIEF)

    def test_disarmed_while_parked(self, poller: Poller, pipe: Pipe, threads: Threads) -> None:
        settle(poller)
        poller.arm()
        parked = threads.start(woken, poller, BRIEF * 2)
        poller.disarm()
        pipe.write()
        assert not parked()

    def test_outputs_wake_as_links_do(self, poller: Poller, make_pipe: Callable[[], Pipe]) -> None:
        output = make_pipe()
        poller.add_output(output.fd)
        settle(poller)
        poller.arm()
        assert not woken(poller, BRIEF)
        output.write()
        assert woken(poller)
        poller.remove(output.fd)

    def test_a_nudge_wakes_one_once(self, poller: Poller, threads: Threads) -> None:
        poller.nudge()
        assert woken(poller)
        settle(poller)
        assert not woken(poller, BRIEF)
        left = park_two(poller, threads)
        poller.nudge()
        left.get(timeout=LONG)
        with pytest.raises(Empty):
            left.get(timeout=BRIEF)
        poller.nudge()
        left.get(timeout=LONG)

    def test_a_nudge_is_no_wake(self, poller: Poller) -> None:
        poller.nudge()
        assert not poller.park(LONG)

    def test_wake_lasts_until_noted(self, poller: Poller) -> None:
        poller.wake()
        assert poller.park(LONG)
        assert poller.park(LONG)
        poller.unwake()
        settle(poller)
        assert not woken(poller, BRIEF)

    def test_wake_reaches_who_is_parked(self, poller: Poller, threads: Threads) -> None:
        parked = threads.start(poller.park, LONG)
        poller.wake()
        assert parked()

    def test_wake_together_with_a_message(self, poller: Poller, pipe: Pipe) -> None:
        poller.arm()
        pipe.write()
        poller.wake()
        assert poller.park(LONG)

    def test_wake_is_safe_inside_any_lock(self) -> None:
        """A finalizer may run while the thread holds the poller's own locks."""
        poller = SelectPoller()
        with poller._state, poller._table:
            poller.wake()
        assert poller.park(LONG)
        poller.close()


class TestClose:
    def test_gives_back_every_descriptor(self, request: pytest.FixtureRequest) -> None:
        before = len(os.listdir("/dev/fd"))
        for kind in (Poller, SelectPoller) if hasattr(select, "epoll") else (SelectPoller,):
            poller = kind()
            poller.close()
            poller.close()
        assert len(os.listdir("/dev/fd")) == before

    def test_finalizers_may_still_wake(self, poller: Poller) -> None:
        """What they write must not go into a descriptor that has got the number since."""
        poller.close()
        pipes = [os.pipe() for _ in range(6)]
        poller.kick()
        poller.wake()
        for read, write in pipes:
            os.set_blocking(read, False)
            with pytest.raises(BlockingIOError):
                os.read(read, 1)
            os.close(read)
            os.close(write)

    def test_select_poller_wakes_who_is_parked(self, threads: Threads) -> None:
        poller = SelectPoller()
        parked = threads.start(poller.park)
        poller.close()
        assert parked() is False

    def test_select_poller_in_a_forked_child(self) -> None:
        """A thread that is not there any more may hold the lock."""
        poller = SelectPoller()
        held, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with poller._state:
                held.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        poller.close()
        leave.set()
        thread.join()


@pytest.fixture(params=[pytest.param(True, marks=EPOLL), False], ids=["eventfd", "pipe"])
def kick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WakeupFd]:
    if not request.param:
        monkeypatch.delattr(os, "eventfd", raising=False)
    kick = WakeupFd()
    yield kick
    kick.close()


def test_kick(kick: WakeupFd) -> None:
    def is_set() -> bool:
        return bool(select.select([kick.fileno()], [], [], 0)[0])

    assert not is_set()
    kick.clear()
    for count in (1, 2, 10_000):  # more than a pipe holds
        for _ in range(count):
            kick.set()
        assert is_set()
        kick.clear()
        assert not is_set()
    kick.close()
    kick.set()
    kick.clear()
    kick.close()


def test_make_poller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMDIST_POLLER", "select")
    poller = make_poller()
    assert type(poller) is SelectPoller
    poller.close()
    monkeypatch.delenv("SHMDIST_POLLER")
    poller = make_poller()
    assert type(poller) is (Poller if hasattr(select, "epoll") else SelectPoller)
    poller.close()


@EPOLL
class TestBells:
    """An eventfd that many listen to, and that nobody clears."""

    @pytest.fixture
    def bell(self) -> Iterator[WakeupFd]:
        bell = WakeupFd()
        yield bell
        bell.close()

    @pytest.fixture
    def listeners(self, bell: WakeupFd) -> Iterator[list[Poller]]:
        listeners = [Poller(), Poller()]
        for each in listeners:
            each.add_group_wakeup(bell.fileno())
        yield listeners
        for each in listeners:
            each.close()

    def test_each_ring_is_heard_once_by_everybody(self, bell: WakeupFd, listeners: list[Poller]) -> None:
        for each in listeners:
            assert not each.poll(0)
        for _ in range(3):
            bell.set()
            for each in listeners:
                assert [fd for fd, _ in each.poll(LONG)] == [bell.fileno()]
                assert each.is_kick(bell.fileno())
                assert not each.poll(0)

    def test_it_wakes_a_parked_thread_when_armed(
        self, bell: WakeupFd, listeners: list[Poller], threads: Threads
    ) -> None:
        listener = listeners[0]
        bell.set()
        assert not woken(listener, BRIEF), "the links are the reader's"
        listener.poll(0)
        listener.arm()
        assert not woken(listener, BRIEF), "what was heard before is over"
        bell.set()
        assert woken(listener)

    def test_not_heard_any_more(self, bell: WakeupFd, listeners: list[Poller]) -> None:
        listeners[0].remove_group_wakeup(bell.fileno())
        listeners[0].remove_group_wakeup(bell.fileno())
        bell.set()
        assert not listeners[0].poll(0)
        assert listeners[1].poll(LONG)

    def test_who_cannot_listen_says_so(self) -> None:
        poller = SelectPoller()
        assert not poller.supports_group_wakeup
        poller.close()
