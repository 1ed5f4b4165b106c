"""Keeps arrays in blocks valid when the user's program forks.

A forked child sees the blocks of its parent, but the cluster does not know it. Its values must
not change when the parent gives them back: they are pinned until the child has ended or has
become another program, which the end of a pipe tells. And what either writes from then on must
stay its own: before the fork they are mapped privately, in their place, so that each gets pages
of his own when he writes, as with all other memory. A value so mapped does not go home in its
block. Shared arrays stay shared.
"""

from __future__ import annotations

import contextlib
import os

from shmdist.memory.leases import OWN, PRIVATE, SHARED, Lease
from shmdist.runtime.block_counts import BlockCounts
from shmdist.serialization import arrays


class ForkGuard:
    """What is done before and after each fork of a process."""

    def __init__(self, blocks: BlockCounts) -> None:
        self._blocks = blocks
        self._pins: list[tuple[int, int, list[Lease]]] = []  # of forks under way: pipe's ends, what is pinned

    def before(self) -> None:
        """Pin the values that a child is going to see."""
        blocks = self._blocks
        blocks.lock.acquire()  # so that the child finds the tables whole
        leases: list[Lease] = []
        ends = (-1, -1)
        try:
            blocks.settle()
            leases = [lease for lease in blocks.holds.leases() if lease.mode != SHARED]
            for lease in leases:
                lease.pins += 1
                if lease.mode == OWN and lease.start and not lease.moving:
                    with contextlib.suppress(OSError):  # then the child tries
                        lease.segment.part(lease.offset, lease.nbytes, shared=False)
                        lease.apart, lease.mode = True, PRIVATE
            if leases:
                ends = os.pipe()  # without it they stay pinned: better that than values that change
        except OSError:
            pass
        finally:
            self._pins.append((*ends, leases))

    def after_in_parent(self) -> None:
        """Unpin them when the child is gone."""
        if not self._pins:
            return  # this process was in no cluster when the fork began
        reads, writes, leases = self._pins.pop()
        self._blocks.lock.release()
        if reads < 0:
            return
        os.close(writes)

        def unpin() -> None:
            os.close(reads)
            with self._blocks.lock:
                self._blocks.settle()
                for lease in leases:
                    lease.pins -= 1
                    if lease in self._blocks.holds.dead and not lease.pins:
                        self._blocks.holds.dead.remove(lease)
                        if not lease.moving:
                            self._blocks.release(lease)
            self._blocks.pay()

        self._blocks.reactor.watch(reads, unpin)

    def after_in_child(self) -> None:
        """Let what the child writes to its values stay its own; the pipe's end stays open with it."""
        if not self._pins:
            return
        reads, _, leases = self._pins.pop()
        self._blocks.lock.release()
        if reads >= 0:
            os.close(reads)
        self._blocks.holds.idle = False  # nobody to wake
        arrays.find_shared = None  # to a cluster of the child they are arrays like any other
        for lease in leases:
            if lease.mode == OWN:  # it is on its way home, or the system refused
                lease.segment.part(lease.offset, lease.nbytes, shared=False)
