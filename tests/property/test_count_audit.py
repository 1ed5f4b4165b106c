"""Counts of things passed on by processes that are killed at any step, with several threads in each.

A cluster is simulated. What one thread of a process does and another may come between is two steps:
a count is told, and later the frame is written; a thing is dropped, and later that is told. What is
not written when a process is killed, is never written. Each step delivers one message of one link.
"""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmdist.memory.arena import Arena
from shmdist.refcount.receipts import Receipts
from shmdist.refcount.table import RRID, RefTable

OWNER = 1
PEERS = (2, 3, 4)
EVERYBODY = (OWNER, *PEERS)
MOST = 1  # thing at a time, so that words about it meet


class Blocks:
    """The owner's side for shared arrays."""

    comes_home = False  # the owner counts what comes back to it by itself

    def __init__(self) -> None:
        self.table = Arena(64)
        self.table.add_segment(1, 6400)

    def make(self) -> int:
        block = self.table.take(1, OWNER)
        assert block is not None
        return block.serial

    def counts(self) -> dict[object, dict[int, int]]:
        return {serial: dict(block.counts) for serial, block in self.table.blocks.items()}

    def change(self, thing: int, pid: int, delta: int, reporter: int) -> None:
        self.table.change(thing, pid, delta, reporter)

    def lose(self, pid: int) -> None:
        self.table.lose(pid)


class References:
    """The owner's side for references."""

    comes_home = True

    def __init__(self) -> None:
        self.table = RefTable()
        self.made = 0

    def make(self) -> RRID:
        self.made += 1
        return self.table.create(RRID(OWNER, self.made), "future", OWNER).rrid

    def counts(self) -> dict[object, dict[int, int]]:
        return {rrid: dict(entry.counts) for rrid, entry in self.table.entries.items()}

    def change(self, thing: RRID, pid: int, delta: int, reporter: int) -> None:
        self.table.add(thing, pid, delta, reporter)

    def lose(self, pid: int) -> None:
        self.table.peer_lost(pid)


