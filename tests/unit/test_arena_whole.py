"""An error at any call inside the arena leaves it whole: what it was doing is done, or not at all."""

import sys

import pytest

from shmdist.memory import arena as module
from shmdist.memory.arena import Arena, State

GRAIN = 4096
ERRORS = [MemoryError, RecursionError]


class Raiser:
    """Raises an error at the call number `due` that is made inside a module."""

    def __init__(self, file, due, error):
        self.file, self.due, self.error = file, due, error
        self.raised = False

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *failure):
        sys.setprofile(None)

    def _profile(self, frame, event, arg):
        caller = {"c_call": frame, "call": frame.f_back}.get(event)
        if caller is None or caller.f_code.co_filename != self.file:
            return
        self.due -= 1
        if self.due < 0:
            sys.setprofile(None)
            self.raised = True
            raise self.error("raised")


def _filled():
    arena = Arena(GRAIN)
    arena.add_segment(1, 16 * GRAIN)
    arena.add_segment(2, 8 * GRAIN)
    blocks = [arena.take(size * GRAIN, 1) for size in (2, 1, 3, 1, 2)]
    arena.lend(blocks[0].serial, 2)
    arena.change(blocks[1].serial, 3, +1, 2)
    arena.change(blocks[3].serial, 1, -1)
    busy = arena.begin_cooling()
    arena.end(busy[0], State.COLD)
    for extent in busy[1:]:
        arena.end(extent, State.WARM)
    arena.change(blocks[4].serial, 1, -1)
    return arena, blocks


def _counts(arena):
    return {serial: (dict(block.counts), dict(block.told)) for serial, block in arena.blocks.items()}


OPERATIONS = {
    "take what was kept aside": lambda arena, blocks: arena.take(2 * GRAIN, 1),
    "take another size": lambda arena, blocks: arena.take(4 * GRAIN, 1),
    "free": lambda arena, blocks: arena.change(blocks[2].serial, 1, -1),
    "count": lambda arena, blocks: arena.change(blocks[2].serial, 4, +1, 2),
    "hand over": lambda arena, blocks: arena.hand_over(blocks[2].serial, 1, 5),
    "lend": lambda arena, blocks: arena.lend(blocks[2].serial, 5),
    "lose": lambda arena, blocks: arena.lose(1),
    "audited": lambda arena, blocks: arena.audited(3, 2, {}),
    "warm": lambda arena, blocks: arena.begin_warming(GRAIN),
    "cool": lambda arena, blocks: arena.begin_cooling(),
    "add": lambda arena, blocks: arena.add_segment(3, 4 * GRAIN),
    "has warm": lambda arena, blocks: arena.has_warm(4 * GRAIN),
}
#: Of these a part may have been done: who is lost, is lost, and all of it follows later.
NO_WAY_BACK = {"lose"}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_at_each_call(name, error):
    operation = OPERATIONS[name]
    due, raised = 0, True
    while raised:
        arena, blocks = _filled()
        before = _counts(arena)
        done = True
        with Raiser(module.__file__, due, error) as raiser:
            try:
                operation(arena, blocks)
            except error:
                done = False
        raised, due = raiser.raised, due + 1
        arena._check()
        if not done and name not in NO_WAY_BACK:
            assert _counts(arena) == before, due
        for pid in range(1, 6):  # it goes on
            arena.lose(pid)
        for extent in list(arena._busy.values()):
            arena.end(extent, State.COLD)
        assert arena.lent == 0
        for extent in arena.begin_cooling():
            arena.end(extent, State.COLD)
        arena._check()
        assert arena.cold == arena.total
        assert all(arena.drop_segment(number) for number in arena.segments())
    assert due > 3
