"""Roads between two workers: which addresses lead there from here, and what to do where none does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shmdist.wire import codec
from shmdist.wire.messages import Kind, PeerInfo

if TYPE_CHECKING:
    from shmdist.runtime.node import Node
    from shmdist.wire.link import Link

DIRECT = 5.0  # seconds a direct connection may take before process 1 is asked
_ARRIVAL = 10.0  # seconds that a connection which was announced may take
_LOOPBACK = ("127.", "::1", "localhost")


def reachable(peer: PeerInfo, here: str) -> Iterator[tuple[str, Any]]:
    """Yield the addresses of a process that mean it on the host `here` too."""
    same_network = peer.host.rpartition("/")[0] == here.rpartition("/")[0]
    for family, place in peer.addresses:
        if family == "unix":
            if peer.host == here:
                yield family, place
        elif same_network or not str(place[0]).startswith(_LOOPBACK):
            yield family, place


def by_master(node: Node, pid: int) -> Link | str:
    """Have process 1 join this process and another one; returns why not when it cannot.

    It makes a connection to each, tells each who is at the other end, and moves the bytes.
    """
    reply = node.request(1, int(Kind.RELAY), 0, codec.dumps(pid))
    node.wait_inside(reply)
    error = node.open(reply, "asking process 1 for a connection")
    deadline = time.monotonic() + _ARRIVAL
    while error is None and time.monotonic() < deadline:
        link = node.links.get(pid)
        if link is not None:
            return link
        time.sleep(0.002)  # its first frame is on the way
    return f"by process 1: {error or 'the connection did not arrive'}"


__all__ = ["DIRECT", "by_master", "reachable"]
