"""Channels against a model that states their meaning and nothing of their making.

The model keeps lists in order of arrival, and after each operation applies three sentences until
none applies: who watches sees the head; the first taker gets the head; the first putter moves into
the buffer if there is room.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmdist.errors import ChannelClosed
from shmdist.references.channel import Channel, ResultWaiter


class Waiting:
    """A completion of either kind, which may be told once."""

    def __init__(self, channel: Channel, local: bool) -> None:
        self.channel = channel
        self.waiter = ResultWaiter() if local else None
        self.told: tuple[str, Any] | None = None

    @property
    def handed_in(self) -> Any:
        return self if self.waiter is None else self.waiter

    def resolve(self, value: object) -> None:
        assert self.told is None
        assert not self.channel._lock.locked()
        self.told = ("resolved", value)

    def fail(self, exc: BaseException) -> None:
        assert self.told is None
        assert not self.channel._lock.locked()
        self.told = ("failed", exc)

    def outcome(self) -> tuple[str, Any] | None:
        if self.waiter is None:
            return self.told
        if not self.waiter.done:
            return None
        return ("resolved", self.waiter.value) if self.waiter.exc is None else ("failed", self.waiter.exc)


@dataclass
class Model:
    size: float
    buffer: list[int] = field(default_factory=list)
    putters: list[tuple[int, Waiting]] = field(default_factory=list)
    takers: list[Waiting] = field(default_factory=list)
    watchers: list[tuple[str, Waiting]] = field(default_factory=list)
    open: bool = True
    reason: BaseException | None = None
    outcomes: dict[Waiting, tuple[str, Any]] = field(default_factory=dict)

    def settle(self) -> None:
        while True:
            line = self.buffer + [item for item, _ in self.putters]
            if line and self.watchers:
                for verb, w in self.watchers:
                    self.outcomes[w] = ("resolved", line[0] if verb == "fetch" else None)
                self.watchers = []
            elif line and self.takers:
                self.outcomes[self.takers.pop(0)] = ("resolved", line[0])
                if self.buffer:
                    self.buffer.pop(0)
                else:
                    self.outcomes[self.putters.pop(0)[1]] = ("resolved", None)
            elif self.putters and len(self.buffer) < self.size:
                item, w = self.putters.pop(0)
                self.buffer.append(item)
                self.outcomes[w] = ("resolved", None)
            elif not self.open and (self.takers or self.watchers or self.putters):
                for w in self.takers + [w for _, w in self.watchers]:
                    self.outcomes[w] = ("failed", self.reason or ChannelClosed)
                for _, w in self.putters:
                    self.outcomes[w] = ("failed", ChannelClosed)
                self.takers, self.watchers, self.putters = [], [], []
            else:
                return


class Comparison(RuleBasedStateMachine):
    @initialize(size=st.sampled_from([0, 1, 2, 5, inf]))
    def make(self, size: float) -> None:
        self.channel = Channel(size)
        self.model = Model(size)
        self.everybody: list[Waiting] = []
        self.counter = 0

    def somebody(self, local: bool) -> Waiting:
        w = Waiting(self.channel, local)
        self.everybody.append(w)
        return w

    def new_item(self) -> int:
        self.counter += 1
        return self.counter

    @rule(local=st.booleans())
    def put(self, local: bool) -> None:
        w, item = self.somebody(local), self.new_item()
        self.channel.put_async(item, w.handed_in)
        if self.model.open:
            self.model.putters.append((item, w))
        else:
            self.model.outcomes[w] = ("failed", ChannelClosed)
        self.model.settle()

    @rule(local=st.booleans())
    def take(self, local: bool) -> None:
        w = self.somebody(local)
        self.channel.take_async(w.handed_in)
        self.model.takers.append(w)
        self.model.settle()

    @rule(verb=st.sampled_from(["fetch", "wait"]), local=st.booleans())
    def watch(self, verb: str, local: bool) -> None:
        w = self.somebody(local)
        getattr(self.channel, f"{verb}_async")(w.handed_in)
        self.model.watchers.append((verb, w))
        self.model.settle()

    @precondition(lambda self: self.everybody)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        w = data.draw(st.sampled_from(self.everybody[-20:]))
        model = self.model
        waiting = w in model.takers or any(w is x for _, x in model.putters + model.watchers)
        assert self.channel.cancel(w.handed_in) is waiting
        model.takers = [x for x in model.takers if x is not w]
        model.putters = [(item, x) for item, x in model.putters if x is not w]
        model.watchers = [(verb, x) for verb, x in model.watchers if x is not w]
        if waiting:
            self.everybody.remove(w)
            assert w.outcome() is None

    @rule()
    def untake(self) -> None:
        item = self.new_item()
        self.channel.untake(item)
        self.model.buffer.insert(0, item)
        self.model.settle()

    @rule(verb=st.sampled_from(["take", "fetch", "wait", "put"]))
    def give_up_at_once(self, verb: str) -> None:
        """The blocking face with no time to wait changes something, or nothing."""
        model, w = self.model, Waiting(self.channel, False)
        line = model.buffer + [item for item, _ in model.putters]
        value: Any
        try:
            if verb == "put":
                value = self.new_item()
                self.channel.put(value, timeout=0)
            else:
                value = getattr(self.channel, verb)(timeout=0)
        except TimeoutError:
            assert model.open
            if verb == "put":
                # On an unbuffered channel who watches saw the item while it was offered.
                model.putters.append((value, w))
                model.settle()
                assert model.putters.pop() == (value, w)
            else:
                assert not line
        except (ChannelClosed, KeyError):
            assert not model.open
            assert verb == "put" or not line
        else:
            if verb == "put":
                model.putters.append((value, w))
            elif verb == "take":
                model.takers.append(w)
            else:
                model.watchers.append((verb, w))
            model.settle()
            assert model.outcomes.pop(w) == ("resolved", None if verb == "put" else value)

    @rule(reason=st.none() | st.builds(KeyError))
    def close(self, reason: BaseException | None) -> None:
        if self.counter % 4:  # not too often, there is little to do afterwards
            return
        self.channel.close(reason)
        if self.model.open:
            self.model.open, self.model.reason = False, reason
        self.model.settle()

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "channel"):
            return
        channel, model = self.channel, self.model
        channel._check()
        there = len(model.buffer) + (len(model.putters) if model.size == 0 else 0)
        assert len(channel) == there
        assert (channel.isready(), channel.isempty()) == (there > 0, there == 0)
        assert (channel.isopen(), channel.isfull()) == (model.open, len(model.buffer) >= model.size)
        for w in self.everybody:
            expected, seen = model.outcomes.get(w), w.outcome()
            if expected is None or expected[0] == "resolved":
                assert seen == expected
            else:
                assert seen is not None
                assert seen[0] == "failed"
                what = expected[1]
                assert isinstance(seen[1], what) if isinstance(what, type) else seen[1] is what

    def teardown(self) -> None:
        """Nothing is lost: what is left comes out in order."""
        if not hasattr(self, "channel"):
            return
        left = list(self.model.buffer)
        self.channel.close()
        seen = [self.channel.take() for _ in range(len(self.channel))]
        assert seen == left


TestComparison = Comparison.TestCase
TestComparison.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
