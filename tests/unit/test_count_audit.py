"""What a lost process told is made what holders have from it: word by word."""

import pickle

import pytest

from shmdist.memory.arena import Arena
from shmdist.memory.mapping import PAGE
from shmdist.refcount.receipts import Receipts
from shmdist.refcount.table import RRID, RefTable
from shmdist.runtime.node import Node
from shmdist.serialization import codec
from shmdist.transport.messages import Frame, Kind

OWNER, HOLDER, TELLER, OTHER = 1, 2, 3, 4


class Blocks:
    """One block of an arena."""

    def __init__(self):
        self.table = Arena(PAGE)
        self.table.add_segment(1, PAGE)
        self.thing = self.table.take(1, OWNER).serial
        self.change, self.lose = self.table.change, self.table.lose

    def counts(self):
        return self.table.blocks[self.thing].counts if self.table.blocks else None


class References:
    """One reference."""

    def __init__(self):
        self.table = RefTable()
        self.thing = RRID(OWNER, 1)
        self.table.create(self.thing, "future", OWNER)
        self.change, self.lose = self.table.add, self.table.peer_lost

    def counts(self):
        return self.table.entries[self.thing].counts if self.table.entries else None


@pytest.fixture(params=[Blocks, References])
def owner(request):
    owner = request.param()
    yield owner
    owner.table._check()


def test_what_was_told_and_never_sent_is_taken_off(owner):
    for _ in range(3):
        owner.change(owner.thing, HOLDER, +1, TELLER)
    owner.lose(TELLER)
    assert owner.table.holders_reported_by(TELLER) == {HOLDER}
    owner.table.audited(HOLDER, TELLER, {owner.thing: 2})
    assert owner.counts() == {OWNER: 1, HOLDER: 2} and not owner.table.holders_reported_by(TELLER)


def test_the_last_count_may_be_one_of_those(owner):
    owner.change(owner.thing, HOLDER, +1, TELLER)
    owner.change(owner.thing, OWNER, -1)
    owner.lose(TELLER)
    assert owner.counts() == {HOLDER: 1}
    assert owner.table.audited(HOLDER, TELLER, {})
    assert owner.counts() is None


def test_what_was_given_back_before_is_not_taken_off_again(owner):
    owner.change(owner.thing, HOLDER, -1, TELLER)  # faster than the word of who sent it
    owner.change(owner.thing, HOLDER, +1, TELLER)
    owner.change(owner.thing, HOLDER, +1, TELLER)
    owner.lose(TELLER)
    owner.table.audited(HOLDER, TELLER, {owner.thing: 1})
    assert owner.counts() == {OWNER: 1, HOLDER: 1}
    owner.change(owner.thing, HOLDER, -1)
    assert owner.counts() == {OWNER: 1}


def test_a_word_that_the_answer_overtook_is_void(owner):
    owner.change(owner.thing, HOLDER, +2, TELLER)
    owner.lose(TELLER)
    owner.table.audited(HOLDER, TELLER, {owner.thing: 1})
    owner.change(owner.thing, HOLDER, -1, TELLER)
    assert owner.counts() == {OWNER: 1, HOLDER: 1}
    owner.change(owner.thing, HOLDER, +1, TELLER)  # one of the teller's own, by another way
    owner.table.audited(HOLDER, TELLER, {})  # asked twice
    assert owner.counts() == {OWNER: 1, HOLDER: 1}


def test_a_count_whose_word_was_lost_is_added(owner):
    owner.lose(TELLER)
    owner.table.audited(HOLDER, TELLER, {owner.thing: 1})
    assert owner.counts() == {OWNER: 1, HOLDER: 1}


def test_a_teller_that_took_its_word_back_is_not_audited(owner):
    owner.change(owner.thing, HOLDER, +1, TELLER)
    owner.change(owner.thing, HOLDER, -1, TELLER)
    owner.lose(TELLER)
    assert not owner.table.holders_reported_by(TELLER)


def test_a_holder_that_is_lost_first(owner):
    owner.change(owner.thing, HOLDER, +1, TELLER)
    owner.change(owner.thing, OTHER, +1, TELLER)
    owner.lose(HOLDER)
    owner.lose(TELLER)
    assert owner.table.holders_reported_by(TELLER) == {OTHER}
    owner.table.audited(HOLDER, TELLER, {owner.thing: 1})
    assert owner.counts() == {OWNER: 1, OTHER: 1}
    owner.table.audited(OTHER, TELLER, {})
    owner.lose(OTHER)
    assert not owner.table.closed


