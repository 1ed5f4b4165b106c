"""Distributed reference counting under any interleaving that ordered links allow, and any death.

A cluster is simulated: processes with an ordered link to the owner and to each other, references
created, forwarded by whoever holds them, dropped; each step delivers one message of one link.
"""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmdist.refcount.table import RRID, RefTable, State

OWNER = 1
PEERS = (2, 3, 4)
EVERYBODY = (OWNER, *PEERS)
MOST_REFERENCES = 3  # few, so that their words meet


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = RefTable()
        self.alive = set(EVERYBODY)
        # What each process holds: instances, as many as it will write DELs for.
        self.holds: dict[int, Counter[RRID]] = {pid: Counter() for pid in EVERYBODY}
        self.links: dict[tuple[int, int], deque[tuple[str, RRID | int]]] = {}
        self.created: list[RRID] = []  # NEW written
        self.known: set[RRID] = set()  # NEW arrived
        self.freed: set[RRID] = set()
        self.values: dict[RRID, object] = {}
        # ADDs whose frame was never written, because the forwarder was killed in between.
        self.overcounted: Counter[tuple[RRID, int]] = Counter()
        self.steps = 0

    # --- the network -------------------------------------------------------------------------

    def send(self, src: int, dst: int, word: str, about: RRID | int) -> None:
        if src == dst:  # the owner's word to itself takes no time
            self.arrive(src, dst, word, about)
        else:
            self.links.setdefault((src, dst), deque()).append((word, about))

    def arrive(self, src: int, dst: int, word: str, about: RRID | int) -> None:
        if dst not in self.alive:
            return
        if word == "ref":
            assert isinstance(about, RRID)
            self.holds[dst][about] += 1
            return
        assert dst == OWNER
        if word == "eof":
            assert isinstance(about, int)
            self.note_freed(self.table.peer_lost(about))
            return
        assert isinstance(about, RRID)
        if word == "new":
            self.table.create(about, "future", src)
            self.known.add(about)
        elif word == "del":
            self.note_freed(self.table.add(about, src, -1))
        elif word.startswith("add"):
            self.note_freed(self.table.add(about, int(word[3:]), +1))
        elif word == "put":
            entry = self.table.lookup(about)
            if entry.state is State.UNSET:
                value = self.values[about] = object()
                self.table.set_value(entry, value)

    def note_freed(self, entries: list) -> None:  # type: ignore[type-arg]
        for entry in entries:
            assert entry.state is State.FREED
            assert entry.rrid not in self.freed
            self.freed.add(entry.rrid)

    def busy_links(self) -> list[tuple[int, int]]:
        return sorted(link for link, queue in self.links.items() if queue)

    def deliver(self, link: tuple[int, int]) -> None:
        self.arrive(*link, *self.links[link].popleft())

    # --- what processes do -------------------------------------------------------------------

    @precondition(lambda self: len({rrid for _, rrid in self.held()}) < MOST_REFERENCES)
    @rule(data=st.data())
    def create(self, data: st.DataObject) -> None:
        pid = data.draw(st.sampled_from(sorted(self.alive)))
        rrid = RRID(pid, len(self.created))
        self.created.append(rrid)
        self.send(pid, OWNER, "new", rrid)
        self.holds[pid][rrid] += 1

    def held(self, pids: tuple[int, ...] = EVERYBODY) -> list[tuple[int, RRID]]:
        return [(pid, rrid) for pid in pids for rrid in sorted(self.holds[pid])]

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        """Perhaps to one that is dead already, or to one that holds it already."""
        src, rrid = data.draw(st.sampled_from(self.held()))
        dst = data.draw(st.sampled_from([pid for pid in EVERYBODY if pid != src]))
        self.send(src, OWNER, f"add{dst}", rrid)
        self.send(src, dst, "ref", rrid)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.drop_one(*data.draw(st.sampled_from(self.held())))

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def pass_on(self, data: st.DataObject) -> None:
        """Forward and drop: that is how references travel far."""
        src, rrid = data.draw(st.sampled_from(self.held()))
        dst = data.draw(st.sampled_from([pid for pid in EVERYBODY if pid != src]))
        self.send(src, OWNER, f"add{dst}", rrid)
        self.send(src, dst, "ref", rrid)
        self.drop_one(src, rrid)

    def drop_one(self, pid: int, rrid: RRID) -> None:
        self.holds[pid][rrid] -= 1
        self.holds[pid] += Counter()  # forget zeros
        self.send(pid, OWNER, "del", rrid)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        pid, rrid = data.draw(st.sampled_from(self.held()))
        self.send(pid, OWNER, "put", rrid)

    @precondition(lambda self: self.steps > 8 and len(self.alive) > 1)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.kill(data.draw(st.sampled_from(sorted(self.alive - {OWNER}))))

    def kill(self, pid: int) -> None:
        self.alive.discard(pid)
        self.holds[pid] = Counter()
        self.send(pid, OWNER, "eof", pid)

    @precondition(lambda self: self.steps > 8 and self.held(PEERS))
    @rule(data=st.data())
    def die_while_forwarding(self, data: st.DataObject) -> None:
        src, rrid = data.draw(st.sampled_from(self.held(PEERS)))
        dst = data.draw(st.sampled_from([pid for pid in EVERYBODY if pid != src]))
        self.send(src, OWNER, f"add{dst}", rrid)
        self.overcounted[rrid, dst] += 1
        self.kill(src)

    @precondition(lambda self: self.busy_links())
    @rule(data=st.data())
    def deliver_one(self, data: st.DataObject) -> None:
        self.deliver(data.draw(st.sampled_from(self.busy_links())))

    @precondition(lambda self: self.busy_links())
    @rule(data=st.data())
    def deliver_a_whole_link(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from(self.busy_links()))
        while self.links[link]:
            self.deliver(link)

    @precondition(lambda self: any(link[1] != OWNER for link in self.busy_links()))
    @rule(data=st.data())
    def deliver_between_peers(self, data: st.DataObject) -> None:
        """So that references go round while the owner hears nothing."""
        self.deliver(data.draw(st.sampled_from([link for link in self.busy_links() if link[1] != OWNER])))

    # --- what must hold ----------------------------------------------------------------------

    @invariant()
    def table_is_consistent(self) -> None:
        self.steps += 1
        self.table._check()

    @invariant()
    def nothing_is_freed_while_held_or_in_flight(self) -> None:
        needed = {rrid for pid in self.alive for rrid in self.holds[pid]}
        for (_, dst), queue in self.links.items():
            if dst in self.alive:
                needed |= {about for word, about in queue if word == "ref" and isinstance(about, RRID)}
        assert needed.isdisjoint(self.freed)
        for rrid in needed & self.known:
            entry = self.table.get(rrid)
            assert entry is not None
            assert entry.value is self.values.get(rrid)

    def deliver_everything(self) -> None:
        while links := self.busy_links():
            for link in links:
                self.deliver(link)
                self.nothing_is_freed_while_held_or_in_flight()

    def teardown(self) -> None:
        for pid in sorted(self.alive):
            for rrid in list(self.holds[pid].elements()):
                self.drop_one(pid, rrid)
        self.deliver_everything()
        while any(self.holds.values()):  # those that arrived just now
            for pid, rrid in self.held():
                self.drop_one(pid, rrid)
            self.deliver_everything()
        self.table._check()
        left = {(e.rrid, pid): n for e in self.table.entries.values() for pid, n in e.counts.items()}
        assert left == {key: n for key, n in self.overcounted.items() if key[1] in self.alive}
        # Every process that was ever named ends: then nothing at all is left.
        for pid in EVERYBODY:
            if pid in self.alive:
                self.note_freed(self.table.peer_lost(pid))
        assert len(self.table) == 0
        assert self.freed >= self.known


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=600, stateful_step_count=40, deadline=None)
