"""From whom counts came that this process holds, when that was not the owner: accounting alone.

The protocol is written down in ``runtime.audits``. The caller takes the lock that guards the table.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class Receipts:
    """Counts that came in frames of others than the owner, until they are given back.

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
        senders = self._owners.setdefault(owner, {}).setdefault(thing, {})
        senders[sender] = senders.get(sender, 0) + 1

    def spend(self, owner: int, thing: Hashable) -> int:
        """A count is given back; returns in whose name, 0 for nobody's."""
        things = self._owners.get(owner)
        senders = None if things is None else things.get(thing)
        if things is None or senders is None:
            return 0
        sender = next(iter(senders))
        senders[sender] -= 1
        if not senders[sender]:
            self._drop(owner, things, thing, senders, sender)
        return sender

    def take(self, owner: int, sender: int) -> dict[Any, int]:
        """Return all of one sender for things of one owner, and forget them."""
        things = self._owners.get(owner, {})
        found = {thing: senders[sender] for thing, senders in things.items() if sender in senders}
        for thing in found:
            self._drop(owner, things, thing, things[thing], sender)
        return found

    def forget(self, owner: int) -> None:
        """An owner is gone, and nobody counts its things any more."""
        self._owners.pop(owner, None)

    def _drop(
        self,
        owner: int,
        things: dict[Any, dict[int, int]],
        thing: Hashable,
        senders: dict[int, int],
        sender: int,
    ) -> None:
        del senders[sender]
        if not senders:
            del things[thing]
            if not things:
                del self._owners[owner]

    def _check(self) -> None:
        """Assert what must hold between any two calls."""
        for owner, things in self._owners.items():
            assert things and all(things.values()), f"an empty table is kept for process {owner}"
            for thing, senders in things.items():
                assert owner not in senders, f"the owner needs no receipt: {thing}"
                assert all(count > 0 for count in senders.values()), f"no zeros: {thing} {senders}"
