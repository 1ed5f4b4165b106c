"""Channels: what waits, and that nothing is lost to timeouts, interrupts, errors and other threads."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import pytest

from shmdist.errors import ChannelClosed
from shmdist.references.channel import Channel
from shmdist.runtime.interrupts import current
from shmdist.runtime.waiting import ResultWaiter
from tests.unit.test_channels import Recorder, Threads


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    for thread in threads.all:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def make() -> Iterator[Callable[..., Channel]]:
    """A maker of channels whose invariants are looked at after the test."""
    made: list[Channel] = []

    def make(size: Any = 0) -> Channel:
        made.append(Channel(size))
        return made[-1]

    yield make
    for channel in made:
        channel._check()


Make = Callable[..., Channel]


def on_block(monkeypatch: pytest.MonkeyPatch, f: Callable[[ResultWaiter], None]) -> None:
    """Have `f` run when a thread is about to wait, its operation queued."""
    real = Channel._block

    def block(waiter: ResultWaiter, timeout: float | None) -> None:
        f(waiter)
        real(waiter, timeout)

    monkeypatch.setattr(Channel, "_block", staticmethod(block))


class TestCancel:
    @pytest.mark.parametrize("verb", ["take_async", "fetch_async", "wait_async"])
    def test_withdrawn_is_never_told(self, make: Make, verb: str) -> None:
        channel = make(1)
        w = Recorder(channel)
        getattr(channel, verb)(w)
        assert channel.cancel(w) is True
        assert channel.cancel(w) is False
        channel.put("a")
        channel.close()
        assert w.told == []
        assert channel.take() == "a"

    def test_withdrawn_put(self, make: Make) -> None:
        channel = make()
        first, second = Recorder(channel), Recorder(channel)
        channel.put_async("a", first)
        channel.put_async("b", second)
        assert channel.cancel(first)
        assert channel.take() == "b"
        assert (first.told, second.value) == ([], None)

    def test_too_late(self, make: Make) -> None:
        channel = make(1)
        w = Recorder(channel)
        channel.put_async("a", w)
        assert channel.cancel(w) is False
        assert channel.take() == "a"

    def test_the_next_in_line_moves_up(self, make: Make) -> None:
        channel = make(1)
        first, second = Recorder(channel), Recorder(channel)
        channel.take_async(first)
        channel.take_async(second)
        channel.cancel(first)
        channel.put("a")
        assert (first.told, second.value) == ([], "a")

    def test_item_of_a_withdrawn_put_ends_outside_the_lock(self, make: Make) -> None:
        channel = make()
        free: list[bool] = []

        class Item:
            def __del__(self) -> None:
                free.append(not channel._lock.locked())

        for undo in (channel.cancel, lambda _: channel.close()):
            w = Recorder(channel)
            channel.put_async(Item(), w)
            undo(w)
        assert free == [True, True]


class TestCompletions:
    @pytest.mark.parametrize("again", ["take_async", "fetch_async", "wait_async"])
    def test_one_completion_waits_once(self, make: Make, again: str) -> None:
        channel = make()
        w = Recorder(channel)
        channel.take_async(w)
        with pytest.raises(ValueError, match="waits at this channel already"):
            getattr(channel, again)(w)
        channel.put("a")
        assert w.value == "a"

    def test_may_use_the_channel(self, make: Make) -> None:
        """A remote taker in a loop asks for the next item when it is told of one."""
        channel = make(1)
        got: list[Any] = []

        class Loop(Recorder):
            def resolve(self, value: object) -> None:
                got.append(value)
                channel.take_async(self)

        loop = Loop(channel)
        channel.take_async(loop)
        for item in range(5):
            channel.put(item)
        channel.close()
        assert got == list(range(5))
        assert isinstance(loop.error, ChannelClosed)

    def test_one_that_raises_costs_nobody_else(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        channel = make()

        class Bad(Recorder):
            def fail(self, exc: BaseException) -> None:
                raise OSError("no link")

        bad, good = Bad(channel), Recorder(channel)
        channel.take_async(bad)
        channel.take_async(good)
        with caplog.at_level(logging.ERROR, "shmdist.references.channel"):
            channel.close()
        assert isinstance(good.error, ChannelClosed)
        assert "no link" in caplog.text

    def test_interrupt_while_telling(self, make: Make) -> None:
        channel = make()

        class Interrupted(Recorder):
            def fail(self, exc: BaseException) -> None:
                raise KeyboardInterrupt

        first, second = Interrupted(channel), Recorder(channel)
        channel.take_async(first)
        channel.take_async(second)
        with pytest.raises(KeyboardInterrupt):
            channel.close()
        assert isinstance(second.error, ChannelClosed)

    def test_result_waiter(self) -> None:
        waiter = ResultWaiter()
        assert repr(waiter) == "<ResultWaiter waiting>"
        lock = threading.Lock()
        lock.acquire()
        waiter.add(lock)
        waiter.wake()
        waiter.wake()  # twice is as good as once
        assert lock.acquire(blocking=False)  # woken early
        assert not waiter.done
        waiter.resolve(1)
        assert lock.acquire(blocking=False)
        waiter.remove(lock)
        waiter.wake()
        assert lock.locked()
        assert (waiter.done, waiter.value, repr(waiter)) == (True, 1, "<ResultWaiter resolved>")
        failed = ResultWaiter()
        failed.fail(KeyError())
        assert (failed.done, repr(failed)) == (True, "<ResultWaiter failed>")


class TestInterrupt:
    """An interrupted operation leaves nothing behind that waits, and loses nothing."""

    @pytest.mark.parametrize("verb", ["take", "fetch", "wait"])
    def test_withdraws(self, make: Make, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
        channel = make(1)

        def interrupt(waiter: ResultWaiter) -> None:
            raise KeyboardInterrupt

        on_block(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            getattr(channel, verb)()
        assert "takers=0 putters=0 watchers=0" in repr(channel)
        channel.put("a")
        assert channel.take() == "a"

    def test_withdraws_a_put(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        channel = make()

        def interrupt(waiter: ResultWaiter) -> None:
            raise KeyboardInterrupt

        on_block(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            channel.put("a")
        assert channel.isempty()

    def test_item_that_was_given_already_goes_back(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        channel = make(2)

        def give_then_interrupt(waiter: ResultWaiter) -> None:
            channel.put("a")
            channel.put("b")
            assert waiter.done
            raise KeyboardInterrupt

        on_block(monkeypatch, give_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            channel.take()
        assert [channel.take(), channel.take()] == ["a", "b"]

    def test_item_that_was_given_goes_to_the_next_who_waits(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channel = make(2)
        second = Recorder(channel)

        def give_then_interrupt(waiter: ResultWaiter) -> None:
            channel.take_async(second)
            channel.put("a")
            raise KeyboardInterrupt

        on_block(monkeypatch, give_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            channel.take()
        assert second.value == "a"

    def test_put_that_was_taken_already_stays_taken(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channel = make()
        taker = Recorder(channel)

        def take_then_interrupt(waiter: ResultWaiter) -> None:
            channel.take_async(taker)
            raise KeyboardInterrupt

        on_block(monkeypatch, take_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            channel.put("a")
        assert taker.value == "a"
        assert channel.isempty()

    def test_put_off_by_the_shield_and_raised_at_its_end(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channel = make(2)
        channel.put("a")
        channel.put("b")
        real, tries = Channel.take_async, iter([True])

        def take_async(*args: Any) -> None:
            real(*args)
            if next(tries, False):
                os.kill(os.getpid(), signal.SIGINT)  # the item is this thread's already

        monkeypatch.setattr(Channel, "take_async", take_async)
        with pytest.raises(KeyboardInterrupt):
            channel.take()
        assert current().runtime_depth == 0
        assert [channel.take(), channel.take()] == ["a", "b"]

    def test_early_return_of_the_wait_is_no_end(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        channel = make()
        calls = iter(range(3))

        def block(waiter: ResultWaiter, timeout: float | None) -> None:
            if next(calls, None) is None:
                channel.untake("a")

        monkeypatch.setattr(Channel, "_block", staticmethod(block))
        assert channel.take(timeout=60) == "a"

    def test_item_that_comes_at_the_deadline_is_returned(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channel = make(1)
        cancel = channel.cancel

        def item_just_before(w: Any) -> bool:
            channel.put("a")
            return cancel(w)

        monkeypatch.setattr(channel, "cancel", item_just_before)
        assert channel.take(timeout=0) == "a"

    def test_ctrl_c(self, make: Make, monkeypatch: pytest.MonkeyPatch, threads: Threads) -> None:
        """A real signal, in a thread that really sleeps."""
        channel = make(1)
        asleep = threading.Event()
        on_block(monkeypatch, lambda waiter: asleep.set())

        def press() -> None:
            assert asleep.wait(30)
            os.kill(os.getpid(), signal.SIGINT)

        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            threads.start(press)
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                channel.take(timeout=60)
            assert time.monotonic() - start < 30  # woken, and not told of it at the deadline
        finally:
            signal.signal(signal.SIGINT, previous)
        channel.put("a")
        assert channel.take() == "a"


class TestThreads:
    @pytest.mark.parametrize("size", [0, 1, 7, inf])
    def test_every_item_is_taken_once_and_in_each_putters_order(
        self, make: Make, threads: Threads, size: Any
    ) -> None:
        channel, n_threads, n_items = make(size), 8, 300
        start = threading.Barrier(2 * n_threads)

        def produce(who: int) -> None:
            start.wait(30)
            for i in range(n_items):
                channel.put((who, i))

        def consume() -> list[tuple[int, int]]:
            start.wait(30)
            return list(channel)

        consumers = [threads.start(consume) for _ in range(n_threads)]
        producers = [threads.start(produce, who) for who in range(n_threads)]
        for result in producers:
            result()
        channel.close()
        taken = [result() for result in consumers]
        assert sorted(item for items in taken for item in items) == [
            (who, i) for who in range(n_threads) for i in range(n_items)
        ]
        for items in taken:
            for who in range(n_threads):
                mine = [i for w, i in items if w == who]
                assert mine == sorted(mine)

    @pytest.mark.parametrize("size", [0, 2])
    def test_nothing_is_lost_to_timeouts(self, make: Make, threads: Threads, size: int) -> None:
        """Takers and putters give up all the time; a put counts if it returned, a take too."""
        channel, n_items = make(size), 2000

        def produce(who: int) -> int:
            done = 0
            for i in range(n_items):
                try:
                    channel.put((who, i), timeout=0 if i % 2 else 1e-5)
                    done += 1
                except TimeoutError:
                    pass
            return done

        def consume() -> int:
            done = 0
            while True:
                try:
                    channel.take(timeout=0 if done % 2 else 1e-5)
                    done += 1
                except TimeoutError:
                    pass
                except ChannelClosed:
                    return done

        consumers = [threads.start(consume) for _ in range(4)]
        producers = [threads.start(produce, who) for who in range(4)]
        put = sum(result() for result in producers)
        channel.close()
        assert sum(result() for result in consumers) == put

    def test_nothing_is_lost_to_interrupts(
        self, make: Make, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each time a taker has to wait it is interrupted, while others put and take."""
        channel, n_items = make(1), 500
        interrupted = threading.local()

        def interrupt(waiter: ResultWaiter) -> None:
            if getattr(interrupted, "by_me", False):
                time.sleep(1e-5)
                raise KeyboardInterrupt

        on_block(monkeypatch, interrupt)

        def consume() -> list[int]:
            interrupted.by_me = True
            items: list[int] = []
            while True:
                try:
                    items.append(channel.take())
                except KeyboardInterrupt:
                    pass
                except ChannelClosed:
                    return items

        consumers = [threads.start(consume) for _ in range(4)]
        for item in range(n_items):
            channel.put(item)
        channel.close()
        items = [item for result in consumers for item in result()]
        items += list(channel)  # an item may be put back after another taker saw the end
        assert sorted(items) == list(range(n_items))

    def test_close_ends_all_who_wait(
        self, make: Make, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channel = make()
        asleep = threading.Semaphore(0)
        on_block(monkeypatch, lambda waiter: asleep.release())
        results = [threads.start(getattr(channel, verb)) for verb in ("take", "fetch", "wait") * 5]
        for _ in results:
            assert asleep.acquire(timeout=30)
        channel.close()
        for result in results:
            with pytest.raises(ChannelClosed):
                result()
