"""The arena against a model: whatever is taken, passed on, given back, lost, cooled and warmed."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmdist.memory.arena import Arena, State

GRAIN = 64
ME = 1
PIDS = st.integers(2, 5)


class Model(RuleBasedStateMachine):
    """Processes that hold blocks of process 1's arena; messages of theirs may overtake one another."""

    def __init__(self):
        super().__init__()
        self.arena = Arena(GRAIN)
        self.segments = 0
        self.views = {}  # block's number -> {process: views it has}
        self.spans = {}  # block's number -> (segment, first byte, byte after the last)
        self.rings = {}  # process -> changes it has told and that have not arrived, in order
        self.gone = set()
        self.busy = []

    def alive(self):
        return [pid for pid in range(2, 6) if pid not in self.gone]

    # -------------------------------------------------- the owner

    @rule(pages=st.integers(1, 40))
    def add_segment(self, pages):
        self.segments += 1
        self.arena.add_segment(self.segments, pages * GRAIN)

    @rule(nbytes=st.integers(0, 20 * GRAIN), only=st.sets(st.integers(1, 4)) | st.none())
    def take(self, nbytes, only):
        fits = self.arena.has_warm(nbytes)
        block = self.arena.take(nbytes, ME, only)
        assert fits or block is None
        if block is None:
            assert only is not None or not fits
            return
        assert block.size >= nbytes and (only is None or block.segment in only)
        assert block.serial not in self.views
        self.views[block.serial] = {ME: 1}
        self.spans[block.serial] = (block.segment, block.offset, block.offset + block.size)

    @precondition(lambda self: any(ME in holders for holders in self.views.values()))
    @rule(data=st.data(), pid=PIDS)
    def lend(self, data, pid):
        serial = data.draw(st.sampled_from([s for s, holders in self.views.items() if ME in holders]))
        assert self.arena.lend(serial, pid) == (pid not in self.gone)
        if pid not in self.gone:
            self.views[serial][pid] = self.views[serial].get(pid, 0) + 1

    @precondition(lambda self: any(ME in holders for holders in self.views.values()))
    @rule(data=st.data())
    def let_go(self, data):
        serial = data.draw(st.sampled_from([s for s, holders in self.views.items() if ME in holders]))
        self.drop(serial, ME)
        self.arena.change(serial, ME, -1)

    # -------------------------------------------------- holders

    def drop(self, serial, pid):
        holders = self.views[serial]
        holders[pid] -= 1
        if not holders[pid]:
            del holders[pid]

    def holding(self):
        return [(s, p) for s, holders in self.views.items() for p in holders if p != ME]

    @precondition(lambda self: self.holding())
    @rule(data=st.data(), to=PIDS)
    def pass_on(self, data, to):
        """A holder tells the owner first, then sends; who gets it may be faster with his own word."""
        serial, pid = data.draw(st.sampled_from(self.holding()))
        self.rings.setdefault(pid, []).append((serial, to, +1))
        if to not in self.gone:
            self.views[serial][to] = self.views[serial].get(to, 0) + 1

    @precondition(lambda self: self.holding())
    @rule(data=st.data())
    def give_back(self, data):
        serial, pid = data.draw(st.sampled_from(self.holding()))
        self.drop(serial, pid)
        self.rings.setdefault(pid, []).append((serial, pid, -1))

    @precondition(lambda self: any(self.rings.values()))
    @rule(data=st.data())
    def deliver(self, data):
        pid = data.draw(st.sampled_from([pid for pid, changes in self.rings.items() if changes]))
        self.arena.change(*self.rings[pid].pop(0))

    @precondition(lambda self: len(self.alive()) > 1)
    @rule(data=st.data())
    def die(self, data):
        """What a process wrote before its end is read to the end; then it is lost."""
        pid = data.draw(st.sampled_from(self.alive()))
        for change in self.rings.pop(pid, []):
            self.arena.change(*change)
        self.gone.add(pid)
        for holders in self.views.values():
            holders.pop(pid, None)
        self.arena.lose(pid)

    # -------------------------------------------------- the maintainer

    @rule()
    def begin_cooling(self):
        self.busy += [(extent, State.COLD) for extent in self.arena.begin_cooling()]

    @rule(nbytes=st.integers(1, 10 * GRAIN), works=st.booleans())
    def begin_warming(self, nbytes, works):
        extent = self.arena.begin_warming(nbytes)
        if extent is not None:
            self.busy.append((extent, State.WARM if works else State.COLD))

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def end(self, data):
        index = data.draw(st.integers(0, len(self.busy) - 1))
        self.arena.end(*self.busy.pop(index))

    @rule()
    def drop_cold(self):
        for segment in self.arena.segments():
            if self.arena.drop_segment(segment):
                assert not any(span[0] == segment for span in self.lent_spans())

    # -------------------------------------------------- what must hold

    def lent_spans(self):
        return [self.spans[serial] for serial in self.arena.blocks]

    @invariant()
    def whole(self):
        self.arena._check()

    @invariant()
    def what_is_seen_is_lent(self):
        """No block is free while somebody looks into it."""
        for serial, holders in self.views.items():
            if holders:
                assert serial in self.arena.blocks, (serial, holders)

    @invariant()
    def nothing_is_forgotten(self):
        """When all has been told, only what somebody looks into is lent, with the right counts."""
        if any(self.rings.values()):
            return
        lent = {serial: dict(block.counts) for serial, block in self.arena.blocks.items()}
        assert lent == {serial: holders for serial, holders in self.views.items() if holders}

    def teardown(self):
        for extent, state in self.busy:
            self.arena.end(extent, state)
        for changes in self.rings.values():
            for change in changes:
                self.arena.change(*change)
        for serial, holders in self.views.items():
            for pid, count in holders.items():
                self.arena.change(serial, pid, -count)
        for extent in self.arena.begin_cooling():
            self.arena.end(extent, State.COLD)
        assert not self.arena.blocks and not self.arena.lent
        assert all(self.arena.drop_segment(segment) for segment in self.arena.segments())
        assert (self.arena.total, self.arena.cold) == (0, 0)
        self.arena._check()


TestArena = Model.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
