"""Receipts: which process gave us a count, when that was not the owner. Accounting alone.

The protocol is written down in ``runtime.count_audit``. The caller takes the lock that guards the table.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class Receipts:
    """Counts that came in frames of others than the owner, until they are given back.

    Each change is one step, after all that can fail.

    Examples
    --------
    Process 4 sent this one a thing of process 3, which is given back in its name, once:

    >>> receipts = Receipts()
    >>> receipts.note(3, "thing", 4)
    >>> receipts.spend(3, "thing"), receipts.spend(3, "thing"), len(receipts)
    (4, 0, 0)
    """

    __slots__ = ("_owners",)

    def __init__(self) -> None:
        # Owner -> thing -> sender -> count; nothing empty in it, no zeros.
        self._owners: dict[int, dict[Any, dict[int, int]]] = {}

    def __repr__(self) -> str:
        return f"<Receipts {self._owners}>"

    def __len__(self) -> int:
        return len(self._owners)

    def note(self, owner: int, thing: Hashable, sender: int) -> None:
        """A frame of `sender` brought a count of a thing of `owner`."""
        things = self._owners.get(owner)
        senders = None if things is None else things.get(thing)
        if senders is not None:
            senders[sender] = senders.get(sender, 0) + 1
        elif things is not None:
            things[thing] = {sender: 1}
        else:
            self._owners[owner] = {thing: {sender: 1}}

    def spend(self, owner: int, thing: Hashable) -> int:
        """A count is given back; returns in whose name, 0 for nobody's."""
        things = self._owners.get(owner)
        senders = None if things is None else things.get(thing)
        if things is None or senders is None:
            return 0
        sender = next(iter(senders))
        if senders[sender] > 1:
            senders[sender] -= 1
        elif len(senders) > 1:
            del senders[sender]
        elif len(things) > 1:
            del things[thing]
        else:
            del self._owners[owner]
        return sender

    def take(self, owner: int, sender: int) -> dict[Any, int]:
        """Return all of one sender for things of one owner, and forget them."""
        things = self._owners.get(owner, {})
        found = {thing: senders[sender] for thing, senders in things.items() if sender in senders}
        kept = {
            thing: {each: count for each, count in senders.items() if each != sender}
            for thing, senders in things.items()
        }
        kept = {thing: senders for thing, senders in kept.items() if senders}
        if kept:
            self._owners[owner] = kept
        elif things:
            del self._owners[owner]
        return found

    def forget(self, owner: int) -> None:
        """An owner is gone, and nobody counts its things any more."""
        self._owners.pop(owner, None)

    def _check(self) -> None:
        """Assert what must hold between any two calls."""
        for owner, things in self._owners.items():
            assert things and all(things.values()), f"an empty table is kept for process {owner}"
            for thing, senders in things.items():
                assert owner not in senders, f"the owner needs no receipt: {thing}"
                assert all(count > 0 for count in senders.values()), f"no zeros: {thing} {senders}"
