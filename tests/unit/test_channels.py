"""Channels: the meaning of each operation. How they wait is in test_channels_waiting."""

from __future__ import annotations

import copy
import doctest
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from math import inf, nan
from typing import Any

import pytest

import shmdist.references.channel as module
from shmdist.errors import ChannelClosed
from shmdist.references.channel import Channel, ResultWaiter


class Recorder:
    """A completion that is no ResultWaiter: it keeps what it was told, and that the lock was free then."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.told: list[tuple[str, Any]] = []

    def resolve(self, value: object) -> None:
        assert not self.channel._lock.locked()
        self.told.append(("resolved", value))

    def fail(self, exc: BaseException) -> None:
        assert not self.channel._lock.locked()
        self.told.append(("failed", exc))

    @property
    def value(self) -> Any:
        [(how, value)] = self.told
        assert how == "resolved"
        return value

    @property
    def error(self) -> BaseException:
        [(how, exc)] = self.told
        assert how == "failed"
        return exc


class Threads:
    """Threads whose results and errors are asked for, and which must have ended with the test."""

    def __init__(self) -> None:
        self.all: list[threading.Thread] = []

    def start(self, f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        outcome: list[Any] = []

        def body() -> None:
            try:
                outcome.append((True, f(*args)))
            except BaseException as exc:
                outcome.append((False, exc))

        thread = threading.Thread(target=body, daemon=True)
        self.all.append(thread)
        thread.start()

        def result() -> Any:
            thread.join(30)
            [(good, value)] = outcome
            if not good:
                raise value
            return value

        return result


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


class TestSize:
    @pytest.mark.parametrize(("size", "expected"), [(0, 0), (3, 3), (inf, inf)])
    def test_good(self, make: Make, size: Any, expected: float) -> None:
        assert make(size).size == expected

    def test_anything_with_index(self, make: Make) -> None:
        class Three:
            def __index__(self) -> int:
                return 3

        assert make(Three()).size == 3

    @pytest.mark.parametrize("size", [1.5, 2.0, -inf, nan, "3", None, True])
    def test_bad_type(self, size: Any) -> None:
        with pytest.raises(TypeError, match=r'size must be an int or float\("inf"\), not '):
            Channel(size)

    def test_negative(self) -> None:
        with pytest.raises(ValueError, match="not -1"):
            Channel(-1)


class TestBuffered:
    def test_items_come_in_order(self, make: Make) -> None:
        channel = make(3)
        for item in "abc":
            channel.put(item, timeout=0)
        assert [channel.take(timeout=0) for _ in range(3)] == ["a", "b", "c"]

    def test_full(self, make: Make) -> None:
        channel = make(1)
        assert not channel.isfull()
        channel.put(1)
        assert channel.isfull()
        with pytest.raises(TimeoutError, match=r"put timed out after 0 s: <Channel size=1 open items=1 "):
            channel.put(2, timeout=0)
        assert (channel.take(), len(channel)) == (1, 0)

    def test_blocked_putters_come_in_in_order(self, make: Make) -> None:
        channel = make(1)
        channel.put(0)
        putters = [Recorder(channel) for _ in range(3)]
        for item, putter in enumerate(putters, 1):
            channel.put_async(item, putter)
        assert len(channel) == 1  # what is in the buffer
        for item, putter in enumerate(putters, 1):
            assert putter.told == []
            assert channel.take() == item - 1
            assert putter.value is None
        assert channel.take() == 3

    def test_unbounded(self, make: Make) -> None:
        channel = make(inf)
        for item in range(1000):
            channel.put(item, timeout=0)
        assert (len(channel), channel.isfull()) == (1000, False)
        channel.close()
        assert list(channel) == list(range(1000))

    def test_takers_are_served_in_order(self, make: Make) -> None:
        channel = make(5)
        takers = [Recorder(channel) for _ in range(3)]
        for taker in takers:
            channel.take_async(taker)
        for item in "abc":
            channel.put(item)
        assert [taker.value for taker in takers] == ["a", "b", "c"]
        assert channel.isempty()

    def test_none_is_an_item(self, make: Make) -> None:
        channel = make(1)
        channel.put(None)
        assert channel.isready()
        assert channel.take() is None


class TestUnbuffered:
    def test_put_waits_until_taken(self, make: Make) -> None:
        channel = make()
        putter, taker = Recorder(channel), Recorder(channel)
        channel.put_async("a", putter)
        assert putter.told == []
        assert (len(channel), channel.isready(), channel.isfull()) == (1, True, True)
        channel.take_async(taker)
        assert (putter.value, taker.value) == (None, "a")
        assert (len(channel), channel.isready(), channel.isfull()) == (0, False, True)

    def test_take_waits_until_put(self, make: Make, threads: Threads) -> None:
        channel = make()
        taken = threads.start(channel.take)
        channel.put("a")
        assert taken() == "a"

    def test_fetch_sees_the_first_putter_and_lets_it_wait(self, make: Make) -> None:
        channel = make()
        first, second = Recorder(channel), Recorder(channel)
        channel.put_async("a", first)
        channel.put_async("b", second)
        assert [channel.fetch(timeout=0), channel.fetch(timeout=0)] == ["a", "a"]
        assert first.told == second.told == []
        assert [channel.take(), channel.take()] == ["a", "b"]

    def test_timed_out_put_leaves_nothing(self, make: Make) -> None:
        channel = make()
        with pytest.raises(TimeoutError):
            channel.put("a", timeout=0.001)
        assert channel.isempty()
        with pytest.raises(TimeoutError):
            channel.take(timeout=0)


class TestFetchAndWait:
    def test_fetch_leaves_the_item(self, make: Make) -> None:
        channel = make(1)
        channel.put("a")
        assert [channel.fetch(), channel.fetch(), channel.take()] == ["a", "a", "a"]

    def test_all_who_watch_see_an_item_that_goes_to_a_taker(self, make: Make) -> None:
        channel = make(1)
        taker, fetcher, waiter = Recorder(channel), Recorder(channel), Recorder(channel)
        channel.take_async(taker)
        channel.fetch_async(fetcher)
        channel.wait_async(waiter)
        channel.put("a")
        assert (taker.value, fetcher.value, waiter.value) == ("a", "a", None)
        assert channel.isempty()

    @pytest.mark.parametrize("size", [0, 1])
    def test_wake_without_a_taker(self, make: Make, size: int) -> None:
        channel = make(size)
        fetcher, waiter = Recorder(channel), Recorder(channel)
        channel.fetch_async(fetcher)
        channel.wait_async(waiter)
        channel.put_async("a", Recorder(channel))
        assert (fetcher.value, waiter.value) == ("a", None)
        assert channel.take() == "a"

    def test_wait_returns_at_once_when_ready(self, make: Make) -> None:
        channel = make(1)
        channel.put("a")
        assert channel.wait(timeout=0) is None
        assert len(channel) == 1

    @pytest.mark.parametrize("verb", ["fetch", "wait", "take"])
    def test_timeout(self, make: Make, verb: str) -> None:
        channel = make(1)
        with pytest.raises(
            TimeoutError, match=f"{verb} timed out after 0.001 s: <Channel size=1 open items=0 "
        ):
            getattr(channel, verb)(timeout=0.001)
        assert repr(channel) == "<Channel size=1 open items=0 takers=0 putters=0 watchers=0>"

    def test_questions_have_no_effect(self, make: Make) -> None:
        channel = make(2)
        channel.put("a")
        for _ in range(3):
            assert (channel.isready(), channel.isempty(), channel.isfull(), len(channel)) == (
                True,
                False,
                False,
                1,
            )


class TestClose:
    def test_items_stay_takable(self, make: Make) -> None:
        channel = make(2)
        channel.put("a")
        channel.put("b")
        channel.close()
        assert not channel.isopen()
        assert [channel.fetch(), channel.take(), channel.take()] == ["a", "a", "b"]
        for verb in ("take", "fetch", "wait"):
            with pytest.raises(ChannelClosed, match=f"cannot {verb}: the channel is closed and empty"):
                getattr(channel, verb)(timeout=0)

    def test_put_is_refused(self, make: Make) -> None:
        channel = make(2)
        channel.close()
        with pytest.raises(ChannelClosed, match="cannot put"):
            channel.put("a")
        assert channel.isempty()

    def test_all_who_wait_fail(self, make: Make) -> None:
        channel = make()
        waiting = [Recorder(channel) for _ in range(3)]
        channel.take_async(waiting[0])
        channel.fetch_async(waiting[1])
        channel.wait_async(waiting[2])
        channel.close()
        assert {type(w.error) for w in waiting} == {ChannelClosed}
        assert len({id(w.error) for w in waiting}) == 3  # one traceback each

    @pytest.mark.parametrize("size", [0, 1])
    def test_blocked_putters_fail_and_their_items_are_gone(self, make: Make, size: int) -> None:
        channel = make(size)
        putters = [Recorder(channel) for _ in range(size + 2)]
        for item, putter in enumerate(putters):
            channel.put_async(item, putter)
        channel.close()
        assert [str(p.error) for p in putters[size:]] == [
            "the channel was closed; the item was not delivered"
        ] * 2
        assert list(channel) == list(range(size))

    def test_with_an_exception(self, make: Make) -> None:
        channel, reason = make(1), KeyError("why")
        channel.put("a")
        blocked = Recorder(channel)
        channel.put_async("b", blocked)
        channel.close(reason)
        assert isinstance(blocked.error, ChannelClosed)
        assert blocked.error.__cause__ is reason
        assert channel.take() == "a"
        with pytest.raises(KeyError, match="why"):
            channel.take()
        with pytest.raises(KeyError, match="why"):
            next(iter(channel))
        with pytest.raises(ChannelClosed) as caught:
            channel.put("c")
        assert caught.value.__cause__ is reason

    def test_again_changes_nothing(self, make: Make) -> None:
        channel = make()
        channel.close()
        channel.close(KeyError("too late"))
        with pytest.raises(ChannelClosed):
            channel.take()

    @pytest.mark.parametrize("exc", ["text", KeyError])
    def test_exception_must_be_one(self, make: Make, exc: Any) -> None:
        channel = make()
        with pytest.raises(TypeError, match="exc must be an exception instance"):
            channel.close(exc)
        assert channel.isopen()

    def test_context_manager(self, make: Make) -> None:
        with make(1) as channel:
            channel.put("a")
        assert (channel.isopen(), list(channel)) == (False, ["a"])

    def test_iteration_ends(self, make: Make, threads: Threads) -> None:
        channel = make()
        collected = threads.start(list, channel)
        for item in range(10):
            channel.put(item)
        channel.close()
        assert collected() == list(range(10))

    def test_channel_closed_from_the_loop_body_is_not_the_end_of_the_loop(self, make: Make) -> None:
        channel = make(1)
        channel.put("a")
        items = iter(channel)
        next(items)
        with pytest.raises(ChannelClosed, match="another"):
            items.throw(ChannelClosed("another"))  # type: ignore[attr-defined]

    def test_error_leaves_no_circle(self, make: Make) -> None:
        """What is kept alive by a circle goes only when the collector runs."""

        class Item:
            pass

        channel, item = make(), Item()
        channel.close()
        gone = weakref.ref(item)
        with pytest.raises(ChannelClosed):
            channel.put(item)
        del item
        assert gone() is None


class TestUntake:
    def test_comes_first_whatever_the_size(self, make: Make) -> None:
        channel = make(1)
        channel.put("b")
        channel.untake("a")
        assert len(channel) == 2
        assert [channel.take(), channel.take()] == ["a", "b"]

    def test_putters_wait_for_room(self, make: Make) -> None:
        channel, putter = make(1), Recorder(None)  # type: ignore[arg-type]
        putter.channel = channel
        channel.put("b")
        channel.put_async("c", putter)
        channel.untake("a")
        assert channel.take() == "a"
        assert putter.told == []
        assert channel.take() == "b"
        assert putter.value is None
        assert channel.take() == "c"

    def test_unbuffered(self, make: Make) -> None:
        channel = make()
        putter = Recorder(channel)
        channel.put_async("b", putter)
        channel.untake("a")
        assert [channel.fetch(), channel.take()] == ["a", "a"]
        assert putter.told == []
        assert channel.take() == "b"
        assert putter.value is None

    def test_goes_to_who_waits(self, make: Make) -> None:
        channel = make()
        taker, fetcher = Recorder(channel), Recorder(channel)
        channel.take_async(taker)
        channel.fetch_async(fetcher)
        channel.untake("a")
        assert (taker.value, fetcher.value, channel.isempty()) == ("a", "a", True)

    def test_after_close(self, make: Make) -> None:
        channel = make()
        channel.close()
        channel.untake("a")
        assert list(channel) == ["a"]


class TestTexts:
    def test_repr(self, make: Make) -> None:
        channel = make(inf)
        assert repr(channel) == "<Channel size=inf open items=0 takers=0 putters=0 watchers=0>"
        channel.take_async(ResultWaiter())
        channel.wait_async(ResultWaiter())
        assert repr(channel) == "<Channel size=inf open items=0 takers=1 putters=0 watchers=1>"
        channel.close()
        assert repr(channel) == "<Channel size=inf closed items=0 takers=0 putters=0 watchers=0>"

    def test_seen_as_part_of_the_package(self) -> None:
        assert Channel.__module__ == "shmdist"

    @pytest.mark.parametrize("f", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_stays_where_it_is(self, make: Make, f: Callable[[Any], Any]) -> None:
        with pytest.raises(TypeError, match=r"RemoteChannel\(lambda: Channel\(n\)\)"):
            f(make())

    def test_check_finds_what_is_broken(self) -> None:
        channel = Channel(1)
        channel.take_async(ResultWaiter())
        channel._items.append("a")
        with pytest.raises(AssertionError, match="takers empty while there are items"):
            channel._check()

    def test_examples(self) -> None:
        for example in doctest.DocTestFinder().find(Channel, module=False, globs=vars(module)):
            assert doctest.DocTestRunner().run(example).failed == 0