def test_receipts_are_spent_one_by_one():
    receipts = Receipts()
    for sender in (TELLER, TELLER, OTHER):
        receipts.note(OWNER, "thing", sender)
    assert receipts.take(OWNER, OTHER) == {"thing": 1} and receipts.take(OWNER, OTHER) == {}
    assert [receipts.spend(OWNER, "thing") for _ in range(3)] == [TELLER, TELLER, 0]
    receipts.note(OWNER, "thing", TELLER)
    receipts._check()
    receipts.forget(OWNER)
    assert not len(receipts) and repr(receipts) == "<Receipts {}>"


# ---------------------------------------------------------------------- the holder's node


class _Link:
    def __init__(self, pid):
        self.pid = pid
        self.sent = []

    def send(self, parts, interrupted=None, patience=None):
        self.sent.append(pickle.loads(b"".join(parts)[codec.HEADER.size :]))
        return True


@pytest.fixture
def node():
    node = Node(HOLDER)
    node.reactor.start = node.reactor.soon = lambda job: job()
    node.peers.links[OWNER] = _Link(OWNER)
    yield node
    node.reactor.close()


def references_from(sender, *refs):
    payload = codec.Payload()
    payload.refs.extend(refs)
    frame = Frame(int(Kind.CALL), 1, 0, 1, b"", [pickle.dumps(tuple(refs), 5)])
    frame.link = _Link(sender)
    return frame


def question(reporter):
    frame = Frame(int(Kind.AUDIT), 0, 0, HOLDER, pickle.dumps((reporter, OWNER)), [])
    frame.link = _Link(OWNER)
    return frame


def test_a_question_is_answered_when_the_teller_is_lost_here_too(node):
    ref = (RRID(OTHER, 7), OWNER)
    assert node.counts.arrived(references_from(TELLER, ref, ref, (RRID(9, 9), TELLER)))
    node.router.control(question(TELLER))
    assert not node.peers.links[OWNER].sent
    assert node.counts.arrived(references_from(TELLER, ref))  # it was still on its way
    node.peers.lose(TELLER, Exception("killed"))
    assert node.peers.links[OWNER].sent == [(TELLER, HOLDER, {}, {(OTHER, 7): 3})]
    node.router.control(question(TELLER))
    assert node.peers.links[OWNER].sent[1:] == [(TELLER, HOLDER, {}, {})]
    assert not len(node.counts.receipts)


def test_what_comes_of_a_lost_process_is_refused(node):
    node.peers.lose(TELLER, Exception("killed"))
    assert not node.counts.arrived(references_from(TELLER, (RRID(OTHER, 7), OWNER)))
    assert not len(node.counts.receipts)


def test_references_of_their_sender_need_no_receipt(node):
    frame = references_from(OWNER, (RRID(OTHER, 7), OWNER))
    assert node.counts.arrived(frame) and not len(node.counts.receipts)
    assert codec.references(frame) == ((RRID(OTHER, 7), OWNER),)  # read once


def test_what_is_dropped_is_given_back_in_the_name_of_who_sent_it(node):
    ref = RRID(OTHER, 7)
    node.counts.arrived(references_from(TELLER, (ref, OWNER)))  # and the frame is dropped unread
    node.counts.give_back([(ref, OWNER)])
    node.counts.flush_released()
    assert node.peers.links[OWNER].sent == [[(OTHER, 7, HOLDER, -1, TELLER), (OTHER, 7, HOLDER, -1, 0)]]


def test_owner_and_holder_may_be_one(node):
    ref = RRID(OTHER, 7)
    node.counts.create(ref, "future", HOLDER)
    node.counts.arrived(references_from(TELLER, (ref, HOLDER)))
    for _ in range(2):
        node.counts.change_counts([(*ref, HOLDER, +1, TELLER)])  # the second is never sent
    node.peers.lose(TELLER, Exception("killed"))
    assert node.counts.refs.get(ref).counts == {HOLDER: 2}
