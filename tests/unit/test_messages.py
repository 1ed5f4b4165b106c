"""The header's layout and the records, which both ends must agree on."""

from __future__ import annotations

import pickle

import pytest

from shmdist.transport import messages
from shmdist.transport.messages import HEADER, Frame, Hello, Join, Kind, PeerInfo


def test_the_header_is_as_documented() -> None:
    assert HEADER.size == 28
    packed = HEADER.pack(1, 2, 3, 4, 5, 6, 7)
    assert packed == bytes([1, 2, 3, 0, *[4, 0, 0, 0], *[5, 0, 0, 0], *[6, *[0] * 7], *[7, *[0] * 7]])


def test_every_kind_is_in_the_table_of_the_docstring() -> None:
    first = [line.split()[0] for line in (messages.__doc__ or "").splitlines() if line]
    assert [word for word in first if len(word) > 1 and word.isupper()] == [kind.name for kind in Kind]
    assert [kind.value for kind in Kind] == list(range(1, len(Kind) + 1))


@pytest.mark.parametrize(
    "flags",
    [("WANT_VALUE", "WANT_STORE", "BY_ID"), ("IS_ERROR", "NOT_RUN", "STORED")],
    ids=["CALL", "RESULT"],
)
def test_flags_that_meet_are_different_bits(flags: tuple[str, ...]) -> None:
    bits = [getattr(messages, name) for name in (*flags, "HAS_REFS", "BROKEN")]
    assert all(bit.bit_count() == 1 and bit < 256 for bit in bits)
    assert len(set(bits)) == len(bits)


def test_repr_of_frames() -> None:
    frame = Frame(Kind.CALL, 0x11, 2, 3, b"body", [b"x"])
    assert repr(frame) == "<Frame CALL id=3 flags=0x11 lane=2 body=4 buffers=1>"
    assert "kind 99" in repr(Frame(99, 0, 0, 0, b"", []))
    assert frame.link is None


def test_records_travel() -> None:
    peer = PeerInfo(2, "host id", "node7", 123, (("unix", "\0x"), ("tcp", ("h", 1))), frozenset({3}))
    for record in (peer, Hello(2, "host id"), Join(2, True, "all_to_all", (peer,), False, "/usr", 1)):
        again = pickle.loads(pickle.dumps(record, 5))
        assert again == record
        assert type(again) is type(record)
