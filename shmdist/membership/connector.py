"""Connects two workers: tries the addresses that lead to the other one, then the relay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from shmdist.serialization import codec
from shmdist.transport import listener
from shmdist.transport.messages import Kind, PeerInfo

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from shmdist.runtime.node import Node
    from shmdist.transport.link import Link

DIRECT_TIMEOUT = 2.0  # a direct connection may take before process 1 is asked
_ARRIVAL_TIMEOUT = 10.0  # that a connection which was announced may take
_LOOPBACK = ("127.", "::1", "localhost")


class PeerConnections:
    """What a worker knows about connecting to others.

    Attributes
    ----------
    manager : object
        The one given to ``init_worker``, which makes the connections; or None.
    unresponsive_hosts : set of str
        Those that answered nothing: a firewall is waited for once.
    """

    def __init__(self, node: Node) -> None:
        self.manager: Any = None
        self.unresponsive_hosts: set[str] = set()


def reachable(peer: PeerInfo, here: str) -> Iterator[tuple[str, Any]]:
    """Yield the addresses of a process that mean it on the host `here` too."""
    same_network = peer.host.rpartition("/")[0] == here.rpartition("/")[0]
    for family, place in peer.addresses:
        if family == "unix":
            if peer.host == here:
                yield family, place
        elif family == "tcp" and (same_network or not str(place[0]).startswith(_LOOPBACK)):
            yield family, place


def connect_via_manager(node: Node, peer: PeerInfo) -> Connection | None:
    """Return a connection that the manager given to ``init_worker`` makes; None without one."""
    manager = node.part(PeerConnections).manager
    if manager is None:
        return None
    place = peer.addresses[-1] if peer.addresses else None
    config = manager.peer_config(host=peer.name, ospid=peer.ospid, connect_at=place)
    connection: Connection = manager.connect(peer.pid, config)
    return connection


def connections(node: Node, peer: PeerInfo, errors: list[str]) -> Iterator[Connection]:
    """Yield proven connections to a process, by one way after the other; why each failed goes to `errors`."""
    ways: list[tuple[str, Callable[[], Connection | None]]] = []
    made = node.part(PeerConnections)
    if made.manager is not None:
        ways.append(("by the manager", partial(connect_via_manager, node, peer)))
    # A firewall answers nothing: it is waited for once, and not again for each process of the host behind it.
    for family, place in reachable(peer, node.peers.members[node.pid].host):
        if family == "tcp" and peer.host in made.unresponsive_hosts:
            errors.append(f"{family} {place}: that host has not answered before")
            continue
        ways.append((f"{family} {place}", partial(listener.connect, (family, place), DIRECT_TIMEOUT)))
    for name, way in ways:
        try:
            connection = way()
            if connection is not None:
                listener.authenticate_as_client(connection, node.cookie, node.pid)
                yield connection
        except Exception as error:
            if isinstance(error, TimeoutError):
                made.unresponsive_hosts.add(peer.host)
            errors.append(f"{name}: {error}")


def connect_via_relay(node: Node, pid: int) -> Link | str:
    """Have process 1 join this process and another one; returns why not when it cannot.

    It makes a connection to each, tells each who is at the other end, and moves the bytes.
    """
    reply = node.requests.request(1, int(Kind.RELAY), 0, codec.dumps(pid))
    node.requests.wait_inside(reply)
    error = node.requests.open(reply, "asking process 1 for a connection")
    deadline = time.monotonic() + _ARRIVAL_TIMEOUT
    while error is None and time.monotonic() < deadline:
        link = node.peers.links.get(pid)
        if link is not None:
            return link
        time.sleep(0.002)  # its first frame is on the way
    return f"by process 1: {error or 'the connection did not arrive'}"


__all__ = [
    "PeerConnections",
    "DIRECT_TIMEOUT",
    "connect_via_manager",
    "connect_via_relay",
    "connections",
    "reachable",
]