class Cluster(RuleBasedStateMachine):
    Owner: type = Blocks

    def __init__(self) -> None:
        super().__init__()
        self.owner = self.Owner()
        self.alive = set(EVERYBODY)
        self.holds = {pid: Counter() for pid in EVERYBODY}
        self.receipts = {pid: Receipts() for pid in EVERYBODY}
        self.lost_processes: dict[int, set[int]] = {pid: set() for pid in EVERYBODY}
        self.asked: dict[int, set[int]] = {pid: set() for pid in EVERYBODY}  # of tellers not lost there yet
        self.links: dict[tuple[int, int], deque] = {}
        self.unwritten: dict[int, list] = {pid: [] for pid in EVERYBODY}  # by threads that are not so far
        self.steps = 0

    # --- the network -------------------------------------------------------------------------

    def send(self, src, dst, *message):
        if src == dst:
            self.arrive(src, dst, *message)
        else:
            self.links.setdefault((src, dst), deque()).append(message)

    def busy(self):
        return sorted(link for link, queue in self.links.items() if queue)

    def deliver(self, link):
        self.arrive(*link, *self.links[link].popleft())

    def arrive(self, src, dst, word, *about):
        if dst not in self.alive:
            return
        if word == "frame":
            self.frame(src, dst, *about)
        elif word == "change":
            self.owner.change(*about)
        elif word == "eof":
            self.lost(src, dst)
        elif word == "ask":
            [reporter] = about
            if reporter in self.lost_processes[dst]:
                self.answer(dst, reporter)
            else:
                self.asked[dst].add(reporter)
        else:
            reporter, found = about
            self.owner.table.audited(src, reporter, found)

    def frame(self, src, dst, thing):
        if src != OWNER and (dst != OWNER or self.owner.comes_home):
            if src in self.lost_processes[dst]:
                return  # refused
            self.receipts[dst].note(OWNER, thing, src)
        elif src != OWNER:
            self.owner.change(thing, OWNER, +1, 0)
        self.holds[dst][thing] += 1

    def lost(self, pid, at):
        if pid in self.lost_processes[at]:
            return
        self.lost_processes[at].add(pid)
        if at == OWNER:
            self.owner.lose(pid)
            for holder in self.owner.table.holders_reported_by(pid):
                if holder == OWNER:
                    self.answer(OWNER, pid)
                else:
                    self.send(OWNER, holder, "ask", pid)
        elif pid in self.asked[at]:
            self.answer(at, pid)

    def answer(self, pid, reporter):
        self.unwritten[pid].append((OWNER, "answer", reporter, self.receipts[pid].take(OWNER, reporter)))

    # --- what processes do -------------------------------------------------------------------

    @precondition(lambda self: len(self.owner.counts()) < MOST)
    @rule()
    def make(self):
        self.holds[OWNER][self.owner.make()] += 1

    def held(self, pids=EVERYBODY):
        return [(pid, thing) for pid in pids for thing in sorted(self.holds[pid])]

    @precondition(lambda self: self.held())
    @rule(data=st.data(), at_once=st.booleans())
    def pass_on(self, data, at_once):
        src, thing = data.draw(st.sampled_from(self.held()))
        dst = data.draw(st.sampled_from([pid for pid in EVERYBODY if pid != src]))
        if dst == OWNER and not self.owner.comes_home:
            at_once = True  # no count is told, so the sender's own stands until it is written
        else:
            self.send(src, OWNER, "change", thing, dst, +1, 0 if src == OWNER else src)
        if at_once:
            self.send(src, dst, "frame", thing)
        else:
            self.unwritten[src].append((dst, "frame", thing))

    @precondition(lambda self: self.held())
    @rule(data=st.data(), at_once=st.booleans())
    def drop(self, data, at_once):
        self.drop_one(*data.draw(st.sampled_from(self.held())), at_once)

    def drop_one(self, pid, thing, at_once):
        self.holds[pid][thing] -= 1
        self.holds[pid] += Counter()
        change = (OWNER, "change", thing, pid, -1, self.receipts[pid].spend(OWNER, thing))
        if at_once:
            self.send(pid, *change)
        else:
            self.unwritten[pid].append(change)

    @precondition(lambda self: any(self.unwritten.values()))
    @rule(data=st.data())
    def write(self, data):
        """A thread comes to write; another of the same process may have been faster."""
        pid = data.draw(st.sampled_from([pid for pid, todo in self.unwritten.items() if todo]))
        index = data.draw(st.integers(0, len(self.unwritten[pid]) - 1))
        self.send(pid, *self.unwritten[pid].pop(index))

    @precondition(lambda self: self.steps > 5 and self.held(PEERS) and len(self.alive) > 1)
    @rule(data=st.data())
    def die(self, data):
        self.kill(data.draw(st.sampled_from(sorted(self.alive - {OWNER}))))

    @precondition(lambda self: any(self.unwritten[pid] for pid in PEERS))
    @rule(data=st.data())
    def die_before_it_is_written(self, data):
        self.kill(data.draw(st.sampled_from([pid for pid in PEERS if self.unwritten[pid]])))

    def kill(self, pid):
        self.alive.discard(pid)
        self.holds[pid] = Counter()
        self.unwritten[pid] = []
        for other in EVERYBODY:
            if other != pid:
                self.send(pid, other, "eof")

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def deliver_one(self, data):
        self.deliver(data.draw(st.sampled_from(self.busy())))

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def deliver_a_whole_link(self, data):
        self.deliver_all(*data.draw(st.sampled_from(self.busy())))

    def deliver_all(self, src, dst):
        while self.links.get((src, dst)):
            self.deliver((src, dst))

    @precondition(lambda self: len(self.alive) < len(EVERYBODY))
    @rule()
    def audit_ahead_of_all_else(self):
        """What a death asks and answers is done before links between peers are read, and words written."""
        for src, dst in self.busy():
            if dst == OWNER and src not in self.alive:
                self.deliver_all(src, dst)
        for pid in self.alive - {OWNER}:
            self.deliver_all(OWNER, pid)
        for pid in self.alive:
            answers = [words for words in self.unwritten[pid] if words[1] == "answer"]
            self.unwritten[pid] = [words for words in self.unwritten[pid] if words[1] != "answer"]
            for words in answers:
                self.send(pid, *words)
            self.deliver_all(pid, OWNER)

    def from_the_dead(self):
        """Return the links between peers by which frames of dead ones are on their way."""
        links = [link for link in self.busy() if link[0] not in self.alive and link[1] in self.alive]
        return [(src, dst) for src, dst in links if dst != OWNER and src not in self.lost_processes[dst]]

    @precondition(lambda self: self.from_the_dead())
    @rule(data=st.data())
    def hear_of_a_death_first(self, data):
        """The news of a death may come before a link of the dead one is known; what comes by it is refused."""
        self.lost(*data.draw(st.sampled_from(self.from_the_dead())))

    # --- what must hold ----------------------------------------------------------------------

    @invariant()
    def tables_are_whole(self):
        self.steps += 1
        self.owner.table._check()
        for receipts in self.receipts.values():
            receipts._check()

    @invariant()
    def nothing_is_free_that_is_held_or_on_its_way(self):
        needed = {thing for pid in self.alive for thing in self.holds[pid]}
        for pid in self.alive:
            needed |= {
                about[2] for about in self.unwritten[pid] if about[1] == "frame" and about[0] in self.alive
            }
        for (src, dst), queue in self.links.items():
            if dst in self.alive and src not in self.lost_processes[dst]:
                needed |= {about[1] for about in queue if about[0] == "frame"}
        assert needed <= self.owner.counts().keys()

    def settle(self):
        while self.busy() or any(self.unwritten.values()):
            for pid in EVERYBODY:
                while self.unwritten[pid]:
                    self.send(pid, *self.unwritten[pid].pop())
            for link in self.busy():
                self.deliver(link)
                self.nothing_is_free_that_is_held_or_on_its_way()

    def teardown(self):
        """When all has come, the counts are what is held, to the last; and then nothing at all."""
        self.settle()
        held: dict[object, dict[int, int]] = {}
        for pid in EVERYBODY:
            for thing, count in self.holds[pid].items():
                held.setdefault(thing, {})[pid] = count
        assert self.owner.counts() == held
        for pid in EVERYBODY:
            for thing in list(self.holds[pid].elements()):
                self.drop_one(pid, thing, False)
        self.settle()
        assert not self.owner.counts()
        assert not any(len(receipts) for pid, receipts in self.receipts.items() if pid in self.alive)
        self.tables_are_whole()


class ClusterWithReferences(Cluster):
    Owner = References


TestBlocks = Cluster.TestCase
TestReferences = ClusterWithReferences.TestCase
TestBlocks.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
TestReferences.settings = TestBlocks.settings
