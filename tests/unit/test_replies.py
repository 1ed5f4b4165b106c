"""Operations on references: one answer each, whenever they are withdrawn."""

import pytest

from shmdist.references.channel import Channel
from shmdist.runtime.replies import PendingOperation
from shmdist.transport.messages import IS_ERROR, NOT_RUN


class Link:
    pid = 2


class Node:
    """Notes what is answered."""

    def __init__(self):
        self.waiting = {}
        self.answers = []

    def answer(self, link, call_id, flags, payload):
        self.answers.append("failed" if flags & IS_ERROR else "done")
        return True

    def post(self, link, kind, flags, call_id):
        assert flags == NOT_RUN
        self.answers.append("not done")

    def dump_error(self, captured):
        return None


@pytest.fixture
def node():
    return Node()


@pytest.fixture
def operation(node):
    operation = node.waiting[2, 7] = PendingOperation(node, Link(), 7)
    yield operation
    assert len(node.answers) == 1 and not node.waiting
    assert operation._way is None  # it would hold the operation, and that the value


def take(channel, operation):
    channel.take_async(operation)
    operation.waits(lambda: channel.cancel(operation))


def test_answered_at_once(node, operation):
    channel = Channel(1)
    channel.put("item")
    take(channel, operation)
    operation.withdraw(given_up=False)  # too late
    assert node.answers == ["done"]


def test_answered_later(node, operation):
    channel = Channel(1)
    take(channel, operation)
    assert (2, 7) in node.waiting
    channel.put("item")
    assert node.answers == ["done"]


@pytest.mark.parametrize("given_up", [False, True])
def test_withdrawn_while_it_waits(node, operation, given_up):
    channel = Channel(1)
    take(channel, operation)
    operation.withdraw(given_up=given_up)
    operation.withdraw(given_up=True)  # again does no harm
    channel.put("item")
    assert node.answers == ["not done"] and len(channel) == 1


def test_hurried_before_it_begins_it_finds_what_is_there(node, operation):
    channel = Channel(1)
    channel.put("item")
    operation.withdraw(given_up=False)
    take(channel, operation)
    assert node.answers == ["done"] and len(channel) == 0


def test_hurried_before_it_begins_it_does_not_wait(node, operation):
    channel = Channel(1)
    operation.withdraw(given_up=False)
    take(channel, operation)
    channel.put("item")
    assert node.answers == ["not done"] and len(channel) == 1


def test_withdrawn_between_its_beginning_and_the_word_how(node, operation):
    channel = Channel(1)
    channel.take_async(operation)
    operation.withdraw(given_up=True)
    assert node.answers == []
    operation.waits(lambda: channel.cancel(operation))
    assert node.answers == ["not done"]


def test_resolved_between_its_beginning_and_the_word_how(node, operation):
    channel = Channel(1)
    channel.take_async(operation)
    channel.put("item")
    operation.withdraw(given_up=False)
    operation.waits(lambda: channel.cancel(operation))
    assert node.answers == ["done"]


def test_failed(node, operation):
    channel = Channel(1)
    take(channel, operation)
    channel.close()
    operation.withdraw(given_up=False)
    assert node.answers == ["failed"]
