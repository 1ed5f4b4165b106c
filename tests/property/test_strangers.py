"""Whatever comes by a connection: the handshake and the framing end in order, and take no memory for it."""

import contextlib
import socket
import struct
import tracemalloc
from multiprocessing.connection import Connection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.errors import AuthenticationError, VersionMismatch
from shmdist.transport import frame_assembler, listener
from shmdist.transport.handshake import Acceptor, Connector
from shmdist.transport.link import Link
from shmdist.transport.messages import HEADER

COOKIE = b"the cookie"
REFUSALS = (AuthenticationError, VersionMismatch)


def changes(nbytes):
    """Places and new values of bytes: at least one of them differs."""
    change = st.tuples(st.integers(0, nbytes - 1), st.integers(1, 255))
    return st.dictionaries(change.map(lambda c: c[0]), st.integers(1, 255), min_size=1, max_size=8)


def changed(data, how):
    data = bytearray(data)
    for index, mask in how.items():
        data[index] ^= mask
    return bytes(data)


@given(st.binary(max_size=400))
def test_an_acceptor_takes_nothing_but_a_hello(data):
    acceptor = Acceptor(COOKIE, 1)
    with pytest.raises(REFUSALS):
        acceptor.feed(data)
        acceptor.feed(data[:32])
    assert not acceptor.done and acceptor.wants == 0 and acceptor.peer_pid == 0


@given(st.binary(max_size=200).map(lambda b: b.ljust(160, b"\0")))
def test_a_connector_takes_nothing_but_an_answer(data):
    connector = Connector(COOKIE, 2)
    connector.start()
    with pytest.raises(REFUSALS):
        connector.feed(data)
    assert not connector.done and connector.wants == 0


@given(st.integers(0, 3), st.data())
def test_any_change_on_the_way_is_found(step, data):
    connector, acceptor = Connector(COOKIE, 2), Acceptor(COOKIE, 1)
    message, receivers = connector.start(), [acceptor, connector, acceptor, connector]
    with pytest.raises(REFUSALS):
        for number, receiver in enumerate(receivers):
            if number == step:
                message = changed(message, data.draw(changes(len(message))))
            message = receiver.feed(message)
    assert not (connector.done and acceptor.done)


@given(st.binary(min_size=1, max_size=80), st.binary(min_size=1, max_size=80))
def test_two_cookies_agree_only_when_they_are_one(first, second):
    connector, acceptor = Connector(first, 2), Acceptor(second, 1)
    # A key of HMAC is padded with zeros: such cookies are one.
    if first.rstrip(b"\0") == second.rstrip(b"\0") or max(len(first), len(second)) > 64:
        return
    with pytest.raises(AuthenticationError):
        connector.feed(acceptor.feed(connector.start()))


@given(st.lists(st.binary(max_size=300), max_size=5))
@settings(deadline=None)
def test_a_door_refuses_any_stream_of_bytes(pieces):
    ours, theirs = socket.socketpair()
    connection = Connection(theirs.detach())
    with ours:
        for piece in pieces:
            ours.sendall(piece)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises((*REFUSALS, OSError)):
            listener.check(connection, COOKIE, 1, 5.0)
    assert connection.closed


headers = st.builds(
    HEADER.pack,
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 65535),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0, 1, 2, 3, 1000, 2**25, 2**32 - 1]),
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 5, 100, 40_000, 2**40, 2**62, 2**63, 2**64 - 1]),
)
lengths = st.sampled_from([0, 1, 7, 45, 2**40, 2**62, 2**63, 2**63 | 45, 2**63 | 5, 2**64 - 1])
pieces = st.one_of(headers, st.binary(max_size=200), lengths.map(lambda n: struct.pack("<Q", n)))


def little_memory(nbytes):
    if nbytes > 1 << 16:
        raise MemoryError
    return bytearray(nbytes)


def test_no_table_of_lengths_is_too_long_for_memory():
    ours, theirs = socket.socketpair()
    link = Link(Connection(theirs.detach()), 7)
    ours.sendall(HEADER.pack(1, 0, 0, 0, 2**32 - 1, 1, 10))
    assert link.read([]) is False
    link.close()
    ours.close()


@given(st.lists(pieces, max_size=12), st.integers(1, 400))
@settings(deadline=None, max_examples=150)
def test_a_link_reads_any_stream_of_bytes(pieces, step):
    """Even of a member: frames that make no sense end the link, or wait for more, and nothing else.

    A member's word is believed when it announces an array; here there is no memory for large ones.
    """
    ours, theirs = socket.socketpair()
    connection = Connection(theirs.detach())
    connection_link = Link(connection, 7)
    connection_link.is_local = False
    data = b"".join(pieces)
    frames = []
    tracemalloc.start()
    allocate, most = frame_assembler.allocate, frame_assembler._MOST
    try:
        frame_assembler.allocate, frame_assembler._MOST = little_memory, 1000
        alive = True
        for start in range(0, len(data), step):
            with contextlib.suppress(OSError):
                ours.sendall(data[start : start + step])
            try:
                alive = connection_link.read(frames)
            except MemoryError:  # it is tried again, and then the link is ended
                alive = False
            if not alive:
                break
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        frame_assembler.allocate, frame_assembler._MOST = allocate, most
        connection_link.close()
        ours.close()
    assert sum(len(frame.body) for frame in frames if frame.body) <= len(data)
    assert peak < 1 << 20
